// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device asks to keep is kept: access to trees, sockets, capabilities, open files. Nothing else is.

#![allow(unsafe_code)]

use std::ffi::{OsStr, c_long};
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;
use vhost_device_tests::attempts::{assert_cannot_read, open};
use vhost_device_tests::intruder::{Intruder, Outcome};
use vhost_device_tests::process::{self, PATIENCE, Program, Signal, option};
use vhost_device_tests::skip::skip;

use crate::state::statuses;

const AT_FDCWD: u64 = libc::AT_FDCWD as u64;
const OK: i64 = 0;
const DENIED: i64 = -(libc::EACCES as i64);
const NOT_PERMITTED: i64 = -(libc::EPERM as i64);
const OTHER_FILE_SYSTEM: i64 = -(libc::EXDEV as i64);

/// CAP_CHOWN and CAP_FOWNER, as the kernel shows them.
const KEPT: u64 = 1 | 1 << 3;

/// The device that keeps things, and its directories: some for it, one not.
struct Scene {
    directory: TempDir,
    program: Program,
}

impl Scene {
    /// Starts the device; `None` if this host does not let its thread be taken over.
    fn start(configure: impl FnOnce(&mut Command)) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("threads are taken over by root only");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut command = process::command("needy-device").unwrap();
        command.env_remove("RUST_LOG");
        for name in ["tree", "flat-tree", "read-tree", "other"] {
            fs::create_dir_all(path(name).join("below")).unwrap();
            fs::write(path(name).join("file"), "of value").unwrap();
            if name != "other" {
                command.arg(option(name, path(name)));
            }
        }
        // In a directory of its own, whose files the program may remove.
        let socket = path("socket/listens");
        fs::create_dir(path("socket")).unwrap();
        command.arg(option("socket-path", &socket));
        configure(&mut command);
        let mut program = Program::spawn(&mut command).unwrap();
        program.wait_for_listener(&socket).unwrap();
        program.expect_anything();
        Some(Self { directory, program })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Takes the first thread over.
    fn enter(&self) -> Intruder {
        let id = self.program.id();
        Intruder::enter(id, id as i32).unwrap()
    }
}

fn call(intruder: &mut Intruder, number: c_long, arguments: &[u64]) -> i64 {
    match intruder.call(number, arguments).unwrap() {
        Outcome::Returned(result) => result,
        other => panic!("{number}: {other:?}"),
    }
}

/// A call with a path as its second argument, and others after it.
fn at(intruder: &mut Intruder, number: c_long, path: &Path, arguments: &[u64]) -> i64 {
    let path = intruder.path(path).unwrap();
    call(intruder, number, &[&[AT_FDCWD, path], arguments].concat())
}

fn make(intruder: &mut Intruder, path: &Path) -> i64 {
    open(
        intruder,
        path,
        libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL,
    )
    .min(OK)
}

fn rename(intruder: &mut Intruder, from: &Path, to: &Path) -> i64 {
    let from = from.as_os_str().as_bytes();
    let both = [from, b"\0", to.as_os_str().as_bytes(), b"\0"].concat();
    let address = intruder.bytes(&both).unwrap();
    let to = address + from.len() as u64 + 1;
    let arguments = [AT_FDCWD, address, AT_FDCWD, to, 0];
    call(intruder, libc::SYS_renameat2, &arguments)
}

fn truncate(intruder: &mut Intruder, path: &Path) -> i64 {
    let path = intruder.path(path).unwrap();
    call(intruder, libc::SYS_truncate, &[path, 1])
}

