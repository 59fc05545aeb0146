// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks the documents: the links, and that each command, option, suite, test, variable, message and metric in them exists.

mod run;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use vhost_device_tests::bench::block::BlockOptions;
use vhost_device_tests::bench::gpu::GpuOptions;

use crate::Arguments;
use crate::programs::PROGRAMS;
use crate::workspace::workspace;

/// Options of other programs that the documents mention without the program.
const FOREIGN: &[&str] = &["--ignored"];

/// A Markdown file.
struct Document {
    path: PathBuf,
    text: String,
}

/// Reads the Markdown files in the workspace and in its folders.
fn documents() -> Vec<Document> {
    let mut found = Vec::new();
    let is_visible = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy();
        !name.starts_with('.') && name != "target"
    };
    for path in entries(&workspace()) {
        if path.is_dir() && is_visible(&path) {
            found.extend(entries(&path));
        }
        found.push(path);
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    assert!(found.len() > 10, "{found:?}");
    let read = |path: PathBuf| Document {
        text: fs::read_to_string(&path).unwrap(),
        path,
    };
    found.into_iter().map(read).collect()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Returns the Rust sources below a folder, concatenated, with each string literal in one line.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for path in entries(folder) {
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(path).unwrap();
            let mut pieces = source.split("\\\n");
            text += pieces.next().unwrap_or_default();
            pieces.for_each(|piece| text += piece.trim_start());
        }
    }
    text
}

/// Returns the sources of all installed programs.
fn product() -> String {
    let folders = entries(&workspace()).into_iter().filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        matches!(&*name, "common" | "ctl" | "discovery" | "storage")
            || name.starts_with("vhost-device-")
    });
    folders.map(|path| sources(&path.join("src"))).collect()
}

/// Returns the texts between backquotes.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns the commands in code blocks, and the texts in code spans.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let mut found = Vec::new();
    let mut fenced = false;
    for line in joined.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            let command = line.split(" #").next().unwrap_or_default();
            found.extend(command.split(&['|', '&', ';'][..]).map(str::to_owned));
        } else {
            found.extend(spans(line).map(str::to_owned));
        }
    }
    found
}

/// Returns the examples of a manual page as a code block.
fn examples(manual: &str) -> String {
    let examples = manual.split(".nf\n").skip(1);
    let examples = examples.filter_map(|rest| rest.split(".fi\n").next());
    let text: String = examples.collect();
    format!(
        "```sh\n{}```\n",
        text.replace("\\-", "-").replace("\\e\n", "\\\n")
    )
}

/// Returns the examples of all manual pages as documents.
fn manuals() -> impl Iterator<Item = Document> {
    PROGRAMS.iter().map(|program| Document {
        path: program.name.into(),
        text: examples(program.manual),
    })
}

/// Returns the long options of a command and of its subcommands.
fn options(mut command: clap::Command) -> BTreeSet<String> {
    fn add(command: &clap::Command, all: &mut BTreeSet<String>) {
        let longs = command
            .get_arguments()
            .filter_map(|argument| argument.get_long());
        all.extend(longs.map(|long| format!("--{long}")));
        command
            .get_subcommands()
            .for_each(|command| add(command, all));
    }
    command.build();
    let mut all = BTreeSet::new();
    add(&command, &mut all);
    all
}

/// Returns the options of `cargo xtask` with these arguments.
fn xtask_options(arguments: &[&str]) -> Result<BTreeSet<String>, String> {
    match arguments {
        ["bench", "block", ..] => Ok(options(BlockOptions::augment_args(clap::Command::new("")))),
        ["bench", "gpu", ..] => Ok(options(GpuOptions::augment_args(clap::Command::new("")))),
        [task, ..] if !task.starts_with('-') => {
            let command = Arguments::command();
            let task = command.find_subcommand(task);
            let task = task.ok_or_else(|| "there is no such task".to_owned())?;
            Ok(options(task.clone()))
        }
        _ => Ok(options(Arguments::command())),
    }
}

/// Checks the suites and tests in the arguments of `cargo test`.
fn check_tests(arguments: &[&str]) -> Result<(), String> {
    let root = workspace();
    let mut names = String::new();
    let mut filters = Vec::new();
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        match word {
            "-p" | "--package" => {
                let package = *words.next().ok_or("which package?")?;
                let folder = match package {
                    "vhost-device-common" => "common",
                    "vhost-device-ctl" => "ctl",
                    "vhost-device-storage" => "storage",
                    "vhost-device-tests" => "tests",
                    other => other,
                };
                let folder = root.join(folder).join("src");
                if !folder.is_dir() {
                    return Err(format!("there is no package {package}"));
                }
                names += &sources(&folder);
            }
            "--test" => {
                let suite = *words.next().ok_or("which suite?")?;
                let folder = root.join("tests/tests").join(suite);
                let main = [folder.with_extension("rs"), folder.join("main.rs")];
                let main = main.iter().find(|path| path.is_file());
                names +=
                    &fs::read_to_string(main.ok_or(format!("there is no suite {suite}"))?).unwrap();
                if folder.is_dir() {
                    names += &sources(&folder);
                }
            }
            _ if word.starts_with('-') => {}
            _ => filters.push(word),
        }
    }
    let is_test = |line: &str| ["fn ", "mod "].iter().any(|start| line.contains(start));
    for filter in filters {
        // "NAME" is a placeholder.
        let mut tests = names.lines().filter(|line| is_test(line));
        if filter != "NAME" && !tests.any(|line| line.contains(filter)) {
            return Err(format!("there is no test {filter}"));
        }
    }
    Ok(())
}

