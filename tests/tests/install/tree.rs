// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tree that `cargo xtask install --destdir` makes.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use vhost_device_common::ring::crash_point::KILL_AFTER;
use vhost_device_tests::guest::find_program;
use vhost_device_tests::process;
use vhost_device_tests::skip::skip;

use crate::{
    DEVICES, DISCOVER, SUBCOMMANDS, TOOLS, assert_silent, described, expected, files, install, run,
    succeed, xtask,
};

/// Returns the names of all programs, with their paths.
fn programs(tree: &Path) -> Vec<(String, PathBuf)> {
    let device = |device: &&str| {
        let name = format!("vhost-device-{device}");
        let path = tree.join("usr/bin").join(&name);
        (name, path)
    };
    let tool = |name: &str| (name.to_owned(), tree.join("usr/bin").join(name));
    let tools = TOOLS.map(tool);
    DEVICES.iter().map(device).chain(tools).collect()
}

/// Returns the long options in a help text.
fn options(help: &str) -> Vec<&str> {
    let words = help.lines().filter_map(|line| {
        let line = line.trim_start();
        line.split([' ', ',', '=', '['])
            .take_while(|word| word.starts_with('-') || word.is_empty())
            .find(|word| word.starts_with("--"))
    });
    words.collect()
}

#[test]
#[ignore = "builds release binaries"]
fn each_file_has_its_place_and_mode_whatever_the_umask() {
    for umask in ["000", "077"] {
        let tree = tempfile::tempdir().unwrap();
        let root = tree.path().join("root");
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"])
            .arg(process::binary("xtask").unwrap())
            .arg("install")
            .arg("--destdir")
            .arg(&root);
        let said = succeed(&mut command);
        let expected = expected("/usr/local", "share/zsh/site-functions");
        assert_eq!(files(&root), expected, "umask {umask}");
        for path in expected.keys() {
            let path = root.join(path.strip_prefix("/").unwrap());
            let line = format!("Installing {}\n", path.display());
            assert!(said.contains(&line), "{line} is missing: {said}");
        }
        assert!(said.contains("libvirt does not search /usr/local/share/qemu/vhost-user"));
    }
}

#[test]
#[ignore = "builds release binaries"]
fn directories_follow_the_options() {
    let tree = tempfile::tempdir().unwrap();
    succeed(
        xtask()
            .args(["install", "--prefix=/opt//vm/", "--libexecdir=/usr/lib"])
            .args(["--descriptors=/etc/qemu/vhost-user", "--destdir"])
            .arg(tree.path()),
    );
    let read = |path: &str| fs::read_to_string(tree.path().join(path)).unwrap();
    let binary = "/usr/lib/vhost-device/vhost-device-block";
    assert!(tree.path().join(&binary[1..]).is_file());
    assert!(tree.path().join("opt/vm/bin").join(DISCOVER).is_file());
    let descriptor = read("etc/qemu/vhost-user/50-vhost-device-block.json");
    let descriptor: Value = serde_json::from_str(&descriptor).unwrap();
    assert_eq!(descriptor["binary"], binary);
    let unit = read("opt/vm/lib/systemd/system/vhost-device-block@.service");
    assert!(unit.contains(&format!("\nExecStart={binary} $OPTIONS\n")));
    assert!(unit.contains("\nLimitMEMLOCK=infinity\n"));
}

#[test]
#[ignore = "builds release binaries"]
fn a_descriptor_is_what_the_program_prints_but_for_its_path() {
    let tree = install();
    for device in described() {
        let name = format!("vhost-device-{device}");
        let path = format!("/usr/bin/{name}");
        let here = tree.path().join(&path[1..]);
        let printed = succeed(Command::new(&here).arg("--print-descriptor"));
        let here = here.canonicalize().unwrap();
        assert!(printed.contains(here.to_str().unwrap()));
        let descriptors = tree.path().join("usr/share/qemu/vhost-user");
        let installed = fs::read_to_string(descriptors.join(format!("50-{name}.json"))).unwrap();
        assert_eq!(installed, printed.replace(here.to_str().unwrap(), &path));
    }
}

