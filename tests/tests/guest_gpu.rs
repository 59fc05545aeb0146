// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-gpu` with a Linux guest in QEMU: QEMU's screen dump shows what the guest draws.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::picture::Picture;
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{self, Program};

/// Time limit for a picture to get from the guest to the screen dump.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lets the console set the mode, and defines functions to draw with.
const SETUP: &str = r#"
    until [ -e /dev/fb0 ]; do sleep 0.1; done
    # The console sets the mode when there is something to show; its cursor would blink.
    printf '\033[?25l' > /dev/tty1
    IFS=, read width height < /sys/class/graphics/fb0/virtual_size
    # Rows of one colour, four octal bytes in the order blue, green, red, unused.
    rows() {
        printf "$1" > /tmp/row
        while [ $(stat -c %s /tmp/row) -lt $((width * 4)) ]; do cat /tmp/row /tmp/row > /tmp/rows; mv /tmp/rows /tmp/row; done
        row=0
        while [ $row -lt $2 ]; do head -c $((width * 4)) /tmp/row; row=$((row + 1)); done
    }
"#;

/// The back-end. Dropping it ends it.
struct Gpu {
    program: Program,
    directory: TempDir,
}

impl Gpu {
    fn start(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = process::command("vhost-device-gpu").unwrap();
        command
            .env("RUST_LOG", "trace")
            .arg(process::option("socket-path", &socket))
            .args(options);
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { program, directory }
    }

    /// Creates a machine with this device and its `properties`, without any other display.
    fn machine(&self, name: &str, properties: &str, script: &str) -> Machine {
        let socket = self.directory.path().join("socket");
        Machine::new(name, format!("{SETUP}{script}"))
            .kernel(Flavour::Plain)
            .module("virtio_gpu")
            .vhost_user(&format!("vhost-user-gpu-pci,id=gpu{properties}"), &socket)
    }

    /// Returns the current picture on output `head` of the device, whose id is `gpu`.
    fn screen(&self, guest: &Guest, head: u32) -> Picture {
        let path = self.directory.path().join("screen.png");
        let dump = json!({ "filename": path, "format": "png", "device": "gpu", "head": head });
        guest.qmp().unwrap().execute("screendump", dump).unwrap();
        Picture::read(&path).unwrap()
    }

