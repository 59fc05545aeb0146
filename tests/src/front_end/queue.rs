// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a ring: of a split one (VIRTIO 1.3, section 2.7) here, of a packed one by way of [`super::packed`].
//!
//! [`Queue::add`] writes a chain, [`Queue::publish`] makes all chains added since visible with one
//! store, [`Queue::kick`] notifies if the device asked for it, [`Queue::take_used`] and
//! [`Queue::wait_used`] bring them back. None of these allocates or locks, and only a kick or a wait
//! enters the kernel. The raw methods below them write anything anywhere in a split ring.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::{GuestMemory, Region};
use super::packed::{self, PackedRing};

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Descriptor flag: the buffer holds a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

const DESCRIPTOR_SIZE: u64 = 16;
const USED_ENTRY_SIZE: u64 = 8;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// Whether the device writes it (else the device reads it).
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(address: u64, length: u32) -> Self {
        Buffer {
            address,
            length,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, length: u32) -> Self {
        Buffer {
            address,
            length,
            writable: true,
        }
    }

    /// The same bytes as consecutive buffers of these lengths; what they leave over follows as one more.
    pub fn split(self, lengths: &[u32]) -> Vec<Buffer> {
        let mut rest = self;
        let mut pieces: Vec<Buffer> = lengths
            .iter()
            .map(|&length| {
                let piece = Buffer { length, ..rest };
                rest.address += u64::from(length);
                rest.length = rest
                    .length
                    .checked_sub(length)
                    .expect("pieces longer than the buffer");
                piece
            })
            .collect();
        if rest.length > 0 {
            pieces.push(rest);
        }
        pieces
    }
}

/// A descriptor as it lies in the ring or in an indirect table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, with [`NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// The 16 bytes of the descriptor.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head descriptor of the chain, as [`Queue::add`] returned it.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// What a queue looks like.
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
    /// Value of the avail and used index at the start; in a packed ring the place where it starts, with the wrap counter in bit 15.
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
    /// The base that SET_VRING_BASE needs for a ring that starts at `base`.
    pub fn start(&self) -> u32 {
        let base = u32::from(self.base);
        if self.packed { base | base << 16 } else { base }
    }

    /// Bytes of the three parts of such a ring.
    fn sizes(&self) -> [u64; 3] {
        let size = u64::from(self.size);
        let descriptors = size * DESCRIPTOR_SIZE;
        if self.packed {
            [descriptors, packed::EVENT_SIZE, packed::EVENT_SIZE]
        } else {
            [descriptors, 6 + 2 * size, 6 + USED_ENTRY_SIZE * size]
        }
    }
}

/// Host addresses of the same, and of the indirect tables.
#[derive(Debug)]
struct Pointers {
    descriptors: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    indirect: *mut u8,
}

/// A ring and its eventfds.
#[derive(Debug)]
pub struct Queue {
    options: QueueOptions,
    /// Where the ring is packed: the state of its driver. What follows is that of a split ring then, and not used.
    packed: Option<PackedRing>,
    layout: Layout,
    indirect_tables: u64,
    pointers: Pointers,
    /// Keep the memory behind `pointers` mapped.
    _regions: Vec<Arc<Region>>,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    /// Our own copy of the descriptors' `next`, which links the free ones too.
    next: Box<[u16]>,
    /// For the head of an outstanding chain: how many descriptors it has, else 0.
    outstanding: Box<[u16]>,
    free_head: u16,
    free: u16,
    /// Avail index that the next added chain gets.
    next_avail: u16,
    /// Avail index at the last decision to kick.
    kicked_avail: u16,
    /// Used index up to which entries are taken.
    next_used: u16,
    /// Used index when it was last read from the ring.
    seen_used: u16,
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

