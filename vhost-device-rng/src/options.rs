// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the entropy device.

use std::path::PathBuf;

use clap::Args;

/// Options of the entropy device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Read from this file, character device or FIFO instead of the kernel's getrandom.
    #[arg(long, value_name = "PATH")]
    pub rng_source: Option<PathBuf>,

    /// Limit the bytes that the guest gets in each --period. Unlimited by default.
    #[arg(long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_bytes: u64,

    /// Length of a period for --max-bytes, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 65536, value_parser = clap::value_parser!(u32).range(1..))]
    pub period: u32,
}
