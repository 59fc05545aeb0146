// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device server of one logical unit: SPC-5 and SBC-4 commands for a direct access block device (SAM-6).
//!
//! This folder has no I/O of its own. A transport hands each command to [`LogicalUnit::start`], which checks it and returns the next
//! [`Step`]: an answer that is complete, an [`Action`] on the medium that the transport carries out between guest memory and the disk, or a
//! [`Procedure`] that needs several operations and data in memory, for a thread that may block. The transport gives the result of an action
//! to [`LogicalUnit::finish`]; a procedure returns its answer itself.
//!
//! The rooms, each above those that it uses:
//!
//! - `commands`: the table of all commands: decoding, REPORT SUPPORTED OPERATION CODES and statistics use it;
//! - `transfer`, `provision`, `compare`, `copy`: commands that use the medium;
//! - `inquiry`, `mode`, `log`, `report`, `status`, `reserve`: commands that do not;
//! - `state`, `attention`, `registry`: what a logical unit remembers;
//! - `cdb`, `sense`, `answer`, `medium`: the types that all of them use.

mod answer;
mod attention;
mod medium;
mod sense;

use std::io;
use std::sync::Arc;

pub use answer::{Answer, Response, Status};
pub use attention::Attention;
pub use medium::{
    Action, DataOut, Extent, Facts, Identity, Medium, Peer, Procedure, Provisioning, Target,
};
pub use sense::Sense;

/// An I_T nexus: the number of the initiator port, which is stable across restarts if persistent reservations are to survive them. A VIRTIO
/// driver is one initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
}

impl LogicalUnit {
    /// Creates a logical unit of `blocks` logical blocks. Each nexus finds the unit attention 29/01 (power on).
    pub fn new(facts: Facts, blocks: u64) -> Self {
        let _ = blocks;
        Self { facts }
    }

    /// The names of all commands, for statistics. The last one counts those that are not supported.
    pub const COMMANDS: &'static [&'static str] = &["other"];

    /// Returns the index of the command in [`LogicalUnit::COMMANDS`], for statistics.
    pub fn kind(cdb: &[u8]) -> usize {
        let _ = cdb;
        0
    }

    /// Checks `command` and returns the next step. Parameter lists are read from `data` at once; their length is bounded. Never blocks.
    pub fn start(
        self: &Arc<Self>,
        command: &Command<'_>,
        data: &mut dyn DataOut,
        target: &dyn Target,
    ) -> Step {
        let _ = (command, data, target);
        Step::Done(Answer::good())
    }

    /// Makes the answer of an action that has ended. An error becomes a medium error, with the first block of the action in its sense data;
    /// `moved` bytes were moved before it.
    pub fn finish(&self, action: &Action, outcome: io::Result<()>, moved: u64) -> Answer {
        let _ = (action, outcome, moved);
        Answer::good()
    }

    /// Returns the answer to a command for a logical unit that its target, which exists, does not have. Such commands do not change
    /// anything.
    pub fn absent(command: &Command<'_>, target: &dyn Target) -> Answer {
        let _ = (command, target);
        Answer::good()
    }

    /// Sets the number of logical blocks. Initiators find the unit attention 2A/09 if it has changed.
    pub fn set_blocks(&self, blocks: u64) {
        let _ = blocks;
    }

    /// Returns the number of logical blocks.
    pub fn blocks(&self) -> u64 {
        0
    }

    /// Returns what does not change.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Adds a unit attention for all initiators.
    pub fn attend(&self, attention: Attention) {
        let _ = attention;
    }

    /// Resets the logical unit (LOGICAL UNIT RESET, or a reset of the device): mode pages go back to their defaults, a RESERVE(6) and
    /// PREVENT ALLOW MEDIUM REMOVAL end, initiators find the unit attention 29/03. Persistent reservations stay. The transport has ended all
    /// commands before.
    pub fn reset(&self) {}

    /// Ends what belongs to an I_T nexus (I_T NEXUS RESET): its RESERVE(6) and its PREVENT ALLOW MEDIUM REMOVAL.
    pub fn nexus_lost(&self, nexus: Nexus) {
        let _ = nexus;
    }

    /// Returns what a migration takes along: unit attentions, mode pages, reservations, removal of the medium.
    pub fn save(&self) -> Saved {
        Saved {}
    }

    /// Replaces the state. Values that no logical unit saves are refused.
    ///
    /// # Errors
    /// What is wrong, for [`StateError::Contents`](vhost_device_common::device::StateError::Contents).
    pub fn load(&self, saved: Saved) -> Result<(), &'static str> {
        let _ = saved;
        Ok(())
    }

    /// Takes over persistent reservations that [`Target::store`] has stored before a restart. The transport calls it once, at the start.
    ///
    /// # Errors
    /// What is wrong.
    pub fn load_reservations(&self, stored: &[u8]) -> Result<(), &'static str> {
        let _ = stored;
        Ok(())
    }
}

/// The state that a migration takes along. It is encoded by serde (postcard).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Saved {}
