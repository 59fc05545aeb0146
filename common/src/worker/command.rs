// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the session to a worker.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::call_file::CallFile;
use super::error::WorkerError;
use super::queue::{Queue, Stopped};
use crate::memory::GuestMemory;

/// The answer to a command.
#[derive(Debug)]
pub enum Answer {
    /// The command is done.
    Done,
    /// The answer to [`Command::Stop`], for a queue of this worker.
    Stopped(Stopped),
    /// The answer to [`Command::Base`], for a queue of this worker.
    Base(u32),
    /// The answer to [`Command::IsIdle`].
    Idle(bool),
}

/// A command of the session; the methods of [`Worker`](super::Worker) describe each.
pub enum Command {
    Start(Box<Queue>, Option<Arc<OwnedFd>>),
    Stop(u16),
    Suspend(u16),
    Base(u16),
    Enable(u16, bool),
    Kick(u16, Option<Arc<OwnedFd>>),
    Call(u16, Option<Arc<CallFile>>),
    Error(u16, Option<Arc<CallFile>>),
    UsedLog(u16, Option<u64>),
    Memory(Arc<GuestMemory>),
    /// Asks whether no operation of a suspended request is in flight.
    IsIdle,
    Quit,
}

/// A command, and where its answer goes.
pub struct Request {
    pub command: Command,
    pub reply: Sender<Result<Answer, WorkerError>>,
}
