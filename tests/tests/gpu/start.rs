// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hosts without 3D, which is detected when the program starts, and not when the guest draws.

use std::process::Command;

use vhost_device_tests::process::{PATIENCE, Program, binary, command, deny_write_execute, option};
use vhost_device_tests::skip::skip;
use vhost_device_tests::stand_in::StandIn;

use crate::virgl::is_there;

/// Starts the program with `--virgl`, which must end with one line that says why 3D is not available.
fn refused(configure: impl FnOnce(&mut Command)) -> String {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = command("vhost-device-gpu").unwrap();
    command.env_remove("RUST_LOG").arg("--virgl");
    command.arg(option("socket-path", &socket));
    configure(&mut command);
    let mut program = Program::spawn(&mut command).unwrap();
    let status = program.wait(PATIENCE).unwrap();
    let line = program.stderr();
    assert_eq!(status.code(), Some(1), "{line}");
    assert!(
        line.starts_with("vhost-device-gpu: cannot enable 3D: "),
        "{line}"
    );
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(!socket.exists());
    line
}

#[test]
fn virgl_without_a_renderer_is_an_error_at_start() {
    let directory = tempfile::tempdir().unwrap();
    let node = directory.path().join("no-node");
    let line = refused(|command| _ = command.arg(option("render-node", &node)));
    assert!(line.contains("no-node"), "{line}");
}

#[test]
fn a_renderer_that_does_not_draw_is_an_error_at_start() {
    for failing in [
        "init",
        "context_create",
        "resource_create",
        "submit_cmd",
        "transfer_read_iov",
    ] {
        let renderer = StandIn::new(failing, &[]).unwrap();
        let line = refused(|command| renderer.configure(command));
        assert!(line.contains("cannot draw"), "{failing}: {line}");
    }
    let renderer = StandIn::new("blank", &[]).unwrap();
    let line = refused(|command| renderer.configure(command));
    assert!(line.contains("cannot draw"), "{line}");
}

/// Mesa's software renderer compiles code when something is drawn.
#[test]
fn software_rendering_where_no_code_can_be_made_is_an_error_at_start() {
    if !is_there() {
        return;
    }
    let mut triangle = Command::new(binary("draw-triangle").unwrap());
    triangle.env("LIBGL_ALWAYS_SOFTWARE", "1");
    if let Err(error) = deny_write_execute(&mut triangle) {
        return skip(&format!("this kernel cannot forbid making code: {error}"));
    }
    let drawn = triangle.output().unwrap();
    assert!(!drawn.status.success(), "Mesa draws without making code");

    let line = refused(|command| {
        deny_write_execute(command.arg("--render-node=/dev/null")).unwrap();
    });
    assert!(line.contains("MemoryDenyWriteExecute"), "{line}");
    if std::path::Path::new("/dev/dri").exists() {
        // A GPU works without.
        return;
    }
    let mut capabilities = command("vhost-device-gpu").unwrap();
    deny_write_execute(capabilities.arg("--print-capabilities")).unwrap();
    let output = capabilities.output().unwrap();
    assert!(output.status.success());
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!printed.contains("virgl"), "{printed}");
}
