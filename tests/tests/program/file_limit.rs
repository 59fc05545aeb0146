// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limit of open files: the program uses the maximum, and names the limit when it is reached.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{PATIENCE, Program, inherit};

use crate::{BLOCK, Binary, Setup, for_each_program, read_request};

#[allow(unsafe_code)]
fn limited(command: &mut Command, soft: u64, hard: u64) -> &mut Command {
    let limit = Rlimit {
        current: Some(soft),
        maximum: Some(hard),
    };
    let set = move || Ok(setrlimit(Resource::Nofile, limit)?);
    // SAFETY: the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(set) }
}

fn the_soft_limit_becomes_the_hard_one(binary: &Binary) {
    let setup = Setup::new(binary);
    let program =
        Program::serve(limited(&mut setup.listening(), 32, 4000), &setup.socket()).unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", program.id())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<_> = files.unwrap().split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers, ["4000", "4000"]);
}

for_each_program!(the_soft_limit_becomes_the_hard_one);

/// Starts queues until one fails, and returns how many work.
fn start_queues(front_end: &FrontEnd, queues: usize) -> usize {
    let mut started = Vec::new();
    for index in 0..queues {
        let Ok(mut queue) = front_end.queue(index, 16) else {
            break;
        };
        queue.submit(&read_request(front_end, 512));
        if !queue.wait_used(PATIENCE) {
            break;
        }
        started.push(queue);
    }
    started.len()
}

#[test]
fn queues_beyond_a_low_soft_limit_work() {
    let setup = Setup::new(&BLOCK);
    let mut command = setup.listening();
    command.arg("--num-queues=16");
    let program = Program::serve(limited(&mut command, 32, 4000), &setup.socket()).unwrap();
    let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
    assert_eq!(start_queues(&front_end, 16), 16, "{}", program.stderr());
}

#[test]
fn a_queue_that_gets_no_files_names_the_limit() {
    for hard in 28..40 {
        let setup = Setup::new(&BLOCK);
        let mut command = setup.listening();
        inherit(
            &mut command,
            File::create(setup.path("log")).unwrap().into(),
            2,
        );
        let mut program =
            Program::serve(limited(&mut command, hard, hard), &setup.socket()).unwrap();
        let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
        assert!(start_queues(&front_end, 16) < 16);
        let log = setup.path("log");
        program
            .wait_until("name the limit", PATIENCE, || {
                let log = fs::read_to_string(&log)?;
                Ok(log.contains("RLIMIT_NOFILE") && log.contains("LimitNOFILE="))
            })
            .unwrap();
    }
}
