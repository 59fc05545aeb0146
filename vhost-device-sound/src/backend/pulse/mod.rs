// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end `pulse`: a client of a PulseAudio server, or of PipeWire's pipewire-pulse. One connection serves all streams.
//!
//! Nothing here blocks: the thread of the queues watches the socket. The server is the clock of a stream: it asks for the sound that it
//! plays next, and sends what it has recorded. While there is no server, or it does not move a stream, the clock of this host goes on
//! in silence, and the connection is tried again.

mod link;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use pulseaudio::protocol::stream::{BufferAttr, StreamFlags};
use pulseaudio::protocol::{
    AuthParams, AuthReply, ChannelMap, ChannelPosition, Command, CorkStreamParams,
    CreatePlaybackStreamReply, CreateRecordStreamReply, LatencyParams, MAX_VERSION,
    PlaybackLatency, PlaybackStreamParams, Prop, Props, RecordLatency, RecordStreamParams,
    SampleFormat, SampleSpec,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_device_common::device::{Access, Call, Needs, StartError};
use vhost_device_common::worker::{Readiness, Watcher};
use vhost_device_common::{info_limited, lock, warn_limited};

use super::{Pace, Port};
use crate::format::Format;
use crate::profile::{Params, Profile};
use crate::protocol::{Direction, Status};
use link::{Link, Message};

/// Size of an authentication cookie. pipewire-pulse refuses others.
const COOKIE_SIZE: usize = 256;
/// How long the server may take for the first connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between attempts to connect: the first one, and the longest.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A running stream that the server does not move for this long, or for three quarters of the guest's buffer if that is longer, goes on
/// by the clock of this host. ALSA in the guest gives up after the time of a buffer, or 100 ms.
const SHORTEST_STALL: Duration = Duration::from_millis(60);
/// The longest such time.
const LONGEST_STALL: Duration = Duration::from_millis(500);
/// When a stream that has started asks for its latency.
const FIRST_LATENCY: Duration = Duration::from_millis(50);
/// How often a running stream asks for its latency after that.
const LATENCY_INTERVAL: Duration = Duration::from_millis(500);
/// How much recorded sound is kept for a guest that does not fetch it, in periods.
const KEPT_PERIODS: usize = 8;
/// Most recorded sound of one moment, in bytes.
const MAX_RECORDED: usize = 4 << 20;

/// Returns the server's name of a format, if it has it.
fn sample_format(format: Format) -> Option<SampleFormat> {
    match format {
        Format::U8 => Some(SampleFormat::U8),
        Format::S16 => Some(SampleFormat::S16Le),
        Format::S24In3 => Some(SampleFormat::S24Le),
        Format::S24 => Some(SampleFormat::S24In32Le),
        Format::S32 => Some(SampleFormat::S32Le),
        Format::Float => Some(SampleFormat::Float32Le),
        Format::S8 | Format::Float64 => None,
    }
}

/// Returns the positions of channels in the order of the channel maps that the guest gets.
fn channel_map(channels: u8) -> ChannelMap {
    use ChannelPosition::{
        FrontCenter, FrontLeft, FrontRight, Lfe, Mono, RearCenter, RearLeft, RearRight, SideLeft,
        SideRight,
    };
    const ALL: [ChannelPosition; 8] = [
        FrontLeft,
        FrontRight,
        RearLeft,
        RearRight,
        FrontCenter,
        Lfe,
        SideLeft,
        SideRight,
    ];
    let positions: &[ChannelPosition] = match channels {
        1 => &[Mono],
        3 => &[FrontLeft, FrontRight, FrontCenter],
        7 => &[
            FrontLeft,
            FrontRight,
            RearLeft,
            RearRight,
            FrontCenter,
            Lfe,
            RearCenter,
        ],
        _ => ALL.get(..channels.into()).unwrap_or(&ALL),
    };
    ChannelMap::new(positions.iter().copied())
}

/// Returns the path that PULSE_SERVER names, if it is set.
///
/// # Errors
/// It names something else than a unix socket.
fn server_from_env() -> Result<Option<PathBuf>, StartError> {
    let Some(server) = std::env::var_os("PULSE_SERVER").filter(|server| !server.is_empty()) else {
        return Ok(None);
    };
    let path = server.to_str().unwrap_or_default();
    let path = Path::new(path.strip_prefix("unix:").unwrap_or(path));
    match path.is_absolute() {
        true => Ok(Some(path.to_owned())),
        false => Err(StartError(format!(
            "cannot use PULSE_SERVER={}: only `unix:` and an absolute path is supported; unset it, or name the socket with --pulse-server",
            server.display()
        ))),
    }
}

/// What a reply is for.
#[derive(Clone, Copy, Debug)]
enum Question {
    Auth,
    Name,
    /// The creation of a stream with this generation.
    Create(usize, u64),
    Latency(usize, u64),
    /// The end of a channel's sound, after which the channel is deleted.
    Drain(u32),
    Other,
}

/// A latency that the server has reported.
#[derive(Clone, Copy, Debug)]
struct Latency {
    /// When it was reported.
    at: Instant,
    /// Bytes that were sent by then.
    sent: u64,
    /// Bytes that were not audible yet, or not received yet.
    bytes: u64,
}

/// The server's end of a stream.
struct Remote {
    direction: Direction,
    name: CString,
    params: Option<Params>,
    /// From PREPARE to RELEASE.
    is_open: bool,
    is_running: bool,
    /// Distinguishes the stream from those before.
    generation: u64,
    /// The server's number, once it has created the stream.
    channel: Option<u32>,
    /// When to create the stream again, which the server has refused or ended.
    recreate: Option<Instant>,
    /// The number of an earlier stream, whose end is still to be heard.
    draining: Option<u32>,
    /// Bytes that the server has asked for.
    wanted: u64,
    /// Bytes that were recorded.
    recorded: VecDeque<u8>,
    /// Bytes that were sent or received.
    moved: u64,
    /// When the server last asked for sound, or sent some.
    active: Instant,
    latency: Option<Latency>,
    /// When to ask for the latency.
    next_latency: Instant,
    has_xrun: bool,
}

impl Remote {
    /// Returns whether the server is expected to move the stream.
    fn is_live(&self) -> bool {
        self.is_running && self.channel.is_some()
    }

    /// Drops the oldest recorded sound beyond so many bytes.
    fn keep(&mut self, most: usize, params: &Params) {
        let excess = self.recorded.len().saturating_sub(most);
        if excess > 0 {
            let whole = excess.next_multiple_of(params.frame_bytes().max(1) as usize);
            self.recorded.drain(..whole.min(self.recorded.len()));
            self.has_xrun = true;
        }
    }

    /// Returns how long the server may take.
    fn stall(&self) -> Duration {
        let Some(params) = &self.params else {
            return SHORTEST_STALL;
        };
        let second = u64::from(params.rate) * u64::from(params.frame_bytes());
        let most = u64::from(params.buffer_bytes) * 750;
        let time = Duration::from_millis(most.checked_div(second).unwrap_or(0));
        time.clamp(SHORTEST_STALL, LONGEST_STALL)
    }

    /// Returns how many bytes are not audible yet, or not fetched yet. While the stream is stopped, nothing is played.
    fn latency(&self, now: Instant) -> u64 {
        let (Some(latency), Some(params)) = (self.latency, self.params) else {
            return 0;
        };
        match self.direction {
            Direction::Output => {
                let sent = self.moved.saturating_sub(latency.sent);
                let second = u128::from(params.rate) * u128::from(params.frame_bytes());
                let time = match self.is_running {
                    true => now.saturating_duration_since(latency.at).as_nanos(),
                    false => 0,
                };
                let elapsed = (time * second / 1_000_000_000) as u64;
                latency.bytes.saturating_add(sent).saturating_sub(elapsed)
            }
            Direction::Input => latency.bytes.saturating_add(self.recorded.len() as u64),
        }
    }

    /// Returns whether it is the server's turn.
    fn is_waiting(&self) -> bool {
        self.wanted == 0 && self.recorded.is_empty()
    }
}

/// A client of a server.
pub struct Pulse {
    path: PathBuf,
    cookie: Vec<u8>,
    link: Option<Link>,
    /// The server has accepted the client.
    is_ready: bool,
    /// When it did.
    ready_at: Instant,
    questions: BTreeMap<u32, Question>,
    streams: Vec<Remote>,
    /// The watcher of the present thread, and the token of the socket.
    watcher: Option<(Watcher, u32)>,
    /// When to try to connect again.
    retry: Option<Instant>,
    delay: Duration,
}

impl Pulse {
    /// Connects to the server that `path` or the environment names.
    ///
    /// # Errors
    /// There is no server, or it does not accept the client.
    pub fn open(path: Option<&Path>, profiles: &mut [Profile]) -> Result<Self, StartError> {
        let is_known = |format: &Format| sample_format(*format).is_some();
        if !profiles
            .iter()
            .all(|profile| profile.formats.iter().any(is_known))
        {
            return Err(StartError(
                "a sound server has none of the formats of a stream; offer others with --streams"
                    .to_owned(),
            ));
        }
        let path = match path {
            Some(path) => path.to_owned(),
            None => server_from_env()?.or_else(pulseaudio::socket_path_from_env).ok_or_else(|| {
                StartError(
                    "there is no PulseAudio server: XDG_RUNTIME_DIR/pulse/native does not exist; start one, or name its socket with --pulse-server".to_owned(),
                )
            })?,
        };
        let cookie = pulseaudio::cookie_path_from_env().and_then(|path| std::fs::read(path).ok());
        let mut cookie = cookie.unwrap_or_default();
        cookie.resize(COOKIE_SIZE, 0);
        let mut counts = [0, 0];
        let mut streams = Vec::new();
        for profile in &*profiles {
            let [outputs, inputs] = &mut counts;
            let (count, kind) = match profile.direction {
                Direction::Output => (outputs, "output"),
                Direction::Input => (inputs, "input"),
            };
            *count += 1;
            streams.push(Remote {
                direction: profile.direction,
                name: CString::new(format!("{kind} {count}")).unwrap_or_default(),
                params: None,
                is_open: false,
                is_running: false,
                generation: 0,
                channel: None,
                recreate: None,
                draining: None,
                wanted: 0,
                recorded: VecDeque::new(),
                moved: 0,
                active: Instant::now(),
                latency: None,
                next_latency: Instant::now(),
                has_xrun: false,
            });
        }
        let mut pulse = Self {
            path,
            cookie,
            link: None,
            is_ready: false,
            ready_at: Instant::now(),
            questions: BTreeMap::new(),
            streams,
            watcher: None,
            retry: None,
            delay: FIRST_DELAY,
        };
        pulse.connect_at_start().map_err(|error| {
            StartError(format!(
                "cannot use the PulseAudio server at {}: {error}",
                pulse.path.display()
            ))
        })?;
        // The sandbox allows connections in the real folder of the socket.
        if let Ok(path) = pulse.path.canonicalize() {
            pulse.path = path;
        }
        for profile in profiles {
            profile.formats.retain(is_known);
        }
        Ok(pulse)
    }

    fn connect_at_start(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        self.connect()?;
        while !self.is_ready {
            let Some(link) = &self.link else {
                return Err(io::ErrorKind::NotConnected.into());
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut file = [PollFd::new(link, PollFlags::IN)];
            if poll(&mut file, Some(&left))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.receive(Instant::now())?;
        }
        Ok(())
    }

    /// Returns what the client needs from the sandbox: it may connect to another server at the same place.
    pub fn needs(&self) -> Needs {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        Needs {
            queue: Call::connect_unix(),
            files: vec![(directory.to_owned(), Access::CONNECT)],
            ..Needs::default()
        }
    }

    /// Has `watcher` report the socket of this connection and of later ones as `token`.
    pub fn watch(&mut self, watcher: Watcher, token: u32) {
        self.watcher = Some((watcher, token));
        self.watch_link();
    }

    /// Reports nothing any more.
    pub fn unwatch(&mut self) {
        if let (Some((watcher, _)), Some(link)) = (self.watcher.take(), &self.link) {
            watcher.remove(link);
        }
    }

    fn watch_link(&mut self) {
        if let (Some((watcher, token)), Some(link)) = (&self.watcher, &self.link) {
            let interest = Readiness::READABLE | Readiness::WRITABLE;
            match watcher.add(link, interest, *token) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    log::error!("cannot wait for the sound server: {error}");
                }
                _ => {}
            }
        }
    }

    fn connect(&mut self) -> io::Result<()> {
        self.link = Some(Link::connect(&self.path)?);
        self.is_ready = false;
        self.watch_link();
        let auth = Command::Auth(AuthParams {
            version: MAX_VERSION,
            supports_shm: false,
            supports_memfd: false,
            cookie: self.cookie.clone(),
        });
        self.ask(&auth, Question::Auth)
    }

    /// Sends a command, whose reply is for `question`.
    fn ask(&mut self, command: &Command, question: Question) -> io::Result<()> {
        let link = self.link.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let number = link.command(command)?;
        self.questions.insert(number, question);
        Ok(())
    }

    /// Sends a command whose reply is not needed. Without a server, nothing happens.
    fn tell(&mut self, command: &Command) {
        if self.is_ready
            && let Err(error) = self.ask(command, Question::Other)
        {
            self.lose(&error);
        }
    }

    /// Gives up the connection.
    fn lose(&mut self, error: &io::Error) {
        let Some(link) = self.link.take() else {
            return;
        };
        if let Some((watcher, _)) = &self.watcher {
            watcher.remove(&link);
        }
        if self.is_ready {
            warn_limited(format_args!(
                "the connection to the sound server has ended ({error}); playing and recording silence until it is back"
            ));
            // A server that accepts the client and fails at once is tried less and less often.
            if self.ready_at.elapsed() > LONGEST_DELAY {
                self.delay = FIRST_DELAY;
            }
        }
        self.is_ready = false;
        self.questions.clear();
        for stream in &mut self.streams {
            stream.channel = None;
            stream.recreate = None;
            stream.draining = None;
            stream.wanted = 0;
            stream.latency = None;
        }
        self.retry = Some(Instant::now() + self.delay);
        self.delay = (self.delay * 2).min(LONGEST_DELAY);
    }

    /// Receives what the server has sent, and sends what waits.
    pub fn ready(&mut self, now: Instant) {
        let moved = self.receive(now).and_then(|()| match &mut self.link {
            Some(link) => link.flush(),
            None => Ok(()),
        });
        if let Err(error) = moved {
            self.lose(&error);
        }
    }

    /// Does what is due: connects again, creates streams again, and asks for latencies.
    pub fn tick(&mut self, now: Instant) {
        if self.retry.is_some_and(|time| time <= now) {
            self.retry = None;
            if let Err(error) = self.connect() {
                log::debug!("cannot connect to the sound server: {error}");
                self.link = None;
                self.retry = Some(now + self.delay);
                self.delay = (self.delay * 2).min(LONGEST_DELAY);
            }
        }
        for index in 0..self.streams.len() {
            let Some(stream) = self.streams.get_mut(index) else {
                break;
            };
            if stream.recreate.is_some_and(|time| time <= now) {
                stream.recreate = None;
                if let Err(error) = self.create(index) {
                    return self.lose(&error);
                }
                continue;
            }
            let (Some(channel), true) = (stream.channel, stream.is_running) else {
                continue;
            };
            if now < stream.next_latency {
                continue;
            }
            stream.next_latency = now + LATENCY_INTERVAL;
            let question = Question::Latency(index, stream.generation);
            let params = LatencyParams {
                channel,
                now: SystemTime::now(),
            };
            let command = match stream.direction {
                Direction::Output => Command::GetPlaybackLatency(params),
                Direction::Input => Command::GetRecordLatency(params),
            };
            if let Err(error) = self.ask(&command, question) {
                return self.lose(&error);
            }
        }
    }

    /// Returns when to call [`Pulse::tick`].
    pub fn next_tick(&self) -> Option<Instant> {
        let live = self.streams.iter().filter(|stream| stream.is_live());
        let latencies = live.map(|stream| stream.next_latency);
        let recreations = self.streams.iter().filter_map(|stream| stream.recreate);
        latencies.chain(recreations).chain(self.retry).min()
    }

    fn receive(&mut self, now: Instant) -> io::Result<()> {
        // Taken out, so that messages can change the rest.
        let Some(mut link) = self.link.take() else {
            return Ok(());
        };
        let mut replies = Vec::new();
        let received = link.receive(|message| match message {
            Message::Reply(number, content) => {
                if let Some(question) = self.questions.remove(&number) {
                    replies.push((question, Ok(content.to_vec())));
                }
            }
            Message::Failed(number, error) => {
                if let Some(question) = self.questions.remove(&number) {
                    replies.push((question, Err(error)));
                }
            }
            Message::Event(event) => self.note_event(*event, now),
            Message::Sound(channel, bytes) => self.note_sound(channel, bytes, now),
        });
        self.link = Some(link);
        for (question, reply) in replies {
            self.handle_reply(question, reply, now)?;
        }
        received
    }

    fn stream_of(&mut self, channel: u32, direction: Direction) -> Option<&mut Remote> {
        let mut streams = self.streams.iter_mut();
        streams.find(|stream| stream.channel == Some(channel) && stream.direction == direction)
    }

    fn note_event(&mut self, event: Command, now: Instant) {
        match event {
            Command::Request(request) => {
                if let Some(stream) = self.stream_of(request.channel, Direction::Output) {
                    stream.wanted = stream.wanted.saturating_add(request.length.into());
                    stream.active = now;
                }
            }
            Command::Underflow(underflow) => {
                if let Some(stream) = self.stream_of(underflow.channel, Direction::Output) {
                    stream.has_xrun = stream.is_running;
                }
            }
            Command::PlaybackStreamKilled(channel) => self.forget(channel, Direction::Output, now),
            Command::RecordStreamKilled(channel) => self.forget(channel, Direction::Input, now),
            _ => {}
        }
    }

    /// The server has ended a stream, for example because its device has gone. The clock of this host goes on.
    fn forget(&mut self, channel: u32, direction: Direction, now: Instant) {
        if let Some(stream) = self.stream_of(channel, direction) {
            warn_limited(format_args!(
                "the sound server has ended a stream; it is silent; trying again in {} s",
                LONGEST_DELAY.as_secs()
            ));
            stream.channel = None;
            stream.wanted = 0;
            stream.latency = None;
            stream.recreate = Some(now + LONGEST_DELAY);
        }
    }

    fn note_sound(&mut self, channel: u32, bytes: &[u8], now: Instant) {
        let Some(stream) = self.stream_of(channel, Direction::Input) else {
            return;
        };
        let (Some(params), true) = (stream.params, stream.is_running) else {
            return;
        };
        stream.active = now;
        stream.moved = stream.moved.saturating_add(bytes.len() as u64);
        stream.recorded.extend(bytes);
        // What has come at the same time may be more; the guest gets it first.
        stream.keep(MAX_RECORDED, &params);
    }

    fn handle_reply(
        &mut self,
        question: Question,
        reply: Result<Vec<u8>, String>,
        now: Instant,
    ) -> io::Result<()> {
        let version = self.link.as_ref().map_or(MAX_VERSION, |link| link.version);
        match (question, reply) {
            (Question::Auth, Ok(content)) => {
                let auth: AuthReply = link::reply(&content, version)?;
                if let Some(link) = &mut self.link {
                    link.version = auth.version.min(MAX_VERSION);
                }
                let mut properties = Props::new();
                properties.set(Prop::ApplicationName, c"vhost-device-sound");
                self.ask(&Command::SetClientName(properties), Question::Name)
            }
            (Question::Name, Ok(_)) => {
                self.is_ready = true;
                self.ready_at = now;
                info_limited(format_args!(
                    "connected to the sound server at {}",
                    self.path.display()
                ));
                (0..self.streams.len()).try_for_each(|index| self.create(index))
            }
            (Question::Auth | Question::Name, Err(error)) => Err(io::Error::other(error)),
            (Question::Create(index, generation), Ok(content)) => {
                self.created(index, generation, &content, version, now)
            }
            (Question::Create(index, generation), Err(error)) => {
                let stream = self.streams.get_mut(index);
                if let Some(stream) = stream.filter(|stream| stream.generation == generation) {
                    warn_limited(format_args!(
                        "the sound server refuses a stream: {error}; it is silent; trying again in {} s",
                        LONGEST_DELAY.as_secs()
                    ));
                    stream.recreate = Some(now + LONGEST_DELAY);
                }
                Ok(())
            }
            (Question::Latency(index, generation), Ok(content)) => {
                self.note_latency(index, generation, &content, version, now)
            }
            (Question::Drain(channel), _) => {
                let mut streams = self.streams.iter_mut();
                match streams.find(|stream| stream.draining == Some(channel)) {
                    Some(stream) => {
                        stream.draining = None;
                        self.ask(&Command::DeletePlaybackStream(channel), Question::Other)
                    }
                    // It is deleted already.
                    None => Ok(()),
                }
            }
            (Question::Latency(..) | Question::Other, _) => Ok(()),
        }
    }

    /// Creates a stream that has parameters, stopped.
    fn create(&mut self, index: usize) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(index) else {
            return Ok(());
        };
        let Some(params) = stream.params.filter(|_| stream.is_open) else {
            return Ok(());
        };
        stream.generation += 1;
        let question = Question::Create(index, stream.generation);
        let sample_spec = SampleSpec {
            format: sample_format(params.format).unwrap_or_default(),
            channels: params.channels,
            sample_rate: params.rate,
        };
        let mut props = Props::new();
        props.set(Prop::MediaName, &stream.name);
        let flags = StreamFlags {
            start_corked: true,
            adjust_latency: true,
            ..StreamFlags::default()
        };
        let period = params.period_bytes;
        let direction = stream.direction;
        let channel_map = channel_map(params.channels);
        let command = match direction {
            Direction::Output => {
                // Two periods, but never the whole buffer of the guest: it could not be refilled in time.
                let target = (2 * period).min(params.buffer_bytes - period).max(period);
                Command::CreatePlaybackStream(PlaybackStreamParams {
                    sample_spec,
                    channel_map,
                    flags,
                    props,
                    buffer_attr: BufferAttr {
                        max_length: target.saturating_mul(2),
                        target_length: target,
                        pre_buffering: period,
                        minimum_request_length: period,
                        fragment_size: u32::MAX,
                    },
                    ..PlaybackStreamParams::default()
                })
            }
            Direction::Input => Command::CreateRecordStream(RecordStreamParams {
                sample_spec,
                channel_map,
                flags,
                props,
                buffer_attr: BufferAttr {
                    max_length: u32::MAX,
                    fragment_size: period,
                    ..BufferAttr::default()
                },
                ..RecordStreamParams::default()
            }),
        };
        self.ask(&command, question)
    }

    fn created(
        &mut self,
        index: usize,
        generation: u64,
        content: &[u8],
        version: u16,
        now: Instant,
    ) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(index) else {
            return Ok(());
        };
        let (channel, wanted) = match stream.direction {
            Direction::Output => {
                let reply: CreatePlaybackStreamReply = link::reply(content, version)?;
                (reply.channel, reply.requested_bytes)
            }
            Direction::Input => {
                let reply: CreateRecordStreamReply = link::reply(content, version)?;
                (reply.channel, 0)
            }
        };
        let direction = stream.direction;
        if generation != stream.generation || !stream.is_open {
            // The guest has released the stream, or chosen other parameters, meanwhile.
            return self.ask(&delete(direction, channel), Question::Other);
        }
        stream.channel = Some(channel);
        stream.wanted = wanted.into();
        stream.moved = 0;
        stream.active = now;
        stream.latency = Some(Latency {
            at: now,
            sent: 0,
            bytes: 0,
        });
        if stream.is_running {
            return self.ask(&cork(direction, channel, false), Question::Other);
        }
        Ok(())
    }

    fn note_latency(
        &mut self,
        index: usize,
        generation: u64,
        content: &[u8],
        version: u16,
        now: Instant,
    ) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(index) else {
            return Ok(());
        };
        let Some(params) = stream.params.filter(|_| stream.generation == generation) else {
            return Ok(());
        };
        let (microseconds, queued) = match stream.direction {
            Direction::Output => {
                let reply: PlaybackLatency = link::reply(content, version)?;
                (
                    reply.sink_usec,
                    reply.write_offset.saturating_sub(reply.read_offset),
                )
            }
            Direction::Input => {
                let reply: RecordLatency = link::reply(content, version)?;
                (
                    reply.source_usec,
                    reply.write_offset.saturating_sub(reply.read_offset),
                )
            }
        };
        let second = u64::from(params.rate) * u64::from(params.frame_bytes());
        let device = microseconds.min(10_000_000) * second / 1_000_000;
        stream.latency = Some(Latency {
            at: now,
            sent: stream.moved,
            bytes: device + u64::try_from(queued).unwrap_or(0),
        });
        Ok(())
    }

    fn close(&mut self, index: usize, plays_on: bool) {
        let Some(stream) = self.streams.get_mut(index) else {
            return;
        };
        stream.is_open = false;
        stream.is_running = false;
        stream.recreate = None;
        stream.wanted = 0;
        stream.recorded.clear();
        stream.latency = None;
        stream.has_xrun = false;
        stream.generation += 1;
        let direction = stream.direction;
        let Some(channel) = stream.channel.take() else {
            return;
        };
        match plays_on {
            // The guest has played everything: the rest is still to be heard.
            true => {
                // One at a time: a server whose device stands still never ends them.
                if let Some(earlier) = stream.draining.replace(channel) {
                    self.tell(&delete(direction, earlier));
                }
                self.tell(&cork(direction, channel, false));
                let drain = Command::DrainPlaybackStream(channel);
                if self.is_ready
                    && let Err(error) = self.ask(&drain, Question::Drain(channel))
                {
                    self.lose(&error);
                }
            }
            false => self.tell(&delete(direction, channel)),
        }
    }

    fn run(&mut self, index: usize, is_running: bool, now: Instant) {
        let Some(stream) = self.streams.get_mut(index) else {
            return;
        };
        // Until the server reports a latency, it is that of what was sent.
        let bytes = match (stream.direction, stream.latency) {
            (Direction::Output, _) => stream.latency(now),
            (Direction::Input, latency) => latency.map_or(0, |latency| latency.bytes),
        };
        stream.latency = Some(Latency {
            at: now,
            sent: stream.moved,
            bytes,
        });
        stream.is_running = is_running;
        stream.active = now;
        stream.next_latency = now + FIRST_LATENCY;
        stream.has_xrun = false;
        stream.recorded.clear();
        let direction = stream.direction;
        if let Some(channel) = stream.channel {
            self.tell(&cork(direction, channel, !is_running));
        }
    }
}

