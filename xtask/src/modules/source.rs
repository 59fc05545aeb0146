// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the modules of a crate: what each defines, what it brings into scope, and what it names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, ImplItem, Item, ItemMod, ItemUse, Meta, UseTree, Visibility};

/// A crate whose files were read.
pub struct Crate {
    /// Its first file.
    pub root: PathBuf,
    /// Its modules, by their paths. That of the root is empty.
    pub modules: BTreeMap<ModulePath, Module>,
}

/// The names of the modules around a module, and its own.
pub type ModulePath = Vec<String>;

/// A module, in a file of its own or inside the file of another one.
#[derive(Default)]
pub struct Module {
    /// The file.
    pub file: PathBuf,
    /// The names that it defines itself.
    pub items: BTreeSet<String>,
    /// Its `use` declarations.
    pub uses: Vec<Use>,
    /// All paths that its code names, as segments.
    pub paths: BTreeSet<Vec<String>>,
}

/// One name, or one `*`, of a `use` declaration.
pub struct Use {
    /// The segments of the path.
    pub path: Vec<String>,
    /// The name that it gets. None for `*`.
    pub name: Option<String>,
    /// Other modules can see it.
    pub is_export: bool,
}

impl Crate {
    /// Reads the crate whose first file is `root`.
    pub fn read(root: &Path) -> Result<Self, String> {
        let mut source = Self {
            root: root.to_owned(),
            modules: BTreeMap::new(),
        };
        let directory = root.parent().unwrap_or(Path::new(""));
        source.read_file(root, directory, Vec::new())?;
        Ok(source)
    }

    /// Reads a file with the content of a module, whose children are in `directory`.
    fn read_file(&mut self, file: &Path, directory: &Path, path: ModulePath) -> Result<(), String> {
        let text = fs::read_to_string(file)
            .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        let parsed = syn::parse_file(&text)
            .map_err(|error| format!("cannot parse {}: {error}", file.display()))?;
        if is_test(&parsed.attrs) {
            return Ok(());
        }
        self.read_items(&parsed.items, file, directory, path)
    }

    fn read_items(
        &mut self,
        items: &[Item],
        file: &Path,
        directory: &Path,
        path: ModulePath,
    ) -> Result<(), String> {
        let mut module = Module {
            file: file.to_owned(),
            ..Module::default()
        };
        for item in items {
            match item {
                Item::Mod(child) if is_test(&child.attrs) => {}
                Item::Mod(child) => self.read_child(child, file, directory, &path)?,
                _ => {
                    module.items.extend(name(item));
                    let mut names = Names {
                        module: &mut module,
                    };
                    names.visit_item(item);
                }
            }
        }
        self.modules.insert(path, module);
        Ok(())
    }

    fn read_child(
        &mut self,
        child: &ItemMod,
        file: &Path,
        directory: &Path,
        parent: &[String],
    ) -> Result<(), String> {
        let name = child.ident.to_string();
        let inside = directory.join(&name);
        let path = [parent, &[name]].concat();
        if let Some((_, items)) = &child.content {
            return self.read_items(items, file, &inside, path);
        }
        let beside = inside.with_extension("rs");
        if beside.is_file() {
            self.read_file(&beside, &inside, path)
        } else {
            self.read_file(&inside.join("mod.rs"), &inside, path)
        }
    }
}

/// Whether these attributes say that something is compiled for tests only.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) => {
            let mut words = Vec::new();
            idents(list.tokens.clone(), &mut |word| words.push(word));
            let has = |word: &str| words.iter().any(|other| other == word);
            list.path.is_ident("cfg") && has("test") && !has("not") && !has("any")
        }
        Meta::NameValue(_) => false,
    })
}

/// Calls `each` with all identifiers among tokens.
fn idents(tokens: TokenStream, each: &mut impl FnMut(String)) {
    for token in tokens {
        match token {
            TokenTree::Ident(ident) => each(ident.to_string()),
            TokenTree::Group(group) => idents(group.stream(), each),
            _ => {}
        }
    }
}

/// The name that an item defines.
fn name(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::TraitAlias(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

/// Collects what the items of a module name.
struct Names<'a> {
    module: &'a mut Module,
}

impl Names<'_> {
    /// Adds the names of a `use` declaration.
    fn add_use(&mut self, tree: &UseTree, mut path: Vec<String>, is_export: bool) {
        let (name, last) = match tree {
            UseTree::Path(tree) => {
                path.push(tree.ident.to_string());
                return self.add_use(&tree.tree, path, is_export);
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_use(tree, path.clone(), is_export);
                }
                return;
            }
            UseTree::Name(tree) => (Some(tree.ident.to_string()), Some(tree.ident.to_string())),
            UseTree::Rename(tree) => (Some(tree.rename.to_string()), Some(tree.ident.to_string())),
            UseTree::Glob(_) => (None, None),
        };
        let name = match (name, last) {
            // `use ring::{self}` brings the name `ring`.
            (Some(name), Some(last)) if last == "self" => {
                let this = if name == "self" {
                    path.last().cloned()
                } else {
                    Some(name)
                };
                if this.is_none() {
                    return;
                }
                this
            }
            (name, last) => {
                path.extend(last);
                name
            }
        };
        self.module.uses.push(Use {
            path,
            name,
            is_export,
        });
    }

    /// Adds the paths among the tokens of a macro.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        let mut after_dot = false;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 || path.is_empty() {
                        self.add_path(std::mem::take(&mut path));
                    }
                    // A field or a method, unless it goes on a path.
                    if !after_dot {
                        path.push(ident.to_string());
                    }
                    (colons, after_dot) = (0, false);
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Punct(punct) => {
                    self.add_path(std::mem::take(&mut path));
                    (colons, after_dot) = (0, punct.as_char() == '.');
                }
                TokenTree::Group(group) => {
                    self.add_path(std::mem::take(&mut path));
                    self.add_tokens(group.stream());
                    (colons, after_dot) = (0, false);
                }
                TokenTree::Literal(_) => {
                    self.add_path(std::mem::take(&mut path));
                    (colons, after_dot) = (0, false);
                }
            }
        }
        self.add_path(path);
    }

    fn add_path(&mut self, path: Vec<String>) {
        if !path.is_empty() {
            self.module.paths.insert(path);
        }
    }
}

impl<'ast> Visit<'ast> for Names<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Const(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Macro(item) => &item.attrs,
            Item::Mod(item) => &item.attrs,
            Item::Static(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        let is_test = matches!(item, ImplItem::Fn(item) if is_test(&item.attrs));
        if !is_test {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.leading_colon.is_none() {
            let is_export = !matches!(item.vis, Visibility::Inherited);
            self.add_use(&item.tree, Vec::new(), is_export);
        }
    }

    // `pub(in path)` names a module, but imports nothing.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let segments = path.segments.iter();
            self.add_path(segments.map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        self.add_tokens(item.tokens.clone());
        visit::visit_macro(self, item);
    }

    fn visit_meta_list(&mut self, list: &'ast syn::MetaList) {
        self.add_tokens(list.tokens.clone());
        visit::visit_meta_list(self, list);
    }
}
