// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which file of a crate imports which: follows each name to the file that defines it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::source::{Crate, Use};

/// For each file the files that it imports, with the names of the items.
pub type Imports = BTreeMap<PathBuf, BTreeMap<PathBuf, BTreeSet<String>>>;

/// The most re-exports that a name is followed through.
const MAX_EXPORTS: usize = 8;

/// Finds the imports of a crate.
pub fn imports(source: &Crate) -> Imports {
    let mut imports = Imports::new();
    for (path, module) in &source.modules {
        let mut add = |found: Option<Found>| {
            if let Some(Found { module: to, item }) = found
                && (to.is_empty() || !path.starts_with(&to))
                && let Some(to) = source.modules.get(&to)
                && to.file != module.file
            {
                let imported = imports.entry(module.file.clone()).or_default();
                imported.entry(to.file.clone()).or_default().insert(item);
            }
        };
        for import in &module.uses {
            let found = match import.name {
                Some(_) => find(source, path, &import.path, 0),
                None => find_all(source, path, import),
            };
            // A module shows its children's items to others, and need not use them itself.
            add(found.filter(|found| !(import.is_export && found.module.starts_with(path))));
        }
        for named in &module.paths {
            add(find(source, path, named, 0));
        }
    }
    imports
}

/// An item, and the path of the module that defines it.
struct Found {
    module: Vec<String>,
    item: String,
}

/// Finds the item that `path` names in `module`. Returns None for a module, for items of other crates, and for local names.
fn find(source: &Crate, start: &[String], path: &[String], exports: usize) -> Option<Found> {
    let (module, path) = follow(source, start, path);
    let here = source.modules.get(&module)?;
    let (first, rest) = path.split_first()?;
    if here.items.contains(first) {
        let item = first.clone();
        return Some(Found { module, item });
    }
    if exports == MAX_EXPORTS {
        return None;
    }
    let is_it = |import: &&Use| import.name.as_ref() == Some(first);
    if let Some(import) = here.uses.iter().find(is_it) {
        let path = [&import.path, rest].concat();
        return find(source, &module, &path, exports + 1);
    }
    let mut globs = here.uses.iter().filter(|import| import.name.is_none());
    let found = globs.find_map(|import| {
        let path = [&import.path, path].concat();
        find(source, &module, &path, exports + 1)
    });
    found.or_else(|| {
        // An item that a macro defines. A module alone is not an item.
        let child = [module.as_slice(), std::slice::from_ref(first)].concat();
        let is_item = exports == 0 && module != start && !source.modules.contains_key(&child);
        is_item.then(|| Found {
            module: module.clone(),
            item: first.clone(),
        })
    })
}

/// Goes from `module` along the modules that `path` begins with. Returns the last one, and the rest of the path, which is at least one
/// segment: a name alone may be an item that is called like a module.
fn follow<'a>(
    source: &Crate,
    module: &[String],
    mut path: &'a [String],
) -> (Vec<String>, &'a [String]) {
    let mut module = module.to_vec();
    while let Some((first, rest)) = path.split_first() {
        match first.as_str() {
            "crate" => module.clear(),
            "super" => drop(module.pop()),
            "self" => {}
            name => {
                let child = [module.as_slice(), &[name.to_owned()]].concat();
                if rest.is_empty() || !source.modules.contains_key(&child) {
                    break;
                }
                module = child;
            }
        }
        path = rest;
    }
    (module, path)
}

/// Finds what a `*` stands for: the variants of an enum, or all of a module.
fn find_all(source: &Crate, module: &[String], import: &Use) -> Option<Found> {
    let item = "*".to_owned();
    let mut path = import.path.clone();
    path.push(item.clone());
    let (module, path) = follow(source, module, &path);
    match path {
        [_] => Some(Found { module, item }),
        _ => find(source, &module, path, 0),
    }
}
