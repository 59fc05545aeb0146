// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs all devices for a long time, under load and with faults. The exit status is 1 if anything was lost.

use std::process::ExitCode;

use clap::Parser;
use vhost_device_tests::arguments::refuse;
use vhost_device_tests::soak::{self, SoakOptions};

/// Run all devices under load, inject faults, and check that nothing is lost
#[derive(Debug, Parser)]
#[command(name = "soak")]
struct Arguments {
    #[command(flatten)]
    options: SoakOptions,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    match soak::run(&arguments.options) {
        Ok(report) => {
            print!("{report}");
            ExitCode::from(u8::from(report.lost() > 0))
        }
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}
