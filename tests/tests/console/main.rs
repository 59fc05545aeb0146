// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-console` as a driver and clients see it.

#![cfg(test)]

mod channels;
mod clients;
mod control;
mod files;
mod hostile;
mod size;
mod start;
mod state;
mod terminal;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::{ConsoleDriver, FrontEnd, Options};
use vhost_device_tests::process::{PATIENCE, Program, command, option};

/// How long to watch for something that must not happen.
const QUIET: Duration = Duration::from_millis(100);

/// Bytes that a client of a console may lag behind before it misses some.
const HISTORY: usize = 1 << 20;

/// Bytes of a console that a late client receives.
const SCROLLBACK: usize = 64 << 10;

/// A running device, in a directory of its own.
struct Device {
    program: Program,
    directory: TempDir,
    ports: usize,
}

impl Device {
    /// Starts the device with these ports. `DIR` in an argument is its directory.
    fn start(ports: &[&str], arguments: &[&str]) -> Self {
        Self::start_configured(ports, arguments, |_| {})
    }

    /// Starts it with a changed command.
    fn start_configured(
        ports: &[&str],
        arguments: &[&str],
        configure: impl FnOnce(&mut Command),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory, ports, arguments, configure)
    }

    fn start_in(
        directory: TempDir,
        ports: &[&str],
        arguments: &[&str],
        configure: impl FnOnce(&mut Command),
    ) -> Self {
        let path = directory.path().to_str().unwrap();
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-console").unwrap();
        command.env_remove("RUST_LOG");
        for port in ports {
            command.args(["--port", &port.replace("DIR", path)]);
        }
        for argument in arguments {
            command.arg(argument.replace("DIR", path));
        }
        command.arg(option("socket-path", &socket));
        command.arg(option("control-socket", directory.path().join("commands")));
        configure(&mut command);
        let program = Program::serve(&mut command, &socket).unwrap();
        Self {
            program,
            directory,
            ports: ports.len(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Connects a driver whose queues run, and which has sent nothing.
    fn connect_with(&self, options: &Options) -> ConsoleDriver {
        let front_end = FrontEnd::connect(&self.path("socket"), options).unwrap();
        ConsoleDriver::new(front_end, self.ports).unwrap()
    }

    /// Connects a driver that starts as Linux does.
    fn connect(&self) -> ConsoleDriver {
        let mut driver = self.connect_with(&Options::default());
        driver.start(PATIENCE);
        driver
    }

    /// Connects a client to the socket of a port.
    fn client(&self, name: &str) -> UnixStream {
        let client = UnixStream::connect(self.path(name)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// Sends a command to the control socket, and returns its answer.
    fn command(&self, name: &str, arguments: Value) -> Result<Value, String> {
        let stream = UnixStream::connect(self.path("commands")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = json!({"execute": name, "arguments": arguments});
        writeln!(&stream, "{request}").unwrap();
        let answers = serde_json::Deserializer::from_reader(&stream).into_iter::<Value>();
        for answer in answers {
            let answer = answer.unwrap();
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap().to_owned());
            }
        }
        panic!("no answer to {name}");
    }

    /// Returns what `query-ports` says of a port.
    fn port(&self, port: usize) -> Value {
        self.command("query-ports", json!({})).unwrap()[port].clone()
    }

    /// Waits until `query-ports` says this of a port.
    fn wait_for(&self, port: usize, is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.port(port);
            if is_so(&value) {
                return value;
            }
            assert!(Instant::now() < deadline, "{value}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_for_clients(&self, port: usize, count: usize) {
        self.wait_for(port, |port| {
            port["clients"].as_array().unwrap().len() == count
        });
    }
}

/// Returns `count` bytes that depend on their position, and are text.
fn text(count: usize) -> Vec<u8> {
    let lines = (0..)
        .flat_map(|number: u32| format!("{number:08x} abcdefghijklmnopqrstuvwxyz\n").into_bytes());
    lines.take(count).collect()
}

/// Reads exactly `count` bytes.
fn receive(mut client: &UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).unwrap();
    bytes
}

/// Waits until a thread of the device has written `count` bytes to a file. Returns all of it.
fn written(path: &Path, count: usize) -> Vec<u8> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let bytes = std::fs::read(path).unwrap_or_default();
        if bytes.len() >= count {
            return bytes;
        }
        assert!(Instant::now() < deadline, "{} bytes", bytes.len());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Asserts that a client receives nothing.
fn assert_quiet(client: &UnixStream) {
    client.set_read_timeout(Some(QUIET)).unwrap();
    let mut bytes = [0; 100];
    let outcome = { client }.read(&mut bytes);
    assert!(
        outcome.is_err(),
        "{outcome:?} {:?}",
        bytes.escape_ascii().to_string()
    );
    client.set_read_timeout(Some(PATIENCE)).unwrap();
}

/// Asserts that the session answers.
fn assert_alive(driver: &ConsoleDriver) {
    let raw = driver.front_end.raw().unwrap();
    raw.ask(FrontendReq::GET_FEATURES, &[], &[]).unwrap();
}

/// Compares without printing all the bytes.
#[track_caller]
fn assert_same(seen: &[u8], expected: &[u8]) {
    let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte that differs");
    assert_eq!(seen.len(), expected.len(), "length");
}
