// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file of requests in flight (GET_INFLIGHT_FD, SET_INFLIGHT_FD).

use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::ring::inflight::{self, InflightFile};
use crate::wire::{Message, leading_object};

/// Payload size of GET_INFLIGHT_FD and SET_INFLIGHT_FD in bytes: two u64, two u16.
const INFLIGHT_SIZE: usize = 20;

impl<D: Device> Session<'_, D> {
    /// Stores [`Device::kept`] in the file of requests in flight.
    pub(super) fn keep(&self) {
        if let Some(inflight) = &self.inflight {
            inflight.keep(self.device.kept());
        }
    }

    /// Decodes GET_INFLIGHT_FD and SET_INFLIGHT_FD: number and size of the rings, and the place in the file.
    fn inflight_description(&self, message: &Message) -> Result<VhostUserInflight, SessionError> {
        let payload = &message.payload;
        // Some front-ends pad the payload to a multiple of 8 bytes.
        let mut padded = [0; size_of::<VhostUserInflight>()];
        if !(INFLIGHT_SIZE..=padded.len()).contains(&payload.len()) {
            return Err(message.malformed().into());
        }
        for (to, from) in padded.iter_mut().zip(payload) {
            *to = *from;
        }
        let inflight: VhostUserInflight = leading_object(&padded).unwrap_or_default();
        let max = self.device.max_queue_size();
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        self.queue_index(u64::from(queues).saturating_sub(1))?;
        if queues == 0 {
            return Err(message.malformed().into());
        }
        if !self.is_ring_size(size.into()) {
            return Err(SessionError::QueueSize {
                size: size.into(),
                max,
            });
        }
        Ok(inflight)
    }

    /// GET_INFLIGHT_FD: creates a file.
    pub(super) fn get_inflight(&self, message: &Message) -> Result<Answer, SessionError> {
        let wanted = self.inflight_description(message)?;
        let packed = self.has_feature(VIRTIO_F_RING_PACKED);
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        let file = inflight::create_file(packed, queues, size)?;
        let length = inflight::file_size(packed, queues, size) as u64;
        // Field by field: the padding of the structure is not initialized.
        let mut reply = [length, 0].map(u64::to_ne_bytes).concat();
        reply.extend([queues, size].map(u16::to_ne_bytes).concat());
        reply.resize(message.payload.len(), 0);
        Ok(Answer::ReplyWithFile(reply, file))
    }

    /// SET_INFLIGHT_FD: uses the file of the front-end for the next start.
    pub(super) fn set_inflight(&mut self, mut message: Message) -> Result<Answer, SessionError> {
        let inflight = self.inflight_description(&message)?;
        self.check_stopped()?;
        let inflight = InflightFile::map(
            &message.file()?,
            inflight.mmap_offset,
            inflight.mmap_size,
            self.has_feature(VIRTIO_F_RING_PACKED),
            inflight.num_queues,
            inflight.queue_size,
        )?;
        if let Some(kept @ 1..) = inflight.kept()
            && self.device.kept() == 0
        {
            self.device.set_kept(Some(kept));
        }
        self.inflight = Some(inflight);
        Ok(Answer::Ack)
    }
}
