// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds programs that AppArmor does not allow libvirt to start: where it is enabled, libvirt's daemons can execute only the programs in
//! their profiles.
//!
//! Only the rules for paths are read, in the profile and in the administrator's local additions. Other included files are not read.

use std::fs;
use std::path::{Path, PathBuf};

use crate::root::Root;

/// Contains `Y` if AppArmor is enabled.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// The directory of the profiles.
const PROFILES: &str = "/etc/apparmor.d";
/// The profiles of libvirt's daemons that start back-ends.
const DAEMONS: [&str; 2] = ["usr.sbin.libvirtd", "usr.sbin.virtqemud"];
/// Limit for the number of patterns that one pattern with alternatives expands to.
const MAX_ALTERNATIVES: usize = 1000;

/// The enforced profiles.
pub(crate) struct Profiles(Vec<Profile>);

struct Profile {
    file: PathBuf,
    rules: Vec<Rule>,
}

/// A rule that allows or denies execution.
#[derive(Debug, PartialEq, Eq)]
struct Rule {
    pattern: String,
    allows: bool,
}

impl Profiles {
    /// Reads libvirt's profiles in `root`. Returns none if AppArmor is disabled.
    pub fn read(root: &Root) -> Self {
        let text = |path: &Path| {
            let path = root.resolve(path).ok()?;
            Some(String::from_utf8_lossy(&fs::read(path).ok()?).into_owned())
        };
        let is_on = text(Path::new(ENABLED)).is_some_and(|text| text.trim() == "Y");
        if !is_on {
            return Self(Vec::new());
        }
        let profile = |daemon: &str| {
            let directory = Path::new(PROFILES);
            let file = directory.join(daemon);
            // A link in one of these directories is enough, whatever its target.
            let is_off = ["disable", "force-complain"].iter().any(|how| {
                let link = root.outside(&directory.join(how).join(daemon));
                fs::symlink_metadata(link).is_ok()
            });
            let content = text(&file).filter(|text| !is_off && !complains(text))?;
            let mut rules = rules(&content, 1);
            if content.contains(&format!("<local/{daemon}>")) {
                let local = text(&directory.join("local").join(daemon)).unwrap_or_default();
                rules.extend(self::rules(&local, 0));
            }
            Some(Profile { file, rules })
        };
        Self(DAEMONS.into_iter().filter_map(profile).collect())
    }

    /// Returns the files of the profiles that do not allow the execution of `program`.
    pub fn refusing<'a>(&'a self, root: &Root, program: &Path) -> Vec<&'a Path> {
        // AppArmor checks the path after all links have been followed.
        let Ok(program) = root.real(program) else {
            return Vec::new();
        };
        let program = program.to_string_lossy();
        let refuses = |profile: &&Profile| {
            let matching = |allows| {
                let mut rules = profile.rules.iter().filter(|rule| rule.allows == allows);
                rules.any(|rule| matches(&rule.pattern, &program))
            };
            !matching(true) || matching(false)
        };
        let refusing = self.0.iter().filter(refuses);
        refusing.map(|profile| profile.file.as_path()).collect()
    }
}

/// Returns whether a profile is in complain mode.
fn complains(profile: &str) -> bool {
    let mut heads = profile
        .lines()
        .filter(|line| line.trim_end().ends_with('{'));
    heads.next().is_some_and(|head| head.contains("complain"))
}

/// Returns the rules on execution at a nesting depth of `depth` braces. Nested profiles have a greater depth.
fn rules(text: &str, depth: usize) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut braces = 0_usize;
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default().trim();
        if line.starts_with('#') {
            continue;
        }
        if line.ends_with('{') {
            braces = braces.saturating_add(1);
        } else if line == "}" {
            braces = braces.saturating_sub(1);
        } else if braces == depth {
            rules.extend(rule(line));
        }
    }
    rules
}

/// Parses `[audit] [deny] [owner] PATH PERMISSIONS [-> PROFILE],`. The permissions can also come before the path.
fn rule(line: &str) -> Option<Rule> {
    let line = line.strip_suffix(',')?;
    let line = line.split(" -> ").next()?;
    let mut path = None;
    let (mut allows, mut executes) = (true, false);
    for word in line.split_whitespace() {
        let word = word.trim_matches('"');
        if word.starts_with('/') || word.starts_with("@{") {
            path = Some(word);
        } else if word == "deny" {
            allows = false;
        } else if word
            .chars()
            .all(|letter| "rwamklxiIpPcCuU".contains(letter))
        {
            executes |= word.contains('x');
        }
    }
    let pattern = path.filter(|_| executes)?.to_owned();
    Some(Rule { pattern, allows })
}

/// A piece of a pattern without alternatives.
enum Piece {
    Byte(u8),
    /// `?`
    One,
    /// `[…]`
    OneOf(Vec<u8>),
    /// `*`: any number of bytes except slashes.
    Name,
    /// `**`: any number of bytes.
    Path,
}

/// Returns whether `pattern` matches `path`.
fn matches(pattern: &str, path: &str) -> bool {
    match alternatives(&without_variables(pattern)) {
        Some(patterns) => patterns.iter().any(|pattern| fits(&pieces(pattern), path)),
        None => true,
    }
}

/// Replaces each `@{variable}`, whose value is not known here, with `**`.
fn without_variables(pattern: &str) -> String {
    let mut text = String::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once("@{") {
        text += before;
        text += "**";
        rest = after.split_once('}').map_or("", |(_, rest)| rest);
    }
    text + rest
}

