// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the session asks of a worker.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::call_file::CallFile;
use super::error::WorkerError;
use super::queue::{Queue, Stopped};
use crate::memory::GuestMemory;

/// What it answers.
#[derive(Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// To `Stop`, for a queue that the worker has.
    Stopped(Stopped),
    /// To `Base`, for a queue that the worker has.
    Base(u32),
    /// To `IsIdle`.
    Idle(bool),
}

/// What the session asks of a worker.
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
    /// Whether no operation of a suspended request is under way.
    IsIdle,
    Quit,
}

pub struct Request {
    pub command: Command,
    pub reply: Sender<Result<Answer, WorkerError>>,
}
