// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What all back-end programs do: arguments, sockets, signals, exit status. They follow QEMU's "back-end program conventions".

mod arguments;
mod clients;
mod commands;
mod control;
mod control_socket;
mod frames;
mod service;
mod signals;
mod socket;
mod stats_socket;
mod turn;

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Command;
use serde::Serialize;
use vhost_user_discovery::schema::{VHostUserBackendCapabilities, VhostUserBackend};

use crate::device::{Device, ListeningSocket, SocketType, StartError};
use crate::file_limit::{self, explained};
use crate::log_limit::{info_limited, warn_limited};
use crate::sandbox::{self, Access, Call, Role, confine_thread};
use crate::session;
use crate::statistics::Statistics;
use crate::stderr;
use crate::worker::Polling;
use arguments::Arguments;
pub use arguments::size;
use clients::Clients;
use commands::Commands;
use control::Control;
use control_socket::ControlProtocol;
use service::{ServiceManager, State};
use signals::Signals;
pub use socket::inherited;
use socket::{Listener, Source};
use stats_socket::StatsProtocol;
use turn::Turn;

/// Exit status of a usage error; all other failures have [`ExitCode::FAILURE`].
const USAGE: u8 = 2;

/// Returns the command line of a device's program, for help, manual pages and shell completions.
pub fn command<D: Device>() -> Command {
    Arguments::<D::Options>::command::<D>()
}

/// Makes a process that was forked from this one, before it started threads, write its log lines directly.
pub fn forked() {
    stderr::write_directly();
}