    /// Puts a ring at these guest addresses.
    pub fn at(memory: &GuestMemory, options: QueueOptions, layout: Layout) -> Self {
        assert!(
            (options.packed || options.size.is_power_of_two()) && options.size <= 0x8000,
            "a split ring has a power of two of descriptors"
        );
        let size = u64::from(options.size);
        let [descriptors, avail, used] = options.sizes();
        let parts = [
            (layout.descriptors, descriptors),
            (layout.avail, avail),
            (layout.used, used),
        ];
        let indirect_size = size * u64::from(options.indirect) * DESCRIPTOR_SIZE;
        let indirect_tables = match indirect_size {
            0 => layout.descriptors,
            size => memory.allocate(size, 4096),
        };
        let mut regions: Vec<_> = parts
            .iter()
            .map(|&(address, length)| {
                memory.fill(address, length as usize, 0);
                memory.region(address, length).clone()
            })
            .collect();
        regions.push(memory.region(indirect_tables, indirect_size).clone());
        let host = |(address, length): (u64, u64)| memory.host_address(address, length);
        let packed = options.packed.then(|| {
            let pointers = packed::Pointers {
                descriptors: host(parts[0]),
                driver_event: host(parts[1]),
                device_event: host(parts[2]),
            };
            PackedRing::new(options.size, options.event_idx, options.base, pointers)
        });
        let mut queue = Queue {
            options,
            packed,
            layout,
            indirect_tables,
            pointers: Pointers {
                descriptors: host(parts[0]),
                avail: host(parts[1]),
                used: host(parts[2]),
                indirect: host((indirect_tables, indirect_size)),
            },
            _regions: regions,
            kick: eventfd(),
            call: eventfd(),
            error: eventfd(),
            next: (1..=options.size).collect(),
            outstanding: vec![0; usize::from(options.size)].into_boxed_slice(),
            free_head: 0,
            free: options.size,
            next_avail: options.base,
            kicked_avail: options.base,
            next_used: options.base,
            seen_used: options.base,
            kicks: 0,
            calls: 0,
        };
        if !options.packed {
            queue.start_at(options.base);
        }
        queue
    }

    /// What the queue was made with.
    pub fn options(&self) -> &QueueOptions {
        &self.options
    }

    /// Where the ring lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The eventfd that tells the device of new chains.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd that the device signals for used chains.
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// The eventfd that the device signals when the ring is broken.
    pub fn error_fd(&self) -> &EventFd {
        &self.error
    }

    /// Number of descriptors that no chain holds.
    pub fn free_descriptors(&self) -> u16 {
        match &self.packed {
            Some(packed) => packed.free_descriptors(),
            None => self.free,
        }
    }

    /// Where the device is, as GET_VRING_BASE has it, if it holds nothing: after the last chain that [`Queue::take_used`] has returned.
    pub fn used_base(&self) -> u32 {
        match &self.packed {
            Some(packed) => {
                let place = u32::from(packed.next_used().bits());
                place | place << 16
            }
            None => self.next_used.into(),
        }
    }

