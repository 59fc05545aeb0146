// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of guest memory (SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG).

use vhost::vhost_user::message::{FrontendReq, VhostUserMemory, VhostUserMemoryRegion};

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::log_limit::warn_limited;
use crate::memory::GuestMemory;
use crate::wire::{Message, leading_object};

impl<D: Device> Session<'_, D> {
    /// `None` if the payload is malformed.
    pub(super) fn set_memory_table(
        &mut self,
        message: Message,
    ) -> Option<Result<Answer, SessionError>> {
        let table: VhostUserMemory = leading_object(&message.payload)?;
        let regions = message.payload.get(size_of::<VhostUserMemory>()..)?;
        let count = table.num_regions as usize;
        let used = count.checked_mul(size_of::<VhostUserMemoryRegion>())?;
        // User-Mode Linux leaves room for a region that it does not have.
        let rest = regions.get(used..)?.len();
        if count == 0 || !rest.is_multiple_of(size_of::<VhostUserMemoryRegion>()) {
            return None;
        }
        if message.files.len() < count {
            return Some(Err(SessionError::NoFile(FrontendReq::SET_MEM_TABLE)));
        }
        let memory = regions
            .chunks_exact(size_of::<VhostUserMemoryRegion>())
            .take(count)
            .zip(message.files)
            .try_fold(GuestMemory::default(), |memory, (bytes, file)| {
                memory.with_region(&leading_object(bytes).unwrap_or_default(), file)
            });
        Some(match memory {
            Ok(memory) => self.set_memory(memory),
            Err(error) => Err(error.into()),
        })
    }

    /// Puts another table in force. Requests in flight keep the memory that they point to.
    pub(super) fn set_memory(&mut self, memory: GuestMemory) -> Result<Answer, SessionError> {
        self.share_memory(memory)?;
        // The table is in force, whether all rings can start in it or not.
        for index in 0..self.vrings.len() {
            if let Err(error) = self.start_if_ready(index) {
                warn_limited(format_args!("front-end: {error}"));
            }
        }
        Ok(Answer::Ack)
    }

    /// Has all workers use this memory, with the log that is in force.
    pub(super) fn share_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        self.memory = memory.with_log(self.log_in_force());
        for worker in self.workers.values() {
            worker.set_memory(&self.memory)?;
        }
        Ok(())
    }
}