fn cork(direction: Direction, channel: u32, cork: bool) -> Command {
    let params = CorkStreamParams { channel, cork };
    match direction {
        Direction::Output => Command::CorkPlaybackStream(params),
        Direction::Input => Command::CorkRecordStream(params),
    }
}

fn delete(direction: Direction, channel: u32) -> Command {
    match direction {
        Direction::Output => Command::DeletePlaybackStream(channel),
        Direction::Input => Command::DeleteRecordStream(channel),
    }
}

/// The port of a stream.
pub struct PulsePort {
    pulse: Arc<Mutex<Pulse>>,
    index: usize,
    silence: u8,
}

impl PulsePort {
    /// Creates the port of stream `index`.
    pub fn new(pulse: Arc<Mutex<Pulse>>, index: usize) -> Self {
        Self {
            pulse,
            index,
            silence: 0,
        }
    }
}

impl Port for PulsePort {
    fn pace(&self, now: Instant) -> Pace {
        let pulse = lock(&self.pulse);
        let Some(stream) = pulse.streams.get(self.index) else {
            return Pace::Clock;
        };
        let is_late = now.saturating_duration_since(stream.active) >= stream.stall();
        match stream.is_live() && !(stream.is_waiting() && is_late) {
            true => Pace::Host,
            false => Pace::Clock,
        }
    }

