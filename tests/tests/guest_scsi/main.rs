// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI host of a Linux guest: User-Mode Linux, with its own front-end, or QEMU. Linux scans all targets, uses the disks, and follows
//! their changes by the events of the device.

#![cfg(test)]

mod firmware;
mod passthrough;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vhost_device_tests::guest::{Machine, find_program};
use vhost_device_tests::process::{Program, Signal, binary, command, option};
use vhost_device_tests::skip::skip;
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{self, Device};

/// VIRTIO's number of SCSI hosts.
const SCSI: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: usize = 4 << 20;

/// The beginning of all scripts: waits for up to ten seconds until a command succeeds, and ends the script with a status if it does not.
const PROLOGUE: &str = "
wait_for() { status=$1; shift; count=0; until \"$@\"; do count=$((count + 1)); [ $count -lt 500 ] || exit $status; usleep 20000; done; }
gone() { ! [ -e \"$1\" ]; }
# The disk at a target and a lun.
disk() { ls /sys/class/scsi_device/0:0:$1:$2/device/block 2>/dev/null; }
has() { [ -n \"$(disk $1 $2)\" ]; }
sectors() { [ \"$(cat /sys/block/$1/size)\" = \"$2\" ]; }
";

/// A back-end, and the directory that it shares with a guest.
struct BackEnd {
    work: TempDir,
    program: Program,
    arguments: Vec<String>,
}

/// Starts the back-end with its sockets in `work`.
fn serve(work: &Path, arguments: &[String]) -> Program {
    let socket = work.join("socket");
    let mut command = command("vhost-device-scsi").unwrap();
    command
        .arg(option("socket-path", &socket))
        .arg(option("control-socket", work.join("control")))
        .args(arguments);
    Program::serve(&mut command, &socket).unwrap()
}

impl BackEnd {
    fn start(disks: &[(&[u8], &str)]) -> Self {
        let work = uml::work().unwrap();
        let mut arguments = Vec::new();
        for (number, (contents, keys)) in disks.iter().enumerate() {
            let image = work.path().join(format!("image{number}"));
            fs::write(&image, contents).unwrap();
            arguments.push(format!("--disk=file={}{keys}", image.display()));
        }
        let program = serve(work.path(), &arguments);
        Self {
            work,
            program,
            arguments,
        }
    }

    /// Kills the back-end, and starts another one in its place.
    fn replace(&mut self) {
        self.program.end(Signal::KILL, PATIENCE).unwrap();
        self.program = serve(self.work.path(), &self.arguments);
    }

    /// Returns a machine of QEMU with this host. The script starts with [`PROLOGUE`], whose host has the number 0.
    fn machine(&self, name: &str, properties: &str, script: &str) -> Machine {
        let script = format!("{PROLOGUE}{script}");
        let machine = Machine::new(name, script)
            .module("virtio_scsi")
            .module("sd_mod");
        let device = format!("vhost-user-scsi-pci{properties}");
        machine.vhost_user_reconnecting(&device, &self.path("socket"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// Runs a script in a guest, and `beside` on the host at the same time.
    fn guest(&mut self, script: &str, beside: impl FnOnce(&Path) + Send) {
        // The kernel is built before the clock starts.
        uml::kernel::prepare().unwrap();
        let work = self.work.path();
        let socket = work.join("socket");
        let device = Device {
            socket: &socket,
            id: SCSI,
        };
        let script = format!("{PROLOGUE}{script}");
        let status = thread::scope(|scope| {
            scope.spawn(|| beside(work));
            front_end::run(&[device], script, work, PATIENCE).unwrap()
        });
        assert_eq!(status, 0, "status of the script");
        assert!(self.program.status().unwrap().is_none());
    }
}

/// Sends a command to the device whose sockets are in `work`.
fn ctl(work: &Path, words: &[&str]) {
    let output = Command::new(binary("vhost-device-ctl").unwrap())
        .args(words.iter().filter(|word| word.starts_with("--")))
        .arg(work.join("control"))
        .args(words.iter().filter(|word| !word.starts_with("--")))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Waits until the guest has created a file.
fn wait_for(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        assert!(
            Instant::now() < deadline,
            "{} does not appear",
            path.display()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn linux_finds_its_disks_and_reads_and_writes_them() {
    let (first, second) = (noise(1, SIZE), noise(2, SIZE));
    let disks = [
        (first.as_slice(), ",target=0,serial=FIRST"),
        (&second, ",target=200,lun=3,read-only"),
        (&[0; SIZE], ",target=200,lun=300"),
    ];
    let mut back_end = BackEnd::start(&disks);
    back_end.guest(
        // Linux counts the address method of numbers above 255: 0x4000 + 300.
        "wait_for 2 has 0 0; wait_for 3 has 200 3; wait_for 4 has 200 16684
        first=$(disk 0 0); second=$(disk 200 3); third=$(disk 200 16684)
        dd bs=64k if=/dev/$first of=$work/read0 || exit 5
        dd bs=64k if=/dev/$second of=$work/read1 || exit 6
        dd bs=64k if=/dev/$second of=/dev/$third conv=fsync || exit 7
        [ $(cat /sys/block/$second/ro) = 1 ] || exit 8
        dd bs=512 count=1 seek=100 if=/dev/zero of=/dev/$second && exit 9
        [ $(ls -d /sys/class/scsi_device/* | wc -l) = 3 ] || exit 10
        exit 0",
        |_| (),
    );
    assert!(fs::read(back_end.path("read0")).unwrap() == first);
    assert!(fs::read(back_end.path("read1")).unwrap() == second);
    assert!(fs::read(back_end.path("image1")).unwrap() == second);
    assert!(fs::read(back_end.path("image2")).unwrap() == second);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn linux_follows_disks_that_come_grow_and_go() {
    let mut back_end = BackEnd::start(&[(&[0; SIZE], "")]);
    let contents = noise(3, SIZE);
    fs::write(back_end.path("new"), &contents).unwrap();
    let sectors = SIZE / 512;
    let script = format!(
        "wait_for 2 has 0 0; first=$(disk 0 0)
        touch $work/ready
        wait_for 3 has 9 1; new=$(disk 9 1)
        dd bs=64k if=/dev/$new of=$work/read || exit 4
        touch $work/added
        wait_for 5 sectors $new {}
        touch $work/grown
        wait_for 6 sectors $first {}
        touch $work/grown-too
        wait_for 7 gone /sys/block/$new
        touch $work/removed
        dd bs=64k if=/dev/$first of=/dev/null",
        2 * sectors,
        3 * sectors,
    );
    back_end.guest(&script, |work| {
        let within_a_second = |begin: Instant, name: &str| {
            wait_for(&work.join(name));
            assert!(
                begin.elapsed() < Duration::from_secs(1),
                "{name}: {:?}",
                begin.elapsed()
            );
        };
        wait_for(&work.join("ready"));
        let begin = Instant::now();
        let file = format!("--file={}", work.join("new").display());
        ctl(work, &[&file, "add-disk", "target=9,lun=1,serial=NEW"]);
        wait_for(&work.join("added"));
        println!("a disk was used {:?} after it was added", begin.elapsed());
        let begin = Instant::now();
        let size = format!("size={}", 2 * SIZE);
        ctl(work, &["resize-disk", "target=9", "lun=1", &size]);
        within_a_second(begin, "grown");
        let begin = Instant::now();
        let image = fs::File::options()
            .write(true)
            .open(work.join("image0"))
            .unwrap();
        image.set_len(3 * SIZE as u64).unwrap();
        ctl(work, &["reload"]);
        within_a_second(begin, "grown-too");
        let begin = Instant::now();
        ctl(work, &["remove-disk", "target=9", "lun=1"]);
        within_a_second(begin, "removed");
    });
    assert!(fs::read(back_end.path("read")).unwrap() == contents);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn linux_resets_a_disk_while_it_writes() {
    let Some(sg_reset) = find_program("sg_reset") else {
        return skip("sg_reset is not installed (package sg3-utils)");
    };
    let contents = noise(4, SIZE);
    let mut back_end = BackEnd::start(&[(&[0; SIZE], "")]);
    fs::write(back_end.path("data"), &contents).unwrap();
    let script = format!(
        "wait_for 2 has 0 0; disk=/dev/$(disk 0 0)
        (while ! [ -e $work/stop ]; do dd bs=4k if=$work/data of=$disk conv=fsync 2>/dev/null || exit 1; done) &
        for count in 1 2 3 4 5 6; do
            timeout 10 {0} --device --no-esc $disk || exit 3
            # The driver of Linux 6.12 has no such resets.
            timeout 10 {0} --target --no-esc $disk
            [ $? != 143 ] || exit 5
        done
        touch $work/stop
        wait $! || exit 4
        dd bs=4k if=$disk of=$work/read",
        sg_reset.display()
    );
    back_end.guest(&script, |_| ());
    assert!(fs::read(back_end.path("read")).unwrap() == contents);
    assert!(fs::read(back_end.path("image0")).unwrap() == contents);
}

/// QEMU shows its guests HOTPLUG and CHANGE, whatever the back-end offers, and has a config space of its own.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_of_qemu_follows_disks_that_come_grow_and_go() {
    let contents = noise(5, SIZE);
    let back_end = BackEnd::start(&[(&contents, "")]);
    fs::write(back_end.path("new"), &contents).unwrap();
    let sectors = SIZE / 512;
    let script = format!(
        r#"
        wait_for 2 has 0 0; first=$(disk 0 0)
        echo "@first $(md5sum < /dev/$first | cut -d' ' -f1)"
        wait_for 3 has 9 1; new=$(disk 9 1)
        echo "@new $(md5sum < /dev/$new | cut -d' ' -f1)"
        wait_for 4 sectors $new {}
        echo "@grown"
        wait_for 5 gone /sys/block/$new
        dd if=/dev/$first of=/tmp/data bs=64k
        dd if=/tmp/data of=/dev/$first bs=64k seek=1 count=10 conv=notrunc,fsync
        "#,
        2 * sectors,
    );
    let machine = back_end.machine("scsi_changes", ",num_queues=2", &script);
    let mut guest = machine.start().unwrap();
    let sum = guest.wait("first").unwrap();
    let work = back_end.work.path();
    let file = format!("--file={}", work.join("new").display());
    ctl(work, &[&file, "add-disk", "target=9,lun=1,serial=NEW"]);
    assert_eq!(guest.wait("new").unwrap(), sum);
    let size = format!("size={}", 2 * SIZE);
    ctl(work, &["resize-disk", "target=9", "lun=1", &size]);
    guest.wait("grown").unwrap();
    ctl(work, &["remove-disk", "target=9", "lun=1"]);
    guest.finish().unwrap();
    let mut expected = contents.clone();
    expected[64 << 10..(64 << 10) + (640 << 10)].copy_from_slice(&contents[..640 << 10]);
    assert!(fs::read(back_end.path("image0")).unwrap() == expected);
}

/// Seconds that fio works.
const SECONDS: u64 = 12;

/// The back-end is killed under load, again and again. QEMU connects to its successor, which carries out what was in flight.
fn kill_under_a_guest(format: &str, properties: &str) {
    const KILLS: usize = 4;
    let mut back_end = BackEnd::start(&[(&[0; 16 << 20], "")]);
    let script = format!(
        r#"
        wait_for 2 has 0 0; disk=/dev/$(disk 0 0)
        echo "@ready"
        fio --name=verify --filename=$disk --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw --bsrange=4k-64k \
            --verify=crc32c --verify_backlog=256 --verify_fatal=1 --time_based --runtime={SECONDS} \
            --eta=never --output-format=json --output=/tmp/fio
        echo "@fio $(tr -d ' \n' < /tmp/fio)"
        "#
    );
    let name = format!("scsi_kills_{format}");
    let machine = back_end.machine(&name, properties, &script);
    let mut guest = machine.program("fio").memory(768).start().unwrap();
    guest.wait("ready").unwrap();
    for _ in 0..KILLS {
        thread::sleep(Duration::from_secs(SECONDS / KILLS as u64) - Duration::from_millis(700));
        back_end.replace();
    }
    let output = guest.finish().unwrap();
    let report: Value = serde_json::from_str(output.value("fio").unwrap()).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{job:#}");
    for direction in ["read", "write"] {
        let bytes = job[direction]["io_bytes"].as_u64().unwrap();
        assert!(bytes > 1 << 20, "{direction}: {bytes} bytes\n{job:#}");
    }
    let log = back_end.program.stderr();
    assert!(log.contains(&format!("{format} ring")), "{log}");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_finds_no_error_while_the_back_end_is_killed() {
    kill_under_a_guest("split", ",num_queues=2");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_finds_no_error_while_the_back_end_is_killed_with_packed_rings() {
    kill_under_a_guest("packed", ",packed=on");
}
