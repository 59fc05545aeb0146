// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests in rings of every size, in every framing.

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::device::IN_ORDER;
use vhost_device_tests::target::{Request, Target, assert_works, skip};

use crate::{Load, PATIENCE, modes, usual};

/// Chains of one request: a readable and a writable buffer.
const BUFFERS: u16 = 2;

fn rings_of_every_size_work(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        for exponent in 0..=15 {
            let size = 1 << exponent;
            if size < BUFFERS && !mode.indirect {
                continue;
            }
            // A few entries before the end, so that the ring wraps.
            let mut queue = mode.queue(&front_end, size, size - 1);
            let memory = front_end.memory();
            Load::new(target, memory, &queue, usize::from(size.min(8)))
                .run(&mut queue, u32::from(size).min(100) + 3);
            front_end.stop(0).unwrap();
        }
    }
}

fn indices_wrap(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 64, 0xfff0);
        Load::new(target, front_end.memory(), &queue, 16).run(&mut queue, 200);
        assert_eq!(front_end.stop(0).unwrap(), queue.used_base(), "{mode:?}");
    }
}

fn more_requests_than_an_index_can_count_are_carried_out(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let (front_end, mut queue) = mode.start(&running, 128, 0);
        Load::new(target, front_end.memory(), &queue, 64).run(&mut queue, 70_000);
        assert_eq!(front_end.stop(0).unwrap(), queue.used_base());
    }
}

/// As many requests as fit, made available with one store and one kick.
fn all_requests_of_a_full_ring_are_carried_out(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 256, 0);
        let mut load = Load::new(target, front_end.memory(), &queue, 256);
        for _ in 0..4 {
            load.fill(&mut queue);
            queue.kick_anyway();
            load.drain(&mut queue);
        }
    }
}

/// Runs one request for each chain that `frame` makes of its two buffers.
fn assert_framings(target: &dyn Target, frame: impl Fn(Buffer, Buffer) -> Vec<Vec<Buffer>>) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        let mut options = mode.options(1024, 0);
        options.indirect *= 64;
        let mut queue = front_end.queue_with(0, options).unwrap();
        let mut request = Request::new(target, front_end.memory());
        for (index, chain) in frame(request.readable(), request.writable())
            .into_iter()
            .enumerate()
        {
            request.write(index as u32);
            queue.submit(&chain);
            request.finish(&mut queue);
        }
    }
}

fn readable_bytes_may_be_cut_anywhere(target: &dyn Target) {
    assert_framings(target, |readable, writable| {
        (1..readable.length)
            .map(|cut| [readable.split(&[cut]), vec![writable]].concat())
            .collect()
    });
}

fn writable_bytes_may_be_cut_anywhere(target: &dyn Target) {
    assert_framings(target, |readable, writable| {
        (1..writable.length)
            .map(|cut| [vec![readable], writable.split(&[cut])].concat())
            .collect()
    });
}

/// As many buffers as common devices allow.
fn both_may_be_in_many_pieces(target: &dyn Target) {
    assert_framings(target, |readable, writable| {
        [1, 2, 3, 7, 16, 60]
            .map(|count| {
                let cut = |buffer: Buffer| {
                    let size = buffer.length.div_ceil(count).max(1);
                    buffer.split(&vec![size; (buffer.length / size) as usize])
                };
                [cut(readable), cut(writable)].concat()
            })
            .into()
    });
}

fn a_chain_may_have_as_many_descriptors_as_the_ring(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        let mut options = mode.options(16, 0);
        options.indirect *= 4;
        let mut queue = front_end.queue_with(0, options).unwrap();
        let mut request = Request::new(target, front_end.memory());
        for tag in 0..40 {
            let [readable, writable] = request.write(tag);
            let chain = [readable.split(&[2; 7]), writable.split(&[8; 7])].concat();
            assert_eq!(chain.len(), 16);
            queue.submit(&chain);
            request.finish(&mut queue);
        }
    }
}

fn each_queue_works_while_the_others_do(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        let memory = front_end.memory();
        let mut queues: Vec<_> = (0..front_end.queue_count().min(target.request_queues()))
            .map(|index| front_end.queue_with(index, mode.options(32, 0)).unwrap())
            .collect();
        std::thread::scope(|scope| {
            for queue in &mut queues {
                scope.spawn(move || Load::new(target, memory, queue, 8).run(queue, 500));
            }
        });
    }
}

