// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on block devices for which the kernel has only an ioctl.

use std::fs::File;

use rustix::io::Result;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};
use vhost_device_common::device::Call;

const BLKROGET: Opcode = opcode::none(0x12, 94);
const BLKDISCARD: Opcode = opcode::none(0x12, 119);

/// Returns the system call of [`discard`].
pub fn discard_call() -> Call {
    Call::new(libc::SYS_ioctl).with(1, BLKDISCARD)
}

/// Returns the system calls that measure a block device, including [`is_read_only`].
pub fn measure_calls() -> [Call; 3] {
    const BLKSSZGET: Opcode = opcode::none(0x12, 104);
    const BLKPBSZGET: Opcode = opcode::none(0x12, 123);
    [BLKROGET, BLKSSZGET, BLKPBSZGET].map(|code| Call::new(libc::SYS_ioctl).with(1, code))
}

/// Discards a range of a block device, in bytes. May wait for the device.
pub fn discard(device: &File, offset: u64, length: u64) -> Result<()> {
    // SAFETY: BLKDISCARD reads two u64.
    unsafe { ioctl(device, Setter::<BLKDISCARD, _>::new([offset, length])) }
}

/// Returns whether a block device cannot be written, however it was opened.
///
/// # Errors
/// It is not a block device.
pub fn is_read_only(device: &File) -> Result<bool> {
    // SAFETY: BLKROGET writes an int.
    unsafe { ioctl(device, Getter::<BLKROGET, libc::c_int>::new()) }.map(|flag| flag != 0)
}
