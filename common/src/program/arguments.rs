// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line: what all back-ends understand, and the device's own options.

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
    /// A socket that nobody listens on is replaced; anything else at PATH is left alone. The socket
    /// is removed at exit.
    #[arg(long, value_name = "PATH", groups = ["socket", "files"])]
    pub socket_path: Option<PathBuf>,

    /// Use the unix stream socket that was inherited as file descriptor FDNUM.
    ///
    /// If it is connected, exit with status 0 when the front-end closes it; if it listens, serve one
    /// front-end after the other.
    #[arg(long, value_name = "FDNUM", group = "socket", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub fd: Option<RawFd>,

    /// Permissions of the sockets at --socket-path, --stats-socket and --control-socket, in octal.
    #[arg(
        long,
        value_name = "OCTAL",
        default_value = "0660",
        value_parser = octal,
        requires = "files"
    )]
    pub socket_mode: u32,

    /// Give statistics to whoever connects to a unix socket at PATH, as text that Prometheus reads.
    ///
    /// HTTP clients get them (curl --unix-socket PATH http://localhost/metrics), and so do those that send nothing (nc -UN PATH).
    /// SIGUSR1 logs them. The rules for --socket-path hold for PATH too.
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
    /// Once all is open, and before a front-end is heard, it gives up its privileges, all files but those that it has to open later, and
    /// all system calls but those that it needs.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Sandbox::On)]
    pub sandbox: Sandbox,

    /// How long a queue thread polls before it sleeps, in microseconds: a number, `auto`, or `off`.
    ///
    /// To be woken costs more time than a fast device takes for a request. With `auto` threads look for as long as was worth it lately,
    /// 100 us at most, and go to sleep at once where requests come more seldom. No thread looks longer than this while nothing comes.
    #[arg(long, value_name = "N", default_value = "auto")]
    pub poll_us: Polling,

    /// Print what this program can do on this host, as JSON, and exit. All other arguments are
    /// ignored.
    #[arg(long)]
    print_capabilities: bool,

    /// Print the descriptor of this program for management software, as the JSON of its 50-*.json,
    /// and exit.
    #[arg(long)]
    print_descriptor: bool,

    /// What the device takes.
    #[command(flatten)]
    pub device: O,
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "must be three octal digits such as 0660".to_owned())
}

/// Parses a number of bytes, with QEMU's suffixes: for the options of devices.
///
/// # Errors
/// What it must be, for the person who wrote it.
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
    /// Understands the arguments of this process; prints help, version or what is wrong otherwise.
    /// They must name a socket, unless there is one already.
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

    /// These options, with the words of the device around them.
    pub fn command<D: Device>() -> Command {
        <Self as CommandFactory>::command()
            .name(D::PROGRAM)
            .version(D::VERSION)
            .about(D::DESCRIPTION)
            .after_help(format!(
                "Log lines go to stderr; RUST_LOG=debug (or warn, trace) shows more or less of \
                 them.\n\nSIGTERM and SIGINT finish what was begun and end the program. SIGUSR1 has it \
                 log statistics.{}\n\n\
                 Under systemd neither --socket-path nor --fd is needed: the one socket of the \
                 socket unit (LISTEN_FDS) is used as --fd would. A service of Type=notify is \
                 ready once the socket listens.",
                if D::RELOADS {
                    " SIGHUP has it re-examine the files named by the options."
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

/// What is wrong, without the usage that follows it.
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
