// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients that try to exhaust a back-end: many at once, silent, with endless messages, or with repeated settings. One is served
//! at a time, for as long as it stays: VMMs connect long before they send anything. But none costs more than its connection, and the process can
//! be ended whatever its client does.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::RawConnection;
use vhost_device_tests::front_end::connection::{NEED_REPLY, VERSION, header, message, payload};
use vhost_device_tests::front_end::memory::Region;
use vhost_device_tests::process::Signal;
use vhost_device_tests::target::{Claim, Request, Target, assert_works, claims};

use crate::{Message, PATIENCE, Peer, ring_start, start};

/// Time limit for ending an idle program.
const END: Duration = Duration::from_secs(2);

fn silent_clients_use_no_resources(target: &dyn Target) {
    const CLIENTS: usize = 60;
    const TIME: Duration = Duration::from_millis(300);
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let mut running = target.start();
    let idle = running.program.resources().unwrap();
    let silent: Vec<_> = (0..CLIENTS)
        .map(|_| RawConnection::connect(&running.socket).unwrap())
        .collect();
    let before = running.program.processor_time().unwrap();
    thread::sleep(TIME);
    let used = running.program.processor_time().unwrap() - before;
    assert!(used < TIME / 3, "{used:?} of processor time in {TIME:?}");
    let held = running.program.resources().unwrap();
    assert!(
        held.files <= idle.files + 1 && held.threads == idle.threads,
        "{idle:?} became {held:?}"
    );
    drop(silent);
    Peer::new(&running);
    running.program.wait_for_resources(idle).unwrap();
}

/// The program ends on a signal, although its client stays and sends nothing, or is in the middle of a message.
fn a_client_that_never_ends_its_message_does_not_keep_the_program(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let memory = header(FrontendReq::SET_MEM_TABLE, VERSION, 4000);
    for (what, bytes) in [
        ("nothing", Vec::new()),
        ("a byte of a header", memory[..1].to_vec()),
        ("a header", memory.to_vec()),
        ("half a payload", [&memory[..], &[0; 2000]].concat()),
    ] {
        let mut running = target.start();
        let connection = RawConnection::connect(&running.socket).unwrap();
        let idle = running.program.resources().unwrap();
        // One by one: the program waits again for each.
        for byte in bytes {
            connection.send_bytes(&[byte], &[]).unwrap();
        }
        crate::wait_until_read(&connection);
        let held = running.program.resources().unwrap();
        assert!(held.files <= idle.files + 1, "{idle:?} became {held:?}");
        let start = Instant::now();
        let status = running.program.end(Signal::TERM, PATIENCE).unwrap();
        assert_eq!(status.code(), Some(0), "after {what}");
        assert!(start.elapsed() < END, "after {what} it did not end in time");
    }
}

/// Hundreds of connections at once, each with another activity. None of them blocks the next one.
fn a_storm_of_connections_leaves_no_resources_behind(target: &dyn Target) {
    const THREADS: u64 = 4;
    const CONNECTIONS: usize = 100;
    let running = target.start();
    let visit = |random: &mut Rng| {
        let socket = UnixStream::connect(&running.socket)?;
        let connection = RawConnection::from_stream(socket).unwrap();
        let region = Region::new(0, 4096);
        let fd = region.file().as_fd();
        let _ = match random.u8(0..5) {
            0 => Ok(()),
            1 => connection.send_bytes(&[1, 0, 0], &vec![fd; random.usize(0..20)]),
            2 => {
                let payload = payload::memory_table(&[region.info()]);
                connection.send(FrontendReq::SET_MEM_TABLE, VERSION, &payload, &[fd])
            }
            3 => (0..5).try_for_each(|_| {
                connection.send(FrontendReq::GET_FEATURES, VERSION | NEED_REPLY, &[], &[])
            }),
            _ => connection.send(FrontendReq::SET_VRING_CALL, VERSION, &[9; 8], &[fd]),
        };
        std::io::Result::Ok(())
    };
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    thread::scope(|scope| {
        for number in 0..THREADS {
            let visit = &visit;
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed + number);
                for _ in 0..CONNECTIONS {
                    visit(&mut random).unwrap();
                }
            });
        }
    });
    let front_end = running.connect();
    let mut queue = front_end.queue(0, 16).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// Returns all messages that can be repeated.
