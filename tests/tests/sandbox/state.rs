// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel says of the process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;

use vhost_device_tests::process::{Program, inherit};

use crate::{Device, GPU, for_each_device, mode};

/// The fields of the status of each thread.
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

/// All threads have given up what they have no use for.
#[track_caller]
pub fn assert_confined(program: &Program, had_privileges: bool) {
    for status in statuses(program.id()) {
        let name = &status["Name"];
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        assert_eq!(status["Seccomp"], "2", "{name}");
        let mut sets = vec!["CapInh", "CapPrm", "CapEff", "CapAmb"];
        // Only who has privileges can drop others for good; no_new_privs does that too.
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
    let scene = device.start();
    assert_confined(&scene.running.program, true);
    let statuses = statuses(scene.running.program.id());
    let names: Vec<_> = statuses
        .iter()
        .map(|status| status["Name"].as_str())
        .collect();
    for thread in device.threads {
        assert!(
            names.contains(&&*scene.name(thread)),
            "{thread} in {names:?}"
        );
    }
    // Each kind of thread has a filter of its own beside that of the one that started it.
    let filters = |name: &str| {
        let status = statuses.iter().find(|status| status["Name"] == name)?;
        status.get("Seccomp_filters")?.parse::<u32>().ok()
    };
    if let Some(of_session) = filters(&scene.name("")) {
        for thread in &device.threads[1..] {
            assert!(filters(thread).unwrap() > of_session, "{thread}");
        }
    }
}

fn who_can_connect_finds_the_process_confined(device: &Device) {
    let running = device.target.start();
    assert_confined(&running.program, true);
}

for_each_device!(
    all_threads_are_confined,
    who_can_connect_finds_the_process_confined
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
    // It is there before the program is.
    let request: [u32; 3] = [1, 1, 0];
    std::io::Write::write_all(&mut &ours, &request.map(u32::to_ne_bytes).concat()).unwrap();
    let program = Program::spawn(&mut command).unwrap();
    ours.set_read_timeout(Some(vhost_device_tests::process::PATIENCE))
        .unwrap();
    std::io::Read::read_exact(&mut &ours, &mut [0; 20]).unwrap();
    assert_confined(&program, true);
}
