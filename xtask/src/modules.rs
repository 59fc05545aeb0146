// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask modules`: checks which module imports which, so that every crate can be read from top to bottom.
//!
//! A file imports another if it names an item that the other one defines. These do not count:
//!
//! - items of a module around it, except the root of the crate: the files of a folder belong together, and children often have methods
//!   of what their parent defines;
//! - re-exports of the items of a child. A file that uses a re-exported name imports the file that defines the item;
//! - tests.

mod circles;
mod imports;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use serde_json::Value;

use self::circles::{Circle, circles};
use self::imports::{Imports, imports};
use self::source::Crate;
use crate::workspace::{cargo, workspace};

/// The crates whose modules have an order, with the modules at their top, from the highest to the lowest. A module may import those after
/// it, and none before it.
const ORDER: &[(&str, &[&str])] = &[
    (
        "vhost_device_common",
        &[
            "program",
            "session",
            "device",
            "wire",
            "worker",
            "sandbox",
            "state",
            "ring",
            "chain",
            "memory",
            "statistics",
            "verb",
            "log_limit",
            "stderr",
            "file_limit",
            "lock",
            "error",
        ],
    ),
    (
        "vhost_device_storage",
        &[
            "work",
            "engine",
            "disk",
            "throttle",
            "image",
            "layout",
            "access",
            "lock",
            "sync",
            "operation",
            "options",
        ],
    ),
];

/// Checks each crate of the workspace. Returns the findings.
pub fn check() -> Result<Vec<String>, String> {
    let mut findings = Vec::new();
    for (name, root) in crates()? {
        let order = ORDER.iter().find(|(ordered, _)| *ordered == name);
        findings.extend(check_crate(&root, order.map(|(_, order)| *order))?);
    }
    // Paths in the workspace.
    let prefix = format!("{}/", workspace().display());
    findings
        .iter_mut()
        .for_each(|finding| *finding = finding.replace(&prefix, ""));
    Ok(findings)
}

/// The libraries and programs of the workspace: their names and first files.
fn crates() -> Result<Vec<(String, PathBuf)>, String> {
    let mut metadata = cargo(["metadata", "--no-deps", "--format-version=1"]);
    let output = metadata.stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("cannot run cargo: {error}"))?;
    let metadata: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cannot read the output of cargo metadata: {error}"))?;
    let list = |value: &Value, key: &str| {
        let list = value.get(key).and_then(Value::as_array);
        list.cloned().unwrap_or_default()
    };
    let is_product = |kind: &Value| {
        let kind = kind.as_str();
        kind.is_some_and(|kind| kind == "bin" || kind.ends_with("lib"))
    };
    let mut crates = Vec::new();
    for package in list(&metadata, "packages") {
        for target in list(&package, "targets") {
            let text = |key: &str| target.get(key).and_then(Value::as_str);
            if list(&target, "kind").iter().any(is_product)
                && let (Some(name), Some(root)) = (text("name"), text("src_path"))
            {
                crates.push((name.to_owned(), root.into()));
            }
        }
    }
    if crates.is_empty() {
        return Err("cargo metadata lists no crates".to_owned());
    }
    Ok(crates)
}

/// Checks the crate whose first file is `root`.
fn check_crate(root: &Path, order: Option<&[&str]>) -> Result<Vec<String>, String> {
    let source = Crate::read(root)?;
    let imports = imports(&source);
    let mut findings = match order {
        Some(order) => against_order(&source, &imports, order),
        None => Vec::new(),
    };
    findings.extend(
        circles(&imports)
            .iter()
            .map(|circle| show(circle, &imports)),
    );
    if findings.is_empty() {
        // A circle can also go through a parent, whose items its children use.
        let tops = between_tops(&source, &imports);
        findings.extend(circles(&tops).iter().map(|circle| show(circle, &tops)));
    }
    Ok(findings)
}

/// The imports between the modules at the top of a crate, each with all files below it.
fn between_tops(source: &Crate, imports: &Imports) -> Imports {
    let modules = source.modules.iter();
    let modules = modules.filter(|(_, module)| module.file != source.root);
    let tops: BTreeMap<&PathBuf, PathBuf> = modules
        .filter_map(|(path, module)| Some((&module.file, PathBuf::from(path.first()?))))
        .collect();
    let mut joined = Imports::new();
    for (from, imported) in imports {
        for (to, items) in imported {
            if let (Some(from), Some(to)) = (tops.get(from), tops.get(to))
                && from != to
            {
                let all = joined.entry(from.clone()).or_default();
                let all = all.entry(to.clone()).or_default();
                all.extend(items.iter().cloned());
            }
        }
    }
    joined
}

