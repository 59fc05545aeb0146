// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of an evdev node: the only module of this crate with unsafe code. Numbers and layouts are those in Linux'
//! `input.h`.

use std::ffi::{c_int, c_void};
use std::os::fd::BorrowedFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{Direction, IntegerSetter, Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};
use vhost_device_common::device::Call;
use zerocopy::{FromBytes, IntoBytes};

use crate::event::{
    ABS_MT_FIRST, ABS_MT_LAST, ABS_MT_SLOT, EV_ABS, EV_FF, EV_KEY, EV_LED, EV_MSC, EV_REL, EV_REP,
    EV_SND, EV_SW, EV_SYN, Event,
};
use crate::identity::{Axis, Bitmap, Identity};
use crate::state::State;

const EVDEV: u8 = b'E';

// Ioctl numbers.
const EVIOCGVERSION: u8 = 0x01;
const EVIOCGID: u8 = 0x02;
const EVIOCGNAME: u8 = 0x06;
const EVIOCGUNIQ: u8 = 0x08;
const EVIOCGPROP: u8 = 0x09;
const EVIOCGMTSLOTS: u8 = 0x0a;
const EVIOCGKEY: u8 = 0x18;
const EVIOCGSW: u8 = 0x1b;
/// Plus the event type.
const EVIOCGBIT: u8 = 0x20;
/// Plus the axis.
const EVIOCGABS: u8 = 0x40;
const EVIOCGRAB: Opcode = opcode::write::<c_int>(EVDEV, 0x90);
const EVIOCSMASK: Opcode = opcode::write::<InputMask>(EVDEV, 0x93);

/// Direction and type bits of an ioctl number.
const DIRECTION_AND_TYPE: u64 = 0xc000_ff00;
/// The ioctls that read from an evdev node.
const READ_EVDEV: u64 = 0x8000_0000 | (EVDEV as u64) << 8;

/// Size in bytes of a buffer for any string or bitmap that the guest can read. The largest bitmap is that of the keys,
/// with 96 bytes.
const BUFFER: usize = 256;
/// Most slots of a device in Linux.
const MAX_SLOTS: usize = 1024;
/// REP_DELAY and REP_PERIOD. All devices with EV_REP have both, and the kernel has no bitmap of them.
const REP_BITS: u8 = 0b11;

/// `struct input_mask`: the codes of an event type that this reader receives.
#[repr(C)]
struct InputMask {
    kind: u32,
    codes_size: u32,
    codes: u64,
}

/// `struct input_absinfo`: the value and properties of an axis.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct AbsInfo {
    value: i32,
    axis: Axis,
}

/// An ioctl of evdev that fills a buffer from its start.
struct ReadIoctl<'a> {
    number: u8,
    buffer: &'a mut [u8],
}

// SAFETY: `opcode` contains the length of the buffer that `as_ptr` points to, and the buffer is borrowed during the
// ioctl.
unsafe impl Ioctl for ReadIoctl<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::from_components(Direction::Read, EVDEV, self.number, self.buffer.len())
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.buffer.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(written: IoctlOutput, _: *mut c_void) -> Result<usize> {
        Ok(usize::try_from(written).unwrap_or(0))
    }
}

/// Makes the kernel fill `buffer`. Returns the number of bytes written, if the ioctl reports it.
fn read_ioctl(node: BorrowedFd<'_>, number: u8, buffer: &mut [u8]) -> Result<usize> {
    let request = ReadIoctl { number, buffer };
    // SAFETY: ioctls of evdev in this direction write at most the number of bytes in their opcode, and so do those of
    // other drivers with the same opcode.
    unsafe { ioctl(node, request) }
}

/// Reads as many bytes as the kernel returns, up to [`BUFFER`].
fn bytes(node: BorrowedFd<'_>, number: u8) -> Result<Vec<u8>> {
    let mut buffer = vec![0; BUFFER];
    let written = read_ioctl(node, number, &mut buffer)?;
    buffer.truncate(written);
    Ok(buffer)
}

fn string(node: BorrowedFd<'_>, number: u8) -> Result<Vec<u8>> {
    let mut string = match bytes(node, number) {
        // The device does not have this string.
        Err(Errno::NOENT) => Vec::new(),
        result => result?,
    };
    let length = string.iter().position(|&byte| byte == 0);
    string.truncate(length.unwrap_or(string.len()));
    Ok(string)
}

fn bitmap(node: BorrowedFd<'_>, number: u8) -> Result<Bitmap> {
    bytes(node, number).map(Bitmap::new)
}

/// Reads a structure.
fn structure<T: FromBytes + IntoBytes>(node: BorrowedFd<'_>, number: u8) -> Result<T> {
    let mut structure = T::new_zeroed();
    read_ioctl(node, number, structure.as_mut_bytes())?;
    Ok(structure)
}

/// Returns the number of the ioctl for an event type or an axis. There are fewer than 64 of each.
fn indexed(base: u8, index: u16) -> u8 {
    base | (index as u8 & 0x3f)
}

/// Reads the value and properties of an axis.
fn absinfo(node: BorrowedFd<'_>, code: u16) -> Result<AbsInfo> {
    structure(node, indexed(EVIOCGABS, code))
}

