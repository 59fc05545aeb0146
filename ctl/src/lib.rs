// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-ctl`: sends commands to the control socket of a back-end (`--control-socket`), and prints the answers.

mod arguments;
mod commands;
mod connection;
mod failure;
mod text;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

pub use arguments::command;
use arguments::{EVENTS, HELP, Options};
use commands::{Command, QUERY_COMMANDS};
use connection::Connection;
use failure::Failure;

/// Exit status for a usage error; all other failures have [`ExitCode::FAILURE`].
const USAGE: u8 = 2;

/// The `main` of the program.
pub fn run() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let (line, status) = match carry_out(&options) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(line)) => (line, ExitCode::from(USAGE)),
        Err(Failure::Failed(line)) => (line, ExitCode::FAILURE),
    };
    // stderr may be closed.
    let _ = writeln!(std::io::stderr(), "{}: {line}", arguments::NAME);
    status
}

fn carry_out(options: &Options) -> Result<(), Failure> {
    let name = options.command.as_deref().unwrap_or(HELP);
    match name {
        EVENTS => commands::check_count(name, &options.arguments, 0)?,
        HELP | QUERY_COMMANDS => commands::check_count(name, &options.arguments, 1)?,
        _ => {}
    }
    let mut connection = Connection::open(&options.socket)?;
    if name == EVENTS {
        connection.execute("qmp_capabilities", json!({}), &[])?;
        let mut has_ended = false;
        while let Some(event) = connection.event()? {
            has_ended |= event.get("event").is_some_and(|name| name == "SHUTDOWN");
            print(&match options.json {
                true => event.to_string(),
                false => text::event(&event),
            })?;
        }
        // A client can lose its place to another one.
        if !has_ended && UnixStream::connect(&options.socket).is_ok() {
            let line = "the back-end closed the connection, but is still running";
            return Err(Failure::Failed(line.to_owned()));
        }
        return Ok(());
    }
    let list = connection.execute(QUERY_COMMANDS, json!({}), &[])?;
    if name == HELP || name == QUERY_COMMANDS {
        let wanted = options.arguments.first();
        let list = commands::chosen(list, wanted.map(String::as_str))?;
        return print(&match options.json {
            true => list.to_string(),
            false => text::help(&Command::all(&list)),
        });
    }
    let commands = Command::all(&list);
    let command = commands::find(&commands, name)?;
    let arguments = command.arguments(&options.arguments)?;
    let files: Vec<_> = options
        .files
        .iter()
        .map(|path| open(path))
        .collect::<Result<_, _>>()?;
    let answer = connection.execute(name, arguments, &files)?;
    match (options.json, answer) {
        (true, answer) => print(&answer.to_string()),
        // An empty answer prints nothing.
        (false, Value::Object(members)) if members.is_empty() => Ok(()),
        (false, answer) => print(&text::answer(&answer)),
    }
}

/// Opens a file to pass: for reading and writing, or only for reading where writing is not permitted.
fn open(path: &Path) -> Result<OwnedFd, Failure> {
    let writable = File::options().read(true).write(true).open(path);
    let file = writable.or_else(|_| File::open(path));
    file.map(OwnedFd::from)
        .map_err(|error| Failure::Failed(format!("cannot open {}: {error}", path.display())))
}

fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", text.trim_end())
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::Failed(format!("cannot print: {error}")))
}
