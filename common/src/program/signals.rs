// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SIGTERM and SIGINT end the program: in good order, or at the latest after a time limit. A guest
//! can not end it by a signal.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};

use super::sandbox::{Role, confine_thread};
use super::socket::Listener;
use crate::device::StartError;
use crate::memory::survive_lost_memory;

/// How long requests in flight may take to finish once a signal came.
const TIME_TO_FINISH: Duration = Duration::from_millis(1800);

/// Becomes readable, and stays so, when the program is to end.
pub struct Stop {
    file: Arc<OwnedFd>,
}

impl Stop {
    /// Starts to listen to the signals.
    pub fn on_signals() -> Result<Self, StartError> {
        let failed = |error| StartError(format!("cannot listen to signals: {error}"));
        let (read, write) = UnixStream::pair().map_err(failed)?;
        for signal in [SIGTERM, SIGINT] {
            let write = write.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, write).map_err(failed)?;
        }
        // A write beyond the limit of file sizes is to fail, not to end the process.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(failed)?;
        survive_lost_memory().map_err(failed)?;
        Ok(Self {
            file: Arc::new(read.into()),
        })
    }

    /// Has the program end some time after a signal even if it does not do so by itself, and the socket's file removed.
    pub fn force_end(&self, listener: Option<Arc<Listener>>) -> Result<(), StartError> {
        let file = Arc::clone(&self.file);
        std::thread::Builder::new()
            .name("stop".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                confine_thread(Role::End);
                force_end(&file, listener.as_deref());
            })
            .map_err(|error| StartError(format!("cannot start a thread: {error}")))?;
        Ok(())
    }

    /// What to wait on beside all else.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }
}

/// Ends the process if it has not ended some time after a signal: a request can hang for as long as
/// its storage does.
fn force_end(stop: &OwnedFd, listener: Option<&Listener>) {
    let mut fds = [PollFd::new(stop, PollFlags::IN)];
    if retry_on_intr(|| poll(&mut fds, None)).is_err() {
        return;
    }
    std::thread::sleep(TIME_TO_FINISH);
    log::warn!("requests did not finish in time; they are lost");
    if let Some(listener) = listener {
        listener.remove_file();
    }
    // Without the exit handlers of libraries, which take away what a renderer that still works uses.
    signal_hook::low_level::exit(0);
}
