// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files that a handler waits for: one suite for threads that wait by epoll and by io_uring.

#![cfg(test)]
#![allow(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{dup2, fcntl_dupfd_cloexec};
use vhost_device_common::device::QueueHandler;
use vhost_device_common::worker::{
    Poller, Polling, Queue, Queues, Readiness, Token, Watcher, Worker,
};
use vhost_device_tests::skip::skip;

const LIMIT: Duration = Duration::from_secs(10);
const NOTHING: [u32; 0] = [];
const READABLE: Readiness = Readiness::READABLE;
const WRITABLE: Readiness = Readiness::WRITABLE;
/// The file that is signalled last, so that all before it has been heard.
const LAST: u32 = u32::MAX;
/// The file at which the handler pauses.
const PAUSE: u32 = u32::MAX - 1;
/// Numbers of files from here on are used by no other test.
const HIGH: RawFd = 900;
const HIGHER: RawFd = 901;

/// A poller of the handler's own, as an engine has one.
struct Ring {
    uring: IoUring,
    watched: Vec<(RawFd, Token)>,
}

impl Ring {
    fn arm(&mut self, fd: RawFd, token: Token) {
        let poll = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).multi(true);
        let entry = poll.build().user_data(token.to_u64());
        // SAFETY: the entry points to nothing.
        unsafe { self.uring.submission().push(&entry) }.unwrap();
    }
}

impl Poller for Ring {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.arm(fd.as_raw_fd(), token);
        self.watched.push((fd.as_raw_fd(), token));
        Ok(())
    }

    fn forget(&mut self, _fd: BorrowedFd<'_>, _token: Token) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()> {
        let timespec = timeout.map(Timespec::from);
        let mut arguments = SubmitArgs::new();
        if let Some(timespec) = &timespec {
            arguments = arguments.timespec(timespec);
        }
        match self.uring.submitter().submit_with_args(1, &arguments) {
            Err(error) if error.raw_os_error() != Some(libc::ETIME) => return Err(error),
            _ => {}
        }
        let completions: Vec<_> = self.uring.completion().collect();
        for completion in completions {
            let token = Token::from_u64(completion.user_data());
            ready.push(token);
            if !cqueue::more(completion.flags()) {
                let (fd, _) = self
                    .watched
                    .iter()
                    .find(|(_, other)| *other == token)
                    .unwrap();
                self.arm(*fd, token);
            }
        }
        Ok(())
    }
}

/// What the handler does when it hears of a file.
type Act = Box<dyn FnMut(u32) + Send>;

/// Tells what it hears.
struct Listener {
    heard: Sender<(u32, Readiness)>,
    go_on: Receiver<()>,
    act: Act,
    ring: Option<Ring>,
}

impl QueueHandler for Listener {
    fn process(&mut self, _queue: &mut Queue) {}

    fn poller(&mut self) -> Option<&mut dyn Poller> {
        self.ring.as_mut().map(|ring| ring as &mut dyn Poller)
    }

    fn ready(&mut self, token: u32, readiness: Readiness, _queues: &mut Queues) {
        let _ = self.heard.send((token, readiness));
        (self.act)(token);
        if token == PAUSE {
            self.go_on.recv_timeout(LIMIT).unwrap();
        }
    }
}

/// A thread with such a handler.
struct Thread {
    watcher: Watcher,
    heard: Receiver<(u32, Readiness)>,
    go_on: Sender<()>,
    last: OwnedFd,
    pause: OwnedFd,
    _worker: Worker,
}

impl Thread {
    fn start(ring: Option<Ring>, act: impl FnOnce(Watcher) -> Act) -> Self {
        let (to_heard, heard) = channel();
        let (to_go_on, go_on) = channel();
        let mut handle = None;
        let make = |watcher: Watcher| {
            let act = act(watcher.clone());
            handle = Some(watcher);
            Ok(Listener {
                heard: to_heard,
                go_on,
                act,
                ring,
            })
        };
        let worker = Worker::start("test".into(), make, Polling::For(Duration::ZERO)).unwrap();
        let thread = Self {
            watcher: handle.unwrap(),
            heard,
            go_on: to_go_on,
            last: event(),
            pause: event(),
            _worker: worker,
        };
        thread.watcher.add(&thread.last, READABLE, LAST).unwrap();
        thread.watcher.add(&thread.pause, READABLE, PAUSE).unwrap();
        thread
    }

    fn next(&self) -> (u32, Readiness) {
        self.heard.recv_timeout(LIMIT).expect("nothing is heard")
    }

    /// The tokens that were heard until now.
    fn heard(&self) -> Vec<u32> {
        signal(&self.last);
        let tokens = std::iter::from_fn(|| Some(self.next().0));
        tokens.take_while(|token| *token != LAST).collect()
    }

