// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Conformance of the SCSI device: the suite of libiscsi (Debian's `libiscsi-bin`) and the tools of `sg3-utils`, which a guest in User-Mode
//! Linux runs on the generic device of its disk.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use vhost_device_tests::guest::find_program;
use vhost_device_tests::process::{Program, command, option};
use vhost_device_tests::skip::skip;
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{self, Device};

/// VIRTIO's number of SCSI hosts.
const SCSI: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(180);
/// Bytes of the disk. With 32 MiB, the suite would read all of it at once, for which the guest does not have the memory.
const SIZE: u64 = 24 << 20;

/// Tests of the suite's family SCSI in libiscsi 1.19 and 1.20.
const TESTS: u32 = 215;

/// Reasons to skip tests that are for other disks.
const NOT_REMOVABLE: &str = "Logical unit is not removable. Skipping test.";
const NO_REMOVABLE_MEDIUM: &str = "Media is not removable.";
const NOT_PROTECTED: &str = "Logical unit is not write-protected. Skipping test.";

/// What the suite does not test, with how often it says so at most, and why.
const SKIPS: &[(&str, usize, &str)] = &[
    (
        "This PERSISTENT RESERVE test is only supported for iSCSI backends",
        13,
        "two initiators: the suite has them on iSCSI only",
    ),
    (
        "This RESERVE6 test is only supported for iSCSI backends",
        6,
        "two initiators, or resets by iSCSI",
    ),
    (
        "This PREVENTALLOW test is only supported for iSCSI backends",
        6,
        "two initiators, or resets by iSCSI",
    ),
    (
        "This test is only supported for iSCSI backends",
        1,
        "it changes packets of iSCSI",
    ),
    (
        "Multipath unavailable. Skipping test",
        4,
        "there is one path",
    ),
    (
        "--allow-sanitize flag is not set. Skipping test.",
        11,
        "SANITIZE is not offered",
    ),
    (
        "WRITEATOMIC16 is not implemented.",
        11,
        "WRITE ATOMIC is not offered",
    ),
    (
        "WRITESAME10 does not support 0-blocks.",
        1,
        "WSNZ: they are refused, which the suite has checked",
    ),
    (
        "WRITESAME16 does not support 0-blocks.",
        1,
        "WSNZ: they are refused, which the suite has checked",
    ),
    (
        "LBPPB < 2. Skipping test",
        5,
        "physical blocks are no larger than logical ones",
    ),
    (NOT_REMOVABLE, 8, "another disk of the test is"),
    (NO_REMOVABLE_MEDIUM, 1, "another disk of the test is"),
    (NOT_PROTECTED, 1, "another disk of the test is"),
];

/// A back-end with one disk, and the directory that it shares with a guest.
struct Disk {
    work: TempDir,
    program: Program,
}

impl Disk {
    fn start(keys: &str) -> Self {
        uml::kernel::prepare().unwrap();
        let work = uml::work().unwrap();
        let (socket, image) = (work.path().join("socket"), work.path().join("image"));
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let mut command = command("vhost-device-scsi").unwrap();
        command
            .arg(option("socket-path", &socket))
            .arg(format!("--disk=file={}{keys}", image.display()));
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { work, program }
    }

    /// Runs a script in a guest. Returns what it has written to `$work/output`.
    fn guest(&mut self, script: &str) -> String {
        let work = self.work.path();
        let socket = work.join("socket");
        let device = Device {
            socket: &socket,
            id: SCSI,
        };
        let script = format!(
            "count=0; until [ -e /dev/sg0 ]; do count=$((count + 1)); [ $count -lt 500 ] || exit 1; usleep 20000; done\n\
             exec > $work/output 2>&1\n{script}"
        );
        let status = front_end::run(&[device], script, work, PATIENCE).unwrap();
        let output = fs::read(work.join("output")).unwrap_or_default();
        let output = String::from_utf8_lossy(&output).into_owned();
        assert_eq!(status, 0, "status of the script\n{output}");
        assert!(self.program.status().unwrap().is_none());
        output
    }
}

/// Finds a program of a package, or skips the test.
fn program(name: &str, package: &str) -> Option<PathBuf> {
    let path = find_program(name);
    if path.is_none() {
        skip(&format!("{name} is not installed (package {package})"));
    }
    path
}

