// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the device, transferred to another process (DEVICE_STATE).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::fcntl_setpipe_size;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::{VERSION, message};
use vhost_device_tests::front_end::state::{BEGUN, HEADER_SIZE, LOAD, SAVE, pipe, sealed};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::target::{Request, Running, Target, assert_works};

use crate::{PATIENCE, Peer, start};

/// Time limit of CHECK_DEVICE_STATE, which blocks the front-end.
const LONGEST_CHECK: Duration = Duration::from_secs(9);

fn has_state(target: &dyn Target) -> bool {
    Peer::new(&target.start()).has(ProtocolFeatures::DEVICE_STATE, target)
}

/// Starts a target with a peer, unless it has no state.
fn start_with_state(target: &dyn Target) -> Option<(Running, Peer)> {
    has_state(target).then(|| start(target))
}

/// Creates a full pipe.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = pipe();
    let size = fcntl_setpipe_size(&write, 4096).unwrap();
    let written = rustix::io::write(&write, &vec![0xee; size]).unwrap();
    assert_eq!(written, size);
    (read, write)
}

/// Panics unless the read end of `file`, a pipe, is closed within the time limit.
fn assert_closed(file: &OwnedFd) {
    let mut fds = [PollFd::new(file, PollFlags::empty())];
    let limit = PATIENCE.try_into().unwrap();
    assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "it is still open");
}

/// Runs a request on a queue that starts at `base`. Returns the base at which it stops.
fn carry_out(target: &dyn Target, front_end: &FrontEnd, base: u16) -> u16 {
    let mut options = front_end.queue_options(16);
    options.base = base;
    let mut queue = front_end.queue_with(0, options).unwrap();
    let mut request = Request::new(target, front_end.memory());
    request.run(&mut queue, 1);
    front_end.stop(0).unwrap() as u16
}

fn a_device_continues_in_another_process(target: &dyn Target) {
    if !has_state(target) {
        return;
    }
    let (here, there) = (target.start(), target.start());
    let options = Options::default();
    let source = FrontEnd::connect(&here.socket, &options).unwrap();
    let base = carry_out(target, &source, 0);
    let state = source.save_state().unwrap();
    // The saved device continues as well.
    let base = carry_out(target, &source, base);
    let state_of_more = source.save_state().unwrap();

    let destination = FrontEnd::connect(&there.socket, &options).unwrap();
    destination.load_state(&state).unwrap();
    destination.load_state(&state_of_more).unwrap();
    let base = carry_out(target, &destination, base);
    // Back to the source, on an existing connection.
    let state = destination.save_state().unwrap();
    source.load_state(&state).unwrap();
    carry_out(target, &source, base);
}

fn a_transfer_is_refused_while_a_ring_runs(target: &dyn Target) {
    if !has_state(target) {
        return;
    }
    let running = target.start();
    let front_end = running.connect();
    let mut queue = front_end.queue(0, 16).unwrap();
    let raw = front_end.raw().unwrap();
    let (read, write) = pipe();
    assert_eq!(
        raw.set_device_state(SAVE, 0, write.as_fd()).unwrap(),
        BEGUN | 1
    );
    assert_eq!(
        raw.set_device_state(LOAD, 0, read.as_fd()).unwrap(),
        BEGUN | 1
    );
    assert_ne!(raw.check_device_state().unwrap(), 0);
    assert_works(target, front_end.memory(), &mut queue);
}

fn a_malformed_request_for_a_transfer_is_refused(target: &dyn Target) {
    let Some((mut running, peer)) = start_with_state(target) else {
        return;
    };
    let before = running.program.resources().unwrap();
    let (read, write) = pipe();
    let request = FrontendReq::SET_DEVICE_STATE_FD;
    for (direction, phase) in [(2, 0), (u32::MAX, 0), (SAVE, 1), (LOAD, u32::MAX)] {
        let answer = peer
            .connection
            .set_device_state(direction, phase, write.as_fd());
        assert_eq!(answer.unwrap(), BEGUN | 1, "{direction} {phase}");
    }
    for (payload, files) in [
        (vec![0; 8], vec![]),
        (vec![0; 7], vec![write.as_fd()]),
        (vec![0; 9], vec![write.as_fd()]),
        (vec![], vec![read.as_fd(), write.as_fd()]),
    ] {
        let reply = peer.connection.ask(request, &payload, &files).unwrap();
        assert_eq!((reply.u64(), reply.fds.len()), (BEGUN | 1, 0));
    }
    assert_ne!(peer.connection.check_device_state().unwrap(), 0);
    running.program.wait_for_resources(before).unwrap();
}

