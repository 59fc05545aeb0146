// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A relay between a front-end and its back-end, for front-ends that connect only once.
//!
//! The back-end may be replaced: the relay repeats to the next one what the front-end has sent, as a VMM does that reconnects. Rings are
//! split, because only there the position of the device is in guest memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use crate::front_end::connection::{NEED_REPLY, RawConnection, Reply, VERSION};
use crate::front_end::device::RING_PACKED;
use crate::front_end::{Error, Result};

/// Time limit of a front-end that sends nothing: it is idle.
const IDLE: Duration = Duration::from_secs(3600);

/// A running relay, for one front-end.
pub struct Relay {
    back_end: PathBuf,
    state: Arc<Mutex<State>>,
}

/// The connection to the back-end.
struct State {
    back_end: RawConnection,
    /// What the front-end has sent and the next back-end must know, in order.
    sent: Vec<Reply>,
}

impl Relay {
    /// Connects to `back_end`, and listens at `path` for a front-end.
    pub fn start(path: &Path, back_end: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path)?;
        let state = State {
            back_end: RawConnection::connect(back_end)?,
            sent: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        thread::spawn(move || {
            // It ends with the front-end.
            let _ = relay(&listener, &shared);
        });
        Ok(Self {
            back_end: back_end.to_owned(),
            state,
        })
    }

    /// Connects to the back-end that listens now, and continues with it.
    pub fn replace(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.back_end = RawConnection::connect(&self.back_end)?;
        state.repeat()
    }
}

fn relay(listener: &UnixListener, state: &Mutex<State>) -> Result<()> {
    let (stream, _) = listener.accept()?;
    let mut front_end = RawConnection::from_stream(stream)?;
    front_end.set_timeout(IDLE)?;
    loop {
        let message = front_end.receive()?;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reply) = state.pass_on(message)? {
            front_end.send(
                reply.request,
                reply.flags,
                &reply.payload,
                &borrowed(&reply.fds),
            )?;
        }
    }
}

fn borrowed(files: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}

fn is(message: &Reply, request: FrontendReq) -> bool {
    message.request == u32::from(request)
}

/// Returns whether a request has a reply of its own, and need not be repeated.
fn asks(message: &Reply) -> bool {
    [
        FrontendReq::GET_FEATURES,
        FrontendReq::GET_PROTOCOL_FEATURES,
        FrontendReq::GET_QUEUE_NUM,
        FrontendReq::GET_CONFIG,
        FrontendReq::GET_VRING_BASE,
        FrontendReq::GET_MAX_MEM_SLOTS,
        FrontendReq::GET_STATUS,
    ]
    .into_iter()
    .any(|request| is(message, request))
}

fn number(bytes: &[u8], offset: usize) -> u64 {
    let field: [u8; 8] =
        std::array::from_fn(|index| bytes.get(offset + index).copied().unwrap_or(0));
    u64::from_ne_bytes(field)
}

impl State {
    /// Sends a message to the back-end. Returns its reply, if there is one.
    fn pass_on(&mut self, message: Reply) -> Result<Option<Reply>> {
        let Reply {
            request,
            flags,
            payload,
            fds,
        } = &message;
        self.back_end
            .send(*request, *flags, payload, &borrowed(fds))?;
        let has_reply = asks(&message) || flags & NEED_REPLY != 0;
        let mut reply = has_reply.then(|| self.back_end.receive()).transpose()?;
        if let Some(reply) = &mut reply
            && is(&message, FrontendReq::GET_FEATURES)
        {
            let features = number(&reply.payload, 0) & !RING_PACKED;
            reply.payload = features.to_ne_bytes().to_vec();
        }
        if !asks(&message) {
            self.sent.push(message);
        }
        Ok(reply)
    }

    /// Sends to a new back-end what the last one was sent. Rings start where the last one has stopped.
    fn repeat(&self) -> Result<()> {
        for message in &self.sent {
            let mut payload = message.payload.clone();
            if is(message, FrontendReq::SET_VRING_BASE) {
                let used = u32::from(self.used_index(number(&payload, 0) as u32)?);
                payload.splice(4.., used.to_ne_bytes());
            }
            let files = borrowed(&message.fds);
            self.back_end
                .send(message.request, VERSION, &payload, &files)?;
        }
        Ok(())
    }

    /// Returns the used index of a ring: how many requests the device has taken, if it completes them in order.
    fn used_index(&self, ring: u32) -> Result<u16> {
        let mut of_ring = self.sent.iter().filter(|message| {
            is(message, FrontendReq::SET_VRING_ADDR) && number(&message.payload, 0) as u32 == ring
        });
        let used = of_ring
            .next_back()
            .map(|message| number(&message.payload, 16));
        let mut tables = self.sent.iter();
        let table = tables.rfind(|message| is(message, FrontendReq::SET_MEM_TABLE));
        let (Some(used), Some(table)) = (used, table) else {
            return Err(Error::Malformed(format!("ring {ring} without addresses")));
        };
        for (index, file) in table.fds.iter().enumerate() {
            // After the number of regions: guest address, size, user address, offset of each.
            let field = |offset| number(&table.payload, 8 + index * 32 + offset);
            let Some(offset) = used
                .checked_sub(field(16))
                .filter(|offset| *offset < field(8))
            else {
                continue;
            };
            let mut bytes = [0; 2];
            // Behind the flags.
            File::from(file.try_clone()?).read_exact_at(&mut bytes, field(24) + offset + 2)?;
            return Ok(u16::from_le_bytes(bytes));
        }
        Err(io::Error::other(format!("ring {ring} is outside of guest memory")).into())
    }
}
