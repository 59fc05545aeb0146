// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--control-socket`: commands as JSON objects, in the shape of QMP, so that clients of QEMU's monitor can be used.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::clients::{Answer, Protocol, Request};
use super::commands::Commands;
use super::frames::{Broken, Frames, MOST_BYTES};
use crate::device::Device;
use crate::statistics::Event;
use crate::verb::CommandError;

/// Commands and their answers.
pub struct ControlProtocol<D>(pub Commands<D>);

/// What is stored for each client.
#[derive(Debug, Default)]
pub struct State {
    frames: Frames,
    /// It has sent `qmp_capabilities`, so it receives events. Other clients receive only answers.
    pub negotiated: bool,
}

impl<D: Device> Protocol for ControlProtocol<D> {
    type State = State;
    const STAYS: bool = true;
    const FILES: bool = true;

    fn greeting(&self) -> Vec<u8> {
        let mut version = D::VERSION
            .split('.')
            .map(|number| number.parse().unwrap_or_default());
        let mut next = || -> u64 { version.next().unwrap_or_default() };
        // QMP clients expect the member "qemu".
        let numbers = json!({"major": next(), "minor": next(), "micro": next()});
        line(&json!({"QMP": {
            "version": {"qemu": numbers, "package": format!("{} {}", D::PROGRAM, D::VERSION)},
            "capabilities": [],
        }}))
    }

    fn answer(&mut self, request: &mut Request, state: &mut State) -> Answer {
        let frame = match state.frames.next(&mut request.bytes) {
            None => {
                // Files without a command are closed.
                if request.bytes.is_empty() {
                    request.take_files();
                }
                return Answer::Wait;
            }
            Some(Ok(frame)) => serde_json::from_slice(&frame)
                .map_err(|error| CommandError::Failed(format!("invalid JSON: {error}"))),
            Some(Err(Broken::Line(text))) => Err(CommandError::Failed(format!(
                "{text}; send one JSON object a line"
            ))),
            Some(Err(Broken::TooLong)) => {
                let text = format!("the command is longer than {MOST_BYTES} bytes");
                return Answer::Close(failure(&CommandError::Failed(text), None));
            }
        };
        // One read can return a command with files together with commands before it, but with none after it.
        let is_last = request.bytes.iter().all(u8::is_ascii_whitespace);
        let (files, has_lost_files) = match is_last {
            true => request.take_files(),
            false => (Vec::new(), false),
        };
        let mut message: Map<String, Value> = match frame {
            Ok(message) => message,
            Err(error) => return Answer::Send(failure(&error, None)),
        };
        let id = message.remove("id");
        let executed = command(message).and_then(|(name, arguments)| {
            if has_lost_files {
                let text = "too many file descriptors came with the command";
                return Err(CommandError::Failed(text.to_owned()));
            }
            let value = self.0.execute(&name, &arguments, files)?;
            state.negotiated |= name == "qmp_capabilities";
            Ok(value)
        });
        Answer::Send(match executed {
            Ok(value) => answer("return", value, id),
            Err(error) => failure(&error, id),
        })
    }
}

/// Returns the name and the arguments of a command.
fn command(mut message: Map<String, Value>) -> Result<(String, Map<String, Value>), CommandError> {
    let failed = |text: &str| Err(CommandError::Failed(text.to_owned()));
    let name = match message.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return failed("\"execute\" must be a string"),
        None => return failed("\"execute\" is missing"),
    };
    let arguments = match message.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return failed("\"arguments\" must be an object"),
    };
    match message.keys().next() {
        None => Ok((name, arguments)),
        Some(key) => failed(&format!("{key:?} is not a member of a command")),
    }
}

fn failure(error: &CommandError, id: Option<Value>) -> Vec<u8> {
    let value = json!({"class": error.class(), "desc": error.to_string()});
    answer("error", value, id)
}

fn answer(kind: &str, value: Value, id: Option<Value>) -> Vec<u8> {
    let members = [(kind, Some(value)), ("id", id)].into_iter();
    let members = members.filter_map(|(name, value)| Some((name.to_owned(), value?)));
    line(&Value::Object(members.collect()))
}

/// Returns the message for an event.
pub fn event(event: Event, time: SystemTime) -> Vec<u8> {
    let time = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    line(&json!({
        "event": event.name(),
        "timestamp": {"seconds": time.as_secs(), "microseconds": time.subsec_micros()},
    }))
}

