// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that a program creates (Linux, `Documentation/input/uinput.rst`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::codes::{EV_ABS, EV_FF, EV_KEY, EV_LED, EV_MSC, EV_REL, EV_REP, EV_SND, EV_SW};
use super::event::Event;
use super::node::{NONE, READ, WRITE, ioctl, ioctl_number, ioctl_value, read_events};

/// The device file of uinput.
const UINPUT: &str = "/dev/uinput";

const GROUP: u8 = b'U';
const UI_DEV_CREATE: u8 = 1;
const UI_DEV_SETUP: u8 = 3;
const UI_ABS_SETUP: u8 = 4;
const UI_GET_SYSNAME: u8 = 44;
const UI_SET_EVBIT: u8 = 100;
/// UI_SET_KEYBIT, and so on to UI_SET_FFBIT.
const UI_SET_BITS: &[(u16, u8)] = &[
    (EV_KEY, 101),
    (EV_REL, 102),
    (EV_ABS, 103),
    (EV_MSC, 104),
    (EV_LED, 105),
    (EV_SND, 106),
    (EV_FF, 107),
    (EV_SW, 109),
];
const UI_SET_PROPBIT: u8 = 110;
const UI_BEGIN_FF_UPLOAD: u8 = 200;
const UI_END_FF_UPLOAD: u8 = 201;
const UI_BEGIN_FF_ERASE: u8 = 202;
const UI_END_FF_ERASE: u8 = 203;

/// A request of the kernel: upload or erase an effect.
const EV_UINPUT: u16 = 0x0101;
const UI_FF_UPLOAD: u16 = 1;
const UI_FF_ERASE: u16 = 2;

/// An axis (`struct input_absinfo`, without the value).
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// `ABS_*`
    pub code: u16,
    /// Minimum.
    pub minimum: i32,
    /// Maximum.
    pub maximum: i32,
    /// Smaller changes are noise.
    pub fuzz: i32,
    /// Values nearer to the middle count as the middle.
    pub flat: i32,
    /// Units a millimetre, or a radian.
    pub resolution: i32,
}

/// Description of a device.
#[derive(Clone, Debug)]
pub struct Description {
    /// Its name.
    pub name: &'static str,
    /// Bus, vendor, product, version.
    pub ids: [u16; 4],
    /// `INPUT_PROP_*`
    pub properties: &'static [u16],
    /// Codes by event type, except those of axes.
    pub codes: &'static [(u16, RangeInclusive<u16>)],
    /// Axes.
    pub axes: &'static [Axis],
    /// Whether the kernel repeats keys that are held.
    pub repeats: bool,
    /// Number of force-feedback effects it holds.
    pub effects: u32,
}

impl Description {
    /// A device without capabilities.
    pub const NOTHING: Description = Description {
        name: "",
        ids: [0; 4],
        properties: &[],
        codes: &[],
        axes: &[],
        repeats: false,
        effects: 0,
    };
}

/// A device that exists until this is dropped.
#[derive(Debug)]
pub struct Device {
    uinput: File,
    node: PathBuf,
}

impl Device {
    /// Creates a device.
    pub fn create(description: &Description) -> io::Result<Self> {
        let uinput = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(UINPUT)
            .map_err(|error| {
                let hint = "the host's kernel may not have it, User-Mode Linux has: see tests/tests/uml_input";
                io::Error::new(error.kind(), format!("{UINPUT}: {error}; {hint}"))
            })?;
        let set = |number, value: u16| {
            let number = ioctl_number(WRITE, GROUP, number, size_of::<libc::c_int>());
            ioctl_value(uinput.as_raw_fd(), number, value.into())
        };
        for property in description.properties {
            set(UI_SET_PROPBIT, *property)?;
        }
        for (kind, codes) in description.codes {
            set(UI_SET_EVBIT, *kind)?;
            for code in codes.clone() {
                set(set_bit(*kind), code)?;
            }
        }
        if description.repeats {
            set(UI_SET_EVBIT, EV_REP)?;
        }
        for axis in description.axes {
            set(UI_SET_EVBIT, EV_ABS)?;
            set(set_bit(EV_ABS), axis.code)?;
            // `struct uinput_abs_setup`: a code, two bytes of nothing, `struct input_absinfo`.
            let mut bytes = u32::from(axis.code).to_le_bytes().to_vec();
            let Axis {
                code: _,
                minimum,
                maximum,
                fuzz,
                flat,
                resolution,
            } = *axis;
            for number in [0, minimum, maximum, fuzz, flat, resolution] {
                bytes.extend(number.to_le_bytes());
            }
            let number = ioctl_number(WRITE, GROUP, UI_ABS_SETUP, bytes.len());
            ioctl(uinput.as_raw_fd(), number, &mut bytes)?;
        }
        // `struct uinput_setup`: the numbers, the name, the count of effects.
        let mut bytes = description.ids.map(u16::to_le_bytes).concat();
        bytes.extend(description.name.as_bytes());
        bytes.resize(8 + libc::UINPUT_MAX_NAME_SIZE, 0);
        bytes.extend(description.effects.to_le_bytes());
        let number = ioctl_number(WRITE, GROUP, UI_DEV_SETUP, bytes.len());
        ioctl(uinput.as_raw_fd(), number, &mut bytes)?;
        ioctl_value(
            uinput.as_raw_fd(),
            ioctl_number(NONE, GROUP, UI_DEV_CREATE, 0),
            0,
        )?;
        let node = find_node(&uinput)?;
        Ok(Device { uinput, node })
    }

