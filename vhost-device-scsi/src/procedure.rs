// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The medium, as procedures of the command set use it: they run in threads that may block.

use std::io;
use std::sync::{Arc, Weak};

use vhost_device_common::chain::Chain;
use vhost_device_storage::operation::Operation;
use vhost_device_storage::work::blocking;

use crate::lun::{DataOut, Extent, Medium};
use crate::shared::Shared;
use crate::tasks::Task;
use crate::unit::Unit;

/// The medium of a command, which ends early if its task is aborted.
pub struct TaskMedium<'a> {
    pub unit: &'a Unit,
    pub task: Task,
}

impl Medium for TaskMedium<'_> {
    fn check(&self) -> io::Result<()> {
        match self.unit.tasks.mark(self.task) {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.check()?;
        blocking::read(&self.unit.disk, offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        blocking::write(&self.unit.disk, offset, bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.check()?;
        flush(self.unit)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.check()?;
        extent(self.unit, offset)
    }
}

/// The medium of a logical unit that a command of another one copies from or to. It is a task of that unit too, so that a reset or a
/// removal of the unit waits for the copy, which ends early.
pub struct PeerMedium {
    unit: Arc<Unit>,
    task: Task,
    shared: Weak<Shared>,
}

impl PeerMedium {
    /// Begins the task.
    pub fn new(unit: Arc<Unit>, shared: &Weak<Shared>) -> Self {
        Self {
            task: unit.tasks.begin_unnamed(),
            unit,
            shared: Weak::clone(shared),
        }
    }

    fn medium(&self) -> TaskMedium<'_> {
        TaskMedium {
            unit: &self.unit,
            task: self.task,
        }
    }
}

impl Drop for PeerMedium {
    fn drop(&mut self) {
        self.unit.tasks.drop(self.task);
        if let Some(shared) = self.shared.upgrade() {
            shared.wake();
        }
    }
}

impl Medium for PeerMedium {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.medium().read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.medium().write(offset, bytes)
    }

    fn flush(&self) -> io::Result<()> {
        self.medium().flush()
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.medium().extent(offset)
    }
}

fn flush(unit: &Unit) -> io::Result<()> {
    unit.disk.execute(Operation::Flush).map(|_| ())
}

fn extent(unit: &Unit, offset: u64) -> io::Result<Extent> {
    let (is_mapped, length) = unit.disk.extent(offset)?;
    Ok(Extent { length, is_mapped })
}

/// The data-out buffer of a request.
pub struct ChainData<'a>(pub &'a mut Chain);

impl DataOut for ChainData<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read(bytes).map_err(io::Error::other)
    }
}
