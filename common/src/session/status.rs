// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the session, as the control socket shows it.

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::Session;
use crate::device::Device;
use crate::statistics::{FrontEnd, QueueStatus, RingFormat};

impl<D: Device> Session<'_, D> {
    /// Publishes the state of this session. To be called after each message.
    pub(super) fn publish_status(&self) {
        let format = match self.has_feature(VIRTIO_F_RING_PACKED) {
            true => RingFormat::Packed,
            false => RingFormat::Split,
        };
        let queues = self.vrings.iter().map(|vring| QueueStatus {
            size: vring.size,
            format,
            enabled: vring.enabled,
            running: vring.worker.is_some(),
            base: vring.base.filter(|_| vring.worker.is_none()),
        });
        self.statistics.set_front_end(Some(FrontEnd {
            features: self.accepted_features,
            protocol_features: self.channel.protocol_features().bits(),
            queues: queues.collect(),
        }));
    }
}