/// Runs the program of a device: its `main`.
pub fn run<D: Device>() -> ExitCode {
    let _flush = stderr::Flush;
    // These two take precedence over all other arguments, known or not.
    let asked = |option| {
        std::env::args_os()
            .skip(1)
            .any(|argument| argument == option)
    };
    let outcome = if asked("--print-capabilities") {
        let features = D::capabilities().into_iter().map(String::from);
        print(&VHostUserBackendCapabilities {
            r#type: D::TYPE.to_owned(),
            features: Some(features.collect()),
        })
    } else if asked("--print-descriptor") {
        descriptor::<D>()
    } else {
        let manager = ServiceManager::take_from_environment();
        match Arguments::<D::Options>::parse::<D>(manager.passed_sockets()) {
            Ok(arguments) => start::<D>(arguments, &manager),
            Err(exit) => return exit,
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(StartError(line)) => {
            stderr::print(&format!("{}: {line}", D::PROGRAM));
            ExitCode::FAILURE
        }
    }
}

fn print(document: &impl Serialize) -> Result<(), StartError> {
    serde_json::to_string_pretty(document)
        .map_err(io::Error::from)
        .and_then(|text| writeln!(std::io::stdout(), "{text}"))
        .map_err(|error| StartError(format!("cannot print: {error}")))
}

fn descriptor<D: Device>() -> Result<(), StartError> {
    let binary = std::env::current_exe()
        .map_err(|error| StartError(format!("cannot find out where this program is: {error}")))?;
    print(&VhostUserBackend {
        description: D::DESCRIPTION.to_owned(),
        r#type: D::TYPE.to_owned(),
        binary: binary.to_string_lossy().into_owned(),
        tags: vec!["vhost-device".to_owned()],
    })
}

fn start<D: Device>(
    arguments: Arguments<D::Options>,
    manager: &ServiceManager,
) -> Result<(), StartError> {
    // Before any other file is opened, which could get the number that was given.
    let source = Source::find(&arguments, manager)?;
    stderr::log(D::PROGRAM);
    file_limit::raise();
    let device = Arc::new(D::open(arguments.device)?);
    let signals = Signals::listen(D::RELOADS)?;
    let stop = Arc::clone(&signals.stop);
    let manager = manager.connect();
    let statistics = Arc::new(Statistics::new(D::TYPE, D::REQUESTS));
    let device_sockets = device.sockets();
    let sockets = source
        .path()
        .into_iter()
        .chain(arguments.stats_socket.as_deref())
        .chain(arguments.control_socket.as_deref())
        .chain(device_sockets.iter().map(|socket| socket.path.as_path()));
    let mut turn = Some(Turn::wait(sockets));
    let server = Server::open(source)?;
    let mut listeners = Vec::from_iter(server.listener());
    let mode = arguments.socket_mode;
    let mut bind = |socket: ListeningSocket| {
        let listener = bind_for_clients(socket, mode, &listeners)?;
        listeners.push(Arc::clone(&listener));
        Ok(listener)
    };
    let stream = |path: Option<PathBuf>, option| {
        let kind = SocketType::STREAM;
        path.map(|path| ListeningSocket { path, kind, option })
    };
    let bind_all = || {
        let stats = stream(arguments.stats_socket, "--stats-socket").map(&mut bind);
        let stats = stats.transpose()?;
        let control = stream(arguments.control_socket, "--control-socket").map(&mut bind);
        let control = control.transpose()?;
        let others = device_sockets.iter().cloned().map(&mut bind);
        let others = others.collect::<Result<Vec<_>, _>>()?;
        Ok((stats, control, others))
    };
    let bound = bind_all();
    let outcome = bound.and_then(|(stats_socket, control_socket, others)| {
        let duplicates: io::Result<_> = others.iter().map(|other| other.try_clone()).collect();
        let duplicates = duplicates
            .map_err(|error| StartError(format!("cannot duplicate a socket: {error}")))?;
        device.set_sockets(duplicates)?;
        let mut needs = device.needs();
        if !device.shared_memory().is_empty() {
            // Its requests to the front-end come with files, from any thread.
            let send = Call::new(libc::SYS_sendmsg);
            needs.queue.push(send);
            needs.control.push(send);
            needs.helper.iter_mut().for_each(|calls| calls.push(send));
        }
        file_limit::warn_if_below(needs.open_files);
        if stats_socket.is_some() {
            needs.control.extend(Clients::<StatsProtocol>::calls());
        }
        if control_socket.is_some() {
            needs.control.extend(Clients::<ControlProtocol<D>>::calls());
            let collected = statistics.collect_events();
            collected.map_err(|error| StartError(format!("cannot collect events: {error}")))?;
        }
        let directories = listeners.iter().filter_map(|listener| listener.directory());
        needs
            .files
            .extend(directories.map(|directory| (directory, Access::REMOVE)));
        sandbox::enter(D::PROGRAM, arguments.sandbox, &needs)?;
        stderr::start(D::PROGRAM, || confine_thread(Role::Log))?;
        let for_clients = stats_socket.iter().chain(&control_socket).chain(&others);
        for_clients
            .into_iter()
            .try_for_each(|listener| listener.listen())?;
        let stats_protocol = StatsProtocol(Arc::clone(&statistics));
        let commands = Commands::new(Arc::downgrade(&device), Arc::clone(&statistics));
        Control {
            signals,
            device: Arc::downgrade(&device),
            statistics: Arc::clone(&statistics),
            stats_socket: stats_socket.map(|listener| Clients::new(listener, stats_protocol)),
            control_socket: control_socket
                .map(|listener| Clients::new(listener, ControlProtocol(commands))),
            files: listeners.clone(),
        }
        .start()?;
        server.listen()?;
        turn = None;
        manager.tell(State::Ready);
        let outcome = server.serve(&*device, &statistics, &stop, arguments.poll_us);
        manager.tell(State::Stopping);
        outcome
    });
    listeners.iter().for_each(|listener| listener.remove_file());
    // After a failed start, other programs can use the directories now.
    drop(turn);
    outcome
}

/// Creates a socket file, which is none of those of `others`. No client can connect yet.
fn bind_for_clients(
    socket: ListeningSocket,
    mode: u32,
    others: &[Arc<Listener>],
) -> Result<Arc<Listener>, StartError> {
    let ListeningSocket { path, kind, option } = socket;
    if others.iter().any(|other| other.is_at(&path)) {
        return Err(StartError(format!(
            "{} is already the path of another socket of this program; choose another {option}",
            path.display()
        )));
    }
    let listener = Listener::bind(path, kind, mode, option)?;
    match listener.set_nonblocking() {
        Ok(()) => Ok(Arc::new(listener)),
        Err(error) => {
            listener.remove_file();
            Err(StartError(format!("cannot use {option}: {error}")))
        }
    }
}

/// The open socket on which front-ends connect, or the connection of one.
enum Server {
    Connected(UnixStream),
    Listening(Arc<Listener>),
}

impl Server {
    fn open(source: Source) -> Result<Self, StartError> {
        Ok(match source {
            Source::Connected(socket) => Self::Connected(socket),
            Source::Listening(socket) => Self::Listening(Arc::new(Listener::adopt(socket))),
            Source::Path { path, mode } => {
                let kind = SocketType::STREAM;
                Self::Listening(Arc::new(Listener::bind(path, kind, mode, "--socket-path")?))
            }
        })
    }

    fn listener(&self) -> Option<Arc<Listener>> {
        match self {
            Self::Connected(_) => None,
            Self::Listening(listener) => Some(Arc::clone(listener)),
        }
    }

    /// Starts to accept connections of front-ends.
    fn listen(&self) -> Result<(), StartError> {
        match self {
            Self::Connected(_) => Ok(()),
            Self::Listening(listener) => listener.listen(),
        }
    }

    fn serve<D: Device>(
        self,
        device: &D,
        statistics: &Statistics,
        stop: &OwnedFd,
        polling: Polling,
    ) -> Result<(), StartError> {
        match self {
            Self::Connected(socket) => session::serve(device, statistics, socket, stop, polling)
                .map_err(|error| StartError(format!("the connection ended: {error}"))),
            Self::Listening(listener) => serve_all(device, statistics, &listener, stop, polling),
        }
    }
}

/// Serves one front-end after the other, until the program is to exit.
fn serve_all<D: Device>(
    device: &D,
    statistics: &Statistics,
    listener: &Listener,
    stop: &OwnedFd,
    polling: Polling,
) -> Result<(), StartError> {
    log::info!("waiting for a front-end on {listener}");
    loop {
        match listener.accept(stop) {
            Ok(None) => return Ok(()),
            Ok(Some(socket)) => {
                info_limited(format_args!("a front-end is connected"));
                match session::serve(device, statistics, socket, stop, polling) {
                    Ok(()) => info_limited(format_args!("the front-end is gone")),
                    Err(error) => warn_limited(format_args!("the connection ended: {error}")),
                }
            }
            Err(error) => {
                warn_limited(format_args!(
                    "cannot accept a front-end, trying again: {}",
                    explained(&error)
                ));
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}
