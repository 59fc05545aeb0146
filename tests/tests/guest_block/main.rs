// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-block` with a Linux guest in QEMU.

#![cfg(test)]

mod crash;
mod resize;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_device_tests::guest::{Machine, Output, find_program};
use vhost_device_tests::process::{self, Program};

const MIB: usize = 1 << 20;

/// The back-end with its own image. Dropping it ends the back-end and removes the image.
struct Block {
    program: Program,
    directory: TempDir,
}

impl Block {
    /// Starts the back-end on an image of `mebibytes` of random bytes.
    fn start(mebibytes: usize, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("image"), random(mebibytes * MIB)).unwrap();
        Self {
            program: spawn(directory.path(), |command| {
                command.args(options);
            }),
            directory,
        }
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Returns the whole contents of the image.
    fn content(&self) -> Vec<u8> {
        fs::read(self.image()).unwrap()
    }

    /// Creates a machine with this device as `/dev/vda`, with `properties` like `,num-queues=4`.
    fn machine(&self, name: &str, properties: &str, script: impl Into<String>) -> Machine {
        Machine::new(name, script).module("virtio_blk").vhost_user(
            &format!("vhost-user-blk-pci{properties}"),
            &self.directory.path().join("socket"),
        )
    }
}

/// Starts the back-end in a directory with an image. `prepare` may change the command.
fn spawn(directory: &Path, prepare: impl FnOnce(&mut Command)) -> Program {
    let socket = directory.join("socket");
    let mut command = process::command("vhost-device-block").unwrap();
    command
        .arg(process::option("socket-path", &socket))
        .arg(process::option("blk-file", directory.join("image")));
    prepare(&mut command);
    Program::serve(&mut command, &socket).unwrap()
}

fn random(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    bytes
}

