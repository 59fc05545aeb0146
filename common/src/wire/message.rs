// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vhost-user message codec: receives requests, in however many pieces they arrive, and sends replies and requests of the back-end.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, sendmsg,
};
use thiserror::Error;
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserConfig};
use vm_memory::ByteValued;

use crate::memory::LostMemory;

/// Size of a header in bytes: request u32, flags u32, size u32, in native byte order.
pub(super) const HEADER_SIZE: usize = 12;
/// Maximum payload in bytes: the largest message is a config space of 4 KiB.
const MAX_PAYLOAD: usize = MAX_MSG_SIZE + size_of::<VhostUserConfig>();
/// Maximum number of files in a message on Linux (SCM_MAX_FD).
const MAX_FILES: usize = 253;

const VERSION_MASK: u32 = 0x3;
pub(super) const VERSION: u32 = 1;
pub(super) const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Why a connection cannot be read from or written to any further.
#[derive(Debug, Error)]
pub enum MessageError {
    /// The socket failed.
    #[error("the socket of the front-end failed: {0}")]
    Socket(#[from] io::Error),
    /// The front-end disconnected in the middle of a message.
    #[error("the front-end closed its socket in the middle of a message")]
    Truncated,
    /// The flags are not those of a version 1 request.
    #[error("message flags {0:#x} are not those of a request of protocol version 1")]
    Flags(u32),
    /// The payload is larger than that of any request.
    #[error("message of {0} bytes: the maximum is {MAX_PAYLOAD}")]
    TooLong(u32),
    /// Access to shared memory failed.
    #[error("the front-end truncated a file that it shares as memory")]
    MemoryLost,
    /// The kernel dropped files because the limit of open files is reached.
    #[error(
        "too many open files: files of a message were lost; raise RLIMIT_NOFILE (LimitNOFILE= in a unit)"
    )]
    FilesLost,
}

/// Why a request cannot be decoded.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// The payload does not have the size, or the contents, that the request requires.
    #[error("{} with a malformed payload of {size} bytes", name(*.request))]
    Malformed {
        /// Number of the request.
        request: u32,
        /// Bytes of its payload.
        size: usize,
    },
    /// The request requires a file.
    #[error("{} without the file that it needs", name(*.0))]
    NoFile(u32),
}

/// Returns the name of a request of the front-end.
fn name(request: u32) -> String {
    match FrontendReq::try_from(request) {
        Ok(request) => format!("{request:?}"),
        Err(_) => format!("request {request}"),
    }
}

/// A request of the front-end, not decoded yet.
#[derive(Debug)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// The front-end waits for an acknowledgement.
    pub need_reply: bool,
    /// The bytes that follow the header.
    pub payload: Vec<u8>,
    /// The files that came with it.
    pub files: Vec<OwnedFd>,
}

impl Message {
    /// Decodes a payload that is exactly one object.
    ///
    /// # Errors
    /// The payload has another size.
    pub fn object<T: ByteValued + Default>(&self) -> Result<T, PayloadError> {
        let is_one = self.payload.len() == size_of::<T>();
        let object = is_one.then(|| leading_object(&self.payload)).flatten();
        object.ok_or_else(|| self.malformed())
    }

    /// Takes the first file of the message. The others are closed.
    ///
    /// # Errors
    /// There is none.
    pub fn file(&mut self) -> Result<OwnedFd, PayloadError> {
        let file = self.files.drain(..).next();
        file.ok_or(PayloadError::NoFile(self.request))
    }

    /// Returns the error for a payload that makes no sense.
    pub fn malformed(&self) -> PayloadError {
        PayloadError::Malformed {
            request: self.request,
            size: self.payload.len(),
        }
    }
}

/// Decodes the object at the start of `bytes`.
pub fn leading_object<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut object = T::default();
    object
        .as_mut_slice()
        .copy_from_slice(bytes.get(..size_of::<T>())?);
    Some(object)
}

/// Reports what became ready while the session waited.
pub struct Ready {
    /// The front-end's socket, or an event that ends the connection: [`Connection::receive`] tells which.
    pub front_end: bool,
    /// For each of the files, whether it is ready.
    pub files: Vec<bool>,
}

/// The back-end's end of the socket.
#[derive(Debug)]
pub struct Connection<'a> {
    socket: UnixStream,
    /// Becomes readable when the process must end.
    stop: &'a OwnedFd,
    lost: LostMemory,
}

impl<'a> Connection<'a> {
    pub fn new(socket: UnixStream, stop: &'a OwnedFd) -> Self {
        Self {
            socket,
            stop,
            lost: LostMemory::watch(),
        }
    }

    /// Waits for the next request. Returns `None` when the front-end has disconnected or the process must end.
    pub fn receive(&mut self) -> Result<Option<Message>, MessageError> {
        let mut header = [0; HEADER_SIZE];
        let mut files = Vec::new();
        if !self.fill(&mut header, Some(&mut files))? {
            return Ok(None);
        }
        let [request, flags, size] = *leading_object::<[u32; 3]>(&header)
            .as_ref()
            .unwrap_or(&[0; 3]);
        if flags & (VERSION_MASK | FLAG_REPLY) != VERSION {
            return Err(MessageError::Flags(flags));
        }
        if size as usize > MAX_PAYLOAD {
            return Err(MessageError::TooLong(size));
        }
        let mut payload = vec![0; size as usize];
        if !payload.is_empty() && !self.fill(&mut payload, None)? {
            return Err(MessageError::Truncated);
        }
        Ok(Some(Message {
            request,
            need_reply: flags & FLAG_NEED_REPLY != 0,
            payload,
            files,
        }))
    }

