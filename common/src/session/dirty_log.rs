// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log of a live migration (SET_LOG_BASE, and VHOST_F_LOG_ALL in SET_FEATURES). Both can change while rings run.

use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserLog, VhostUserProtocolFeatures};

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::log_limit::info_limited;
use crate::memory::DirtyLog;
use crate::wire::Message;

/// VHOST_F_LOG_ALL: the back-end logs its writes to guest memory. The device does not see this feature.
pub const LOG_ALL: u64 = 1 << 26;

impl<D: Device> Session<'_, D> {
    /// Returns the log, if writes are logged now.
    pub(super) fn log_in_force(&self) -> Option<Arc<DirtyLog>> {
        let is_accepted = self.accepted_features & LOG_ALL != 0;
        self.log.clone().filter(|_| is_accepted)
    }

    /// SET_LOG_BASE: replaces the log. Nothing writes to the previous one once the reply is sent.
    pub(super) fn set_log(&mut self, mut message: Message) -> Result<Answer, SessionError> {
        let log: VhostUserLog = message.object()?;
        let wanted = VhostUserProtocolFeatures::LOG_SHMFD;
        if !self.channel.protocol_features().contains(wanted) {
            // Without this feature, the log is in the front-end's own memory.
            return Err(SessionError::Unsupported(message.request));
        }
        let file = message.file()?;
        let map = DirtyLog::map(&file, log.mmap_offset, log.mmap_size)?;
        map.check_covers(self.memory.end())?;
        self.log = Some(Arc::new(map));
        self.apply_log()?;
        // A reply is required even if the front-end did not ask for one. QEMU ignores its contents; other front-ends expect what they sent.
        Ok(Answer::Reply(message.payload))
    }

    /// Makes all workers log their writes, or stop doing so, as the front-end asked.
    pub(super) fn apply_log(&mut self) -> Result<(), SessionError> {
        // Before the workers hear of the log: requests that they take from then on can be suspended.
        self.device.expect_suspend(self.expects_suspend());
        let log = self.log_in_force();
        if log.is_some() != self.memory.log().is_some() {
            let state = if log.is_some() { "enabled" } else { "disabled" };
            info_limited(format_args!("dirty page logging is {state}"));
        } else if log.is_none() {
            return Ok(());
        }
        self.share_memory(self.memory.clone())
    }
}
