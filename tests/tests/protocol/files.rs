// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files that are sent with messages (vhost-user, "File descriptors"): files other than eventfds, full, closed or blocking ones; files
//! that replace others; and files that are lost because there are too many.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::{NEED_REPLY, VERSION, payload};
use vhost_device_tests::front_end::{GuestMemory, Queue};
use vhost_device_tests::process::Program;
use vhost_device_tests::target::{Claim, Request, Running, Target, claims};

use crate::{PATIENCE, Peer, owned, ring_start};

/// How long an idle program is watched, and how much CPU time it may use meanwhile.
const IDLE: Duration = Duration::from_millis(300);
const IDLE_TIME: Duration = Duration::from_millis(100);

const SIZE: u16 = 16;

/// Ring 0 of a connection.
struct Scene {
    peer: Peer,
    memory: GuestMemory,
    queue: Queue,
}

impl Scene {
    fn new(running: &Running) -> Self {
        let memory = GuestMemory::new(&[(0, 1 << 20)]);
        let peer = Peer::new(running);
        Scene {
            queue: Queue::new(&memory, peer.queue_options(SIZE)),
            peer,
            memory,
        }
    }

    /// Starts the ring with `file` instead of the eventfd of `request`. Returns whether all messages were accepted.
    fn start(&self, request: FrontendReq, file: BorrowedFd<'_>) -> bool {
        ring_start(&self.peer, &self.memory, &self.queue)
            .into_iter()
            .all(|mut message| {
                if message.request == request {
                    message.files = vec![file.try_clone_to_owned().unwrap()];
                }
                let answer = self.peer.offer(&message);
                answer.unwrap() == 0
            })
    }

    /// Starts the ring with its own eventfds.
    fn start_well(&self) {
        assert!(self.start(
            FrontendReq::SET_OWNER,
            self.peer.connection.socket().as_fd()
        ));
    }

    /// Makes a request available, and waits until it is used, without using the call eventfd.
    fn carry_out(&mut self, target: &dyn Target, what: &str) {
        let mut request = Request::new(target, &self.memory);
        self.queue.submit(&request.write(1));
        let done = self.queue.poll_used(PATIENCE);
        assert!(done, "{what}: a request is not answered");
        request.assert_done(self.queue.take_used().unwrap());
    }

    fn stop(&self) {
        self.peer.stop(0);
    }
}

