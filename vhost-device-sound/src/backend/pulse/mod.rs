// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end `pulse`: a client of a PulseAudio server, or of PipeWire's pipewire-pulse. One connection serves all streams.
//!
//! Nothing here blocks: the thread of the queues watches the socket. The server is the clock of a stream: it asks for the sound that it
//! plays next, and sends what it has recorded. While there is no server, or it does not move a stream, the clock of this host goes on
//! in silence, and the connection is tried again.

mod format;
mod link;
mod port;
mod remote;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pulseaudio::protocol::stream::{BufferAttr, StreamFlags};
use pulseaudio::protocol::{
    AuthParams, AuthReply, Command, CorkStreamParams, CreatePlaybackStreamReply,
    CreateRecordStreamReply, LatencyParams, MAX_VERSION, PlaybackLatency, PlaybackStreamParams,
    Prop, Props, RecordLatency, RecordStreamParams, SampleSpec,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_device_common::device::{Access, Call, Needs, StartError};
use vhost_device_common::worker::{Readiness, Watcher};
use vhost_device_common::{info_limited, warn_limited};

use crate::format::Format;
use crate::profile::Profile;
use crate::protocol::Direction;
use format::{channel_map, sample_format};
use link::{Link, Message};
pub use port::PulsePort;
use remote::{Latency, Remote};

/// Size of an authentication cookie. pipewire-pulse refuses others.
const COOKIE_SIZE: usize = 256;
/// How long the server may take for the first connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between attempts to connect: the first one, and the longest.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// When a stream that has started asks for its latency.
const FIRST_LATENCY: Duration = Duration::from_millis(50);
/// How often a running stream asks for its latency after that.
const LATENCY_INTERVAL: Duration = Duration::from_millis(500);
/// Most recorded sound of one moment, in bytes.
const MAX_RECORDED: usize = 4 << 20;

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
