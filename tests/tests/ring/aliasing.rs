// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Overlapping memory: what is read is also written, parts of a ring overlap, and buffers are inside the ring. The
//! guest gets a valid answer, garbage, or a broken ring, and nobody else notices.

use std::time::{Duration, Instant};

use vhost_device_tests::front_end::descriptor::NEXT;
use vhost_device_tests::front_end::queue::Layout;
use vhost_device_tests::front_end::{Buffer, Queue};
use vhost_device_tests::target::{Request, Running, Target, assert_works};

use crate::corrupt::{SIZE, Scene, descriptor};
use crate::{Mode, PATIENCE, usual};

/// How long to wait before the others are checked.
const MOMENT: Duration = Duration::from_millis(5);

/// The response over the command, completely and partly: either the command is read before the response is written, or at least
/// nothing else suffers.
fn a_request_may_overlap_its_response(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let (front_end, mut queue) = mode.start(&running, SIZE, 0);
        let memory = front_end.memory();
        let mut request = Request::new(target, memory);
        let room = request.writable().length;
        let area = memory.allocate(u64::from(4 * room), 16);
        for shift in [0, 1, 3, 8, 15, 16, u64::from(room) - 1] {
            for starts_before in [false, true] {
                let [mut readable, mut writable] = request.write(3);
                let bytes = memory.read_vec(readable.address, readable.length as usize);
                readable.address = area + if starts_before { shift } else { 0 };
                writable.address = area + if starts_before { 0 } else { shift };
                memory.write(readable.address, &bytes);
                queue.submit(&[readable, writable]);
                let what = format!("shifted by {shift}, the answer first: {starts_before}");
                assert!(queue.wait_used(PATIENCE), "{what}");
                let used = queue.take_used().unwrap();
                assert!(used.length <= room, "{what}: {used:?}");
                // Only in one case is the last byte part of the command.
                if shift + u64::from(readable.length) < u64::from(room) {
                    let last = memory.read_u8(writable.address + u64::from(room) - 1);
                    assert!(!target.has_failed(used, last), "{what}: {used:?}");
                }
            }
        }
        // All pieces of the answer in one place.
        let [readable, writable] = request.write(4);
        let piece = writable.length / 3;
        let mut chain = vec![readable];
        for piece in writable.split(&[piece; 2]) {
            let address = area;
            chain.push(Buffer { address, ..piece });
        }
        queue.submit(&chain[..]);
        let used = queue.take_used_within(PATIENCE);
        assert_eq!(used.length, room, "pieces of an answer in one place");
        assert_works(target, memory, &mut queue);
        assert!(!queue.wait_error(Duration::ZERO));
    }
}

/// Waits for the reaction of a device: ERR, a used request, or nothing.
fn settle(queue: &Queue) {
    let end = Instant::now() + MOMENT;
    while Instant::now() < end && !queue.wait_error(Duration::from_millis(1)) {}
}

/// The device writes its answers over its own ring.
fn buffers_inside_the_ring_harm_only_that_ring(target: &dyn Target) {
    let running = target.start();
    usual(target).for_each(|mode| write_to_the_ring_itself(target, &running, mode));
}

fn write_to_the_ring_itself(target: &dyn Target, running: &Running, mode: Mode) {
    let mut scene = Scene::new(target, running, mode);
    let memory = scene.front_end.memory().clone();
    let Layout {
        descriptors,
        avail,
        used,
    } = *scene.victim.layout();
    let mut request = Request::new(target, &memory);
    for (what, place) in [
        ("the descriptors", descriptors),
        ("its own descriptor", descriptors + 16),
        ("the available ring", avail),
        ("the available index", avail + 2),
        ("the used ring", used),
        ("the used index", used + 2),
        ("a used entry", used + 4),
    ] {
        for reads_it_too in [false, true] {
            let [mut readable, mut writable] = request.write(1);
            writable.address = place;
            if reads_it_too {
                readable.address = place;
            }
            let chain = [descriptor(readable, NEXT, 1), descriptor(writable, 0, 0)];
            for (index, descriptor) in (0..).zip(chain) {
                match mode.packed {
                    true => {
                        let ring = scene.victim.packed();
                        let flags = descriptor.flags | ring.next_available().available();
                        ring.set_descriptor(index, descriptor, 0, flags);
                        scene.victim.kick_anyway();
                    }
                    false => scene.victim.split().set_descriptor(index, descriptor),
                }
            }
            for _ in 0..if mode.packed { 0 } else { 4 } {
                scene.victim.publish_raw(0);
            }
            settle(&scene.victim);
            scene.assert_others_live(target, what);
            scene.assert_restarts(target, what);
        }
    }
}

/// Overlapping parts of a ring, and of two rings.
fn overlapping_rings_harm_no_other_ring(target: &dyn Target) {
    let running = target.start();
    usual(target).for_each(|mode| lay_on_one_another(target, &running, mode));
}

fn lay_on_one_another(target: &dyn Target, running: &Running, mode: Mode) {
    let options = mode.options(SIZE, 0);
    let mut scene = Scene::new(target, running, mode);
    let memory = scene.front_end.memory().clone();
    let good = *scene.victim.layout();
    let area = memory.allocate(1 << 16, 4096);
    let layouts = [
        ("all parts in one place", [area; 3]),
        ("used on descriptors", [area, area + 4096, area]),
        ("available on descriptors", [area, area, area + 4096]),
        ("used on available", [area, area + 4096, area + 4096]),
        (
            "used on the end of descriptors",
            [area, area + 4096, area + 16 * u64::from(SIZE) - 16],
        ),
        (
            "used on the entries of available",
            [area, area + 4096, area + 4100],
        ),
        (
            "the ring that it was",
            [good.descriptors, good.used, good.avail],
        ),
    ];
    let mut request = Request::new(target, &memory);
    for (what, [descriptors, avail, used]) in layouts {
        scene.front_end.stop(0).unwrap();
        let layout = Layout {
            descriptors,
            avail,
            used,
        };
        let mut ring = Queue::at(&memory, options, layout);
        for filled in [0, 0xff] {
            memory.fill(area, 1 << 14, filled);
            // The front-end does not check the contents of the ring.
            scene.front_end.start(0, &ring, options.start()).unwrap();
            let _ = ring.add(&request.write(1));
            for index in 1..=4 {
                match mode.packed {
                    true => {
                        let [readable, _] = request.write(1);
                        let flags = ring.packed().next_available().available();
                        ring.packed().set_descriptor(
                            index,
                            descriptor(readable, 0, 0),
                            index,
                            flags,
                        );
                        ring.publish();
                    }
                    false => ring.split().set_avail_index(index),
                }
                ring.kick_anyway();
                settle(&ring);
            }
            scene.assert_others_live(target, what);
            scene.front_end.stop(0).unwrap();
            ring.reset();
        }
        scene.victim = Queue::at(&memory, options, good);
        scene.start_victim();
        scene.assert_restarts(target, what);
    }
}

crate::for_each_target![
    Claim::BrokenRing =>
    a_request_may_overlap_its_response,
    buffers_inside_the_ring_harm_only_that_ring,
    overlapping_rings_harm_no_other_ring,
];