    /// The tokens that are heard of together after `happen`.
    fn heard_together(&self, happen: impl FnOnce()) -> Vec<u32> {
        signal(&self.pause);
        assert_eq!(self.next().0, PAUSE);
        happen();
        self.go_on.send(()).unwrap();
        self.heard()
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn signal(event: impl AsFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

fn ring() -> Option<Ring> {
    match IoUring::new(8) {
        Ok(uring) => Some(Ring {
            uring,
            watched: Vec::new(),
        }),
        Err(error) => {
            skip(&format!("no io_uring: {error}"));
            None
        }
    }
}

/// Runs a test on both kinds of threads.
fn on_both(act: impl Fn(Watcher) -> Act, check: impl Fn(Thread)) {
    check(Thread::start(None, &act));
    if let Some(ring) = ring() {
        check(Thread::start(Some(ring), &act));
    }
}

fn nothing(_watcher: Watcher) -> Act {
    Box::new(|_| {})
}

#[test]
fn readiness_is_reported_once_each_time_that_it_arises() {
    on_both(nothing, |thread| {
        let event = event();
        signal(&event);
        thread.watcher.add(&event, READABLE, 7).unwrap();
        assert_eq!(thread.heard(), [7], "ready when it was added");
        for _ in 0..3 {
            signal(&event);
            assert_eq!(thread.heard(), [7]);
            assert_eq!(thread.heard(), NOTHING);
        }
        thread.watcher.remove(&event);
        signal(&event);
        assert_eq!(thread.heard(), NOTHING);
    });
}

#[test]
fn both_directions_of_a_socket_and_its_end_are_reported() {
    on_both(nothing, |thread| {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        thread.watcher.add(&ours, READABLE | WRITABLE, 1).unwrap();
        assert_eq!(thread.next(), (1, WRITABLE));
        theirs.write_all(b"x").unwrap();
        assert_eq!(thread.next(), (1, READABLE | WRITABLE));
        while ours.write(&[0; 4096]).is_ok() {}
        ours.read_exact(&mut [0]).unwrap();
        assert_eq!(thread.heard(), NOTHING);
        theirs.set_nonblocking(true).unwrap();
        while theirs.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        assert_eq!(thread.next(), (1, WRITABLE));
        thread.heard();
        drop(theirs);
        assert_eq!(thread.next(), (1, READABLE | WRITABLE));
    });
}

#[test]
fn a_failed_file_is_ready_for_whatever_it_is_watched_for() {
    on_both(nothing, |thread| {
        let (reader, writer) = io::pipe().unwrap();
        thread.watcher.add(&writer, Readiness::PRIORITY, 1).unwrap();
        assert_eq!(thread.heard(), NOTHING);
        drop(reader);
        assert_eq!(thread.next(), (1, Readiness::PRIORITY));
    });
}

#[test]
fn exceptional_conditions_are_reported_as_priority() {
    on_both(nothing, |thread| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let interest = READABLE | Readiness::PRIORITY;
        thread.watcher.add(&ours, interest, 1).unwrap();
        rustix::net::send(&theirs, b"!", rustix::net::SendFlags::OOB).unwrap();
        let (token, readiness) = thread.next();
        assert_eq!(token, 1);
        assert!(readiness.contains(Readiness::PRIORITY));
    });
}

#[test]
fn a_changed_file_is_reported_again_as_what_it_is_now_watched_for() {
    on_both(nothing, |thread| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let watcher = &thread.watcher;
        watcher.add(&ours, READABLE, 1).unwrap();
        assert_eq!(thread.heard(), NOTHING);
        watcher.change(&ours, WRITABLE, 2).unwrap();
        assert_eq!(thread.next(), (2, WRITABLE));
        theirs.write_all(b"x").unwrap();
        watcher.change(&ours, Readiness::NONE, 2).unwrap();
        assert_eq!(thread.heard(), NOTHING);
        for _ in 0..2 {
            watcher.change(&ours, READABLE, 3).unwrap();
            assert_eq!(thread.next(), (3, READABLE));
        }
        watcher.remove(&ours);
        watcher.remove(&ours);
        let error = watcher.change(&ours, READABLE, 3).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    });
}

#[test]
fn a_file_is_watched_once_and_only_if_it_can_be_waited_on() {
    on_both(nothing, |thread| {
        let watcher = &thread.watcher;
        let event = event();
        watcher.add(&event, READABLE, 1).unwrap();
        let error = watcher.add(&event, WRITABLE, 2).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        signal(&event);
        assert_eq!(thread.heard(), [1]);
        let error = watcher
            .add(tempfile::tempfile().unwrap(), READABLE, 3)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        // Several files may have one token.
        let other = fcntl_dupfd_cloexec(&event, 0).unwrap();
        watcher.add(&other, READABLE, 1).unwrap();
        assert_eq!(thread.heard(), [1]);
        signal(&event);
        assert_eq!(thread.heard(), [1, 1]);
    });
}

/// A handler that removes the second file when it hears of the first, and has another one in its place.
fn replaces(watcher: Watcher, second: &OwnedFd, third: &OwnedFd) -> Act {
    let (second, third) = (second.as_raw_fd(), third.as_raw_fd());
    Box::new(move |token| {
        if token == 1 {
            // SAFETY: the test keeps these files open.
            let [second, third] =
                [second, third].map(|fd: RawFd| unsafe { BorrowedFd::borrow_raw(fd) });
            watcher.remove(second);
            watcher.add(third, READABLE, 2).unwrap();
        }
    })
}

#[test]
fn a_file_that_is_removed_while_files_are_handled_is_not_heard_of_by_its_successor() {
    let [first, second, third] = std::array::from_fn(|_| event());
    on_both(
        |watcher| replaces(watcher, &second, &third),
        |thread| {
            for event in [&first, &second, &third] {
                // The test with the other kind of thread has signalled it.
                let _ = rustix::io::read(event, &mut [0; 8]);
            }
            thread.watcher.add(&first, READABLE, 1).unwrap();
            thread.watcher.add(&second, READABLE, 2).unwrap();
            let heard = thread.heard_together(|| {
                signal(&first);
                signal(&second);
            });
            assert_eq!(heard, [1]);
            signal(&third);
            assert_eq!(thread.heard(), [2]);
        },
    );
}

#[test]
fn a_number_that_is_used_again_is_not_taken_for_the_file_before() {
    // The handler closes the second file, and opens another one by the same number.
    let act = |watcher: Watcher| -> Act {
        Box::new(move |token| {
            if token == 1 {
                // SAFETY: the test keeps this file open.
                let mut second = unsafe { OwnedFd::from_raw_fd(HIGH) };
                watcher.remove(&second);
                dup2(event(), &mut second).unwrap();
                watcher.add(&second, READABLE, 2).unwrap();
                std::mem::forget(second);
            }
        })
    };
    on_both(act, |thread| {
        let first = event();
        let second = fcntl_dupfd_cloexec(event(), HIGH).unwrap();
        assert_eq!(second.as_raw_fd(), HIGH);
        thread.watcher.add(&first, READABLE, 1).unwrap();
        thread.watcher.add(&second, READABLE, 2).unwrap();
        let heard = thread.heard_together(|| {
            signal(&first);
            signal(&second);
        });
        assert_eq!(heard, [1]);
        signal(&second);
        assert_eq!(thread.heard(), [2]);
    });
}

#[test]
fn the_watch_of_a_closed_file_ends() {
    on_both(nothing, |thread| {
        for token in 1..4 {
            // Whatever file has this number, the former watch is not in its way.
            let event = fcntl_dupfd_cloexec(event(), HIGHER).unwrap();
            assert_eq!(event.as_raw_fd(), HIGHER);
            thread.watcher.add(&event, READABLE, token).unwrap();
            assert_eq!(thread.heard(), NOTHING);
            signal(&event);
            assert_eq!(thread.heard(), [token]);
        }
    });
}

#[test]
fn a_duplicate_that_stays_open_does_not_report_for_a_removed_file() {
    on_both(nothing, |thread| {
        let original = fcntl_dupfd_cloexec(event(), 0).unwrap();
        let duplicate = fcntl_dupfd_cloexec(&original, 0).unwrap();
        thread.watcher.add(&original, READABLE, 1).unwrap();
        thread.watcher.remove(&original);
        drop(original);
        signal(&duplicate);
        assert_eq!(thread.heard(), NOTHING);
    });
}

#[test]
fn more_files_than_are_fetched_at_once_are_all_heard_of() {
    on_both(nothing, |thread| {
        let events: Vec<_> = (0..200).map(|_| event()).collect();
        for (token, event) in (0..).zip(&events) {
            thread.watcher.add(event, READABLE, token).unwrap();
        }
        for _ in 0..3 {
            let mut heard = thread.heard_together(|| events.iter().for_each(signal));
            heard.sort_unstable();
            assert_eq!(heard, Vec::from_iter(0..200));
        }
    });
}

#[test]
fn files_come_and_go_from_any_thread() {
    const ROUNDS: u32 = 100;
    on_both(nothing, |thread| {
        let watcher = &thread.watcher;
        let come_and_go = |first: u32| {
            let rounds = (first..first + ROUNDS).map(|token| {
                let event = event();
                watcher.add(&event, READABLE, token).unwrap();
                if token % 2 == 0 {
                    watcher.remove(&event);
                }
                signal(&event);
                event
            });
            rounds.collect::<Vec<_>>()
        };
        let events = std::thread::scope(|scope| {
            [0, ROUNDS]
                .map(|first| scope.spawn(move || come_and_go(first)))
                .map(|thread| thread.join().unwrap())
        });
        let mut heard = thread.heard();
        heard.sort_unstable();
        let kept = (0..2 * ROUNDS).filter(|token| token % 2 == 1);
        assert_eq!(heard, Vec::from_iter(kept));
        drop(events);
    });
}
