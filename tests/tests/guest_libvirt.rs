// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-block` as the disk of a libvirt domain, set up as the README describes, and `vhost-device-gpu` as its video device, found by its
//! descriptor.

#![cfg(test)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::picture::Picture;
use vhost_device_tests::guest::{Machine, libvirt};
use vhost_device_tests::process::{self, Program, Signal};
use vhost_device_tests::skip::skip_test;

const MIB: usize = 1 << 20;

/// The back-end, in a directory where libvirt's QEMU can connect to it. Dropping it ends the back-end and removes the directory.
struct Block {
    program: Program,
    directory: TempDir,
}

impl Block {
    /// Starts the back-end on an image of `mebibytes` of random bytes.
    fn start(mebibytes: usize, serial: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Other users cannot enter it otherwise, unlike most directories of a user.
        run(Command::new("chmod").arg("o+x").arg(directory.path()));
        let shared = directory.path().join("shared");
        fs::create_dir(&shared).unwrap();
        run(Command::new("chgrp").arg("libvirt-qemu").arg(&shared));
        run(Command::new("chmod").arg("g+xs").arg(&shared));
        let image = directory.path().join("image");
        let random = fs::File::open("/dev/urandom").unwrap();
        let mut random = io::Read::take(random, (mebibytes * MIB) as u64);
        io::copy(&mut random, &mut fs::File::create(&image).unwrap()).unwrap();
        Self {
            program: spawn(directory.path(), serial),
            directory,
        }
    }