/// Returns the ioctls of this module.
pub fn calls() -> [Call; 3] {
    let ioctl = Call::new(libc::SYS_ioctl);
    [
        ioctl.with_bits(1, DIRECTION_AND_TYPE, READ_EVDEV),
        ioctl.with(1, EVIOCGRAB),
        ioctl.with(1, EVIOCSMASK),
    ]
}

/// Reads the identity of the device.
///
/// # Errors
/// `node` is not an evdev node (ENOTTY or EINVAL), or the device has disappeared.
pub fn identity(node: BorrowedFd<'_>) -> Result<Identity> {
    structure::<c_int>(node, EVIOCGVERSION)?;
    let mut identity = Identity {
        name: string(node, EVIOCGNAME)?,
        serial: string(node, EVIOCGUNIQ)?,
        ids: structure(node, EVIOCGID)?,
        properties: bitmap(node, EVIOCGPROP)?,
        ..Identity::default()
    };
    // The bitmap of type 0 contains the event types.
    let kinds = bitmap(node, indexed(EVIOCGBIT, EV_SYN))?;
    for kind in [EV_KEY, EV_REL, EV_ABS, EV_MSC, EV_SW, EV_LED, EV_SND, EV_FF] {
        if kinds.has(kind) {
            let codes = bitmap(node, indexed(EVIOCGBIT, kind))?;
            identity.codes.insert(kind, codes);
        }
    }
    if kinds.has(EV_REP) {
        let codes = Bitmap::new(vec![REP_BITS]);
        identity.codes.insert(EV_REP, codes);
    }
    if let Some(axes) = identity.codes.get(&EV_ABS) {
        for code in axes.iter() {
            identity.axes.insert(code, absinfo(node, code)?.axis);
        }
    }
    Ok(identity)
}

/// Reads the current state of keys, switches, axes and touches. It contains the pending events of keys and switches,
/// which must be discarded.
///
/// # Errors
/// The device has disappeared.
pub fn state(node: BorrowedFd<'_>, identity: &Identity) -> Result<State> {
    let mut state = State::default();
    for (kind, number) in [(EV_KEY, EVIOCGKEY), (EV_SW, EVIOCGSW)] {
        if identity.codes.contains_key(&kind) {
            for code in bitmap(node, number)?.iter() {
                state.apply(Event::new(kind, code, 1));
            }
        }
    }
    for &code in identity.axes.keys() {
        if !(ABS_MT_SLOT..=ABS_MT_LAST).contains(&code) {
            state.apply(Event::new(EV_ABS, code, absinfo(node, code)?.value));
        }
    }
    if let Some(slots) = identity.axes.get(&ABS_MT_SLOT) {
        let count = usize::try_from(slots.maximum)
            .unwrap_or(0)
            .saturating_add(1);
        for (&code, _) in identity.axes.range(ABS_MT_FIRST..=ABS_MT_LAST) {
            for (slot, value) in (0..).zip(slot_values(node, code, count)?) {
                state.apply(Event::new(EV_ABS, ABS_MT_SLOT, slot));
                state.apply(Event::new(EV_ABS, code, value));
            }
        }
        let slot = absinfo(node, ABS_MT_SLOT)?.value;
        state.apply(Event::new(EV_ABS, ABS_MT_SLOT, slot));
    }
    Ok(state)
}

/// Reads the values of an axis in all slots.
fn slot_values(node: BorrowedFd<'_>, code: u16, count: usize) -> Result<Vec<i32>> {
    // The first element is the axis code; the kernel keeps it.
    let mut values = vec![i32::from(code)];
    values.resize(1 + count.min(MAX_SLOTS), 0);
    read_ioctl(node, EVIOCGMTSLOTS, values.as_mut_bytes())?;
    Ok(values.split_off(1))
}

/// Returns whether any key is held.
///
/// # Errors
/// The device has disappeared.
pub fn has_key_down(node: BorrowedFd<'_>) -> Result<bool> {
    Ok(bitmap(node, EVIOCGKEY)?.iter().next().is_some())
}

/// Grabs the device: no other reader receives its events until the node is closed.
///
/// # Errors
/// Another reader has grabbed it (EBUSY), or the device has disappeared.
pub fn grab(node: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the argument of EVIOCGRAB is an integer: 1 to grab.
    unsafe { ioctl(node, IntegerSetter::<EVIOCGRAB>::new_usize(1)) }
}

/// Restricts the events that this reader receives to these types. Otherwise it would also receive the settings of LEDs
/// and sounds, which could displace key events from the kernel's buffer.
///
/// # Errors
/// The kernel does not support this (before Linux 4.4), or the device has disappeared.
pub fn select_types(node: BorrowedFd<'_>, kinds: &[u16]) -> Result<()> {
    // The codes of type 0 are the event types.
    let codes: u64 = kinds
        .iter()
        .fold(0, |codes, kind| codes | 1 << (kind & 0x1f));
    let mask = InputMask {
        kind: EV_SYN.into(),
        codes_size: size_of_val(&codes) as u32,
        codes: (&raw const codes).expose_provenance() as u64,
    };
    // SAFETY: EVIOCSMASK takes a `struct input_mask` and reads `codes_size` bytes at `codes`, which outlives the call.
    unsafe { ioctl(node, Setter::<EVIOCSMASK, InputMask>::new(mask)) }
}
