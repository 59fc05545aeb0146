// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The answer to a command.

use super::sense::Sense;

/// SCSI status codes (SAM-5, 5.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The command has succeeded.
    Good = 0x00,
    /// The answer has sense data.
    CheckCondition = 0x02,
    /// Another initiator has reserved the logical unit.
    ReservationConflict = 0x18,
}

/// Whether the transport could deliver the command: the `response` of virtio-scsi (VIRTIO 1.3, 5.6.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// The status says how the command ended.
    Ok,
    /// The command moves more data than its buffer has room for; nothing was done.
    Overrun,
    /// The data-out buffer cannot be read.
    Failure,
}

/// The answer to a command. The residual is what is left of the data buffers after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether the command was delivered. If not, the status is [`Status::Good`] and there is no sense data.
    pub response: Response,
    /// The status.
    pub status: Status,
    /// Sense data, in the format that the initiator has chosen; empty without CHECK CONDITION.
    pub sense: Vec<u8>,
    /// Data-in bytes, no more than the allocation length of the CDB. The transport writes as many of them as the buffer has room for.
    pub data: Vec<u8>,
}

impl Answer {
    /// Returns GOOD without data.
    pub fn good() -> Self {
        Self {
            response: Response::Ok,
            status: Status::Good,
            sense: Vec::new(),
            data: Vec::new(),
        }
    }

    /// Returns GOOD with data-in bytes.
    pub fn data(data: Vec<u8>) -> Self {
        Self {
            data,
            ..Self::good()
        }
    }
}

/// Why a command has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// CHECK CONDITION.
    Sense(Sense),
    /// RESERVATION CONFLICT.
    Conflict,
    /// The command was not delivered.
    Response(Response),
}

impl From<Sense> for Failure {
    fn from(sense: Sense) -> Self {
        Self::Sense(sense)
    }
}

impl Failure {
    /// Returns the answer, with sense data in descriptor format if `descriptors`.
    pub fn answer(self, descriptors: bool) -> Answer {
        match self {
            Self::Sense(sense) => Answer {
                status: Status::CheckCondition,
                sense: sense.to_bytes(descriptors),
                ..Answer::good()
            },
            Self::Conflict => Answer {
                status: Status::ReservationConflict,
                ..Answer::good()
            },
            Self::Response(response) => Answer {
                response,
                ..Answer::good()
            },
        }
    }
}
