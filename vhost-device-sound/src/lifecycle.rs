// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of a stream, and the states between them (VIRTIO 1.3, 5.14.6.6.1).

use serde::{Deserialize, Serialize};

/// State of a stream: the last command that it carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// None since the reset of the device.
    #[default]
    Reset,
    /// SET_PARAMS.
    Set,
    /// PREPARE: the driver fills its buffers.
    Prepared,
    /// START: the clock runs.
    Running,
    /// STOP: the buffers stay queued.
    Stopped,
    /// RELEASE: no buffer is queued.
    Released,
}

/// A command that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// VIRTIO_SND_R_PCM_SET_PARAMS.
    SetParams,
    /// VIRTIO_SND_R_PCM_PREPARE.
    Prepare,
    /// VIRTIO_SND_R_PCM_START.
    Start,
    /// VIRTIO_SND_R_PCM_STOP.
    Stop,
    /// VIRTIO_SND_R_PCM_RELEASE.
    Release,
}

impl State {
    /// Returns the state after `command`, or `None` if the command is not possible in this state.
    ///
    /// RELEASE can be repeated: Linux does so if a signal ended its wait for the first reply, and could not use the stream otherwise.
    pub fn after(self, command: Command) -> Option<Self> {
        match (self, command) {
            (Self::Reset | Self::Set | Self::Prepared | Self::Released, Command::SetParams) => {
                Some(Self::Set)
            }
            (Self::Set | Self::Prepared | Self::Released, Command::Prepare) => Some(Self::Prepared),
            (Self::Prepared | Self::Stopped, Command::Start) => Some(Self::Running),
            (Self::Running, Command::Stop) => Some(Self::Stopped),
            (Self::Prepared | Self::Stopped | Self::Released, Command::Release) => {
                Some(Self::Released)
            }
            _ => None,
        }
    }

    /// Returns whether the stream takes buffers.
    pub fn takes_buffers(self) -> bool {
        matches!(self, Self::Prepared | Self::Running | Self::Stopped)
    }

    /// Returns the name in the results of commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Set => "set",
            Self::Prepared => "prepared",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Released => "released",
        }
    }
}
