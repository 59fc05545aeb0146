// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask soak`: runs the soak program on release binaries. A host without uinput runs the part for input in User-Mode Linux.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;

use vhost_device_tests::soak::{self, SoakOptions};

use crate::bench;
use crate::packages::{self, USER_MODE_LINUX};
use crate::progress::Progress;
use crate::workspace::target_directory;

/// Additional time for User-Mode Linux, in seconds: it boots, and finishes all work on one processor.
const MARGIN: u64 = 300;

pub fn run(progress: &Progress, options: &SoakOptions) -> Result<ExitCode, String> {
    let options = &SoakOptions {
        seed: Some(options.first_random_number()),
        ..options.clone()
    };
    bench::build(progress)?;
    let elsewhere = match options.wants_input() && !soak::input::is_possible() {
        true => in_user_mode_linux(progress, options),
        false => None,
    };
    let here = match elsewhere.is_some() && options.wants_only_input() {
        true => true,
        false => bench::program("soak", &options.arguments())? == ExitCode::SUCCESS,
    };
    let there = elsewhere.is_none_or(|run| run.join().unwrap_or(false));
    Ok(match here && there {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Starts the part for input in User-Mode Linux. The thread returns whether nothing was lost. Returns None if it cannot start.
fn in_user_mode_linux(
    progress: &Progress,
    options: &SoakOptions,
) -> Option<thread::JoinHandle<bool>> {
    let start = || -> Result<Child, String> {
        packages::install(progress, USER_MODE_LINUX)?;
        packages::user_mode_linux(progress)?;
        let programs = target_directory().join("release");
        let machine = programs.join("user-mode-linux");
        progress.run("User-Mode Linux", &mut Command::new(&machine))?;
        let options = SoakOptions {
            only: vec!["input".to_owned()],
            ..options.clone()
        };
        Command::new(&machine)
            .arg(format!(
                "--deadline={}",
                options.duration().as_secs() + MARGIN
            ))
            .arg(programs.join("soak"))
            .args(options.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", machine.display()))
    };
    let mut child = match start() {
        Ok(child) => child,
        Err(error) => {
            println!("soak: input is skipped: {error}");
            return None;
        }
    };
    let stdout = child.stdout.take();
    Some(thread::spawn(move || {
        for line in stdout.into_iter().flat_map(|it| BufReader::new(it).lines()) {
            println!("UML  {}", line.unwrap_or_default());
        }
        child.wait().is_ok_and(|status| status.success())
    }))
}
