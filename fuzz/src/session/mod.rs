// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A malicious front-end and the session that serves it: messages, files, memory, and rings that start and stop on their own threads.

mod echo;

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;
use vhost_device_common::ring::inflight::{create_file, file_size};
use vhost_device_common::session::{MessageError, serve};
use vhost_device_common::statistics::Statistics;
use vhost_device_common::worker::Polling;

use self::echo::Echo;
use crate::driver::{Driver, Shape};
use crate::guest::{Guest, REGIONS, file, files};
use crate::split::{Mistake, Start};

const QUEUES: u16 = 2;
/// Limit for the size of a device state, in bytes. It is less than the capacity of a pipe.
const STATE_SIZE: usize = 2048;
/// The number of descriptors of a ring in the file for requests in flight.
const INFLIGHT_SIZE: u16 = 256;
/// Limit for the messages of one input. They fit into a socket, with their answers.
const MOST_MESSAGES: usize = 40;
/// The size of the send buffer for answers, in bytes.
const SEND_BUFFER: usize = 1 << 20;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features that are offered to a device with a config space.
const OFFERED: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 19;
/// The size of the log of dirty pages, in bytes.
const LOG_SIZE: u64 = 4096;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The actions of a front-end.
#[derive(Arbitrary, Debug)]
pub struct Input {
    /// Each queue has its own thread.
    threads: bool,
    start: Start,
    /// Requests that are in the rings before the first message.
    requests: Vec<(bool, Vec<u8>, u8, Shape)>,
    mistake: Option<(bool, Mistake)>,
    /// The first messages start both rings.
    opening: bool,
    /// Writes of the device are logged, and the log covers its memory.
    log: bool,
    /// A device state to load, and whether it has a valid header.
    state: (bool, Vec<u8>),
    messages: Vec<Message>,
}

/// A message. Most are correct.
#[derive(Arbitrary, Debug)]
struct Message {
    request: Request,
    need_reply: bool,
    wrong: Option<Wrong>,
}

#[derive(Arbitrary, Debug)]
enum Wrong {
    Flags(u32),
    Size(u32),
    /// Bytes are removed from the payload or added to it, and the size in the header matches.
    Payload(i8),
    /// It has other files.
    Files(Vec<Kind>),
    /// It is sent in two pieces, the second one with a file.
    Cut(u8, Option<Kind>),
    /// Its end is not sent.
    Short(u8),
}

/// A kind of file to send.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Memory(u8),
    Event,
    Inflight,
    Socket,
    Pipe,
    Null,
    Directory,
    Log,
    /// A pipe that contains a device state.
    State,
}

/// A memory region of the front-end.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Region {
    /// An existing region.
    Good(u8),
    Moved(u8, i16, i16),
    Offset(u8, u16),
    Any(u8, u64, u64, u64, u64),
}

impl Region {
    fn number(self) -> usize {
        let (Self::Good(number)
        | Self::Moved(number, ..)
        | Self::Offset(number, _)
        | Self::Any(number, ..)) = self;
        usize::from(number) % REGIONS.len()
    }

    /// Returns the guest address, the size, the address in the front-end and the offset.
    fn words(self) -> [u64; 4] {
        let (guest, user, size) = REGIONS[self.number()];
        match self {
            Self::Good(_) => [guest, size, user, 0],
            Self::Moved(_, by, user_by) => [
                guest.wrapping_add_signed(i64::from(by) << 8),
                size,
                user.wrapping_add_signed(i64::from(user_by) << 8),
                0,
            ],
            Self::Offset(_, offset) => {
                let offset = u64::from(offset) % size;
                [guest, size - offset, user, offset]
            }
            Self::Any(_, guest, size, user, offset) => [guest, size, user, offset],
        }
    }
}

/// The number of a queue. Most exist.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Number {
    Good(bool),
    Any(u32),
}