    fn due(&self) -> u64 {
        let pulse = lock(&self.pulse);
        let stream = pulse.streams.get(self.index);
        stream.map_or(0, |stream| match stream.direction {
            Direction::Output => stream.wanted,
            Direction::Input => stream.recorded.len() as u64,
        })
    }

    fn deadline(&self) -> Option<Instant> {
        let pulse = lock(&self.pulse);
        let stream = pulse.streams.get(self.index)?;
        let is_waiting = stream.is_live() && stream.is_waiting();
        is_waiting.then(|| stream.active + stream.stall())
    }

    fn take_xrun(&mut self) -> bool {
        let mut pulse = lock(&self.pulse);
        let Some(stream) = pulse.streams.get_mut(self.index) else {
            return false;
        };
        if let Some(params) = stream.params {
            let most = (params.period_bytes as usize).saturating_mul(KEPT_PERIODS);
            stream.keep(most, &params);
        }
        std::mem::take(&mut stream.has_xrun)
    }

    fn latency(&self, now: Instant) -> u32 {
        let pulse = lock(&self.pulse);
        let Some(stream) = pulse.streams.get(self.index) else {
            return 0;
        };
        let bytes = stream.latency(now);
        let frames = stream.params.map_or(0, |params| params.whole_frames(bytes));
        frames.try_into().unwrap_or(u32::MAX)
    }