fn an_eventfd(count: u32) -> OwnedFd {
    eventfd(count, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Fills an eventfd.
fn fill(eventfd: &OwnedFd) {
    // It may have been signalled.
    let _ = rustix::io::read(eventfd, &mut [0; 8]);
    rustix::io::write(eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
}

/// Creates pipes whose other end is closed, and such a socket.
fn without_peer() -> [(&'static str, OwnedFd); 3] {
    [
        (
            "the end of a pipe that nobody writes to",
            pipe().unwrap().0.into(),
        ),
        (
            "the end of a pipe that nobody reads",
            pipe().unwrap().1.into(),
        ),
        (
            "a socket without a peer",
            UnixStream::pair().unwrap().0.into(),
        ),
    ]
}

fn assert_idle(program: &Program, what: &str) {
    let before = program.processor_time().unwrap();
    thread::sleep(IDLE);
    let used = program.processor_time().unwrap() - before;
    assert!(
        used < IDLE_TIME,
        "{what}: {used:?} of processor time in {IDLE:?} without work"
    );
}

/// A file that is always readable, or broken, wakes the device once at most: it must not loop.
fn a_kick_of_any_kind_costs_nothing_while_there_is_nothing_to_do(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    let (unread, mut writer) = pipe().unwrap();
    writer.write_all(&[1; 100]).unwrap();
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let readable = an_eventfd(1);
    let data = epoll::EventData::new_u64(0);
    let events = epoll::EventFlags::IN;
    epoll::add(&set, &readable, data, events).unwrap();
    let mut kinds = vec![
        ("an eventfd that nobody reads", an_eventfd(1)),
        ("a pipe with unread bytes", unread.into()),
        ("a set of files of which one is readable", set),
        (
            "a file of random bytes",
            File::open("/dev/urandom").unwrap().into(),
        ),
    ];
    kinds.extend(without_peer());
    for (what, file) in kinds {
        let mut scene = Scene::new(&running);
        if scene.start(FrontendReq::SET_VRING_KICK, file.as_fd()) {
            assert_idle(&running.program, what);
            scene.stop();
            scene.queue.reset();
        }
        scene.start_well();
        scene.carry_out(target, what);
    }
}

/// The requests of a driver that cannot be called are carried out all the same; it is the front-end's own loss.
fn a_call_that_fails_does_no_harm(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    let full = an_eventfd(0);
    fill(&full);
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    for (what, file) in [
        ("a full eventfd", full),
        ("a file that cannot be written", set),
    ] {
        let mut scene = Scene::new(&running);
        assert!(scene.start(FrontendReq::SET_VRING_CALL, file.as_fd()));
        for _ in 0..3 {
            scene.carry_out(target, what);
        }
        scene.stop();
        // The same for the ERR eventfd.
        scene.queue.reset();
        assert!(scene.start(FrontendReq::SET_VRING_ERR, file.as_fd()));
        scene.queue.publish_nonsense();
        scene.stop();
        scene.queue.reset();
        scene.start_well();
        scene.carry_out(target, what);
    }
}

/// Creates sockets and pipes: the end to write to, and the end to read from.
fn two_ends() -> [(&'static str, OwnedFd, OwnedFd); 3] {
    let (reader, writer) = pipe().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (one, other) = UnixDatagram::pair().unwrap();
    [
        ("a pipe", writer.into(), reader.into()),
        ("a stream socket", theirs.into(), ours.into()),
        ("a datagram socket", other.into(), one.into()),
    ]
}

/// User-Mode Linux is called through sockets, and reads 8 bytes for each call.
fn a_call_may_be_a_socket_or_a_pipe(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for (what, theirs, ours) in two_ends() {
        let mut scene = Scene::new(&running);
        assert!(scene.start(FrontendReq::SET_VRING_CALL, theirs.as_fd()));
        // The first call is for the start.
        for number in 0..3 {
            let mut call = [0; 16];
            assert!(is_readable(&ours), "{what}: no call {number}");
            assert_eq!(rustix::io::read(&ours, &mut call), Ok(8), "{what}");
            assert_eq!(call[..8], 1u64.to_ne_bytes(), "{what}");
            scene.queue.arm_interrupt();
            scene.carry_out(target, what);
        }
    }
    for (what, theirs, ours) in two_ends() {
        let scene = Scene::new(&running);
        assert!(scene.start(FrontendReq::SET_VRING_ERR, theirs.as_fd()));
        let mut queue = scene.queue;
        queue.publish_nonsense();
        assert!(is_readable(&ours), "{what}: nothing of a corrupt ring");
    }
}

/// Returns whether there is something to read within the time limit.
fn is_readable(end: &OwnedFd) -> bool {
    let limit = Timespec::try_from(PATIENCE).unwrap();
    poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

/// Writes until it is full, and makes later writes block.
fn fill_up(end: &OwnedFd) {
    let flags = fcntl_getfl(end).unwrap();
    fcntl_setfl(end, flags | OFlags::NONBLOCK).unwrap();
    while rustix::io::write(end, &[1; 8]).is_ok() {}
    fcntl_setfl(end, flags - OFlags::NONBLOCK).unwrap();
}

/// A full one means that a call is pending. A closed other end does not end the process.
fn a_socket_or_pipe_that_is_not_read_keeps_no_ring_from_working(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR] {
        let closed = without_peer().map(|(what, end)| (what, end, None));
        let full = two_ends().map(|(what, end, other)| (what, end, Some(other)));
        for (what, end, other) in closed.into_iter().chain(full) {
            let mut scene = Scene::new(&running);
            assert!(scene.start(request, end.as_fd()), "{what} is refused");
            if other.is_some() {
                fill_up(&end);
            }
            for _ in 0..3 {
                scene.queue.arm_interrupt();
                scene.carry_out(target, what);
            }
            scene.queue.publish_nonsense();
            scene.stop();
            scene.peer.assert_alive();
        }
    }
}

/// A front-end can make its eventfds block again, after the back-end has changed them.
fn a_blocking_call_eventfd_does_not_keep_a_ring_from_stopping(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for leaves in [false, true] {
        let mut scene = Scene::new(&running);
        let call = owned(scene.queue.call_fd());
        scene.start_well();
        fill(&call);
        let flags = fcntl_getfl(&call).unwrap();
        fcntl_setfl(&call, flags - OFlags::NONBLOCK).unwrap();
        let mut requests: Vec<_> = (0..4)
            .map(|_| Request::new(target, &scene.memory))
            .collect();
        for request in &mut requests {
            scene.queue.add(&request.write(1)).unwrap();
        }
        scene.queue.publish();
        scene.queue.kick_anyway();
        if leaves {
            for _ in &requests {
                assert!(scene.queue.poll_used(PATIENCE));
                scene.queue.take_used().unwrap();
            }
        } else {
            scene.stop();
            scene.peer.assert_alive();
        }
        drop(scene);
        let mut next = Scene::new(&running);
        next.start_well();
        next.carry_out(target, "after an eventfd that blocks");
    }
}

/// The same for the ERR eventfd of a ring that cannot start.
fn a_blocking_err_eventfd_delays_no_message(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    let scene = Scene::new(&running);
    let error = owned(scene.queue.error_fd());
    for mut message in ring_start(&scene.peer, &scene.memory, &scene.queue) {
        match message.request {
            FrontendReq::SET_VRING_ADDR => {
                message.payload = payload::vring_addresses(0, 0, 1, 1, 1, 0);
            }
            FrontendReq::SET_VRING_KICK => {
                fill(&error);
                let flags = fcntl_getfl(&error).unwrap();
                fcntl_setfl(&error, flags - OFlags::NONBLOCK).unwrap();
            }
            _ => {}
        }
        let fds = message.fds();
        let answer = scene
            .peer
            .acknowledged(message.request, &message.payload, &fds);
        answer.unwrap();
    }
    scene.peer.assert_alive();
}

/// Returns whether the other end of a pipe is closed within the time limit.
fn is_closed(end: impl AsFd) -> bool {
    let limit = Timespec::try_from(PATIENCE).unwrap();
    let mut fds = [PollFd::new(&end, PollFlags::empty())];
    poll(&mut fds, Some(&limit)).unwrap() == 1
}

/// A new kick eventfd replaces the old one, which is closed: in the worker, and in its epoll or io_uring instance.
fn a_replaced_kick_eventfd_is_closed(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let running = target.start();
    for is_running in [false, true] {
        let mut scene = Scene::new(&running);
        if is_running {
            scene.start_well();
        }
        let set = |request, file: &OwnedFd| {
            scene.peer.done(request, &payload::u64(0), &[file.as_fd()]);
        };
        for _ in 0..5 {
            let (reader, writer) = pipe().unwrap();
            let reader = OwnedFd::from(reader);
            set(FrontendReq::SET_VRING_KICK, &reader);
            drop(reader);
            set(FrontendReq::SET_VRING_KICK, &owned(scene.queue.kick_fd()));
            assert!(is_closed(writer), "running {is_running}: the old kick");
        }
        if is_running {
            scene.carry_out(target, "after its kick was replaced");
        }
    }
}

/// GET_VRING_BASE ends the use of the kick eventfd.
fn the_kick_eventfd_of_a_stopped_ring_is_closed(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let running = target.start();
    let mut scene = Scene::new(&running);
    for _ in 0..5 {
        let (reader, writer) = pipe().unwrap();
        let reader = OwnedFd::from(reader);
        assert!(scene.start(FrontendReq::SET_VRING_KICK, reader.as_fd()));
        drop(reader);
        scene.stop();
        assert!(is_closed(writer), "the kick of a stopped ring");
        scene.queue.reset();
    }
}

/// Sets the limit of open files of a program, and returns the previous one.
fn set_file_limit(program: &Program, limit: u64) -> u64 {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let id = Pid::from_raw(program.id() as i32);
    let current = Some(limit);
    let old = prlimit(id, Resource::Nofile, Rlimit { current, maximum });
    old.unwrap().current.unwrap()
}

/// Lets a program open only `room` more files. Returns the previous limit.
fn leave_room(program: &Program, room: usize) -> u64 {
    let numbers = fs::read_dir(format!("/proc/{}/fd", program.id())).unwrap();
    let open: HashSet<u64> = numbers
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    let mut free = (0..).filter(|number| !open.contains(number));
    set_file_limit(program, free.nth(room).unwrap())
}

/// The kernel drops files that a process has no room for (MSG_CTRUNC). A message without all its files cannot be trusted.
fn a_message_whose_files_are_lost_ends_its_connection(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let running = target.start();
    for (room, count) in [(1, 2), (0, 1), (3, 250)] {
        let peer = Peer::new(&running);
        peer.assert_alive();
        let limit = leave_room(&running.program, room);
        let file = an_eventfd(0);
        peer.connection
            .send(
                FrontendReq::SET_VRING_CALL,
                VERSION | NEED_REPLY,
                &payload::u64(0),
                &vec![file.as_fd(); count],
            )
            .unwrap();
        assert!(
            peer.connection.closed(PATIENCE),
            "{count} files where there is room for {room}"
        );
        set_file_limit(&running.program, limit);
        Peer::new(&running).assert_alive();
    }
}

/// A process that cannot open more files can serve nobody, but neither ends nor loops.
fn a_back_end_without_room_for_a_connection_waits(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let mut running = target.start();
    let limit = leave_room(&running.program, 0);
    let mut socket = UnixStream::connect(&running.socket).unwrap();
    assert_idle(&running.program, "a connection that cannot be accepted");
    set_file_limit(&running.program, limit);
    let header = vhost_device_tests::front_end::connection::message;
    socket
        .write_all(&header(FrontendReq::GET_FEATURES, VERSION, &[]))
        .unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.read_exact(&mut [0; 20]).unwrap();
    drop(socket);
    // A ring needs more files than a connection.
    let scene = Scene::new(&running);
    let limit = leave_room(&running.program, 4);
    let _ = ring_start(&scene.peer, &scene.memory, &scene.queue)
        .into_iter()
        .all(|message| {
            let answer = scene.peer.connection.acknowledged(
                message.request,
                &message.payload,
                &message.fds(),
            );
            answer.is_ok()
        });
    set_file_limit(&running.program, limit);
    drop(scene);
    let mut scene = Scene::new(&running);
    scene.start_well();
    scene.carry_out(target, "after there was no room for files");
    assert!(running.program.status().unwrap().is_none());
}

crate::for_each_target![
    a_kick_of_any_kind_costs_nothing_while_there_is_nothing_to_do,
    a_call_that_fails_does_no_harm,
    a_call_may_be_a_socket_or_a_pipe,
    a_socket_or_pipe_that_is_not_read_keeps_no_ring_from_working,
    a_blocking_call_eventfd_does_not_keep_a_ring_from_stopping,
    a_blocking_err_eventfd_delays_no_message,
    a_replaced_kick_eventfd_is_closed,
    the_kick_eventfd_of_a_stopped_ring_is_closed,
    a_message_whose_files_are_lost_ends_its_connection,
    a_back_end_without_room_for_a_connection_waits,
];