impl Number {
    fn number(self) -> u32 {
        match self {
            Self::Good(number) => number.into(),
            Self::Any(number) => number,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Request {
    GetFeatures,
    SetFeatures(u64),
    GetProtocolFeatures,
    SetProtocolFeatures(u32),
    /// All offered features.
    SetProtocolFeaturesGood,
    SetOwner,
    ResetOwner,
    ResetDevice,
    GetStatus,
    SetStatus(u64),
    GetQueueNum,
    GetMaxMemSlots,
    SetMemTable(Vec<Region>, Option<u32>),
    AddMemReg(Region),
    RemMemReg(Region),
    SetVringNum(Number, u32),
    /// The right size of the ring.
    SetVringNumGood(bool),
    SetVringAddr(Number, [u64; 3]),
    /// The right address of the ring, or one with a small offset.
    SetVringAddrGood(bool, i8),
    SetVringBase(Number, u32),
    SetVringBaseGood(bool),
    GetVringBase(Number),
    SetVringEnable(Number, u32),
    SetVringFile(u8, Number, Option<Kind>),
    GetConfig(u16, u16),
    SetConfig(u16, Vec<u8>),
    SetBackendReqFd(Option<Kind>),
    GetInflight(u16, u16, bool),
    SetInflight(u16, u16, u64, u64, Option<Kind>),
    /// The right file for requests in flight.
    SetInflightGood,
    SetGpuSocket(Kind),
    SetLogBase(u64, u64, Option<Kind>),
    SetLogBaseGood,
    SetLogFd(Kind),
    SetDeviceState(u32, u32, Option<Kind>),
    Load,
    Save,
    CheckDeviceState,
    Other(u8, Vec<u8>, Option<Kind>),
}

/// The parts of a message: request, payload, files.
type Parts = (u32, Vec<u8>, Vec<Kind>);

fn words<const N: usize>(words: [u64; N]) -> Vec<u8> {
    words.map(u64::to_ne_bytes).concat()
}

fn state(queue: u32, number: u32) -> Vec<u8> {
    [queue, number].map(u32::to_ne_bytes).concat()
}

impl Request {
    fn parts(&self, driver: &Driver, start: Start) -> Parts {
        use FrontendReq as Code;
        let (code, payload, files) = match self {
            Self::GetFeatures => (Code::GET_FEATURES, vec![], vec![]),
            Self::SetFeatures(features) => (Code::SET_FEATURES, words([*features]), vec![]),
            Self::GetProtocolFeatures => (Code::GET_PROTOCOL_FEATURES, vec![], vec![]),
            Self::SetProtocolFeatures(features) => {
                let features = words([u64::from(*features)]);
                (Code::SET_PROTOCOL_FEATURES, features, vec![])
            }
            Self::SetProtocolFeaturesGood => {
                (Code::SET_PROTOCOL_FEATURES, words([OFFERED]), vec![])
            }
            Self::SetOwner => (Code::SET_OWNER, vec![], vec![]),
            Self::ResetOwner => (Code::RESET_OWNER, vec![], vec![]),
            Self::ResetDevice => (Code::RESET_DEVICE, vec![], vec![]),
            Self::GetStatus => (Code::GET_STATUS, vec![], vec![]),
            Self::SetStatus(status) => (Code::SET_STATUS, words([*status]), vec![]),
            Self::GetQueueNum => (Code::GET_QUEUE_NUM, vec![], vec![]),
            Self::GetMaxMemSlots => (Code::GET_MAX_MEM_SLOTS, vec![], vec![]),
            Self::SetMemTable(regions, count) => {
                let regions = &regions[..regions.len().min(16)];
                let count = count.unwrap_or(regions.len() as u32);
                let mut payload = state(count, 0);
                payload.extend(regions.iter().flat_map(|region| words(region.words())));
                let files = regions
                    .iter()
                    .map(|region| Kind::Memory(region.number() as u8));
                (Code::SET_MEM_TABLE, payload, files.collect())
            }
            Self::AddMemReg(region) => {
                let payload = [&[0; 8][..], &words(region.words())].concat();
                (
                    Code::ADD_MEM_REG,
                    payload,
                    vec![Kind::Memory(region.number() as u8)],
                )
            }
            Self::RemMemReg(region) => {
                let payload = [&[0; 8][..], &words(region.words())].concat();
                (Code::REM_MEM_REG, payload, vec![])
            }
            Self::SetVringNum(queue, size) => {
                (Code::SET_VRING_NUM, state(queue.number(), *size), vec![])
            }
            Self::SetVringNumGood(queue) => {
                let size = start.size().into();
                (Code::SET_VRING_NUM, state((*queue).into(), size), vec![])
            }
            Self::SetVringAddr(queue, [descriptors, used, available]) => {
                let mut payload = state(queue.number(), 0);
                payload.extend(words([*descriptors, *used, *available, 0]));
                (Code::SET_VRING_ADDR, payload, vec![])
            }
            Self::SetVringAddrGood(queue, beside) => {
                let setup = driver.setup((*queue).into());
                let mut payload = state((*queue).into(), 0);
                let descriptors = setup.descriptors.wrapping_add_signed((*beside).into());
                payload.extend(words([descriptors, setup.used, setup.available, 0]));
                (Code::SET_VRING_ADDR, payload, vec![])
            }
            Self::SetVringBase(queue, base) => {
                (Code::SET_VRING_BASE, state(queue.number(), *base), vec![])
            }
            Self::SetVringBaseGood(queue) => {
                let base = state((*queue).into(), driver.base());
                (Code::SET_VRING_BASE, base, vec![])
            }
            Self::GetVringBase(queue) => (Code::GET_VRING_BASE, state(queue.number(), 0), vec![]),
            Self::SetVringEnable(queue, enabled) => (
                Code::SET_VRING_ENABLE,
                state(queue.number(), *enabled),
                vec![],
            ),
            Self::SetVringFile(which, queue, kind) => {
                let none = u64::from(kind.is_none()) << 8;
                let codes = [
                    Code::SET_VRING_KICK,
                    Code::SET_VRING_CALL,
                    Code::SET_VRING_ERR,
                ];
                let payload = words([u64::from(queue.number()) | none]);
                (
                    codes[usize::from(*which) % 3],
                    payload,
                    kind.iter().copied().collect(),
                )
            }
            Self::GetConfig(offset, size) => {
                let size = size % 4097;
                let mut payload = [u32::from(*offset), size.into(), 0]
                    .map(u32::to_ne_bytes)
                    .concat();
                payload.resize(12 + usize::from(size), 0);
                (Code::GET_CONFIG, payload, vec![])
            }
            Self::SetConfig(offset, data) => {
                let head = [u32::from(*offset), data.len() as u32, 0].map(u32::to_ne_bytes);
                (
                    Code::SET_CONFIG,
                    [&head.concat()[..], data].concat(),
                    vec![],
                )
            }
            Self::SetBackendReqFd(kind) => (
                Code::SET_BACKEND_REQ_FD,
                vec![],
                kind.iter().copied().collect(),
            ),
            Self::GetInflight(queues, size, padded) => {
                let mut payload = inflight(0, 0, *queues, *size);
                payload.resize(if *padded { 24 } else { 20 }, 0);
                (Code::GET_INFLIGHT_FD, payload, vec![])
            }
            Self::SetInflight(queues, size, length, offset, kind) => {
                let payload = inflight(*length, *offset, *queues, *size);
                (
                    Code::SET_INFLIGHT_FD,
                    payload,
                    kind.iter().copied().collect(),
                )
            }
            Self::SetInflightGood => {
                let length = file_size(false, QUEUES, INFLIGHT_SIZE) as u64;
                let payload = inflight(length, 0, QUEUES, INFLIGHT_SIZE);
                (Code::SET_INFLIGHT_FD, payload, vec![Kind::Inflight])
            }
            Self::SetGpuSocket(kind) => (Code::GPU_SET_SOCKET, vec![], vec![*kind]),
            Self::SetLogBase(size, offset, kind) => {
                let files = kind.iter().copied().collect();
                (Code::SET_LOG_BASE, words([*size, *offset]), files)
            }
            Self::SetLogBaseGood => (Code::SET_LOG_BASE, words([LOG_SIZE, 0]), vec![Kind::Log]),
            Self::SetLogFd(kind) => (Code::SET_LOG_FD, vec![], vec![*kind]),
            Self::SetDeviceState(direction, phase, kind) => {
                let files = kind.iter().copied().collect();
                (Code::SET_DEVICE_STATE_FD, state(*direction, *phase), files)
            }
            Self::Load => (Code::SET_DEVICE_STATE_FD, state(1, 0), vec![Kind::State]),
            Self::Save => (Code::SET_DEVICE_STATE_FD, state(0, 0), vec![Kind::Pipe]),
            Self::CheckDeviceState => (Code::CHECK_DEVICE_STATE, vec![], vec![]),
            Self::Other(code, payload, kind) => {
                return (
                    (*code).into(),
                    payload.clone(),
                    kind.iter().copied().collect(),
                );
            }
        };
        (code.into(), payload, files)
    }
}

fn inflight(length: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut payload = words([length, offset]);
    payload.extend([queues, size].map(u16::to_ne_bytes).concat());
    payload
}

/// Returns the messages that start both rings.
fn opening(start: Start, log: bool) -> Vec<Request> {
    let left_out = u64::from(!start.indirect) << 28
        | u64::from(!start.event_index) << 29
        | u64::from(!start.packed) << 34;
    let features = !left_out;
    let mut regions = vec![Region::Good(0), Region::Good(1)];
    let mut requests = vec![
        Request::SetFeatures(features | PROTOCOL_FEATURES),
        Request::SetProtocolFeaturesGood,
    ];
    if log {
        requests.push(Request::SetMemTable(regions, None));
        requests.push(Request::SetLogBaseGood);
    } else {
        // The log cannot cover this region.
        regions.push(Region::Good(2));
        requests.push(Request::SetMemTable(regions, None));
    }
    for queue in [false, true] {
        requests.extend([
            Request::SetVringNumGood(queue),
            Request::SetVringBaseGood(queue),
            Request::SetVringAddrGood(queue, 0),
            Request::SetVringFile(1, Number::Good(queue), Some(Kind::Event)),
            Request::SetVringFile(0, Number::Good(queue), Some(Kind::Event)),
            Request::SetVringEnable(Number::Good(queue), 1),
        ]);
    }
    requests
}

/// One file of each kind. They stay open until the process ends.
struct Files {
    event: OwnedFd,
    inflight: OwnedFd,
    socket: (UnixStream, UnixStream),
    pipe: (OwnedFd, OwnedFd),
    null: OwnedFd,
    directory: OwnedFd,
    log: OwnedFd,
}

impl Files {
    fn get() -> &'static Self {
        static FILES: OnceLock<Files> = OnceLock::new();
        FILES.get_or_init(|| Self::make().expect("files of all kinds"))
    }

    fn make() -> io::Result<Self> {
        let open = |path| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Ok(Self {
            event: eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            inflight: create_file(false, QUEUES, INFLIGHT_SIZE).map_err(io::Error::other)?,
            socket: UnixStream::pair()?,
            pipe: rustix::pipe::pipe()?,
            null: open("/dev/null")?,
            directory: open("/")?,
            log: file(LOG_SIZE),
        })
    }

    fn file<'a>(&'a self, kind: Kind, state: &'a OwnedFd) -> BorrowedFd<'a> {
        match kind {
            Kind::State => state.as_fd(),
            Kind::Log => self.log.as_fd(),
            Kind::Memory(number) => files()[usize::from(number) % REGIONS.len()].as_fd(),
            Kind::Event => self.event.as_fd(),
            Kind::Inflight => self.inflight.as_fd(),
            Kind::Socket => self.socket.0.as_fd(),
            Kind::Pipe => self.pipe.1.as_fd(),
            Kind::Null => self.null.as_fd(),
            Kind::Directory => self.directory.as_fd(),
        }
    }
}

/// The socket of the front-end, and the file with a device state.
struct FrontEnd<'a> {
    socket: &'a UnixStream,
    state: &'a OwnedFd,
}

/// Sends bytes with files. Returns whether all bytes were sent.
fn send(front_end: &FrontEnd<'_>, bytes: &[u8], kinds: &[Kind]) -> bool {
    let FrontEnd { socket, state } = front_end;
    let kinds = kinds.iter().copied();
    let files: Vec<_> = kinds.map(|kind| Files::get().file(kind, state)).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    );
    sent == Ok(bytes.len())
}