fn a_check_reports_the_last_transfer(target: &dyn Target) {
    let Some((_running, peer)) = start_with_state(target) else {
        return;
    };
    let connection = &peer.connection;
    assert_ne!(connection.check_device_state().unwrap(), 0, "there is none");
    let state = connection.saved();
    assert_eq!(connection.check_device_state().unwrap(), 0);
    assert!(!connection.loads(&state[..20]));
    assert_ne!(connection.check_device_state().unwrap(), 0);
    assert!(connection.loads(&state));
    assert_eq!(connection.check_device_state().unwrap(), 0);
    connection
        .send(FrontendReq::RESET_DEVICE, VERSION, &[], &[])
        .unwrap();
    assert_ne!(connection.check_device_state().unwrap(), 0, "after a reset");
}

fn an_incomplete_or_foreign_state_is_refused(target: &dyn Target) {
    let Some((mut running, peer)) = start_with_state(target) else {
        return;
    };
    let before = running.program.resources().unwrap();
    let state = peer.connection.saved();
    let (header, part) = state.split_at(HEADER_SIZE);
    let device = String::from_utf8(header[12..28].to_vec()).unwrap();
    let device = device.trim_end_matches('\0');
    let version = u32::from_le_bytes(header[28..32].try_into().unwrap());
    assert!(sealed(device, version, part) == state, "the format");

    for length in 0..state.len() {
        let is_loaded = peer.connection.loads(&state[..length]);
        assert!(!is_loaded, "{length} bytes of {}", state.len());
    }
    let longer = [part, &[0]].concat();
    let others = ["", "gp", "gpuu", "scsi", "\u{fffd}"];
    let others = others.iter().filter(|other| **other != device);
    let mut wrong: Vec<_> = others.map(|other| sealed(other, version, part)).collect();
    wrong.extend([
        [state.as_slice(), &[0]].concat(),
        sealed(device, version, &longer),
        sealed(device, version + 1, part),
        sealed(device, u32::MAX, part),
        sealed(device, version, &vec![0xff; 1000]),
        vec![0; 100],
        vec![0xff; 100_000],
    ]);
    for wrong in &wrong {
        assert!(!peer.connection.loads(wrong), "{wrong:02x?}");
    }
    assert!(peer.connection.loads(&state));
    running.program.wait_for_resources(before).unwrap();
    let log = running.program.stderr();
    assert!(
        log.contains("the state of the device was not loaded"),
        "{log}"
    );
}

fn any_change_of_a_state_is_detected_and_no_content_does_harm(target: &dyn Target) {
    let Some((mut running, peer)) = start_with_state(target) else {
        return;
    };
    let before = running.program.resources().unwrap();
    let state = peer.connection.saved();
    let config = Config {
        cases: 200,
        failure_persistence: None,
        ..Config::default()
    };
    let changes = prop::collection::vec((0..state.len(), 1u8..), 1..8);
    let mut runner = TestRunner::new(config.clone());
    let unseen = runner.run(&changes, |changes| {
        let mut changed = state.clone();
        for (place, change) in changes {
            changed[place] ^= change;
        }
        prop_assume!(changed != state);
        prop_assert!(!peer.connection.loads(&changed));
        Ok(())
    });
    unseen.unwrap();

    // With a valid checksum, the device parses the contents.
    let (header, part) = state.split_at(HEADER_SIZE);
    let device = String::from_utf8(header[12..28].to_vec()).unwrap();
    let device = device.trim_end_matches('\0');
    let version = u32::from_le_bytes(header[28..32].try_into().unwrap());
    let contents = (
        prop::collection::vec((0..part.len().max(1), any::<u8>()), 0..4),
        prop::collection::vec(any::<u8>(), 0..64),
        any::<bool>(),
    );
    let mut runner = TestRunner::new(config);
    let harm = runner.run(&contents, |(changes, more, from_scratch)| {
        let mut part = if from_scratch {
            Vec::new()
        } else {
            part.to_vec()
        };
        for (place, byte) in changes {
            if let Some(to) = part.get_mut(place) {
                *to = byte;
            }
        }
        if from_scratch {
            part.extend(more);
        }
        peer.connection.loads(&sealed(device, version, &part));
        peer.assert_alive();
        Ok(())
    });
    harm.unwrap();
    assert!(peer.connection.loads(&state));
    running.program.wait_for_resources(before).unwrap();
}

