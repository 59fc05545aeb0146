// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of the demo with a console: the log of a guest, and a shell in it, on a socket of the host.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_device_tests::process;
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{Device, Guest};

use super::back_end::BackEnd;
use crate::packages::{self, USER_MODE_LINUX};
use crate::progress::Progress;

pub const CONSOLE: &str = "vhost-device-console";

/// VIRTIO's number of the device type.
const ID: u32 = 3;

/// Time limit for the guest, and for each line that it sends.
const DEADLINE: Duration = Duration::from_secs(60);

/// The script that the guest runs: a line in its log, and then a shell without a prompt.
const SCRIPT: &str = r#"
    until grep -q hvc0 /sys/class/tty/console/active; do sleep 0.1; done
    echo "the guest is up" > /dev/kmsg
    exec < /dev/hvc0 > /dev/hvc0 2>&1
    stty -echo
    echo ready
    while read -r line && [ "$line" != exit ]; do eval "$line"; done
"#;

/// What is typed.
const COMMANDS: [&str; 2] = ["uname -sr", "cat /sys/class/tty/console/active"];

/// Prepares this part. Builds User-Mode Linux if the cache does not contain it.
pub fn prepare(progress: &Progress) -> Result<(), String> {
    packages::install(progress, USER_MODE_LINUX)?;
    packages::user_mode_linux(progress)?;
    let kernel = uml::kernel::prepare();
    kernel.map(drop).map_err(|error| error.to_string())
}

pub fn run(progress: &Progress) -> Result<(), String> {
    let work = uml::work().map_err(|error| error.to_string())?;
    let port = work.path().join("console");
    let mut value = std::ffi::OsString::from("unix=");
    value.push(&port);
    let mut back_end = BackEnd::start(progress, CONSOLE, &[process::option("port", value)])?;
    let client = UnixStream::connect(&port).map_err(failed("connect to the port"))?;
    client
        .set_read_timeout(Some(DEADLINE))
        .map_err(failed("set a time limit"))?;
    progress.step("Booting User-Mode Linux with this console");
    let device = Device {
        socket: &back_end.socket,
        id: ID,
    };
    let arguments = ["console=hvc0", "loglevel=8", "stderr=0"];
    let shown = Guest::start(&[device], &arguments, SCRIPT, work.path())
        .map_err(|error| error.to_string())
        .and_then(|guest| {
            show(progress, client)?;
            guest.wait(DEADLINE).map_err(|error| error.to_string())
        });
    match shown {
        Ok(0) => back_end.end(),
        Ok(status) => Err(format!("the shell in the guest ended with status {status}")),
        Err(error) => Err(format!(
            "{error}\nlog of {CONSOLE}:\n{}",
            back_end.program.stderr()
        )),
    }
}

/// Shows the log, then types commands and shows the answers.
fn show(progress: &Progress, client: UnixStream) -> Result<(), String> {
    let mut writer = client.try_clone().map_err(failed("use the connection"))?;
    let mut lines = BufReader::new(client).lines();
    let mut next = || match lines.next() {
        Some(Ok(line)) => Ok(line.trim_end().to_owned()),
        Some(Err(error)) => Err(failed("read from the console")(error)),
        None => Err("the console was closed".to_owned()),
    };
    let mut log = Vec::new();
    loop {
        match next()? {
            line if line == "ready" => break,
            line => log.push(line),
        }
    }
    for line in &log {
        progress.step(&format!("  console: {line}"));
    }
    for command in COMMANDS {
        writeln!(writer, "{command}").map_err(failed("write to the console"))?;
        progress.step(&format!("  typed: {command}"));
        progress.step(&format!("  console: {}", next()?));
    }
    writeln!(writer, "exit").map_err(failed("write to the console"))
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> String {
    move |error| format!("cannot {what}: {error}")
}
