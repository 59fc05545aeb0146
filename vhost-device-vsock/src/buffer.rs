// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Data of the guest that its host socket does not take yet.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

/// Data of one connection. Its size is bounded by the credit of the guest.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: VecDeque<u8>,
    /// SEQPACKET: lengths of the complete messages in `bytes`.
    messages: VecDeque<u32>,
    /// SEQPACKET: bytes of the last message, which is incomplete.
    partial: u32,
}

impl Buffer {
    /// Returns whether there is nothing, not even a part of a message.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns whether there is something that the host could take.
    pub fn has_output(&self, is_stream: bool) -> bool {
        match is_stream {
            true => !self.bytes.is_empty(),
            false => !self.messages.is_empty(),
        }
    }

    /// Adds data of a stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Adds data of a message, which may end with it. Empty messages do not exist.
    pub fn push_message(&mut self, bytes: &[u8], is_end: bool) {
        self.bytes.extend(bytes);
        self.partial = self.partial.saturating_add(bytes.len() as u32);
        if is_end && self.partial > 0 {
            self.messages.push_back(self.partial);
            self.partial = 0;
        }
    }

    /// Discards everything. Returns how many bytes that were.
    pub fn clear(&mut self) -> u32 {
        let length = self.bytes.len() as u32;
        *self = Self::default();
        length
    }

    /// Sends as much as `socket` takes. Returns how many bytes that were, and why it takes no more, if data is left.
    pub fn flush(&mut self, socket: &OwnedFd, is_stream: bool) -> (u32, Option<Errno>) {
        let mut sent = 0_u32;
        while self.has_output(is_stream) {
            let outcome = match is_stream {
                true => send(socket, self.bytes.as_slices().0, SendFlags::NOSIGNAL),
                false => {
                    let length = self.messages.front().copied().unwrap_or_default() as usize;
                    let message = self.bytes.make_contiguous();
                    let message = message.get(..length).unwrap_or_default();
                    send(socket, message, SendFlags::NOSIGNAL)
                }
            };
            match outcome {
                Ok(count) => {
                    self.bytes.drain(..count.min(self.bytes.len()));
                    self.messages.pop_front();
                    sent = sent.saturating_add(count as u32);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return (sent, Some(errno)),
            }
        }
        if self.bytes.is_empty() {
            // The storage of a connection that was blocked once is not kept.
            *self = Self::default();
        }
        (sent, None)
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

    use super::*;

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, kind, flags, None).unwrap()
    }

    fn receive(socket: &OwnedFd) -> Option<Vec<u8>> {
        let mut bytes = [0; 64];
        let (_, count) = recv(socket, &mut bytes, RecvFlags::empty()).ok()?;
        Some(bytes[..count].to_vec())
    }

    #[test]
    fn messages_stay_apart_and_wait_until_they_are_complete() {
        let (ours, theirs) = pair(SocketType::SEQPACKET);
        let mut buffer = Buffer::default();
        buffer.push_message(b"", true);
        buffer.push_message(b"on", false);
        assert!(!buffer.has_output(false));
        buffer.push_message(b"e", true);
        buffer.push_message(b"two", true);
        buffer.push_message(b"thr", false);
        assert_eq!(buffer.flush(&ours, false), (6, None));
        assert_eq!(receive(&theirs).as_deref(), Some(&b"one"[..]));
        assert_eq!(receive(&theirs).as_deref(), Some(&b"two"[..]));
        assert_eq!(receive(&theirs), None);
        assert!(!buffer.is_empty());
        buffer.push_message(b"ee", true);
        assert_eq!(buffer.flush(&ours, false), (5, None));
        assert_eq!(receive(&theirs).as_deref(), Some(&b"three"[..]));
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_full_socket_leaves_the_rest_of_a_stream() {
        let (ours, theirs) = pair(SocketType::STREAM);
        let mut buffer = Buffer::default();
        let data = vec![7; 4 << 20];
        buffer.push(&data);
        let (sent, errno) = buffer.flush(&ours, true);
        assert_eq!(errno, Some(Errno::AGAIN));
        assert!(0 < sent && (sent as usize) < data.len());
        drop(theirs);
        assert!(matches!(buffer.flush(&ours, true), (0, Some(_))));
        assert_eq!(buffer.clear(), data.len() as u32 - sent);
    }
}