impl Message {
    /// Sends the message. Returns its request number, or `None` if the session cannot parse what follows.
    fn send(&self, front_end: &FrontEnd<'_>, parts: Parts) -> Option<u32> {
        let (request, mut payload, mut files) = parts;
        let mut flags = 1 | if self.need_reply { FLAG_NEED_REPLY } else { 0 };
        let mut cut = None;
        let mut left_out = 0;
        match &self.wrong {
            None | Some(Wrong::Size(_)) => {}
            Some(Wrong::Flags(other)) => flags = *other,
            Some(Wrong::Payload(by)) => {
                payload.resize(payload.len().saturating_add_signed((*by).into()), 0);
            }
            Some(Wrong::Files(kinds)) => files = kinds[..kinds.len().min(64)].to_vec(),
            Some(Wrong::Cut(place, kind)) => cut = Some((usize::from(*place), *kind)),
            Some(Wrong::Short(by)) => left_out = usize::from(*by) + 1,
        }
        let size = match self.wrong {
            Some(Wrong::Size(size)) => size,
            _ => payload.len() as u32,
        };
        let mut bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
        bytes.extend(payload);
        bytes.truncate(bytes.len().saturating_sub(left_out));
        let (place, second) = cut.unwrap_or((bytes.len(), None));
        let (front, back) = bytes.split_at(place.min(bytes.len()));
        let is_sent = (front.is_empty() || send(front_end, front, &files))
            && (back.is_empty() || send(front_end, back, second.as_slice()));
        let goes_on = left_out == 0 && !matches!(self.wrong, Some(Wrong::Size(_)));
        (is_sent && goes_on).then_some(request)
    }
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the session sends an answer without a request, or leaks a file.
    pub fn run(self) {
        Files::get();
        let mut guest = Guest::new();
        // No requests are in flight.
        let length = file_size(false, QUEUES, INFLIGHT_SIZE);
        let zeroes = vec![0; length];
        let _ = rustix::io::pwrite(&Files::get().inflight, &zeroes, 0);
        let mut driver = Driver::new(QUEUES, self.start, &mut guest);
        for (queue, readable, writable, shape) in &self.requests {
            let queue = u16::from(*queue);
            driver.submit(queue, &mut guest, readable, u64::from(*writable), shape);
        }
        if let Some((queue, mistake)) = self.mistake {
            driver.err(queue.into(), &mut guest, mistake);
        }
        let before = lowest_file();
        {
            let (mut front_end, socket) = UnixStream::pair().expect("a pair of sockets");
            let state = self.state().expect("a pipe");
            let end = FrontEnd {
                socket: &front_end,
                state: &state,
            };
            let sent = self.send_all(&end, &driver);
            front_end.shutdown(Shutdown::Write).expect("a socket");
            let _ = set_socket_send_buffer_size(&socket, SEND_BUFFER);
            let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
            let outcome = match self.threads {
                true => echo::<true>(socket, &stop),
                false => echo::<false>(socket, &stop),
            };
            let _ = outcome;
            let mut replies = Vec::new();
            let _ = front_end.read_to_end(&mut replies);
            check(&replies, sent.as_deref());
        }
        assert_eq!(lowest_file(), before, "the session leaks a file");
    }

