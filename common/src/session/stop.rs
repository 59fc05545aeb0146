// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a ring stops: with its requests completed, or suspended (GET_VRING_BASE and GET_VRING_BASE_SKIP_DRAIN).
//!
//! A suspended request stays noted in flight, and the device that starts the ring next carries it out. A front-end asks for this when its
//! guest migrates, so that the guest does not wait for the disk. There are two ways to ask. QEMU 11 negotiates GET_VRING_BASE_INFLIGHT
//! only, which lets the back-end choose at each GET_VRING_BASE. Newer versions also negotiate GET_VRING_BASE_SKIP_DRAIN, and send that
//! message.

use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVringState};

use super::dirty_log::LOG_ALL;
use super::vring::Vring;
use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::wire::Message;

/// The message GET_VRING_BASE_SKIP_DRAIN and its protocol feature, which the `vhost` crate does not have.
pub(super) const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
const SKIP_DRAIN: Protocol = Protocol::from_bits_retain(1 << 23);

/// The protocol features of a device whose requests can be suspended.
pub(super) const FEATURES: Protocol = Protocol::GET_VRING_BASE_INFLIGHT.union(SKIP_DRAIN);

/// The protocol features of a front-end that transfers requests in flight when its guest migrates. The first needs the second.
const INFLIGHT: Protocol = Protocol::GET_VRING_BASE_INFLIGHT.union(Protocol::INFLIGHT_SHMFD);

impl<D: Device> Session<'_, D> {
    /// Returns whether the guest migrates and its front-end transfers requests in flight.
    pub(super) fn expects_suspend(&self) -> bool {
        self.accepted_features & LOG_ALL != 0 && self.has_protocol_features(INFLIGHT)
    }

    /// GET_VRING_BASE: stops a ring. If the back-end may choose, it suspends requests only while the guest migrates. Otherwise the
    /// ring stops for a pause or a reset, and its requests are completed first.
    pub(super) fn get_base(&mut self, state: VhostUserVringState) -> Result<Answer, SessionError> {
        let suspend = self.expects_suspend() && !self.has_protocol_features(SKIP_DRAIN);
        self.stop_one(state, suspend)
    }

    /// GET_VRING_BASE_SKIP_DRAIN: stops a ring and suspends its requests.
    pub(super) fn get_base_skip_drain(
        &mut self,
        message: &Message,
    ) -> Result<Answer, SessionError> {
        if !self.has_protocol_features(INFLIGHT.union(SKIP_DRAIN)) {
            return Err(SessionError::Unsupported(message.request));
        }
        self.stop_one(message.object()?, true)
    }

    fn stop_one(
        &mut self,
        state: VhostUserVringState,
        suspend: bool,
    ) -> Result<Answer, SessionError> {
        let index = self.queue_index(state.index.into())?;
        let start = self.first_base();
        let stop = if suspend { Vring::suspend } else { Vring::stop };
        self.stop(|other, _| other == index, stop);
        let base = self.vring(index)?.base.unwrap_or(start);
        self.end_idle_workers();
        Ok(Answer::object(VhostUserVringState::new(state.index, base)))
    }

    fn has_protocol_features(&self, features: Protocol) -> bool {
        self.channel.protocol_features().contains(features)
    }
}