/// Makes a socket and binds it, or connects it, to this address: a path, or a name after a zero byte.
fn socket(intruder: &mut Intruder, number: c_long, address: &OsStr) -> i64 {
    let (family, stream) = (libc::AF_UNIX as u64, libc::SOCK_STREAM as u64);
    let socket = call(intruder, libc::SYS_socket, &[family, stream, 0]);
    assert!(socket >= 0, "{socket}");
    let family = (libc::AF_UNIX as u16).to_ne_bytes();
    let bytes = [&family, address.as_bytes()].concat();
    let address = intruder.bytes(&bytes).unwrap();
    let arguments = [socket as u64, address, bytes.len() as u64];
    let result = call(intruder, number, &arguments);
    call(intruder, libc::SYS_close, &[socket as u64]);
    result
}

#[test]
fn a_tree_can_be_changed_as_told_and_nothing_beside_it() {
    let Some(scene) = Scene::start(|_| {}) else {
        return;
    };
    let mut intruder = scene.enter();
    let intruder = &mut intruder;
    let tree = scene.path("tree");
    assert_eq!(make(intruder, &tree.join("below/new")), OK);
    assert_eq!(
        at(intruder, libc::SYS_mkdirat, &tree.join("sub"), &[0o700]),
        OK
    );
    assert_eq!(
        rename(intruder, &tree.join("below/new"), &tree.join("sub/moved")),
        OK
    );
    assert_eq!(truncate(intruder, &tree.join("file")), OK);
    assert_eq!(fs::read(tree.join("file")).unwrap(), b"o");
    assert_eq!(
        at(intruder, libc::SYS_unlinkat, &tree.join("sub/moved"), &[0]),
        OK
    );
    let directory = libc::AT_REMOVEDIR as u64;
    assert_eq!(
        at(
            intruder,
            libc::SYS_unlinkat,
            &tree.join("sub"),
            &[directory]
        ),
        OK
    );
    // Device nodes were not asked for.
    let node = (libc::S_IFCHR | 0o600) as u64;
    assert_eq!(
        at(
            intruder,
            libc::SYS_mknodat,
            &tree.join("null"),
            &[node, 0x103]
        ),
        DENIED
    );

    let flat = scene.path("flat-tree");
    assert_eq!(make(intruder, &flat.join("new")), OK);
    assert_eq!(
        rename(intruder, &flat.join("new"), &flat.join("renamed")),
        OK
    );
    assert_eq!(
        rename(intruder, &flat.join("renamed"), &flat.join("below/renamed")),
        OTHER_FILE_SYSTEM
    );
    assert_eq!(truncate(intruder, &flat.join("file")), DENIED);
    assert_eq!(
        socket(intruder, libc::SYS_bind, flat.join("socket").as_os_str()),
        DENIED
    );

    let read = scene.path("read-tree");
    assert!(open(intruder, &read.join("file"), libc::O_RDONLY) >= 0);
    assert_eq!(open(intruder, &read.join("file"), libc::O_RDWR), DENIED);
    assert_eq!(make(intruder, &read.join("new")), DENIED);
    assert_eq!(
        at(intruder, libc::SYS_unlinkat, &read.join("file"), &[0]),
        DENIED
    );

    let other = scene.path("other");
    assert_cannot_read(intruder, &other.join("file"));
    assert_eq!(make(intruder, &other.join("new")), DENIED);
    assert_eq!(
        at(intruder, libc::SYS_mkdirat, &other.join("sub"), &[0o700]),
        DENIED
    );
    assert_eq!(truncate(intruder, &other.join("file")), DENIED);
    assert_ne!(
        rename(intruder, &tree.join("file"), &other.join("moved")),
        OK
    );
    assert!(tree.join("file").exists());
}

#[test]
fn sockets_are_made_and_connected_to_where_it_was_asked_for() {
    let Some(scene) = Scene::start(|_| {}) else {
        return;
    };
    let mut intruder = scene.enter();
    let intruder = &mut intruder;
    let tree = scene.path("tree");
    let path = |name: &str| tree.join(name).into_os_string();
    let _listener = UnixListener::bind(tree.join("listens")).unwrap();
    assert_eq!(socket(intruder, libc::SYS_bind, &path("made")), OK);
    assert_eq!(socket(intruder, libc::SYS_connect, &path("listens")), OK);
    let other = scene.path("other").join("made").into_os_string();
    assert_eq!(socket(intruder, libc::SYS_bind, &other), DENIED);
}