    /// Returns a pipe that contains the device state.
    fn state(&self) -> io::Result<OwnedFd> {
        let (state, end) = rustix::pipe::pipe()?;
        let (is_good, part) = &self.state;
        let part = &part[..part.len().min(STATE_SIZE)];
        let mut bytes = Vec::new();
        if *is_good {
            bytes.extend(b"vhdstate");
            bytes.extend(1u32.to_le_bytes());
            bytes.extend(b"rng\0\0\0\0\0\0\0\0\0\0\0\0\0");
            bytes.extend(1u32.to_le_bytes());
            bytes.extend((part.len() as u64).to_le_bytes());
            let checksum = [&bytes[..], part].concat();
            bytes.extend(crc32(&checksum).to_le_bytes());
        }
        bytes.extend(part);
        rustix::io::write(&end, &bytes)?;
        Ok(state)
    }

    /// Sends all messages. Returns the requests that can be answered, or `None` if that is not known.
    fn send_all(&self, front_end: &FrontEnd<'_>, driver: &Driver) -> Option<Vec<u32>> {
        let mut sent = Vec::new();
        let opening = match self.opening {
            true => opening(self.start, self.log),
            false => Vec::new(),
        };
        let opening = opening.into_iter().map(|request| Message {
            request,
            need_reply: true,
            wrong: None,
        });
        let opening: Vec<_> = opening.collect();
        for message in opening.iter().chain(&self.messages).take(MOST_MESSAGES) {
            let parts = message.request.parts(driver, self.start);
            sent.push(message.send(front_end, parts)?);
        }
        Some(sent)
    }
}

