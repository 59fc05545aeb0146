// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Input events in the layouts of the kernel and of VIRTIO, and the constants that this device needs. Their names are
//! those in Linux's `input-event-codes.h`.

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Event types.
pub const EV_SYN: u16 = 0x00;
pub const EV_KEY: u16 = 0x01;
pub const EV_REL: u16 = 0x02;
pub const EV_ABS: u16 = 0x03;
pub const EV_MSC: u16 = 0x04;
pub const EV_SW: u16 = 0x05;
pub const EV_LED: u16 = 0x11;
pub const EV_SND: u16 = 0x12;
pub const EV_REP: u16 = 0x14;
pub const EV_FF: u16 = 0x15;

/// Codes of EV_SYN: the end of a report, and the loss of events in the kernel.
pub const SYN_REPORT: u16 = 0;
pub const SYN_DROPPED: u16 = 3;

/// Value of the repeat event of a held key.
pub const KEY_REPEATED: i32 = 2;

/// The axis that selects the slot of the following multi-touch events.
pub const ABS_MT_SLOT: u16 = 0x2f;
/// First and last of the axes that each slot of the multi-touch protocol has.
pub const ABS_MT_FIRST: u16 = 0x30;
pub const ABS_MT_LAST: u16 = 0x3d;
/// The axis that identifies the touch in a slot; -1 when it ends.
pub const ABS_MT_TRACKING_ID: u16 = 0x39;

/// First code of EV_FF that is a setting of the device. Smaller codes are the numbers of effects.
pub const FF_GAIN: u16 = 0x60;

/// Event types that are forwarded to the guest. The guest sets the others (LEDs, sounds, repeat rate, force feedback).
/// If these were reported back, the guest would take them for changes and set them again, in a loop.
pub const FORWARDED_TYPES: [u16; 6] = [EV_SYN, EV_KEY, EV_REL, EV_ABS, EV_MSC, EV_SW];

/// An input event, as the kernel lays it out after the time. VIRTIO has the same layout, in little-endian byte order.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, FromBytes, Immutable, IntoBytes,
)]
#[repr(C)]
pub struct Event {
    /// `EV_*`
    pub kind: u16,
    /// `KEY_*`, `ABS_*` and so on.
    pub code: u16,
    /// The meaning depends on both.
    pub value: i32,
}

impl Event {
    /// Size of the kernel's `struct input_event` in bytes: a time, then the fields of [`Event`].
    pub const HOST_SIZE: usize = size_of::<libc::input_event>();
    /// Size of `struct virtio_input_event` in bytes (VIRTIO 1.3, 5.8.6).
    pub const GUEST_SIZE: usize = size_of::<Self>();

    /// The event that ends a report.
    pub const REPORT: Self = Self::new(EV_SYN, SYN_REPORT, 0);

    /// Creates an event.
    pub const fn new(kind: u16, code: u16, value: i32) -> Self {
        Self { kind, code, value }
    }

    /// Returns whether the event ends a report.
    pub fn is_report(&self) -> bool {
        (self.kind, self.code) == (EV_SYN, SYN_REPORT)
    }

    /// Decodes the kernel's events without their times. Ignores an incomplete event at the end.
    pub fn from_host(bytes: &[u8]) -> impl Iterator<Item = Self> {
        bytes
            .chunks_exact(Self::HOST_SIZE)
            .filter_map(|event| event.last_chunk())
            .map(|fields: &[u8; Self::GUEST_SIZE]| zerocopy::transmute!(*fields))
    }

    /// Encodes the event for the kernel, which sets the time itself.
    pub fn to_host(self) -> [u8; Self::HOST_SIZE] {
        let mut bytes = [0; Self::HOST_SIZE];
        if let Some(end) = bytes.last_chunk_mut::<{ Self::GUEST_SIZE }>() {
            *end = zerocopy::transmute!(self);
        }
        bytes
    }

    /// Decodes the event from a buffer of the guest.
    pub fn from_guest(bytes: [u8; Self::GUEST_SIZE]) -> Self {
        let event: Self = zerocopy::transmute!(bytes);
        event.to_le()
    }

    /// Encodes the event for a buffer of the guest.
    pub fn to_guest(self) -> [u8; Self::GUEST_SIZE] {
        zerocopy::transmute!(self.to_le())
    }

    /// Converts between the byte order of the host and that of the guest.
    fn to_le(self) -> Self {
        Self::new(self.kind.to_le(), self.code.to_le(), self.value.to_le())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHEEL: Event = Event::new(EV_REL, 0x0b, -120);

    #[test]
    fn events_of_the_guest_are_little_endian() {
        assert_eq!(WHEEL.to_guest(), [2, 0, 0x0b, 0, 0x88, 0xff, 0xff, 0xff]);
        assert_eq!(Event::from_guest(WHEEL.to_guest()), WHEEL);
    }

    #[test]
    fn events_of_the_kernel_start_with_a_time() {
        let mut bytes = WHEEL.to_host().to_vec();
        bytes[..8].fill(0xa5);
        bytes.extend(Event::REPORT.to_host());
        bytes.extend([1; Event::HOST_SIZE - 1]);
        let events: Vec<_> = Event::from_host(&bytes).collect();
        assert_eq!(events, [WHEEL, Event::REPORT]);
    }
}