/// Expands each `{a,b}`. Returns `None` if there are too many alternatives.
fn alternatives(pattern: &str) -> Option<Vec<String>> {
    let mut done = Vec::new();
    let mut left = vec![pattern.to_owned()];
    while let Some(pattern) = left.pop() {
        // The last opening brace contains no other.
        let Some((before, rest)) = pattern.rsplit_once('{') else {
            done.push(pattern);
            continue;
        };
        let (inside, after) = rest.split_once('}')?;
        left.extend(
            inside
                .split(',')
                .map(|word| format!("{before}{word}{after}")),
        );
        if left.len() + done.len() > MAX_ALTERNATIVES {
            return None;
        }
    }
    Some(done)
}

fn pieces(pattern: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut bytes = pattern.bytes().peekable();
    while let Some(byte) = bytes.next() {
        pieces.push(match byte {
            b'*' => match bytes.next_if_eq(&b'*') {
                Some(_) => Piece::Path,
                None => Piece::Name,
            },
            b'?' => Piece::One,
            b'[' => Piece::OneOf(bytes.by_ref().take_while(|byte| *byte != b']').collect()),
            b'\\' => Piece::Byte(bytes.next().unwrap_or(byte)),
            byte => Piece::Byte(byte),
        });
    }
    pieces
}

fn fits(pieces: &[Piece], path: &str) -> bool {
    // For each prefix of the path, whether the pieces so far match it.
    let mut fitting = vec![false; path.len() + 1];
    if let Some(empty) = fitting.first_mut() {
        *empty = true;
    }
    for piece in pieces {
        let mut next = vec![false; fitting.len()];
        let mut before = false;
        let bytes = path.bytes().map(Some).chain([None]);
        for ((fitted, now), byte) in fitting.iter().zip(&mut next).zip(bytes) {
            let takes_any = match piece {
                Piece::Name | Piece::Path => true,
                Piece::Byte(_) | Piece::One | Piece::OneOf(_) => false,
            };
            // `before`: this piece matched the byte before this place.
            *now = before || takes_any && *fitted;
            let from_here = if takes_any { *now } else { *fitted };
            before = from_here
                && byte.is_some_and(|byte| match piece {
                    Piece::Byte(wanted) => byte == *wanted,
                    Piece::One | Piece::Name => byte != b'/',
                    Piece::OneOf(some) => some.contains(&byte),
                    Piece::Path => true,
                });
        }
        fitting = next;
    }
    fitting.last() == Some(&true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_paths() {
        for (pattern, path, fits) in [
            ("/usr/bin/*", "/usr/bin/vhost-device-gpu", true),
            ("/usr/bin/*", "/usr/bin/", true),
            ("/usr/bin/*", "/usr/bin/more/gpu", false),
            ("/usr/bin/*", "/usr/local/bin/gpu", false),
            ("/usr/**", "/usr/local/bin/gpu", true),
            ("/usr/**/gpu", "/usr/local/bin/gpu", true),
            ("/usr/**/gpu", "/usr/local/bin/cpu", false),
            ("/usr/*/gp?", "/usr/bin/gpu", true),
            ("/usr/*/gp?", "/usr/bin/gp", false),
            ("/usr/bin/[gc]pu", "/usr/bin/cpu", true),
            ("/usr/bin/[gc]pu", "/usr/bin/xpu", false),
            (
                "/usr/{lib,lib/qemu,libexec}/vhost-user-gpu",
                "/usr/libexec/vhost-user-gpu",
                true,
            ),
            (
                "/usr/{lib,lib/qemu,libexec}/vhost-user-gpu",
                "/usr/sbin/vhost-user-gpu",
                false,
            ),
            ("/{,usr/}{,s}bin/*", "/usr/sbin/x", true),
            ("/{a,{b,c}d}", "/cd", true),
            ("@{bin}/*", "/usr/bin/x", true),
            ("/a\\*", "/a*", true),
            ("/a\\*", "/ab", false),
        ] {
            assert_eq!(matches(pattern, path), fits, "{pattern} {path}");
        }
        assert!(matches(&"{a,b}".repeat(20), "/x"), "too many alternatives");
    }

    #[test]
    fn rules_are_those_of_the_profile_itself() {
        let profile = "\
            #include <tunables/global>\n\
            profile libvirtd /usr/sbin/libvirtd flags=(attach_disconnected) {\n\
              / r,\n  /** rwmkl,\n\
              /usr/bin/* PUx, # all of them\n\
              # /opt/comment PUx,\n\
              audit deny /{usr/,}sbin/apparmor_parser rwxl,\n\
              ix \"/opt/first\",\n\
              /usr/lib/qemu-bridge-helper Cx -> helper,\n\
              signal (read, send) peer=unconfined,\n\
              profile helper {\n    /opt/nested rmix,\n  }\n\
              owner /opt/last Ux,\n\
            }\n";
        let found = rules(profile, 1);
        let found: Vec<_> = found
            .iter()
            .map(|rule| (&*rule.pattern, rule.allows))
            .collect();
        assert_eq!(
            found,
            [
                ("/usr/bin/*", true),
                ("/{usr/,}sbin/apparmor_parser", false),
                ("/opt/first", true),
                ("/usr/lib/qemu-bridge-helper", true),
                ("/opt/last", true),
            ]
        );
        assert!(!complains(profile));
        assert!(complains(&profile.replace("attach_", "complain,attach_")));
    }
}
