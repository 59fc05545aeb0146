// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the output of `llvm-cov export` and sums it up for each crate.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value;

/// How many of some lines, functions or regions were executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub covered: u64,
    pub all: u64,
}

impl Count {
    fn add(&mut self, is_covered: bool) {
        self.all += 1;
        self.covered += u64::from(is_covered);
    }

    fn of<'a>(covered: impl IntoIterator<Item = &'a bool>) -> Self {
        let mut count = Self::default();
        covered.into_iter().for_each(|covered| count.add(*covered));
        count
    }

    /// Returns the executed part in percent: 100 if there is nothing to execute.
    pub fn percent(self) -> f64 {
        match self.all {
            0 => 100.0,
            all => 100.0 * self.covered as f64 / all as f64,
        }
    }

    pub fn sum(self, other: Self) -> Self {
        Self {
            covered: self.covered + other.covered,
            all: self.all + other.all,
        }
    }
}

/// The counts of a crate, or of all crates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub lines: Count,
    pub functions: Count,
    pub regions: Count,
}

impl Counts {
    pub fn sum(self, other: Self) -> Self {
        Self {
            lines: self.lines.sum(other.lines),
            functions: self.functions.sum(other.functions),
            regions: self.regions.sum(other.regions),
        }
    }
}

/// The counts of each crate, by its folder, and the lines of each file that were not executed.
#[derive(Debug, Default)]
pub struct Coverage {
    pub crates: BTreeMap<String, Counts>,
    pub missing: BTreeMap<String, Vec<u64>>,
}

/// A line and a column.
type Place = (u64, u64);

/// Reads an export of files below `root`. Ignores the tests of a file, which begin at the line that `first_test_line` returns.
///
/// A generic function is compiled several times. It counts once: a line counts as executed if any instance executes it.
pub fn read(export: &Value, root: &Path, first_test_line: impl Fn(&str) -> u64) -> Coverage {
    let data = export.pointer("/data/0");
    let list = |name: &str| data.and_then(|data| data.get(name)?.as_array());
    let mut files = HashMap::new();
    let mut coverage = Coverage::default();
    for file in list("files").into_iter().flatten() {
        let name = file.get("filename").and_then(Value::as_str);
        let Some((name, inside)) = name.and_then(|name| Some((name, relative(name, root)?))) else {
            continue;
        };
        let end = first_test_line(inside);
        files.insert(name, (inside, end));
        let segments = file.get("segments").and_then(Value::as_array);
        let lines = lines(segments.map_or(&[], Vec::as_slice));
        let lines = lines.range(..end);
        let missing = lines.clone().filter(|(_, covered)| !**covered);
        let missing = missing.map(|(line, _)| *line).collect();
        coverage.missing.insert(inside.into(), missing);
        let counts = coverage.crates.entry(folder(inside)).or_default();
        counts.lines = counts
            .lines
            .sum(Count::of(lines.map(|(_, covered)| covered)));
    }

    let mut functions: BTreeMap<(&str, Place), bool> = BTreeMap::new();
    let mut regions: BTreeMap<(&str, Place, Place), bool> = BTreeMap::new();
    for function in list("functions").into_iter().flatten() {
        let name = function.pointer("/filenames/0").and_then(Value::as_str);
        let Some((file, end)) = name.and_then(|name| files.get(name)) else {
            continue;
        };
        let all = function.get("regions").and_then(Value::as_array);
        let mut is_first = true;
        for region in all.into_iter().flatten().filter_map(Region::read) {
            if region.start.0 >= *end {
                continue;
            }
            let covered = region.count > 0;
            if std::mem::take(&mut is_first) {
                *functions.entry((file, region.start)).or_default() |= covered;
            }
            *regions.entry((file, region.start, region.end)).or_default() |= covered;
        }
    }
    for ((file, _), covered) in functions {
        let counts = coverage.crates.entry(folder(file)).or_default();
        counts.functions.add(covered);
    }
    for ((file, ..), covered) in regions {
        let counts = coverage.crates.entry(folder(file)).or_default();
        counts.regions.add(covered);
    }
    coverage
}

fn relative<'a>(file: &'a str, root: &Path) -> Option<&'a str> {
    Path::new(file).strip_prefix(root).ok()?.to_str()
}

/// Returns the folder of a crate: the first component of a path.
fn folder(file: &str) -> String {
    file.split('/').next().unwrap_or_default().into()
}

