// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask test`: runs every check in stages.

mod checks;
mod jobs;
mod report;
mod stages;
mod suites;

use std::num::NonZeroU32;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Args;
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::libvirt;

use self::report::Report;
use self::stages::Stages;
use self::suites::Suites;
use crate::fuzz;
use crate::packages::{
    self, DISPLAY, GUEST, IMAGES, INSTALLED, LIBVIRT, PACKAGING, SOUND, THREE_D, USER_MODE_LINUX,
};
use crate::progress::Progress;
use crate::workspace::{cargo, target_directory};

/// How long each fuzz target runs, in seconds, without and with `--long`.
const FUZZ_SECONDS: NonZeroU32 = NonZeroU32::new(20).unwrap();
const FUZZ_LONG: NonZeroU32 = NonZeroU32::new(300).unwrap();

#[derive(Args, Clone, Copy, Debug)]
pub struct Options {
    /// Do not boot guests in QEMU or User-Mode Linux, and install nothing
    #[arg(long)]
    no_guest: bool,

    /// Kill, migrate, verify and fuzz many more times; takes hours
    #[arg(long)]
    long: bool,
}

pub fn run(progress: &Progress, options: Options) -> Result<ExitCode, String> {
    if !options.no_guest {
        prepare(progress)?;
    }
    let in_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
    let mut stages = Stages::new(progress, in_ci);
    checks::run(&mut stages);
    suites(&mut stages, options);
    fuzz(&mut stages, options);
    Ok(match stages.close() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Installs and downloads what guests need.
fn prepare(progress: &Progress) -> Result<(), String> {
    packages::install(
        progress,
        &[
            GUEST,
            DISPLAY,
            IMAGES,
            PACKAGING,
            INSTALLED,
            USER_MODE_LINUX,
        ]
        .concat(),
    )?;
    // Separately, because the backports of QEMU would bring a newer Mesa and libvirt than the release.
    packages::install(progress, THREE_D)?;
    packages::install(progress, SOUND)?;
    // The tests of libvirt are skipped if it cannot run.
    if libvirt::obstacle().is_none() {
        packages::install(progress, LIBVIRT)?;
    }
    packages::kernel(progress, Flavour::Cloud)?;
    packages::kernel(progress, Flavour::Plain)?;
    packages::guest_agent(progress)?;
    packages::user_mode_linux(progress)
}

/// Builds and runs all tests.
fn suites(stages: &mut Stages, options: Options) {
    let mut suites = None;
    stages.run("build", |progress| {
        match Suites::build(progress, options.long) {
            Ok(built) => {
                suites = Some(built);
                Report::passed()
            }
            Err(message) => {
                eprintln!("{message}");
                Report::failed("build")
            }
        }
    });
    let Some(suites) = suites else { return };
    stages.jobs("tests", suites.jobs());
    stages.run("examples", |progress| {
        let examples = jobs::command(cargo(["test", "--workspace", "--doc"]), "examples");
        jobs::run(progress, vec![examples])
    });
    if options.no_guest {
        stages.run("guests", |_| Report {
            skipped: suites.without_guests(),
            ..Report::default()
        });
        return;
    }
    // Builds the release binaries, installs our package if it can, and removes it.
    stages.jobs("installation", suites.installation());
    let user_mode_linux = target_directory().join("debug/user-mode-linux");
    stages.check("User-Mode Linux", &mut Command::new(&user_mode_linux));
    guests(stages, &suites, &user_mode_linux);
}

fn guests(stages: &mut Stages, suites: &Suites, user_mode_linux: &Path) {
    stages.run("guests", |progress| match suites.guests(user_mode_linux) {
        Ok(jobs) => jobs::run(progress, jobs),
        Err(message) => Report::failed(message),
    });
}

/// Runs each fuzz target for a short time. Each counts as one check.
fn fuzz(stages: &mut Stages, options: Options) {
    let seconds = if options.long {
        FUZZ_LONG
    } else {
        FUZZ_SECONDS
    };
    stages.run("fuzz", |progress| {
        let outcomes = match fuzz::test(progress, seconds) {
            Ok(outcomes) => outcomes,
            Err(message) => {
                eprintln!("{message}");
                return Report::failed("the fuzz targets cannot be run");
            }
        };
        let mut sum = Report::default();
        for outcome in outcomes {
            sum.add(outcome.finding.map_or_else(Report::passed, Report::failed));
        }
        sum
    });
}
