// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds out whether io_uring can be used on this host, by doing what the engine does.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_common::worker::{Poller, Token};

use super::rings::{OPERATIONS, Rings};
use super::uring::UringEngine;
use crate::image::Image;

/// How long the kernel may take to report a file that is ready.
const PROBE: Duration = Duration::from_secs(1);

/// Creates up to `most` rings, at least one, and tries one: see [`Rings::create`]. Returns their number too.
///
/// # Errors
/// This host refuses io_uring, or does not have all that the engine needs.
pub fn open_rings(image: Option<&Arc<Image>>, most: u16) -> io::Result<(Arc<Rings>, u16)> {
    open_for(image, most, &OPERATIONS)
}

fn open_for(
    image: Option<&Arc<Image>>,
    most: u16,
    operations: &[u8],
) -> io::Result<(Arc<Rings>, u16)> {
    let (rings, count) = Rings::create(image, most, operations)?;
    probe(&rings)?;
    Ok((rings, count))
}

/// Watches a file and waits with a timeout, as the engine does. Kernels before 5.13 cannot, although they support restrictions.
fn probe(rings: &Arc<Rings>) -> io::Result<()> {
    let mut engine = UringEngine::<Infallible>::new(rings)?;
    engine.is_probe = true;
    let event = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    engine.watch(event.as_fd(), Token::Control)?;
    let mut ready = Vec::new();
    engine.wait(&mut ready, Some(PROBE))?;
    if ready != [Token::Control] || !engine.is_watching() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel does not support multishot polls, which Linux 5.13 has",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use io_uring::opcode;
    use rustix::io::{fcntl_dupfd_cloexec, write};
    use vhost_device_common::worker::{EpollPoller, Readiness};

    use super::*;

    /// No other test uses file descriptors from here on.
    const HIGH: i32 = 900;
    /// Long enough for an event that comes, short enough for one that does not.
    const SHORT: Duration = Duration::from_millis(20);

    /// Creates one ring. On a host without io_uring, writes the line that `cargo xtask test` counts, past the capture of the test's output.
    fn ring() -> Option<Arc<Rings>> {
        match open_rings(None, 1) {
            Ok((rings, _)) => Some(rings),
            Err(error) => {
                let _ = writeln!(io::stderr(), "SKIPPED a test: no io_uring: {error}");
                None
            }
        }
    }

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn signal(event: &OwnedFd) {
        write(event, &1u64.to_ne_bytes()).unwrap();
    }

    fn wait(engine: &mut UringEngine<Infallible>) -> Vec<Token> {
        let mut ready = Vec::new();
        engine.wait(&mut ready, Some(SHORT)).unwrap();
        ready
    }

    #[test]
    fn a_kernel_that_cannot_watch_files_is_refused() {
        let without = OPERATIONS.map(|operation| match operation {
            opcode::PollAdd::CODE => opcode::PollRemove::CODE,
            other => other,
        });
        if ring().is_some() {
            assert!(open_for(None, 1, &without).is_err());
        }
    }

    #[test]
    fn an_engine_sees_nothing_of_the_previous_engine_of_its_ring() {
        let Some(rings) = ring() else { return };
        for event in [event(), event(), event()] {
            let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
            assert!(
                UringEngine::<Infallible>::new(&rings).is_err(),
                "it is in use"
            );
            assert_eq!(wait(&mut engine), []);
            engine.watch(event.as_fd(), Token::Kick(1)).unwrap();
            assert_eq!(wait(&mut engine), []);
            for _ in 0..2 {
                signal(&event);
                assert_eq!(wait(&mut engine), [Token::Kick(1)]);
            }
            // The next engine sees neither this signal nor the one after the drop.
            signal(&event);
            drop(engine);
            signal(&event);
        }
    }

    #[test]
    fn files_of_a_watcher_are_reported_each_time() {
        let Some(rings) = ring() else { return };
        let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
        let mut epoll = EpollPoller::new().unwrap();
        engine.watch(epoll.as_fd(), Token::Watcher).unwrap();
        let event = event();
        let watcher = epoll.watcher();
        watcher.add(&event, Readiness::READABLE, 5).unwrap();
        for _ in 0..3 {
            signal(&event);
            assert_eq!(wait(&mut engine), [Token::Watcher]);
            epoll.wait(&mut Vec::new(), Some(Duration::ZERO)).unwrap();
            assert_eq!(epoll.next_file(), Some((5, Readiness::READABLE)));
            assert_eq!(wait(&mut engine), []);
        }
    }

    #[test]
    fn a_forgotten_file_is_not_reported() {
        let Some(rings) = ring() else { return };
        let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
        let event = event();
        engine.watch(event.as_fd(), Token::Control).unwrap();
        assert_eq!(wait(&mut engine), []);
        engine.forget(event.as_fd(), Token::Control).unwrap();
        assert_eq!(wait(&mut engine), []);
        signal(&event);
        assert_eq!(wait(&mut engine), []);
    }

    #[test]
    fn a_watch_that_failed_counts_as_ready_until_it_is_armed_again() {
        let Some(rings) = ring() else { return };
        let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
        let event = event();
        let closed = fcntl_dupfd_cloexec(&event, HIGH).unwrap();
        engine.watch(closed.as_fd(), Token::Kick(1)).unwrap();
        drop(closed);
        assert_eq!(wait(&mut engine), [Token::Kick(1)]);
        assert!(!engine.is_watching());
        // Now its number names an open file.
        let _open = fcntl_dupfd_cloexec(&event, HIGH).unwrap();
        assert_eq!(wait(&mut engine), []);
        assert!(engine.is_watching());
        for _ in 0..2 {
            signal(&event);
            assert_eq!(wait(&mut engine), [Token::Kick(1)]);
        }
    }
}
