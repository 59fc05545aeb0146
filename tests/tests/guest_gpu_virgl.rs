// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! 3D in a Linux guest: its Mesa draws through `vhost-device-gpu --virgl`, and QEMU's screen dump shows the result. The guest uses the file system of
//! this host, read-only: Mesa is too large for its memory.

#![cfg(test)]

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{self, Program};

/// Time limit for a picture to get from the guest to the screen dump.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes the guest use the programs of the host's file system, and defines a function that runs one.
const SETUP: &str = r#"
    until [ -e /dev/dri/card0 ]; do sleep 0.1; done
    mkdir -p /host
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
    for directory in dev proc sys; do mount --bind /$directory /host/$directory; done
    # Mesa would keep shaders.
    run() { HOME=/ MESA_SHADER_CACHE_DISABLE=1 chroot /host "$@"; }
"#;

fn machine(name: &str, socket: &Path, script: &str) -> Machine {
    Machine::new(name, format!("{SETUP}{script}"))
        .kernel(Flavour::Plain)
        .module("virtio_gpu")
        .module("9p")
        .module("9pnet_virtio")
        .memory(1024)
        .vhost_user("vhost-user-gpu-pci,xres=640,yres=480", socket)
        .argument("-fsdev")
        .argument("local,id=host,path=/,security_model=none,readonly=on,multidevs=remap")
        .argument("-device")
        .argument("virtio-9p-pci,fsdev=host,mount_tag=host")
}

/// Returns colours of the screen, row by row, and its width.
fn screen(guest: &Guest) -> (usize, Vec<[u8; 3]>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("screen.png");
    let arguments = json!({ "filename": path, "format": "png" });
    guest
        .qmp()
        .unwrap()
        .execute("screendump", arguments)
        .unwrap();
    let mut reader = png::Decoder::new(std::io::BufReader::new(File::open(path).unwrap()))
        .read_info()
        .unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    let size = info.color_type.samples();
    let pixels = bytes
        .chunks_exact(size)
        .map(|pixel| [pixel[0], pixel[1], pixel[2]]);
    (info.width as usize, pixels.collect())
}

/// Returns the back-end, with Mesa's software renderer in place of a GPU.
fn start(socket: &Path) -> Program {
    let mut command = process::command("vhost-device-gpu").unwrap();
    command
        .env("RUST_LOG", "info")
        .args(["--virgl", "--render-node=/dev/null"])
        .arg(process::option("socket-path", socket));
    let mut gpu = Program::spawn(&mut command).unwrap();
    gpu.wait_for_listener(socket).unwrap();
    gpu
}

/// Waits until a cube appears in the middle of a grey screen, in changing positions.
fn wait_for_cube(guest: &Guest, gpu: &Program) {
    let is_cube = |(width, pixels): &(usize, Vec<[u8; 3]>)| {
        let grey = |pixel: &[u8; 3]| pixel.iter().all(|value| value.abs_diff(128) <= 1);
        let middle = pixels.len() / 2 + width / 2;
        let edges = [0, width - 1, pixels.len() - width, pixels.len() - 1];
        pixels.len() == 640 * 480
            && edges.iter().all(|edge| grey(&pixels[*edge]))
            && !grey(&pixels[middle])
            && pixels[middle] != [0; 3]
    };
    let deadline = Instant::now() + PATIENCE;
    let mut first = None;
    loop {
        let now = screen(guest);
        if is_cube(&now) {
            match &first {
                Some(first) if *first != now => return,
                _ => first = Some(now),
            }
        }
        assert!(
            Instant::now() < deadline,
            "no cube turns on the screen; the back-end wrote:\n{}",
            gpu.stderr()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
#[ignore = "boots a guest"]
fn a_cube_turns_on_the_screen_through_pause_and_reset() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut gpu = start(&socket);
    let script = r#"
        # It ends when there is something on its stdin.
        sleep 600 | run /usr/bin/kmscube -D /dev/dri/card0 > /tmp/kmscube 2>&1 &
        cube=$!
        until grep -q renderer: /tmp/kmscube || ! kill -0 $cube; do sleep 0.1; done
        echo "@renderer $(grep renderer: /tmp/kmscube || cat /tmp/kmscube)"
        wait $cube
        tail /tmp/kmscube
    "#;
    let mut guest = machine("gpu-virgl-cube", &socket, script)
        .reboots()
        .start()
        .unwrap();
    let renderer = guest.wait("renderer").unwrap();
    assert!(renderer.contains("virgl"), "{renderer}");
    wait_for_cube(&guest, &gpu);
    let command = |guest: &Guest, name| guest.qmp().unwrap().execute(name, json!({})).unwrap();
    command(&guest, "stop");
    command(&guest, "cont");
    wait_for_cube(&guest, &gpu);
    command(&guest, "system_reset");
    guest.wait("renderer").unwrap();
    wait_for_cube(&guest, &gpu);
    assert_eq!(guest.qemu_stderr(), "");
    drop(guest);
    assert_eq!(gpu.status().unwrap(), None, "the back-end continues");
    assert!(!gpu.stderr().contains("warn: command"), "{}", gpu.stderr());
}

#[test]
#[ignore = "boots a guest"]
fn a_triangle_has_the_pixels_that_it_has_on_the_host() {
    let program = process::binary("draw-triangle").unwrap();
    let mut command = Command::new(&program);
    let host = command.env("LIBGL_ALWAYS_SOFTWARE", "1").output().unwrap();
    let host = String::from_utf8(host.stdout).unwrap();
    let expected = host
        .lines()
        .find(|line| line.starts_with("pixels "))
        .unwrap();
    assert!(
        expected.contains("[255, 128, 0, 255] [0, 0, 255, 255]"),
        "{host}"
    );

    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut gpu = start(&socket);
    let script = format!("run {} 2>&1 | sed 's/^/@/'", program.display());
    let mut guest = machine("gpu-virgl-triangle", &socket, &script)
        .start()
        .unwrap();
    let renderer = guest.wait("renderer").unwrap();
    assert!(renderer.starts_with("virgl"), "{renderer}");
    assert_eq!(
        format!("pixels {}", guest.wait("pixels").unwrap()),
        expected
    );
    guest.finish().unwrap();
    assert_eq!(gpu.status().unwrap(), None, "the back-end continues");
}