    /// Kills the back-end, and starts it again.
    fn restart(&mut self, serial: &str) {
        self.program.end(Signal::KILL, process::PATIENCE).unwrap();
        self.program = spawn(self.directory.path(), serial);
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Returns the disk in libvirt's XML; `reconnect` is the contents of the source element.
    fn disk(&self, reconnect: &str) -> String {
        let socket = self.directory.path().join("shared/socket");
        format!(
            "<disk type='vhostuser' device='disk'>
               <driver name='qemu' type='raw'/>
               <source type='unix' path='{}'>{reconnect}</source>
               <target dev='vda' bus='virtio'/>
             </disk>",
            socket.display()
        )
    }
}

fn spawn(directory: &Path, serial: &str) -> Program {
    let socket = directory.join("shared/socket");
    let mut command = process::command("vhost-device-block").unwrap();
    command
        .arg(process::option("socket-path", &socket))
        .arg(process::option("blk-file", directory.join("image")))
        .arg(process::option("serial", serial));
    Program::serve(&mut command, &socket).unwrap()
}

/// Runs a program of the host, which must succeed, and returns its stdout.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Creates the machine `name`; skips the test if libvirt cannot run.
fn machine(name: &str, script: &str) -> Option<Machine> {
    if let Some(obstacle) = libvirt::obstacle() {
        skip_test(name, &format!("libvirt cannot run here: {obstacle}"));
        return None;
    }
    Some(Machine::new(name, script))
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn domain_reads_and_writes_its_disk() {
    // The second half becomes the first half in reverse order of mebibytes.
    let script = r#"
        echo "@serial $(cat /sys/block/vda/serial)"
        echo "@md5 $(dd if=/dev/vda bs=1M iflag=direct | md5sum | cut -d' ' -f1)"
        for i in $(seq 0 15); do
            dd if=/dev/vda of=/tmp/part bs=1M skip=$i count=1
            dd if=/tmp/part of=/dev/vda bs=1M seek=$((31 - i)) oflag=direct conv=notrunc
        done
    "#;
    let Some(machine) = machine("libvirt_read_write", script) else {
        return;
    };
    let block = Block::start(32, "libvirt");
    let before = fs::read(block.image()).unwrap();
    let sum = run(Command::new("md5sum").arg(block.image()));

    let machine = machine.module("virtio_blk");
    let mut domain = machine.start_in_libvirt(&block.disk(""), &[]).unwrap();
    let output = domain.finish().unwrap();
    assert_eq!(output.value("serial").unwrap(), "libvirt");
    let sum = sum.split_whitespace().next().unwrap();
    assert_eq!(output.value("md5").unwrap(), sum);

    let (first, second) = before.split_at(16 * MIB);
    let mut expected = first.to_vec();
    assert_eq!(second.len(), first.len());
    expected.extend(first.chunks(MIB).rev().flatten());
    let image = fs::read(block.image()).unwrap();
    assert!(image == expected, "the image is not what the guest wrote");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn io_of_a_domain_continues_after_the_back_end_is_restarted() {
    // The serial number is read from the device each time, so it tells which back-end answers.
    let script = r#"
        dd if=/dev/vda of=/tmp/part bs=1M count=8 iflag=direct
        round() {
            dd if=/tmp/part of=/dev/vda bs=64k seek=$(($1 * 128)) oflag=direct conv=notrunc
            dd if=/dev/vda bs=64k skip=$(($1 * 128)) count=128 iflag=direct | cmp - /tmp/part
        }
        until [ "$(cat /sys/block/vda/serial)" = second ]; do
            round 1
            echo "@round"
        done
        round 2
        round 3
    "#;
    let Some(machine) = machine("libvirt_reconnect", script) else {
        return;
    };
    let mut block = Block::start(32, "first");
    let before = fs::read(block.image()).unwrap();

    let disk = block.disk("<reconnect enabled='yes' timeout='1'/>");
    let machine = machine.module("virtio_blk");
    let mut domain = machine.start_in_libvirt(&disk, &[]).unwrap();
    for _ in 0..3 {
        domain.wait("round").unwrap();
    }
    block.restart("second");
    domain.finish().unwrap();

    let image = fs::read(block.image()).unwrap();
    assert!(
        image == before[..8 * MIB].repeat(4),
        "the image is not what the guest wrote"
    );
}

/// Returns the arguments of the processes that run `program`, joined.
fn command_lines(program: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap();
    let lines = processes.filter_map(|process| {
        let line = fs::read(process.ok()?.path().join("cmdline")).ok()?;
        let line = String::from_utf8(line).ok()?;
        let arguments = line.strip_prefix(program.to_str()?)?;
        Some(arguments.replace('\0', " ").trim().to_owned())
    });
    lines.collect()
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn domain_shows_its_picture_by_the_back_end_that_the_first_descriptor_names() {
    // Repeatedly: the console may still be about to set the mode, and to clear the screen.
    let script = r#"
        until [ -e /dev/fb0 ]; do sleep 0.1; done
        printf '\033[?25l' > /dev/tty1
        IFS=, read width height < /sys/class/graphics/fb0/virtual_size
        for colour in '\0\0\377\0' '\20\40\100\0'; do
            printf $colour > /tmp/row
            while [ $(stat -c %s /tmp/row) -lt $((width * 2 * height)) ]; do
                cat /tmp/row /tmp/row > /tmp/rows
                mv /tmp/rows /tmp/row
            done
            head -c $((width * 2 * height)) /tmp/row >> /tmp/bands
        done
        echo "@drawn $width $height"
        while :; do cat /tmp/bands > /dev/fb0; sleep 0.2; done
    "#;
    let name = "libvirt_gpu";
    let Some(machine) = machine(name, script) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    run(Command::new("chmod").arg("a+rx").arg(directory.path()));
    let program = directory.path().join("vhost-device-gpu");
    // `cp` copies: a file that this process has written could still be open in the child of another test.
    let built = process::binary("vhost-device-gpu").unwrap();
    run(Command::new("cp").arg(built).arg(&program));
    let ours = run(Command::new(&program).arg("--print-descriptor"));
    let other = r#"{ "description": "not fit", "type": "gpu", "binary": "/bin/false" }"#;
    let video = "<video><driver name='vhostuser'/><model type='virtio' heads='1'/></video>";
    let descriptors = [
        ("10-vhost-device-gpu.json", &ours[..]),
        ("50-other.json", other),
    ];
    let mut domain = machine
        .kernel(Flavour::Plain)
        .module("virtio_gpu")
        .start_in_libvirt(video, &descriptors)
        .unwrap();
    let size = domain.wait("drawn").unwrap();
    let arguments = command_lines(&program);
    assert_eq!(arguments.len(), 1, "{arguments:?}");
    assert!(arguments[0].starts_with("--fd="), "{arguments:?}");

    let file = directory.path().join("screen.png");
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        domain
            .virsh(&["screenshot", name, file.to_str().unwrap()])
            .unwrap();
        let screen = Picture::read(&file).unwrap();
        if screen.is_bands(&[[255, 0, 0], [64, 32, 16]]) {
            assert_eq!(format!("{} {}", screen.width, screen.height), size);
            domain.virsh(&["destroy", name]).unwrap();
            assert_eq!(command_lines(&program), [""; 0], "it has not ended");
            break;
        }
        assert!(
            Instant::now() < deadline,
            "a screen of {}x{}, its corners: {:?}",
            screen.width,
            screen.height,
            screen.corners()
        );
        thread::sleep(Duration::from_millis(100));
    }
}
