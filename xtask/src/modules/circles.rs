// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Circles among files that import each other.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;

use super::imports::Imports;

/// Files that all import each other, directly or through others.
#[derive(Debug, PartialEq, Eq)]
pub struct Circle<'a> {
    /// All files of the group.
    pub files: BTreeSet<&'a Path>,
    /// The imports of the shortest way round.
    pub shortest: Vec<(&'a Path, &'a Path)>,
}

/// Finds all circles.
pub fn circles(imports: &Imports) -> Vec<Circle<'_>> {
    let mut seen: BTreeSet<&Path> = BTreeSet::new();
    let mut circles = Vec::new();
    for file in imports.keys() {
        let reached = reach(file, imports);
        if !reached.contains(file.as_path()) || seen.contains(file.as_path()) {
            continue;
        }
        let reaches_back = |other: &&Path| reach(other, imports).contains(file.as_path());
        let files: BTreeSet<&Path> = reached.into_iter().filter(reaches_back).collect();
        let ways = files.iter().map(|file| way_round(file, imports));
        let shortest = ways.min_by_key(Vec::len).unwrap_or_default();
        seen.extend(&files);
        circles.push(Circle { files, shortest });
    }
    circles
}

/// The files that `file` imports, directly or through others.
fn reach<'a>(file: &Path, imports: &'a Imports) -> BTreeSet<&'a Path> {
    let mut reached = BTreeSet::new();
    let mut left: Vec<&Path> = imported(file, imports).collect();
    while let Some(next) = left.pop() {
        if reached.insert(next) {
            left.extend(imported(next, imports));
        }
    }
    reached
}

/// The shortest way from `file` back to it. Empty if there is none.
fn way_round<'a>(file: &'a Path, imports: &'a Imports) -> Vec<(&'a Path, &'a Path)> {
    let mut seen = BTreeSet::new();
    let mut ways = VecDeque::from([(file, Vec::new())]);
    while let Some((from, way)) = ways.pop_front() {
        for to in imported(from, imports) {
            let mut way = way.clone();
            way.push((from, to));
            if to == file {
                return way;
            }
            if seen.insert(to) {
                ways.push_back((to, way));
            }
        }
    }
    Vec::new()
}

fn imported<'a>(from: &Path, imports: &'a Imports) -> impl Iterator<Item = &'a Path> {
    let to = imports.get(from).into_iter();
    to.flat_map(|to| to.keys().map(|path| path.as_path()))
}
