// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A connected display: what it was asked, and how its answers settle that.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll;
use rustix::io::Errno;
use thiserror::Error;
use vhost_device_common::info_limited;
use zerocopy::FromBytes;

use super::message::{FEATURE_DMABUF2, FEATURE_EDID, Query};
use super::outgoing::Outgoing;

/// Questions that wait for their answers at most: a display that answers none is not asked more.
pub const MAX_ASKED: usize = 64;

/// Why a display is given up.
#[derive(Debug, Error)]
pub enum DisplayError {
    #[error("it is closed")]
    Closed,
    #[error("it sent what is no answer to {0:?}")]
    Answer(Option<Query>),
    #[error("{0}")]
    System(#[from] Errno),
    #[error("its picture is gone")]
    Resource,
}

/// A connected display.
#[derive(Debug)]
pub struct Link {
    pub socket: UnixStream,
    /// What it can do is known.
    pub ready: bool,
    pub features: u64,
    /// It is to be told which of its features are used.
    pub agrees: bool,
    /// The message that is being sent.
    pub outgoing: Option<Outgoing>,
    /// The question to ask next.
    pub question: Option<Query>,
    /// The questions that were asked. Answers come in this order, so that one which comes settles those before it.
    pub asked: VecDeque<Query>,
    /// What has come of the next answer.
    pub answer: Vec<u8>,
    /// Whether to be told when there is room for more.
    pub watches_room: bool,
    /// It did nothing for so long that nobody waits for it, until it does something.
    pub stalled: bool,
    /// It answered nothing for so long that no question waits for it, until it answers one.
    pub silent: bool,
}

impl Link {
    /// A display that is to be asked for its features, and then perhaps something else.
    pub fn new(socket: UnixStream, question: Option<Query>) -> Self {
        let mut link = Self {
            socket,
            ready: false,
            features: 0,
            agrees: false,
            outgoing: None,
            question,
            asked: VecDeque::new(),
            answer: Vec::new(),
            watches_room: true,
            stalled: false,
            silent: false,
        };
        link.outgoing = Some(link.ask(Query::ProtocolFeatures));
        link
    }

    /// Whether it can answer this, by its features.
    pub fn can_answer(&self, query: Query) -> bool {
        !matches!(query, Query::Edid { .. }) || self.features & FEATURE_EDID != 0
    }

    /// The message that asks something. After what displays may leave unanswered comes a question that they all answer.
    pub fn ask(&mut self, query: Query) -> Outgoing {
        let mut bytes = query.message();
        self.asked.push_back(query);
        if matches!(query, Query::ProtocolFeatures | Query::Edid { .. }) {
            bytes.extend(Query::DisplayInfo.message());
            self.asked.push_back(Query::DisplayInfo);
        }
        Outgoing::bytes(bytes)
    }

    /// Whether it is, or will be, asked this.
    pub fn is_asking(&self, query: Query) -> bool {
        self.question == Some(query) || self.asked.contains(&query)
    }

    /// Whether it has yet to show a part of a buffer.
    pub fn is_showing(&self) -> bool {
        let mut asked = self.asked.iter();
        asked.any(|query| matches!(query, Query::Shown { .. }))
    }

    /// The question that an answer with this header is to.
    pub fn place(&self, header: &[u8]) -> Result<(usize, Query), DisplayError> {
        let mut asked = self.asked.iter().copied().enumerate();
        asked
            .find(|(_, query)| query.is_answered_by(header))
            .ok_or_else(|| DisplayError::Answer(self.asked.front().copied()))
    }

    /// One of the questions has its answer, and those before it will have none.
    pub fn settle(&mut self, index: usize, answer: &[u8]) {
        self.silent &= matches!(self.asked.get(index), Some(Query::Shown { .. }));
        for query in self.asked.drain(..=index) {
            if query != Query::ProtocolFeatures {
                continue;
            }
            if index == 0 {
                let features = u64::read_from_bytes(answer).unwrap_or(0);
                self.features = features & (FEATURE_EDID | FEATURE_DMABUF2);
                self.agrees = true;
            }
            self.ready = true;
            info_limited(format_args!("a display is connected"));
        }
    }

    /// Asks to be told when there is room for more, or not to be.
    pub fn watch_room(&mut self, events: &OwnedFd, wanted: bool) -> Result<(), Errno> {
        if self.watches_room != wanted {
            self.watches_room = wanted;
            let mut flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
            flags.set(epoll::EventFlags::OUT, wanted);
            epoll::modify(events, &self.socket, epoll::EventData::new_u64(0), flags)?;
        }
        Ok(())
    }
}

/// Has a display's socket watched.
pub fn watch(events: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::OUT;
    Ok(epoll::add(
        events,
        socket,
        epoll::EventData::new_u64(0),
        flags,
    )?)
}
