// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device server of one logical unit: SPC-4 and SBC-3 commands for a direct access block device (SAM-5).
//!
//! This folder has no I/O of its own. A transport hands each command to [`LogicalUnit::start`], which checks it and returns the next
//! [`Step`]: an answer that is complete, an [`Action`] on the medium that the transport carries out between guest memory and the disk, or a
//! [`Procedure`] that needs several operations and data in memory, for a thread that may block. The transport gives the result of an action
//! to [`LogicalUnit::finish`]; a procedure returns its answer itself.
//!
//! The modules, each above those that it uses:
//!
//! - `commands`: the table of all commands: decoding, REPORT SUPPORTED OPERATION CODES and statistics use it;
//! - `transfer`, `provision`, `compare`, `copy`: commands that use the medium;
//! - `inquiry`, `mode`, `log`, `report`, `status`, `reserve`: commands that do not;
//! - `state`, `registry`, `attention`: what a logical unit remembers;
//! - `call`: a command that is carried out;
//! - `cdb`, `sense`, `answer`, `medium`: the types that all of them use.

mod answer;
mod attention;
mod call;
mod cdb;
mod commands;
mod compare;
mod copy;
mod inquiry;
mod log;
mod medium;
mod mode;
mod provision;
mod registry;
mod report;
mod reserve;
mod sense;
mod state;
mod status;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vhost_device_common::state::StateError;

pub use answer::{Answer, Response, Status};
pub use attention::Attention;
pub use medium::{
    Action, DataOut, Extent, Facts, Identity, Medium, Peer, Procedure, Provisioning, Target,
};
pub use state::Saved;

use answer::Failure;
use call::{Call, Outcome};
use cdb::Fields;
use commands::Row;
use registry::Class;
use sense::{Key, Sense, code};
use state::State;

/// An I_T nexus: the number of the initiator port, which is stable across restarts if persistent reservations are to survive them. A VIRTIO
/// driver is one initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Nexus(pub u64);

/// A command as the initiator sent it.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// The CDB, as long as the transport's field for it. It may be longer than the command.
    pub cdb: &'a [u8],
    /// Who sent it.
    pub nexus: Nexus,
    /// Bytes of the data-out buffer.
    pub data_out: u64,
    /// Bytes of the data-in buffer.
    pub data_in: u64,
}

/// What the transport does next for a command.
pub enum Step {
    /// Send the answer.
    Done(Answer),
    /// Carry the action out, then call [`LogicalUnit::finish`].
    Action(Action),
    /// Call [`Procedure::run`] in a thread that may block, then send the answer.
    Procedure(Procedure),
}

/// A logical unit. Requests of all queues share it.
pub struct LogicalUnit {
    facts: Facts,
    /// Logical blocks.
    blocks: AtomicU64,
    state: State,
    /// Held while persistent reservations change.
    registering: Mutex<()>,
    /// What WRITE BUFFER has stored for READ BUFFER.
    echo: status::Echo,
}

