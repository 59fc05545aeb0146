// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options, and the sockets of `--uds-path`.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};

use vhost_device_tests::process::Signal;

use super::*;

/// Returns the exit status and stderr of a program that does not start.
fn fails(arguments: &[&str]) -> (i32, String) {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command("vhost-device-vsock").unwrap();
    command.arg(option("socket-path", directory.path().join("socket")));
    let output = command.args(arguments).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    (output.status.code().unwrap(), stderr)
}

#[test]
fn invalid_options_are_refused() {
    let long = format!("--uds-path=/{}", "a".repeat(100));
    for (arguments, status, word) in [
        (&["--uds-path=/tmp/a"][..], 2, "--guest-cid"),
        (&["--guest-cid=3"], 2, "--uds-path"),
        (&["--guest-cid=2", "--uds-path=/tmp/a"], 2, "--guest-cid"),
        (
            &["--guest-cid=4294967295", "--uds-path=/tmp/a"],
            2,
            "--guest-cid",
        ),
        (
            &["--guest-cid=3", "--uds-path=/tmp/a", "--forward=cid=4"],
            2,
            "uds-path=PATH",
        ),
        (
            &["--guest-cid=3", "--uds-path=/tmp/a", "--allow-ports=1-"],
            2,
            "ranges",
        ),
        (
            &["--guest-cid=3", "--uds-path=/tmp/a", "--max-connections=0"],
            2,
            "--max-connections",
        ),
        (
            &[
                "--guest-cid=3",
                "--uds-path=/tmp/a",
                "--forward=cid=3,uds-path=/tmp/b",
            ],
            1,
            "CID 3",
        ),
        (
            &[
                "--guest-cid=3",
                "--uds-path=/tmp/a",
                "--forward=cid=4,uds-path=/tmp/b",
                "--forward=cid=4,uds-path=/tmp/c",
            ],
            1,
            "CID 4",
        ),
        (&["--guest-cid=3", &long], 1, "101 bytes"),
        (
            &["--guest-cid=3", "--uds-path=/nonexistent/a"],
            1,
            "cannot listen on /nonexistent/a",
        ),
    ] {
        let (code, stderr) = fails(arguments);
        assert_eq!(code, status, "{arguments:?}: {stderr}");
        assert!(stderr.contains(word), "{arguments:?}: {stderr}");
    }
}

#[test]
fn its_sockets_have_the_mode_and_are_removed_at_exit() {
    let directory = tempfile::tempdir().unwrap();
    let names = ["guest", "guest_seqpacket"];
    let mut device = Device::start_in(directory, |command| {
        command.arg("--socket-mode=0600");
    });
    for name in names {
        let metadata = device.path(name).symlink_metadata().unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{name}");
    }
    device.program.end(Signal::TERM, PATIENCE).unwrap();
    for name in names {
        assert!(!device.path(name).exists(), "{name}");
    }
}

#[test]
fn stale_sockets_are_replaced_and_others_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let guest = directory.path().join("guest");
    drop(UnixListener::bind(&guest).unwrap());
    drop(listen_seqpacket(&directory.path().join("guest_seqpacket")));
    let device = Device::start_in(directory, |_| {});
    device.connect().assert_works(&device);
    // A second process does not take the sockets of the first one, and leaves nothing behind.
    let path = format!("--uds-path={}", device.path("guest").display());
    let (code, stderr) = fails(&["--guest-cid=4", &path]);
    assert_eq!(code, 1);
    assert!(stderr.contains("another program listens"), "{stderr}");
    device.connect().assert_works(&device);
    // A socket of the other type is in use too.
    let other = tempfile::tempdir().unwrap();
    let _messages = listen_seqpacket(&other.path().join("guest"));
    let path = format!("--uds-path={}", other.path().join("guest").display());
    let (_, stderr) = fails(&["--guest-cid=4", &path]);
    assert!(stderr.contains("another program listens"), "{stderr}");
    assert!(!other.path().join("guest_seqpacket").exists());
}

#[test]
fn one_path_cannot_have_two_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command("vhost-device-vsock").unwrap();
    command.arg("--guest-cid=3");
    command.arg(option("socket-path", directory.path().join("guest")));
    command.arg(option("uds-path", directory.path().join("guest")));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("choose another --uds-path"), "{stderr}");
    assert!(!directory.path().join("guest").exists());
}

#[test]
fn it_prints_what_it_is() {
    for (argument, word) in [
        ("--print-capabilities", "\"type\": \"vsock\""),
        ("--print-descriptor", "\"type\": \"vsock\""),
        ("--version", "vhost-device-vsock"),
    ] {
        let output = command("vhost-device-vsock")
            .unwrap()
            .arg(argument)
            .output()
            .unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(stdout.contains(word), "{stdout}");
    }
}

/// On a host without AF_VSOCK too, and without a listener there.
#[test]
fn a_port_without_a_socket_is_refused_with_host_vsock_too() {
    let device = Device::start_with(&["--host-vsock"]);
    let mut guest = device.connect();
    guest.assert_refused(Link::to_host(1024, 0x7fff_fff0));
    guest.assert_works(&device);
}
