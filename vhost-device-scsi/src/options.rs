// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command line options of the SCSI device.

use std::path::PathBuf;

use clap::{Args, Parser};
use vhost_device_storage::options::{DiskOptions, IoEngine};

use crate::address::MAX_LUNS;

/// The longest serial number, in bytes.
const SERIAL_LENGTH: usize = 36;
/// The rotation rate of `rotational=on`: that of most disks.
const ROTATES: u16 = 7200;

/// Options of the SCSI device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A disk: file=PATH, then any of target=N, lun=N, read-only, serial=STRING, wwn=NUMBER, rotational=on|off|RPM, removable,
    /// reservations=PATH, logical-block-size=BYTES, physical-block-size=BYTES, direct, discard=unmap|ignore, iops=N, bps=SIZE, iops-burst=N
    /// and bps-burst=SIZE, separated by commas. Can be repeated.
    ///
    /// A comma in a value is written twice. /dev/fd/N is the inherited file descriptor N. Without target, the disk is lun 0 of the first
    /// free target. Disks can also be added on the control socket.
    #[arg(long = "disk", value_name = "file=PATH[,KEY=VALUE…]", value_parser = disk)]
    pub disks: Vec<DiskArguments>,

    /// A SCSI device of the host that the guest uses itself: /dev/sgN, or a disk or drive; then any of target=N, lun=N and read-only,
    /// separated by commas. Can be repeated.
    ///
    /// Commands that could change the firmware of the device or destroy it are refused.
    #[arg(long, value_name = "PATH[,KEY=VALUE…]", value_parser = passthrough)]
    pub passthrough: Vec<PassThroughArguments>,

    /// Start as the destination of a live migration, while another program has the images. Each is locked when the guest begins to use it.
    #[arg(long)]
    pub incoming: bool,

    /// Most request queues that a front-end may use, 1 to 64. There are two more queues, for control and for events.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub num_queues: u16,

    /// Most descriptors of a queue: a power of two, 2 to 32768.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    pub queue_size: u16,

    /// How to read and write images.
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = IoEngine::Auto)]
    pub io_engine: IoEngine,
}

/// A disk, as `--disk` and the command `add-disk` describe it.
#[derive(Clone, Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
pub struct DiskArguments {
    /// Raw image file or block device.
    #[arg(long)]
    pub file: Option<PathBuf>,

    /// Number of the target.
    #[arg(long)]
    pub target: Option<u8>,

    /// Number of the logical unit.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..i64::from(MAX_LUNS)))]
    pub lun: u16,

    /// Serial number.
    #[arg(long, value_parser = serial)]
    pub serial: Option<String>,

    /// NAA designator.
    #[arg(long, value_parser = wwn)]
    pub wwn: Option<u64>,

    /// Rotation rate, as VPD page B1 has it.
    #[arg(long, value_parser = rotation)]
    pub rotational: Option<u16>,

    /// The medium can be removed.
    #[arg(long)]
    pub removable: bool,

    /// File in which persistent reservations survive a restart.
    #[arg(long)]
    pub reservations: Option<PathBuf>,

    #[command(flatten)]
    pub disk: DiskOptions,
}

/// A device of the host, as `--passthrough` describes it.
#[derive(Clone, Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
pub struct PassThroughArguments {
    /// Node of the device.
    #[arg(skip)]
    pub path: PathBuf,

    /// Number of the target.
    #[arg(long)]
    pub target: Option<u8>,

    /// Number of the logical unit.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..i64::from(MAX_LUNS)))]
    pub lun: u16,

    /// Open it only for reading.
    #[arg(long)]
    pub read_only: bool,
}

/// Parses the description of a device of the host, which begins with its path.
fn passthrough(text: &str) -> Result<PassThroughArguments, String> {
    let parts = parts(text);
    let Some((path, keys)) = parts.split_first() else {
        return Err("names no device; give /dev/sgN".to_owned());
    };
    let mut arguments: PassThroughArguments = parse(keys)?;
    arguments.path = path.into();
    Ok(arguments)
}