#[test]
fn abstract_sockets_can_be_connected_to_only_if_asked_for() {
    for wanted in [false, true] {
        let Some(scene) = Scene::start(|command| {
            command.args(wanted.then_some("--abstract-sockets"));
        }) else {
            return;
        };
        let name = format!("vhost-device-needs-{}", scene.program.id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let mut intruder = scene.enter();
        let address = [b"\0", name.as_bytes()].concat();
        let connected = socket(
            &mut intruder,
            libc::SYS_connect,
            OsStr::from_bytes(&address),
        );
        assert_eq!(connected, if wanted { OK } else { NOT_PERMITTED });
    }
}

#[test]
fn named_capabilities_are_kept_in_all_threads_and_no_others() {
    for wanted in [false, true] {
        let Some(scene) = Scene::start(|command| {
            command.args(wanted.then_some("--capabilities"));
        }) else {
            return;
        };
        let kept = if wanted { KEPT } else { 0 };
        for status in statuses(scene.program.id()) {
            let set = |name: &str| u64::from_str_radix(&status[name], 16).unwrap();
            for name in ["CapPrm", "CapEff", "CapBnd"] {
                assert_eq!(set(name), kept, "{name} of {}", status["Name"]);
            }
            assert_eq!((set("CapInh"), set("CapAmb")), (0, 0));
        }
        let mut intruder = scene.enter();
        let file = scene.path("tree").join("file");
        let owner = [1000, 1000, 0];
        let changed = at(&mut intruder, libc::SYS_fchownat, &file, &owner);
        assert_eq!(changed, if wanted { OK } else { NOT_PERMITTED });
        let stderr = scene.program.stderr();
        assert!(!stderr.contains("capabilities"), "{stderr}");
    }
}

#[test]
fn a_capability_that_the_process_does_not_have_is_named() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        return skip("only root can start programs as other users");
    }
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let copy = directory.path().join("program");
    let program = process::binary("needy-device").unwrap();
    let copied = Command::new("cp").arg(program).arg(&copy).status();
    assert!(copied.unwrap().success());
    let socket = directory.path().join("socket");
    let mut command = Command::new(copy);
    command
        .env_remove("RUST_LOG")
        .arg("--capabilities")
        .arg(option("socket-path", &socket))
        .uid(NOBODY)
        .gid(NOBODY);
    let mut program = Program::spawn(&mut command).unwrap();
    program.wait_for_listener(&socket).unwrap();
    program.end(Signal::TERM, PATIENCE).unwrap();
    let stderr = program.stderr();
    let lines: Vec<_> = stderr
        .lines()
        .filter(|line| line.contains("warn"))
        .collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(lines[0].contains("CAP_CHOWN, CAP_FOWNER"), "{stderr}");
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_named_once() {
    for (wanted, warnings) in [(5000, 1), (4000, 0), (0, 0)] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = process::command("needy-device").unwrap();
        command
            .env_remove("RUST_LOG")
            .arg(format!("--open-files={wanted}"))
            .arg(option("socket-path", &socket));
        let limit = Rlimit {
            current: Some(100),
            maximum: Some(4000),
        };
        let set = move || Ok(setrlimit(Resource::Nofile, limit)?);
        // SAFETY: the closure makes one system call, and allocates nothing.
        unsafe { command.pre_exec(set) };
        let mut program = Program::spawn(&mut command).unwrap();
        program.wait_for_listener(&socket).unwrap();
        program.end(Signal::TERM, PATIENCE).unwrap();
        let stderr = program.stderr();
        assert_eq!(stderr.matches("LimitNOFILE=").count(), warnings, "{stderr}");
        assert!(warnings == 0 || stderr.contains("4000") && stderr.contains("5000"));
    }
}
