// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The medium, as procedures of the command set use it: they run in threads that may block.

use std::io;
use std::sync::Arc;

use vhost_device_common::chain::Chain;
use vhost_device_storage::operation::Operation;
use vhost_device_storage::work::blocking;

use crate::lun::{DataOut, Extent, Medium};
use crate::tasks::Task;
use crate::unit::Unit;

/// The medium of a command, which ends early if its task is aborted.
pub struct TaskMedium<'a> {
    pub unit: &'a Unit,
    pub task: Task,
}

impl TaskMedium<'_> {
    fn check(&self) -> io::Result<()> {
        match self.unit.tasks.mark(self.task) {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::Interrupted.into()),
        }
    }
}

impl Medium for TaskMedium<'_> {
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

/// The medium of another logical unit, which a command copies from or to.
pub struct PeerMedium(pub Arc<Unit>);

impl Medium for PeerMedium {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        blocking::read(&self.0.disk, offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        blocking::write(&self.0.disk, offset, bytes)
    }

    fn flush(&self) -> io::Result<()> {
        flush(&self.0)
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        extent(&self.0, offset)
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