fn settings(peer: &Peer, memory: &Region, files: &[BorrowedFd<'_>; 2]) -> Vec<Message> {
    let mut settings = vec![
        Message::new("", FrontendReq::SET_OWNER, Vec::new()),
        Message::new("", FrontendReq::SET_FEATURES, payload::u64(peer.features)),
        Message::new(
            "",
            FrontendReq::SET_MEM_TABLE,
            payload::memory_table(&[memory.info()]),
        )
        .with(memory.file().try_clone().unwrap()),
        Message::new("", FrontendReq::SET_VRING_NUM, payload::vring_state(0, 64)),
        Message::new("", FrontendReq::SET_VRING_BASE, payload::vring_state(0, 7)),
        // A ring that cannot start, without memory.
        Message::new(
            "",
            FrontendReq::SET_VRING_ADDR,
            payload::vring_addresses(0, 0, 16, 16, 16, 0),
        ),
        Message::new(
            "",
            FrontendReq::SET_VRING_ENABLE,
            payload::vring_state(0, 1),
        ),
    ];
    let eventfd = files[0];
    for request in [
        FrontendReq::SET_VRING_KICK,
        FrontendReq::SET_VRING_CALL,
        FrontendReq::SET_VRING_ERR,
    ] {
        for queue in 0..peer.queues {
            let message = Message::new("", request, payload::u64(queue.into()));
            settings.push(message.with(eventfd.try_clone_to_owned().unwrap()));
        }
    }
    let mut optional = |feature, message| {
        if peer.protocol_features.contains(feature) {
            settings.push(message);
        }
    };
    optional(
        ProtocolFeatures::STATUS,
        Message::new("", FrontendReq::SET_STATUS, payload::u64(15)),
    );
    optional(
        ProtocolFeatures::BACKEND_REQ,
        Message::new("", FrontendReq::SET_BACKEND_REQ_FD, Vec::new())
            .with(files[1].try_clone_to_owned().unwrap()),
    );
    optional(
        ProtocolFeatures::CONFIG,
        Message::new(
            "",
            FrontendReq::SET_CONFIG,
            payload::config(0, 0, &[0; 200]),
        ),
    );
    let mut inflight = [4096u64, 0].map(u64::to_ne_bytes).concat();
    let log = inflight.clone();
    inflight.extend([1u16, 64].map(u16::to_ne_bytes).concat());
    let file = || memory.file().try_clone().unwrap();
    for (feature, request, payload) in [
        (
            ProtocolFeatures::INFLIGHT_SHMFD,
            FrontendReq::GET_INFLIGHT_FD,
            &inflight,
        ),
        (
            ProtocolFeatures::INFLIGHT_SHMFD,
            FrontendReq::SET_INFLIGHT_FD,
            &inflight,
        ),
        (ProtocolFeatures::LOG_SHMFD, FrontendReq::SET_LOG_BASE, &log),
    ] {
        let message = Message::new("", request, payload.clone());
        optional(feature, message.with(file()));
    }
    let info = {
        let mut info = memory.info();
        info.guest_phys_addr = 1 << 40;
        info.userspace_addr = 1 << 40;
        info
    };
    for request in [FrontendReq::ADD_MEM_REG, FrontendReq::REM_MEM_REG] {
        let message = Message::new("", request, payload::single_region(&info));
        optional(ProtocolFeatures::CONFIGURE_MEM_SLOTS, message.with(file()));
    }
    settings
}

/// A setting replaces the previous one, whether that was usable or not (CVE-2019-14818, CVE-2020-10726).
fn repeated_settings_leave_no_resources_behind(target: &dyn Target) {
    const ROUNDS: usize = 300;
    const WARM_UP: usize = 50;
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let (running, peer) = start(target);
    let memory = Region::new(0, 1 << 16);
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let settings = settings(&peer, &memory, &[eventfd.as_fd(), theirs.as_fd()]);
    let mut before = None;
    for round in 0..ROUNDS {
        for setting in &settings {
            let flags = VERSION | NEED_REPLY;
            peer.connection
                .send(setting.request, flags, &setting.payload, &setting.fds())
                .unwrap();
            drop(peer.connection.receive().unwrap());
        }
        if round == WARM_UP {
            let bytes = running.program.anonymous_bytes().unwrap();
            before = Some((running.program.resources().unwrap(), bytes));
        }
    }
    let (held, bytes) = before.unwrap();
    assert_eq!(running.program.resources().unwrap(), held);
    let grown = running.program.anonymous_growth(bytes).unwrap();
    let left = ROUNDS - WARM_UP;
    assert!(grown < 256 << 10, "{left} rounds left {grown} bytes");
}

/// The same with a ring that is started and stopped.
fn restarted_rings_leave_no_resources_behind(target: &dyn Target) {
    const ROUNDS: usize = 150;
    const WARM_UP: usize = 50;
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let (mut running, peer) = start(target);
    let memory = vhost_device_tests::front_end::GuestMemory::new(&[(0, 1 << 20)]);
    let options = peer.queue_options(16);
    let mut queue = vhost_device_tests::front_end::Queue::new(&memory, options);
    let mut request = Request::new(target, &memory);
    let mut before = None;
    for round in 0..ROUNDS {
        peer.start_ring(&memory, &queue);
        for message in ring_start(&peer, &memory, &queue) {
            // The same again while it runs.
            peer.deliver(&message);
        }
        request.run(&mut queue, 1);
        peer.stop(0);
        peer.done(FrontendReq::RESET_DEVICE, &[], &[]);
        queue.reset();
        if round == WARM_UP {
            let bytes = running.program.anonymous_bytes().unwrap();
            before = Some((running.program.resources().unwrap(), bytes));
        }
    }
    let (held, bytes) = before.unwrap();
    running.program.wait_for_resources(held).unwrap();
    let grown = running.program.anonymous_growth(bytes).unwrap();
    assert!(grown < 1 << 20, "rings left {grown} bytes");
}

/// Endless messages whose replies are not read: they use no more than the buffers of the socket.
fn a_flood_of_messages_is_bounded_by_the_socket(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let running = target.start();
    let before = running.program.anonymous_bytes().unwrap();
    for (request, payload) in [
        (FrontendReq::GET_FEATURES, Vec::new()),
        (FrontendReq::GET_CONFIG, payload::config(0, 0, &[0; 256])),
        (FrontendReq::GET_INFLIGHT_FD, {
            let mut wanted = [0u64; 2].map(u64::to_ne_bytes).concat();
            wanted.extend([1u16, 256].map(u16::to_ne_bytes).concat());
            wanted
        }),
    ] {
        let mut connection = RawConnection::connect(&running.socket).unwrap();
        connection.set_timeout(Duration::from_millis(50)).unwrap();
        let bytes = message(request, VERSION | NEED_REPLY, &payload).repeat(100);
        while connection.send_bytes(&bytes, &[]).is_ok() {}
        let grown = running.program.anonymous_growth(before).unwrap();
        assert!(
            grown < 1 << 20,
            "{request:?} without end takes {grown} bytes"
        );
    }
    Peer::new(&running).assert_alive();
}

crate::for_each_target![
    silent_clients_use_no_resources,
    a_client_that_never_ends_its_message_does_not_keep_the_program,
    a_storm_of_connections_leaves_no_resources_behind,
    repeated_settings_leave_no_resources_behind,
    restarted_rings_leave_no_resources_behind,
    a_flood_of_messages_is_bounded_by_the_socket,
];
