// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A sound server that does what a test says: it speaks PulseAudio's protocol, and plays nothing.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use pulseaudio::protocol::{
    self, AuthReply, Command, CreatePlaybackStreamReply, CreateRecordStreamReply, DESCRIPTOR_SIZE,
    MAX_VERSION, PlaybackLatency, PulseError, RecordLatency, Request, SampleSpec,
    SetClientNameReply, Underflow,
};

use crate::PATIENCE;

/// How the server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manners {
    /// It asks for more as soon as it gets something.
    Eager,
    /// It asks for, and sends, only what the test says.
    Told,
    /// As `Told`, but the end of a stream's sound is never reached.
    Endless,
    /// It creates no streams: these commands are not answered.
    Silent,
    /// It refuses streams.
    Refusing,
    /// It refuses clients.
    Closed,
}

/// A stream of a client.
#[derive(Clone, Debug, Default)]
pub struct Remote {
    pub spec: SampleSpec,
    pub is_record: bool,
    pub is_corked: bool,
    pub is_deleted: bool,
    pub was_drained: bool,
    pub played: Vec<u8>,
    /// Bytes that were asked for and have not arrived.
    pub asked: u64,
    pub target: u32,
}

#[derive(Default)]
struct State {
    connections: Vec<UnixStream>,
    streams: BTreeMap<u32, Remote>,
    /// Latency of the device, in microseconds.
    latency: u64,
    /// Offsets in the buffer of each stream, where the client writes and where the device reads.
    offsets: Option<(i64, i64)>,
}

struct Shared {
    manners: Manners,
    state: Mutex<State>,
    changed: Condvar,
}

/// The server. Dropping it closes all connections.
pub struct Server {
    shared: Arc<Shared>,
    path: std::path::PathBuf,
}

