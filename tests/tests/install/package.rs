// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The Debian package that `cargo xtask deb` makes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_tests::guest::find_program;
use vhost_device_tests::skip::skip;

use crate::{DISCOVER, assert_silent, described, expected, files, run, succeed, xtask};

const PACKAGE: &str = "vhost-device";

/// How long to wait for another dpkg.
const BUSY: Duration = Duration::from_secs(300);

/// Returns the package in its own directory, or `None` on hosts that are not Debian. It is built once.
fn package() -> Option<(TempDir, PathBuf)> {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    if find_program("dpkg-shlibdeps").is_none() {
        skip("dpkg-dev is not installed");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let package = directory.path().join("package.deb");
    let content = CONTENT.get_or_init(|| {
        succeed(xtask().arg("deb").arg("--output").arg(&package));
        fs::read(&package).unwrap()
    });
    fs::write(&package, content).unwrap();
    Some((directory, package))
}

/// Unpacks the package, and returns the directory.
fn unpack(package: &Path) -> PathBuf {
    let tree = package.with_file_name("tree");
    succeed(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([package, &tree]),
    );
    tree
}

/// Runs dpkg, when no other one is running.
fn dpkg(arguments: &[&str]) -> Output {
    let deadline = Instant::now() + BUSY;
    loop {
        let mut command = Command::new("dpkg");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        let output = run(command.env("LC_ALL", "C.UTF-8").args(arguments));
        let is_locked = String::from_utf8_lossy(&output.stderr).contains("lock was locked by");
        if !is_locked || Instant::now() > deadline {
            return output;
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The package, installed on this host. Removed when this is dropped.
struct Installed;

impl Installed {
    fn new(package: &Path) -> Self {
        // Before the installation, which may fail half-way.
        let installed = Self;
        let output = dpkg(&["--install", package.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        installed
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let output = dpkg(&["--purge", PACKAGE]);
        assert!(output.status.success() || thread::panicking(), "{output:?}");
    }
}

#[test]
#[ignore = "builds release binaries"]
fn the_package_has_the_files_that_are_installed() {
    let Some((_directory, package)) = package() else {
        return;
    };
    let mut expected = expected("/usr", "share/zsh/vendor-completions");
    expected.insert("/usr/share/doc/vhost-device/copyright".into(), 0o644);
    assert_eq!(files(&unpack(&package)), expected);
}

#[test]
#[ignore = "builds release binaries"]
fn the_package_says_what_it_is_and_needs() {
    let Some((_directory, package)) = package() else {
        return;
    };
    let field = |name| {
        let mut command = Command::new("dpkg-deb");
        succeed(command.arg("--field").arg(&package).arg(name))
    };
    assert_eq!(field("Package").trim_end(), PACKAGE);
    let version = field("Version");
    assert!(version.starts_with(env!("CARGO_PKG_VERSION")), "{version}");
    assert_eq!(field("Section").trim_end(), "admin");
    assert!(field("Maintainer").starts_with("vhost-device developers <"));
    assert!(field("Description").starts_with("vhost-user devices for virtual machines\n"));
    let depends = field("Depends");
    for dependency in depends.trim_end().split(", ") {
        assert!(
            ["libc6 ", "libgcc-s1 "]
                .iter()
                .any(|name| dependency.starts_with(name)),
            "{dependency}"
        );
    }
    let architecture = succeed(Command::new("dpkg").arg("--print-architecture"));
    assert_eq!(field("Architecture"), architecture);
}

/// Installed on this host as root, otherwise unpacked.
#[test]
#[ignore = "builds release binaries"]
fn the_package_is_found_when_installed_and_gone_when_removed() {
    let Some((_directory, package)) = package() else {
        return;
    };
    let tree = unpack(&package);
    let files: Vec<_> = files(&tree).into_keys().collect();
    let is_free = files.iter().all(|path| is_absent(path));
    if !rustix::process::geteuid().is_root() || !is_free {
        let mut check = Command::new(tree.join("usr/bin").join(DISCOVER));
        assert_silent(check.env_clear().arg("check").arg("--root").arg(tree));
        return skip("the package was only unpacked: not root, or its files are there already");
    }

    let installed = Installed::new(&package);
    let discover = || {
        let mut command = Command::new(DISCOVER);
        // Not the user's own descriptors.
        command.env_clear().env("PATH", "/usr/bin");
        command
    };
    let output = run(discover().arg("check"));
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    // Other packages may have findings.
    assert!(!said.contains(PACKAGE), "{said}");
    for device in described() {
        let found = succeed(discover().args(["find", "--type", device]));
        assert!(found.starts_with('/'), "{found}");
        let listed = succeed(discover().args(["list", "--type", device]));
        let binary = format!("/usr/bin/vhost-device-{device}");
        assert!(listed.contains(&binary), "{listed}");
    }
    drop(installed);
    for path in files {
        assert!(is_absent(&path), "{} is left", path.display());
    }
    assert!(is_absent(Path::new("/usr/share/doc/vhost-device")));
}

fn is_absent(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}