fn line(value: &Value) -> Vec<u8> {
    format!("{value}\r\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::Arc;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::device::SocketType;
    use crate::device::{
        Argument, ArgumentType, Arguments, QueueHandler, StartError, Verb, Watcher,
    };
    use crate::program::clients::Clients;
    use crate::program::socket::Listener;
    use crate::statistics::Statistics;
    use crate::worker::Queue;

    /// Reads from the files that are passed to it.
    struct Reader;

    #[derive(clap::Args)]
    struct NoOptions {}

    struct Nothing;

    impl QueueHandler for Nothing {
        fn process(&mut self, _queue: &mut Queue) {}
    }

    impl Device for Reader {
        const TYPE: &'static str = "rng";
        const PROGRAM: &'static str = "reader";
        const VERSION: &'static str = "1.2.3";
        const DESCRIPTION: &'static str = "a test device";
        const VERBS: &'static [Verb] = &[Verb {
            name: "read",
            help: "",
            arguments: &[Argument {
                name: "bytes",
                help: "",
                r#type: ArgumentType::Number,
                optional: false,
            }],
            files: 2,
        }];

        type Options = NoOptions;
        type Handler = Nothing;

        fn open(_options: NoOptions) -> Result<Self, StartError> {
            Err(StartError(String::new()))
        }

        fn handler(&self, _thread: u16, _watcher: Watcher) -> std::io::Result<Nothing> {
            Ok(Nothing)
        }

        fn command(
            &self,
            name: &str,
            arguments: &Arguments,
            files: Vec<OwnedFd>,
        ) -> Result<Value, CommandError> {
            assert_eq!(name, "read");
            let count = arguments["bytes"].as_u64().unwrap();
            let read = |file: OwnedFd| {
                let mut text = String::new();
                File::from(file)
                    .take(count)
                    .read_to_string(&mut text)
                    .unwrap();
                text
            };
            Ok(files.into_iter().map(read).collect())
        }
    }

    fn send(client: &UnixStream, text: &str, files: &[File]) {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(&files)));
        let pieces = [IoSlice::new(text.as_bytes())];
        sendmsg(client, &pieces, &mut control, SendFlags::empty()).unwrap();
    }

    /// Returns the messages that a client receives, which sends what `say` does.
    fn conversation(say: impl FnOnce(&mut UnixStream, &Path)) -> Vec<Value> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener =
            Listener::bind(path.clone(), SocketType::STREAM, 0o600, "--control-socket").unwrap();
        listener.set_nonblocking().unwrap();
        listener.listen().unwrap();
        let device = Arc::new(Reader);
        let statistics = Arc::new(Statistics::new(Reader::TYPE, Reader::REQUESTS));
        let commands = Commands::new(Arc::downgrade(&device), statistics);
        let mut clients = Clients::new(Arc::new(listener), ControlProtocol(commands));
        let mut client = UnixStream::connect(&path).unwrap();
        say(&mut client, directory.path());
        client.shutdown(std::net::Shutdown::Write).unwrap();
        clients.advance();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        let lines = text.lines().map(serde_json::from_str);
        lines.map(Result::unwrap).collect()
    }

    #[test]
    fn the_greeting_has_the_version() {
        let answers = conversation(|_, _| {});
        let version =
            json!({"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "reader 1.2.3"});
        assert_eq!(
            answers,
            [json!({"QMP": {"version": version, "capabilities": []}})]
        );
    }

    #[test]
    fn files_go_to_the_command_that_they_come_with() {
        let read = r#"{"execute":"read","arguments":{"bytes":3}}"#;
        let answers = conversation(|client, directory| {
            let files = ["first", "second", "third"].map(|name| {
                let path = directory.join(name);
                std::fs::write(&path, name).unwrap();
                path
            });
            let open = || files.each_ref().map(|path| File::open(path).unwrap());
            client.write_all(read.as_bytes()).unwrap();
            send(client, read, &open()[..2]);
            send(client, read, &open());
            send(client, r#"{"execute":"read"}"#, &open()[..1]);
            send(client, read, &open()[2..]);
        });
        assert_eq!(answers[1]["return"], json!([]));
        assert_eq!(answers[2]["return"], json!(["fir", "sec"]));
        let error = answers[3]["error"]["desc"].as_str().unwrap();
        assert!(error.contains("2 file descriptors at most"), "{error}");
        assert!(
            answers[4]["error"]["desc"]
                .as_str()
                .unwrap()
                .contains("bytes")
        );
        assert_eq!(answers[5]["return"], json!(["thi"]));
    }

    #[test]
    fn more_files_than_a_message_may_have_are_refused() {
        let read = r#"{"execute":"read","arguments":{"bytes":3}}"#;
        let answers = conversation(|client, _| {
            let file = || File::open("/dev/null").unwrap();
            send(client, read, &(0..20).map(|_| file()).collect::<Vec<_>>());
            client.write_all(read.as_bytes()).unwrap();
        });
        let error = answers[1]["error"]["desc"].as_str().unwrap();
        assert!(error.contains("too many file descriptors"), "{error}");
        assert_eq!(answers[2]["return"], json!([]));
    }
}
