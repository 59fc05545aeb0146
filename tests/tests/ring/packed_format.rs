// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Features of packed rings: wrap counters, buffer ids, event suppression structures, and their own forms of corruption.

use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::descriptor::{Descriptor, INDIRECT, NEXT, WRITE};
use vhost_device_tests::front_end::packed::{AVAILABLE, Position, USED};
use vhost_device_tests::front_end::{Buffer, FrontEnd, GuestMemory, Queue};
use vhost_device_tests::target::{Request, Target, assert_works};

use crate::corrupt::{HOLE, SIZE, Scene};
use crate::{Load, Mode, PATIENCE, USUAL, calls, poll_requests, while_repeating};

const PACKED: Mode = Mode {
    packed: true,
    ..USUAL
};

/// Event suppression flags.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESCRIPTOR: u16 = 2;

/// Returns the descriptor of a buffer, without NEXT.
fn descriptor(buffer: Buffer) -> Descriptor {
    Descriptor {
        address: buffer.address,
        length: buffer.length,
        flags: if buffer.writable { WRITE } else { 0 },
        next: 0,
    }
}

/// Writes descriptors with these flags to the start of a new ring, and makes them available, the first one last.
fn write(queue: &Queue, descriptors: &[Descriptor]) {
    for (index, descriptor) in descriptors.iter().enumerate().rev() {
        let flags = descriptor.flags | AVAILABLE;
        queue
            .packed()
            .set_descriptor(index as u16, *descriptor, 7, flags);
    }
}

/// Creates a table in guest memory, in the format of packed rings, of `length` bytes.
fn table(memory: &GuestMemory, descriptors: &[Descriptor], length: usize) -> Descriptor {
    let address = memory.allocate(length.max(16) as u64, 16);
    let bytes: Vec<u8> = descriptors
        .iter()
        .flat_map(|descriptor| {
            let packed = Descriptor {
                flags: 0,
                next: descriptor.flags,
                ..*descriptor
            };
            packed.to_bytes()
        })
        .collect();
    memory.write(address, &bytes[..length.min(bytes.len())]);
    Descriptor {
        address,
        length: length as u32,
        flags: INDIRECT,
        next: 0,
    }
}

fn a_ring_may_have_any_number_of_descriptors(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    for size in [3, 5, 100, 257, 32767] {
        let mut queue = PACKED.queue(&front_end, size, size - 2);
        let most = usize::from(size / 2).min(8);
        Load::new(target, front_end.memory(), &queue, most).run(&mut queue, 300);
        assert_eq!(front_end.stop(0).unwrap(), queue.used_base(), "{size}");
    }
}

/// Chains of different lengths, so that positions and ids are unrelated.
fn chains_of_all_lengths_share_a_ring(target: &dyn Target) {
    let running = target.start();
    let mode = Mode {
        indirect: false,
        ..PACKED
    };
    let (front_end, mut queue) = mode.start(&running, 64, 0);
    let mut requests: Vec<_> = (0..6)
        .map(|_| Request::new(target, front_end.memory()))
        .collect();
    let mut random = Rng::with_seed(5);
    for tag in 0..300 {
        let mut owners = Vec::new();
        for (index, request) in requests.iter_mut().enumerate() {
            let [readable, writable] = request.write(tag);
            let readable = readable.split(&vec![1; random.usize(0..4)]);
            let writable = writable.split(&vec![3; random.usize(0..4)]);
            let id = queue.add(&[readable, writable].concat()).unwrap();
            owners.push((id, index));
        }
        queue.publish();
        queue.kick();
        while !owners.is_empty() {
            assert!(queue.wait_used(PATIENCE), "not answered");
            while let Some(used) = queue.take_used() {
                let place = owners.iter().position(|(id, _)| *id == used.head).unwrap();
                requests[owners.swap_remove(place).1].assert_done(used);
            }
        }
    }
}

fn a_ring_starts_with_the_wrap_counters_of_its_base(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    for base in [0x8000, 0, 5, 0x8005, 15, 0x800f] {
        let options = vhost_device_tests::front_end::QueueOptions {
            base,
            ..PACKED.options(16, 0)
        };
        let mut queue = front_end.queue_with(0, options).unwrap();
        Load::new(target, front_end.memory(), &queue, 4).run(&mut queue, 40);
        assert_eq!(front_end.stop(0).unwrap(), queue.used_base(), "{base:#x}");
    }
}

