// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options that every disk has, whatever device shows it to the guest.

use clap::{Args, ValueEnum};
use vhost_device_common::program::size;

/// How to read and write images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoEngine {
    /// io_uring if the host allows it, otherwise threads; images in memory (tmpfs) are read and written in
    /// place, without either
    Auto,
    /// io_uring: one ring per processor or per queue, whichever are fewer, at most 16
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

/// How a disk uses its image. A device with one disk flattens these into its own options; a device with several can parse them from the
/// parts of an option that is repeated.
#[derive(Args, Clone, Debug)]
pub struct DiskOptions {
    /// Refuse all writes; the guest sees a read-only disk.
    #[arg(long)]
    pub read_only: bool,

    /// Size of a logical block in bytes: 512 or 4096. The disk has as many whole blocks as the image.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = logical_block_size)]
    pub logical_block_size: u32,

    /// Size of a physical block in bytes, to which the guest aligns: a power of two, 512 to 65536. Default: that of the block device, or of
    /// the file system, then at most 4096.
    #[arg(long, value_name = "BYTES", value_parser = physical_block_size)]
    pub physical_block_size: Option<u32>,

    /// Bypass the host's page cache (O_DIRECT).
    #[arg(long)]
    pub direct: bool,

    /// How to handle discard requests.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Discard::Unmap)]
    pub discard: Discard,

    /// Most requests per second, of all queues together: reads, writes, discards and write-zeroes. Flushes do not count.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub iops: Option<u64>,

    /// Most bytes read and written per second, of all queues together. Accepts the suffixes K, M and G.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub bps: Option<u64>,

    /// Requests that may start at once after a pause. Default: as many as --iops allows in a tenth of a second. At least as many as it
    /// allows in a hundredth, and one.
    #[arg(long, value_name = "N", requires = "iops", value_parser = clap::value_parser!(u64).range(1..))]
    pub iops_burst: Option<u64>,

    /// Bytes that may be moved at once after a pause. Default: as many as --bps allows in a tenth of a second. At least as many as it
    /// allows in a hundredth. A larger request starts too, and those after it wait longer.
    #[arg(long, value_name = "SIZE", requires = "bps", value_parser = size)]
    pub bps_burst: Option<u64>,
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    /// One disk of several: `--disk file=PATH,read-only,iops=100`.
    #[derive(Debug, Parser)]
    #[command(no_binary_name = true)]
    struct Part {
        #[arg(long)]
        file: String,
        #[command(flatten)]
        options: DiskOptions,
    }

    fn parse(text: &str) -> Result<Part, clap::Error> {
        Part::try_parse_from(text.split(',').map(|part| format!("--{part}")))
    }

    #[test]
    fn a_device_with_several_disks_can_parse_the_options_of_each() {
        let Part { file, options } =
            parse("file=disk.img,read-only,logical-block-size=4096,bps=1M").unwrap();
        assert_eq!(file, "disk.img");
        assert!(options.read_only && !options.direct);
        assert_eq!(options.logical_block_size, 4096);
        assert_eq!((options.iops, options.bps), (None, Some(1 << 20)));
        assert!(parse("file=disk.img,logical-block-size=1024").is_err());
        assert!(parse("file=disk.img,iops-burst=1").is_err());
    }
}
