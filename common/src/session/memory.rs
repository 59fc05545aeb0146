// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of guest memory (SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG).

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{
    VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
};

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::log_limit::warn_limited;
use crate::memory::GuestMemory;
use crate::wire::{Message, PayloadError, leading_object};

impl<D: Device> Session<'_, D> {
    /// SET_MEM_TABLE: replaces all regions.
    pub(super) fn set_memory_table(&mut self, message: Message) -> Result<Answer, SessionError> {
        let count = region_count(&message.payload).ok_or_else(|| message.malformed())?;
        if message.files.len() < count {
            return Err(PayloadError::NoFile(message.request).into());
        }
        let regions = message.payload.get(size_of::<VhostUserMemory>()..);
        let memory = regions
            .unwrap_or_default()
            .chunks_exact(size_of::<VhostUserMemoryRegion>())
            .take(count)
            .zip(message.files)
            .try_fold(GuestMemory::default(), |memory, (bytes, file)| {
                memory.with_region(&leading_object(bytes).unwrap_or_default(), file)
            });
        self.set_memory(memory?)
    }

    /// ADD_MEM_REG: adds a region.
    pub(super) fn add_memory(
        &mut self,
        region: VhostUserSingleMemoryRegion,
        file: OwnedFd,
    ) -> Result<Answer, SessionError> {
        self.set_memory(self.memory.with_region(&region, file)?)
    }

    /// REM_MEM_REG: removes a region.
    pub(super) fn remove_memory(
        &mut self,
        region: VhostUserSingleMemoryRegion,
    ) -> Result<Answer, SessionError> {
        self.set_memory(self.memory.without_region(&region)?)
    }

    /// Uses another memory table. Requests in flight keep the memory that they point to.
    fn set_memory(&mut self, memory: GuestMemory) -> Result<Answer, SessionError> {
        self.share_memory(memory)?;
        // The request succeeds even if a ring cannot start in this memory.
        for index in 0..self.vrings.len() {
            if let Err(error) = self.start_if_ready(index) {
                warn_limited(format_args!("front-end: {error}"));
            }
        }
        Ok(Answer::Ack)
    }

    /// Makes all workers use this memory, with the current dirty log.
    pub(super) fn share_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        self.memory = memory.with_log(self.log_in_force());
        for worker in self.workers.values() {
            worker.set_memory(&self.memory)?;
        }
        Ok(())
    }
}

/// Returns the number of regions in a memory table; `None` if it is malformed.
fn region_count(payload: &[u8]) -> Option<usize> {
    let table: VhostUserMemory = leading_object(payload)?;
    let regions = payload.get(size_of::<VhostUserMemory>()..)?;
    let count = table.num_regions as usize;
    let used = count.checked_mul(size_of::<VhostUserMemoryRegion>())?;
    // User-Mode Linux sends room for one region more than it has.
    let rest = regions.get(used..)?.len();
    (count > 0 && rest.is_multiple_of(size_of::<VhostUserMemoryRegion>())).then_some(count)
}