fn an_endless_state_is_cut_off(target: &dyn Target) {
    let Some((_running, peer)) = start_with_state(target) else {
        return;
    };
    let state = peer.connection.saved();
    let mut endless = state.clone();
    // The length: more than any device accepts.
    endless[32..40].fill(0x7f);
    for beginning in [vec![0], endless, state] {
        let (theirs, ours) = pipe();
        let answer = peer.connection.set_device_state(LOAD, 0, theirs.as_fd());
        assert_eq!(answer.unwrap(), BEGUN);
        drop(theirs);
        let mut ours = File::from(ours);
        let mut outcome = ours.write_all(&beginning);
        let deadline = Instant::now() + PATIENCE;
        while outcome.is_ok() {
            assert!(Instant::now() < deadline, "it continues reading");
            outcome = ours.write_all(&[0; 4096]);
        }
        assert_ne!(peer.connection.check_device_state().unwrap(), 0);
    }
}

/// A transfer that cannot continue: the other end of its file, and what keeps that end open.
type Stuck = (OwnedFd, Option<OwnedFd>);

/// Starts a transfer to a reader that never reads, or from a writer that never closes.
fn stuck(peer: &Peer) -> [Box<dyn Fn() -> Stuck + '_>; 2] {
    let state = peer.connection.saved();
    let save = || {
        let (read, write) = full_pipe();
        let answer = peer.connection.set_device_state(SAVE, 0, write.as_fd());
        assert_eq!(answer.unwrap(), BEGUN);
        (read, None)
    };
    let load = move || {
        let (read, write) = pipe();
        let answer = peer.connection.set_device_state(LOAD, 0, read.as_fd());
        assert_eq!(answer.unwrap(), BEGUN);
        rustix::io::write(&write, &state).unwrap();
        (write, Some(read))
    };
    [Box::new(save), Box::new(load)]
}

fn messages_are_served_during_a_stuck_transfer(target: &dyn Target) {
    let Some((_running, peer)) = start_with_state(target) else {
        return;
    };
    for begin in stuck(&peer) {
        let _stuck = begin();
        for _ in 0..100 {
            peer.assert_alive();
        }
        // In pieces, too.
        let message = message(FrontendReq::GET_FEATURES, VERSION, &[]);
        let (one, two) = message.split_at(5);
        peer.connection.send_bytes(one, &[]).unwrap();
        crate::wait_until_read(&peer.connection);
        peer.connection.send_bytes(two, &[]).unwrap();
        assert_eq!(peer.connection.receive().unwrap().u64(), peer.offered);
    }
}

fn a_check_of_a_stuck_transfer_times_out(target: &dyn Target) {
    let Some((mut running, peer)) = start_with_state(target) else {
        return;
    };
    let before = running.program.resources().unwrap();
    for begin in stuck(&peer) {
        let begun = Instant::now();
        let _stuck = begin();
        assert_ne!(peer.connection.check_device_state().unwrap(), 0);
        assert!(begun.elapsed() < LONGEST_CHECK, "{:?}", begun.elapsed());
        running.program.wait_for_resources(before).unwrap();
    }
    peer.assert_alive();
}

fn a_check_waits_for_a_slow_peer(target: &dyn Target) {
    let Some((_running, peer)) = start_with_state(target) else {
        return;
    };
    let state = peer.connection.saved();
    let (theirs, ours) = pipe();
    let answer = peer.connection.set_device_state(LOAD, 0, theirs.as_fd());
    assert_eq!(answer.unwrap(), BEGUN);
    drop(theirs);
    let request = FrontendReq::CHECK_DEVICE_STATE;
    peer.connection.send(request, VERSION, &[], &[]).unwrap();
    // Later messages are answered after it.
    let next = FrontendReq::GET_FEATURES;
    peer.connection.send(next, VERSION, &[], &[]).unwrap();
    let mut ours = File::from(ours);
    for byte in state {
        ours.write_all(&[byte]).unwrap();
        std::thread::yield_now();
    }
    drop(ours);
    let reply = peer.connection.receive().unwrap();
    assert_eq!((reply.request, reply.u64()), (request.into(), 0));
    assert_eq!(peer.connection.receive().unwrap().u64(), peer.offered);
}

fn a_reader_that_closes_early_ends_a_transfer(target: &dyn Target) {
    let Some((_running, peer)) = start_with_state(target) else {
        return;
    };
    let (read, write) = full_pipe();
    let answer = peer.connection.set_device_state(SAVE, 0, write.as_fd());
    assert_eq!(answer.unwrap(), BEGUN);
    drop(write);
    let mut read = File::from(read);
    read.read_exact(&mut [0; 100]).unwrap();
    drop(read);
    let begun = Instant::now();
    assert_ne!(peer.connection.check_device_state().unwrap(), 0);
    assert!(begun.elapsed() < LONGEST_CHECK / 2, "{:?}", begun.elapsed());
}

