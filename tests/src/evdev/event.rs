// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Input events and reports, as the kernel and the guest have them.

use super::codes::{EV_SYN, SYN_REPORT};

/// One input event, without its time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Event {
    /// `EV_*`: the type.
    pub kind: u16,
    /// The code: `KEY_*`, `ABS_*` and so on.
    pub code: u16,
    /// The value; its meaning depends on type and code.
    pub value: i32,
}

/// Short, because tests print many.
impl std::fmt::Debug for Event {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Event { kind, code, value } = self;
        write!(formatter, "({kind:#x}, {code:#x}, {value})")
    }
}

impl Event {
    /// Bytes of the kernel's `struct input_event`: a time, then the fields of an [`Event`].
    pub const HOST_SIZE: usize = size_of::<libc::input_event>();
    /// Bytes of `struct virtio_input_event` (VIRTIO 1.3, 5.8.6).
    pub const GUEST_SIZE: usize = 8;
    /// The end of a report.
    pub const REPORT: Event = Event::new(EV_SYN, SYN_REPORT, 0);

    /// Creates an event.
    pub const fn new(kind: u16, code: u16, value: i32) -> Self {
        Event { kind, code, value }
    }

    /// Returns whether it is the end of a report.
    pub fn is_report(&self) -> bool {
        (self.kind, self.code) == (EV_SYN, SYN_REPORT)
    }

    /// Returns the bytes of the event in a buffer of the guest.
    pub fn to_guest(self) -> [u8; Self::GUEST_SIZE] {
        let mut bytes = [0; Self::GUEST_SIZE];
        bytes[..2].copy_from_slice(&self.kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.code.to_le_bytes());
        bytes[4..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }

    /// Reads an event from a buffer of the guest.
    pub fn from_guest(bytes: [u8; Self::GUEST_SIZE]) -> Self {
        let [k0, k1, c0, c1, value @ ..] = bytes;
        Event {
            kind: u16::from_le_bytes([k0, k1]),
            code: u16::from_le_bytes([c0, c1]),
            value: i32::from_le_bytes(value),
        }
    }

    /// Returns the bytes for the kernel, which sets the time.
    pub(super) fn to_host(self) -> [u8; Self::HOST_SIZE] {
        let mut bytes = [0; Self::HOST_SIZE];
        let start = Self::HOST_SIZE - Self::GUEST_SIZE;
        // Hosts of these tests are little-endian, as guests are.
        bytes[start..].copy_from_slice(&self.to_guest());
        bytes
    }

    /// Returns the events in bytes that the kernel returned.
    pub(super) fn from_host(bytes: &[u8]) -> Vec<Self> {
        let (events, _) = bytes.as_chunks::<{ Self::HOST_SIZE }>();
        let ends = events.iter().filter_map(|event| event.last_chunk());
        ends.map(|end| Self::from_guest(*end)).collect()
    }
}

/// A report, as a test writes it: events without the end.
pub type Report = Vec<Event>;

/// Creates a report of these events.
pub fn report(events: &[(u16, u16, i32)]) -> Report {
    events
        .iter()
        .map(|&(kind, code, value)| Event::new(kind, code, value))
        .collect()
}
