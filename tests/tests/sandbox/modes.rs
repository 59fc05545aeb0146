// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--sandbox`, unprivileged users, and kernels without all features.

#![allow(unsafe_code)]

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;

use rustix::pipe::fcntl_setpipe_size;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use vhost_device_tests::intruder::Outcome;
use vhost_device_tests::process::{PATIENCE, Program, Signal, inherit};

use crate::state::{assert_confined, statuses};
use crate::{Device, RNG, for_each_device, mode};

/// An unprivileged user.
const NOBODY: u32 = 65534;

fn log_names_what_on_would_stop_and_stops_nothing(device: &Device) {
    let mut scene = device.start_with(&|_, command| {
        command.arg(mode("log"));
    });
    let stderr = scene.running.program.stderr();
    assert!(!stderr.contains("would end"), "{stderr}");
    for thread in device.threads {
        let name = scene.name(thread);
        let mut intruder = scene.enter(thread);
        let arguments = [libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64];
        let outcome = intruder.call(libc::SYS_socket, &arguments).unwrap();
        let Outcome::Returned(socket @ 0..) = outcome else {
            panic!("{outcome:?}");
        };
        intruder.call(libc::SYS_close, &[socket as u64]).unwrap();
        drop(intruder);
        let line = format!(
            "warn: the sandbox would end this program: its thread {name} asked for the system call socket(0x1, 0x2,"
        );
        let program = &mut scene.running.program;
        let log = fs::File::open(format!("/proc/{}/fd/2", program.id())).unwrap();
        program
            .wait_until("name the call", PATIENCE, || {
                let mut text = vec![0; log.metadata()?.len() as usize];
                std::os::unix::fs::FileExt::read_exact_at(&log, &mut text, 0)?;
                Ok(String::from_utf8_lossy(&text).contains(&line))
            })
            .unwrap();
    }
    scene.assert_serves();
    let named = scene.running.program.stderr().matches("would end").count();
    assert_eq!(
        named,
        device.threads.len(),
        "{}",
        scene.running.program.stderr()
    );
}

fn off_restricts_nothing(device: &Device) {
    let mut scene = device.start_with(&|_, command| {
        command.arg(mode("off"));
    });
    for status in statuses(scene.running.program.id()) {
        assert_eq!(status["Seccomp"], "0", "{}", status["Name"]);
        assert_eq!(status["NoNewPrivs"], "0", "{}", status["Name"]);
        assert_ne!(u64::from_str_radix(&status["CapEff"], 16), Ok(0));
    }
    scene.assert_serves();
}

/// Makes the command run as an unprivileged user, who owns the files.
fn as_nobody(directory: &Path, command: &mut Command) {
    // That user may not be able to enter the directory of the program.
    let program = directory.join("program");
    // Copied by another process: a file that this one writes could be open in a child of another test, and could not be run.
    let mut copy = Command::new("cp");
    copy.arg(command.get_program()).arg(&program);
    assert!(copy.status().unwrap().success(), "{copy:?}");
    let mut copy = Command::new(&program);
    copy.args(command.get_args())
        .env_remove("RUST_LOG")
        .env("HOME", directory);
    *command = copy;
    for entry in fs::read_dir(directory).unwrap() {
        chown(entry.unwrap().path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    chown(directory, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    command.uid(NOBODY).gid(NOBODY);
}

fn a_user_without_privileges_has_the_sandbox_too(device: &Device) {
    for mode in [mode("on"), mode("log")] {
        let mut scene = device.start_with(&|directory, command| {
            as_nobody(directory, command);
            command.arg(&mode);
        });
        let program = &scene.running.program;
        let process = fs::metadata(format!("/proc/{}/fd", program.id())).unwrap();
        if mode == crate::mode("on") {
            assert_confined(program, false);
            assert_eq!(process.uid(), 0, "others of that user can look into it");
        }
        scene.assert_serves();
        let socket = scene.running.socket.clone();
        let status = scene.running.program.end(Signal::TERM, PATIENCE).unwrap();
        assert_eq!(status.code(), Some(0));
        assert!(!socket.exists(), "{}", scene.running.program.stderr());
    }
}

/// Creates a filter that simulates a kernel without these system calls.
fn without(calls: &[i64]) -> BpfProgram {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, architecture);
    filter.unwrap().try_into().unwrap()
}

/// Makes the program that `command` starts run under `filter`.
fn filtered(command: &mut Command, filter: BpfProgram) {
    let apply =
        move || apply_filter(&filter).map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL));
    // SAFETY: the closure makes two system calls, and allocates nothing.
    unsafe { command.pre_exec(apply) };
}

fn a_kernel_without_landlock_is_warned_of_once(device: &Device) {
    let mut scene = device.start_with(&|_, command| {
        filtered(command, without(&[libc::SYS_landlock_create_ruleset]));
    });
    assert_confined(&scene.running.program, true);
    scene.assert_serves();
    let stderr = scene.running.program.stderr();
    assert_eq!(stderr.matches("landlock").count(), 1, "{stderr}");
    assert_eq!(stderr.matches(": warn:").count(), 1, "{stderr}");
}

fn a_violation_ends_a_program_whose_log_nobody_reads(device: &Device) {
    for thread in device.threads {
        let (_reader, mut writer) = std::io::pipe().unwrap();
        fcntl_setpipe_size(&writer, 4096).unwrap();
        writer.write_all(&[b'\n'; 4096]).unwrap();
        let mut scene = device.start_with(&|_, command| {
            inherit(command, writer.try_clone().unwrap().into(), 2);
        });
        let mut intruder = scene.enter(thread);
        let outcome = intruder.call(libc::SYS_socket, &[1, 1]).unwrap();
        assert_eq!(outcome, Outcome::Trapped);
        drop(intruder);
        let status = scene.running.program.wait(PATIENCE).unwrap();
        assert_eq!(status.signal(), Some(libc::SIGSYS));
    }
}

for_each_device!(
    a_violation_ends_a_program_whose_log_nobody_reads,
    log_names_what_on_would_stop_and_stops_nothing,
    off_restricts_nothing,
    a_user_without_privileges_has_the_sandbox_too,
    a_kernel_without_landlock_is_warned_of_once,
);

#[test]
fn a_kernel_without_seccomp_is_refused_unless_the_sandbox_is_off() {
    if !RNG.is_possible() {
        return;
    }
    for mode in [mode("on"), mode("log")] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = vhost_device_tests::process::command("vhost-device-rng").unwrap();
        command.env_remove("RUST_LOG").arg(&mode);
        command.arg(vhost_device_tests::process::option("socket-path", &socket));
        filtered(&mut command, without(&[libc::SYS_seccomp]));
        let mut program = Program::spawn(&mut command).unwrap();
        assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
        let stderr = program.stderr();
        assert!(stderr.contains("--sandbox=off"), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(!socket.exists(), "no socket is left");
    }
    let mut scene = RNG.start_with(&|_, command| {
        command.arg(mode("off"));
        filtered(command, without(&[libc::SYS_seccomp]));
    });
    scene.assert_serves();
}
