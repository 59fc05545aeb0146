// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compares our back-ends with others, side by side. `bench block --help` lists the options.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vhost_device_tests::bench::{self, BlockOptions};

/// Compare our back-ends with others, side by side
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    device: Device,
}

#[derive(Debug, Subcommand)]
enum Device {
    /// vhost-device-block with qemu-storage-daemon in three settings
    Block(BlockOptions),
}

fn main() -> ExitCode {
    let Device::Block(options) = Arguments::parse().device;
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &BlockOptions) -> Result<(), Box<dyn std::error::Error>> {
    // A report that can not be written is better known before the measurements.
    let json = options
        .json
        .as_ref()
        .map(std::fs::File::create)
        .transpose()?;
    let report = bench::block(options)?;
    print!("{report}");
    if let Some(file) = json {
        serde_json::to_writer_pretty(file, &report.json())?;
    }
    Ok(())
}