/// Checks one command, or a text that may be one.
fn check(command: &str, all: &BTreeSet<String>) -> Result<(), String> {
    let is_variable = |word: &&str| {
        word.split('=').next().is_some_and(|name| {
            word.contains('=') && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
        })
    };
    let words: Vec<&str> = command.split_whitespace().skip_while(is_variable).collect();
    let (known, arguments) = match words.as_slice() {
        ["cargo", "xtask", rest @ ..] => (xtask_options(rest)?, rest),
        ["cargo", "test", rest @ ..] | ["test", rest @ ..] => return check_tests(rest),
        [word, ..] if word.starts_with("--") => (all.clone(), words.as_slice()),
        [word, rest @ ..] => {
            let Some(program) = PROGRAMS.iter().find(|program| program.name == *word) else {
                return Ok(());
            };
            (options((program.command)()), rest)
        }
        [] => return Ok(()),
    };
    for word in arguments {
        let option = word
            .split(&['=', '[', ',', ')'][..])
            .next()
            .unwrap_or_default();
        let name = option.strip_prefix("--").unwrap_or_default();
        let is_name = name.starts_with(char::is_alphabetic) && !name.contains('…');
        if is_name && !known.contains(option) && !FOREIGN.contains(&option) {
            return Err(format!("there is no option {option}"));
        }
    }
    Ok(())
}

#[test]
fn commands_options_suites_and_tests_exist() {
    let mut all = options(Arguments::command());
    for bench in ["block", "gpu"] {
        all.extend(xtask_options(&["bench", bench]).unwrap());
    }
    PROGRAMS
        .iter()
        .for_each(|program| all.extend(options((program.command)())));
    all.extend(["--test".to_owned()]);
    let mut wrong = Vec::new();
    for document in documents().into_iter().chain(manuals()) {
        for command in commands(&document.text) {
            if let Err(why) = check(&command, &all) {
                wrong.push(format!(
                    "{}: `{}`: {why}",
                    document.path.display(),
                    command.trim()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn wrong_commands_are_found() {
    let all = options((PROGRAMS[0].command)());
    for command in [
        "cargo xtask no-such-task",
        "cargo xtask test --no-such-option",
        "cargo xtask bench block --no-such-option=1",
        "vhost-device-rng --blk-file=disk.img",
        "A=1 vhost-device-block --no-such-option",
        "cargo test -p vhost-device-tests --test no_such_suite",
        "test --test block -- --ignored no_such_test",
        "cargo test -p no-such-package",
        "--no-such-option",
    ] {
        assert!(check(command, &all).is_err(), "{command}");
    }
    for command in [
        "--blk-file=disk.img",
        "qemu-system-x86_64 --foreign",
        "cargo xtask bench gpu --quick",
    ] {
        assert_eq!(check(command, &all), Ok(()), "{command}");
    }
}

/// Returns the anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().trim().replace(' ', "-")
}

#[test]
fn link_targets_exist() {
    let mut wrong = Vec::new();
    for document in documents() {
        for link in document.text.split("](").skip(1) {
            let link = link.split(')').next().unwrap_or_default();
            if link.contains("://") {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => document.path.clone(),
                _ => document.path.parent().unwrap().join(file),
            };
            let text = fs::read_to_string(&target).unwrap_or_default();
            let mut headings = text.lines().filter_map(|line| line.strip_prefix('#'));
            let mut has_anchor =
                || headings.any(|line| anchor(line.trim_start_matches('#')) == fragment);
            if !target.exists() || !(fragment.is_empty() || has_anchor()) {
                wrong.push(format!("{}: {link}", document.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Returns the code spans in the first column of the tables in `text`.
fn first_column(text: &str) -> Vec<&str> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| "));
    let found: Vec<&str> = rows
        .filter_map(|row| row.split(" | ").next())
        .flat_map(spans)
        .collect();
    assert!(found.len() > 5, "{found:?}");
    found
}

/// Asserts that the sources contain each piece of these texts. An ellipsis separates pieces.
fn assert_in_sources(texts: &[&str]) {
    let sources = product();
    let pieces = texts.iter().flat_map(|text| text.split('…').map(str::trim));
    let missing: Vec<&str> = pieces.filter(|piece| !sources.contains(piece)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn messages_exist_in_the_programs() {
    let text = fs::read_to_string(workspace().join("docs/troubleshooting.md")).unwrap();
    let (ours, _) = text.split_once("\n## Messages of QEMU").unwrap();
    assert_in_sources(&first_column(ours));
}

#[test]
fn metrics_exist_in_the_programs() {
    let text = fs::read_to_string(workspace().join("docs/statistics.md")).unwrap();
    let names = first_column(&text);
    assert_in_sources(names.strip_prefix(&["vhost_device_…"]).unwrap());
}

#[test]
fn variables_exist_in_the_tests() {
    const PREFIX: &str = "VHOST_DEVICE_";
    let sources = sources(&workspace().join("tests"));
    for document in documents() {
        for rest in document.text.split(PREFIX).skip(1) {
            let end = rest.find(|c: char| !c.is_ascii_uppercase() && c != '_');
            let name = format!("\"{PREFIX}{}\"", &rest[..end.unwrap_or(rest.len())]);
            assert!(sources.contains(&name), "{:?}: {name}", document.path);
        }
    }
}
