// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An evdev node, read by a program.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::codes::{ABS_MT_SLOT, EV_KEY, FF_RUMBLE};
use super::event::Event;

/// Returns the number of an ioctl, composed like `_IOC` does.
pub(super) const fn ioctl_number(direction: u32, group: u8, number: u8, size: usize) -> u64 {
    (direction << 30 | (size as u32) << 16 | (group as u32) << 8 | number as u32) as u64
}

pub(super) const NONE: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const READ: u32 = 2;

/// Calls an ioctl with `bytes` as its argument, and returns the result.
pub(super) fn ioctl(file: RawFd, number: u64, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the size in `number` is at most the length of `bytes`; without a size nothing is touched.
    let result = unsafe { libc::ioctl(file, number, bytes.as_mut_ptr()) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Calls an ioctl whose argument is a number.
pub(super) fn ioctl_value(file: RawFd, number: u64, value: usize) -> io::Result<()> {
    // SAFETY: the kernel takes the argument as a number.
    match unsafe { libc::ioctl(file, number, value) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

const EVIOCGVERSION: u8 = 0x01;

/// The range and state of an axis (`struct input_absinfo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// Current value.
    pub value: i32,
    /// Minimum, maximum, fuzz, flat, resolution, in the order of VIRTIO.
    pub range: [i32; 5],
}

/// An open node.
#[derive(Debug)]
pub struct Node(File);

impl Node {
    /// Opens a node. Later events can be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let node = Node(file);
        node.get(EVIOCGVERSION, 4)?;
        Ok(node)
    }

    /// Returns the bytes that the ioctl `_IOR('E', number, size)` returns.
    pub fn get(&self, number: u8, size: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size];
        let number = ioctl_number(READ, b'E', number, size);
        let written = ioctl(self.0.as_raw_fd(), number, &mut bytes)?;
        // Ioctls that fill all bytes return 0.
        bytes.truncate(if written == 0 { size } else { written });
        Ok(bytes)
    }

    fn numbers(&self, number: u8, count: usize) -> io::Result<Vec<i32>> {
        let bytes = self.get(number, 4 * count)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|word| i32::from_ne_bytes(*word)).collect())
    }

    /// Returns the name (EVIOCGNAME).
    pub fn name(&self) -> io::Result<String> {
        let mut bytes = self.get(0x06, 256)?;
        bytes.retain(|byte| *byte != 0);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Returns bus, vendor, product and version (EVIOCGID), as the kernel stores them.
    pub fn ids(&self) -> io::Result<Vec<u8>> {
        self.get(0x02, 8)
    }

    /// Returns the properties (EVIOCGPROP).
    pub fn properties(&self) -> io::Result<Vec<u16>> {
        Ok(bits(&self.get(0x09, 8)?))
    }

    /// Returns the codes of an event type; of type 0, the types (EVIOCGBIT).
    pub fn codes(&self, kind: u16) -> io::Result<Vec<u16>> {
        Ok(bits(&self.get(0x20 + kind as u8, 96)?))
    }

    /// Returns an axis (EVIOCGABS).
    pub fn axis(&self, code: u16) -> io::Result<Value> {
        let numbers = self.numbers(0x40 + code as u8, 6)?;
        let (value, range) = numbers.split_first().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Value {
            value: *value,
            range: range.try_into().map_err(|_| io::ErrorKind::UnexpectedEof)?,
        })
    }

    /// Returns the value that each slot has for an axis (EVIOCGMTSLOTS).
    pub fn slots(&self, code: u16) -> io::Result<Vec<i32>> {
        let [_, maximum, ..] = self.axis(ABS_MT_SLOT)?.range;
        let mut bytes = vec![0; 4 * (2 + maximum as usize)];
        bytes[..4].copy_from_slice(&u32::from(code).to_ne_bytes());
        let number = ioctl_number(READ, b'E', 0x0a, bytes.len());
        ioctl(self.0.as_raw_fd(), number, &mut bytes)?;
        let (words, _) = bytes[4..].as_chunks();
        Ok(words.iter().map(|word| i32::from_ne_bytes(*word)).collect())
    }

    /// Returns the keys that are down (EVIOCGKEY).
    pub fn keys(&self) -> io::Result<Vec<u16>> {
        Ok(bits(&self.get(0x18, 96)?))
    }

    /// Returns the lights that are on (EVIOCGLED).
    pub fn lights(&self) -> io::Result<Vec<u16>> {
        Ok(bits(&self.get(0x19, 8)?))
    }

    /// Returns the sounds that are on (EVIOCGSND).
    pub fn sounds(&self) -> io::Result<Vec<u16>> {
        Ok(bits(&self.get(0x1a, 8)?))
    }

    /// Returns the switches that are on (EVIOCGSW).
    pub fn switches(&self) -> io::Result<Vec<u16>> {
        Ok(bits(&self.get(0x1b, 8)?))
    }

    /// Returns delay and period of repeated keys, in milliseconds (EVIOCGREP).
    pub fn repetition(&self) -> io::Result<Vec<i32>> {
        self.numbers(0x03, 2)
    }

    /// Grabs the device, or releases it (EVIOCGRAB).
    pub fn grab(&self, grab: bool) -> io::Result<()> {
        let number = ioctl_number(WRITE, b'E', 0x90, size_of::<libc::c_int>());
        ioctl_value(self.0.as_raw_fd(), number, grab.into())
    }

    /// Uploads a force-feedback effect, a rumble of half a second, and returns its number (EVIOCSFF).
    pub fn upload_rumble(&self) -> io::Result<u16> {
        let mut effect = [0; size_of::<libc::ff_effect>()];
        // Type, number (-1: a new one), direction, trigger (2), length and delay; then the strengths of both motors.
        let words = [FF_RUMBLE, u16::MAX, 0, 0, 0, 500, 0, 0, 0x8000, 0x4000];
        for (place, word) in effect.chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let number = ioctl_number(WRITE, b'E', 0x80, effect.len());
        ioctl(self.0.as_raw_fd(), number, &mut effect)?;
        Ok(u16::from_ne_bytes([effect[2], effect[3]]))
    }

    /// Reads all available events.
    pub fn read(&self) -> io::Result<Vec<Event>> {
        read_events(&self.0)
    }

    /// Returns whether a key is repeated in the available events.
    pub fn repeats(&self) -> io::Result<bool> {
        let events = self.read()?;
        Ok(events
            .iter()
            .any(|event| event.kind == EV_KEY && event.value == 2))
    }
}

/// Reads all events that are available in a file.
pub(super) fn read_events(mut file: &File) -> io::Result<Vec<Event>> {
    let mut events = Vec::new();
    let mut buffer = [0; 64 * Event::HOST_SIZE];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(events),
            Ok(length) => events.extend(Event::from_host(&buffer[..length])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(events),
            Err(error) => return Err(error),
        }
    }
}

/// Returns the numbers of the bits that are set.
pub fn bits(bytes: &[u8]) -> Vec<u16> {
    (0..8 * bytes.len())
        .filter(|bit| bytes[bit / 8] & 1 << (bit % 8) != 0)
        .map(|bit| bit as u16)
        .collect()
}