#[test]
#[ignore = "builds release binaries"]
fn discovery_finds_the_devices_and_nothing_wrong_with_them() {
    let tree = install();
    let discover = || {
        let mut command = Command::new(tree.path().join("usr/bin").join(DISCOVER));
        // The descriptors of the user who runs the tests do not matter.
        command.env_clear().arg("--root").arg(tree.path());
        command
    };
    assert_silent(discover().arg("check"));
    // The same with AppArmor: libvirt may start the installed programs.
    let write = |path: &str, content: &str| {
        let path = tree.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    write("sys/module/apparmor/parameters/enabled", "Y\n");
    let profile = "etc/apparmor.d/usr.sbin.libvirtd";
    let of_this_host = fs::read_to_string(Path::new("/").join(profile));
    let usual = "profile libvirtd /usr/sbin/libvirtd {\n  /usr/bin/* PUx,\n}\n";
    write(profile, of_this_host.as_deref().unwrap_or(usual));
    assert_silent(discover().arg("check"));
    for device in described() {
        let found = succeed(discover().args(["find", "--type", device]));
        assert_eq!(found.trim_end(), format!("/usr/bin/vhost-device-{device}"));
    }
}

#[test]
#[ignore = "builds release binaries"]
fn manual_pages_name_each_option() {
    let tree = install();
    let page = |name: &str| tree.path().join(format!("usr/share/man/man1/{name}.1"));
    let assert_names_options = |name: &str, help: String| {
        let text = fs::read_to_string(page(name)).unwrap();
        assert!(text.lines().any(|line| line.starts_with(".TH ")), "{name}");
        let text = text.replace("\\-", "-");
        let options = options(&help);
        assert!(options.len() > 2, "{name}: {help}");
        for option in options {
            assert!(text.contains(option), "{name}.1 should name {option}");
        }
    };
    for (name, program) in programs(tree.path()) {
        assert_names_options(&name, succeed(Command::new(program).arg("--help")));
    }
    for subcommand in SUBCOMMANDS {
        let program = tree.path().join("usr/bin").join(DISCOVER);
        let help = succeed(Command::new(program).args([subcommand, "--help"]));
        assert_names_options(&format!("{DISCOVER}-{subcommand}"), help);
    }
}

#[test]
#[ignore = "builds release binaries"]
fn manual_pages_render() {
    let Some(man) = find_program("man") else {
        return skip("man is not installed");
    };
    let tree = install();
    let pages = ["man1", "man7"].map(|section| tree.path().join("usr/share/man").join(section));
    for path in pages.iter().flat_map(|pages| fs::read_dir(pages).unwrap()) {
        let path = path.unwrap().path();
        let mut command = Command::new(&man);
        command.args(["--warnings", "--local-file"]).arg(&path);
        let output = run(command.env("LC_ALL", "C.UTF-8").env("MANWIDTH", "80"));
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{path:?}: {warnings}");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("SYNOPSIS"), "{path:?}: {text}");
        // A line that cannot be broken is no fault of the page.
        let faults = warnings.lines().find(|line| {
            !line.contains("cannot adjust line") && !line.contains("can't break line")
        });
        assert_eq!(faults, None, "{path:?}");
    }
}

#[test]
#[ignore = "builds release binaries"]
fn completions_know_each_option() {
    let tree = install();
    let share = tree.path().join("usr/share");
    for (name, program) in programs(tree.path()) {
        let help = succeed(Command::new(program).arg("--help"));
        for (shell, path) in [
            ("bash", format!("bash-completion/completions/{name}")),
            ("zsh", format!("zsh/site-functions/_{name}")),
            ("fish", format!("fish/vendor_completions.d/{name}.fish")),
        ] {
            let path = share.join(path);
            let script = fs::read_to_string(&path).unwrap();
            for option in options(&help) {
                // fish has them without dashes, after `-l`.
                let option = match shell {
                    "fish" => option.replace("--", "-l "),
                    _ => option.to_owned(),
                };
                assert!(script.contains(&option), "{path:?} should know {option}");
            }
            match find_program(shell) {
                Some(shell) => assert_silent(Command::new(shell).arg("-n").arg(path)),
                None => println!("syntax of {path:?} not checked: {shell} is not installed"),
            }
        }
    }
}

/// Options for tests only are not documented for users.
#[test]
#[ignore = "builds release binaries"]
fn no_device_can_be_told_to_kill_itself() {
    let tree = install();
    for (name, path) in programs(tree.path()) {
        let program = fs::read(path).unwrap();
        let variable = KILL_AFTER.as_bytes();
        let mut windows = program.windows(variable.len());
        assert!(windows.all(|bytes| bytes != variable), "{name} can");
    }
}

#[test]
#[ignore = "builds release binaries"]
fn bash_completes_options() {
    let tree = install();
    let script = r#"
        source "$1"
        COMP_WORDS=(vhost-device-block --socket-)
        COMP_CWORD=1
        [[ $(complete -p vhost-device-block) =~ -F\ ([^ ]+) ]]
        "${BASH_REMATCH[1]}" vhost-device-block --socket- vhost-device-block
        echo "${COMPREPLY[@]}"
    "#;
    let completions = "usr/share/bash-completion/completions/vhost-device-block";
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash"])
        .arg(tree.path().join(completions));
    assert_eq!(succeed(&mut bash), "--socket-path --socket-mode\n");
}

#[test]
#[ignore = "builds release binaries"]
fn systemd_accepts_the_units() {
    let Some(analyze) = find_program("systemd-analyze") else {
        return skip("systemd-analyze is not installed");
    };
    let directory = tempfile::tempdir().unwrap();
    // Without a destdir, so that the programs are where the units expect them.
    succeed(xtask().arg("install").arg("--prefix").arg(directory.path()));
    for device in DEVICES {
        let units = directory.path().join("lib/systemd/system");
        for kind in ["socket", "service"] {
            let unit = units.join(format!("vhost-device-{device}@.{kind}"));
            let text = fs::read_to_string(&unit).unwrap();
            for place in ["@PROGRAM@", "@TYPE@", "@RELOAD@", "@NO_NEW_CODE@"] {
                assert!(!text.contains(place), "{text}");
            }
            let reloads = text.contains("\nExecReload=kill -HUP $MAINPID\n");
            let has_images = ["block", "scsi"].contains(device);
            assert_eq!(reloads, has_images && kind == "service", "{text}");
            let denies_code = text.contains("\nMemoryDenyWriteExecute=yes\n");
            assert_eq!(denies_code, kind == "service" && *device != "gpu", "{text}");
            assert_silent(
                Command::new(&analyze)
                    .args(["verify", "--man=no"])
                    .arg(unit),
            );
        }
    }
}

#[test]
#[ignore = "builds release binaries"]
fn an_existing_file_is_replaced_atomically() {
    let tree = install();
    let licence = tree
        .path()
        .join("usr/share/doc/vhost-device/LICENSE-APACHE");
    let content = fs::read(&licence).unwrap();
    fs::write(&licence, "old").unwrap();
    fs::set_permissions(&licence, Permissions::from_mode(0o600)).unwrap();
    let mut old = File::open(&licence).unwrap();
    // A running program cannot be written to, but can be replaced.
    let program = tree.path().join("usr/bin/vhost-device-rng");
    let socket = tree.path().join("socket");
    let mut running =
        process::Program::spawn(Command::new(program).arg(process::option("socket-path", &socket)))
            .unwrap();
    running.wait_for_listener(&socket).unwrap();
    succeed(
        xtask()
            .args(["install", "--prefix=/usr", "--destdir"])
            .arg(tree.path()),
    );
    running
        .end(process::Signal::TERM, process::PATIENCE)
        .unwrap();

    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old", "who has it open reads the old one");
    assert_eq!(fs::read(&licence).unwrap(), content);
    assert_eq!(
        files(tree.path()),
        expected("/usr", "share/zsh/site-functions")
    );
}

#[test]
#[ignore = "builds release binaries"]
fn a_directory_in_the_place_of_a_file_is_left_alone() {
    let tree = tempfile::tempdir().unwrap();
    let path = tree
        .path()
        .join("usr/local/share/doc/vhost-device/LICENSE-APACHE");
    fs::create_dir_all(&path).unwrap();
    let output = run(xtask().args(["install", "--destdir"]).arg(tree.path()));
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
    assert!(path.is_dir());
    let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn bad_arguments_are_refused_in_one_line() {
    for argument in [
        "--prefix=usr",
        "--prefix=",
        "--prefix=/usr/../etc",
        "--prefix=/my programs",
        "--descriptors=share",
        "--libexecdir=/100%",
        "--destdir",
        "--no-such-option",
        "stray",
    ] {
        let output = run(xtask().args(["install", argument]));
        assert_eq!(output.status.code(), Some(2), "{argument}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.lines().count(), 1, "{argument}: {stderr}");
        let name = argument.split('=').next().unwrap();
        assert!(stderr.contains(name), "{argument}: {stderr}");
        assert_eq!(output.stdout, b"", "{argument}");
    }
}