/// Checks the output of libiscsi's suite: no test has failed, and what was skipped is known, and not one of `never`.
fn check_suite(output: &str, tests: u32, never: &[&str]) {
    let summary = output
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("tests "))
        .unwrap_or_else(|| panic!("no summary:\n{output}"));
    let numbers: Vec<u32> = summary
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    // Total, run, passed, failed, inactive.
    assert_eq!(numbers, [tests, tests, tests, 0, 0], "{output}");
    let mut skips: BTreeMap<&str, usize> = BTreeMap::new();
    for line in output.lines() {
        if let Some((_, reason)) = line.split_once("[SKIPPED] ") {
            *skips.entry(reason.trim()).or_default() += 1;
        }
    }
    for (reason, count) in skips {
        assert!(!never.contains(&reason), "skipped on this disk: {reason}");
        let known = SKIPS.iter().find(|(known, ..)| *known == reason);
        let most = known.map_or(0, |(_, most, _)| *most);
        assert!(count <= most, "skipped {count} times: {reason}");
    }
}

/// Runs libiscsi's suite on a disk with these properties, for which tests must not be skipped for the reasons `never`.
fn run_suite(keys: &str, family: &str, tests: u32, never: &[&str]) {
    let Some(suite) = program("iscsi-test-cu", "libiscsi-bin") else {
        return;
    };
    let mut disk = Disk::start(keys);
    // It fails if a test does; the summary says which.
    let script = format!(
        "{} -d -n -g --test={family} /dev/sg0; true",
        suite.display()
    );
    check_suite(&disk.guest(&script), tests, never);
}