/// The modules at the top of a crate that `order` does not contain, and the imports of one that is above the importing one.
fn against_order(source: &Crate, imports: &Imports, order: &[&str]) -> Vec<String> {
    let mut findings = Vec::new();
    let mut places = BTreeMap::new();
    for (path, module) in &source.modules {
        let Some(top) = path.first() else { continue };
        match order.iter().position(|name| name == top) {
            Some(place) => drop(places.insert(&module.file, (place, top))),
            None if path.len() == 1 => findings.push(format!(
                "{}: ORDER in xtask/src/modules.rs does not contain the module {top}; add it",
                source.root.display(),
            )),
            None => {}
        }
    }
    for (from, imported) in imports {
        for (to, items) in imported {
            if let (Some((importing, _)), Some((place, name))) = (places.get(from), places.get(to))
                && place < importing
            {
                let (from, items) = (from.display(), list(items));
                findings.push(format!(
                    "{from}: imports {items} of {name}, which is above it"
                ));
            }
        }
    }
    findings
}

/// Describes a circle.
fn show(circle: &Circle, imports: &Imports) -> String {
    let mut text = format!("{} files or modules import each other:", circle.files.len());
    for (from, to) in &circle.shortest {
        let items = imports.get(*from).and_then(|imported| imported.get(*to));
        let items = items.map(list).unwrap_or_default();
        text += &format!(
            "\n    {} imports {items} of {}",
            from.display(),
            to.display()
        );
    }
    for file in &circle.files {
        let mut shown = circle.shortest.iter().map(|(from, _)| from);
        if !shown.any(|shown| shown == file) {
            text += &format!("\n    and {}", file.display());
        }
    }
    text
}

fn list(items: &BTreeSet<String>) -> String {
    let items: Vec<&str> = items.iter().map(String::as_str).collect();
    items.join(", ")
}