/// Runs a program of the host, which must succeed, and returns its stdout.
fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> String {
    let path = find_program(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = Command::new(path).args(arguments).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program}: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

/// Returns the MD5 sum of a file, as the guest's `md5sum` prints it.
fn md5(file: &Path) -> String {
    let line = run("md5sum", [file]);
    line.split_whitespace().next().unwrap().to_owned()
}

/// Returns the MD5 sums of the regular files below `root`, as `SUM ./PATH`.
fn sums(root: &Path) -> BTreeSet<String> {
    let mut sums = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file() {
                let path = entry.path();
                let name = path.strip_prefix(root).unwrap().display();
                sums.insert(format!("{} ./{name}", md5(&path)));
            }
        }
    }
    sums
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn whole_disk_read_equals_the_image() {
    let block = Block::start(64, &[]);
    let script = r#"
        echo "@sectors $(cat /sys/block/vda/size)"
        echo "@direct $(dd if=/dev/vda bs=1M iflag=direct | md5sum | cut -d' ' -f1)"
        echo "@cached $(md5sum /dev/vda | cut -d' ' -f1)"
    "#;
    let mut guest = block
        .machine("whole_disk_read", "", script)
        .start()
        .unwrap();
    let output = guest.finish().unwrap();
    assert_eq!(
        output.value("sectors").unwrap(),
        (64 * MIB / 512).to_string()
    );
    let expected = md5(&block.image());
    assert_eq!(output.value("direct").unwrap(), expected);
    assert_eq!(output.value("cached").unwrap(), expected);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn qemu_prints_no_error() {
    let block = Block::start(4, &[]);
    let script = r#"
        dd if=/dev/vda of=/tmp/disk bs=1M
        dd if=/tmp/disk of=/dev/vda bs=1M conv=notrunc
        sync
    "#;
    let mut guest = block.machine("complaints", "", script).start().unwrap();
    guest.finish().unwrap();
    assert_eq!(guest.qemu_stderr(), "");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn serial_and_block_size_are_as_given() {
    let options = ["--serial=0123456789abcdefghij", "--logical-block-size=4096"];
    let block = Block::start(4, &options);
    let script = r#"
        cd /sys/block/vda
        echo "@serial $(cat serial)"
        echo "@block-size $(cat queue/logical_block_size)"
        echo "@sectors $(cat size)"
        echo "@md5 $(dd if=/dev/vda bs=4k iflag=direct | md5sum | cut -d' ' -f1)"
    "#;
    let mut guest = block.machine("serial", "", script).start().unwrap();
    let output = guest.finish().unwrap();
    assert_eq!(output.value("serial").unwrap(), "0123456789abcdefghij");
    assert_eq!(output.value("block-size").unwrap(), "4096");
    // Sectors have 512 bytes whatever the block size is.
    assert_eq!(
        output.value("sectors").unwrap(),
        (4 * MIB / 512).to_string()
    );
    assert_eq!(output.value("md5").unwrap(), md5(&block.image()));
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn file_system_made_in_the_guest_is_whole_on_the_host() {
    let block = Block::start(128, &[]);
    let script = r#"
        mkfs.ext4 -q /dev/vda
        mkdir /mnt
        mount -t ext4 /dev/vda /mnt
        cd /mnt
        for directory in a b c/d/e; do
            mkdir -p $directory
            for i in $(seq 20); do dd if=/dev/urandom of=$directory/$i bs=$((i * 777)) count=$i; done
        done
        dd if=/dev/urandom of=large bs=1M count=24
        sync
        mv a/20 c/d/moved
        rm -r b
        mkdir b
        cp large b/copy
        dd if=/dev/urandom of=large bs=4k seek=100 count=50 conv=notrunc
        find . -type f | while read file; do echo "@sum $(md5sum $file | sed 's/  / /')"; done
        cd /
        umount /mnt
    "#;
    let machine = block.machine("file_system", "", script);
    let mut guest = machine.program("mkfs.ext4").start().unwrap();
    let output = guest.finish().unwrap();
    let expected: BTreeSet<_> = output.values("sum").map(str::to_owned).collect();
    assert_eq!(expected.len(), 42);

    let image = block.image();
    run("e2fsck", [OsStr::new("-fn"), image.as_os_str()]);
    let copy = block.directory.path().join("copy");
    fs::create_dir(&copy).unwrap();
    let request = format!("rdump / {}", copy.display());
    run(
        "debugfs",
        [OsStr::new("-R"), request.as_ref(), image.as_os_str()],
    );
    assert_eq!(sums(&copy), expected);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn discard_frees_space_on_the_host() {
    let block = Block::start(16, &[]);
    let before = block.content();
    let allocated = fs::metadata(block.image()).unwrap().blocks();
    let script = r#"
        blkdiscard -o 4194304 -l 8388608 /dev/vda
        echo "@discards $(awk '{ print $12 }' /sys/block/vda/stat)"
    "#;
    let mut guest = block.machine("discard", "", script).start().unwrap();
    let output = guest.finish().unwrap();
    assert_ne!(output.value("discards").unwrap(), "0");

    let mut expected = before;
    expected[4 * MIB..12 * MIB].fill(0);
    assert!(block.content() == expected, "the image is not as discarded");
    let freed = allocated - fs::metadata(block.image()).unwrap().blocks();
    assert_eq!(freed, (8 * MIB / 512) as u64, "blocks of 512 bytes freed");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn write_zeroes_makes_zeroes() {
    let block = Block::start(32, &[]);
    let mut expected = block.content();
    // The first one keeps the space, the second one frees it; the second one fails if the device does not support that.
    let script = r#"
        echo "@limit $(cat /sys/block/vda/queue/write_zeroes_max_bytes)"
        /programs/blkdiscard --zeroout --offset 1048576 --length 16777216 /dev/vda
        /programs/fallocate --punch-hole --offset 25165824 --length 4194304 /dev/vda
        echo "@writes $(awk '{ print $5 }' /sys/block/vda/stat)"
        echo "@md5 $(dd if=/dev/vda bs=1M iflag=direct | md5sum | cut -d' ' -f1)"
    "#;
    let machine = block.machine("write_zeroes", "", script);
    let mut guest = machine
        .program("blkdiscard")
        .program("fallocate")
        .start()
        .unwrap();
    let output = guest.finish().unwrap();
    assert_ne!(output.value("limit").unwrap(), "0");
    // Linux would write pages of zeroes, in more than ten requests, if the device had no such request. A flush is counted too.
    let writes: u32 = output.value("writes").unwrap().parse().unwrap();
    assert!((2..5).contains(&writes), "{writes} writes");
    expected[MIB..17 * MIB].fill(0);
    expected[24 * MIB..28 * MIB].fill(0);
    assert!(block.content() == expected, "the image is not as zeroed");
    assert_eq!(output.value("md5").unwrap(), md5(&block.image()));
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn read_only_image_cannot_be_written() {
    let block = Block::start(4, &["--read-only"]);
    let before = md5(&block.image());
    let script = r#"
        echo "@read-only $(cat /sys/block/vda/ro)"
        dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct conv=notrunc && echo "@written dd"
        echo "@md5 $(md5sum /dev/vda | cut -d' ' -f1)"
        blkdiscard /dev/vda && echo "@written discard"
        true
    "#;
    let mut guest = block.machine("read_only", "", script).start().unwrap();
    let output = guest.finish().unwrap();
    assert_eq!(output.value("read-only").unwrap(), "1");
    assert_eq!(output.value("md5").unwrap(), before);
    assert_eq!(output.values("written").count(), 0);
    assert_eq!(md5(&block.image()), before);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn four_queues_serve_four_processors() {
    let block = Block::start(64, &["--num-queues=4"]);
    let mut expected = block.content();
    // Linux gives each processor its own queue. Each copies its share of the disk's first half to the second half.
    let script = r#"
        echo "@queues $(ls /sys/block/vda/mq | wc -l)"
        for cpu in 0 1 2 3; do
            taskset -c $cpu sh -e -c "
                dd if=/dev/vda of=/tmp/$cpu bs=1M skip=$((cpu * 8)) count=8 iflag=direct
                dd if=/tmp/$cpu of=/dev/vda bs=64k seek=$((512 + cpu * 128)) oflag=direct conv=notrunc" &
        done
        wait
        for queue in 0 1 2 3; do
            echo "@interrupts $(awk "/-req.$queue\$/ { for (i = 2; i <= 5; i++) sum += \$i; print sum }" /proc/interrupts)"
        done
    "#;
    let machine = block.machine("four_queues", ",num-queues=4", script);
    let machine = machine.argument("-smp").argument("4");
    let output = machine.start().unwrap().finish().unwrap();
    assert_eq!(output.value("queues").unwrap(), "4");
    let interrupts: Vec<u64> = output
        .values("interrupts")
        .map(|count| count.parse().unwrap())
        .collect();
    assert_eq!(interrupts.len(), 4);
    assert!(interrupts.iter().all(|count| *count > 0), "{interrupts:?}");
    expected.copy_within(..32 * MIB, 32 * MIB);
    assert!(block.content() == expected, "the halves are not equal");
}

/// Default duration of `verify`.
const SECONDS: u64 = 20;
/// Duration for each I/O engine and ring format, and the environment variable with another number of seconds.
const SECONDS_OF_EACH: u64 = 8;
const VERIFY_SECONDS: &str = "VHOST_DEVICE_VERIFY_SECONDS";

/// Defines the shell function `verify`: writes and reads back for a while, checks each block by its checksum, then writes the marker `@fio`.
const VERIFY: &str = r#"
    verify() {
        fio --name=verify --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
            --verify=crc32c --verify_backlog=256 --verify_fatal=1 --time_based --runtime=20 "$@" \
            --disable_lat=1 --disable_slat=1 --disable_clat=1 --eta=never --output-format=json --output=/tmp/fio
        echo "@fio $(tr -d ' \n' < /tmp/fio)"
    }
"#;

/// Checks the result of `verify`, and its duration.
fn check_verified(output: &Output, seconds: u64) {
    let report: Value = serde_json::from_str(output.value("fio").unwrap()).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{job:#}");
    for direction in ["read", "write"] {
        let bytes = job[direction]["io_bytes"].as_u64().unwrap();
        assert!(bytes > MIB as u64, "{direction}: {bytes} bytes\n{job:#}");
    }
    let milliseconds = job["job_runtime"].as_u64().unwrap();
    assert!(milliseconds > 1000 * (seconds - 1), "{milliseconds} ms");
}

/// The ring formats, and the corresponding property of QEMU.
const FORMATS: [(&str, &str); 2] = [("split", ""), ("packed", ",packed=on")];

/// Panics unless the ring that was started last, that of Linux, has this format. The rings of the firmware are split.
fn assert_format(block: &Block, format: &str) {
    let log = block.program.stderr();
    let started = log.lines().rfind(|line| line.contains(" started: "));
    let is_of_format = started.is_some_and(|line| line.contains(&format!("{format} ring")));
    assert!(is_of_format, "the ring is not {format}:\n{log}");
}

/// Writes and verifies with an I/O engine, with both formats one after the other.
fn verify(engine: &str) {
    let seconds = std::env::var(VERIFY_SECONDS).map_or(SECONDS_OF_EACH, |text| {
        text.parse().expect("a number of seconds")
    });
    for (format, properties) in FORMATS {
        let block = Block::start(128, &[&format!("--io-engine={engine}")]);
        let script = format!("{VERIFY} verify --bsrange=4k-64k --runtime={seconds}");
        let machine = block.machine(&format!("fio_{engine}_{format}"), properties, script);
        let mut guest = machine
            .program("fio")
            .memory(768)
            .deadline(Duration::from_secs(240 + seconds))
            .start()
            .unwrap();
        check_verified(&guest.finish().unwrap(), seconds);
        assert_format(&block, format);
    }
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_verifies_with_io_uring() {
    verify("io_uring");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_verifies_with_threads() {
    verify("threads");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_verifies_with_what_suits_each_file() {
    verify("auto");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn disk_works_after_a_reboot() {
    reboot(FORMATS[0]);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn disk_works_after_a_reboot_on_packed_rings() {
    reboot(FORMATS[1]);
}

fn reboot((format, properties): (&str, &str)) {
    let block = Block::start(4, &[]);
    let script = r#"
        mark=$(dd if=/dev/vda bs=512 count=1 iflag=direct | head -c 6)
        if [ "$mark" = reboot ]; then
            echo "@boot second"
        else
            echo "@boot first"
            { printf reboot; cat /dev/zero; } | head -c 512 | dd of=/dev/vda bs=512 oflag=direct conv=notrunc
            reboot -f
        fi
    "#;
    let machine = block.machine(&format!("reboot_{format}"), properties, script);
    let mut guest = machine.reboots().start().unwrap();
    assert_eq!(guest.wait("boot").unwrap(), "first");
    assert_eq!(guest.wait("boot").unwrap(), "second");
    guest.finish().unwrap();
    let mut mark = [0; 7];
    File::open(block.image())
        .unwrap()
        .read_exact_at(&mut mark, 0)
        .unwrap();
    assert_eq!(&mark, b"reboot\0");
    assert_format(&block, format);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn memory_plugged_in_during_io_is_used_for_io() {
    let block = Block::start(512, &[]);
    // The plugged memory is above 4 GiB, in the zone Normal, which was empty before; Linux prefers it to the zone DMA32 with the rest.
    // The last 384 MiB of the disk are read into it.
    let script = r#"
        echo online_kernel > /sys/devices/system/memory/auto_online_blocks
        normal() { awk '/^Node/ { here = ($4 == "Normal") } here && $1 == "'$1'" { print $2; exit }' /proc/zoneinfo; }
        verify --size=64m --bs=4k &
        job=$!
        while [ "$(awk '{ print $5 }' /sys/block/vda/stat)" -lt 100 ]; do true; done
        echo "@busy"
        until [ "$(normal present)" -ge 131072 ] 2> /dev/null; do kill -0 $job; done
        echo "@plugged"
        kill -0 $job
        # Linux forgets what it has cached of a disk when nobody has it open any more.
        exec 3< /dev/vda
        echo "@md5 $(dd if=/dev/vda bs=1M skip=128 count=384 | md5sum | cut -d' ' -f1)"
        echo "@cached $(normal nr_zone_inactive_file) $(normal nr_zone_active_file)"
        wait $job
    "#;
    let machine = block.machine("memory_hot_add", "", format!("{VERIFY}{script}"));
    let mut guest = machine
        .program("fio")
        .memory(768)
        .memory_slots()
        .start()
        .unwrap();
    guest.wait("busy").unwrap();
    let mut qmp = guest.qmp().unwrap();
    let size = 512 * MIB;
    qmp.execute(
        "object-add",
        json!({ "qom-type": "memory-backend-memfd", "id": "plug", "size": size, "share": true }),
    )
    .unwrap();
    qmp.execute(
        "device_add",
        json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "plug" }),
    )
    .unwrap();
    guest.wait("plugged").unwrap();
    let output = guest.finish().unwrap();
    let tail = block.directory.path().join("tail");
    fs::write(&tail, &block.content()[128 * MIB..]).unwrap();
    assert_eq!(output.value("md5").unwrap(), md5(&tail));
    let cached: usize = output
        .value("cached")
        .unwrap()
        .split_whitespace()
        .map(|pages| pages.parse::<usize>().unwrap())
        .sum();
    assert!(
        cached * 4096 > 16 * MIB,
        "{cached} pages of the plugged memory hold what was read"
    );
    check_verified(&output, SECONDS);
}