/// Computes the CRC-32 of IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ ((sum & 1) * 0xedb8_8320)
        })
    })
}

/// Returns the number that the next file descriptor will have.
fn lowest_file() -> i32 {
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    event.as_raw_fd()
}

/// Checks that there is at most one answer for each request, in the same order.
fn check(replies: &[u8], sent: Option<&[u32]>) {
    let number = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap_or_default());
    let mut sent = sent.map(<[u32]>::iter);
    let mut rest = replies;
    while !rest.is_empty() {
        assert!(rest.len() >= 12, "an incomplete reply");
        let [request, flags, size] = [0, 4, 8].map(|place| number(&rest[place..place + 4]));
        assert_eq!(flags, 1 | FLAG_REPLY);
        assert!(rest.len() >= 12 + size as usize, "an incomplete reply");
        let was_sent = sent
            .as_mut()
            .is_none_or(|sent| sent.any(|sent| *sent == request));
        assert!(was_sent, "request {request} was answered but not sent");
        rest = &rest[12 + size as usize..];
    }
}

/// Serves a front-end with a new device.
fn echo<const ONE_PER_QUEUE: bool>(socket: UnixStream, stop: &OwnedFd) -> Result<(), MessageError> {
    let statistics = Statistics::new("echo", &["request"]);
    serve(
        &Echo::<ONE_PER_QUEUE>::default(),
        &statistics,
        socket,
        stop,
        Polling::Auto,
    )
}
