// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where dirty pages are logged while the guest migrates (SET_LOG_BASE, and VHOST_F_LOG_ALL in SET_FEATURES), both of which come and
//! go while the rings run.

use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserLog, VhostUserProtocolFeatures};

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::log_limit::info_limited;
use crate::memory::DirtyLog;
use crate::wire::Message;

/// VHOST_F_LOG_ALL: writes to guest memory are logged. Not a feature that the device knows of.
pub const LOG_ALL: u64 = 1 << 26;

impl<D: Device> Session<'_, D> {
    /// The log that writes are noted in now.
    pub(super) fn log_in_force(&self) -> Option<Arc<DirtyLog>> {
        let is_accepted = self.accepted_features & LOG_ALL != 0;
        self.log.clone().filter(|_| is_accepted)
    }

    /// SET_LOG_BASE: uses another log. The one before it is not written to any more when the reply is sent.
    pub(super) fn set_log(&mut self, mut message: Message) -> Result<Answer, SessionError> {
        let log: VhostUserLog = message.object()?;
        let wanted = VhostUserProtocolFeatures::LOG_SHMFD;
        if !self.channel.protocol_features().contains(wanted) {
            // The log would be in the front-end's own memory.
            return Err(SessionError::Unsupported(message.request));
        }
        let file = message.file()?;
        let map = DirtyLog::map(&file, log.mmap_offset, log.mmap_size)?;
        map.check_covers(self.memory.end())?;
        self.log = Some(Arc::new(map));
        self.apply_log()?;
        // It is due even if none was asked for. QEMU does not look at what it says; others expect what they sent.
        Ok(Answer::Reply(message.payload))
    }

    /// Has all workers note what they write, or not, as the front-end wants it.
    pub(super) fn apply_log(&mut self) -> Result<(), SessionError> {
        let log = self.log_in_force();
        if log.is_some() != self.memory.log().is_some() {
            let verb = if log.is_some() { "is" } else { "is not" };
            info_limited(format_args!("what the device writes {verb} logged"));
        } else if log.is_none() {
            return Ok(());
        }
        self.share_memory(self.memory.clone())
    }
}
