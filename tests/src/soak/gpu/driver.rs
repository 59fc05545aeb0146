// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a GPU under load: one command at a time, which may still be in flight when a fault is injected.

use std::time::{Duration, Instant};

use crate::front_end::Buffer;
use crate::front_end::gpu::{HEADER_SIZE, fenced_command, number, words};
use crate::soak::link::Link;
use crate::soak::loss::{Loss, patience};

/// Size of the longest command, and of the longest response, in bytes.
const COMMAND: u64 = 8 << 10;
const RESPONSE: u32 = 2048;
/// Bytes of the header starting with its fence.
const FENCE_AT: usize = 8;
const FENCE: u32 = 1 << 0;
/// 3D commands, which are sent in a context.
const IN_CONTEXT: std::ops::Range<u32> = 0x200..0x300;

/// The context of 3D commands.
pub const CONTEXT: u32 = 7;

/// Type and body of a response.
pub struct Response {
    pub kind: u32,
    pub body: Vec<u8>,
}

/// The driver.
pub struct Driver {
    pub link: Link,
    /// The header of a command that nobody has waited for.
    under_way: Option<(Vec<u8>, Instant)>,
    fence: u64,
    command: u64,
    response: u64,
    cursor_command: u64,
}

impl Driver {
    pub fn new(link: Link) -> Self {
        let memory = link.memory();
        let [command, response, cursor_command] = [0; 3].map(|_| memory.allocate(COMMAND, 16));
        Self {
            link,
            under_way: None,
            fence: 0,
            command,
            response,
            cursor_command,
        }
    }

    /// Forgets the command in flight, which will not return.
    pub fn forget(&mut self) {
        self.under_way = None;
    }

    /// Sends a command, after the previous one has returned.
    pub fn send(&mut self, kind: u32, body: &[u8]) -> Result<(), Loss> {
        self.finish()?;
        self.fence += 1;
        let fenced = if self.fence.is_multiple_of(2) {
            FENCE
        } else {
            0
        };
        let mut command = fenced_command(kind, fenced, self.fence, body);
        if IN_CONTEXT.contains(&kind) {
            command[16..20].copy_from_slice(&CONTEXT.to_le_bytes());
        }
        let memory = self.link.memory();
        memory.write(self.command, &command);
        memory.fill(self.response, RESPONSE as usize, 0xdd);
        let chain = [
            Buffer::readable(self.command, command.len() as u32),
            Buffer::writable(self.response, RESPONSE),
        ];
        self.link.queues[0].submit(&chain);
        self.under_way = Some((command[..HEADER_SIZE].to_vec(), Instant::now()));
        Ok(())
    }

    /// Returns the response to the command in flight, if it is there.
    pub fn receive(&mut self) -> Result<Option<Response>, Loss> {
        let Some(used) = self.link.queues[0].take_used() else {
            return Ok(None);
        };
        let Some((header, since)) = self.under_way.take() else {
            return Err(Loss(format!("{used:?} was not in flight")));
        };
        let room = Buffer::writable(self.response, RESPONSE);
        self.link.check_log(0, since, &[room], used.length)?;
        if !(HEADER_SIZE as u32..=RESPONSE).contains(&used.length) {
            return Err(Loss(format!("a response of {} bytes", used.length)));
        }
        let bytes = self
            .link
            .memory()
            .read_vec(self.response, used.length as usize);
        let word = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
        };
        let (kind, flags) = (word(&bytes, 0), word(&bytes, 4));
        let fenced = word(&header, 4) & FENCE != 0;
        if (flags & FENCE != 0) != fenced || (fenced && bytes[FENCE_AT..16] != header[FENCE_AT..16])
        {
            return Err(Loss(format!("flags {flags:#x} and fence of {header:?}")));
        }
        Ok(Some(Response {
            kind,
            body: bytes[HEADER_SIZE..].to_vec(),
        }))
    }

    /// Waits for the command that is in flight.
    pub fn finish(&mut self) -> Result<Option<Response>, Loss> {
        while let Some((_, since)) = &self.under_way {
            if since.elapsed() > patience() {
                return Err(Loss::late("a command"));
            }
            self.link.queues[0].wait_used(Duration::from_millis(100));
            if let Some(response) = self.receive()? {
                return Ok(Some(response));
            }
        }
        Ok(None)
    }

    /// Runs a command.
    pub fn run(&mut self, kind: u32, body: &[u8]) -> Result<Response, Loss> {
        self.send(kind, body)?;
        let response = self.finish()?;
        response.ok_or_else(|| Loss("no response".into()))
    }

    /// Runs a command with a known result.
    pub fn expect(&mut self, kind: u32, body: &[u32], expected: u32) -> Result<(), Loss> {
        let seen = self.run(kind, &words(body))?.kind;
        match seen == expected {
            true => Ok(()),
            false => Err(Loss(format!(
                "{seen:#x} instead of {expected:#x} for command {kind:#x} {body:?}"
            ))),
        }
    }

    /// Runs a command that must succeed without data.
    pub fn done(&mut self, kind: u32, body: &[u32]) -> Result<(), Loss> {
        self.expect(kind, body, number::OK_NODATA)
    }

    /// Runs a command of the cursor queue.
    pub fn send_cursor(&mut self, kind: u32, body: &[u32]) -> Result<(), Loss> {
        let place = self.cursor_command;
        let command = fenced_command(kind, 0, 0, &words(body));
        self.link.memory().write(place, &command);
        let queue = &mut self.link.queues[1];
        queue.submit(&[Buffer::readable(place, command.len() as u32)]);
        if !queue.wait_used(patience()) {
            return Err(Loss::late("a cursor command"));
        }
        queue.take_used();
        Ok(())
    }
}
