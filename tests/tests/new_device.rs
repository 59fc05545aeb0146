// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device of docs/new-device.md, built from the text and run as it says.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vhost_device_tests::ended::Ended;
use vhost_device_tests::process::{self, Program, option};
use vhost_device_tests::uml;

const DOCUMENT: &str = include_str!("../../docs/new-device.md");
/// To build the core and the device on a busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(900);
const GUEST_LIMIT: Duration = Duration::from_secs(60);

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the blocks of the document in this language.
fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let pieces = DOCUMENT.split(fence.as_str()).skip(1);
    let blocks = pieces.map(|piece| piece.split("```").next().unwrap());
    blocks.collect()
}

/// Returns the files of the document: blocks whose first line is a comment with a path.
fn files() -> Vec<(&'static str, &'static str)> {
    let all = [blocks("toml"), blocks("rust")].concat();
    let path = |block: &'static str| {
        let (comment, text) = block.split_once('\n')?;
        let path = comment.trim_start_matches(['#', '/', ' ']);
        path.starts_with("vhost-device-dice/")
            .then_some((path, text))
    };
    all.into_iter().filter_map(path).collect()
}

/// Makes a copy of the workspace that has the device too.
fn write_workspace(root: &Path) {
    let _ = fs::remove_dir_all(root);
    fs::create_dir_all(root).unwrap();
    for entry in fs::read_dir(workspace()).unwrap() {
        let entry = entry.unwrap();
        let (name, path) = (entry.file_name(), entry.path().canonicalize().unwrap());
        match name.to_str().unwrap() {
            "target" | ".git" => {}
            "Cargo.toml" | "Cargo.lock" => drop(fs::copy(path, root.join(name)).unwrap()),
            _ => symlink(path, root.join(name)).unwrap(),
        }
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let member = blocks("toml")[0].trim();
    assert!(member.ends_with(','), "{member}");
    let members = format!("members = [{member} ");
    let with_member = manifest.replace("members = [", &members);
    assert_ne!(with_member, manifest);
    fs::write(root.join("Cargo.toml"), with_member).unwrap();
    let files = files();
    assert_eq!(files.len(), 2, "files of the document");
    for (path, text) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

#[test]
#[ignore = "builds a crate and boots a guest: cargo xtask test"]
fn the_device_of_the_document_answers_a_guest() {
    let root = uml::work().unwrap();
    write_workspace(&root.path().join("workspace"));
    let target = workspace().join("target").canonicalize().unwrap();
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--offline", "--package=vhost-device-dice"])
        .current_dir(root.path().join("workspace"))
        .env("CARGO_TARGET_DIR", target.join("new-device"));
    let built = Ended::within(BUILD_LIMIT, &mut build);
    assert_eq!(built.code, Some(0), "{}", built.stderr);
    let program = target.join("new-device/debug/vhost-device-dice");
    let describe = Ended::within(
        GUEST_LIMIT,
        Command::new(&program).arg("--print-capabilities"),
    );
    assert!(describe.stdout.contains(r#""type": "rng""#), "{describe:?}");

    let socket = root.path().join("dice.sock");
    let mut dice = Command::new(&program);
    dice.arg(option("socket-path", &socket)).arg("--sides=2");
    let _dice = Program::serve(&mut dice, &socket).unwrap();
    let mut device = socket.into_os_string();
    device.push(":4");
    let mut guest = process::command("user-mode-linux").unwrap();
    guest.arg("--device").arg(device);
    guest.args(["dd", "if=/dev/hwrng", "bs=16", "count=1"]);
    let guest = Ended::within(GUEST_LIMIT, &mut guest);
    assert_eq!(guest.code, Some(0), "{guest:?}");
    let throws = guest.stdout.trim();
    assert_eq!(throws.len(), 16, "{guest:?}");
    assert!(
        throws.bytes().all(|throw| matches!(throw, b'1' | b'2')),
        "{throws}"
    );
}
