// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares our back-ends with others. `bench block --help` lists the options.

use std::fmt::{self, Display};
use std::fs::File;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vhost_device_tests::arguments::refuse;
use vhost_device_tests::bench::block::chart;
use vhost_device_tests::bench::block::report::Report;
use vhost_device_tests::bench::block::summary::Summary;
use vhost_device_tests::bench::block::targets::Targets;
use vhost_device_tests::bench::block::{self, BlockOptions, verify};
use vhost_device_tests::bench::console::{self, ConsoleOptions};
use vhost_device_tests::bench::gpu::{self, GpuOptions};
use vhost_device_tests::bench::vsock::{self, VsockOptions};
use vhost_device_tests::bench::{BenchError, CommonOptions};

/// Compare our back-ends with others
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    device: Device,
}

#[derive(Debug, Subcommand)]
enum Device {
    /// Compare vhost-device-block with qemu-storage-daemon in three settings
    Block(BlockOptions),
    /// Compare vhost-device-console with rust-vmm's
    Console(ConsoleOptions),
    /// Compare vhost-device-gpu with QEMU's vhost-user-gpu, in 2D
    Gpu(GpuOptions),
    /// Compare vhost-device-vsock with rust-vmm's back-end of that name
    Vsock(VsockOptions),
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
    };
    let result = match arguments.device {
        Device::Block(options) => block(&options),
        Device::Console(options) => report(
            &options.common,
            || console::run(&options),
            console::report::Report::json,
        )
        .map(drop),
        Device::Gpu(options) => report(
            &options.common,
            || gpu::run(&options),
            gpu::report::Report::json,
        )
        .map(drop),
        Device::Vsock(options) => report(
            &options.common,
            || vsock::run(&options),
            vsock::report::Report::json,
        )
        .map(drop),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn block(options: &BlockOptions) -> Result<(), Box<dyn std::error::Error>> {
    if options.verify {
        println!("{}", verify::run(options)?);
        return Ok(());
    }
    if !options.summarize.is_empty() {
        print!("{}", Summary::read(&options.summarize)?);
        return Ok(());
    }
    let svg = options.svg.as_ref().map(File::create).transpose()?;
    let run = || {
        let report = match &options.from {
            Some(file) => Report::read(file)?,
            None => block::run(options)?,
        };
        Ok(WithTargets(report, options.targets))
    };
    let WithTargets(report, _) =
        report(&options.common, run, |WithTargets(report, _)| report.json())?;
    match svg {
        Some(file) => chart::draw(&report, file),
        None => Ok(()),
    }
}

/// Prints a report, and the targets on request.
struct WithTargets(Report, bool);

impl Display for WithTargets {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let WithTargets(report, wanted) = self;
        report.fmt(f)?;
        match wanted {
            true => Targets(report).fmt(f),
            false => Ok(()),
        }
    }
}

fn report<R: Display>(
    options: &CommonOptions,
    run: impl FnOnce() -> Result<R, BenchError>,
    json: fn(&R) -> serde_json::Value,
) -> Result<R, Box<dyn std::error::Error>> {
    // Opened first, so that a report that cannot be written is noticed before the measurements.
    let file = options.json.as_ref().map(File::create).transpose()?;
    let report = run()?;
    print!("{report}");
    if let Some(file) = file {
        serde_json::to_writer_pretty(file, &json(&report))?;
    }
    Ok(report)
}