/// The suite is wrong about GET LBA STATUS if physical blocks are larger, and the guest lacks the memory for large logical ones.
const BLOCKS: &str = ",logical-block-size=512,physical-block-size=512";

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn all_scsi_tests_of_libiscsi_pass() {
    run_suite(BLOCKS, "SCSI", TESTS, &[]);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn all_scsi_tests_of_libiscsi_pass_on_a_removable_disk() {
    let never = [NOT_REMOVABLE, NO_REMOVABLE_MEDIUM];
    run_suite(&format!("{BLOCKS},removable"), "SCSI", TESTS, &never);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_test_of_libiscsi_for_read_only_disks_passes() {
    run_suite(",read-only", "SCSI.ReadOnly", 1, &[NOT_PROTECTED]);
}

/// Calls of sg3-utils, with the exit status of each. 9 is that of commands that the device does not have, which it must say.
const CALLS: &[(u8, &str)] = &[
    (0, "sg_inq /dev/sg0"),
    (0, "sg_inq --len=4 /dev/sg0"),
    (0, "sg_vpd /dev/sg0"),
    (0, "sg_vpd --page=sn /dev/sg0"),
    (0, "sg_vpd --page=di /dev/sg0"),
    (0, "sg_vpd --page=ei /dev/sg0"),
    (0, "sg_vpd --page=tpc /dev/sg0"),
    (0, "sg_vpd --page=bl /dev/sg0"),
    (0, "sg_vpd --page=bdc /dev/sg0"),
    (0, "sg_vpd --page=lbpv /dev/sg0"),
    (0, "sg_vpd --page=ble /dev/sg0"),
    (0, "sg_turs /dev/sg0"),
    (0, "sg_requests /dev/sg0"),
    (0, "sg_readcap /dev/sg0"),
    (0, "sg_readcap --long /dev/sg0"),
    (0, "sg_luns --select=2 /dev/sg0"),
    (0, "sg_opcodes --rctd /dev/sg0"),
    (0, "sg_opcodes --opcode=0x28 /dev/sg0"),
    (0, "sg_opcodes --opcode=0x9e,0x10 /dev/sg0"),
    (0, "sg_opcodes --tmf /dev/sg0"),
    (0, "sg_modes --all /dev/sg0"),
    (0, "sg_modes --six --page=8 --control=1 /dev/sg0"),
    (
        0,
        "sg_wr_mode --page=8 --contents=08,12,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00 /dev/sg0",
    ),
    (
        0,
        "sg_wr_mode --page=8 --contents=08,12,04,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00,00 /dev/sg0",
    ),
    (0, "sg_logs --all /dev/sg0"),
    (0, "sg_logs --temperature /dev/sg0"),
    (0, "sg_verify --lba=8 --count=100 /dev/sg0"),
    (0, "sg_verify --16 --count=100 /dev/sg0"),
    (0, "sg_sync /dev/sg0"),
    (0, "sg_sync --16 --lba=9 --count=7 /dev/sg0"),
    (
        0,
        "sg_write_same --10 --lba=16 --num=16 --xferlen=512 --in=/dev/zero /dev/sg0",
    ),
    (
        0,
        "sg_write_same --16 --unmap --lba=16 --num=16 --xferlen=512 --in=/dev/zero /dev/sg0",
    ),
    (0, "sg_write_same --16 --ndob --lba=16 --num=16 /dev/sg0"),
    (0, "sg_unmap --lba=32 --num=16 /dev/sg0"),
    (0, "sg_get_lba_status --lba=0 --maxlen=1000 /dev/sg0"),
    (
        0,
        "sg_compare_and_write --lba=16 --num=1 --xferlen=1024 --in=/dev/zero /dev/sg0",
    ),
    (
        14,
        "sg_compare_and_write --lba=16 --num=1 --xferlen=1024 --in=$work/other /dev/sg0",
    ),
    (
        0,
        "sg_write_verify --10 --lba=64 --num=2 --in=$work/other /dev/sg0",
    ),
    (
        0,
        "sg_persist --out --register --param-sark=0x123abc /dev/sg0",
    ),
    (
        0,
        "sg_persist --out --reserve --param-rk=0x123abc --prout-type=5 /dev/sg0",
    ),
    (0, "sg_persist --in --read-keys /dev/sg0"),
    (0, "sg_persist --in --read-reservation /dev/sg0"),
    (0, "sg_persist --in --read-full-status /dev/sg0"),
    (0, "sg_persist --in --report-capabilities /dev/sg0"),
    (
        0,
        "sg_persist --out --release --param-rk=0x123abc --prout-type=5 /dev/sg0",
    ),
    (0, "sg_persist --out --clear --param-rk=0x123abc /dev/sg0"),
    (0, "sg_start --stop /dev/sg0"),
    (0, "sg_start --start /dev/sg0"),
    (0, "sg_prevent --allow /dev/sg0"),
    (0, "sg_senddiag --test /dev/sg0"),
    (0, "sg_rtpg --decode /dev/sg0"),
    (0, "sg_read_buffer --mode=0x0b --length=4 /dev/sg0"),
    (
        0,
        "sg_write_buffer --mode=0x0a --length=16 --in=$work/other /dev/sg0",
    ),
    (0, "sg_read_buffer --mode=0x0a --length=16 /dev/sg0"),
    (0, "sg_reassign --grown /dev/sg0"),
    (0, "sg_copy_results --params /dev/sg0"),
    (
        0,
        "sg_xcopy if=/dev/sg0 of=/dev/sg0 bs=512 count=100 seek=1000",
    ),
    (0, "sg_raw --request=16 /dev/sg0 25 0 0 0 0 0 0 0 0 0"),
    (0, "sg_dd if=/dev/sg0 of=/dev/null bs=512 count=1000"),
    (
        0,
        "sg_dd if=/dev/zero of=/dev/sg0 bs=512 count=1000 oflag=fua cdbsz=16",
    ),
    (0, "sg_read if=/dev/sg0 bs=512 count=1000"),
    (0, "sg_reset --device /dev/sg0"),
    (6, "sg_turs /dev/sg0"),
    (0, "sg_turs /dev/sg0"),
    (9, "sg_rep_zones /dev/sg0"),
    (9, "sg_sanitize --overwrite --zero --quick --wait /dev/sg0"),
    (9, "sg_sat_identify /dev/sg0"),
    (5, "sg_raw --request=64 /dev/sg0 12 01 89 00 40 00"),
    (5, "sg_modes --page=2 /dev/sg0"),
];

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn every_call_of_sg3_utils_is_answered() {
    if program("sg_opcodes", "sg3-utils").is_none() {
        return;
    }
    let mut disk = Disk::start(BLOCKS);
    fs::write(disk.work.path().join("other"), [0x5a; 1024]).unwrap();
    let mut script = String::from("PATH=$PATH:/usr/bin:/usr/sbin\n");
    for (status, call) in CALLS {
        script.push_str(&format!(
            "{call}; got=$?; [ $got = {status} ] || echo \"@failed $got: {call}\"\n"
        ));
    }
    let output = disk.guest(&script);
    assert!(!output.contains("@failed"), "{output}");
}
