// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an open evdev node can be asked, and told, by ioctl: the one place of this crate that is
//! unsafe. Numbers and layouts are those of Linux' `input.h`.

use std::ffi::{c_int, c_void};
use std::os::fd::BorrowedFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{Direction, IntegerSetter, Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};
use vhost_device_common::device::Call;

use crate::event::{
    ABS_MT_FIRST, ABS_MT_LAST, ABS_MT_SLOT, EV_ABS, EV_FF, EV_KEY, EV_LED, EV_MSC, EV_REL, EV_REP,
    EV_SND, EV_SW, EV_SYN, Event,
};
use crate::identity::{Axis, Bitmap, Identity, Ids};
use crate::state::State;

const EVDEV: u8 = b'E';

// Numbers of ioctls.
const EVIOCGVERSION: u8 = 0x01;
const EVIOCGID: u8 = 0x02;
const EVIOCGNAME: u8 = 0x06;
const EVIOCGUNIQ: u8 = 0x08;
const EVIOCGPROP: u8 = 0x09;
const EVIOCGMTSLOTS: u8 = 0x0a;
const EVIOCGKEY: u8 = 0x18;
const EVIOCGSW: u8 = 0x1b;
/// And a number for each event type.
const EVIOCGBIT: u8 = 0x20;
/// And a number for each axis.
const EVIOCGABS: u8 = 0x40;
const EVIOCGRAB: Opcode = opcode::write::<c_int>(EVDEV, 0x90);
const EVIOCSMASK: Opcode = opcode::write::<InputMask>(EVDEV, 0x93);

/// Direction and group in the number of an ioctl.
const DIRECTION_AND_TYPE: u64 = 0xc000_ff00;
/// Those that evdev answers.
const READ_EVDEV: u64 = 0x8000_0000 | (EVDEV as u64) << 8;

/// Enough for all strings and bitmaps that a guest can be told of; the largest bitmap is that of the
/// keys, with 96 bytes.
const BUFFER: usize = 256;
/// Most slots that the kernel gives a device.
const MAX_SLOTS: usize = 1024;
/// REP_DELAY and REP_PERIOD: the kernel has them for each device that repeats, and no bitmap of them.
const REP_BITS: u8 = 0b11;

/// `struct input_mask`: which codes of an event type this reader wants.
#[repr(C)]
struct InputMask {
    kind: u32,
    codes_size: u32,
    codes: u64,
}

/// An ioctl of evdev that fills a buffer, from its front.
struct ReadIoctl<'a> {
    number: u8,
    buffer: &'a mut [u8],
}

// SAFETY: `opcode` tells the kernel the length of the buffer that `as_ptr` points to, and the buffer is
// borrowed for as long as the ioctl lasts.
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

/// Has the kernel fill `buffer`. Gives the bytes written, where this ioctl says so.
fn read_ioctl(node: BorrowedFd<'_>, number: u8, buffer: &mut [u8]) -> Result<usize> {
    let request = ReadIoctl { number, buffer };
    // SAFETY: all ioctls of evdev with this direction write at most as many bytes as their opcode says,
    // and so does what other drivers may have behind the same opcode.
    unsafe { ioctl(node, request) }
}

/// As many bytes as the kernel has for this.
fn bytes(node: BorrowedFd<'_>, number: u8) -> Result<Vec<u8>> {
    let mut buffer = vec![0; BUFFER];
    let written = read_ioctl(node, number, &mut buffer)?;
    buffer.truncate(written);
    Ok(buffer)
}