fn a_file_for_the_other_direction_fails(target: &dyn Target) {
    let Some((_running, peer)) = start_with_state(target) else {
        return;
    };
    let (read, write) = pipe();
    let directory = File::open("/").unwrap();
    for (direction, file) in [
        (SAVE, read.as_fd()),
        (LOAD, write.as_fd()),
        (SAVE, directory.as_fd()),
        (LOAD, directory.as_fd()),
    ] {
        if peer
            .connection
            .set_device_state(direction, 0, file)
            .unwrap()
            == BEGUN
        {
            assert_ne!(peer.connection.check_device_state().unwrap(), 0);
        }
    }
    // A file that never blocks is as good as a pipe.
    let file = tempfile::tempfile().unwrap();
    let save = peer.connection.set_device_state(SAVE, 0, file.as_fd());
    assert_eq!(save.unwrap(), BEGUN);
    assert_eq!(peer.connection.check_device_state().unwrap(), 0);
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
    let load = peer.connection.set_device_state(LOAD, 0, file.as_fd());
    assert_eq!(load.unwrap(), BEGUN);
    assert_eq!(peer.connection.check_device_state().unwrap(), 0);
}

fn another_transfer_ends_the_first(target: &dyn Target) {
    let Some((mut running, peer)) = start_with_state(target) else {
        return;
    };
    let before = running.program.resources().unwrap();
    let state = peer.connection.saved();
    for begin in stuck(&peer) {
        let (ours, keeper) = begin();
        drop(keeper);
        assert!(peer.connection.loads(&state));
        assert_closed(&ours);
    }
    // A refused one does so as well.
    for begin in stuck(&peer) {
        let (ours, keeper) = begin();
        drop(keeper);
        let answer = peer.connection.set_device_state(SAVE, 1, ours.as_fd());
        assert_eq!(answer.unwrap(), BEGUN | 1);
        assert_closed(&ours);
    }
    running.program.wait_for_resources(before).unwrap();
}

fn a_reset_or_a_ring_that_starts_ends_a_transfer(target: &dyn Target) {
    if !has_state(target) {
        return;
    }
    let running = target.start();
    let front_end = running.connect();
    let raw = front_end.raw().unwrap();
    let reset = || {
        raw.send(FrontendReq::RESET_DEVICE, VERSION, &[], &[])
            .unwrap();
    };
    let start_ring = || {
        let _queue = front_end.queue(0, 16).unwrap();
        front_end.stop(0).unwrap();
    };
    let ends: [&dyn Fn(); 2] = [&reset, &start_ring];
    for end in ends {
        let (read, write) = pipe();
        assert_eq!(raw.set_device_state(LOAD, 0, read.as_fd()).unwrap(), BEGUN);
        drop(read);
        end();
        assert_closed(&write);
        assert_ne!(raw.check_device_state().unwrap(), 0);
    }
}

fn a_transfer_of_a_lost_front_end_leaves_no_resources_behind(target: &dyn Target) {
    let Some((mut running, peer)) = start_with_state(target) else {
        return;
    };
    let before = running.program.resources().unwrap();
    drop(peer);
    for waits in [false, true] {
        for index in 0..2 {
            let peer = Peer::new(&running);
            let (ours, keeper) = stuck(&peer)[index]();
            if waits {
                let check = FrontendReq::CHECK_DEVICE_STATE;
                peer.connection.send(check, VERSION, &[], &[]).unwrap();
            }
            drop(peer);
            drop(keeper);
            assert_closed(&ours);
        }
    }
    let peer = Peer::new(&running);
    peer.assert_alive();
    running.program.wait_for_resources(before).unwrap();
}

crate::for_each_target![
    a_device_continues_in_another_process,
    a_transfer_is_refused_while_a_ring_runs,
    a_malformed_request_for_a_transfer_is_refused,
    a_check_reports_the_last_transfer,
    an_incomplete_or_foreign_state_is_refused,
    any_change_of_a_state_is_detected_and_no_content_does_harm,
    an_endless_state_is_cut_off,
    messages_are_served_during_a_stuck_transfer,
    a_check_of_a_stuck_transfer_times_out,
    a_check_waits_for_a_slow_peer,
    a_reader_that_closes_early_ends_a_transfer,
    a_file_for_the_other_direction_fails,
    another_transfer_ends_the_first,
    a_reset_or_a_ring_that_starts_ends_a_transfer,
    a_transfer_of_a_lost_front_end_leaves_no_resources_behind,
];