/// `cargo xtask modules`: prints the findings.
pub fn run() -> Result<ExitCode, String> {
    let findings = check()?;
    for finding in &findings {
        println!("{finding}");
    }
    Ok(match findings.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The findings in a crate of these files. The first one is its root.
    fn findings(files: &[(&str, &str)], order: Option<&[&str]>) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for (name, text) in files {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), text).unwrap();
        }
        let findings = check_crate(&path(files[0].0), order).unwrap();
        let prefix = format!("{}/", directory.path().display());
        findings
            .iter()
            .map(|text| text.replace(&prefix, ""))
            .collect()
    }

    const TWO: (&str, &str) = ("lib.rs", "mod a;\nmod b;");

    #[test]
    fn a_crate_without_a_circle_has_no_findings() {
        let files = [
            ("lib.rs", "mod a;\nmod b;\npub use a::{A, run};"),
            (
                "a/mod.rs",
                "mod inside;\npub use inside::A;\npub fn run() { crate::b::B; }",
            ),
            ("a/inside.rs", "use crate::b::B;\npub struct A(B);"),
            (
                "b.rs",
                "pub struct B;\nuse vhost::a::A;\nfn b(a: &str) { a::x(); }",
            ),
        ];
        assert_eq!(findings(&files, Some(&["a", "b"])), [""; 0]);
    }

    #[test]
    fn a_circle_through_a_parent_or_an_item_of_a_macro_is_found() {
        let inside = ("a/inside.rs", "use super::X;\npub struct A(X);");
        let parent = [
            TWO,
            (
                "a/mod.rs",
                "mod inside;\nuse crate::b::B;\npub struct X(B);",
            ),
            inside,
            ("b.rs", "use crate::a::inside::A;\npub struct B(A);"),
        ];
        assert_eq!(findings(&parent, None).len(), 1);
        let of_macro = [
            TWO,
            ("a.rs", "use crate::b::B;\npub struct A(B);"),
            (
                "b.rs",
                "use crate::a::A;\nmacro_rules! m { ($n:ident) => { pub struct $n; } }\nm!(B);",
            ),
        ];
        assert_eq!(findings(&of_macro, None).len(), 1);
    }

    #[test]
    fn a_circle_is_found_however_it_is_written() {
        for import in [
            "use crate::b::B;",
            "use super::b::B;",
            "use super::b::{self, B as C};",
            "use crate::b::*;",
            "use crate::B;",
            "fn f(b: crate::b::B) {}",
            "fn f() { super::b::B::new(); }",
            "fn f() { use crate::b::B; }",
            "fn f() { vec![crate::b::B]; }",
            "use crate::b;\nfn f() { b::B; }",
            "#[derive(Args)] struct F { #[arg(value_parser = crate::b::B)] f: u8 }",
            "pub use crate::b::B;",
            "mod inside { use super::super::b::B; }",
        ] {
            let a = format!("{import}\npub struct A;");
            let files = [
                ("lib.rs", "mod a;\nmod b;\npub use b::B;"),
                ("a.rs", a.as_str()),
                ("b.rs", "use crate::a::A;\npub struct B(A);"),
            ];
            let found = findings(&files, None);
            assert_eq!(found.len(), 1, "{import}: {found:?}");
            assert!(
                found[0].starts_with("2 files or modules import each other"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_circle_is_shown_by_its_shortest_way_round() {
        let files = [
            ("lib.rs", "mod a;\nmod b;\nmod c;\nmod d;"),
            ("a.rs", "use crate::b::B;\npub struct A;"),
            ("b.rs", "use crate::c::C;\npub struct B;"),
            ("c.rs", "use crate::{a::A, b::B};\npub struct C;"),
            ("d.rs", "use crate::a::A;"),
        ];
        let expected = "3 files or modules import each other:\n    b.rs imports C of c.rs\n    c.rs imports B of b.rs\n    and a.rs";
        assert_eq!(findings(&files, None), [expected]);
    }

    #[test]
    fn a_child_may_use_its_parent_unless_that_is_the_root() {
        let parent = ("a.rs", "mod b;\nuse b::B;\npub struct A;");
        let child = ("a/b.rs", "use super::A;\npub struct B(A);");
        assert_eq!(
            findings(&[("lib.rs", "mod a;"), parent, child], None),
            [""; 0]
        );
        let files = [
            ("main.rs", "mod a;\nuse a::A;\nstruct Main;"),
            ("a.rs", "pub struct A(crate::Main);"),
        ];
        assert_eq!(findings(&files, None).len(), 1);
    }

    #[test]
    fn children_that_use_each_other_are_a_circle() {
        let files = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod b;\nmod c;\npub use self::{b::B, c::C};"),
            ("a/b.rs", "pub struct B(super::C);"),
            ("a/c.rs", "use crate::a::B;\npub struct C(B);"),
        ];
        assert_eq!(findings(&files, None).len(), 1);
    }

    #[test]
    fn tests_do_not_count() {
        let b = ("b.rs", "use crate::a::A;\npub struct B(A);");
        for test in [
            "#[cfg(test)]\nmod tests { use crate::b::B; }",
            "#[cfg(test)]\nmod missing;",
            "#[cfg(all(test, unix))]\nuse crate::b::B;",
            "#[test]\nfn f() { crate::b::B; }",
            "impl A { #[cfg(test)] fn f() { crate::b::B; } }",
            "/// See [`crate::b::B`].\npub(in crate::b) struct C;",
        ] {
            let a = format!("pub struct A;\n{test}");
            assert_eq!(findings(&[TWO, ("a.rs", &a), b], None), [""; 0], "{test}");
        }
        let whole = ("b.rs", "#![cfg(test)]\nuse crate::a::A;");
        let a = ("a.rs", "use crate::b::B;\npub struct A;");
        assert_eq!(findings(&[TWO, a, whole], None), [""; 0]);
    }

    #[test]
    fn a_module_may_not_import_one_above_it() {
        let files = [
            ("lib.rs", "mod high;\nmod low;\npub use high::High;"),
            ("high.rs", "pub struct High;"),
            ("low/mod.rs", "mod inside;"),
            ("low/inside.rs", "use crate::High;"),
        ];
        let expected = "low/inside.rs: imports High of high, which is above it";
        assert_eq!(findings(&files, Some(&["high", "low"])), [expected]);
        assert_eq!(findings(&files, Some(&["low", "high"])), [""; 0]);
        let missing =
            "lib.rs: ORDER in xtask/src/modules.rs does not contain the module low; add it";
        assert_eq!(findings(&files, Some(&["high"])), [missing]);
    }
}