    /// Fills `buffer` from as many pieces as arrive. Returns false if the stream ends before the first byte, or the process must end.
    fn fill(
        &mut self,
        buffer: &mut [u8],
        mut files: Option<&mut Vec<OwnedFd>>,
    ) -> Result<bool, MessageError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            if self.is_stopped()? {
                return Ok(false);
            }
            let count = match files.as_deref_mut() {
                Some(files) => self.receive_with_files(rest, files)?,
                // Files belong to the first byte of a message. The kernel closes those that come later.
                None => retry_on_intr(|| recv(&self.socket, &mut *rest, RecvFlags::empty()))
                    .map(|(_, count)| count),
            };
            match count {
                Ok(0) | Err(Errno::CONNRESET) if filled == 0 => return Ok(false),
                Ok(0) => return Err(MessageError::Truncated),
                Ok(count) => filled += count,
                Err(errno) => return Err(MessageError::Socket(errno.into())),
            }
        }
        Ok(true)
    }

    /// Waits for `events` at the socket, for the end of the process, or for one of `files`, for at most `limit`.
    pub fn wait_beside(
        &self,
        events: PollFlags,
        files: &[PollFd<'_>],
        limit: Option<Duration>,
    ) -> Result<Ready, MessageError> {
        let lost = self.lost.event().unwrap_or(self.stop.as_fd());
        let own = [
            PollFd::new(&self.socket, events),
            PollFd::new(self.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(lost, PollFlags::IN),
        ];
        let mut fds = own.to_vec();
        fds.extend_from_slice(files);
        let limit = limit.and_then(|limit| limit.try_into().ok());
        retry_on_intr(|| poll(&mut fds, limit.as_ref())).map_err(io::Error::from)?;
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            front_end: ready
                .by_ref()
                .take(own.len())
                .fold(false, |any, one| any | one),
            files: ready.collect(),
        })
    }

    /// Waits for bytes. Returns true if the process must end instead.
    fn is_stopped(&self) -> Result<bool, MessageError> {
        let lost = self.lost.event().unwrap_or(self.stop.as_fd());
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(self.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(lost, PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut fds, None)).map_err(io::Error::from)?;
        let [_, stop, lost] = &fds;
        match stop.revents().is_empty() {
            true if !lost.revents().is_empty() => Err(MessageError::MemoryLost),
            is_going_on => Ok(!is_going_on),
        }
    }

    fn receive_with_files(
        &self,
        buffer: &mut [u8],
        files: &mut Vec<OwnedFd>,
    ) -> Result<Result<usize, Errno>, MessageError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(buffer)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        });
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        match received {
            Ok(message) if message.flags.contains(ReturnFlags::CTRUNC) => {
                Err(MessageError::FilesLost)
            }
            Ok(message) => Ok(Ok(message.bytes)),
            Err(errno) => Ok(Err(errno)),
        }
    }

    /// Sends the reply to `request`.
    pub fn reply(
        &mut self,
        request: u32,
        payload: &[u8],
        file: Option<OwnedFd>,
    ) -> Result<(), MessageError> {
        let bytes = encode(request, VERSION | FLAG_REPLY, payload);
        let mut rest = bytes.as_slice();
        let mut file = file.as_ref().map(AsFd::as_fd);
        while !rest.is_empty() {
            // The file goes with the first byte.
            let sent = send(&self.socket, rest, file.take(), SendFlags::empty());
            rest = rest
                .get(sent.map_err(io::Error::from)?..)
                .unwrap_or_default();
        }
        Ok(())
    }
}

/// A request of the back-end to the front-end.
pub struct BackEndRequest<'a> {
    /// Number of the request.
    pub request: u32,
    /// The front-end must acknowledge it.
    pub need_reply: bool,
    /// The bytes that follow the header.
    pub payload: &'a [u8],
    /// A file to send with it.
    pub file: Option<BorrowedFd<'a>>,
}

impl BackEndRequest<'_> {
    /// Sends the request if the socket has room, and never waits. Returns whether all of it was sent.
    ///
    /// # Errors
    /// Nothing was sent.
    pub fn send(&self, socket: impl AsFd) -> Result<bool, Errno> {
        let need_reply = if self.need_reply { FLAG_NEED_REPLY } else { 0 };
        let bytes = encode(self.request, VERSION | need_reply, self.payload);
        let sent = send(socket, &bytes, self.file, SendFlags::DONTWAIT)?;
        Ok(sent == bytes.len())
    }
}

fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    let mut bytes = Vec::with_capacity(HEADER_SIZE.saturating_add(payload.len()));
    bytes.extend_from_slice(ByteValued::as_slice(&[request, flags, size]));
    bytes.extend_from_slice(payload);
    bytes
}

/// Sends as many of `bytes` as fit, with an optional file. Returns their number.
fn send(
    socket: impl AsFd,
    bytes: &[u8],
    file: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> Result<usize, Errno> {
    let flags = flags | SendFlags::NOSIGNAL;
    let Some(file) = file else {
        // All threads may do this in the sandbox.
        return retry_on_intr(|| rustix::net::send(&socket, bytes, flags));
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(&file)));
    let pieces = [IoSlice::new(bytes)];
    retry_on_intr(|| sendmsg(&socket, &pieces, &mut ancillary, flags))
}
