// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Block: two queues of requests of all kinds, with data in permanent memory and in memory that is removed.

pub mod disk;
mod variant;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use fastrand::Rng;
use tempfile::TempDir;

use super::back_end::BackEnd;
use super::fault::Fault;
use super::link::{Link, MOVING_SIZE};
use super::loss::{Loss, patience};
use super::report::Tally;
use super::scenario::{Lives, Scenario, Start};
use crate::front_end::block::{
    DISCARD, FLUSH, GET_ID, HEADER_SIZE, ID_SIZE, IN, IOERR, NO_STATUS, OK, OUT, SECTOR_SIZE,
    UNMAP, UNSUPP, WRITE_ZEROES, header, segment,
};
use crate::front_end::{Buffer, GuestMemory, Used};
use crate::process::{Resources, option};
use disk::Disk;
pub use variant::{VARIANTS, Variant};

/// Queues, and requests in flight on each.
const QUEUES: usize = 2;
const DEPTH: usize = 32;
/// Bytes of the image.
const IMAGE_SIZE: usize = 8 << 20;
/// Maximum data of a request.
const LARGEST: usize = 64 << 10;
/// Serial number of the disk.
const SERIAL: &str = "soak";
/// A request type that does not exist.
const UNKNOWN: u32 = 99;

/// Returns how to start the scenario.
pub fn start(variant: Variant, lives: Lives) -> (String, Start) {
    let start =
        move |random| Ok(Box::new(Block::new(variant, lives, random)?) as Box<dyn Scenario>);
    (lives.name(variant.name), Box::new(start))
}

/// A request in flight.
struct Pending {
    /// Number of the memory slot that it uses.
    place: usize,
    kind: u32,
    sectors: Range<u64>,
    /// The number of a write.
    write: u32,
    /// Address of its data, if that is in memory that may be removed.
    moving: Option<GuestMemory>,
    data: Vec<Buffer>,
    since: Instant,
}

/// The scenario.
struct Block {
    link: Link,
    image: File,
    _directory: TempDir,
    lives: Lives,
    random: Rng,
    disk: Disk,
    /// Requests of each queue, by the heads of their chains.
    pending: Vec<Vec<Option<Pending>>>,
    under_way: usize,
    /// Memory slots that are free.
    free: Vec<usize>,
    /// Addresses of the memory of requests: header, segment and status; data.
    heads: Vec<u64>,
    data: Vec<u64>,
}

impl Block {
    fn new(variant: Variant, lives: Lives, mut random: Rng) -> Result<Self, Loss> {
        let directory = variant.directory()?;
        let path = directory.path().join("image");
        let image = File::create_new(&path)?;
        image.set_len(IMAGE_SIZE as u64)?;
        let mut arguments = vec![
            option("blk-file", &path),
            option("io-engine", variant.engine),
            option("serial", SERIAL),
        ];
        arguments.extend(variant.direct.then(|| "--direct".into()));
        let keeps = Resources::default();
        let back_end = BackEnd::start("vhost-device-block", arguments, keeps)?;
        let memory = [(0, 4 << 20), (1 << 32, 4 << 20)];
        let link = Link::new(back_end, &[DEPTH as u16; QUEUES], &memory, &mut random)?;
        let memory = link.memory();
        let places = 0..QUEUES * DEPTH;
        Ok(Self {
            heads: places.clone().map(|_| memory.allocate(64, 16)).collect(),
            data: places
                .clone()
                .map(|_| memory.allocate(LARGEST as u64, 4096))
                .collect(),
            free: places.collect(),
            link,
            image: File::open(&path)?,
            _directory: directory,
            lives,
            random,
            disk: Disk::new((IMAGE_SIZE / SECTOR_SIZE) as u64),
            pending: (0..QUEUES)
                .map(|_| (0..DEPTH).map(|_| None).collect())
                .collect(),
            under_way: 0,
        })
    }

    /// Returns some sectors at a random place.
    fn some_sectors(&mut self) -> Range<u64> {
        let most = match self.random.u32(..4) {
            0 => (LARGEST / SECTOR_SIZE) as u64,
            _ => 8,
        };
        let mut count = self.random.u64(1..=most);
        let mut first = self.random.u64(..self.disk.sectors() - count);
        if self.random.bool() {
            // Ranges that a file system uses.
            (count, first) = (count.next_multiple_of(8), first & !7);
        }
        first..(first + count).min(self.disk.sectors())
    }

