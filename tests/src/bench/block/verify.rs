// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks data under the load of the benchmark: dozens of requests on two queues, with data that names its sector and its write,
//! on every kind of storage, with each I/O engine and ring format. An image is kept from one engine to the next, so each engine
//! reads what another one wrote.

use std::collections::HashMap;
use std::fmt::{self, Display};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::image::{Image, Place};
use super::peer::Peer;
use super::{BlockOptions, connect, is_wanted};
use crate::bench::running::Running;
use crate::bench::{AnyError, BenchError, at, until_interrupted};
use crate::front_end::block::{IN, OK, OUT, Prepared, Request, RequestArea, SECTOR_SIZE};
use crate::front_end::{FrontEnd, GuestMemory, Queue, Used};
use crate::soak::Loss;
use crate::soak::block::disk::Disk;
use crate::target::{Block, Target};

/// Bytes of the image.
const IMAGE_SIZE: usize = 32 << 20;
/// Target of every second request: sectors that share pages and blocks with other requests.
const CROWDED: u64 = 2048;
/// Sectors of the largest request.
const LARGEST: u64 = 128;
/// Queues, and requests in flight on each.
const QUEUES: usize = 2;
const DEPTH: usize = 32;
const QUEUE_SIZE: u16 = 128;
/// Time limit of a request.
const LIMIT: Duration = Duration::from_secs(20);

/// Values of `--io-engine`.
const ENGINES: [&str; 3] = ["io_uring", "threads", "auto"];
/// Back-ends by the rings that they are used with.
const RINGS: [(&str, Peer); 2] = [("split", Peer::Ours), ("packed", Peer::OursPacked)];

/// Data that was checked and found correct.
#[derive(Debug, Default, Clone, Copy)]
pub struct Checked {
    /// Reads whose data was compared.
    pub reads: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Writes that were acknowledged.
    pub writes: u64,
}

impl Checked {
    fn add(&mut self, more: &Checked) {
        self.reads += more.reads;
        self.bytes += more.bytes;
        self.writes += more.writes;
    }
}

impl Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Checked {
            reads,
            bytes,
            writes,
        } = self;
        let requests = reads + writes;
        let mebibytes = bytes >> 20;
        write!(
            f,
            "{requests} requests, {reads} of them reads whose {mebibytes} MiB were as written"
        )
    }
}

/// Runs all combinations that `--rows` selects, each for the time of a measurement.
///
/// # Errors
/// Data that was read differs from what was written, a request failed, or `--rows` selects nothing.
pub fn run(options: &BlockOptions) -> Result<Checked, BenchError> {
    let go_on = until_interrupted()?;
    let (rounds, time) = options.common.times();
    let mut random = Rng::new();
    let mut total = Checked::default();
    let mut found = false;
    for place in Place::STORAGE {
        let mut storage = None;
        for round in 1..=rounds {
            for (engine, (ring, peer)) in ENGINES
                .into_iter()
                .flat_map(|engine| RINGS.map(|ring| (engine, ring)))
            {
                go_on()?;
                let name = format!("{}/{engine}/{ring}", place.name());
                if !is_wanted(&options.rows, &name) {
                    continue;
                }
                if !(Block { io_engine: engine }.is_possible()) {
                    eprintln!("{name}: this host has no {engine}");
                    continue;
                }
                found = true;
                let storage = match &mut storage {
                    Some(storage) => storage,
                    none => none.insert(Storage::new(place, options)?),
                };
                let checked = storage.verify(&name, engine, peer, time, &mut random)?;
                eprintln!("{name}, round {round} of {rounds}: {checked}");
                total.add(&checked);
            }
        }
    }
    match found {
        true => Ok(total),
        false => Err(BenchError::Nothing("place, engine and ring")),
    }
}

/// An image, and what it must hold.
struct Storage {
    image: Image,
    disk: Disk,
    _directory: tempfile::TempDir,
}

impl Storage {
    fn new(place: Place, options: &BlockOptions) -> Result<Self, BenchError> {
        let directory = place.directory(options)?;
        let image = Image::new(place, &directory);
        let file = File::create_new(&image.path).map_err(at(&image.path))?;
        file.set_len(IMAGE_SIZE as u64).map_err(at(&image.path))?;
        image.check()?;
        Ok(Storage {
            image,
            disk: Disk::new((IMAGE_SIZE / SECTOR_SIZE) as u64),
            _directory: directory,
        })
    }

    /// Runs one back-end on the image, and compares the image when it has ended.
    fn verify(
        &mut self,
        name: &str,
        engine: &str,
        peer: Peer,
        time: Duration,
        random: &mut Rng,
    ) -> Result<Checked, BenchError> {
        let socket = self.image.socket();
        let mut command = peer.command(&self.image, &socket, QUEUES)?;
        command.arg(format!("--io-engine={engine}"));
        let mut running = Running::start(&mut command, &socket)?;
        let checked = (|| {
            let front_end = connect(peer, &mut running, vec![(0, 32 << 20)])?;
            let checked = Driver::new(&front_end)?.run(&mut self.disk, time, random)?;
            Ok(checked)
        })()
        .map_err(|cause: AnyError| {
            BenchError::measurement(name.to_owned(), peer.name(), &running, &cause)
        })?;
        running.end()?;
        let mut bytes = Vec::with_capacity(IMAGE_SIZE);
        File::open(&self.image.path)
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .map_err(at(&self.image.path))?;
        self.disk.check(0, &bytes).map_err(|Loss(loss)| {
            let what = std::io::Error::other(format!("after {name}: {loss}"));
            at(&self.image.path)(what)
        })?;
        Ok(checked)
    }
}

