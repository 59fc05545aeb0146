// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a queue: its ring, which is a [`SplitRing`] or a [`PackedRing`], and its eventfds.
//!
//! [`Queue::add`] writes a chain, [`Queue::publish`] makes all chains added since visible with one
//! store, [`Queue::kick`] notifies if the device asked for it, [`Queue::take_used`] and
//! [`Queue::wait_used`] return them. None of these allocates or locks, and only a kick or a wait
//! enters the kernel. The rings give access for what no driver would do: writing anything anywhere.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::descriptor::{Buffer, DESCRIPTOR_SIZE, Descriptor, INDIRECT, Used, write_descriptor};
use super::memory::{GuestMemory, Region};
use super::packed::{self, PackedRing};
use super::split::{self, SplitRing};

/// Interval at which a ring is polled.
const LOOK_INTERVAL: Duration = Duration::from_micros(100);

/// Options of a queue.
#[derive(Debug, Clone, Copy)]
pub struct QueueOptions {
    /// Number of descriptors, up to 32768; a power of two if the ring is split.
    pub size: u16,
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC was negotiated: put each chain of two or more into an indirect table
    /// with room for this many descriptors. 0 for none.
    pub indirect: u16,
    /// Value of the avail and used index at the start; in a packed ring the position where it starts, with the wrap counter in bit 15.
    pub base: u16,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions {
            size: 256,
            packed: false,
            event_idx: false,
            indirect: 0,
            base: 0,
        }
    }
}

/// Guest addresses of the three parts of a ring.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Descriptor table or ring.
    pub descriptors: u64,
    /// Avail ring or the driver's event suppression (driver area).
    pub avail: u64,
    /// Used ring or the device's event suppression (device area).
    pub used: u64,
}

impl QueueOptions {
    /// Returns the base for SET_VRING_BASE of a ring that starts at `base`.
    pub fn start(&self) -> u32 {
        let base = u32::from(self.base);
        if self.packed { base | base << 16 } else { base }
    }

    /// Returns the sizes of the three parts of such a ring, in bytes.
    fn sizes(&self) -> [u64; 3] {
        let descriptors = usize::from(self.size) * DESCRIPTOR_SIZE;
        let (avail, used) = match self.packed {
            true => (packed::EVENT_SIZE, packed::EVENT_SIZE),
            false => (split::avail_size(self.size), split::used_size(self.size)),
        };
        [descriptors, avail, used].map(|size| size as u64)
    }
}

/// The two formats of a ring.
#[derive(Debug)]
enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// One table of descriptors for each chain that the ring can hold.
#[derive(Debug)]
struct IndirectTables {
    /// Descriptors of each.
    entries: usize,
    /// Guest address of the first.
    address: u64,
    host: *mut u8,
}

impl IndirectTables {
    /// Fills the table of the chain with this number. Returns the descriptor of the table.
    #[inline]
    fn write(
        &self,
        chain: u16,
        descriptors: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Descriptor {
        let count = descriptors.len();
        assert!(
            count <= self.entries,
            "indirect tables of {} descriptors",
            self.entries
        );
        let offset = usize::from(chain) * self.entries * DESCRIPTOR_SIZE;
        // SAFETY: there is a table for each chain.
        let table = unsafe { self.host.add(offset) };
        for (index, descriptor) in descriptors.enumerate() {
            // SAFETY: `index` is below `entries`.
            unsafe { write_descriptor(table, index as u16, descriptor) };
        }
        Descriptor::of_table(self.address + offset as u64, count)
    }
}

/// A ring and its eventfds.
#[derive(Debug)]
pub struct Queue {
    options: QueueOptions,
    ring: Ring,
    layout: Layout,
    indirect: IndirectTables,
    /// Keep the memory of the ring and its tables mapped.
    _regions: Vec<Arc<Region>>,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    kicks: u64,
    calls: u64,
}

// SAFETY: the pointers lead into mappings that `_regions` keeps alive and that no thread owns.
unsafe impl Send for Queue {}

impl Queue {
    /// Allocates a ring (and its indirect tables) in `memory`.
    pub fn new(memory: &GuestMemory, options: QueueOptions) -> Self {
        let [descriptors, avail, used] = options.sizes();
        let layout = Layout {
            descriptors: memory.allocate(descriptors, 4096),
            avail: memory.allocate(avail, 64),
            used: memory.allocate(used, 64),
        };
        Self::at(memory, options, layout)
    }

