// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vhost-user message codec: requests in, however they are cut into pieces, and replies out.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, sendmsg,
};
use thiserror::Error;
use vhost::vhost_user::message::{MAX_MSG_SIZE, VhostUserConfig};
use vm_memory::ByteValued;

use crate::memory::LostMemory;

/// Bytes of a header: request u32, flags u32, size u32, in native byte order.
const HEADER_SIZE: usize = 12;
/// Most bytes that may follow a header: the largest message is a config space of 4 KiB.
const MAX_PAYLOAD: usize = MAX_MSG_SIZE + size_of::<VhostUserConfig>();
/// Most files that Linux lets one message carry (SCM_MAX_FD).
const MAX_FILES: usize = 253;

const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Why no further message can be read from, or written to, a connection.
#[derive(Debug, Error)]
pub enum MessageError {
    /// The socket failed.
    #[error("the socket of the front-end failed: {0}")]
    Socket(#[from] io::Error),
    /// The front-end went away in the middle of a message.
    #[error("the front-end closed its socket in the middle of a message")]
    Truncated,
    /// The flags are not those of a request of version 1.
    #[error("message flags {0:#x} are not those of a request of protocol version 1")]
    Flags(u32),
    /// The payload is larger than any that exists.
    #[error("a message of {0} bytes; the largest has {MAX_PAYLOAD}")]
    TooLong(u32),
    /// Access to shared memory failed.
    #[error("the front-end made a file shorter which it had shared as memory")]
    MemoryLost,
    /// The kernel had to drop files, for want of file descriptors.
    #[error("files of a message were lost; raise RLIMIT_NOFILE (LimitNOFILE= in a unit)")]
    FilesLost,
}

/// A request of the front-end, not yet understood.
#[derive(Debug)]
pub struct Message {
    /// The request, by its number.
    pub request: u32,
    /// The front-end waits for an acknowledgement.
    pub need_reply: bool,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Files that came with it.
    pub files: Vec<OwnedFd>,
}

impl Message {
    /// The payload as the one object that it should be.
    pub fn object<T: ByteValued + Default>(&self) -> Option<T> {
        (self.payload.len() == size_of::<T>()).then(|| leading_object(&self.payload))?
    }
}

/// The object at the start of `bytes`.
pub fn leading_object<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut object = T::default();
    object
        .as_mut_slice()
        .copy_from_slice(bytes.get(..size_of::<T>())?);
    Some(object)
}

/// What became ready while a session waited for more than messages.
pub struct Ready {
    /// The socket of the front-end; or no message is to be waited for any more, which [`Connection::receive`] tells.
    pub front_end: bool,
    /// The file.
    pub file: bool,
}

/// The back-end's end of the socket.
#[derive(Debug)]
pub struct Connection<'a> {
    socket: UnixStream,
    /// Becomes readable when the process is to end.
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

    /// Waits for the next request. `None` when the front-end closed its end, or the process is to
    /// end.
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

    /// Fills `buffer`, however many pieces it comes in. Returns false at the end of the stream, or
    /// of the process, before the first byte.
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
                // Files that come with a later piece belong to no message: the kernel closes them.
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

    /// Waits for `events` at the socket, for the end of the process, or for a file, but not longer than `limit`.
    pub fn wait_beside(
        &self,
        events: PollFlags,
        file: PollFd<'_>,
        limit: Duration,
    ) -> Result<Ready, MessageError> {
        let mut fds = [
            PollFd::new(&self.socket, events),
            PollFd::new(self.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(
                self.lost.event().unwrap_or(self.stop.as_fd()),
                PollFlags::IN,
            ),
            file,
        ];
        let limit = limit.try_into().ok();
        retry_on_intr(|| poll(&mut fds, limit.as_ref())).map_err(io::Error::from)?;
        let [own @ .., file] = &fds;
        Ok(Ready {
            front_end: own.iter().any(|fd| !fd.revents().is_empty()),
            file: !file.revents().is_empty(),
        })
    }

    /// Waits for bytes. Returns true when the process is to end instead.
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

    /// Answers `request`.
    pub fn reply(
        &mut self,
        request: u32,
        payload: &[u8],
        file: Option<OwnedFd>,
    ) -> Result<(), MessageError> {
        let flags = VERSION | FLAG_REPLY;
        send(
            &self.socket,
            request,
            flags,
            payload,
            file,
            SendFlags::empty(),
        )?;
        Ok(())
    }
}

/// Sends one message, with a file or without.
pub fn send(
    socket: impl AsFd,
    request: u32,
    flags: u32,
    payload: &[u8],
    file: Option<OwnedFd>,
    how: SendFlags,
) -> io::Result<()> {
    let size = payload.len() as u32;
    let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
    bytes.extend_from_slice(ByteValued::as_slice(&[request, flags, size]));
    bytes.extend_from_slice(payload);
    let mut rest = bytes.as_slice();
    let mut files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
    while !rest.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        let pieces = [IoSlice::new(rest)];
        let how = how | SendFlags::NOSIGNAL;
        let sent = retry_on_intr(|| sendmsg(&socket, &pieces, &mut ancillary, how))?;
        // They went with the first byte.
        files.clear();
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// A request of the back-end, which wants no reply.
pub fn send_backend_request(socket: impl AsFd, request: u32) -> io::Result<()> {
    send(socket, request, VERSION, &[], None, SendFlags::DONTWAIT)
}