fn string(node: BorrowedFd<'_>, number: u8) -> Result<Vec<u8>> {
    let mut string = match bytes(node, number) {
        // It has none.
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

/// The numbers of a structure that has only these.
fn numbers<const N: usize>(node: BorrowedFd<'_>, number: u8) -> Result<[i32; N]> {
    let mut buffer = vec![0; N * size_of::<i32>()];
    read_ioctl(node, number, &mut buffer)?;
    let mut numbers = [0; N];
    for (number, bytes) in numbers.iter_mut().zip(buffer.as_chunks().0) {
        *number = i32::from_ne_bytes(*bytes);
    }
    Ok(numbers)
}

/// The number of the ioctl for an event type or an axis, of which there are fewer than 64.
fn indexed(base: u8, index: u16) -> u8 {
    base | (index as u8 & 0x3f)
}

/// `struct input_absinfo`: the value of an axis, then what the axis is.
fn absinfo(node: BorrowedFd<'_>, code: u16) -> Result<(i32, Axis)> {
    let [value, minimum, maximum, fuzz, flat, resolution] =
        numbers(node, indexed(EVIOCGABS, code))?;
    let axis = Axis {
        minimum,
        maximum,
        fuzz,
        flat,
        resolution,
    };
    Ok((value, axis))
}

/// The ioctls that are made here.
pub fn calls() -> [Call; 3] {
    let ioctl = Call::new(libc::SYS_ioctl);
    [
        ioctl.with_bits(1, DIRECTION_AND_TYPE, READ_EVDEV),
        ioctl.with(1, EVIOCGRAB),
        ioctl.with(1, EVIOCSMASK),
    ]
}

/// What the device is.
///
/// # Errors
/// `node` is no evdev node (ENOTTY or EINVAL), or its device is gone.
pub fn identity(node: BorrowedFd<'_>) -> Result<Identity> {
    numbers::<1>(node, EVIOCGVERSION)?;
    let [bus, vendor, product, version] = numbers::<2>(node, EVIOCGID)?
        .map(i32::to_ne_bytes)
        .map(|[a, b, c, d]| [[a, b], [c, d]].map(u16::from_ne_bytes))
        .as_flattened()
        .try_into()
        .unwrap_or_default();
    let mut identity = Identity {
        name: string(node, EVIOCGNAME)?,
        serial: string(node, EVIOCGUNIQ)?,
        ids: Ids {
            bus,
            vendor,
            product,
            version,
        },
        properties: bitmap(node, EVIOCGPROP)?,
        ..Identity::default()
    };
    // The bitmap of type 0 is that of the types.
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
            identity.axes.insert(code, absinfo(node, code)?.1);
        }
    }
    Ok(identity)
}

/// How the device's keys, switches, axes and touches are now. Events on keys and switches that were not
/// read yet are contained in it, and not to be read any more.
///
/// # Errors
/// The device is gone.
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
            state.apply(Event::new(EV_ABS, code, absinfo(node, code)?.0));
        }
    }
    if let Some(slots) = identity.axes.get(&ABS_MT_SLOT) {
        let count = usize::try_from(slots.maximum)
            .unwrap_or(0)
            .saturating_add(1);
        for &code in identity
            .axes
            .range(ABS_MT_FIRST..=ABS_MT_LAST)
            .map(|(code, _)| code)
        {
            for (slot, value) in (0..).zip(slot_values(node, code, count)?) {
                state.apply(Event::new(EV_ABS, ABS_MT_SLOT, slot));
                state.apply(Event::new(EV_ABS, code, value));
            }
        }
        let (slot, _) = absinfo(node, ABS_MT_SLOT)?;
        state.apply(Event::new(EV_ABS, ABS_MT_SLOT, slot));
    }
    Ok(state)
}

/// The values of an axis that each slot has.
fn slot_values(node: BorrowedFd<'_>, code: u16, count: usize) -> Result<Vec<i32>> {
    // The code comes first, and stays.
    let mut buffer = i32::from(code).to_ne_bytes().to_vec();
    buffer.resize((1 + count.min(MAX_SLOTS)) * size_of::<i32>(), 0);
    read_ioctl(node, EVIOCGMTSLOTS, &mut buffer)?;
    let (words, _) = buffer.as_chunks();
    let values = words.iter().skip(1);
    Ok(values.map(|word| i32::from_ne_bytes(*word)).collect())
}

/// Whether any key is down.
///
/// # Errors
/// The device is gone.
pub fn has_key_down(node: BorrowedFd<'_>) -> Result<bool> {
    Ok(bitmap(node, EVIOCGKEY)?.iter().next().is_some())
}

/// Takes the device away from all others who read it, until the node is closed.
///
/// # Errors
/// Somebody else has done that (EBUSY), or the device is gone.
pub fn grab(node: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: EVIOCGRAB takes an integer: 1 to grab.
    unsafe { ioctl(node, IntegerSetter::<EVIOCGRAB>::new_usize(1)) }
}

/// Has only events of these types to be read from the node. Lights and sounds that are set come back
/// otherwise, and may take the place of keys.
///
/// # Errors
/// The kernel cannot do that (before Linux 4.4), or the device is gone.
pub fn select_types(node: BorrowedFd<'_>, kinds: &[u16]) -> Result<()> {
    // The codes of type 0 are the types.
    let codes: u64 = kinds
        .iter()
        .fold(0, |codes, kind| codes | 1 << (kind & 0x1f));
    let mask = InputMask {
        kind: EV_SYN.into(),
        codes_size: size_of_val(&codes) as u32,
        codes: (&raw const codes).expose_provenance() as u64,
    };
    // SAFETY: EVIOCSMASK takes a `struct input_mask` and reads `codes_size` bytes at its `codes`, which
    // outlive the call.
    unsafe { ioctl(node, Setter::<EVIOCSMASK, InputMask>::new(mask)) }
}
