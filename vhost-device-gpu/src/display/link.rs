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
pub const MAX_SENT_QUERIES: usize = 64;

/// Why a display is given up.
#[derive(Debug, Error)]
pub enum DisplayError {
    #[error("it is closed")]
    Closed,
    #[error("it sent what is no reply to {0:?}")]
    Reply(Option<Query>),
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
    pub must_set_features: bool,
    /// The message that is being sent.
    pub outgoing: Option<Outgoing>,
    /// The question to ask next.
    pub next_query: Option<Query>,
    /// The questions that were asked. Answers come in this order, so that one which comes settles those before it.
    pub sent_queries: VecDeque<Query>,
    /// What has come of the next answer.
    pub reply: Vec<u8>,
    /// Whether to be told when there is room for more.
    pub watches_writable: bool,
    /// It did nothing for so long that nobody waits for it, until it does something.
    pub stalled: bool,
    /// It answered nothing for so long that no question waits for it, until it answers one.
    pub silent: bool,
}

impl Link {
    /// A display that is to be asked for its features, and then perhaps something else.
    pub fn new(socket: UnixStream, next_query: Option<Query>) -> Self {
        let mut link = Self {
            socket,
            ready: false,
            features: 0,
            must_set_features: false,
            outgoing: None,
            next_query,
            sent_queries: VecDeque::new(),
            reply: Vec::new(),
            watches_writable: true,
            stalled: false,
            silent: false,
        };
        link.outgoing = Some(link.query_message(Query::ProtocolFeatures));
        link
    }

    /// Whether it can answer this, by its features.
    pub fn can_reply(&self, query: Query) -> bool {
        !matches!(query, Query::Edid { .. }) || self.features & FEATURE_EDID != 0
    }

    /// The message that asks something. After what displays may leave unanswered comes a question that they all answer.
    pub fn query_message(&mut self, query: Query) -> Outgoing {
        let mut bytes = query.message();
        self.sent_queries.push_back(query);
        if matches!(query, Query::ProtocolFeatures | Query::Edid { .. }) {
            bytes.extend(Query::DisplayInfo.message());
            self.sent_queries.push_back(Query::DisplayInfo);
        }
        Outgoing::bytes(bytes)
    }

    /// Whether it is, or will be, asked this.
    pub fn has_query(&self, query: Query) -> bool {
        self.next_query == Some(query) || self.sent_queries.contains(&query)
    }

    /// Whether it has yet to show a part of a buffer.
    pub fn awaits_dmabuf_update(&self) -> bool {
        let mut sent_queries = self.sent_queries.iter();
        sent_queries.any(|query| matches!(query, Query::DmabufUpdate { .. }))
    }

    /// The question that an answer with this header is to.
    pub fn match_reply(&self, header: &[u8]) -> Result<(usize, Query), DisplayError> {
        let mut sent_queries = self.sent_queries.iter().copied().enumerate();
        sent_queries
            .find(|(_, query)| query.is_replied_by(header))
            .ok_or_else(|| DisplayError::Reply(self.sent_queries.front().copied()))
    }

    /// One of the questions has its answer, and those before it will have none.
    pub fn complete_query(&mut self, index: usize, reply: &[u8]) {
        self.silent &= matches!(
            self.sent_queries.get(index),
            Some(Query::DmabufUpdate { .. })
        );
        for query in self.sent_queries.drain(..=index) {
            if query != Query::ProtocolFeatures {
                continue;
            }
            if index == 0 {
                let features = u64::read_from_bytes(reply).unwrap_or(0);
                self.features = features & (FEATURE_EDID | FEATURE_DMABUF2);
                self.must_set_features = true;
            }
            self.ready = true;
            info_limited(format_args!("a display is connected"));
        }
    }

    /// Asks to be told when there is room for more, or not to be.
    pub fn watch_writable(&mut self, events: &OwnedFd, wanted: bool) -> Result<(), Errno> {
        if self.watches_writable != wanted {
            self.watches_writable = wanted;
            let mut flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
            flags.set(epoll::EventFlags::OUT, wanted);
            epoll::modify(events, &self.socket, epoll::EventData::new_u64(0), flags)?;
        }
        Ok(())
    }
}

/// Has a display's socket watched.
pub fn register(events: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::OUT;
    Ok(epoll::add(
        events,
        socket,
        epoll::EventData::new_u64(0),
        flags,
    )?)
}
