// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options that cannot work are refused in one line, and leave nothing behind.

use super::*;

/// Runs the program, which must fail, and returns what it wrote and its exit status.
fn refused(arguments: &[&str], directory: &std::path::Path) -> (String, i32) {
    let mut command = command("vhost-device-console").unwrap();
    command.env_remove("RUST_LOG");
    let path = directory.to_str().unwrap();
    for argument in arguments {
        command.arg(argument.replace("DIR", path));
    }
    command.arg(option("socket-path", directory.join("socket")));
    command.stdin(std::fs::File::open("/proc/self/exe").unwrap());
    let output = command.output().unwrap();
    (
        String::from_utf8(output.stderr).unwrap(),
        output.status.code().unwrap(),
    )
}

#[test]
fn usage_errors_name_the_mistake() {
    let directory = tempfile::tempdir().unwrap();
    for (arguments, word) in [
        (&[][..], "--port"),
        (&["--port="], "unknown option"),
        (&["--port=name=x"], "where the port leads to"),
        (&["--port=pty,stdio"], "one place only"),
        (&["--port=file=x,keep=2"], "needs max-size"),
        (
            &["--port=pty", "--log=x,colour=1"],
            "unknown option \"colour\"",
        ),
    ] {
        let (text, status) = refused(arguments, directory.path());
        assert_eq!(status, 2, "{text}");
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), "data").unwrap();
    std::fs::create_dir(directory.path().join("directory")).unwrap();
    let many = vec!["--port=pty"; 32];
    for (arguments, word) in [
        (&["--port=unix=DIR/file"][..], "is not a socket"),
        (&["--port=pty=DIR/file"], "choose another link"),
        (
            &["--port=unix=DIR/a", "--port=file=DIR/directory"],
            "cannot open",
        ),
        (
            &["--port=unix=DIR/a", "--port=file=DIR/none/file"],
            "cannot open",
        ),
        (&["--port=pty=DIR/a", "--port=fd=99"], "cannot use fd=99"),
        (&["--port=fd=0"], "use file=PATH for a file"),
        (
            &["--port=file=DIR/log,max-size=4K", "--log=DIR/log.1"],
            "is a rotated file of",
        ),
        (
            &["--port=pty", "--log=DIR/log,keep=12", "--log=DIR/log.12"],
            "is a rotated file of",
        ),
        (&["--port=file=/dev/null,max-size=1M"], "cannot be rotated"),
        (
            &["--port=stdio", "--port=stdio"],
            "only one port can be stdio",
        ),
        (
            &["--port=name=a,pty", "--port=name=a,pty"],
            "two ports have the name a",
        ),
        (
            &["--port=pty", "--log=DIR/log,port=1"],
            "port 1 does not exist",
        ),
        (&["--port=file=DIR/log", "--log=DIR/log"], "is used twice"),
        (many.as_slice(), "32 ports are too many"),
    ] {
        let (text, status) = refused(arguments, directory.path());
        assert_eq!(status, 1, "{text}");
        assert!(text.contains(word), "{text}");
        for name in ["a", "socket"] {
            assert!(!directory.path().join(name).is_symlink(), "{arguments:?}");
            assert!(!directory.path().join(name).exists(), "{arguments:?}");
        }
    }
    let contents = std::fs::read_to_string(directory.path().join("file")).unwrap();
    assert_eq!(contents, "data");
}

#[test]
fn a_second_start_by_mistake_leaves_the_running_device_alone() {
    let ports = ["file=DIR/file", "pty=DIR/link", "unix=DIR/a"];
    let device = Device::start(&ports, &[]);
    let mut driver = device.connect();
    driver.write(0, b"kept", PATIENCE);
    written(&device.path("file"), 4);
    let link = std::fs::read_link(device.path("link")).unwrap();
    let ports = ["--port=file=DIR/file", "--port=pty=DIR/link"];
    let (text, status) = refused(&ports, device.directory.path());
    assert_eq!(status, 1, "{text}");
    assert_eq!(std::fs::read(device.path("file")).unwrap(), b"kept");
    assert_eq!(std::fs::read_link(device.path("link")).unwrap(), link);
}

#[test]
fn sockets_are_removed_at_the_end() {
    use vhost_device_tests::process::Signal;
    let mut device = Device::start(&["unix=DIR/a", "unix=DIR/b"], &[]);
    assert!(device.path("a").exists());
    device.program.end(Signal::TERM, PATIENCE).unwrap();
    for name in ["a", "b", "socket"] {
        assert!(!device.path(name).exists(), "{name}");
    }
}

#[test]
fn the_socket_of_a_killed_program_is_replaced() {
    use vhost_device_tests::process::Signal;
    let Device {
        mut program,
        directory,
        ..
    } = Device::start(&["unix=DIR/a"], &[]);
    program.end(Signal::KILL, PATIENCE).unwrap();
    drop(program);
    let device = Device::start_in(directory, &["unix=DIR/a"], &[], |_| {});
    device.client("a");
}
