// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask demo`: boots guests with our devices and prints what they see.

mod back_end;
mod console;
mod gpu;
pub mod input;
mod parts;
mod vsock;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde_json::Value;
use vhost_device_tests::guest::kernel::{Flavour, Kernel};
use vhost_device_tests::guest::{Guest, Machine, find_program};
use vhost_device_tests::process;

use self::back_end::{BackEnd, shown};
use self::parts::Parts;
use self::vsock::{Sockets, VSOCK};
use crate::packages::{self, GUEST};
use crate::progress::Progress;
use crate::workspace::cargo;

const BLOCK: &str = "vhost-device-block";
const RNG: &str = "vhost-device-rng";
const SERIAL: &str = "demo-disk";
const IMAGE_MIB: u64 = 256;

/// The script that the guest runs. The demo shows the lines that begin with @.
const SCRIPT: &str = r#"
    echo "@kernel Linux $(uname -r)"
    echo "@size $(($(cat /sys/block/vda/size) / 2048)) MiB"
    echo "@serial $(cat /sys/block/vda/serial)"
    until grep -q virtio_rng /sys/class/misc/hw_random/rng_current; do sleep 0.1; done
    echo "@rng $(cat /sys/class/misc/hw_random/rng_current)"
    echo "@random $(head -c 16 /dev/hwrng | hexdump -v -e '1/1 "%02x "')"
    echo "@queues $(ls /sys/block/vda/mq | wc -l)"
    mkdir /mnt
    mount -t ext4 /dev/vda /mnt
    echo "@mount $(grep /mnt /proc/mounts | cut -d' ' -f1-3)"
    echo "@read $(cat /mnt/from-host)"
    echo "greetings from Linux $(uname -r) in the guest" > /mnt/from-guest
    measure() {
        fio --name=$1 --filename=/mnt/$1 --size=64m --direct=1 --ioengine=libaio --eta=never \
            --runtime=3 --time_based --output-format=json --output=/tmp/$1 $2
        echo "@$1 $(tr -d '\n' < /tmp/$1)"
    }
    measure sequential "--rw=read --bs=1m --iodepth=4"
    measure random "--rw=randrw --bs=4k --iodepth=32"
    umount /mnt
"#;

pub fn run(progress: &Progress) -> Result<ExitCode, String> {
    // Installs all packages at once if possible, otherwise only those that the first part needs.
    packages::install(progress, &[GUEST, input::needs()].concat())
        .or_else(|_| packages::install(progress, GUEST))?;
    let kernel = packages::kernel(progress, Flavour::Cloud)?;
    let screen = packages::kernel(progress, Flavour::Plain);
    let keyboard = input::prepare(progress);
    let console = console::prepare(progress);
    let mut build = cargo(["build", "--release"]);
    let packages = [BLOCK, RNG, VSOCK, console::CONSOLE, gpu::GPU, input::INPUT];
    build.args(packages.map(|package| format!("--package={package}")));
    progress.run("Building the release binaries", &mut build)?;

    let mut parts = Parts::new(progress);
    parts.show("disk, random numbers and socket", Ok(()), || {
        disk(progress, &kernel)
    });
    parts.show("screen", screen.map(drop), || gpu::run(progress));
    parts.show("keyboard", keyboard, || input::run(progress));
    parts.show("console", console, || console::run(progress));
    Ok(parts.close())
}

