// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the input device.

use std::path::PathBuf;

use clap::Args;

/// Options of the input device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Pass this input device of the host to the guest: an evdev node /dev/input/event*, or a link to one such as
    /// /dev/input/by-id/*.
    #[arg(long, value_name = "PATH")]
    pub evdev_path: PathBuf,

    /// Do not grab the device: the host receives its events too.
    #[arg(long)]
    pub no_grab: bool,
}
