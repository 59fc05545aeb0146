// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user socket that sends whatever a test wants to send.
//!
//! Message layout: request u32, flags u32, payload size u32, payload; host byte order.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::error::{Error, Result};

/// Header flag: protocol version 1, present in every message.
pub const VERSION: u32 = 1;
/// Header flag: this is a reply.
pub const REPLY: u32 = 1 << 2;
/// Header flag: the sender wants an acknowledgement.
pub const NEED_REPLY: u32 = 1 << 3;

/// Size of a message header in bytes.
const HEADER_SIZE: usize = 12;
/// Largest reply payload accepted; far above any of the protocol's.
const REPLY_LIMIT: usize = 0x1_0000;
/// Most file descriptors taken from one message.
const REPLY_FDS: usize = 32;
/// How long to wait for a reply unless [`RawConnection::set_timeout`] says otherwise.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// A message received from the back-end.
#[derive(Debug)]
pub struct Reply {
    /// The request that it answers (or makes, on a BACKEND_REQ channel).
    pub request: u32,
    /// The header's flags.
    pub flags: u32,
    /// The payload.
    pub payload: Vec<u8>,
    /// The file descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// Returns the payload as the protocol's u64, which acknowledgements are too. Panics when it is not 8 bytes.
    pub fn u64(&self) -> u64 {
        match self.payload.as_slice().try_into() {
            Ok(bytes) => u64::from_ne_bytes(bytes),
            Err(_) => panic!("a u64 payload has 8 bytes: {self:?}"),
        }
    }
}

/// A connection that checks nothing.
#[derive(Debug)]
pub struct RawConnection {
    socket: UnixStream,
    timeout: Duration,
}

impl RawConnection {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Connects to the socket at `path`, which may appear within `limit`.
    pub fn connect_within(path: &Path, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => return Self::from_stream(socket),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Uses a connected socket.
    pub fn from_stream(socket: UnixStream) -> Result<Self> {
        let mut connection = RawConnection {
            socket,
            timeout: DEFAULT_TIMEOUT,
        };
        connection.set_timeout(DEFAULT_TIMEOUT)?;
        Ok(connection)
    }

    /// Returns the socket.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sets how long [`RawConnection::receive`] waits for the next bytes, and how long sending waits for room.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<()> {
        self.socket.set_read_timeout(Some(timeout))?;
        self.socket.set_write_timeout(Some(timeout))?;
        self.timeout = timeout;
        Ok(())
    }

