// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmark of the block device: its verification, and its handling of earlier results; that of the console device.

#![cfg(test)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use vhost_device_tests::process::{PATIENCE, Program};

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.arg("block").args(arguments);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the benchmark's verification, with its images in `directory` and in memory.
fn verify(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = bench(&["--verify"]);
    command.args(arguments).arg("--disk-dir").arg(directory);
    command
}

fn failed(output: &Output) -> String {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    stderr
}

#[test]
fn each_engine_place_and_ring_format_reads_what_was_written() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let output = verify(directory.path(), &["--quick"]).output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stdout.contains(" requests, "), "{stdout}");
    for place in ["tmpfs", "disk", "page-cache"] {
        for engine in ["io_uring", "threads", "auto"] {
            for ring in ["split", "packed"] {
                let name = format!("{place}/{engine}/{ring}");
                // A separate line for what was checked, or for an engine that this host does not have.
                let lines = stderr.lines().filter(|line| line.starts_with(&name));
                assert_eq!(lines.count(), 1, "{name}: {stderr}");
            }
        }
    }
    let left = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(left, 0, "images are removed");
}

#[test]
fn a_byte_changed_outside_the_device_is_found() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut program = Program::spawn(&mut verify(
        directory.path(),
        &["--rows=page-cache/threads", "--seconds=60"],
    ))
    .unwrap();
    let image = || -> Option<File> {
        let entry = fs::read_dir(directory.path()).ok()?.next()?.ok()?;
        let path = entry.path().join("disk.img");
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        // The file gets its size some time after its name.
        (file.metadata().ok()?.len() > 0).then_some(file)
    };
    let mut found = None;
    let wait = program.wait_until("make its image", PATIENCE, || {
        found = image();
        Ok(found.is_some())
    });
    wait.unwrap();
    let image = found.unwrap();
    let mut sectors = (0..).map(|step: u64| step * 7919 % 2048);
    let end = program.wait_until("find the difference", PATIENCE, || {
        // Repeatedly at other places, because later writes replace the change.
        let place = sectors.next().unwrap_or_default() * 512 + 300;
        let mut byte = [0];
        image.read_exact_at(&mut byte, place)?;
        image.write_all_at(&[byte[0] ^ 1], place)?;
        Ok(false)
    });
    assert!(end.is_err());
    let status = program.status().unwrap().expect("it has ended");
    let stderr = program.stderr();
    assert_eq!(status.code(), Some(1), "{stderr}");
    let loss = "what looks like write";
    assert!(
        stderr.contains(loss) && stderr.contains("up to byte 300"),
        "{stderr}"
    );
}

#[test]
fn each_row_of_the_console_device_moves_bytes_and_keys() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    let output = command.args(["console", "--quick"]).output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    for row in ["guest to", "to guest,", "key and echo"] {
        for port in ["socket", "terminal"] {
            let is_row = |line: &&str| line.contains(row) && line.contains(port);
            let line = stdout.lines().find(is_row);
            let line = line.unwrap_or_else(|| panic!("{row}, {port}: {stdout}"));
            assert!(!line.contains("| 0.00"), "{line}");
        }
    }
}

#[test]
fn an_impossible_run_is_reported_in_one_line() {
    for (arguments, what) in [
        (
            &["--verify", "--rows=nothing"][..],
            "bench: no place, engine and ring matches",
        ),
        (&["--from=/nowhere"], "bench: /nowhere: No such file"),
        (
            &["--summarize", "/dev/null"],
            "bench: /dev/null: not what this program writes",
        ),
    ] {
        let stderr = failed(&bench(arguments).output().unwrap());
        assert!(stderr.starts_with(what), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
