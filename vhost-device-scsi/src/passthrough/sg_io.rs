// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctl SG_IO, by which a SCSI device of the host carries out a command (version 3 of its interface).

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use rustix::ioctl::{Getter, Opcode, Updater, ioctl};
use vhost_device_common::device::Call;

/// These numbers are older than the scheme for numbers of ioctls.
const SG_IO: Opcode = 0x2285;
const SG_GET_VERSION_NUM: Opcode = 0x2282;
const BLKSECTGET: Opcode = 0x1267;
/// The first version with this interface.
const VERSION: i32 = 30000;
/// Identifies the interface: 'S'.
const INTERFACE: i32 = b'S' as i32;
/// Directions of data.
const NONE: i32 = -1;
const TO_DEVICE: i32 = -2;
const FROM_DEVICE: i32 = -3;
/// How long a command may take: formatting a tape takes hours, but nothing that the filter lets through does.
const TIMEOUT: Duration = Duration::from_secs(600);
/// The most parts of the data (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;
/// The most bytes of sense data.
pub const SENSE_SIZE: usize = 252;

/// `struct sg_io_hdr`.
#[repr(C)]
struct Header {
    interface_id: i32,
    dxfer_direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *const c_void,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Header>() == 88);

/// The direction of the data of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToDevice,
    FromDevice,
}

/// What a command came to.
#[derive(Debug)]
pub struct Outcome {
    /// The status of the command.
    pub status: u8,
    /// What the host's adapter says.
    pub host_status: u16,
    /// Sense data.
    pub sense: Vec<u8>,
    /// Bytes of the data that were not moved.
    pub residual: u64,
}

/// Returns the system call that [`execute`] makes.
pub fn call() -> Call {
    Call::new(libc::SYS_ioctl).with(1, SG_IO)
}

/// Returns whether a file is a SCSI device with this interface.
pub fn is_supported(device: &File) -> bool {
    // SAFETY: SG_GET_VERSION_NUM writes an int.
    let version = unsafe { ioctl(device, Getter::<SG_GET_VERSION_NUM, i32>::new()) };
    version.is_ok_and(|version| version >= VERSION)
}

/// Returns the most bytes that the host moves for one command; `None` if it does not say.
pub fn max_bytes(device: &File) -> Option<u64> {
    let is_block = device.metadata().ok()?.file_type().is_block_device();
    let mut limit = [0_u16; 2];
    // SAFETY: BLKSECTGET writes an int for /dev/sgN, and an unsigned short for a block device.
    unsafe { ioctl(device, Updater::<BLKSECTGET, _>::new(&mut limit)) }.ok()?;
    let [sectors, _] = limit;
    let bytes = match is_block {
        true => u64::from(sectors) * 512,
        false => {
            let [one, two] = limit.map(u16::to_ne_bytes);
            u32::from_ne_bytes([one[0], one[1], two[0], two[1]]).into()
        }
    };
    (bytes > 0).then_some(bytes)
}

/// Has a device carry out a command, and waits for it. `data` has `length` bytes at least, in memory that stays mapped.
///
/// # Errors
/// The host does not take the command.
pub fn execute(
    device: &File,
    cdb: &[u8],
    direction: Direction,
    data: &[libc::iovec],
    length: u64,
) -> io::Result<Outcome> {
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let length = u32::try_from(length).map_err(too_large)?;
    if data.len() > MAX_PARTS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut sense = [0; SENSE_SIZE];
    let mut header = Header {
        interface_id: INTERFACE,
        dxfer_direction: match (length, direction) {
            (0, _) => NONE,
            (_, Direction::ToDevice) => TO_DEVICE,
            (_, Direction::FromDevice) => FROM_DEVICE,
        },
        cmd_len: u8::try_from(cdb.len()).map_err(too_large)?,
        mx_sb_len: SENSE_SIZE as u8,
        iovec_count: if length == 0 { 0 } else { data.len() as u16 },
        dxfer_len: length,
        dxferp: data.as_ptr().cast(),
        cmdp: cdb.as_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout: TIMEOUT.as_millis() as u32,
        flags: 0,
        pack_id: 0,
        usr_ptr: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header has the layout that SG_IO reads and writes. It points to a CDB and to room for sense data of the lengths that it
    // names, and to as many parts of memory that stays mapped as it says; the kernel moves no more than `dxfer_len` bytes of them.
    unsafe { ioctl(device, Updater::<SG_IO, _>::new(&mut header)) }?;
    let written = usize::from(header.sb_len_wr).min(SENSE_SIZE);
    Ok(Outcome {
        status: header.status,
        host_status: header.host_status,
        sense: sense.get(..written).unwrap_or_default().to_vec(),
        residual: u64::try_from(header.resid).unwrap_or(0).min(length.into()),
    })
}