    /// Places a ring at these guest addresses.
    pub fn at(memory: &GuestMemory, options: QueueOptions, layout: Layout) -> Self {
        assert!(
            (options.packed || options.size.is_power_of_two()) && options.size <= 0x8000,
            "a split ring has a power of two of descriptors"
        );
        let [descriptors, avail, used] = options.sizes();
        let parts = [
            (layout.descriptors, descriptors),
            (layout.avail, avail),
            (layout.used, used),
        ];
        let entries = usize::from(options.indirect);
        let tables = usize::from(options.size) * entries * DESCRIPTOR_SIZE;
        let tables = match tables as u64 {
            0 => (layout.descriptors, 0),
            size => (memory.allocate(size, 4096), size),
        };
        for (address, length) in parts {
            memory.fill(address, length as usize, 0);
        }
        let region = |(address, length)| memory.region(address, length).clone();
        let [descriptors, avail, used] =
            parts.map(|(address, length)| memory.host_address(address, length));
        let QueueOptions {
            size,
            event_idx,
            base,
            ..
        } = options;
        let ring = if options.packed {
            let pointers = packed::Pointers {
                descriptors,
                driver_event: avail,
                device_event: used,
            };
            Ring::Packed(PackedRing::new(size, event_idx, base, pointers))
        } else {
            let pointers = split::Pointers {
                descriptors,
                avail,
                used,
            };
            Ring::Split(SplitRing::new(size, event_idx, base, pointers))
        };
        Queue {
            options,
            ring,
            layout,
            indirect: IndirectTables {
                entries,
                address: tables.0,
                host: memory.host_address(tables.0, tables.1),
            },
            _regions: parts.into_iter().chain([tables]).map(region).collect(),
            kick: eventfd(),
            call: eventfd(),
            error: eventfd(),
            kicks: 0,
            calls: 0,
        }
    }

    /// Returns the options of the queue.
    pub fn options(&self) -> &QueueOptions {
        &self.options
    }

    /// Returns the guest addresses of the ring.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the split ring, for what no driver would do.
    pub fn split(&self) -> &SplitRing {
        match &self.ring {
            Ring::Split(ring) => ring,
            Ring::Packed(_) => panic!("the ring is packed"),
        }
    }

    /// Returns the packed ring, for what no driver would do.
    pub fn packed(&self) -> &PackedRing {
        match &self.ring {
            Ring::Packed(ring) => ring,
            Ring::Split(_) => panic!("the ring is split"),
        }
    }

    /// Returns the eventfd that tells the device of new chains.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// Returns the eventfd that the device signals for used chains.
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// Returns the eventfd that the device signals when the ring is broken.
    pub fn error_fd(&self) -> &EventFd {
        &self.error
    }

    /// Returns the number of free descriptors.
    pub fn free_descriptors(&self) -> u16 {
        match &self.ring {
            Ring::Split(ring) => ring.free_descriptors(),
            Ring::Packed(ring) => ring.free_descriptors(),
        }
    }

    /// Returns the position of a device that holds no request, as GET_VRING_BASE reports it: after the last chain that [`Queue::take_used`] has returned.
    pub fn used_base(&self) -> u32 {
        match &self.ring {
            Ring::Split(ring) => ring.next_used().into(),
            Ring::Packed(ring) => {
                let place = u32::from(ring.next_used().bits());
                place | place << 16
            }
        }
    }

    /// Returns the number of kicks sent.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Returns the number of calls noticed (signals that arrived before one was noticed count as one).
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Adds a chain and returns its head, or `None` when there are too few free descriptors.
    /// The device does not see it before [`Queue::publish`].
    #[inline]
    pub fn add(&mut self, chain: &[Buffer]) -> Option<u16> {
        assert!(!chain.is_empty(), "a chain has a buffer");
        let indirect = self.options.indirect > 0 && chain.len() > 1;
        match &mut self.ring {
            Ring::Split(ring) => {
                let linked = |position, next| match Descriptor::of(&chain[position]) {
                    last if position + 1 == chain.len() => last,
                    descriptor => descriptor.followed_by(next),
                };
                if !indirect {
                    return ring.add(chain.len(), linked);
                }
                let entries =
                    (0..chain.len()).map(|position| linked(position, position as u16 + 1));
                let table = self.indirect.write(ring.next_head()?, entries);
                ring.add(1, |_, _| table)
            }
            Ring::Packed(ring) => {
                if !indirect {
                    return ring.add(chain.len(), |position| Descriptor::of(&chain[position]));
                }
                let entries = chain.iter().map(packed::indirect);
                let table = self.indirect.write(ring.next_id()?, entries);
                ring.add(1, |_| table)
            }
        }
    }

    /// Makes all chains added so far visible to the device, with one store.
    #[inline]
    pub fn publish(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
        }
    }

    /// Notifies the device of what was published since the last call, if the device wants it. Returns whether it did.
    #[inline]
    pub fn kick(&mut self) -> bool {
        let wanted = match &mut self.ring {
            Ring::Split(ring) => ring.wants_kick(),
            Ring::Packed(ring) => ring.wants_kick(),
        };
        if wanted {
            self.kick_anyway();
        }
        wanted
    }

    /// Notifies the device in any case.
    pub fn kick_anyway(&mut self) {
        self.kick.write(1).expect("write an eventfd");
        self.kicks += 1;
    }

    /// Adds one chain, publishes it and kicks. Panics when there are too few free descriptors.
    pub fn submit(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.add(chain).expect("enough free descriptors");
        self.publish();
        self.kick();
        head
    }