impl LogicalUnit {
    /// The names of the kinds of commands, for statistics. The last one counts those that have no kind of their own.
    pub const COMMANDS: &'static [&'static str] = commands::KINDS;

    /// Creates a logical unit of `blocks` logical blocks. Each initiator finds the unit attention 29/01 (power on).
    pub fn new(facts: Facts, blocks: u64) -> Self {
        Self {
            facts,
            blocks: AtomicU64::new(blocks),
            state: State::new(),
            registering: Mutex::default(),
            echo: status::Echo::default(),
        }
    }

    /// Returns the index of the kind of a command in [`LogicalUnit::COMMANDS`].
    pub fn kind(cdb: &[u8]) -> usize {
        commands::kind(Fields(cdb)) as usize
    }

    /// Checks `command` and returns the next step. Parameter lists are read from `data` at once; their length is bounded. Never blocks.
    pub fn start(
        self: &Arc<Self>,
        command: &Command<'_>,
        data: &mut dyn DataOut,
        target: &Arc<dyn Target>,
    ) -> Step {
        match self.decode(command, data, target) {
            Ok(step) => step,
            Err(failure) => Step::Done(self.answer(Err(failure))),
        }
    }

    fn decode(
        self: &Arc<Self>,
        command: &Command<'_>,
        data: &mut dyn DataOut,
        target: &Arc<dyn Target>,
    ) -> Outcome {
        let cdb = Fields(command.cdb);
        let row = commands::find(cdb, &self.facts);
        if !self.state.is_quiet(command.nexus) {
            self.check(command.nexus, row.ok())?;
        }
        let row = row?;
        let control = row.usage.len();
        if cdb.bit(control, 2) {
            // NACA: there is no auto contingent allegiance.
            return Err(Sense::cdb_bit(control as u16, 2).into());
        }
        if row.writes() {
            self.check_writable()?;
        }
        (row.run)(&mut Call {
            unit: self,
            command,
            cdb,
            data,
            target,
        })
    }

    /// Checks what keeps an initiator from sending a command: unit attentions, reservations, a medium that is not there.
    fn check(&self, nexus: Nexus, row: Option<&Row>) -> Result<(), Failure> {
        self.state.with_nexus(nexus, |saved| {
            if !row.is_some_and(Row::asks_for_copies) {
                saved.forget_copy(nexus);
            }
            if !row.is_some_and(Row::ignores_attentions)
                && let Some(attention) = saved.take_attention(nexus)
            {
                return Err(attention.sense().into());
            }
            let class = row.map_or(Class::Report, |row| row.class);
            allows(saved, nexus, class)?;
            match saved.ejected && row.is_some_and(Row::needs_medium) {
                true => Err(Sense::new(Key::NotReady, code::MEDIUM_NOT_PRESENT).into()),
                false => Ok(()),
            }
        })
    }

    /// Checks that reservations let `nexus` send a command of this class.
    fn check_class(&self, nexus: Nexus, class: Class) -> Result<(), Failure> {
        self.state.with(|saved| allows(saved, nexus, class))
    }

    /// Checks that the medium can be written.
    fn check_writable(&self) -> Result<(), Failure> {
        let code = if self.facts.read_only {
            code::WRITE_PROTECTED
        } else if self.state.is_write_protected() {
            code::SOFTWARE_WRITE_PROTECTED
        } else {
            return Ok(());
        };
        Err(Sense::new(Key::DataProtect, code).into())
    }

    /// Returns the answer of a command.
    fn answer(&self, outcome: Result<Answer, Failure>) -> Answer {
        outcome.unwrap_or_else(|failure| failure.answer(self.state.has_descriptors()))
    }

    /// Returns the answer of an action that has ended. An error becomes sense data with the first block that was not done: `moved` bytes
    /// were moved before it.
    pub fn finish(&self, action: &Action, outcome: io::Result<()>, moved: u64) -> Answer {
        let Err(error) = outcome else {
            return Answer::good();
        };
        let (offset, is_read) = match action {
            Action::Read { offset, .. } => (Some(*offset), true),
            Action::Write { offset, .. } => (Some(*offset), false),
            Action::Zero { range, .. } => (Some(range.start), false),
            Action::Flush | Action::Unmap(_) => (None, false),
        };
        let offset = offset.map(|offset| offset.saturating_add(moved));
        self.answer(Err(self.medium_failure(&error, offset, is_read).into()))
    }

    /// Returns the sense data for an error of the medium at `offset`.
    fn medium_failure(&self, error: &io::Error, offset: Option<u64>, is_read: bool) -> Sense {
        use io::ErrorKind::{
            Interrupted, OutOfMemory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem,
            StorageFull, WouldBlock,
        };
        let sense = match error.kind() {
            Interrupted => return Sense::new(Key::AbortedCommand, code::NONE),
            OutOfMemory | WouldBlock => {
                return Sense::new(Key::AbortedCommand, code::INTERNAL_FAILURE);
            }
            StorageFull | QuotaExceeded => {
                Sense::new(Key::DataProtect, code::SPACE_ALLOCATION_FAILED)
            }
            PermissionDenied | ReadOnlyFilesystem if !is_read => {
                Sense::new(Key::DataProtect, code::WRITE_PROTECTED)
            }
            _ if is_read => Sense::new(Key::MediumError, code::UNRECOVERED_READ_ERROR),
            _ => Sense::new(Key::MediumError, code::WRITE_ERROR),
        };
        match offset {
            Some(offset) => sense.with_information(offset / u64::from(self.facts.block_size)),
            None => sense,
        }
    }

    /// Turns an error of the medium at `offset` into a failure.
    fn check_medium(
        &self,
        outcome: io::Result<()>,
        offset: u64,
        is_read: bool,
    ) -> Result<(), Failure> {
        outcome.map_err(|error| self.medium_failure(&error, Some(offset), is_read).into())
    }

    /// Returns the answer to a command for a logical unit that its target does not have. The target itself is there.
    pub fn absent(command: &Command<'_>, target: &dyn Target) -> Answer {
        report::without_unit(command, target, report::ABSENT)
    }

    /// Returns the answer to a command for the well-known logical unit of REPORT LUNS (LUN C1 01).
    pub fn report_luns(command: &Command<'_>, target: &dyn Target) -> Answer {
        report::without_unit(command, target, report::WELL_KNOWN)
    }

    /// Returns what does not change.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Returns the number of logical blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    /// Sets the number of logical blocks. If it has changed, initiators find the unit attention 2A/09.
    pub fn set_blocks(&self, blocks: u64) {
        if self.blocks.swap(blocks, Ordering::Relaxed) != blocks {
            self.attend(Attention::CapacityChanged);
        }
    }

    /// Adds a unit attention for all initiators that were seen.
    pub fn attend(&self, attention: Attention) {
        self.state
            .with(|saved| saved.attend_others(None, attention));
    }

    /// Resets the logical unit (LOGICAL UNIT RESET, or a reset of the device): mode pages go back to their defaults, RESERVE and PREVENT
    /// ALLOW MEDIUM REMOVAL end, initiators find the unit attention 29/03. Persistent reservations stay. The transport has ended all
    /// commands before.
    pub fn reset(&self) {
        self.state.with(|saved| {
            saved.modes = state::Modes::default();
            saved.reserved = None;
            saved.preventing.clear();
            saved.copied = None;
            saved.attend_others(None, Attention::Reset);
        });
    }

    /// Ends what belongs to an I_T nexus (I_T NEXUS RESET): its RESERVE, and its PREVENT ALLOW MEDIUM REMOVAL. It finds the unit attention
    /// 29/07.
    pub fn nexus_lost(&self, nexus: Nexus) {
        self.state.with(|saved| {
            saved.reserved = saved.reserved.filter(|holder| *holder != nexus);
            saved.prevent(nexus, false);
            saved.forget_copy(nexus);
            saved.attend(nexus, Attention::NexusLoss);
        });
    }

    /// Returns what a migration takes along: unit attentions, mode pages, reservations, removal of the medium.
    pub fn save(&self) -> Saved {
        self.state.with(|saved| saved.clone())
    }

    /// Replaces the state.
    ///
    /// # Errors
    /// No logical unit saves such a state.
    pub fn load(&self, saved: Saved) -> Result<(), StateError> {
        saved.check().map_err(StateError::Contents)?;
        self.state.with(|current| *current = saved);
        Ok(())
    }

    /// Takes over persistent reservations that [`Target::store`] has stored before a restart. The transport calls it once, at the start.
    ///
    /// # Errors
    /// They were not stored by this program, or by a newer version of it.
    pub fn load_reservations(&self, stored: &[u8]) -> Result<(), StateError> {
        reserve::load(self, stored)
    }
}

/// Checks that reservations let `nexus` send a command of this class.
fn allows(saved: &Saved, nexus: Nexus, class: Class) -> Result<(), Failure> {
    let is_reserved = saved.reserved.is_some_and(|holder| holder != nexus);
    match is_reserved && class != Class::Free || !saved.registry.allows(nexus, class) {
        true => Err(Failure::Conflict),
        false => Ok(()),
    }
}
