// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line: the options of all back-ends, and those of the device.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgGroup, Args, Command, CommandFactory, FromArgMatches, Parser};

use super::USAGE;
use crate::device::Device;
use crate::sandbox::Sandbox;
use crate::stderr;
use crate::worker::Polling;

/// Options of every back-end, then those of the device.
#[derive(Parser)]
#[command(group = ArgGroup::new("socket").required(true), group = ArgGroup::new("files").multiple(true))]
pub struct Arguments<O: Args> {
    /// Listen on a unix socket at PATH and serve one front-end after the other.
    ///
    /// A stale socket (one without a listener) is replaced; if anything else is at PATH, the program does not start. The socket is
    /// removed at exit.
    #[arg(long, value_name = "PATH", groups = ["socket", "files"])]
    pub socket_path: Option<PathBuf>,

    /// Use the unix stream socket that is inherited as file descriptor FDNUM.
    ///
    /// If it is connected, exit with status 0 when the front-end closes it; if it listens, serve one front-end after the other.
    #[arg(long, value_name = "FDNUM", group = "socket", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub fd: Option<RawFd>,

    /// Permissions of the sockets that the program creates, such as that of --socket-path, in octal.
    #[arg(
        long,
        value_name = "OCTAL",
        default_value = "0660",
        value_parser = octal,
        requires = "files"
    )]
    pub socket_mode: u32,

    /// Send statistics to each client that connects to a unix socket at PATH, in the text format of Prometheus.
    ///
    /// Clients can use HTTP (curl --unix-socket PATH http://localhost/metrics), or send nothing (nc -UN PATH). SIGUSR1 logs the statistics.
    /// The rules for --socket-path apply to PATH too.
    #[arg(long, value_name = "PATH", group = "files")]
    pub stats_socket: Option<PathBuf>,

    /// Accept commands on a unix socket at PATH: JSON objects in the shape of QMP.
    ///
    /// vhost-device-ctl(1) sends them, and vhost-device-control(7) describes them. Whoever can connect can stop the program. The rules
    /// for --socket-path apply to PATH too.
    #[arg(long, value_name = "PATH", group = "files")]
    pub control_socket: Option<PathBuf>,

    /// What to do when the process attempts a disallowed operation.
    ///
    /// After it has opened all files, and before it reads from a front-end, the process gives up its privileges, access to all files except
    /// those that it opens later, and all system calls except those that it needs.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Sandbox::On)]
    pub sandbox: Sandbox,

    /// How long a queue thread polls before it sleeps, in microseconds: a number, `auto`, or `off`.
    ///
    /// Waking up takes longer than a fast device takes for a request. With `auto`, a thread polls as long as it paid off recently, up to 100
    /// us, and sleeps at once if requests are rarer. With a number, it polls for at most this long without a request.
    #[arg(long, value_name = "N", default_value = "auto")]
    pub poll_us: Polling,

    /// Print what this program can do on this host, as JSON, and exit. All other arguments are ignored.
    #[arg(long)]
    print_capabilities: bool,

    /// Print the descriptor of this program for management software (the JSON of its 50-*.json), and exit.
    #[arg(long)]
    print_descriptor: bool,

    /// Options of the device.
    #[command(flatten)]
    pub device: O,
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "must be three octal digits such as 0660".to_owned())
}

/// Parses a number of bytes with one of QEMU's suffixes, for the options of devices.
///
/// # Errors
/// Returns what the text must be, for the user.
pub fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 10),
        None => match text.strip_suffix(['M', 'm']) {
            Some(digits) => (digits, 20),
            None => match text.strip_suffix(['G', 'g']) {
                Some(digits) => (digits, 30),
                None => (text, 0),
            },
        },
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "must be a number of bytes, such as 67108864, 64M or 1G".to_owned())
}

impl<O: Args> Arguments<O> {
    /// Parses the arguments of this process; otherwise prints help, version or an error. They must name a socket, unless the service manager
    /// passed one.
    pub fn parse<D: Device>(has_socket: bool) -> Result<Self, ExitCode> {
        Self::parse_from::<D>(std::env::args_os().collect(), has_socket).map_err(
            |error| match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                    let mut stdout = std::io::stdout();
                    let printed = write!(stdout, "{error}").and_then(|()| stdout.flush());
                    match printed {
                        Ok(()) => ExitCode::SUCCESS,
                        Err(error) => {
                            stderr::print(&format!("{}: cannot print: {error}", D::PROGRAM));
                            ExitCode::FAILURE
                        }
                    }
                }
                _ => {
                    stderr::print(&format!("{}: {}", D::PROGRAM, one_line(&error)));
                    ExitCode::from(USAGE)
                }
            },
        )
    }

    /// Returns the command line with the name, version and description of the device.
    pub fn command<D: Device>() -> Command {
        <Self as CommandFactory>::command()
            .name(D::PROGRAM)
            .version(D::VERSION)
            .about(D::DESCRIPTION)
            .after_help(format!(
                "Log lines go to stderr; RUST_LOG=debug (or warn, trace) shows more or fewer of \
                 them.\n\nOn SIGTERM and SIGINT the program finishes the requests in flight and exits. \
                 On SIGUSR1 it logs statistics.{}\n\n\
                 Under systemd neither --socket-path nor --fd is needed: the program uses the one \
                 socket of the socket unit (LISTEN_FDS) like that of --fd. A service of Type=notify is \
                 ready once the socket listens.",
                if D::RELOADS {
                    " On SIGHUP it examines the files named by the options again."
                } else {
                    ""
                }
            ))
    }

    fn parse_from<D: Device>(
        arguments: Vec<OsString>,
        has_socket: bool,
    ) -> Result<Self, clap::Error> {
        let command =
            Self::command::<D>().mut_group("socket", |socket| socket.required(!has_socket));
        Self::from_arg_matches(&command.try_get_matches_from(arguments)?)
    }
}

/// Returns the error message, without the usage that follows it.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = message
        .trim_start_matches("error:")
        .split_whitespace()
        .collect();
    format!("{}; see --help", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("4K"), Ok(4096));
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        for bad in ["", "M", "0", "-1", "1T", "1.5G", "99999999999G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }
}
