// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Data over many sockets at once, in both directions, which both ends check.
//!
//! [`streams`]: each end sends its data and a checksum, ends its direction, and goes on receiving until the other end has done the same. So
//! each transfer also needs streams that are closed in one direction. [`messages`]: the same for sockets that keep the bounds of messages.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use crc32fast::Hasher;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Bytes of a call.
const CHUNK: usize = 64 << 10;
/// Bytes after which the data repeats: a prime, so that lost pages change it.
const PERIOD: usize = 1_048_573;
/// Bytes of the checksum.
const SUM: u64 = 4;
/// Length of the longest message, and the step from one length to the next.
const LONGEST: usize = 190_000;
const STEP: usize = 7919;

/// Returns one period of the data, and what one call may need more.
fn pattern() -> Vec<u8> {
    let mut pattern = vec![0; PERIOD];
    fastrand::Rng::with_seed(14).fill(&mut pattern);
    pattern.extend_from_within(..LONGEST.max(CHUNK));
    pattern
}

/// One end of a stream.
struct Stream {
    socket: OwnedFd,
    /// Where its data begins in the pattern.
    start: u64,
    /// The events that it waits for: [`EventFlags::OUT`] until all is sent, [`EventFlags::IN`] until all is received.
    waits_for: EventFlags,
    sent: u64,
    sum: Hasher,
    received: u64,
    received_sum: Hasher,
    expected_sum: [u8; SUM as usize],
}

impl Stream {
    fn new(socket: OwnedFd) -> Self {
        Stream {
            socket,
            start: fastrand::u64(..PERIOD as u64),
            waits_for: EventFlags::IN | EventFlags::OUT,
            sent: 0,
            sum: Hasher::new(),
            received: 0,
            received_sum: Hasher::new(),
            expected_sum: [0; SUM as usize],
        }
    }

    /// Sends and receives what is possible at once.
    fn step(
        &mut self,
        events: EventFlags,
        pattern: &[u8],
        buffer: &mut [u8],
        length: u64,
    ) -> io::Result<()> {
        let ends = EventFlags::HUP | EventFlags::ERR;
        let is_due = |direction| events.intersects(direction | ends);
        if self.waits_for.contains(EventFlags::OUT) && is_due(EventFlags::OUT) {
            self.send(pattern, length)?;
        }
        if self.waits_for.contains(EventFlags::IN) && is_due(EventFlags::IN) {
            self.receive(buffer, length)?;
        }
        Ok(())
    }

    fn send(&mut self, pattern: &[u8], length: u64) -> io::Result<()> {
        let place = ((self.start + self.sent) % PERIOD as u64) as usize;
        let left = length.saturating_sub(self.sent).min(CHUNK as u64) as usize;
        let sum = self.sum.clone().finalize().to_le_bytes();
        let data = match left {
            0 => &sum[(self.sent - length) as usize..],
            left => &pattern[place..place + left],
        };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let count = match send(&self.socket, data, flags) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            result => result?,
        };
        if left > 0 {
            self.sum.update(&data[..count]);
        }
        self.sent += count as u64;
        if self.sent == length + SUM {
            shutdown(&self.socket, Shutdown::Write)?;
            self.waits_for.remove(EventFlags::OUT);
        }
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], length: u64) -> io::Result<()> {
        let count = match recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            result => result?.0,
        };
        if count == 0 {
            self.waits_for.remove(EventFlags::IN);
            return self.check(length);
        }
        let data = length.saturating_sub(self.received).min(count as u64) as usize;
        let (data, sum) = buffer[..count].split_at(data);
        self.received_sum.update(data);
        for (index, byte) in (self.received + data.len() as u64..).zip(sum) {
            let place = index.checked_sub(length).map(|place| place as usize);
            match place.and_then(|place| self.expected_sum.get_mut(place)) {
                Some(expected) => *expected = *byte,
                None => return Err(io::Error::other("there is more than was sent")),
            }
        }
        self.received += count as u64;
        Ok(())
    }

    /// Compares what was received with what the other end has sent.
    fn check(&self, length: u64) -> io::Result<()> {
        if self.received != length + SUM {
            return Err(io::Error::other("the stream ended early"));
        }
        match self.received_sum.clone().finalize().to_le_bytes() == self.expected_sum {
            true => Ok(()),
            false => Err(io::Error::other("the data is not what was sent")),
        }
    }
}

/// Allows this process as many files as it may have.
pub fn allow_many_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    Ok(setrlimit(Resource::Nofile, most)?)
}

