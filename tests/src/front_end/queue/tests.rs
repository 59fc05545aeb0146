// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the queue against the device side of `virtio-queue`.

use virtio_queue::{Queue as DeviceQueue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

/// Returns a driver and a device on the same memory.
fn pair(options: QueueOptions) -> (Queue, DeviceQueue, GuestMemoryMmap, GuestMemory) {
    let memory = GuestMemory::new(&[(0x10_0000, 0x10_0000)]);
    let queue = Queue::new(&memory, options);
    let region = &memory.regions()[0];
    let file = FileOffset::new(region.file().try_clone().unwrap(), 0);
    let mapping = MmapRegion::from_file(file, region.size() as usize).unwrap();
    let mapping = GuestRegionMmap::new(mapping, GuestAddress(region.guest_address())).unwrap();
    let theirs = GuestMemoryMmap::from_regions(vec![mapping]).unwrap();
    let mut device = DeviceQueue::new(options.size).unwrap();
    device.set_size(options.size);
    device
        .try_set_desc_table_address(GuestAddress(queue.layout().descriptors))
        .unwrap();
    device
        .try_set_avail_ring_address(GuestAddress(queue.layout().avail))
        .unwrap();
    device
        .try_set_used_ring_address(GuestAddress(queue.layout().used))
        .unwrap();
    device.set_next_avail(options.base);
    device.set_next_used(options.base);
    device.set_event_idx(options.event_idx);
    device.set_ready(true);
    (queue, device, theirs, memory)
}

/// Makes the device use all available chains, in reverse order, with the number of buffers as the length.
fn serve(device: &mut DeviceQueue, memory: &GuestMemoryMmap) -> Vec<Vec<Buffer>> {
    let mut chains: Vec<_> = device
        .iter(memory)
        .unwrap()
        .map(|chain| {
            let head = chain.head_index();
            let buffers: Vec<_> = chain
                .map(|descriptor| Buffer {
                    address: descriptor.addr().0,
                    length: descriptor.len(),
                    writable: descriptor.is_write_only(),
                })
                .collect();
            (head, buffers)
        })
        .collect();
    for (head, buffers) in chains.iter().rev() {
        device
            .add_used(memory, *head, buffers.len() as u32)
            .unwrap();
    }
    chains.drain(..).map(|(_, buffers)| buffers).collect()
}

fn chain(length: u32) -> Vec<Buffer> {
    (0..length)
        .map(|position| Buffer {
            address: 0x18_0000 + u64::from(position) * 0x100,
            length: 0x10 + position,
            writable: position > 0,
        })
        .collect()
}

fn many_rounds_come_back(options: QueueOptions) {
    let (mut queue, mut device, theirs, _memory) = pair(options);
    for round in 0..200u32 {
        let chains: Vec<_> = (0..=round % 3)
            .map(|more| chain(1 + (round + more) % 3))
            .collect();
        let heads: Vec<_> = chains
            .iter()
            .map(|chain| queue.add(chain).unwrap())
            .collect();
        assert!(
            serve(&mut device, &theirs).is_empty(),
            "seen before it was published"
        );
        queue.publish();
        assert_eq!(serve(&mut device, &theirs), chains);
        for (head, chain) in heads.iter().zip(&chains).rev() {
            let used = queue.take_used().unwrap();
            assert_eq!(
                used,
                Used {
                    head: *head,
                    length: chain.len() as u32
                }
            );
        }
        assert_eq!(queue.take_used(), None);
        assert_eq!(queue.free_descriptors(), options.size);
    }
}

#[test]
fn direct_chains_come_back_across_the_wrap_of_the_index() {
    many_rounds_come_back(QueueOptions {
        size: 16,
        base: 65_500,
        ..Default::default()
    });
}

#[test]
fn indirect_chains_come_back_across_the_wrap_of_the_index() {
    many_rounds_come_back(QueueOptions {
        size: 4,
        base: 65_500,
        indirect: 8,
        ..Default::default()
    });
}

#[test]
fn a_full_ring_refuses_a_chain_and_takes_it_when_one_came_back() {
    let (mut queue, mut device, theirs, _memory) = pair(QueueOptions {
        size: 4,
        ..Default::default()
    });
    assert!(queue.add(&chain(3)).is_some());
    assert_eq!(queue.add(&chain(2)), None);
    queue.publish();
    serve(&mut device, &theirs);
    assert!(queue.take_used().is_some());
    assert!(queue.add(&chain(2)).is_some());
}

#[test]
fn a_kick_is_sent_only_when_the_device_wants_it() {
    for event_idx in [false, true] {
        let (mut queue, mut device, theirs, _memory) = pair(QueueOptions {
            size: 16,
            event_idx,
            ..Default::default()
        });
        device.disable_notification(&theirs).unwrap();
        queue.add(&chain(1));
        queue.publish();
        // With EVENT_IDX the first one passes the initial avail_event.
        assert_eq!(queue.kick(), event_idx);
        queue.add(&chain(1));
        queue.publish();
        assert!(!queue.kick());
        serve(&mut device, &theirs);
        assert!(!device.enable_notification(&theirs).unwrap());
        assert!(!queue.kick(), "nothing new");
        queue.submit(&chain(1));
        assert_eq!(queue.kicks(), 1 + u64::from(event_idx));
        assert!(queue.kick_fd().read().is_ok());
    }
}

#[test]
fn waiting_asks_for_an_interrupt_and_only_then() {
    for event_idx in [false, true] {
        let (mut queue, mut device, theirs, memory) = pair(QueueOptions {
            size: 16,
            event_idx,
            ..Default::default()
        });
        assert!(!queue.wait_used(Duration::ZERO));
        queue.submit(&chain(1));
        serve(&mut device, &theirs);
        if event_idx {
            assert!(device.needs_notification(&theirs).unwrap());
        }
        queue.call_fd().write(1).unwrap();
        assert!(queue.wait_used(LIMIT));
        assert!(queue.take_used().is_some());
        queue.disarm_interrupt();
        queue.submit(&chain(1));
        serve(&mut device, &theirs);
        if event_idx {
            assert!(!device.needs_notification(&theirs).unwrap());
        } else {
            assert_eq!(memory.read_u16(queue.layout().avail), 1);
        }
        assert!(queue.wait_used(LIMIT));
    }
}

#[test]
#[should_panic(expected = "used descriptor 7")]
fn a_descriptor_that_was_not_outstanding_is_refused() {
    let (mut queue, _device, _theirs, memory) = pair(QueueOptions {
        size: 16,
        ..Default::default()
    });
    memory.write_u32(queue.layout().used + 4, 7);
    memory.write_u16(queue.layout().used + 2, 1);
    queue.take_used();
}
