// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a logical unit knows of its medium and its target, and what it asks of them.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::LogicalUnit;
use super::answer::{Answer, Failure};

/// What identifies a logical unit to its initiators. It must stay the same across restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// T10 VENDOR IDENTIFICATION. ASCII, padded with spaces.
    pub vendor: [u8; 8],
    /// PRODUCT IDENTIFICATION. ASCII, padded with spaces.
    pub product: [u8; 16],
    /// PRODUCT REVISION LEVEL. ASCII, padded with spaces.
    pub revision: [u8; 4],
    /// The serial number: printable ASCII, at most 36 characters are used.
    pub serial: String,
    /// The NAA designator of the logical unit: its top four bits are 3 (locally assigned) or 5 (registered by a vendor).
    pub naa: u64,
    /// The NAA designator of the target.
    pub target: u64,
}

/// How blocks are unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Provisioning {
    /// Bytes of the smallest range that gives storage back; 0 if unknown.
    pub granularity: u32,
    /// The most bytes of one UNMAP command, or of one WRITE SAME command with UNMAP.
    pub max_bytes: u64,
    /// Whether blocks that were unmapped are read as zeroes (LBPRZ).
    pub reads_zeroes: bool,
}

/// What does not change while a logical unit exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes of a logical block: a power of two from 512 to 4096.
    pub block_size: u32,
    /// Bytes of a physical block: a power of two, not less than `block_size`.
    pub physical_block_size: u32,
    /// Bytes of the best transfer length; 0 if unknown.
    pub optimal_io_size: u32,
    /// The most bytes of one write without data ([`Action::Zero`]): longer WRITE SAME commands are refused.
    pub max_zero_bytes: u64,
    /// The medium cannot be written.
    pub read_only: bool,
    /// The medium can be removed.
    pub removable: bool,
    /// Persistent reservations can survive a restart: [`Target::store`] has a place for them.
    pub persists: bool,
    /// MEDIUM ROTATION RATE: 0 unknown, 1 does not rotate, otherwise turns per minute.
    pub rotation: u16,
    /// How blocks are unmapped; `None` if they cannot be.
    pub provisioning: Option<Provisioning>,
    /// What identifies it.
    pub identity: Identity,
}

/// What a command does with the medium, in bytes. All ranges are inside the medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read `length` bytes at `offset` into the data-in buffer. It has room for them.
    Read {
        /// The first byte.
        offset: u64,
        /// How many bytes. Not 0.
        length: u64,
    },
    /// Write `length` bytes of the data-out buffer at `offset`. The buffer has them.
    Write {
        /// The first byte.
        offset: u64,
        /// How many bytes. Not 0.
        length: u64,
        /// Whether the data must be on stable storage before the answer (FUA, or no write cache).
        stable: bool,
    },
    /// Bring all that was written to stable storage.
    Flush,
    /// Unmap ranges: a hint. There is one at least.
    Unmap(Vec<Range<u64>>),
    /// Write zeroes to a range.
    Zero {
        /// The range. Not empty.
        range: Range<u64>,
        /// Whether storage may be given back.
        unmap: bool,
        /// As for `Write`.
        stable: bool,
    },
}

/// A part of the medium, from the offset asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its bytes. Not 0.
    pub length: u64,
    /// Whether storage is assigned to it; otherwise it is a hole.
    pub is_mapped: bool,
}

/// The medium, as a [`Procedure`] uses it. All calls may block. An error of the kind [`io::ErrorKind::Interrupted`] ends the procedure
/// early, because the command was aborted.
pub trait Medium {
    /// Returns whether the command may continue. All other calls check that too; procedures call it before work on another medium.
    ///
    /// # Errors
    /// [`io::ErrorKind::Interrupted`]: the command was aborted.
    fn check(&self) -> io::Result<()> {
        Ok(())
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// The medium cannot be read there.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes all `bytes` at `offset`.
    ///
    /// # Errors
    /// The medium cannot be written there.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Brings all that was written to stable storage.
    ///
    /// # Errors
    /// Data may be lost.
    fn flush(&self) -> io::Result<()>;

    /// Finds out whether there is storage for the bytes at `offset`, which is inside the medium, and for how many of the bytes after it the
    /// same is true.
    ///
    /// # Errors
    /// The host cannot say. The logical unit then reports the rest as mapped.
    fn extent(&self, offset: u64) -> io::Result<Extent>;
}

/// The data-out buffer of a command, read from its start to its end.
pub trait DataOut {
    /// Fills `bytes` with the next bytes of the buffer.
    ///
    /// # Errors
    /// The buffer does not have so many, or is not guest memory.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// Another logical unit of this program, as EXTENDED COPY uses it.
#[derive(Clone)]
pub struct Peer {
    /// The logical unit.
    pub unit: Arc<LogicalUnit>,
    /// Its medium.
    pub medium: Arc<dyn Medium + Send + Sync>,
}

/// What a logical unit asks of its target.
pub trait Target: Send + Sync {
    /// Returns the numbers of the target's logical units, in ascending order.
    fn luns(&self) -> Vec<u16>;

    /// Returns the logical unit with this NAA designator, which may be the one that asks.
    fn find(&self, naa: u64) -> Option<Peer>;

    /// Stores the persistent reservations of the logical unit with this NAA designator, so that they survive a restart (APTPL). An empty
    /// slice deletes what was stored. May block: only procedures call it.
    ///
    /// # Errors
    /// They cannot be stored. The command that changes them fails.
    fn store(&self, naa: u64, state: &[u8]) -> io::Result<()>;
}

/// A command that needs several operations on the medium, or data in memory.
pub struct Procedure {
    exclusive: Option<Range<u64>>,
    changes: bool,
    bytes: u64,
    unit: Arc<LogicalUnit>,
    run: Run,
}

/// What a procedure does.
type Run = Box<dyn FnOnce(&dyn Medium, &mut dyn DataOut) -> Result<Answer, Failure> + Send>;

impl Procedure {
    /// Creates a procedure that others may disturb.
    pub(super) fn new(
        unit: &Arc<LogicalUnit>,
        run: impl FnOnce(&dyn Medium, &mut dyn DataOut) -> Result<Answer, Failure> + Send + 'static,
    ) -> Self {
        Self {
            exclusive: None,
            changes: false,
            bytes: 0,
            unit: Arc::clone(unit),
            run: Box::new(run),
        }
    }

    /// Sets the bytes that no other command may change meanwhile.
    pub(super) fn exclusively(self, bytes: Range<u64>) -> Self {
        Self {
            exclusive: Some(bytes),
            ..self
        }
    }

    /// Says that the procedure writes.
    pub(super) fn changing(self) -> Self {
        Self {
            changes: true,
            ..self
        }
    }

    /// Sets how many bytes are read and written.
    pub(super) fn moving(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }

    /// Returns whether the procedure writes to a medium: to its own or, for EXTENDED COPY, to any of the program.
    pub fn changes(&self) -> bool {
        self.changes
    }

    /// Returns how many bytes of all media the procedure reads and writes if nothing fails, for limits. 0 if it moves no data.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the bytes of the medium that no other command may write or unmap, from before [`Procedure::run`] until it has returned.
    /// `None` if others do not disturb it.
    pub fn exclusive(&self) -> Option<Range<u64>> {
        self.exclusive.clone()
    }

    /// Carries the command out. May block, and takes as long as its operations; its buffers have 1 MiB at most.
    pub fn run(self, medium: &dyn Medium, data: &mut dyn DataOut) -> Answer {
        let outcome = (self.run)(medium, data);
        self.unit.answer(outcome)
    }
}