    fn wait_for_log(&self, what: &str, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.program.stderr().matches(what).count() < count {
            assert!(
                Instant::now() < deadline,
                "not {count} times {what:?}:\n{}",
                self.program.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the screen is as expected.
    fn wait_for(&self, guest: &Guest, what: &str, is_expected: impl Fn(&Picture) -> bool) {
        self.wait_for_heads(guest, 1, what, is_expected);
    }

    /// Waits until the screens of the first outputs, one beside the other, are as expected.
    fn wait_for_heads(
        &self,
        guest: &Guest,
        heads: u32,
        what: &str,
        is_expected: impl Fn(&Picture) -> bool,
    ) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut screen = self.screen(guest, 0);
            (1..heads).for_each(|head| screen = screen.beside(&self.screen(guest, head)));
            if is_expected(&screen) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the screen of {}x{} does not show {what}; its corners: {:?}; the back-end wrote:\n{}",
                screen.width,
                screen.height,
                screen.corners(),
                self.program.stderr(),
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Draws the four bands of [`BANDS`] repeatedly: the console may still be about to set the mode, and to clear the screen.
const DRAW_BANDS: &str = r#"
    { rows '\0\0\377\0' 120; rows '\0\377\0\0' 120; rows '\377\0\0\0' 120; rows '\20\40\100\0' 120; } > /tmp/bands
    echo "@drawn $width $height"
    while :; do cat /tmp/bands > /dev/fb0; sleep 0.2; done
"#;

const BANDS: [[u8; 3]; 4] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [64, 32, 16]];

#[test]
#[ignore = "boots a guest"]
fn the_screen_shows_the_frame_buffer_through_pause_and_reset() {
    show_bands("split", "");
}

#[test]
#[ignore = "boots a guest"]
fn bands_are_shown_on_packed_rings() {
    show_bands("packed", ",packed=on");
}

fn show_bands(format: &str, properties: &str) {
    let gpu = Gpu::start(&[]);
    let properties = format!(",xres=640,yres=480{properties}");
    let mut guest = gpu
        .machine(&format!("gpu-{format}"), &properties, DRAW_BANDS)
        .reboots()
        .start()
        .unwrap();
    assert_eq!(guest.wait("drawn").unwrap(), "640 480");
    gpu.wait_for(&guest, "the bands", |screen| screen.is_bands(&BANDS));
    // QEMU serves one control connection at a time.
    let command = |guest: &Guest, name| guest.qmp().unwrap().execute(name, json!({})).unwrap();
    command(&guest, "stop");
    command(&guest, "cont");
    gpu.wait_for_log("a display is connected", 2);
    gpu.wait_for(&guest, "the bands", |screen| screen.is_bands(&BANDS));

    command(&guest, "system_reset");
    assert_eq!(guest.wait("drawn").unwrap(), "640 480");
    gpu.wait_for(&guest, "the bands", |screen| screen.is_bands(&BANDS));
    gpu.wait_for_log("a display is connected", 3);
    assert_eq!(guest.qemu_stderr(), "");
    drop(guest);
    // All resources of the guests are freed: those of the first at the reset, and those of the second at the end.
    gpu.wait_for_log("1 resources of ", 2);
    // Both queues, once for each connection of a display.
    gpu.wait_for_log(&format!(" started: {format} ring"), 6);
}

#[test]
#[ignore = "boots a guest"]
fn test_patterns_are_shown_in_several_modes() {
    let gpu = Gpu::start(&[]);
    let mut guest = gpu
        .machine(
            "gpu-modes",
            "",
            r#"
            connector=$(modetest -M virtio_gpu -c | awk '$3 == "connected" { print $1; exit }')
            for mode in 1024x768 800x600; do
                sleep 20 | modetest -M virtio_gpu -s $connector:$mode > /dev/null &
                echo "@mode $mode"
                sleep 8
                killall modetest
                wait
            done
            "#,
        )
        .program("modetest")
        .start()
        .unwrap();
    for (width, height) in [(1024, 768), (800, 600)] {
        assert_eq!(guest.wait("mode").unwrap(), format!("{width}x{height}"));
        gpu.wait_for(&guest, "the bars", |screen| {
            (screen.width, screen.height) == (width, height) && screen.has_bars()
        });
    }
}

#[test]
#[ignore = "boots a guest"]
fn two_outputs_show_two_parts_of_one_picture() {
    let gpu = Gpu::start(&[]);
    let mut guest = gpu
        .machine(
            "gpu-outputs",
            ",max_outputs=2,xres=640,yres=480",
            r#"
            # Nobody has plugged in the second one.
            echo on > /sys/class/drm/card0-Virtual-2/status
            set -- $(modetest -M virtio_gpu -c | awk '$3 == "connected" { print $1 }')
            echo "@connectors $#"
            sleep 60 | modetest -M virtio_gpu -s $1:640x480 -s $2:640x480 > /tmp/log 2>&1 || cat /tmp/log
            "#,
        )
        .program("modetest")
        .start()
        .unwrap();
    assert_eq!(guest.wait("connectors").unwrap(), "2");
    gpu.wait_for_heads(&guest, 2, "the bars", |screens| {
        (screens.width, screens.height) == (1280, 480) && screens.has_bars()
    });
}

#[test]
#[ignore = "boots a guest"]
fn the_guest_moves_its_cursor() {
    let gpu = Gpu::start(&[]);
    let guest = gpu
        .machine(
            "gpu-cursor",
            "",
            r#"
            connector=$(modetest -M virtio_gpu -c | awk '$3 == "connected" { print $1; exit }')
            sleep 60 | modetest -M virtio_gpu -s $connector:800x600 -C > /dev/null
            "#,
        )
        .program("modetest")
        .start()
        .unwrap();
    gpu.wait_for_log("cursor command 0x300", 1);
    gpu.wait_for_log("cursor command 0x301", 10);
    gpu.wait_for(&guest, "the bars", Picture::has_bars);
    assert!(!gpu.program.stderr().contains("refused"));
}

#[test]
#[ignore = "boots a guest"]
fn a_driver_that_is_loaded_again_draws_again() {
    let gpu = Gpu::start(&[]);
    let script = format!(
        r#"
        rows '\0\0\377\0' 480 > /tmp/red
        echo "@red"
        for try in $(seq 40); do cat /tmp/red > /dev/fb0; sleep 0.2; done
        for console in /sys/class/vtconsole/*; do
            grep -q 'frame buffer' $console/name && echo 0 > $console/bind
        done
        rmmod virtio_gpu
        [ ! -e /dev/fb0 ]
        insmod /modules/*virtio*gpu*
        echo "@again"
        {SETUP}
        {DRAW_BANDS}
        "#
    );
    let mut guest = gpu
        .machine("gpu-driver", ",xres=640,yres=480", &script)
        .start()
        .unwrap();
    guest.wait("red").unwrap();
    gpu.wait_for(&guest, "red", |screen| screen.is_bands(&[BANDS[0]]));
    guest.wait("again").unwrap();
    guest.wait("drawn").unwrap();
    gpu.wait_for(&guest, "the bands", |screen| screen.is_bands(&BANDS));
    gpu.wait_for_log("a display is connected", 2);
    assert_eq!(guest.qemu_stderr(), "");
}

#[test]
#[ignore = "boots a guest"]
fn a_headless_device_has_a_screen_for_the_guest_and_leaves_qemu_in_peace() {
    const IDLE: Duration = Duration::from_secs(5);
    let gpu = Gpu::start(&["--headless"]);
    let mut guest = gpu
        .machine(
            "gpu-headless",
            "",
            r#"
            echo "@edid $(wc -c < /sys/class/drm/card0-Virtual-1/edid)"
            echo "@mode $(head -n 1 /sys/class/drm/card0-Virtual-1/modes)"
            echo "@errors $(dmesg | grep -c -i 'drm.*error' || true)"
            rows '\0\0\377\0' "$height" > /dev/fb0
            echo "@drawn $width $height"
            sleep 60
            "#,
        )
        .start()
        .unwrap();
    assert_eq!(guest.wait("edid").unwrap(), "128");
    assert_eq!(guest.wait("mode").unwrap(), "1024x768");
    assert_eq!(guest.wait("errors").unwrap(), "0");
    assert_eq!(guest.wait("drawn").unwrap(), "1024 768");
    let before = guest.qemu_processor_time().unwrap();
    std::thread::sleep(IDLE);
    let taken = guest.qemu_processor_time().unwrap() - before;
    assert_eq!(guest.qemu_stderr(), "");
    assert!(
        taken < IDLE / 8,
        "an idle guest takes {taken:?} of {IDLE:?}"
    );
    assert!(!gpu.program.stderr().contains("warn: "));
}

#[test]
#[ignore = "starts QEMU"]
fn qemu_refuses_to_migrate_a_guest_without_its_pictures() {
    let gpu = Gpu::start(&[]);
    let guest = gpu
        .machine("gpu-migration", "", "sleep 60")
        .start()
        .unwrap();
    let target = json!({ "uri": "exec:cat > /dev/null" });
    let deadline = Instant::now() + PATIENCE;
    let mut qmp = loop {
        match guest.qmp() {
            Ok(qmp) => break qmp,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let refused = qmp.execute("migrate", target).unwrap_err().to_string();
    assert!(refused.contains("VHOST_F_LOG_ALL"), "{refused}");
}