    fn set_params(&mut self, params: &Params) -> Result<(), Status> {
        self.silence = params.format.silence();
        let mut pulse = lock(&self.pulse);
        pulse.close(self.index, false);
        if let Some(stream) = pulse.streams.get_mut(self.index) {
            stream.params = Some(*params);
        }
        Ok(())
    }

    fn prepare(&mut self) {
        let pulse = &mut *lock(&self.pulse);
        let Some(stream) = pulse.streams.get_mut(self.index) else {
            return;
        };
        if !std::mem::replace(&mut stream.is_open, true)
            && pulse.is_ready
            && let Err(error) = pulse.create(self.index)
        {
            pulse.lose(&error);
        }
    }

    fn start(&mut self, now: Instant) {
        lock(&self.pulse).run(self.index, true, now);
    }

    fn play(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut pulse = lock(&self.pulse);
        let pulse = &mut *pulse;
        let (Some(stream), Some(link)) = (pulse.streams.get_mut(self.index), &mut pulse.link)
        else {
            return Ok(());
        };
        let Some(channel) = stream.channel.filter(|_| stream.wanted > 0) else {
            return Ok(());
        };
        stream.wanted = stream.wanted.saturating_sub(bytes.len() as u64);
        stream.moved = stream.moved.saturating_add(bytes.len() as u64);
        if let Err(error) = link.sound(channel, bytes) {
            pulse.lose(&error);
        }
        Ok(())
    }

    fn record(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut pulse = lock(&self.pulse);
        bytes.fill(self.silence);
        if let Some(stream) = pulse.streams.get_mut(self.index) {
            let count = bytes.len().min(stream.recorded.len());
            for (to, from) in bytes.iter_mut().zip(stream.recorded.drain(..count)) {
                *to = from;
            }
        }
        Ok(())
    }

    fn stop(&mut self, now: Instant) {
        lock(&self.pulse).run(self.index, false, now);
    }

    fn release(&mut self, was_played: bool) {
        let pulse = &mut *lock(&self.pulse);
        let mut streams = pulse.streams.iter();
        let stream = streams.nth(self.index);
        let is_output = stream.is_some_and(|stream| stream.direction == Direction::Output);
        pulse.close(self.index, was_played && is_output);
    }
}
