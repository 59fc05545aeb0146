// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Completes commands in order: at once or, if they are fenced, when the renderer has finished them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vhost_device_common::chain::Chain;
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::Queue;
use zerocopy::IntoBytes;

use crate::protocol::{CommandError, Header, Response};
use crate::three_d::ThreeD;

/// How long a display or renderer may make no progress before the device continues without it.
pub const TIMEOUT: Duration = Duration::from_secs(1);

/// A command whose response has not been written.
pub struct Command {
    pub chain: Chain,
    pub header: Header,
}

impl Command {
    fn respond(mut self, response: &Response) -> Responded {
        let mut kind = response.kind;
        let mut body = response.body.as_slice();
        if self.chain.writable_len() < (size_of::<Header>() + body.len()) as u64 {
            // The driver did not leave enough room for the response.
            (kind, body) = (CommandError::InvalidParameter as u32, &[]);
        }
        let head = self.header.response(kind);
        let outcome = self.chain.write(head.as_bytes());
        let outcome = outcome.and_then(|()| self.chain.write(body));
        let written = outcome.map_or(0, |()| size_of::<Header>() + body.len());
        Responded {
            chain: self.chain,
            written: written as u32,
            failed: kind >= CommandError::Unspecified as u32,
        }
    }
}

/// A command that has been executed and whose response waits for a fence of the renderer. Later commands are executed,
/// but their fences do not signal before this one.
struct Fenced {
    command: Command,
    response: Response,
    /// The renderer's fence that it waits for.
    fence: u32,
}

impl Fenced {
    fn respond(self) -> Responded {
        self.command.respond(&self.response)
    }
}

/// A command whose response has been written.
struct Responded {
    chain: Chain,
    /// Size of the response in bytes.
    written: u32,
    /// Whether the response is an error.
    failed: bool,
}

/// The commands that have been executed and not returned to the driver.
#[derive(Default)]
pub struct Completions {
    fenced: VecDeque<Fenced>,
    /// Commands to return to the driver.
    responded: Vec<Responded>,
}

impl Completions {
    /// Completes a command that has been executed: immediately or, if it is fenced, once the renderer has finished it
    /// and all commands before it.
    pub fn finish(&mut self, three_d: Option<&mut ThreeD>, command: Command, response: Response) {
        if command.header.is_fenced() {
            let last = self.fenced.back().map(|fenced| fenced.fence);
            let fence = match three_d.and_then(ThreeD::started_renderer) {
                Some(renderer) if command.header.is_3d() => renderer.create_fence().ok().or(last),
                _ => last,
            };
            if let Some(fence) = fence {
                return self.fenced.push_back(Fenced {
                    command,
                    response,
                    fence,
                });
            }
        }
        self.responded.push(command.respond(&response));
    }

    /// Completes the commands whose fences have signalled.
    pub fn retire_fences(&mut self, three_d: Option<&mut ThreeD>, queue: &mut Queue) {
        let Some(three_d) = three_d.filter(|_| !self.fenced.is_empty()) else {
            return;
        };
        let done = three_d.poll();
        // Fence numbers wrap around.
        let is_done = |fenced: &Fenced| done.wrapping_sub(fenced.fence) as i32 >= 0;
        let before = self.fenced.len();
        while self.fenced.front().is_some_and(is_done)
            && let Some(fenced) = self.fenced.pop_front()
        {
            self.responded.push(fenced.respond());
        }
        if !self.fenced.is_empty() {
            three_d.expect_fence();
        }
        if self.fenced.len() < before {
            self.complete(queue);
        }
    }

    /// Waits for the renderer, for at most [`TIMEOUT`], and completes all fenced commands.
    pub fn wait_for_fences(&mut self, three_d: Option<&mut ThreeD>, queue: &mut Queue) {
        let Some(three_d) = three_d else { return };
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.retire_fences(Some(&mut *three_d), queue);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.fenced.is_empty() {
                return;
            }
            if left.is_zero() {
                break;
            }
            let mut fences = [PollFd::from_borrowed_fd(three_d.poll_fd(), PollFlags::IN)];
            let _ = poll(&mut fences, left.try_into().ok().as_ref());
        }
        warn_limited(format_args!(
            "renderer unresponsive for 1 s; continuing without it"
        ));
        let fenced = self.fenced.drain(..);
        self.responded.extend(fenced.map(Fenced::respond));
    }

    /// Returns all commands whose responses have been written to the driver.
    pub fn complete(&mut self, queue: &mut Queue) {
        for responded in self.responded.drain(..) {
            complete(queue, responded.chain, responded.written, responded.failed);
        }
    }
}

/// Returns a command to the driver, with a response of `written` bytes.
pub fn complete(queue: &mut Queue, chain: Chain, written: u32, failed: bool) {
    let outcome = Outcome {
        bytes: written.into(),
        failed,
        ..Outcome::default()
    };
    queue.complete_with(chain, written, outcome);
}