    /// Returns its node, like `/dev/input/event3`.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Emits the events of one report, and ends the report.
    pub fn report(&self, events: &[Event]) -> io::Result<()> {
        let mut bytes: Vec<u8> = events.iter().flat_map(|event| event.to_host()).collect();
        bytes.extend(Event::REPORT.to_host());
        (&self.uinput).write_all(&bytes)
    }

    /// Returns what programs have set on the device since the last call: lights, sounds, effects. Accepts effects that programs
    /// upload or erase meanwhile.
    pub fn received(&self) -> io::Result<Vec<Event>> {
        let mut events = read_events(&self.uinput)?;
        for event in &events {
            match (event.kind, event.code) {
                (EV_UINPUT, UI_FF_UPLOAD) => {
                    // The effect, and the one that it replaces.
                    let size = 8 + 2 * size_of::<libc::ff_effect>();
                    self.agree(event.value, UI_BEGIN_FF_UPLOAD, UI_END_FF_UPLOAD, size)?;
                }
                (EV_UINPUT, UI_FF_ERASE) => {
                    self.agree(event.value, UI_BEGIN_FF_ERASE, UI_END_FF_ERASE, 12)?;
                }
                _ => (),
            }
        }
        events.retain(|event| event.kind != EV_UINPUT);
        Ok(events)
    }

    /// Acknowledges a request of the kernel. The structure of each begins with the number of the request and the result.
    fn agree(&self, request: i32, begin: u8, end: u8, size: usize) -> io::Result<()> {
        let mut bytes = vec![0; size];
        bytes[..4].copy_from_slice(&request.to_le_bytes());
        let begin = ioctl_number(READ | WRITE, GROUP, begin, size);
        ioctl(self.uinput.as_raw_fd(), begin, &mut bytes)?;
        bytes[4..8].fill(0);
        let end = ioctl_number(WRITE, GROUP, end, size);
        ioctl(self.uinput.as_raw_fd(), end, &mut bytes)?;
        Ok(())
    }
}

/// Returns the ioctl that gives a device a code of an event type.
fn set_bit(kind: u16) -> u8 {
    let found = UI_SET_BITS.iter().find(|(known, _)| *known == kind);
    found.map_or_else(
        || panic!("uinput has no codes of type {kind:#x}"),
        |(_, set)| *set,
    )
}

/// Returns the node of the device that was made with `uinput`.
fn find_node(uinput: &File) -> io::Result<PathBuf> {
    let mut name = [0; 64];
    let number = ioctl_number(READ, GROUP, UI_GET_SYSNAME, name.len());
    ioctl(uinput.as_raw_fd(), number, &mut name)?;
    let name: Vec<u8> = name.into_iter().take_while(|byte| *byte != 0).collect();
    let directory = Path::new("/sys/devices/virtual/input")
        .join(String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData)?);
    for entry in fs::read_dir(&directory)? {
        let name = entry?.file_name();
        if name.to_string_lossy().starts_with("event") {
            return Ok(Path::new("/dev/input").join(name));
        }
    }
    Err(io::Error::other(format!(
        "{} has no node",
        directory.display()
    )))
}

const _: () = assert!(size_of::<libc::uinput_setup>() == 8 + libc::UINPUT_MAX_NAME_SIZE + 4);
const _: () = assert!(size_of::<libc::uinput_abs_setup>() == 4 + 24);
