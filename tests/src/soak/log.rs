// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty pages: what a device writes while logging is enabled must be marked when the driver sees the write.

use std::time::Instant;

use super::link::Link;
use super::loss::Loss;
use crate::front_end::dirty_log::{LOG_ALL, PAGE_SIZE};
use crate::front_end::queue::Layout;
use crate::front_end::{Buffer, DirtyLog};

/// End of all guest addresses, far beyond the removable memory.
const END: u64 = 1 << 38;

/// Returns whether all pages of some bytes are marked.
fn has(log: &DirtyLog, address: u64, length: u64) -> bool {
    (address & !(PAGE_SIZE - 1)..address + length)
        .step_by(PAGE_SIZE as usize)
        .all(|page| log.has(page))
}

impl Link {
    /// Makes the device log to a new log, if it supports logging.
    pub fn log(&mut self) -> Result<(), Loss> {
        if self.front_end.offered() & LOG_ALL == 0 {
            return Ok(());
        }
        let log = DirtyLog::new(END);
        self.front_end.set_log(&log)?;
        if self.logging.is_none() {
            self.front_end.log_writes(true)?;
            (0..self.queues.len()).try_for_each(|index| self.log_ring(index, true))?;
        }
        self.logging = Some((Instant::now(), log));
        Ok(())
    }

    /// Stops logging.
    pub fn stop_log(&mut self) -> Result<(), Loss> {
        if self.logging.take().is_some() {
            self.front_end.log_writes(false)?;
            (0..self.queues.len()).try_for_each(|index| self.log_ring(index, false))?;
        }
        Ok(())
    }

    /// Switches logging of a ring on or off.
    pub fn log_ring(&self, index: usize, is_logged: bool) -> Result<(), Loss> {
        let queue = &self.queues[index];
        let used = is_logged.then_some(queue.layout().used);
        let addresses = self.front_end.ring_addresses(queue);
        Ok(self.front_end.log_ring(index, &addresses, used)?)
    }

    /// Fails if a request of ring `index`, sent at `sent`, was returned without marks for what it has written: the first `length` bytes of
    /// `buffers`, and the used ring.
    pub fn check_log(
        &self,
        index: usize,
        sent: Instant,
        buffers: &[Buffer],
        length: u32,
    ) -> Result<(), Loss> {
        // Requests that were sent before may have completed before, or are in the previous log.
        let Some((_, log)) = self.logging.as_ref().filter(|(since, _)| sent > *since) else {
            return Ok(());
        };
        let unmarked =
            |address: u64, what: &str| Err(Loss(format!("{what} at {address:#x} is not logged")));
        // Small rings have all of this in one page.
        let Layout {
            descriptors, used, ..
        } = *self.queues[index].layout();
        let (written, what) = match self.queues[index].options().packed {
            true => (descriptors, "a used descriptor"),
            false => (used, "the used index"),
        };
        if !has(log, written, 4) {
            return unmarked(written, what);
        }
        let mut left = length;
        for buffer in buffers {
            let written = left.min(buffer.length);
            left -= written;
            if written > 0 && !has(log, buffer.address, written.into()) {
                return unmarked(buffer.address, "a buffer");
            }
        }
        Ok(())
    }
}