    /// Creates a request and adds it to a queue, unless its sectors are in use.
    fn add(&mut self, queue: usize) -> Option<()> {
        let sectors = self.some_sectors();
        let (mut write, mut bytes) = (0, Vec::new());
        let (mut first, mut reply) = (sectors.start, 0);
        let length = (sectors.end - sectors.start) as usize * SECTOR_SIZE;
        let kind = match self.random.u32(..100) {
            0..42 => {
                (write, bytes) = self.disk.begin_write(&sectors)?;
                OUT
            }
            42..84 => {
                if !self.disk.begin_read(&sectors) {
                    return None;
                }
                reply = length;
                IN
            }
            kind @ 84..92 => {
                write = self.disk.begin_zeroes(&sectors)?;
                let flags = if kind == 84 { UNMAP } else { 0 };
                let count = (sectors.end - sectors.start) as u32;
                first = 0;
                match kind {
                    84..88 => {
                        bytes = segment(sectors.start, count, flags).to_vec();
                        WRITE_ZEROES
                    }
                    _ => {
                        bytes = segment(sectors.start, count, 0).to_vec();
                        DISCARD
                    }
                }
            }
            92..96 => FLUSH,
            96..98 => {
                reply = ID_SIZE;
                GET_ID
            }
            98 => UNKNOWN,
            _ => {
                // Past the end.
                first = self.disk.sectors();
                reply = SECTOR_SIZE;
                IN
            }
        };
        // A read past the end has no sectors of the disk.
        let sectors = if first == self.disk.sectors() {
            0..0
        } else {
            sectors
        };
        let place = self.free.pop()?;
        let head = self.heads[place];
        let moving = match (self.link.moving(), self.random.bool()) {
            (Some(start), true) => Some(start + (place * LARGEST) as u64),
            _ => None,
        };
        let at = moving.unwrap_or(self.data[place]);
        let memory = self.link.memory();
        memory.write(head, &header(kind, first));
        memory.write_u8(head + 16, NO_STATUS);
        let data = match (bytes.len(), reply) {
            (0, 0) => Vec::new(),
            (0, length) => {
                memory.fill(at, length, 0xdd);
                pieces(&mut self.random, Buffer::writable(at, length as u32))
            }
            (length, _) => {
                memory.write(at, &bytes);
                pieces(&mut self.random, Buffer::readable(at, length as u32))
            }
        };
        let pending = Pending {
            place,
            kind,
            sectors,
            write,
            moving: moving.map(|_| memory.clone()),
            data: data.clone(),
            since: Instant::now(),
        };
        let mut chain = vec![Buffer::readable(head, HEADER_SIZE)];
        chain.extend(data);
        chain.push(Buffer::writable(head + 16, 1));
        let head = self.link.queues[queue]
            .add(&chain)
            .expect("a place means a descriptor");
        self.pending[queue][usize::from(head)] = Some(pending);
        self.under_way += 1;
        Some(())
    }

    /// Keeps a queue full.
    fn refill(&mut self, queue: usize) {
        let mut added = false;
        for _ in 0..2 * DEPTH {
            if self.link.queues[queue].free_descriptors() == 0 {
                break;
            }
            added |= self.add(queue).is_some();
        }
        if added {
            let queue = &mut self.link.queues[queue];
            queue.publish();
            queue.kick();
        }
    }

    /// Takes the used requests of a queue. Returns their number.
    fn take(&mut self, queue: usize, tally: &Tally) -> Result<usize, Loss> {
        let mut count = 0;
        while let Some(used) = self.link.queues[queue].take_used() {
            let pending = self.pending[queue][usize::from(used.head)].take();
            let pending = pending.ok_or_else(|| Loss(format!("{used:?} was not in flight")))?;
            self.under_way -= 1;
            let (kind, sectors) = (pending.kind, pending.sectors.clone());
            self.check(queue, pending, used, tally)
                .map_err(|Loss(what)| {
                    Loss(format!("request of kind {kind} for {sectors:?}: {what}"))
                })?;
            count += 1;
        }
        Ok(count)
    }

