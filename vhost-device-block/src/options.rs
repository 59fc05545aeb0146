// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command line options of the block device.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Args;
use vhost_device_storage::image::Source;
use vhost_device_storage::options::{DiskOptions, IoEngine};

/// Length of the answer to GET_ID, in bytes (VIRTIO 1.3, 5.2.6).
pub const SERIAL_LENGTH: usize = 20;

/// Options of the block device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Raw image file or block device that the guest sees as its disk.
    ///
    /// /dev/fd/N is the inherited file descriptor N, as with --blk-fd.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "blk_fd",
        conflicts_with = "blk_fd"
    )]
    pub blk_file: Option<PathBuf>,

    /// Inherited file descriptor of the image, instead of --blk-file. Needs no path and no permissions.
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub blk_fd: Option<RawFd>,

    /// Start as the destination of a live migration, while another program has the image. It is locked when the guest begins to use it.
    #[arg(long)]
    pub incoming: bool,

    /// Serial number that the guest sees, at most 20 bytes. Default: made of the numbers of the image's device and inode.
    #[arg(long, value_name = "STRING", value_parser = serial)]
    pub serial: Option<String>,

    /// Most queues that a front-end may use, 1 to 256.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub num_queues: u16,

    /// Most descriptors of a queue: a power of two, 2 to 32768.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// How to read and write the image.
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = IoEngine::Auto)]
    pub io_engine: IoEngine,

    #[command(flatten)]
    pub disk: DiskOptions,
}

impl Options {
    /// Returns the image. Exactly one of the options names it.
    pub fn source(&self) -> Source {
        match self.blk_fd {
            Some(number) => Source::Inherited(number, format!("--blk-fd={number}")),
            None => Source::path(self.blk_file.clone().unwrap_or_default(), "--blk-file"),
        }
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_LENGTH {
        return Err(format!(
            "has {} bytes; give at most {SERIAL_LENGTH}",
            text.len()
        ));
    }
    Ok(text.to_owned())
}

fn queue_size(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|size: &u16| size.is_power_of_two() && (2..=32768).contains(size))
        .ok_or_else(|| "must be a power of two from 2 to 32768".to_owned())
}
