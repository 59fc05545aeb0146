// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a session starts over: on SET_OWNER, RESET_OWNER and RESET_DEVICE.

use super::transfer::DeviceState;
use super::vring::Vring;
use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::log_limit::info_limited;
use crate::memory::GuestMemory;

impl<D: Device> Session<'_, D> {
    /// SET_OWNER: begins another session, unless rings run. QEMU's device_del and device_add keep the connection, and the new device
    /// announces all memory and rings. Protocol features and the back-end channel stay: QEMU sends them before SET_OWNER. A front-end
    /// that sends SET_OWNER twice before it starts rings loses nothing.
    pub(super) fn begin(&mut self) -> Answer {
        let is_running = self.vrings.iter().any(|vring| vring.worker.is_some());
        if is_running || !std::mem::take(&mut self.was_used) {
            return Answer::Ack;
        }
        self.stop_all();
        self.vrings.fill_with(Vring::default);
        self.end_transfer("another session begins");
        self.device_state = DeviceState::default();
        self.memory = GuestMemory::default();
        self.log = None;
        self.inflight = None;
        self.accepted_features = 0;
        self.status = 0;
        self.device.expect_suspend(false);
        self.device.reset();
        self.device.set_kept(Some(0));
        info_limited(format_args!("another session begins"));
        Answer::Ack
    }

    /// RESET_OWNER: disables all rings.
    pub(super) fn disable_all(&mut self) -> Result<Answer, SessionError> {
        for index in 0..self.vrings.len() {
            self.enable(index, false)?;
        }
        Ok(Answer::Ack)
    }

    /// RESET_DEVICE: resets the device and its rings. Features, memory and the back-end channel stay.
    pub(super) fn reset_device(&mut self) -> Answer {
        self.stop_all();
        self.vrings.iter_mut().for_each(Vring::reset);
        if let Some(inflight) = &self.inflight {
            (0..self.vrings.len()).for_each(|index| inflight.forget(index as u16));
        }
        self.end_transfer("the device is reset");
        self.device_state = DeviceState::default();
        self.status = 0;
        self.device.reset();
        Answer::Ack
    }
}
