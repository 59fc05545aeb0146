// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The faults that are injected.

use std::fmt;

/// What happens to a device under load. Names are those of the messages and signals that bring it about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A ring stops, and starts where it stopped.
    GetVringBase,
    /// A ring is disabled for a while.
    SetVringEnable,
    /// The eventfds of a ring that runs are sent again.
    SetVringKick,
    /// The device is kicked for nothing.
    Kick,
    /// The device starts again.
    ResetDevice,
    /// All rings stop, and the driver starts again, as QEMU resets most devices.
    DriverReset,
    /// Memory comes.
    AddMemReg,
    /// Memory goes while requests point to it.
    RemMemReg,
    /// Another table of memory, with or without what comes and goes.
    SetMemTable,
    /// Dirty pages are logged from now on, or in another log, or not any more.
    SetLogBase,
    /// All rings stop, and the front-end connects again.
    Reconnect,
    /// The front-end goes without GET_VRING_BASE, and another one takes over.
    Vanish,
    /// The process is asked to end, and another one started.
    Sigterm,
    /// The process is killed, and another one started.
    Sigkill,
    /// The state is saved, and loaded by another process, or over another connection.
    DeviceState,
    /// Others connect meanwhile, and send nonsense.
    Garbage,
    /// Another display.
    GpuSetSocket,
    /// A display that reads slowly.
    SlowDisplay,
    /// A display that does not read for a while.
    StuckDisplay,
    /// A display that answers no question.
    SilentDisplay,
    /// A display that goes.
    LostDisplay,
}

impl Fault {
    /// Those that a device survives.
    pub const COMMON: &[Self] = &[
        Self::GetVringBase,
        Self::GetVringBase,
        Self::SetVringEnable,
        Self::SetVringKick,
        Self::Kick,
        Self::ResetDevice,
        Self::DriverReset,
        Self::AddMemReg,
        Self::AddMemReg,
        Self::RemMemReg,
        Self::RemMemReg,
        Self::SetMemTable,
        Self::SetMemTable,
        Self::SetLogBase,
        Self::SetLogBase,
        Self::Reconnect,
        Self::Vanish,
        Self::DeviceState,
        Self::Garbage,
    ];

    /// Those that it does not.
    pub const DEADLY: &[Self] = &[Self::Sigterm, Self::Sigkill, Self::Sigkill, Self::Sigkill];

    /// Those of displays.
    pub const DISPLAY: &[Self] = &[
        Self::GpuSetSocket,
        Self::SlowDisplay,
        Self::StuckDisplay,
        Self::SilentDisplay,
        Self::LostDisplay,
    ];
}

impl Fault {
    /// Returns whether the driver starts again by it: what it was told before does not count.
    pub fn is_reset(self) -> bool {
        matches!(self, Self::ResetDevice | Self::DriverReset)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::GetVringBase => "GET_VRING_BASE, and on",
            Self::SetVringEnable => "SET_VRING_ENABLE 0 and 1",
            Self::SetVringKick => "SET_VRING_KICK, CALL and ERR in operation",
            Self::Kick => "kicks for nothing",
            Self::ResetDevice => "RESET_DEVICE",
            Self::DriverReset => "reset by GET_VRING_BASE",
            Self::AddMemReg => "ADD_MEM_REG",
            Self::RemMemReg => "REM_MEM_REG",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetLogBase => "SET_LOG_BASE: begun, replaced, ended",
            Self::Reconnect => "front-end connects again",
            Self::Vanish => "front-end gone without GET_VRING_BASE",
            Self::Sigterm => "SIGTERM, and another process",
            Self::Sigkill => "SIGKILL, and another process",
            Self::DeviceState => "SET_DEVICE_STATE_FD, save and load",
            Self::Garbage => "connections with nonsense",
            Self::GpuSetSocket => "GPU_SET_SOCKET",
            Self::SlowDisplay => "slow display",
            Self::StuckDisplay => "display that does not read",
            Self::SilentDisplay => "display that does not answer",
            Self::LostDisplay => "display gone",
        })
    }
}