/// Shows a disk, random numbers and a socket in a guest, and the content of the disk afterwards.
fn disk(progress: &Progress, kernel: &Kernel) -> Result<(), String> {
    let directory = tempfile::tempdir()
        .map_err(|error| format!("cannot create a temporary directory: {error}"))?;
    let image = directory.path().join("image");
    progress.step(&format!("Creating an ext4 image of {IMAGE_MIB} MiB"));
    make_image(directory.path(), &image)?;

    let mut disk = BackEnd::start(
        progress,
        BLOCK,
        &[
            process::option("blk-file", &image),
            process::option("serial", SERIAL),
        ],
    )?;
    let rng = BackEnd::start(progress, RNG, &[])?;
    let sockets = Sockets::start(progress)?;
    progress.step(&format!(
        "Booting a guest with Linux {} in QEMU",
        kernel.release
    ));
    let guest = Machine::new("demo", [vsock::SCRIPT, SCRIPT].concat())
        .module("virtio_blk")
        .module("virtio-rng")
        .module("vmw_vsock_virtio_transport")
        .program("fio")
        .program("socat")
        .memory(768)
        .argument("-smp")
        .argument("2")
        .vhost_user("vhost-user-blk-pci,num-queues=2", &disk.socket)
        .vhost_user("vhost-user-rng-pci", &rng.socket)
        .vhost_user("vhost-user-vsock-pci", &sockets.back_end.socket)
        .start();
    let result = guest.and_then(|mut guest| show(progress, &mut guest));
    result.map_err(|error| {
        let wrote = [&disk, &rng, &sockets.back_end].map(|back_end| back_end.program.stderr());
        format!("{error}\nlog of the back-ends:\n{}", wrote.concat())
    })?;
    disk.end()?;
    progress.step(&format!("The host heard: {}", sockets.heard()?));

    let written = run_quietly(
        Command::new(tool("debugfs")?)
            .args(["-R", "cat /from-guest"])
            .arg(&image),
    )?;
    progress.step(&format!(
        "On the host again, the image contains: {}",
        written.trim()
    ));
    run_quietly(Command::new(tool("e2fsck")?).arg("-fn").arg(&image))?;
    progress.step("The file system is clean.");
    Ok(())
}

/// Prints what the guest reports.
fn show(
    progress: &Progress,
    guest: &mut Guest,
) -> Result<(), vhost_device_tests::guest::GuestError> {
    let lines = [
        ("vsock", "answer of the host over a socket"),
        ("kernel", "is up"),
        ("size", "disk"),
        ("serial", "serial"),
        ("rng", "random numbers from"),
        ("random", "random bytes"),
        ("queues", "request queues"),
        ("mount", "mounted"),
        ("read", "read from the disk"),
    ];
    for (marker, title) in lines {
        let value = guest.wait(marker)?;
        progress.step(&format!("  guest: {title}: {value}"));
    }
    for (marker, title) in [
        ("sequential", "sequential read, 1 MiB, depth 4"),
        ("random", "random read and write, 4 KiB, depth 32"),
    ] {
        let report = guest.wait(marker)?;
        progress.step(&format!("  guest: {title}: {}", throughput(&report)));
    }
    guest.finish()?;
    Ok(())
}

/// Returns the throughput from fio's report.
fn throughput(report: &str) -> String {
    let report: Value = serde_json::from_str(report).unwrap_or_default();
    let sum = |field: &str| -> f64 {
        let of = |direction: &str| {
            let number = report.pointer(&format!("/jobs/0/{direction}/{field}"));
            number.and_then(Value::as_f64).unwrap_or_default()
        };
        of("read") + of("write")
    };
    format!(
        "{:.0} MiB/s, {:.0} requests/s",
        sum("bw") / 1024.0,
        sum("iops")
    )
}

/// Creates a file system that contains a greeting.
fn make_image(directory: &Path, image: &Path) -> Result<(), String> {
    let content = directory.join("content");
    let write = || -> std::io::Result<()> {
        fs::create_dir(&content)?;
        fs::write(content.join("from-host"), "greetings from the host\n")?;
        fs::File::create(image)?.set_len(IMAGE_MIB << 20)
    };
    write().map_err(|error| format!("cannot create the image: {error}"))?;
    run_quietly(
        Command::new(tool("mkfs.ext4")?)
            .args(["-q", "-d"])
            .args([&content, image]),
    )?;
    Ok(())
}

fn tool(name: &str) -> Result<PathBuf, String> {
    find_program(name).ok_or_else(|| format!("{name} is not installed"))
}

fn run_quietly(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("cannot run {}: {error}", shown(command)))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!(
            "{} failed ({})\n{}",
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}