    /// Sends bytes, whole messages or pieces of them, with file descriptors on the first byte.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd]) -> Result<()> {
        let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(fds.len()))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let slice = [IoSlice::new(&bytes[sent..])];
            sent += sendmsg(&self.socket, &slice, &mut control, SendFlags::NOSIGNAL)
                .map_err(|errno| self.error(errno.into()))?;
            control.clear();
        }
        Ok(())
    }

    /// Sends one message with exactly these header fields; the header's size is the payload's.
    pub fn send(
        &self,
        request: impl Into<u32>,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<()> {
        self.send_bytes(&message(request, flags, payload), fds)
    }

    /// Receives one message.
    pub fn receive(&self) -> Result<Reply> {
        let mut header = [0; HEADER_SIZE];
        let mut fds = Vec::new();
        let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(REPLY_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(|errno| self.error(errno.into()))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.bytes == 0 {
            return Err(Error::Closed);
        }
        self.read_exact(&mut header[received.bytes..])?;
        let field = |index: usize| {
            u32::from_ne_bytes(header[index..index + 4].try_into().expect("4 bytes"))
        };
        let size = field(8) as usize;
        if size > REPLY_LIMIT {
            return Err(Error::Malformed(format!("a payload of {size} bytes")));
        }
        let mut payload = vec![0; size];
        self.read_exact(&mut payload)?;
        Ok(Reply {
            request: field(0),
            flags: field(4),
            payload,
            fds,
        })
    }

    /// Sends a request that has a reply of its own, and returns that reply after checking that its
    /// header answers the request.
    pub fn ask(
        &self,
        request: impl Into<u32>,
        payload: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<Reply> {
        self.exchange(request.into(), VERSION, payload, fds)
    }

    /// Sends a request without a reply of its own, asks for an acknowledgement (REPLY_ACK) and returns
    /// its value: 0 means done, anything else refused.
    pub fn acknowledged(
        &self,
        request: impl Into<u32>,
        payload: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<u64> {
        self.exchange(request.into(), VERSION | NEED_REPLY, payload, fds)
            .map(|reply| reply.u64())
    }

    /// Sends a request with [`RawConnection::acknowledged`]. Panics unless the back-end has carried it out.
    #[track_caller]
    pub fn done(&self, request: impl Into<u32>, payload: &[u8], fds: &[BorrowedFd]) {
        let request = request.into();
        let acknowledgement = self.acknowledged(request, payload, fds);
        assert!(
            matches!(acknowledgement, Ok(0)),
            "request {request} was not carried out: {acknowledgement:?}"
        );
    }

    /// Sends a message that asks for an acknowledgement, and receives the answer, whatever it is.
    pub fn answer(
        &self,
        request: impl Into<u32>,
        payload: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<Reply> {
        self.send(request, VERSION | NEED_REPLY, payload, fds)?;
        self.receive()
    }

    /// Returns whether the back-end closes the connection within `limit`. What it still sends is dropped.
    pub fn closed(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut scratch = [0; 4096];
        let mut closed = false;
        while !closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.socket.set_read_timeout(Some(left)).is_err() {
                break;
            }
            closed = match (&self.socket).read(&mut scratch) {
                Ok(count) => count == 0,
                Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
            };
        }
        let _ = self.socket.set_read_timeout(Some(self.timeout));
        closed
    }

    fn exchange(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<Reply> {
        self.send(request, flags, payload, fds)?;
        let reply = self.receive()?;
        if reply.request != request || reply.flags != VERSION | REPLY {
            return Err(Error::Malformed(format!(
                "{reply:?} as the reply to request {request}"
            )));
        }
        Ok(reply)
    }

    fn read_exact(&self, bytes: &mut [u8]) -> Result<()> {
        (&self.socket)
            .read_exact(bytes)
            .map_err(|error| self.error(error))
    }

    fn error(&self, error: std::io::Error) -> Error {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof, WouldBlock};
        match error.kind() {
            WouldBlock => Error::Timeout(self.timeout),
            BrokenPipe | ConnectionReset | UnexpectedEof => Error::Closed,
            _ => Error::Io(error),
        }
    }
}

/// Returns the bytes of one message; the header's size is the payload's.
pub fn message(request: impl Into<u32>, flags: u32, payload: &[u8]) -> Vec<u8> {
    [
        header(request, flags, payload.len() as u32).as_slice(),
        payload,
    ]
    .concat()
}

/// Returns the bytes of a header with any size field.
pub fn header(request: impl Into<u32>, flags: u32, size: u32) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[..4].copy_from_slice(&request.into().to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..].copy_from_slice(&size.to_ne_bytes());
    bytes
}

/// Encodes payloads of the protocol.
pub mod payload {
    use vhost::VhostUserMemoryRegionInfo;

    /// Encodes SET_FEATURES, SET_PROTOCOL_FEATURES, SET_STATUS, and the vring file descriptor messages.
    pub fn u64(value: u64) -> Vec<u8> {
        value.to_ne_bytes().to_vec()
    }

    /// Encodes SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
    pub fn vring_state(index: u32, value: u32) -> Vec<u8> {
        [index, value].map(u32::to_ne_bytes).concat()
    }

    /// Encodes SET_VRING_ADDR; the addresses are user addresses.
    pub fn vring_addresses(
        index: u32,
        flags: u32,
        descriptors: u64,
        used: u64,
        avail: u64,
        log: u64,
    ) -> Vec<u8> {
        let mut bytes = vring_state(index, flags);
        bytes.extend(
            [descriptors, used, avail, log]
                .map(u64::to_ne_bytes)
                .concat(),
        );
        bytes
    }

    /// Encodes one memory region in 32 bytes.
    pub fn region(info: &VhostUserMemoryRegionInfo) -> Vec<u8> {
        [
            info.guest_phys_addr,
            info.memory_size,
            info.userspace_addr,
            info.mmap_offset,
        ]
        .map(u64::to_ne_bytes)
        .concat()
    }

    /// Encodes SET_MEM_TABLE.
    pub fn memory_table(regions: &[VhostUserMemoryRegionInfo]) -> Vec<u8> {
        let mut bytes = vring_state(regions.len() as u32, 0);
        bytes.extend(regions.iter().flat_map(region));
        bytes
    }

    /// Encodes ADD_MEM_REG and REM_MEM_REG.
    pub fn single_region(info: &VhostUserMemoryRegionInfo) -> Vec<u8> {
        [u64(0), region(info)].concat()
    }

    /// Encodes GET_CONFIG and SET_CONFIG.
    pub fn config(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
        let fields = [offset, bytes.len() as u32, flags].map(u32::to_ne_bytes);
        [fields.concat().as_slice(), bytes].concat()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn pair() -> (RawConnection, RawConnection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            RawConnection::from_stream(ours).unwrap(),
            RawConnection::from_stream(theirs).unwrap(),
        )
    }

    #[test]
    fn a_message_sent_in_pieces_arrives_whole_with_its_file_descriptors() {
        let (ours, theirs) = pair();
        let (fd, _other) = UnixStream::pair().unwrap();
        let bytes = message(21u32, VERSION, &[1, 2, 3]);
        ours.send_bytes(&bytes[..5], &[fd.as_fd(), fd.as_fd()])
            .unwrap();
        ours.send_bytes(&bytes[5..14], &[]).unwrap();
        ours.send_bytes(&bytes[14..], &[]).unwrap();
        let got = theirs.receive().unwrap();
        assert_eq!((got.request, got.flags), (21, VERSION));
        assert_eq!(got.payload, [1, 2, 3]);
        assert_eq!(got.fds.len(), 2);
    }

    #[test]
    fn silence_is_a_timeout_and_a_closed_peer_is_seen() {
        let (mut ours, theirs) = pair();
        ours.set_timeout(Duration::from_millis(10)).unwrap();
        assert!(matches!(ours.receive(), Err(Error::Timeout(_))));
        assert!(!ours.closed(Duration::from_millis(10)));
        theirs
            .send_bytes(b"what the peer sent before it closed", &[])
            .unwrap();
        drop(theirs);
        assert!(ours.closed(Duration::from_secs(10)));
        assert!(matches!(
            ours.send(1u32, VERSION, &[], &[]),
            Err(Error::Closed)
        ));
    }

    #[test]
    fn a_reply_to_another_request_is_malformed() {
        let (ours, theirs) = pair();
        theirs.send(2u32, VERSION | REPLY, &[0; 8], &[]).unwrap();
        assert!(matches!(ours.ask(1u32, &[], &[]), Err(Error::Malformed(_))));
    }

    #[test]
    fn payloads_have_the_sizes_of_the_protocol() {
        assert_eq!(payload::vring_addresses(0, 0, 0, 0, 0, 0).len(), 40);
        let info = Default::default();
        assert_eq!(payload::memory_table(&[info, info]).len(), 8 + 64);
        assert_eq!(payload::single_region(&info).len(), 40);
        assert_eq!(payload::config(0, 0, &[0; 60]).len(), 72);
    }
}
