// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a screen dump does not show: the cursor, and buffers of a GPU. QEMU passes both on through D-Bus.

#![cfg(test)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vhost_device_tests::guest::dbus::{DISPLAY, Listener, Shown};
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{self, Program};
use vhost_device_tests::stand_in::StandIn;

/// Time limit for changes to get from the guest to the display.
const PATIENCE: Duration = Duration::from_secs(30);

/// The back-end. Dropping it ends it.
struct Gpu {
    program: Program,
    directory: TempDir,
}

impl Gpu {
    fn start(renderer: Option<&StandIn>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = process::command("vhost-device-gpu").unwrap();
        let socket = directory.path().join("socket");
        command
            .env("RUST_LOG", "debug")
            .arg(process::option("socket-path", &socket));
        if let Some(renderer) = renderer {
            renderer.configure(command.arg("--virgl"));
        }
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { program, directory }
    }

    fn machine(&self, name: &str, script: &str) -> Machine {
        let socket = self.directory.path().join("socket");
        Machine::new(name, script)
            .kernel(Flavour::Plain)
            .module("virtio_gpu")
            .argument("-display")
            .argument(DISPLAY)
            .vhost_user("vhost-user-gpu-pci,id=gpu,xres=640,yres=480", &socket)
    }

    /// Waits until QEMU shows the expected picture.
    fn wait_for<T>(
        &self,
        listener: &Listener,
        what: &str,
        mut find: impl FnMut(Shown) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            if let Some(found) = listener.next(left).and_then(&mut find) {
                return found;
            }
        }
        panic!(
            "QEMU does not show {what}; the back-end wrote:\n{}",
            self.program.stderr()
        );
    }
}

fn listen(guest: &Guest) -> Listener {
    Listener::connect(&mut guest.qmp().unwrap()).unwrap()
}

#[test]
#[ignore = "boots a guest"]
fn the_cursor_has_the_picture_that_the_guest_gave_it() {
    let gpu = Gpu::start(None);
    let mut guest = gpu
        .machine(
            "gpu-cursor-picture",
            r#"
            until [ -e /dev/dri/card0 ]; do sleep 0.1; done
            connector=$(modetest -M virtio_gpu -c | awk '$3 == "connected" { print $1; exit }')
            echo "@ready"
            sleep 60 | modetest -M virtio_gpu -s $connector:640x480 -C > /dev/null
            "#,
        )
        .program("modetest")
        .start()
        .unwrap();
    guest.wait("ready").unwrap();
    let listener = listen(&guest);
    // modetest's cursor has 0x77 everywhere, also for its alpha, in a resource whose format, chosen by Linux, has no alpha.
    gpu.wait_for(&listener, "the cursor", |shown| {
        let is_cursor = shown.member == "CursorDefine"
            && [0, 4, 8, 12].map(|at| shown.word(at)) == [64, 64, 0, 0]
            && shown.arguments[20..] == [0x77; 64 * 64 * 4];
        is_cursor.then_some(())
    });
    // It moves over the screen, and is visible.
    let mut places = Vec::new();
    gpu.wait_for(&listener, "the cursor in other places", |shown| {
        let place = [0, 4].map(|at| shown.word(at));
        if shown.member == "MouseSet" && shown.word(8) == 1 && !places.contains(&place) {
            places.push(place);
        }
        (places.len() == 5).then_some(())
    });
}

/// Draws a red half above a green one repeatedly: the console may still be about to set the mode.
const DRAW: &str = r#"
    until [ -e /dev/fb0 ]; do sleep 0.1; done
    printf '\033[?25l' > /dev/tty1
    fill() {
        printf "$1" > /tmp/row
        while [ $(stat -c %s /tmp/row) -lt 614400 ]; do cat /tmp/row /tmp/row > /tmp/rows; mv /tmp/rows /tmp/row; done
        head -c 614400 /tmp/row
    }
    { fill '\0\0\377\0'; fill '\0\377\0\0'; } > /tmp/picture
    echo "@drawn"
    while :; do cat /tmp/picture > /dev/fb0; sleep 0.2; done
"#;

/// Returns whether the guest's drawing is in a buffer.
fn is_drawn(buffer: &File) -> bool {
    let mut bytes = vec![0; 640 * 480 * 4];
    if buffer.read_exact_at(&mut bytes, 0).is_err() {
        return false;
    }
    let (top, bottom) = bytes.split_at(bytes.len() / 2);
    let is = |half: &[u8], colour: [u8; 3]| half.chunks_exact(4).all(|pixel| pixel[..3] == colour);
    is(top, [0, 0, 255]) && is(bottom, [0, 255, 0])
}

#[test]
#[ignore = "boots a guest"]
fn the_buffer_that_the_guest_draws_in_is_the_one_that_is_shown() {
    let renderer = StandIn::new("modifier=0", &[]).unwrap();
    let gpu = Gpu::start(Some(&renderer));
    let mut guest = gpu.machine("gpu-dmabuf", DRAW).reboots().start().unwrap();
    let shows = |listener: &Listener| {
        let mut buffer = None;
        gpu.wait_for(
            listener,
            "the buffer with the picture",
            |shown| match shown.member.as_str() {
                "ScanoutDMABUF" => {
                    assert_eq!([4, 8, 12].map(|at| shown.word(at)), [640, 480, 640 * 4]);
                    assert_eq!(shown.word(16), u32::from_le_bytes(*b"XR24"));
                    assert_eq!([24, 28].map(|at| shown.word(at)), [0, 0], "the modifier");
                    assert_eq!(shown.word(32), 1, "the top row is the first");
                    buffer = shown.file;
                    None
                }
                "UpdateDMABUF" => buffer.as_ref().filter(|buffer| is_drawn(buffer)).map(drop),
                _ => None,
            },
        );
    };
    guest.wait("drawn").unwrap();
    let listener = listen(&guest);
    shows(&listener);
    let command = |guest: &Guest, name| guest.qmp().unwrap().execute(name, json!({})).unwrap();
    command(&guest, "stop");
    command(&guest, "cont");
    shows(&listener);
    command(&guest, "system_reset");
    guest.wait("drawn").unwrap();
    shows(&listener);
    assert_eq!(
        renderer.calls("transfer_read_iov"),
        0,
        "nothing is read back"
    );
    assert!(
        !gpu.program.stderr().contains("unresponsive"),
        "the display answers"
    );
    drop(listener);
    drop(guest);
    assert!(!gpu.program.stderr().contains("warn: command"));
}