/// Sends `length` bytes over each of the sockets and receives as many, at once. Fails if other data arrives, or after `limit`.
pub fn streams(sockets: Vec<OwnedFd>, length: u64, limit: Duration) -> io::Result<()> {
    let pattern = pattern();
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut streams: Vec<_> = sockets.into_iter().map(Stream::new).collect();
    for (index, stream) in streams.iter().enumerate() {
        let data = EventData::new_u64(index as u64);
        epoll::add(&poller, &stream.socket, data, stream.waits_for)?;
    }
    let end = Instant::now() + limit;
    let mut buffer = vec![0; CHUNK];
    let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
    let mut left = streams.len();
    while left > 0 {
        let time = end.saturating_duration_since(Instant::now());
        if time.is_zero() {
            let what = format!("{left} transfers did not end within {limit:?}");
            return Err(io::Error::other(what));
        }
        let timeout = Timespec::try_from(time).map_err(io::Error::other)?;
        events.clear();
        match epoll::wait(&poller, spare_capacity(&mut events), Some(&timeout)) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        for event in &events {
            let index = event.data.u64() as usize;
            let stream = &mut streams[index];
            let before = stream.waits_for;
            let step = stream.step(event.flags, &pattern, &mut buffer, length);
            step.map_err(|error| {
                let Stream { sent, received, .. } = stream;
                let what = format!("connection {index}, {sent} bytes sent, {received} received");
                io::Error::new(error.kind(), format!("{what}: {error}"))
            })?;
            if stream.waits_for.is_empty() {
                epoll::delete(&poller, &stream.socket)?;
                left -= 1;
            } else if stream.waits_for != before {
                let data = event.data;
                epoll::modify(&poller, &stream.socket, data, stream.waits_for)?;
            }
        }
    }
    Ok(())
}

/// Returns the length of a message.
fn message_length(number: u32) -> usize {
    1 + number as usize * STEP % LONGEST
}

/// Sends `count` messages of different lengths and receives as many, at once. Fails if a message arrives in another form.
pub fn messages(socket: &OwnedFd, count: u32) -> io::Result<()> {
    let pattern = &pattern();
    let data = |number: u32| {
        let place = number as usize * STEP % PERIOD;
        &pattern[place..place + message_length(number)]
    };
    thread::scope(|scope| {
        let sender = scope.spawn(move || -> io::Result<()> {
            for number in 0..count {
                send(socket, data(number), SendFlags::NOSIGNAL)?;
            }
            Ok(shutdown(socket, Shutdown::Write)?)
        });
        let received = receive_messages(socket, count, data);
        if received.is_err() {
            // The sender may wait for room.
            let _ = shutdown(socket, Shutdown::Both);
        }
        let sent = sender
            .join()
            .map_err(|_| io::Error::other("the sender panicked"))?;
        received.and(sent)
    })
}

fn receive_messages<'a>(
    socket: &OwnedFd,
    count: u32,
    data: impl Fn(u32) -> &'a [u8],
) -> io::Result<()> {
    let mut buffer = vec![0; LONGEST + 1];
    let mut number = 0;
    loop {
        let length = match recv(socket, buffer.as_mut_slice(), RecvFlags::empty()) {
            Err(Errno::INTR) => continue,
            result => result?.0,
        };
        // Messages are not empty, so this is the end.
        if length == 0 {
            break;
        }
        if number == count || buffer[..length] != *data(number) {
            let what = format!("message {number} of {length} bytes is not what was sent");
            return Err(io::Error::other(what));
        }
        number += 1;
    }
    match number == count {
        true => Ok(()),
        false => {
            let what = format!("{number} of {count} messages have arrived");
            Err(io::Error::other(what))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn pairs(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
        (0..count)
            .map(|_| UnixStream::pair().unwrap())
            .map(|(one, other)| (OwnedFd::from(one), OwnedFd::from(other)))
            .unzip()
    }

    #[test]
    fn both_ends_find_what_was_sent() {
        for length in [0, 1, 3 << 20] {
            let (ours, theirs) = pairs(20);
            let other = thread::spawn(move || streams(theirs, length, LIMIT));
            streams(ours, length, LIMIT).unwrap();
            other.join().unwrap().unwrap();
        }
    }

    #[test]
    fn a_changed_a_missing_and_another_byte_are_found() {
        for (count, change, what) in [
            (104, 1, "the data is not what was sent"),
            (103, 0, "the stream ended early"),
            (105, 0, "there is more than was sent"),
        ] {
            let (ours, theirs) = pairs(1);
            let other = thread::spawn(move || streams(theirs, 100, LIMIT));
            // What the other end sends, with a change, goes back to it.
            let mut buffer = [0; 105];
            let (read, _) = recv(&ours[0], &mut buffer[..104], RecvFlags::WAITALL).unwrap();
            assert_eq!(read, 104);
            buffer[50] ^= change;
            send(&ours[0], &buffer[..count], SendFlags::empty()).unwrap();
            shutdown(&ours[0], Shutdown::Write).unwrap();
            let error = other.join().unwrap().unwrap_err().to_string();
            assert!(error.ends_with(what), "{error}");
        }
    }

    #[test]
    fn messages_that_are_joined_are_found() {
        let pair =
            |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        for (kind, is_right) in [(SocketType::SEQPACKET, true), (SocketType::STREAM, false)] {
            let (ours, theirs) = pair(kind);
            let other = thread::spawn(move || messages(&theirs, 100));
            let result = messages(&ours, 100);
            drop(ours);
            let others = other.join().unwrap();
            assert_eq!(
                result.is_ok() && others.is_ok(),
                is_right,
                "{result:?} {others:?}"
            );
        }
    }
}