    /// Number of kicks sent.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Number of calls noticed (signals that arrived before one was noticed count as one).
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Adds a chain and returns its head, or `None` when there are too few free descriptors.
    /// The device does not see it before [`Queue::publish`].
    #[inline]
    pub fn add(&mut self, chain: &[Buffer]) -> Option<u16> {
        assert!(!chain.is_empty(), "a chain has a buffer");
        let indirect = self.options.indirect > 0 && chain.len() > 1;
        let needed = if indirect { 1 } else { chain.len() };
        if self.packed.is_some() {
            return self.add_packed(chain, indirect);
        }
        if needed > usize::from(self.free) {
            return None;
        }
        let head = self.free_head;
        if indirect {
            self.write_indirect(head, chain);
            self.free_head = self.next[usize::from(head)];
        } else {
            let mut index = head;
            let last = chain.len() - 1;
            for (position, buffer) in chain.iter().enumerate() {
                let next = self.next[usize::from(index)];
                let more = position < last;
                self.set_descriptor(index, in_chain(buffer, more, next));
                index = next;
            }
            self.free_head = index;
        }
        self.free -= needed as u16;
        self.outstanding[usize::from(head)] = needed as u16;
        self.set_avail_entry(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }

    #[inline]
    fn add_packed(&mut self, chain: &[Buffer], indirect: bool) -> Option<u16> {
        let packed = self.packed.as_mut()?;
        if !indirect {
            return packed.add(chain.len(), |index| packed::of(&chain[index]));
        }
        let entries = usize::from(self.options.indirect);
        let offset = usize::from(packed.next_id()?) * entries * DESCRIPTOR_SIZE as usize;
        // SAFETY: there is a table of `entries` descriptors for each id.
        let table = unsafe { self.pointers.indirect.add(offset) };
        assert!(chain.len() <= entries, "too long for its table");
        for (index, buffer) in chain.iter().enumerate() {
            let descriptor = packed::of(buffer);
            let entry = Descriptor {
                // The id means nothing here; in this order the fields lie in a packed ring.
                flags: u16::MAX,
                next: descriptor.flags,
                ..descriptor
            };
            // SAFETY: `index` is below `entries`.
            unsafe { write_descriptor(table, index as u16, entry) };
        }
        let descriptor = Descriptor {
            address: self.indirect_tables + offset as u64,
            length: (chain.len() as u64 * DESCRIPTOR_SIZE) as u32,
            flags: INDIRECT,
            next: 0,
        };
        packed.add(1, |_| descriptor)
    }

    /// Makes all chains added so far visible to the device, with one store.
    #[inline]
    pub fn publish(&mut self) {
        if let Some(packed) = &mut self.packed {
            return packed.publish();
        }
        self.avail_field(2)
            .store(self.next_avail.to_le(), Ordering::Release);
    }

    /// Notifies the device of what was published since the last call, if it wants to be. Returns whether it did.
    #[inline]
    pub fn kick(&mut self) -> bool {
        if let Some(packed) = &mut self.packed {
            let wanted = packed.wants_kick();
            if wanted {
                self.kick_anyway();
            }
            return wanted;
        }
        // The store of the avail index must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_avail, self.next_avail);
        let wanted = if self.options.event_idx {
            needs_event(self.avail_event(), self.next_avail, old)
        } else {
            old != self.next_avail && self.used_flags() & VRING_USED_F_NO_NOTIFY as u16 == 0
        };
        if wanted {
            self.kick_anyway();
        }
        wanted
    }

    /// Notifies the device whether it wants it or not.
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

    /// The next used chain, if there is one. Panics when the device returns what was not outstanding.
    #[inline]
    pub fn take_used(&mut self) -> Option<Used> {
        if let Some(packed) = &mut self.packed {
            return packed.take_used();
        }
        if self.next_used == self.seen_used {
            self.seen_used = self.used_index();
            if self.next_used == self.seen_used {
                return None;
            }
        }
        let (id, length) = self.used_entry(self.next_used);
        let count = match self.outstanding.get_mut(id as usize) {
            Some(count) if *count > 0 => std::mem::take(count),
            _ => panic!("the device used descriptor {id}, which is not the head of a chain it has"),
        };
        self.next_used = self.next_used.wrapping_add(1);
        let head = id as u16;
        let mut last = head;
        for _ in 1..count {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += count;
        Some(Used { head, length })
    }

    /// Waits until the device has used a chain that [`Queue::take_used`] has not returned, asking for
    /// an interrupt before it sleeps. False when there was none before the deadline.
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

    /// Asks for an interrupt at the next used chain. True when one is there already.
    #[inline]
    pub fn arm_interrupt(&mut self) -> bool {
        if self.has_used() {
            return true;
        }
        if let Some(packed) = &self.packed {
            packed.want_interrupt();
        } else if self.options.event_idx {
            self.set_used_event(self.next_used);
        } else {
            self.set_no_interrupt(false);
        }
        // The wish must be visible before the used index is read for the last time.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts while used chains are taken; with EVENT_IDX the event that has passed does that.
    #[inline]
    pub fn disarm_interrupt(&mut self) {
        if let Some(packed) = &self.packed {
            packed.want_no_interrupt();
        } else if !self.options.event_idx {
            self.set_no_interrupt(true);
        }
    }

    /// Whether a used chain waits to be taken.
    #[inline]
    pub fn has_used(&self) -> bool {
        if let Some(packed) = &self.packed {
            return packed.has_used();
        }
        self.used_index() != self.next_used
    }

    /// Waits, by looking at the ring, until the device has used a chain that [`Queue::take_used`] has not returned. Asks for nothing.
    pub fn poll_used(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.has_used() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Whether the device has used all chains that were published, of one descriptor each.
    pub fn has_used_all(&self) -> bool {
        match &self.packed {
            Some(packed) => packed.has_used_all(),
            None => self.used_index() == self.avail_index(),
        }
    }

    /// Waits for a signal on the call eventfd, and takes it. False when none came before the deadline.
    /// Says nothing about used chains and asks for nothing.
    pub fn wait_call(&mut self, limit: Duration) -> bool {
        if !readable(&self.call, limit) {
            return false;
        }
        // Another reader of a shared file description is the only way to find it empty now.
        let signalled = self.call.read().is_ok();
        self.calls += u64::from(signalled);
        signalled
    }

    /// Waits for a signal on the error eventfd, and takes it. False when none came before the deadline.
    pub fn wait_error(&self, limit: Duration) -> bool {
        readable(&self.error, limit) && self.error.read().is_ok()
    }

    /// Forgets all outstanding chains and begins again where it began, as after a device reset. The eventfds stay.
    pub fn reset(&mut self) {
        let base = self.options.base;
        if let Some(packed) = self.packed.take() {
            self.packed = Some(packed.anew(base));
            return;
        }
        self.next = (1..=self.options.size).collect();
        self.outstanding.fill(0);
        self.free_head = 0;
        self.free = self.options.size;
        self.next_avail = base;
        self.kicked_avail = base;
        self.next_used = base;
        self.seen_used = base;
        self.start_at(base);
    }

    // Raw access: what a driver would not do.

    /// Writes descriptor `index` of the ring.
    #[inline]
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        assert!(index < self.options.size);
        // SAFETY: the table has `size` descriptors.
        unsafe { write_descriptor(self.pointers.descriptors, index, descriptor) };
    }

    /// Writes entry `slot` (modulo the size) of the avail ring.
    #[inline]
    pub fn set_avail_entry(&mut self, slot: u16, head: u16) {
        let slot = usize::from(slot & (self.options.size - 1));
        self.avail_field(4 + 2 * slot)
            .store(head.to_le(), Ordering::Relaxed);
    }

    /// Writes the avail index, whatever was added. Chains added later follow what was added, not this.
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail_field(2).store(index.to_le(), Ordering::Release);
    }

    /// Makes `head`, a chain written with [`Queue::set_descriptor`], the next available one and kicks.
    /// Only [`Queue::used_index`] and [`Queue::used_entry`] see it come back.
    pub fn publish_raw(&mut self, head: u16) {
        self.set_avail_entry(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.publish();
        self.kick_anyway();
    }

    /// Makes available what breaks the ring, and kicks: a head outside the table, or, in a packed ring, an indirect table of one byte.
    pub fn publish_nonsense(&mut self) {
        let Some(packed) = &self.packed else {
            return self.publish_raw(0xffff);
        };
        let place = packed.next_available();
        let table = Descriptor {
            length: 1,
            ..Descriptor::default()
        };
        packed.set_descriptor(place.index, table, 0, INDIRECT | place.available());
        self.kick_anyway();
    }

    /// The avail index as the device sees it.
    pub fn avail_index(&self) -> u16 {
        u16::from_le(self.avail_field(2).load(Ordering::Relaxed))
    }

    /// Sets VIRTQ_AVAIL_F_NO_INTERRUPT.
    #[inline]
    pub fn set_no_interrupt(&mut self, no_interrupt: bool) {
        let flags = if no_interrupt {
            VRING_AVAIL_F_NO_INTERRUPT as u16
        } else {
            0
        };
        self.avail_field(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Sets used_event: the device interrupts when its used index passes it.
    #[inline]
    pub fn set_used_event(&mut self, index: u16) {
        let offset = 4 + 2 * usize::from(self.options.size);
        self.avail_field(offset)
            .store(index.to_le(), Ordering::Relaxed);
    }

    /// The device's VIRTQ_USED_F_NO_NOTIFY and unknown flags.
    #[inline]
    pub fn used_flags(&self) -> u16 {
        u16::from_le(self.used_field(0).load(Ordering::Relaxed))
    }

    /// The device's avail_event: it wants a kick when the avail index passes it.
    #[inline]
    pub fn avail_event(&self) -> u16 {
        let offset = 4 + USED_ENTRY_SIZE as usize * usize::from(self.options.size);
        u16::from_le(self.used_field(offset).load(Ordering::Relaxed))
    }

    /// The device's used index.
    #[inline]
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used_field(2).load(Ordering::Acquire))
    }

    /// Overwrites the device's used index.
    pub fn set_used_index(&mut self, index: u16) {
        self.used_field(2).store(index.to_le(), Ordering::Release);
    }

    /// Entry `slot` (modulo the size) of the used ring: descriptor and length.
    #[inline]
    pub fn used_entry(&self, slot: u16) -> (u32, u32) {
        let slot = usize::from(slot & (self.options.size - 1));
        // SAFETY: the used ring has `size` aligned entries of 8 bytes after its first 4.
        let (id, length) = unsafe {
            let entry = self
                .pointers
                .used
                .add(4 + USED_ENTRY_SIZE as usize * slot)
                .cast::<u32>();
            (entry.read_volatile(), entry.add(1).read_volatile())
        };
        (u32::from_le(id), u32::from_le(length))
    }

    /// Overwrites the device's avail_event.
    pub fn set_avail_event(&mut self, index: u16) {
        let offset = 4 + USED_ENTRY_SIZE as usize * usize::from(self.options.size);
        self.used_field(offset)
            .store(index.to_le(), Ordering::Relaxed);
    }

    /// Waits, by looking at it, until the device's used index is `index`. False when it was not in time.
    pub fn wait_used_index(&self, index: u16, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.used_index() != index {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Makes ring memory look as it would after `base` chains have come and gone.
    fn start_at(&mut self, base: u16) {
        self.set_avail_index(base);
        self.set_used_index(base);
        self.set_used_event(base);
        self.set_avail_event(base);
        self.set_no_interrupt(false);
    }

    #[inline]
    fn write_indirect(&mut self, head: u16, chain: &[Buffer]) {
        let entries = usize::from(self.options.indirect);
        assert!(
            chain.len() <= entries,
            "indirect tables of {entries} descriptors"
        );
        let offset = usize::from(head) * entries * DESCRIPTOR_SIZE as usize;
        // SAFETY: there is a table of `entries` descriptors for each head.
        let table = unsafe { self.pointers.indirect.add(offset) };
        let last = chain.len() - 1;
        for (position, buffer) in chain.iter().enumerate() {
            let descriptor = in_chain(buffer, position < last, position as u16 + 1);
            // SAFETY: `position` is below `entries`.
            unsafe { write_descriptor(table, position as u16, descriptor) };
        }
        self.set_descriptor(
            head,
            Descriptor {
                address: self.indirect_tables + offset as u64,
                length: (chain.len() as u64 * DESCRIPTOR_SIZE) as u32,
                flags: INDIRECT,
                next: 0,
            },
        );
    }

    /// The packed ring, for what a driver would not do.
    pub fn packed(&self) -> &PackedRing {
        self.packed.as_ref().expect("a packed ring")
    }

    #[inline]
    fn avail_field(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(!self.options.packed, "a packed ring has no avail ring");
        // SAFETY: callers stay within the 6 + 2 * size bytes of the avail ring, at even offsets.
        unsafe { AtomicU16::from_ptr(self.pointers.avail.add(offset).cast()) }
    }

    #[inline]
    fn used_field(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(!self.options.packed, "a packed ring has no used ring");
        // SAFETY: callers stay within the 6 + 8 * size bytes of the used ring, at even offsets.
        unsafe { AtomicU16::from_ptr(self.pointers.used.add(offset).cast()) }
    }
}

/// An eventfd that no program started meanwhile inherits.
fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).expect("eventfd")
}

fn in_chain(buffer: &Buffer, more: bool, next: u16) -> Descriptor {
    Descriptor {
        address: buffer.address,
        length: buffer.length,
        flags: if buffer.writable { WRITE } else { 0 } | if more { NEXT } else { 0 },
        next: if more { next } else { 0 },
    }
}

/// # Safety
/// `table` has more than `index` descriptors.
#[inline]
pub(super) unsafe fn write_descriptor(table: *mut u8, index: u16, descriptor: Descriptor) {
    // SAFETY: by this function's contract; the device may read it at any time, hence volatile.
    unsafe {
        table
            .cast::<[u8; 16]>()
            .add(usize::from(index))
            .write_volatile(descriptor.to_bytes());
    }
}

/// vring_need_event of the specification: did the step from `old` to `new` pass `event`?
#[inline]
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn readable(eventfd: &EventFd, limit: Duration) -> bool {
    // SAFETY: the descriptor is open for as long as `eventfd` is borrowed.
    let fd =
        unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(eventfd)) };
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
