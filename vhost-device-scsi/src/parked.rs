// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that wait for something other than an operation: for a limit, for other tasks, for a reset, for an image, or for room.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::request::{Request, Stage};
use crate::unit::Unit;

/// The requests of a thread that wait, in the order in which they came. There are no more than its rings have.
#[derive(Default)]
pub struct Parked(VecDeque<Request>);

impl Parked {
    /// Adds a request whose next stage is `stage`.
    pub fn add(&mut self, mut request: Request, stage: Stage) {
        request.stage = stage;
        self.keep(request);
    }

    /// Adds a request that goes on waiting.
    pub fn keep(&mut self, request: Request) {
        self.0.push_back(request);
    }

    /// Takes all requests.
    pub fn take(&mut self) -> VecDeque<Request> {
        std::mem::take(&mut self.0)
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a request of this queue waits for a limit of this unit.
    pub fn has_limited(&self, queue: u16, unit: &Arc<Unit>) -> bool {
        self.0.iter().any(|request| {
            request.queue == queue
                && Arc::ptr_eq(&request.unit, unit)
                && matches!(
                    request.stage,
                    Stage::Limited(_) | Stage::LimitedProcedure(_)
                )
        })
    }
}
