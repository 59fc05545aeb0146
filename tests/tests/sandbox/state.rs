// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the process according to the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;

use vhost_device_tests::process::{PATIENCE, Program, inherit};

use crate::{Device, GPU, for_each_device, mode};

/// Returns the fields of the status of each thread.
pub fn statuses(process: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let status = |task: std::io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let fields = text.lines().filter_map(|line| line.split_once(":\t"));
        fields
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect()
    };
    tasks.map(status).collect()
}

/// Asserts that all threads have dropped the privileges that they do not need.
#[track_caller]
pub fn assert_confined(program: &Program, had_privileges: bool) {
    for status in statuses(program.id()) {
        let name = &status["Name"];
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        assert_eq!(status["Seccomp"], "2", "{name}");
        let mut sets = vec!["CapInh", "CapPrm", "CapEff", "CapAmb"];
        // Only a privileged process can drop others permanently; no_new_privs does that too.
        sets.extend(had_privileges.then_some("CapBnd"));
        for set in sets {
            assert_eq!(
                u64::from_str_radix(&status[set], 16),
                Ok(0),
                "{set} of {name}"
            );
        }
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", program.id())).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let values: Vec<_> = core.unwrap().split_whitespace().skip(4).take(2).collect();
    assert_eq!(values, ["0", "0"]);
}

fn all_threads_are_confined(device: &Device) {
    let mut scene = device.start();
    assert_confined(&scene.running.program, true);
    let id = scene.running.program.id();
    let names: Vec<_> = device
        .threads
        .iter()
        .map(|thread| scene.name(thread))
        .collect();
    // Each kind of thread has one more filter than the thread that started it. Threads may have just started.
    let all_have_filters = || {
        let statuses = statuses(id);
        let filters = |name: &String| {
            let status = statuses.iter().find(|status| status["Name"] == *name)?;
            // Kernels before 5.9 do not report this.
            let filters = status.get("Seccomp_filters").map_or("", String::as_str);
            Some(filters.parse().unwrap_or(u32::MAX))
        };
        let counts: Option<Vec<u32>> = names.iter().map(filters).collect();
        Ok(counts.is_some_and(|counts| {
            let of_session = counts[0];
            counts[1..]
                .iter()
                .all(|count| *count > of_session || of_session == u32::MAX)
        }))
    };
    let program = &mut scene.running.program;
    program
        .wait_until("confine all of its threads", PATIENCE, all_have_filters)
        .unwrap();
    assert_confined(program, true);
}

fn the_process_is_confined_before_it_accepts_a_connection(device: &Device) {
    let running = device.target.start();
    assert_confined(&running.program, true);
}

for_each_device!(
    all_threads_are_confined,
    the_process_is_confined_before_it_accepts_a_connection
);

#[test]
fn a_passed_connection_is_served_in_the_sandbox() {
    if !GPU.is_possible() {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = vhost_device_tests::process::command("vhost-device-rng").unwrap();
    command.arg("--fd=300").arg(mode("on"));
    inherit(&mut command, theirs.into(), 300);
    // It exists before the program.
    let request: [u32; 3] = [1, 1, 0];
    std::io::Write::write_all(&mut &ours, &request.map(u32::to_ne_bytes).concat()).unwrap();
    let program = Program::spawn(&mut command).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    std::io::Read::read_exact(&mut &ours, &mut [0; 20]).unwrap();
    assert_confined(&program, true);
}
