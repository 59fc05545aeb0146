// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Formats the output. Descriptors and programs are not trusted: their control characters are escaped, so that they cannot control a
//! terminal.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

use super::BackEnd;
use crate::problem::Finding;
use crate::schema::{VHostUserBackendCapabilities, VhostUserBackend};

/// Returns whether a terminal interprets `character`: control characters, and characters that change the direction of text or break
/// lines.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Returns `text` with control characters written as `\u{1b}`.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if is_control(character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Returns a path with bytes that are not UTF-8 written as `\xff`.
pub fn path(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        text += &escaped(chunk.valid());
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Formats findings with their remedies.
pub fn findings(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { file, problem } in findings {
        let (file, remedy) = (path(file), problem.remedy());
        let problem = escaped(&problem.to_string());
        let _ = writeln!(text, "{file}: {problem}\n    {remedy}");
    }
    text
}

/// Formats a table with a line for each back-end.
pub fn table(back_ends: &[BackEnd]) -> String {
    let mut rows = vec![["TYPE", "FEATURES", "PROGRAM", "DESCRIPTOR"].map(str::to_owned)];
    for BackEnd { descriptor, answer } in back_ends {
        let features = match answer {
            Some(Ok(capabilities)) => capabilities.features.clone().unwrap_or_default().join(","),
            Some(Err(_)) | None => "?".to_owned(),
        };
        let features = Some(features).filter(|features| !features.is_empty());
        rows.push([
            escaped(&descriptor.backend.r#type),
            escaped(&features.unwrap_or("-".to_owned())),
            escaped(&descriptor.backend.binary),
            path(&descriptor.file),
        ]);
    }
    let widest = |column: fn(&[String; 4]) -> &String| {
        let widths = rows.iter().map(|row| column(row).chars().count());
        widths.max().unwrap_or(0)
    };
    let widths = (
        widest(|[kind, ..]| kind),
        widest(|[_, features, ..]| features),
        widest(|[_, _, program, _]| program),
    );
    let mut text = String::new();
    for [kind, features, program, file] in &rows {
        let (first, second, third) = widths;
        let _ = writeln!(
            text,
            "{kind:first$}  {features:second$}  {program:third$}  {file}"
        );
    }
    text
}

/// An element of the output of `list --json`.
#[derive(Serialize)]
struct Item<'a> {
    file: String,
    #[serde(flatten)]
    backend: &'a VhostUserBackend,
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<&'a VHostUserBackendCapabilities>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Formats the back-ends as a JSON array.
pub fn json(back_ends: &[BackEnd]) -> Result<String, serde_json::Error> {
    let items = back_ends.iter().map(|BackEnd { descriptor, answer }| {
        let answer = answer.as_ref();
        Item {
            file: descriptor.file.to_string_lossy().into_owned(),
            backend: &descriptor.backend,
            capabilities: answer.and_then(|answer| answer.as_ref().ok()),
            error: answer.and_then(|answer| answer.as_ref().err().map(ToString::to_string)),
        }
    });
    let plain = serde_json::to_string_pretty(&items.collect::<Vec<_>>())?;
    let mut text = String::with_capacity(plain.len() + 1);
    for character in plain.chars() {
        // In JSON only strings contain such characters, and they can be escaped there.
        if is_control(character) && character != '\n' {
            let _ = write!(text, "\\u{:04x}", u32::from(character));
        } else {
            text.push(character);
        }
    }
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    use crate::descriptor::Descriptor;

    const HOSTILE: &str = "a\u{1b}[2J\u{9b}1m\u{202e}\r\n\t\u{7f}\\ü";

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(
            escaped(HOSTILE),
            "a\\u{1b}[2J\\u{9b}1m\\u{202e}\\r\\n\\t\\u{7f}\\ü"
        );
    }

    #[test]
    fn paths_that_are_not_utf_8_are_shown() {
        let name = OsStr::from_bytes(b"/a\xff\n\xc3\xbc");
        assert_eq!(path(Path::new(name)), "/a\\xff\\nü");
    }

    #[test]
    fn json_has_no_control_characters_and_loses_nothing() {
        let backend = VhostUserBackend {
            description: HOSTILE.to_owned(),
            r#type: "gpu".to_owned(),
            binary: "/gpu".to_owned(),
            tags: Vec::new(),
        };
        let descriptor = Descriptor {
            file: "/50.json".into(),
            backend: backend.clone(),
        };
        let text = json(&[BackEnd {
            descriptor,
            answer: None,
        }])
        .unwrap();
        assert!(!text.chars().any(|c| is_control(c) && c != '\n'), "{text}");
        let items: Vec<VhostUserBackend> = serde_json::from_str(&text).unwrap();
        assert_eq!(items, [backend]);
    }
}