/// A front-end that does not send a base starts where drivers do.
fn a_ring_starts_with_wrap_counters_of_one(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    assert_eq!(front_end.stop(0).unwrap(), 0x8000_8000);
    let mut queue = Queue::new(front_end.memory(), PACKED.options(16, 0));
    let mut call = front_end.call();
    call.set_vring_num(0, 16).unwrap();
    call.set_vring_addr(0, &front_end.ring_addresses(&queue))
        .unwrap();
    call.set_vring_call(0, queue.call_fd()).unwrap();
    call.set_vring_kick(0, queue.kick_fd()).unwrap();
    call.set_vring_enable(0, true).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// User-Mode Linux sends 0, as for a split ring. No driver starts with wrap counters of 0, but a ring can stop there: after its first round.
fn base_0_is_the_beginning_of_a_ring_that_was_never_used(target: &dyn Target) {
    let running = target.start();
    for is_early in [false, true] {
        let front_end = PACKED.connect(&running);
        let mut queue = Queue::new(front_end.memory(), PACKED.options(8, 0));
        let mut load = Load::new(target, front_end.memory(), &queue, 3);
        if is_early {
            load.fill(&mut queue);
        }
        front_end.start(0, &queue, 0).unwrap();
        load.drain(&mut queue);
        let done = load.sent;
        load.run(&mut queue, 8 - done);
        // Chains are indirect: one descriptor each.
        assert_eq!(front_end.stop(0).unwrap(), 0);
        front_end.start(0, &queue, 0).unwrap();
        load.run(&mut queue, 20);
        assert_eq!(front_end.stop(0).unwrap(), queue.used_base());
    }
}

/// If chains cross the end of the ring, the first descriptor need not be marked used.
fn base_0_is_the_second_round_of_a_ring_whose_chains_lie_across_its_end(target: &dyn Target) {
    let running = target.start();
    let mode = Mode {
        indirect: false,
        ..PACKED
    };
    let (front_end, mut queue) = mode.start(&running, 8, 0);
    let mut request = Request::new(target, front_end.memory());
    let mut run = |queue: &mut Queue, count| {
        for tag in 0..count {
            let [readable, writable] = request.write(tag);
            queue.submit(&[readable.split(&[1]), vec![writable]].concat());
            request.finish(queue);
        }
    };
    // 24 descriptors are three rounds.
    run(&mut queue, 8);
    assert_eq!(front_end.stop(0).unwrap(), 0);
    assert_eq!(queue.used_base(), 0);
    front_end.start(0, &queue, 0).unwrap();
    run(&mut queue, 20);
    assert_eq!(front_end.stop(0).unwrap(), queue.used_base());
}

fn a_base_outside_the_ring_is_refused(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    let mut queue = Queue::new(front_end.memory(), PACKED.options(16, 0));
    for base in [0x8000_8010, 0x8010_8000, 0xffff_ffff, 0x7fff_7fff] {
        assert!(front_end.start(0, &queue, base).is_err(), "{base:#x}");
        front_end.stop(0).unwrap();
    }
    front_end.start(0, &queue, 0x8000_8000).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

fn disabled_events_are_respected(target: &dyn Target) {
    let running = target.start();
    for event_idx in [false, true] {
        let mode = Mode {
            event_idx,
            ..PACKED
        };
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        let mut request = Request::new(target, front_end.memory());
        queue.packed().set_driver_event(0, DISABLE);
        poll_requests(&mut request, &mut queue, 50);
        // An unwanted signal would have come before the expected one.
        queue.packed().set_driver_event(0, ENABLE);
        poll_requests(&mut request, &mut queue, 1);
        assert!(queue.wait_call(PATIENCE), "EVENT_IDX {event_idx}");
        assert_eq!(queue.calls(), 1);
    }
}

fn a_call_comes_for_the_descriptor_of_the_event_and_only_then(target: &dyn Target) {
    const SIZE: u16 = 16;
    let running = target.start();
    let front_end = PACKED.connect(&running);
    // Indirect chains take one descriptor each.
    let mut queue = PACKED.queue(&front_end, SIZE, 0);
    let mut request = Request::new(target, front_end.memory());
    for silent in [0, 1, 5, SIZE - 1, SIZE, 2 * SIZE - 1, 3] {
        let event = queue.packed().next_used().after(silent % SIZE, SIZE);
        let event = Position {
            wrap: event.wrap != (silent >= SIZE),
            ..event
        };
        calls(&queue);
        queue.packed().set_driver_event(event.bits(), DESCRIPTOR);
        poll_requests(&mut request, &mut queue, silent);
        assert_eq!(calls(&queue), 0, "{silent} requests before {event:?}");
        poll_requests(&mut request, &mut queue, 1);
        assert!(queue.wait_call(PATIENCE), "{event:?}");
    }
}

/// Without EVENT_IDX there are no events for single descriptors; a driver that asks for one all the same must not wait forever.
fn invalid_event_suppression_flags_enable_calls(target: &dyn Target) {
    let running = target.start();
    let mode = Mode {
        event_idx: false,
        ..PACKED
    };
    let (front_end, mut queue) = mode.start(&running, 16, 0);
    let mut request = Request::new(target, front_end.memory());
    for flags in [DESCRIPTOR, 3, 0xfffc] {
        calls(&queue);
        queue.packed().set_driver_event(9, flags);
        poll_requests(&mut request, &mut queue, 1);
        assert!(queue.wait_call(PATIENCE), "flags {flags}");
    }
}

/// What a driver writes at the start of its ring, given the two buffers of a valid request.
type Corruption = (
    &'static str,
    fn(&GuestMemory, [Descriptor; 2]) -> Vec<Descriptor>,
);

fn with(descriptor: Descriptor, flags: u16) -> Descriptor {
    Descriptor {
        flags: descriptor.flags | flags,
        ..descriptor
    }
}

const CORRUPTIONS: [Corruption; 11] = [
    ("a chain that does not end", |_, [readable, _]| {
        vec![with(readable, NEXT); SIZE.into()]
    }),
    (
        "a readable descriptor behind a writable one",
        |_, [readable, writable]| vec![with(writable, NEXT), readable],
    ),
    ("a table with a next descriptor", |memory, good| {
        vec![with(table(memory, &good, 32), NEXT), good[1]]
    }),
    ("a table behind another descriptor", |memory, good| {
        vec![with(good[0], NEXT), table(memory, &good, 32)]
    }),
    ("a table of no bytes", |memory, good| {
        vec![table(memory, &good, 0)]
    }),
    ("a table of half a descriptor", |memory, good| {
        vec![table(memory, &good, 8)]
    }),
    ("a table of one and a half descriptors", |memory, good| {
        vec![table(memory, &good, 24)]
    }),
    ("a table in a table", |memory, good| {
        let inner = table(memory, &good[1..], 16);
        vec![table(memory, &[good[0], inner], 32)]
    }),
    (
        "a table of more descriptors than any may have",
        |memory, [readable, _]| vec![table(memory, &vec![readable; 2000], 32000)],
    ),
    ("a table outside guest memory", |memory, good| {
        vec![Descriptor {
            address: HOLE,
            ..table(memory, &good, 32)
        }]
    }),
    (
        "a readable descriptor behind a writable one in a table",
        |memory, [readable, writable]| vec![table(memory, &[writable, readable], 32)],
    ),
];

fn a_corrupt_chain_stops_its_ring(target: &dyn Target) {
    let running = target.start();
    for (what, corrupt) in CORRUPTIONS {
        let mut scene = Scene::new(target, &running, PACKED);
        let memory = scene.front_end.memory().clone();
        let mut request = Request::new(target, &memory);
        let good = request.write(9).map(descriptor);
        write(&scene.victim, &corrupt(&memory, good));
        scene.victim.kick_anyway();
        scene.assert_broken(target, what);
    }
}

fn an_indirect_table_that_was_not_agreed_on_stops_its_ring(target: &dyn Target) {
    let running = target.start();
    let mode = Mode {
        indirect: false,
        ..PACKED
    };
    let mut scene = Scene::new(target, &running, mode);
    let memory = scene.front_end.memory().clone();
    let good = Request::new(target, &memory).write(9).map(descriptor);
    write(&scene.victim, &[table(&memory, &good, 32)]);
    scene.victim.kick_anyway();
    scene.assert_broken(target, "an indirect table");
}

/// Ids are chosen by the driver.
fn any_id_comes_back_as_it_was(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    let mut request = Request::new(target, front_end.memory());
    for id in [0, SIZE, 0x7fff, 0x8000, 0xffff] {
        let queue = PACKED.queue(&front_end, SIZE, 0);
        let [readable, writable] = request.write(1).map(descriptor);
        let ring = queue.packed();
        ring.set_descriptor(1, writable, id, writable.flags | AVAILABLE);
        ring.set_descriptor(0, readable, 0x1234, readable.flags | NEXT | AVAILABLE);
        queue.kick_fd().write(1).unwrap();
        let end = Instant::now() + PATIENCE;
        while !queue.has_used() {
            assert!(Instant::now() < end, "id {id:#x}: not answered");
        }
        assert_eq!(ring.descriptor(0).1, id);
        front_end.stop(0).unwrap();
    }
}

/// Descriptors that are not available, whatever their flags were in the other round.
fn only_the_flags_of_this_round_count(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    for flags in [0, USED, AVAILABLE | USED] {
        let mut queue = PACKED.queue(&front_end, SIZE, 0);
        let mut request = Request::new(target, front_end.memory());
        let [readable, writable] = request.write(1).map(descriptor);
        let ring = queue.packed();
        ring.set_descriptor(1, writable, 0, writable.flags | flags);
        ring.set_descriptor(0, readable, 0, readable.flags | NEXT | flags);
        queue.kick_anyway();
        // Its answer comes after the kick was processed.
        std::thread::sleep(Duration::from_millis(10));
        request.assert_untouched();
        assert_eq!(front_end.stop(0).unwrap(), 0x8000_8000, "{flags:#x}");
    }
}

fn random_rings_do_no_harm(target: &dyn Target) {
    const TIME: Duration = Duration::from_secs(1);
    let running = target.start();
    let mut scene = Scene::new(target, &running, PACKED);
    let memory = scene.front_end.memory().clone();
    let area = memory.regions()[1].guest_address();
    let layout = *scene.victim.layout();
    let mut random = Rng::new();
    println!("seed {}", random.get_seed());
    let scribble = || {
        let flags = random.u16(..) & (AVAILABLE | USED | NEXT | WRITE | INDIRECT);
        let entry = Descriptor {
            address: if random.u8(..) < 8 {
                random.u64(..)
            } else {
                area + random.u64(..1 << 20)
            },
            length: random.u32(..) >> random.u32(0..32),
            flags: random.u16(..),
            next: flags,
        };
        let index = u64::from(random.u16(0..SIZE));
        memory.write(layout.descriptors + index * 16, &entry.to_bytes());
        memory.write_u16(layout.avail, random.u16(..));
        memory.write_u16(layout.avail + 2, random.u16(..4));
    };
    while_repeating(scribble, || {
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            for _ in 0..10 {
                scene.victim.kick_anyway();
            }
            scene.assert_others_live(target, "a changing ring");
            let base = scene.front_end.stop(0).unwrap();
            scene.front_end.start(0, &scene.victim, base).unwrap();
        }
    });
    scene.assert_restarts(target, "a changing ring");
}

/// Addresses without the required alignment.
fn parts_that_are_not_aligned_are_refused(target: &dyn Target) {
    let running = target.start();
    let front_end = PACKED.connect(&running);
    let queue = Queue::new(front_end.memory(), PACKED.options(16, 0));
    let good = front_end.ring_addresses(&queue);
    for (what, part) in [("ring", 0), ("driver's event", 1), ("device's event", 2)] {
        let mut addresses = [
            good.desc_table_addr,
            good.avail_ring_addr,
            good.used_ring_addr,
        ];
        addresses[part] += 2;
        assert!(start_at(&front_end, &queue, addresses).is_err(), "{what}");
        front_end.stop(0).unwrap();
    }
}

fn start_at(
    front_end: &FrontEnd,
    queue: &Queue,
    [descriptors, available, used]: [u64; 3],
) -> Result<(), vhost_device_tests::front_end::Error> {
    let raw = front_end.raw()?;
    let ask = |request, payload: &[u8]| match raw.acknowledged(request, payload, &[])? {
        0 => Ok(()),
        refusal => Err(vhost_device_tests::front_end::Error::Malformed(format!(
            "{refusal} for {request:?}"
        ))),
    };
    let state = |value| payload::vring_state(0, value);
    ask(
        FrontendReq::SET_VRING_NUM,
        &state(queue.options().size.into()),
    )?;
    ask(FrontendReq::SET_VRING_BASE, &state(queue.options().start()))?;
    let addresses = payload::vring_addresses(0, 0, descriptors, used, available, 0);
    ask(FrontendReq::SET_VRING_ADDR, &addresses)?;
    front_end.call().set_vring_kick(0, queue.kick_fd())?;
    Ok(())
}

crate::for_each_target![
    Claim::Packed =>
    a_ring_may_have_any_number_of_descriptors,
    chains_of_all_lengths_share_a_ring,
    a_ring_starts_with_the_wrap_counters_of_its_base,
    a_ring_starts_with_wrap_counters_of_one,
    base_0_is_the_beginning_of_a_ring_that_was_never_used,
    base_0_is_the_second_round_of_a_ring_whose_chains_lie_across_its_end,
    a_base_outside_the_ring_is_refused,
    disabled_events_are_respected,
    a_call_comes_for_the_descriptor_of_the_event_and_only_then,
    invalid_event_suppression_flags_enable_calls,
    a_corrupt_chain_stops_its_ring,
    an_indirect_table_that_was_not_agreed_on_stops_its_ring,
    any_id_comes_back_as_it_was,
    only_the_flags_of_this_round_count,
    random_rings_do_no_harm,
    parts_that_are_not_aligned_are_refused,
];