/// Parses keys with values.
fn parse<T: Parser>(parts: &[String]) -> Result<T, String> {
    let parts = parts.iter().map(|part| format!("--{part}"));
    T::try_parse_from(parts).map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        line.trim_start_matches("error: ").replace("--", "")
    })
}

/// Parses the description of a disk that has a file.
fn disk(text: &str) -> Result<DiskArguments, String> {
    let arguments = DiskArguments::parse_text(text)?;
    match &arguments.file {
        Some(_) => Ok(arguments),
        None => Err("names no image; add file=PATH".to_owned()),
    }
}

impl DiskArguments {
    /// Parses the description of a disk: keys and values, separated by commas.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn parse_text(text: &str) -> Result<Self, String> {
        parse(&parts(text))
    }
}

/// Splits a text at its commas. Two commas stand for one.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let is_end = character == ',' && characters.next_if_eq(&',').is_none();
        match parts.last_mut() {
            Some(part) if !is_end => part.push(character),
            _ => parts.push(String::new()),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn serial(text: &str) -> Result<String, String> {
    let is_printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    match text.len() {
        1..=SERIAL_LENGTH if is_printable => Ok(text.to_owned()),
        _ => Err(format!(
            "give 1 to {SERIAL_LENGTH} printable ASCII characters"
        )),
    }
}

fn wwn(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    number
        .filter(|number| matches!(number >> 60, 3 | 5))
        .ok_or_else(|| {
            "give 16 hexadecimal digits after 0x, of which the first is 3 or 5".to_owned()
        })
}

fn rotation(text: &str) -> Result<u16, String> {
    match text {
        "on" => Ok(ROTATES),
        "off" => Ok(1),
        _ => text
            .parse()
            .ok()
            .filter(|rate| (0x401..=0xfffe).contains(rate))
            .ok_or_else(|| "give on, off, or revolutions per minute from 1025 to 65534".to_owned()),
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|size: &u16| size.is_power_of_two() && (2..=32768).contains(size))
        .ok_or_else(|| "must be a power of two from 2 to 32768".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_described_by_keys_and_values() {
        let text = "file=a,,b.img,target=3,lun=16383,read-only,serial=S 1,wwn=0x5000c50012345678,rotational=off,removable,iops=100";
        let disk = disk(text).unwrap();
        assert_eq!(disk.file, Some(PathBuf::from("a,b.img")));
        assert_eq!((disk.target, disk.lun), (Some(3), 16383));
        assert_eq!(disk.serial.as_deref(), Some("S 1"));
        assert_eq!(disk.wwn, Some(0x5000_c500_1234_5678));
        assert_eq!(disk.rotational, Some(1));
        assert!(disk.removable && disk.disk.read_only);
        assert_eq!(disk.disk.iops, Some(100));
    }

    #[test]
    fn a_device_of_the_host_is_described_by_its_path_and_keys() {
        let device = passthrough("/dev/sg0,target=2,lun=1,read-only").unwrap();
        assert_eq!(device.path, PathBuf::from("/dev/sg0"));
        assert_eq!((device.target, device.lun), (Some(2), 1));
        assert!(device.read_only);
        assert!(!passthrough("/dev/sr0").unwrap().read_only);
        for text in ["", "/dev/sg0,serial=S", "/dev/sg0,lun=16384"] {
            assert!(passthrough(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_wrong_description_is_refused_in_one_line() {
        for (text, word) in [
            ("target=1", "file=PATH"),
            ("file=a,target=256", "target"),
            ("file=a,lun=16384", "lun"),
            ("file=a,wwn=0x1234", "hexadecimal"),
            ("file=a,serial=", "serial"),
            ("file=a,rotational=1024", "revolutions"),
            ("file=a,colour=red", "colour"),
            ("file=a,file=b", "file"),
            ("help", "help"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