impl Server {
    /// Listens at `path`.
    pub fn start(path: &Path, manners: Manners) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared {
            manners,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::downgrade(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(shared) = accepting.upgrade() else {
                    return;
                };
                let stream = stream.unwrap();
                shared.lock().connections.push(stream.try_clone().unwrap());
                std::thread::spawn(move || shared.serve(stream));
            }
        });
        Self {
            shared,
            path: path.to_owned(),
        }
    }

    /// Returns how many streams were created.
    pub fn count(&self) -> usize {
        self.shared.lock().streams.len()
    }

    /// Waits until a condition holds for a stream.
    #[track_caller]
    pub fn wait(&self, channel: u32, condition: impl Fn(&Remote) -> bool) -> Remote {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.shared.lock();
        loop {
            if let Some(stream) = state.streams.get(&channel)
                && condition(stream)
            {
                return stream.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{:?}", state.streams.keys());
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Asks the client for sound.
    pub fn ask(&self, channel: u32, length: u32) {
        let mut state = self.shared.lock();
        state.streams.get_mut(&channel).unwrap().asked += u64::from(length);
        state.send(&Command::Request(Request { channel, length }));
    }

    /// Sends recorded sound.
    pub fn record(&self, channel: u32, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let mut message = Vec::new();
        protocol::write_memblock(&mut message, channel, bytes, 0).unwrap();
        state.write(&message);
    }

    /// Tells the client that a stream has run empty.
    pub fn underflow(&self, channel: u32) {
        let event = Command::Underflow(Underflow { channel, offset: 0 });
        self.shared.lock().send(&event);
    }

    /// Tells the client that a stream has ended.
    pub fn kill(&self, channel: u32) {
        self.shared
            .lock()
            .send(&Command::PlaybackStreamKilled(channel));
    }

    /// Sends bytes that need not be a message.
    pub fn send_raw(&self, bytes: &[u8]) {
        self.shared.lock().write(bytes);
    }

    /// Sets the latency of the device.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.lock().latency = latency.as_micros() as u64;
    }

    /// Sets where the client writes in the buffer of each stream, and where the device reads.
    pub fn set_offsets(&self, offsets: (i64, i64)) {
        self.shared.lock().offsets = Some(offsets);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        for connection in &self.shared.lock().connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl State {
    /// Writes to the client that came last.
    fn write(&mut self, bytes: &[u8]) {
        if let Some(connection) = self.connections.last_mut() {
            let _ = connection.write_all(bytes);
        }
    }

    fn send(&mut self, command: &Command) {
        let mut message = Vec::new();
        protocol::write_command_message(&mut message, u32::MAX, command, MAX_VERSION).unwrap();
        self.write(&message);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn serve(&self, stream: UnixStream) {
        let mut reader = BufReader::new(stream);
        while self.serve_one(&mut reader).is_some() {
            self.changed.notify_all();
        }
    }

    fn serve_one(&self, reader: &mut BufReader<UnixStream>) -> Option<()> {
        let mut head = [0; DESCRIPTOR_SIZE];
        reader.read_exact(&mut head).ok()?;
        let descriptor = protocol::read_descriptor(&mut head.as_slice()).unwrap();
        let mut content = vec![0; descriptor.length as usize];
        reader.read_exact(&mut content).ok()?;
        let mut state = self.lock();
        if descriptor.channel != u32::MAX {
            let channel = descriptor.channel;
            let stream = state.streams.get_mut(&channel).unwrap();
            assert!(
                !stream.is_corked && !stream.is_deleted,
                "sound for {channel}"
            );
            stream.played.extend(&content);
            stream.asked = stream
                .asked
                .checked_sub(content.len() as u64)
                .expect("the client sends what was asked for");
            if self.manners == Manners::Eager {
                let length = content.len() as u32;
                stream.asked += u64::from(length);
                state.send(&Command::Request(Request { channel, length }));
            }
            return Some(());
        }
        let (number, command) =
            Command::read_tag_prefixed(&mut content.as_slice(), MAX_VERSION).unwrap();
        let mut reply = Vec::new();
        self.answer(&mut state, number, command, &mut reply);
        state.write(&reply);
        Some(())
    }

    fn answer(&self, state: &mut State, number: u32, command: Command, reply: &mut Vec<u8>) {
        let refuse = |reply: &mut Vec<u8>| {
            protocol::write_error(reply, number, &PulseError::AccessDenied).unwrap();
        };
        match command {
            Command::Auth(auth) => {
                // As pipewire-pulse does.
                assert_eq!(auth.cookie.len(), 256);
                if self.manners == Manners::Closed {
                    return refuse(reply);
                }
                let auth = AuthReply {
                    version: MAX_VERSION,
                    ..AuthReply::default()
                };
                protocol::write_reply_message(reply, number, &auth, MAX_VERSION).unwrap();
            }
            Command::SetClientName(_) => {
                let name = SetClientNameReply { client_id: 1 };
                protocol::write_reply_message(reply, number, &name, MAX_VERSION).unwrap();
            }
            Command::CreatePlaybackStream(_) | Command::CreateRecordStream(_)
                if self.manners == Manners::Silent => {}
            Command::CreatePlaybackStream(_) | Command::CreateRecordStream(_)
                if self.manners == Manners::Refusing =>
            {
                refuse(reply);
            }
            Command::CreatePlaybackStream(params) => {
                assert!(params.flags.start_corked);
                let channel = state.streams.len() as u32;
                let target = params.buffer_attr.target_length;
                let asked = match self.manners {
                    Manners::Eager => target,
                    _ => 0,
                };
                let stream = Remote {
                    spec: params.sample_spec,
                    is_corked: true,
                    asked: asked.into(),
                    target,
                    ..Remote::default()
                };
                state.streams.insert(channel, stream);
                let created = CreatePlaybackStreamReply {
                    channel,
                    requested_bytes: asked,
                    buffer_attr: params.buffer_attr,
                    sample_spec: params.sample_spec,
                    channel_map: params.channel_map,
                    ..CreatePlaybackStreamReply::default()
                };
                protocol::write_reply_message(reply, number, &created, MAX_VERSION).unwrap();
            }
            Command::CreateRecordStream(params) => {
                let channel = state.streams.len() as u32;
                let stream = Remote {
                    spec: params.sample_spec,
                    is_record: true,
                    is_corked: true,
                    target: params.buffer_attr.fragment_size,
                    ..Remote::default()
                };
                state.streams.insert(channel, stream);
                let created = CreateRecordStreamReply {
                    channel,
                    buffer_attr: params.buffer_attr,
                    sample_spec: params.sample_spec,
                    channel_map: params.channel_map,
                    ..CreateRecordStreamReply::default()
                };
                protocol::write_reply_message(reply, number, &created, MAX_VERSION).unwrap();
            }
            Command::CorkPlaybackStream(params) | Command::CorkRecordStream(params) => {
                state.streams.get_mut(&params.channel).unwrap().is_corked = params.cork;
                protocol::write_ack_message(reply, number).unwrap();
            }
            Command::DeletePlaybackStream(channel) | Command::DeleteRecordStream(channel) => {
                state.streams.get_mut(&channel).unwrap().is_deleted = true;
                protocol::write_ack_message(reply, number).unwrap();
            }
            Command::DrainPlaybackStream(channel) => {
                state.streams.get_mut(&channel).unwrap().was_drained = true;
                if self.manners != Manners::Endless {
                    protocol::write_ack_message(reply, number).unwrap();
                }
            }
            Command::GetPlaybackLatency(params) => {
                let (write_offset, read_offset) = state.offsets.unwrap_or((1920, 0));
                let latency = PlaybackLatency {
                    sink_usec: state.latency,
                    source_usec: 0,
                    playing: true,
                    local_time: params.now,
                    remote_time: SystemTime::now(),
                    write_offset,
                    read_offset,
                    underrun_for: 0,
                    playing_for: 0,
                };
                protocol::write_reply_message(reply, number, &latency, MAX_VERSION).unwrap();
            }
            Command::GetRecordLatency(params) => {
                let (write_offset, read_offset) = state.offsets.unwrap_or_default();
                let latency = RecordLatency {
                    sink_usec: 0,
                    source_usec: state.latency,
                    playing: true,
                    local_time: params.now,
                    remote_time: SystemTime::now(),
                    write_offset,
                    read_offset,
                };
                protocol::write_reply_message(reply, number, &latency, MAX_VERSION).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
}
