// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The faults that are injected.

use std::fmt;

/// A fault of a device under load. Faults are named after the messages and signals that cause them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A ring stops, and starts where it stopped.
    GetVringBase,
    /// A ring is disabled for a while.
    SetVringEnable,
    /// The eventfds of a running ring are sent again.
    SetVringKick,
    /// The device is kicked without requests.
    Kick,
    /// The device is reset.
    ResetDevice,
    /// All rings stop, and the driver starts again, as QEMU resets most devices.
    DriverReset,
    /// Memory is added.
    AddMemReg,
    /// Memory is removed while requests point to it.
    RemMemReg,
    /// The memory table is replaced, with or without the memory that is removable.
    SetMemTable,
    /// Logging of dirty pages starts, moves to another log, or stops.
    SetLogBase,
    /// All rings stop, and the front-end connects again.
    Reconnect,
    /// The front-end disconnects without GET_VRING_BASE, and another one takes over.
    Vanish,
    /// The process receives SIGTERM, and another one is started.
    Sigterm,
    /// The process is killed, and another one is started.
    Sigkill,
    /// The state is saved, and loaded by another process, or over another connection.
    DeviceState,
    /// Other clients connect meanwhile, and send garbage.
    Garbage,
    /// Another display.
    GpuSetSocket,
    /// A display that reads slowly.
    SlowDisplay,
    /// A display that does not read for a while.
    StuckDisplay,
    /// A display that does not answer.
    SilentDisplay,
    /// A display that disconnects.
    LostDisplay,
}

impl Fault {
    /// Faults that the process survives.
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

    /// Faults that end the process.
    pub const DEADLY: &[Self] = &[Self::Sigterm, Self::Sigkill, Self::Sigkill, Self::Sigkill];

    /// Faults of displays.
    pub const DISPLAY: &[Self] = &[
        Self::GpuSetSocket,
        Self::SlowDisplay,
        Self::StuckDisplay,
        Self::SilentDisplay,
        Self::LostDisplay,
    ];
}

impl Fault {
    /// Returns whether the driver starts again after it, with no earlier state.
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
