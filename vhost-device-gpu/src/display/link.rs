// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A connected display: its features, the queries sent to it, and their replies.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use thiserror::Error;
use vhost_device_common::info_limited;
use vhost_device_common::worker::{Readiness, Watcher};
use zerocopy::FromBytes;

use super::message::{FEATURE_DMABUF2, FEATURE_EDID, Query};
use super::outgoing::Outgoing;

/// The watcher reports the display as this token.
pub const DISPLAY: u32 = 0;
/// Most queries without a reply. No more are sent to a display that does not reply.
pub const MAX_SENT_QUERIES: usize = 64;

/// Why a display is disconnected.
#[derive(Debug, Error)]
pub enum DisplayError {
    #[error("connection closed")]
    Closed,
    #[error("invalid reply to {0:?}")]
    Reply(Query),
    #[error("received data without a query")]
    Unsolicited,
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("the resource to send does not exist")]
    Resource,
}

/// A connected display.
#[derive(Debug)]
pub struct Link {
    pub socket: UnixStream,
    /// Its features are known, or it did not report them in time. Messages may be sent.
    pub ready: bool,
    pub features: u64,
    /// SET_PROTOCOL_FEATURES is to be sent.
    pub must_set_features: bool,
    /// The message that is being sent.
    pub outgoing: Option<Outgoing>,
    /// The next query to send.
    pub next_query: Option<Query>,
    /// Queries without a reply. Replies arrive in this order, so a reply to one query shows that the display has
    /// skipped those before it.
    pub sent_queries: VecDeque<Query>,
    /// The received part of the next reply.
    pub reply: Vec<u8>,
    /// Whether the watcher reports when the socket is writable.
    pub watches_writable: bool,
    /// The display made no progress within the timeout. Nothing waits for it until it does.
    pub stalled: bool,
    /// The display did not reply within the timeout. No query waits for it until it replies to one.
    pub silent: bool,
}

impl Link {
    /// Creates the state of a new connection. The first message asks for the features; `next_query` follows.
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

    /// Returns whether the display supports this query.
    pub fn supports(&self, query: Query) -> bool {
        !matches!(query, Query::Edid { .. }) || self.features & FEATURE_EDID != 0
    }

    /// Returns the message for a query. Displays may ignore some queries, so another one that all displays reply to
    /// follows.
    pub fn query_message(&mut self, query: Query) -> Outgoing {
        let mut bytes = query.message();
        self.sent_queries.push_back(query);
        if matches!(query, Query::ProtocolFeatures | Query::Edid { .. }) {
            bytes.extend(Query::DisplayInfo.message());
            self.sent_queries.push_back(Query::DisplayInfo);
        }
        Outgoing::bytes(bytes)
    }

    /// Returns whether this query has been or will be sent.
    pub fn has_query(&self, query: Query) -> bool {
        self.next_query == Some(query) || self.sent_queries.contains(&query)
    }

    /// Returns whether the display has yet to reply to a DMABUF_UPDATE.
    pub fn awaits_dmabuf_update(&self) -> bool {
        let mut sent_queries = self.sent_queries.iter();
        sent_queries.any(|query| matches!(query, Query::DmabufUpdate { .. }))
    }

    /// Returns the query that a reply with this header belongs to, and its index.
    pub fn match_reply(&self, header: &[u8]) -> Result<(usize, Query), DisplayError> {
        let mut sent_queries = self.sent_queries.iter().copied().enumerate();
        sent_queries
            .find(|(_, query)| query.matches_reply(header))
            .ok_or_else(|| {
                let first = self.sent_queries.front().copied();
                first.map_or(DisplayError::Unsolicited, DisplayError::Reply)
            })
    }

    /// Takes a reply to the query at `index`. The queries before it get none.
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

    /// Starts watching the socket.
    pub fn watch(&self, watcher: &Watcher) -> io::Result<()> {
        watcher.add(&self.socket, self.interest(), DISPLAY)
    }

    /// Starts or stops watching whether the socket is writable.
    pub fn watch_writable(&mut self, watcher: Option<&Watcher>, wanted: bool) -> io::Result<()> {
        if self.watches_writable != wanted {
            self.watches_writable = wanted;
            if let Some(watcher) = watcher {
                watcher.change(&self.socket, self.interest(), DISPLAY)?;
            }
        }
        Ok(())
    }

    fn interest(&self) -> Readiness {
        match self.watches_writable {
            true => Readiness::READABLE | Readiness::WRITABLE,
            false => Readiness::READABLE,
        }
    }
}