/// A driver that accepted the feature need not check the ids.
fn requests_come_back_in_order_where_that_is_offered(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        if front_end.features() & IN_ORDER == 0 {
            return skip(target, "VIRTIO_F_IN_ORDER");
        }
        let mut queue = mode.queue(&front_end, 64, 0);
        let mut requests: Vec<_> = (0..16)
            .map(|_| Request::new(target, front_end.memory()))
            .collect();
        for round in 0..50 {
            let heads: Vec<_> = requests
                .iter_mut()
                .map(|request| queue.add(&request.write(round)).unwrap())
                .collect();
            queue.publish();
            queue.kick();
            for (head, request) in heads.into_iter().zip(&mut requests) {
                assert!(queue.wait_used(PATIENCE), "{mode:?}");
                let used = queue.take_used().unwrap();
                assert_eq!(used.head, head, "{mode:?}");
                request.assert_done(used);
            }
        }
    }
}

/// Adjacent guest addresses are one range to the driver, wherever their memory comes from.
fn a_buffer_may_cross_two_regions(target: &dyn Target) {
    use vhost_device_tests::front_end::Options;
    const BORDER: u64 = 1 << 20;
    let running = target.start();
    let options = Options {
        memory: vec![(0, BORDER as usize), (BORDER, BORDER as usize)],
        ..Options::default()
    };
    let front_end = running.connect_with(&options);
    let mut queue = front_end.queue(0, 16).unwrap();
    let memory = front_end.memory();
    let (readable, expected) = target.request(3);
    for part in [1, 2, readable.len() / 2, readable.len() - 1] {
        let input = BORDER - part as u64;
        memory.write(input, &readable[..part]);
        memory.write(BORDER, &readable[part..]);
        let output = BORDER + 4096;
        queue.submit(&[
            Buffer::readable(input, readable.len() as u32),
            Buffer::writable(output, expected.len() as u32),
        ]);
        assert_eq!(
            queue.take_used_within(PATIENCE).length,
            expected.len() as u32
        );
        assert_eq!(
            memory.read_vec(output, expected.len()),
            expected,
            "{part} readable bytes in the first region"
        );
    }
    let input = memory.allocate(readable.len() as u64, 1);
    memory.write(input, &readable);
    for part in [1, expected.len() / 2, expected.len() - 1] {
        let output = BORDER - part as u64;
        memory.fill(output, part, 0xdd);
        memory.fill(BORDER, expected.len() - part, 0xdd);
        queue.submit(&[
            Buffer::readable(input, readable.len() as u32),
            Buffer::writable(output, expected.len() as u32),
        ]);
        assert_eq!(
            queue.take_used_within(PATIENCE).length,
            expected.len() as u32
        );
        let written = [
            memory.read_vec(output, part),
            memory.read_vec(BORDER, expected.len() - part),
        ]
        .concat();
        assert_eq!(
            written, expected,
            "{part} writable bytes in the first region"
        );
    }
}

fn memory_above_4_gib_is_reached(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let front_end = mode.connect(&running);
        let high = front_end.memory().without(0);
        assert!(
            high.regions()
                .iter()
                .all(|region| region.guest_address() >= 1 << 32)
        );
        let mut queue = mode.queue(&front_end, 16, 0);
        assert_works(target, &high, &mut queue);
        front_end.stop(0).unwrap();
        let mut queue = vhost_device_tests::front_end::Queue::new(&high, mode.options(16, 0));
        front_end.start(0, &queue, queue.options().start()).unwrap();
        assert_works(target, &high, &mut queue);
    }
}

crate::for_each_target![
    rings_of_every_size_work,
    indices_wrap,
    more_requests_than_an_index_can_count_are_carried_out,
    all_requests_of_a_full_ring_are_carried_out,
    readable_bytes_may_be_cut_anywhere,
    writable_bytes_may_be_cut_anywhere,
    both_may_be_in_many_pieces,
    a_chain_may_have_as_many_descriptors_as_the_ring,
    each_queue_works_while_the_others_do,
    requests_come_back_in_order_where_that_is_offered,
    a_buffer_may_cross_two_regions,
    memory_above_4_gib_is_reached,
];