/// A region of executable code in the file of a function.
struct Region {
    start: Place,
    end: Place,
    count: u64,
}

impl Region {
    fn read(value: &Value) -> Option<Self> {
        let number = |index: usize| value.get(index)?.as_u64();
        let (file, kind) = (number(5)?, number(7)?);
        let region = Self {
            start: (number(0)?, number(1)?),
            end: (number(2)?, number(3)?),
            count: number(4)?,
        };
        // Other regions are in macros, or are gaps between regions.
        (file == 0 && kind == 0).then_some(region)
    }
}

/// A place where a new count begins.
struct Segment {
    line: u64,
    count: u64,
    has_count: bool,
    /// A region begins here, not a gap between regions.
    begins: bool,
    /// Code that is not executable begins here.
    skips: bool,
}

impl Segment {
    fn read(value: &Value) -> Option<Self> {
        let number = |index: usize| value.get(index)?.as_u64();
        let flag = |index: usize| value.get(index)?.as_bool();
        let (has_count, is_entry, is_gap) = (flag(3)?, flag(4)?, flag(5)?);
        Some(Self {
            line: number(0)?,
            count: number(2)?,
            has_count,
            begins: has_count && is_entry && !is_gap,
            skips: !has_count && is_entry,
        })
    }
}

/// Returns the executable lines of a file, and whether they were executed, by the rules of llvm-cov.
fn lines(segments: &[Value]) -> BTreeMap<u64, bool> {
    let mut lines = BTreeMap::new();
    let mut before: Option<Segment> = None;
    let mut segments = segments.iter().filter_map(Segment::read).peekable();
    while let Some(first) = segments.peek() {
        // Lines without a segment have the count of the last segment before them.
        let line = first.line;
        if let Some(before) = before.as_ref().filter(|before| before.has_count) {
            for between in before.line + 1..line {
                lines.insert(between, before.count > 0);
            }
        }
        let skips = first.skips;
        let count = before.as_ref().filter(|before| before.has_count);
        let mut covered = count.map(|before| before.count > 0);
        let mut begins = false;
        while let Some(segment) = segments.next_if(|segment| segment.line == line) {
            if segment.begins {
                begins = true;
                covered = Some(covered.unwrap_or_default() || segment.count > 0);
            }
            before = Some(segment);
        }
        if let Some(covered) = covered.filter(|_| begins || !skips) {
            lines.insert(line, covered);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_between_two_segments_are_as_the_first_of_them() {
        // A function on lines 1 to 5, in which line 3 begins a block of two lines that was not executed.
        let segments = [
            json!([1, 1, 7, true, true, false]),
            json!([3, 9, 0, true, true, false]),
            json!([5, 1, 7, true, false, false]),
            json!([5, 2, 0, false, false, false]),
        ];
        let expected = [(1, true), (2, true), (3, true), (4, false), (5, false)];
        assert_eq!(lines(&segments), expected.into());
    }

    #[test]
    fn a_generic_function_counts_once_and_tests_do_not() {
        let region = |line: u64, count: u64| json!([line, 1, line, 9, count, 0, 0, 0]);
        let function =
            |file: &str, regions: Value| json!({ "filenames": [file], "regions": regions });
        let export = json!({ "data": [{
            "files": [
                {
                    "filename": "/root/common/src/a.rs",
                    "segments": [[1, 1, 1, true, true, false], [1, 9, 0, false, false, false], [2, 1, 0, true, true, false], [2, 9, 0, false, false, false], [8, 1, 5, true, true, false]],
                },
                { "filename": "/elsewhere/b.rs", "segments": [[1, 1, 1, true, true, false]] },
            ],
            "functions": [
                function("/root/common/src/a.rs", json!([region(1, 1), region(2, 0)])),
                function("/root/common/src/a.rs", json!([region(1, 0), region(2, 0)])),
                function("/root/common/src/a.rs", json!([region(8, 5)])),
                function("/elsewhere/b.rs", json!([region(1, 1)])),
            ],
        }] });
        let coverage = read(&export, Path::new("/root"), |_| 8);
        let half = Count { covered: 1, all: 2 };
        let expected = Counts {
            lines: half,
            functions: Count { covered: 1, all: 1 },
            regions: half,
        };
        assert_eq!(coverage.crates, [("common".to_owned(), expected)].into());
        assert_eq!(coverage.missing["common/src/a.rs"], [2]);
    }
}
