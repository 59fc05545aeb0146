// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that hears what comes from outside but not from a front-end: signals, and who asks for statistics. It does so whether
//! there is a front-end or not, and whatever the other threads are at.

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use super::signals::{Signal, Signals};
use super::socket::Listener;
use super::stats_socket::StatsSocket;
use crate::device::{Device, StartError};
use crate::sandbox::{Role, confine_thread};
use crate::statistics::Statistics;
use crate::stderr;

/// How long requests in flight may take to finish once a signal came that ends the program.
const TIME_TO_FINISH: Duration = Duration::from_millis(1800);

/// How long to wait before trying again what failed.
const PAUSE: Duration = Duration::from_millis(100);

/// What the thread serves.
pub struct Control<D> {
    pub signals: Signals,
    /// The program may end, and drop it, at any time.
    pub device: Weak<D>,
    pub statistics: Arc<Statistics>,
    pub stats_socket: Option<StatsSocket>,
    /// What to remove should the program have to be ended.
    pub files: Vec<Arc<Listener>>,
}

impl<D: Device> Control<D> {
    /// Starts the thread.
    pub fn start(self) -> Result<(), StartError> {
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(128 << 10)
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
        }
        self.force_end();
    }

    /// Waits until there may be something to do. Returns whether the program goes on.
    fn wait(&self) -> bool {
        let signals = [Some(&self.signals.statistics), self.signals.reload.as_ref()];
        let signals = signals
            .into_iter()
            .flatten()
            .map(|signal| (signal.file().as_fd(), PollFlags::IN));
        let clients = self.stats_socket.iter().flat_map(StatsSocket::files);
        let mut fds = vec![PollFd::new(&self.signals.stop, PollFlags::IN)];
        fds.extend(
            signals
                .chain(clients)
                .map(|(file, flags)| PollFd::from_borrowed_fd(file, flags)),
        );
        let deadline = self.stats_socket.as_ref().and_then(StatsSocket::deadline);
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

    /// Ends the process if it does not do so by itself in time: a request can hang for as long as its storage does.
    fn force_end(&self) {
        std::thread::sleep(TIME_TO_FINISH);
        log::warn!("requests did not finish in time; they are lost");
        self.files.iter().for_each(|file| file.remove_file());
        stderr::flush();
        // Without the exit handlers of libraries, which take away what a renderer that still works uses.
        signal_hook::low_level::exit(0);
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use rustix::process::{Signal as Number, getpid, kill_process};

    use super::*;
    use crate::device::QueueHandler;
    use crate::worker::Queue;

    /// Tells of each time that it is to reload.
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

        fn handler(&self, _thread: u16) -> io::Result<Nothing> {
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