/// A request in flight.
struct Pending {
    area: usize,
    prepared: Prepared,
    sectors: Range<u64>,
    /// The number of a write.
    write: Option<u32>,
}

/// A queue, and what is in flight there.
struct Lane {
    queue: Queue,
    areas: Vec<RequestArea>,
    free: Vec<usize>,
    /// By the heads of their chains.
    pending: HashMap<u16, Pending>,
}

/// The driver of all queues, in one thread.
struct Driver {
    memory: GuestMemory,
    lanes: Vec<Lane>,
    checked: Checked,
}

impl Driver {
    fn new(front_end: &FrontEnd) -> Result<Self, AnyError> {
        let memory = front_end.memory().clone();
        let lanes = (0..QUEUES).map(|index| {
            let size = (LARGEST as usize * SECTOR_SIZE) as u32;
            Ok(Lane {
                queue: front_end.queue(index, QUEUE_SIZE)?,
                areas: (0..DEPTH)
                    .map(|_| RequestArea::new(&memory, size))
                    .collect(),
                free: (0..DEPTH).collect(),
                pending: HashMap::new(),
            })
        });
        Ok(Driver {
            lanes: lanes.collect::<Result<_, AnyError>>()?,
            memory,
            checked: Checked::default(),
        })
    }

    /// Requests of all kinds for some time, and at last a read of all there is.
    fn run(
        mut self,
        disk: &mut Disk,
        time: Duration,
        random: &mut Rng,
    ) -> Result<Checked, AnyError> {
        let end = Instant::now() + time;
        self.drive(disk, || {
            let most = if random.u8(..4) == 0 { LARGEST } else { 16 };
            let count = random.u64(1..=most);
            let room = if random.bool() {
                CROWDED
            } else {
                IMAGE_SIZE as u64 / SECTOR_SIZE as u64
            };
            let first = random.u64(..=room - count);
            (Instant::now() < end).then(|| (random.bool(), first..first + count))
        })?;
        let mut chunks = (0..disk.sectors()).step_by(LARGEST as usize);
        self.drive(disk, || {
            let first = chunks.next()?;
            Some((false, first..first + LARGEST))
        })?;
        Ok(self.checked)
    }

    /// Executes the requests that `next` returns, as many at a time as there is room for, until it returns none. Leaves out
    /// requests that overlap a write in flight.
    fn drive(
        &mut self,
        disk: &mut Disk,
        mut next: impl FnMut() -> Option<(bool, Range<u64>)>,
    ) -> Result<(), AnyError> {
        let mut more = true;
        let mut progress = Instant::now();
        loop {
            let mut idle = true;
            for lane in &mut self.lanes {
                while let Some(used) = lane.queue.take_used() {
                    self.checked.add(&lane.check(disk, &self.memory, used)?);
                    idle = false;
                }
                while more && !lane.free.is_empty() {
                    match next() {
                        Some((write, sectors)) => lane.add(disk, &self.memory, write, sectors),
                        None => more = false,
                    }
                }
                lane.queue.publish();
                lane.queue.kick();
            }
            let Some(waiting) = self.lanes.iter_mut().find(|lane| !lane.pending.is_empty()) else {
                return Ok(());
            };
            if !idle {
                progress = Instant::now();
            } else if progress.elapsed() > LIMIT {
                return Err(format!("a request took longer than {LIMIT:?}").into());
            } else {
                // Not for long: another queue may make progress.
                waiting.queue.wait_used(Duration::from_millis(1));
            }
        }
    }
}

impl Lane {
    /// Adds a request, unless its sectors are in use.
    fn add(&mut self, disk: &mut Disk, memory: &GuestMemory, write: bool, sectors: Range<u64>) {
        let mut request = Request {
            sector: sectors.start,
            ..Default::default()
        };
        let (number, data);
        if write {
            let Some(begun) = disk.begin_write(&sectors) else {
                return;
            };
            (number, data) = (Some(begun.0), begun.1);
            (request.kind, request.data) = (OUT, &data);
        } else if disk.begin_read(&sectors) {
            number = None;
            request.kind = IN;
            request.reply_length = (sectors.end - sectors.start) as u32 * SECTOR_SIZE as u32;
        } else {
            return;
        }
        let area = self.free.pop().expect("there is room");
        let prepared = self.areas[area].prepare(memory, &request);
        let head = self
            .queue
            .add(&prepared.chain)
            .expect("the ring has room for the depth");
        let pending = Pending {
            area,
            prepared,
            sectors,
            write: number,
        };
        self.pending.insert(head, pending);
    }

    /// Checks the result of a request.
    fn check(
        &mut self,
        disk: &mut Disk,
        memory: &GuestMemory,
        used: Used,
    ) -> Result<Checked, AnyError> {
        let pending = self
            .pending
            .remove(&used.head)
            .ok_or("a request that was not sent was returned")?;
        let Pending {
            area,
            prepared,
            sectors,
            write,
        } = pending;
        let completion = prepared.completion(memory, used.length);
        let expected = prepared.reply_length + 1;
        if completion.status != OK as u8 || completion.length != expected {
            return Err(format!(
                "sectors {sectors:?}: status {} and used length {} instead of {OK} and {expected}",
                completion.status, completion.length
            )
            .into());
        }
        self.free.push(area);
        let mut checked = Checked::default();
        match write {
            Some(number) => {
                disk.acknowledge(&sectors, number);
                checked.writes = 1;
            }
            None => {
                disk.end_read(&sectors);
                disk.check(sectors.start, &completion.data)
                    .map_err(|Loss(loss)| loss)?;
                (checked.reads, checked.bytes) = (1, completion.data.len() as u64);
            }
        }
        Ok(checked)
    }
}