    /// Compares the result with the model.
    fn check(
        &mut self,
        queue: usize,
        pending: Pending,
        used: Used,
        tally: &Tally,
    ) -> Result<(), Loss> {
        let Pending { kind, sectors, .. } = &pending;
        self.free.push(pending.place);
        let status = u32::from(self.link.memory().read_u8(self.heads[pending.place] + 16));
        let length: u32 = pending.data.iter().map(|buffer| buffer.length).sum();
        let is_read = matches!(*kind, IN | GET_ID);
        let expected = match *kind {
            UNKNOWN => UNSUPP,
            IN if sectors.is_empty() => IOERR,
            _ => OK,
        };
        // Memory that was removed before the device read the request cannot be used.
        let may_fail = pending.moving.is_some() && status == IOERR;
        if status != expected && !may_fail {
            return Err(Loss(format!("status {status} instead of {expected}")));
        }
        let written = 1 + if is_read && status == OK { length } else { 0 };
        if used.length != written {
            return Err(Loss(format!("{used:?} instead of {written} bytes")));
        }
        if pending.moving.is_none() {
            let status = Buffer::writable(self.heads[pending.place] + 16, 1);
            let written = if written > 1 { &pending.data[..] } else { &[] };
            let buffers = [written, &[status]].concat();
            self.link
                .check_log(queue, pending.since, &buffers, used.length)?;
        }
        let succeeded = status == OK;
        match *kind {
            IN if sectors.is_empty() => {}
            IN => {
                self.disk.end_read(sectors);
                if succeeded {
                    self.disk
                        .check(sectors.start, &self.read(&pending, length))?;
                }
            }
            GET_ID if succeeded => {
                let id = self.read(&pending, length);
                if !id.starts_with(SERIAL.as_bytes()) {
                    return Err(Loss(format!("serial number {id:?}")));
                }
            }
            OUT | WRITE_ZEROES if succeeded => self.disk.acknowledge(sectors, pending.write),
            OUT | WRITE_ZEROES | DISCARD => self.disk.give_up(sectors),
            _ => {}
        }
        let bytes = if matches!(*kind, IN | OUT) { length } else { 0 };
        tally.answered(bytes.into());
        Ok(())
    }

    /// Returns what the device has written.
    fn read(&self, pending: &Pending, length: u32) -> Vec<u8> {
        let memory = pending.moving.as_ref().unwrap_or(self.link.memory());
        let start = pending.data.first().map_or(0, |buffer| buffer.address);
        memory.read_vec(start, length as usize)
    }

    fn assert_answered(&self) -> Result<(), Loss> {
        let all = self.pending.iter().flatten().flatten();
        match all.map(|pending| pending.since).min() {
            Some(since) if since.elapsed() > patience() => Err(Loss::late("a request")),
            _ => Ok(()),
        }
    }

    /// Takes the used requests of all queues, and waits a while for them.
    fn take_all(&mut self, tally: &Tally) -> Result<(), Loss> {
        let mut count = 0;
        for queue in 0..QUEUES {
            count += self.take(queue, tally)?;
        }
        if count == 0 {
            let busy = |queue: &usize| self.pending[*queue].iter().any(Option::is_some);
            if let Some(queue) = (0..QUEUES).find(busy) {
                self.link.queues[queue].wait_used(Duration::from_millis(5));
            }
            self.assert_answered()?;
        }
        Ok(())
    }
}

/// Splits a buffer into one or more.
fn pieces(random: &mut Rng, buffer: Buffer) -> Vec<Buffer> {
    match random.u32(..4) {
        0 if buffer.length > 1 => buffer.split(&[random.u32(1..buffer.length)]),
        _ => vec![buffer],
    }
}

impl Scenario for Block {
    fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    fn lives(&self) -> Lives {
        self.lives
    }

    fn load(&mut self, until: Instant, tally: &Tally) -> Result<(), Loss> {
        while Instant::now() < until {
            (0..QUEUES).for_each(|queue| self.refill(queue));
            self.take_all(tally)?;
        }
        Ok(())
    }

    fn collect(&mut self, tally: &Tally) -> Result<(), Loss> {
        (0..QUEUES).try_for_each(|queue| self.take(queue, tally).map(|_| ()))
    }

    fn forget(&mut self, _fault: Fault) -> Result<(), Loss> {
        for pending in self.pending.iter_mut().flatten().filter_map(Option::take) {
            match pending.kind {
                IN if !pending.sectors.is_empty() => self.disk.end_read(&pending.sectors),
                OUT | WRITE_ZEROES | DISCARD => self.disk.give_up(&pending.sectors),
                _ => {}
            }
            self.free.push(pending.place);
        }
        self.under_way = 0;
        Ok(())
    }

    fn inspect(&mut self) -> Result<(), Loss> {
        let mut bytes = vec![0; IMAGE_SIZE];
        self.image.read_exact_at(&mut bytes, 0)?;
        self.disk.check(0, &bytes)
    }

    fn settle(&mut self, tally: &Tally) -> Result<(), Loss> {
        while self.under_way > 0 {
            self.take_all(tally)?;
        }
        self.inspect()
    }
}

// Each request has its own part of the memory that is removed.
const _: () = assert!(QUEUES * DEPTH * LARGEST <= MOVING_SIZE);
