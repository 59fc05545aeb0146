// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control thread: it handles signals, and serves the clients of `--stats-socket` and `--control-socket`. It does so with or
//! without a front-end, and never waits for the other threads.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use super::clients::{Clients, Protocol};
use super::control_socket::{ControlProtocol, State, event};
use super::signals::{Signal, Signals};
use super::socket::Listener;
use super::stats_socket::StatsProtocol;
use crate::device::{Device, StartError};
use crate::sandbox::{Role, confine_thread};
use crate::statistics::{Event, Statistics};
use crate::stderr;

/// How long requests in flight may take to finish after a signal to exit.
const TIME_TO_FINISH: Duration = Duration::from_millis(1800);

/// How long to wait before a retry.
const PAUSE: Duration = Duration::from_millis(100);

/// What the thread serves.
pub struct Control<D: Device> {
    pub signals: Signals,
    /// The program may exit, and drop it, at any time.
    pub device: Weak<D>,
    pub statistics: Arc<Statistics>,
    pub stats_socket: Option<Clients<StatsProtocol>>,
    pub control_socket: Option<Clients<ControlProtocol<D>>>,
    /// Sockets whose files are removed if the exit must be forced.
    pub files: Vec<Arc<Listener>>,
}

impl<D: Device> Control<D> {
    /// Starts the thread.
    pub fn start(self) -> Result<(), StartError> {
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                confine_thread(Role::Control);
                self.run();
            })
            .map_err(|error| StartError(format!("cannot start a thread: {error}")))?;
        Ok(())
    }

    fn run(mut self) {
        while self.wait() {
            if self.signals.statistics.came() {
                self.statistics.log();
            }
            if self.signals.reload.as_ref().is_some_and(Signal::came)
                && let Some(device) = self.device.upgrade()
            {
                device.reload();
            }
            if let Some(stats_socket) = &mut self.stats_socket {
                stats_socket.advance();
            }
            if self.serve_commands() {
                break;
            }
        }
        self.statistics.emit(Event::Shutdown);
        self.serve_commands();
        // After `quit`, the program can exit at once. After a signal this changes nothing.
        self.signals.stop();
        self.force_end();
    }

    /// Serves the clients of the control socket: commands, then events. Returns whether one of them has sent `quit`.
    fn serve_commands(&mut self) -> bool {
        let Some(control_socket) = &mut self.control_socket else {
            return false;
        };
        control_socket.advance();
        let events = self.statistics.events();
        for (time, what) in events.into_iter().flat_map(|events| events.take()) {
            control_socket.broadcast(&event(what, time), |client: &State| client.negotiated);
        }
        control_socket.protocol().0.quits
    }

    /// Waits until there may be something to do. Returns whether the program continues.
    fn wait(&self) -> bool {
        let signals = [Some(&self.signals.statistics), self.signals.reload.as_ref()];
        let signals = signals
            .into_iter()
            .flatten()
            .map(|signal| (signal.file().as_fd(), PollFlags::IN));
        let events = self.statistics.events();
        let events = events.map(|events| (events.as_fd(), PollFlags::IN));
        let mut fds = vec![PollFd::new(&self.signals.stop, PollFlags::IN)];
        fds.extend(
            signals
                .chain(events)
                .chain(files(self.stats_socket.as_ref()))
                .chain(files(self.control_socket.as_ref()))
                .map(|(file, flags)| PollFd::from_borrowed_fd(file, flags)),
        );
        let deadlines = [
            self.stats_socket.as_ref().and_then(Clients::deadline),
            self.control_socket.as_ref().and_then(Clients::deadline),
        ];
        let deadline = deadlines.into_iter().flatten().min();
        let waited = retry_on_intr(|| {
            let left = deadline.map(|time| time.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            poll(&mut fds, left.as_ref())
        });
        if let Err(errno) = waited {
            log::error!("cannot wait for signals, trying again: {errno}");
            std::thread::sleep(PAUSE);
        }
        fds.first().is_some_and(|stop| stop.revents().is_empty())
    }

    /// Forces the process to exit if it does not in time: a request can hang as long as its storage does.
    fn force_end(&self) {
        std::thread::sleep(TIME_TO_FINISH);
        log::warn!("requests did not finish in time; they are lost");
        self.files.iter().for_each(|file| file.remove_file());
        stderr::flush();
        // Without the exit handlers of libraries, which free what a running renderer still uses.
        signal_hook::low_level::exit(0);
    }
}

/// Returns the files of a socket to wait for, if there is one.
fn files<P: Protocol>(
    clients: Option<&Clients<P>>,
) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
    clients.into_iter().flat_map(Clients::files)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use rustix::process::{Signal as Number, getpid, kill_process};

    use super::*;
    use crate::device::{QueueHandler, Watcher};
    use crate::worker::Queue;

    /// Sends a message on each reload.
    struct Reloading(Mutex<Sender<()>>);

    #[derive(clap::Args)]
    struct NoOptions {}

    struct Nothing;

    impl QueueHandler for Nothing {
        fn process(&mut self, _queue: &mut Queue) {}
    }

    impl Device for Reloading {
        const TYPE: &'static str = "rng";
        const PROGRAM: &'static str = "reloading";
        const VERSION: &'static str = "0";
        const DESCRIPTION: &'static str = "a test device";
        const RELOADS: bool = true;

        type Options = NoOptions;
        type Handler = Nothing;

        fn open(_options: NoOptions) -> Result<Self, StartError> {
            Err(StartError(String::new()))
        }

        fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Nothing> {
            Ok(Nothing)
        }

        fn reload(&self) {
            self.0.lock().unwrap().send(()).unwrap();
        }
    }

    #[test]
    fn each_sighup_has_the_device_reload() {
        let (sender, reloaded) = channel();
        let device = Arc::new(Reloading(Mutex::new(sender)));
        let signals = Signals::listen(Reloading::RELOADS).unwrap();
        let control = Control {
            signals,
            device: Arc::downgrade(&device),
            statistics: Arc::new(Statistics::new(Reloading::TYPE, Reloading::REQUESTS)),
            stats_socket: None,
            control_socket: None,
            files: Vec::new(),
        };
        control.start().unwrap();
        for _ in 0..3 {
            kill_process(getpid(), Number::HUP).unwrap();
            reloaded.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        drop(device);
        kill_process(getpid(), Number::HUP).unwrap();
        assert!(reloaded.recv().is_err(), "the thread keeps no device");
    }
}
