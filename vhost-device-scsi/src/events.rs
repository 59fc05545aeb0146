// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events for the driver (VIRTIO 1.3, 5.6.6.3), and the queue that carries them.

use std::collections::VecDeque;

use vhost_device_common::chain::Chain;
use vhost_device_common::worker::Queue;
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_F_CHANGE, VIRTIO_SCSI_F_HOTPLUG, VIRTIO_SCSI_T_EVENTS_MISSED,
    VIRTIO_SCSI_T_NO_EVENT, VIRTIO_SCSI_T_PARAM_CHANGE, VIRTIO_SCSI_T_TRANSPORT_RESET,
};

use crate::address::Address;
use crate::config::EVENT_SIZE;
use crate::lun::Attention;

/// Events that wait for the thread of the queue: fewer than it takes buffers at once.
const MOST: usize = 32;
/// Reasons of a transport reset.
const RESCAN: u32 = 1;
const REMOVED: u32 = 2;

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A logical unit was added.
    Added(Address),
    /// A logical unit was removed.
    Removed(Address),
    /// Something about a logical unit has changed, as the unit attention says.
    Changed(Address, Attention),
}

impl Event {
    /// Returns the type, the address and the reason.
    fn parts(self) -> (u32, [u8; 8], u32) {
        match self {
            Self::Added(address) => (VIRTIO_SCSI_T_TRANSPORT_RESET, address.encode(), RESCAN),
            Self::Removed(address) => (VIRTIO_SCSI_T_TRANSPORT_RESET, address.encode(), REMOVED),
            Self::Changed(address, attention) => {
                let reason = u32::from(attention.code().swap_bytes());
                (VIRTIO_SCSI_T_PARAM_CHANGE, address.encode(), reason)
            }
        }
    }

    /// Returns the feature by which a driver asks for it.
    fn feature(self) -> u32 {
        match self {
            Self::Added(_) | Self::Removed(_) => VIRTIO_SCSI_F_HOTPLUG,
            Self::Changed(..) => VIRTIO_SCSI_F_CHANGE,
        }
    }
}

/// Events that the driver was not told yet.
#[derive(Debug, Default)]
pub struct Events {
    /// The features that the driver has accepted.
    pub features: u64,
    waiting: VecDeque<Event>,
    /// Events were lost.
    missed: bool,
}

impl Events {
    /// Adds an event, if the driver wants events of its kind.
    pub fn add(&mut self, event: Event) {
        if self.features & 1 << event.feature() == 0 {
            return;
        }
        if self.waiting.len() < MOST {
            self.waiting.push_back(event);
        } else {
            self.miss();
        }
    }

    /// Notes that events were lost, so that the driver examines all units.
    pub fn miss(&mut self) {
        self.waiting.clear();
        self.missed = true;
    }

    /// Returns whether there is something to tell.
    pub fn is_due(&self) -> bool {
        let accepts = self.features & (1 << VIRTIO_SCSI_F_HOTPLUG | 1 << VIRTIO_SCSI_F_CHANGE) != 0;
        self.missed && accepts || !self.waiting.is_empty()
    }

    /// Forgets all events: a new driver finds the units as they are. The front-end announces other features if they change.
    pub fn reset(&mut self) {
        *self = Self {
            features: self.features,
            ..Self::default()
        };
    }

    /// Gives events to the driver. Without a buffer they are lost, and the next buffer says so.
    pub fn deliver(&mut self, queue: &mut Queue, mut complete: impl FnMut(&mut Queue, Chain, u32)) {
        while self.is_due() {
            let Some(mut chain) = queue.take() else {
                if !queue.has_available() && !self.waiting.is_empty() {
                    self.miss();
                }
                return;
            };
            let next = self.waiting.pop_front().map(Event::parts);
            let (kind, address, reason) = next.unwrap_or((VIRTIO_SCSI_T_NO_EVENT, [0; 8], 0));
            let missed = match std::mem::take(&mut self.missed) {
                true => VIRTIO_SCSI_T_EVENTS_MISSED,
                false => 0,
            };
            let mut bytes = Vec::with_capacity(EVENT_SIZE);
            bytes.extend((kind | missed).to_le_bytes());
            bytes.extend(address);
            bytes.extend(reason.to_le_bytes());
            let length = chain.writable_len().min(EVENT_SIZE as u64) as usize;
            let written = chain.write(bytes.get(..length).unwrap_or_default());
            let used = written.map_or(0, |()| length as u32);
            complete(queue, chain, used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Address = Address {
        target: 2,
        lun: 300,
    };

    #[test]
    fn a_capacity_change_has_its_sense_codes_as_the_reason() {
        let (kind, address, reason) = Event::Changed(ADDRESS, Attention::CapacityChanged).parts();
        assert_eq!((kind, reason), (3, 0x092a));
        assert_eq!(address, [1, 2, 0x41, 0x2c, 0, 0, 0, 0]);
    }

    #[test]
    fn a_driver_gets_only_the_events_that_it_has_accepted() {
        let mut events = Events::default();
        events.add(Event::Added(ADDRESS));
        events.features = 1 << VIRTIO_SCSI_F_CHANGE;
        events.add(Event::Removed(ADDRESS));
        assert!(!events.is_due());
        events.add(Event::Changed(ADDRESS, Attention::CapacityChanged));
        assert!(events.is_due());
        events.reset();
        assert!(!events.is_due());
        events.add(Event::Changed(ADDRESS, Attention::CapacityChanged));
        assert!(events.is_due(), "the features are the same");
    }

    #[test]
    fn too_many_events_are_missed() {
        let mut events = Events {
            features: 1 << VIRTIO_SCSI_F_HOTPLUG,
            ..Events::default()
        };
        for _ in 0..=MOST {
            events.add(Event::Added(ADDRESS));
        }
        assert!(events.missed && events.waiting.is_empty());
        assert!(events.is_due());
        events.features = 0;
        assert!(!events.is_due(), "the driver wants no events");
    }
}
