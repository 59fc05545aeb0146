// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the block device.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use vhost_device_common::program::size;

/// Length of the string that GET_ID answers with (VIRTIO 1.3, 5.2.6).
pub const SERIAL_LENGTH: usize = 20;

/// How the image is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoEngine {
    /// io_uring where the host allows it, threads elsewhere; images in memory (tmpfs) are read and
    /// written at once, without either
    Auto,
    /// io_uring: one ring per processor or queue, whichever are fewer, and 16 at most
    #[value(name = "io_uring")]
    IoUring,
    /// a pool of threads per queue
    Threads,
}

/// How to handle discard requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// give storage back to the host
    Unmap,
    /// ignore them
    Ignore,
}

/// Options of the block device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Raw image file or block device that the guest sees as its disk.
    ///
    /// /dev/fd/N is the file that was inherited under the number N, as with --blk-fd.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "blk_fd",
        conflicts_with = "blk_fd"
    )]
    pub blk_file: Option<PathBuf>,

    /// The same, as a file that was opened before and is inherited as file descriptor FDNUM. It needs no permissions, and no name.
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub blk_fd: Option<RawFd>,

    /// Refuse all writes; the guest sees a read-only disk.
    #[arg(long)]
    pub read_only: bool,

    /// Start as the destination of a live migration: while another program has the image, which is locked when the guest begins to use it.
    #[arg(long)]
    pub incoming: bool,

    /// Serial number that the guest sees, of 20 bytes at most. By default made of the numbers of the image's device and inode.
    #[arg(long, value_name = "STRING", value_parser = serial)]
    pub serial: Option<String>,

    /// Queues that a front-end may use, 1 to 256.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub num_queues: u16,

    /// Descriptors that a queue may have: a power of two, 2 to 32768.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// Size of a logical block in bytes: 512 or 4096. The image is cut down to whole blocks.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = logical_block_size)]
    pub logical_block_size: u32,

    /// Size of a physical block in bytes, which the guest aligns to: a power of two, 512 to 65536. By default that of the device, or of
    /// the file system's blocks, but no more than 4096 then.
    #[arg(long, value_name = "BYTES", value_parser = physical_block_size)]
    pub physical_block_size: Option<u32>,

    /// Bypass the host's page cache (O_DIRECT).
    #[arg(long)]
    pub direct: bool,

    /// How the image is read and written.
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = IoEngine::Auto)]
    pub io_engine: IoEngine,

    /// How to handle discard requests.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Discard::Unmap)]
    pub discard: Discard,

    /// Most requests in a second, of all queues together: reads, writes, discards and write-zeroes. Flushes go without.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub iops: Option<u64>,

    /// Most bytes read and written in a second, of all queues together: bytes, or a number with K, M or G.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub bps: Option<u64>,

    /// Requests that may go at once after a pause. By default as many as --iops allows in a tenth of a second; never less than in
    /// a hundredth, or than one.
    #[arg(long, value_name = "N", requires = "iops", value_parser = clap::value_parser!(u64).range(1..))]
    pub iops_burst: Option<u64>,

    /// Bytes that may go at once after a pause. By default as many as --bps allows in a tenth of a second, and never less than in
    /// a hundredth. A larger request goes too, and those after it wait the longer.
    #[arg(long, value_name = "SIZE", requires = "bps", value_parser = size)]
    pub bps_burst: Option<u64>,
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_LENGTH {
        return Err(format!(
            "has {} bytes; at most {SERIAL_LENGTH} are possible",
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

fn physical_block_size(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|size: &u32| size.is_power_of_two() && (512..=65536).contains(size))
        .ok_or_else(|| "must be a power of two from 512 to 65536".to_owned())
}

fn logical_block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("must be 512 or 4096".to_owned()),
    }
}
