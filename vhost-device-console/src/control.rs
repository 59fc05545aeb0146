// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control messages of VIRTIO 1.3, 5.3.6.2, and what a driver knows of a port and is still to be told.
//!
//! A driver may send any message at any time and any number of times. What is owed to it is a few bits for each port, not a queue, so
//! nothing that it does makes the device keep more.

use serde::{Deserialize, Serialize};

/// Events of control messages.
pub mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Size of a message without a name or a size, in bytes.
pub const HEADER_SIZE: usize = 8;

/// The size of a console in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// A message in either direction, without what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Number of the port.
    pub port: u32,
    pub event: u16,
    pub value: u16,
}

impl Message {
    /// Decodes a message of the driver.
    pub fn from_bytes(bytes: [u8; HEADER_SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    /// Encodes a message for the driver, followed by `rest`.
    pub fn with(self, rest: &[u8]) -> Vec<u8> {
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes
    }
}

/// What the driver is to be told next about a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// PORT_ADD.
    Add,
    /// CONSOLE_PORT, or the name of a port that is none.
    Role,
    /// PORT_NAME of a console.
    Name,
    /// RESIZE.
    Size,
    /// PORT_OPEN with this value.
    Open(bool),
}

/// A port as the driver sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Driver {
    /// The driver has set the port up (PORT_READY).
    pub is_ready: bool,
    /// The driver, or a program of the guest, has opened the port.
    pub is_open: bool,
    /// The driver was last told that this side of the port is open.
    pub told_open: Option<bool>,
    /// This side was closed since the driver was told, and may be open again.
    pub was_closed: bool,
    owes_add: bool,
    owes_role: bool,
    owes_name: bool,
    owes_size: bool,
}

impl Driver {
    /// Returns a port of a driver that has just started: it is to be added.
    pub fn started() -> Self {
        Self {
            owes_add: true,
            ..Self::default()
        }
    }

    /// Returns a port of a driver that an earlier device served. It may have opened the port.
    pub fn unknown() -> Self {
        Self {
            is_ready: true,
            is_open: true,
            owes_size: true,
            ..Self::default()
        }
    }

    /// PORT_READY: the driver has set the port up, or has failed to. It then hears no more of the port.
    pub fn set_ready(&mut self, succeeded: bool) {
        let is_open = succeeded && self.is_open;
        *self = Self {
            is_ready: succeeded,
            is_open,
            owes_role: succeeded,
            owes_name: succeeded,
            owes_size: succeeded,
            ..Self::default()
        };
    }

    /// Notes that the size of the console has changed.
    pub fn resized(&mut self) {
        self.owes_size = true;
    }

    /// Notes that this side of the port was closed.
    pub fn closed(&mut self) {
        self.was_closed = true;
    }

    /// Returns what is owed to the driver, while this side of the port is open or not.
    pub fn due(&self, is_open: bool) -> Option<Due> {
        let told = self.told_open;
        if self.owes_add {
            Some(Due::Add)
        } else if !self.is_ready {
            None
        } else if self.owes_role {
            Some(Due::Role)
        } else if self.owes_name {
            Some(Due::Name)
        } else if self.owes_size {
            Some(Due::Size)
        } else if told == Some(true) && (self.was_closed || !is_open) {
            Some(Due::Open(false))
        } else if told != Some(is_open) {
            Some(Due::Open(is_open))
        } else {
            None
        }
    }

    /// Notes that the driver was told, or need not be.
    pub fn told(&mut self, due: Due) {
        match due {
            Due::Add => self.owes_add = false,
            Due::Role => self.owes_role = false,
            Due::Name => self.owes_name = false,
            Due::Size => self.owes_size = false,
            Due::Open(is_open) => {
                self.told_open = Some(is_open);
                self.was_closed = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_due(driver: &mut Driver, is_open: bool) -> Vec<Due> {
        let mut seen = Vec::new();
        while let Some(due) = driver.due(is_open) {
            driver.told(due);
            seen.push(due);
        }
        seen
    }

    #[test]
    fn a_port_is_added_then_described_then_opened() {
        let mut driver = Driver::started();
        assert_eq!(all_due(&mut driver, true), [Due::Add]);
        driver.set_ready(true);
        let described = [Due::Role, Due::Name, Due::Size, Due::Open(true)];
        assert_eq!(all_due(&mut driver, true), described);
        assert_eq!(all_due(&mut driver, true), []);
        driver.set_ready(true);
        assert_eq!(all_due(&mut driver, true), described);
    }

    #[test]
    fn a_driver_that_failed_hears_no_more_of_the_port() {
        let mut driver = Driver::started();
        all_due(&mut driver, true);
        driver.set_ready(false);
        driver.resized();
        driver.closed();
        assert_eq!(all_due(&mut driver, true), []);
        assert!(!driver.is_open);
    }

    #[test]
    fn a_quick_change_of_clients_is_seen_as_a_close_and_an_open() {
        let mut driver = Driver::unknown();
        driver.told(Due::Size);
        assert_eq!(all_due(&mut driver, true), [Due::Open(true)]);
        for _ in 0..100 {
            driver.closed();
        }
        let both = [Due::Open(false), Due::Open(true)];
        assert_eq!(all_due(&mut driver, true), both);
        driver.closed();
        assert_eq!(all_due(&mut driver, false), [Due::Open(false)]);
        driver.closed();
        assert_eq!(all_due(&mut driver, false), []);
        assert_eq!(all_due(&mut driver, true), [Due::Open(true)]);
        assert_eq!(all_due(&mut driver, true), []);
    }

    #[test]
    fn messages_are_little_endian() {
        let message = Message {
            port: 0x0102_0304,
            event: 5,
            value: 0x0607,
        };
        let bytes = message.with(b"name");
        assert_eq!(bytes, b"\x04\x03\x02\x01\x05\x00\x07\x06name");
        let header = bytes.first_chunk().copied().unwrap();
        assert_eq!(Message::from_bytes(header), message);
    }
}
