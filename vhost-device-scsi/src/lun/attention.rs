// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unit attention conditions (SAM-6, 5.14).

use serde::{Deserialize, Serialize};

use super::sense::{Key, Sense, code};

/// What an initiator is told before its next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attention {
    /// The program has started.
    PowerOn,
    /// The logical unit was reset by a task management function or by the bus.
    Reset,
    /// The I_T nexus was reset.
    NexusLoss,
    /// The medium was removed and loaded again.
    MediumChanged,
    /// MODE SELECT of another initiator.
    ModeChanged,
    /// The persistent reservation was removed by another initiator.
    ReservationsPreempted,
    /// The persistent reservation was released by another initiator.
    ReservationsReleased,
    /// The registration was removed by another initiator.
    RegistrationsPreempted,
    /// The medium has another size.
    CapacityChanged,
    /// The target has other logical units.
    LunsChanged,
}

impl Attention {
    /// Returns ASC in the upper byte and ASCQ in the lower one.
    pub fn code(self) -> u16 {
        match self {
            Self::PowerOn => code::POWER_ON,
            Self::Reset => code::DEVICE_RESET,
            Self::NexusLoss => code::NEXUS_LOSS,
            Self::MediumChanged => code::MEDIUM_CHANGED,
            Self::ModeChanged => code::MODE_CHANGED,
            Self::ReservationsPreempted => code::RESERVATIONS_PREEMPTED,
            Self::ReservationsReleased => code::RESERVATIONS_RELEASED,
            Self::RegistrationsPreempted => code::REGISTRATIONS_PREEMPTED,
            Self::CapacityChanged => code::CAPACITY_CHANGED,
            Self::LunsChanged => code::LUNS_CHANGED,
        }
    }

    /// Returns the sense data that reports it.
    pub fn sense(self) -> Sense {
        Sense::new(Key::UnitAttention, self.code())
    }

    /// Returns whether a reset happened, which replaces all that was to be reported before.
    pub fn is_reset(self) -> bool {
        matches!(self, Self::PowerOn | Self::Reset)
    }
}
