// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program of the host with which the guest talks over a VIRTIO socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use tempfile::TempDir;
use vhost_device_tests::process;

use super::back_end::BackEnd;
use crate::progress::Progress;

pub const VSOCK: &str = "vhost-device-vsock";

/// What the guest runs: it sends a line, closes its direction, and prints the answer.
pub const SCRIPT: &str = r#"
    echo "@vsock $(echo "greetings from Linux $(uname -r)" | socat -t 20 - VSOCK-CONNECT:2:5000)"
"#;

/// The back-end, and the program of the host.
pub struct Sockets {
    pub back_end: BackEnd,
    heard: JoinHandle<io::Result<String>>,
    _directory: TempDir,
}

impl Sockets {
    /// Starts both.
    pub fn start(progress: &Progress) -> Result<Self, String> {
        let failed = |error| format!("cannot listen for the guest: {error}");
        let directory = tempfile::tempdir().map_err(failed)?;
        let path = directory.path().join("guest");
        let listener = UnixListener::bind(directory.path().join("guest_5000")).map_err(failed)?;
        let options = ["--guest-cid=3".into(), process::option("uds-path", path)];
        let back_end = BackEnd::start(progress, VSOCK, &options)?;
        Ok(Self {
            back_end,
            heard: std::thread::spawn(move || answer(&listener)),
            _directory: directory,
        })
    }

    /// Returns what the guest sent, once it has an answer.
    pub fn heard(self) -> Result<String, String> {
        let heard = self.heard.join();
        heard
            .map_err(|_| "a thread ended".to_owned())?
            .map_err(|error| format!("cannot read from the guest: {error}"))
    }
}

/// Reads all that the guest sends, and answers.
fn answer(listener: &UnixListener) -> io::Result<String> {
    let (mut stream, _) = listener.accept()?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    writeln!(stream, "{} bytes have arrived", text.len())?;
    Ok(text.trim_end().to_owned())
}
