// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-user-discover` on directory trees made for the tests, and the schema that it and our back-ends follow.

#![cfg(test)]

mod apparmor;
mod check;
mod order;
mod output;
mod programs;
mod schema;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;
use vhost_device_tests::process::{self, PATIENCE, Program, option};

const BINARY: &str = "vhost-user-discover";

/// Directory of the distribution's descriptors.
const DATA: &str = "/usr/share/qemu/vhost-user";
/// Directory of the administrator's descriptors.
const CONFIG: &str = "/etc/qemu/vhost-user";
/// Directory of a user's descriptors.
const HOME: &str = "/home/me/.config/qemu/vhost-user";

/// A program without features.
const PLAIN: &str = r#"echo '{"type":"gpu","features":[]}'"#;

/// A root directory.
struct Tree {
    directory: TempDir,
}

impl Tree {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    /// Returns the path of the tree's `path` on the host.
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.directory
            .path()
            .canonicalize()
            .unwrap()
            .join(path.as_ref().strip_prefix("/").unwrap())
    }

    /// Returns the same, and creates the directories above it.
    fn place(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn file(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.place(path);
        fs::write(&path, content).unwrap();
        path
    }

    fn link(&self, path: &str, target: &str) -> PathBuf {
        let path = self.place(path);
        symlink(target, &path).unwrap();
        path
    }

    /// Returns a descriptor of `kind` for the program `binary`.
    fn descriptor(&self, path: &str, kind: &str, binary: &str) -> PathBuf {
        let content = json!({"description": "for a test", "type": kind, "binary": binary});
        self.file(path, content.to_string())
    }

    /// Creates a shell script. Another process writes it, since the kernel does not run a file that anyone has open for writing,
    /// and a child that another test starts at this moment has our files open.
    fn program(&self, path: &str, script: &str) -> PathBuf {
        let source = self.file("/script", format!("#!/bin/sh\n{script}\n"));
        let path = self.place(path);
        let mut install = Command::new("install");
        install.args(["-m", "755"]).arg(source).arg(&path);
        assert_eq!(run(&mut install).code, Some(0));
        path
    }

    /// Returns a descriptor `name` in `directory` and its program, which is called like it.
    fn back_end(&self, directory: &str, name: &str, script: &str) -> PathBuf {
        let binary = format!("/usr/libexec/{name}");
        self.program(&binary, script);
        self.descriptor(&format!("{directory}/{name}.json"), "gpu", &binary)
    }

    /// `vhost-user-discover` in this tree.
    fn discover(&self, task: &str) -> Command {
        // Longer than any program that answers takes, on a busy machine.
        self.discover_within(task, 60.0)
    }

    /// Returns the same, with another limit to the time of a program.
    fn discover_within(&self, task: &str, seconds: f64) -> Command {
        let mut command = process::command(BINARY).unwrap();
        command
            .arg(task)
            .arg(option("root", self.directory.path()))
            .arg(format!("--time-limit={seconds}"))
            .env("HOME", "/home/me")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("XDG_DATA_DIRS")
            .env_remove("XDG_DATA_HOME");
        command
    }

    fn list(&self) -> Ended {
        run(self.discover("list").arg("--json"))
    }

    fn find(&self) -> Ended {
        run(self.discover("find").arg("--type=gpu"))
    }

    fn check(&self) -> Ended {
        run(&mut self.discover("check"))
    }
}

/// What a program that ended by itself has left behind.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    /// Returns the names of the descriptors in the output of `list --json`.
    #[track_caller]
    fn names(&self) -> Vec<String> {
        assert_eq!(self.code, Some(0), "{self:?}");
        let items: Vec<serde_json::Value> = serde_json::from_str(&self.stdout).unwrap();
        let file = |item: &serde_json::Value| item["file"].as_str().unwrap().to_owned();
        let files = items.iter().map(|item| PathBuf::from(file(item)));
        files
            .map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect()
    }

    /// Asserts that `find` found the program of [`Tree::back_end`] with this name.
    #[track_caller]
    fn assert_found(&self, name: &str) {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert_eq!(self.stdout, format!("/usr/libexec/{name}\n"));
    }

    /// Asserts that `find` found nothing.
    #[track_caller]
    fn assert_none_found(&self) {
        assert_eq!(self.code, Some(3), "{self:?}");
        assert_eq!(self.stdout, "");
    }

    /// Asserts that the program succeeded and printed nothing.
    #[track_caller]
    fn assert_silent(&self) {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert_eq!((self.stdout.as_str(), self.stderr.as_str()), ("", ""));
    }

    /// Asserts that `stderr` is one warning about `file`, which contains `word`.
    #[track_caller]
    fn assert_warns(&self, file: &Path, word: &str) {
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        let start = format!("{BINARY}: warning: {}: ", file.display());
        assert!(self.stderr.starts_with(&start), "{}", self.stderr);
        assert!(self.stderr.contains(word), "{}", self.stderr);
    }
}

fn run(command: &mut Command) -> Ended {
    let mut program = Program::spawn(command).unwrap();
    let status = program.wait(4 * PATIENCE).unwrap();
    Ended {
        code: status.code(),
        stdout: program.stdout(),
        stderr: program.stderr(),
    }
}