    /// Takes the next used chain, if there is one. Panics when the device returns a chain that was not outstanding.
    #[inline]
    pub fn take_used(&mut self) -> Option<Used> {
        match &mut self.ring {
            Ring::Split(ring) => ring.take_used(),
            Ring::Packed(ring) => ring.take_used(),
        }
    }

    /// Waits for the next used chain like [`Queue::wait_used`], and takes it. Panics when there is none before the deadline.
    #[track_caller]
    pub fn take_used_within(&mut self, limit: Duration) -> Used {
        assert!(self.wait_used(limit), "a request was not answered");
        self.take_used().expect("a used chain")
    }

    /// Waits until the device has used a chain that [`Queue::take_used`] has not returned, asking for
    /// an interrupt before it sleeps. Returns false if there was none before the deadline.
    pub fn wait_used(&mut self, limit: Duration) -> bool {
        let mut deadline = None;
        loop {
            if self.arm_interrupt() {
                return true;
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + limit);
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait_call(left) {
                return self.has_used();
            }
        }
    }

    /// Asks for an interrupt at the next used chain. Returns true if one is there already.
    #[inline]
    pub fn arm_interrupt(&mut self) -> bool {
        if self.has_used() {
            return true;
        }
        match &self.ring {
            Ring::Split(ring) => ring.want_interrupt(),
            Ring::Packed(ring) => ring.want_interrupt(),
        }
        // The request must be visible before the ring is read for the last time.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts while used chains are taken.
    #[inline]
    pub fn disarm_interrupt(&mut self) {
        match &self.ring {
            Ring::Split(ring) => ring.want_no_interrupt(),
            Ring::Packed(ring) => ring.want_no_interrupt(),
        }
    }

    /// Returns whether a used chain waits to be taken.
    #[inline]
    pub fn has_used(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.has_used(),
            Ring::Packed(ring) => ring.has_used(),
        }
    }

    /// Polls the ring until the device has used a chain that [`Queue::take_used`] has not returned. Does not ask for an interrupt.
    pub fn poll_used(&self, limit: Duration) -> bool {
        look(limit, || self.has_used())
    }

    /// Returns whether the device has used all published chains, if each has one descriptor.
    pub fn has_used_all(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.has_used_all(),
            Ring::Packed(ring) => ring.has_used_all(),
        }
    }

    /// Polls a split ring until the device's used index is `index`. Returns false after the time limit.
    pub fn wait_used_index(&self, index: u16, limit: Duration) -> bool {
        look(limit, || self.split().used_index() == index)
    }

    /// Waits for a signal on the call eventfd, and takes it. Returns false if there was none before the deadline.
    /// Does not check for used chains, and does not ask for an interrupt.
    pub fn wait_call(&mut self, limit: Duration) -> bool {
        if !readable(&self.call, limit) {
            return false;
        }
        // Only another reader of the shared file description can have emptied it now.
        let signalled = self.call.read().is_ok();
        self.calls += u64::from(signalled);
        signalled
    }

    /// Waits for a signal on the error eventfd, and takes it. Returns false if there was none before the deadline.
    pub fn wait_error(&self, limit: Duration) -> bool {
        readable(&self.error, limit) && self.error.read().is_ok()
    }

    /// Forgets all outstanding chains and starts again at the initial position, as after a device reset. The eventfds stay.
    pub fn reset(&mut self) {
        let base = self.options.base;
        match &mut self.ring {
            Ring::Split(ring) => ring.begin(base),
            Ring::Packed(ring) => ring.begin(base),
        }
    }

    /// Makes `head`, a chain written with [`SplitRing::set_descriptor`], the next available one and kicks.
    /// Only [`SplitRing::used_index`] and [`SplitRing::used_entry`] show its return.
    pub fn publish_raw(&mut self, head: u16) {
        let Ring::Split(ring) = &mut self.ring else {
            panic!("the ring is packed");
        };
        ring.append(head);
        ring.publish();
        self.kick_anyway();
    }

    /// Makes something available that breaks the ring, and kicks: a head outside the table, or, in a packed ring, an indirect table of one byte.
    pub fn publish_nonsense(&mut self) {
        let Ring::Packed(ring) = &self.ring else {
            return self.publish_raw(0xffff);
        };
        let place = ring.next_available();
        let table = Descriptor {
            length: 1,
            ..Descriptor::default()
        };
        ring.set_descriptor(place.index, table, 0, INDIRECT | place.available());
        self.kick_anyway();
    }
}

/// Polls until a condition holds. Returns false after the time limit.
fn look(limit: Duration, is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    true
}

/// Creates an eventfd that other programs do not inherit.
fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("eventfd")
}

fn readable(eventfd: &EventFd, limit: Duration) -> bool {
    // SAFETY: the descriptor is open for as long as `eventfd` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("a sane time limit");
        match poll(
            &mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)],
            Some(&left),
        ) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
    }
}

#[cfg(test)]
mod tests;
