// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Splits what a client sends into JSON objects.
//!
//! An object ends with its closing brace, and must not contain a line break. So after a client has sent half an object, its next line is
//! parsed correctly again. Each byte is examined only once, however the bytes arrive.

/// Most bytes of an object.
pub const MOST_BYTES: usize = 64 << 10;
/// Most levels of nested objects and arrays.
const MOST_DEPTH: u32 = 16;

/// Why the next bytes are not an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The line is invalid, for this reason. It has been skipped.
    Line(&'static str),
    /// The object is too long, and its end is unknown.
    TooLong,
}

/// The progress in the first object.
#[derive(Debug, Default)]
pub struct Frames {
    scanned: usize,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// Why the present line is skipped.
    broken: Option<&'static str>,
}

impl Frames {
    /// Removes the first object from `input`; `None` if it is not complete.
    pub fn next(&mut self, input: &mut Vec<u8>) -> Option<Result<Vec<u8>, Broken>> {
        if self.scanned == 0 {
            let space = input.iter().take_while(|byte| byte.is_ascii_whitespace());
            let space = space.count();
            input.drain(..space);
        }
        while let Some(byte) = input.get(self.scanned).copied() {
            self.scanned += 1;
            if let Some(end) = self.step(byte) {
                let rest = input.split_off(self.scanned);
                let frame = std::mem::replace(input, rest);
                *self = Self::default();
                return Some(end.map(|()| frame));
            }
        }
        (input.len() > MOST_BYTES).then_some(Err(Broken::TooLong))
    }

    /// Examines the next byte. Returns a result if the object, or the broken line, ends with it.
    fn step(&mut self, byte: u8) -> Option<Result<(), Broken>> {
        if byte == b'\n' {
            let text = self.broken.unwrap_or("the line ends within the object");
            return Some(Err(Broken::Line(text)));
        }
        if self.broken.is_some() {
            return None;
        }
        if self.depth == 0 && byte != b'{' {
            self.broken = Some("a JSON object is expected");
        } else if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth > MOST_DEPTH {
                self.broken = Some("objects and arrays are nested too deeply");
            } else if self.depth == 0 {
                return Some(Ok(()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what is found in `text`, if it arrives in pieces of `size` bytes.
    fn frames(text: &str, size: usize) -> Vec<Result<String, Broken>> {
        let (mut frames, mut input, mut found) = (Frames::default(), Vec::new(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            input.extend_from_slice(piece);
            while let Some(frame) = frames.next(&mut input) {
                found.push(frame.map(|bytes| String::from_utf8(bytes).unwrap()));
                if found.last() == Some(&Err(Broken::TooLong)) {
                    return found;
                }
            }
        }
        found
    }

    #[test]
    fn objects_end_with_their_brace_however_they_are_sent() {
        let texts = [r#"{"a":"}\"{","b":[{}]}"#, "{}", r#"{"c":{"d":"\\"}}"#];
        for separator in ["", "\n", "\r\n", " "] {
            let all = texts.join(separator);
            for size in [1, 2, 7, 1000] {
                let found = frames(&all, size);
                assert_eq!(found, texts.map(|text| Ok(text.to_owned())), "{all:?}");
            }
        }
        assert_eq!(frames("{\"a\":", 1), []);
    }

    #[test]
    fn a_broken_line_is_skipped() {
        let deep = "{\"a\":".repeat(17);
        for line in ["hello", "[1]", "\"{\"", "{\"a\": 1", "{\"a", "}", &deep] {
            let found = frames(&format!("{line}\n{{}}"), 3);
            assert!(matches!(found[0], Err(Broken::Line(_))), "{line}");
            assert_eq!(found[1..], [Ok("{}".to_owned())], "{line}");
        }
    }

    #[test]
    fn an_object_without_end_is_too_long() {
        let text = format!("{{\"a\":\"{}", "a".repeat(MOST_BYTES));
        assert_eq!(frames(&text, 4096), [Err(Broken::TooLong)]);
    }
}
