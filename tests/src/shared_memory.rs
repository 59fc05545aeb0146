// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device with shared memory: its driver says what to map, and learns what came of it once the front-end has replied.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_common::chain::Chain;
use vhost_device_common::device::{
    Call, Device, FrontEnd, Mapping, Needs, QueueHandler, Replies, SharedMemoryError, SharedRange,
    SharedRegion, StartError, Watcher,
};
use vhost_device_common::worker::{Queue, Queues, Readiness};
use vm_memory::ByteValued;

/// The program.
pub const PROGRAM: &str = "shared-memory-device";

/// Its regions. QEMU aborts unless the sum of their sizes is a power of two.
pub const REGIONS: [SharedRegion; 2] = [
    SharedRegion {
        id: 0,
        size: 1 << 20,
    },
    SharedRegion {
        id: 7,
        size: 1 << 20,
    },
];

/// Bytes of the file that is mapped.
pub const FILE_SIZE: u64 = 1 << 20;

/// What the file has at `offset`: each word is another.
pub fn pattern(offset: u64) -> u32 {
    0xa5c3_0000 | (offset / 4) as u32 & 0xffff
}

/// The first readable bytes of a request. One without them maps the first page of the file to the beginning of region 0, if it is
/// not there yet.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Command {
    /// [`MAP`], [`UNMAP`] or [`NOTIFY`].
    pub kind: u64,
    /// Id of the region.
    pub region: u64,
    /// First byte in the region.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// First byte in the file.
    pub file_offset: u64,
    /// Not 0 for a mapping that the guest can write to.
    pub writable: u64,
}

// SAFETY: these are u64, without padding.
unsafe impl ByteValued for Command {}

/// Maps a part of the file.
pub const MAP: u64 = 1;
/// Unmaps what was mapped there.
pub const UNMAP: u64 = 2;
/// Tells the front-end of a change in the config space.
pub const NOTIFY: u64 = 3;

/// The byte that a request is answered with.
pub fn status(outcome: Result<(), SharedMemoryError>) -> u8 {
    match outcome {
        Ok(()) => 0,
        Err(SharedMemoryError::Unsupported) => 1,
        Err(SharedMemoryError::Range) => 2,
        Err(SharedMemoryError::Busy) => 3,
        Err(SharedMemoryError::Refused) => 4,
        Err(SharedMemoryError::Stopped) => 5,
        Err(SharedMemoryError::Closed) => 6,
    }
}

/// Options of the program.
#[derive(clap::Args)]
pub struct Options {}

/// The device.
pub struct SharedMemory(Arc<Shared>);

struct Shared {
    front_end: Mutex<FrontEnd>,
    /// What it maps.
    file: OwnedFd,
    replies: Replies,
    /// Whether the first page is mapped.
    is_page_mapped: AtomicBool,
}

impl Shared {
    fn front_end(&self) -> FrontEnd {
        let front_end = self.front_end.lock();
        front_end.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The first page, which requests without a command are about.
const PAGE: SharedRange = SharedRange {
    region: 0,
    offset: 0,
    length: 4096,
};
/// The number of a request that [`Device::reload`] makes.
const RELOAD: u64 = 0;
const REPLIES: u32 = 0;

impl Device for SharedMemory {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = PROGRAM;
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "A device with shared memory, for tests";
    const RELOADS: bool = true;

    type Options = Options;
    type Handler = Handler;

    fn open(Options {}: Options) -> Result<Self, StartError> {
        let open = || -> io::Result<Shared> {
            let file = memfd_create("pattern", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, FILE_SIZE)?;
            let words = (0..FILE_SIZE).step_by(4);
            let bytes: Vec<u8> = words.flat_map(|at| pattern(at).to_le_bytes()).collect();
            rustix::io::pwrite(&file, &bytes, 0)?;
            Ok(Shared {
                front_end: Mutex::default(),
                file,
                replies: Replies::new()?,
                is_page_mapped: AtomicBool::new(false),
            })
        };
        open()
            .map(|shared| Self(Arc::new(shared)))
            .map_err(|error| StartError(format!("cannot make the file: {error}")))
    }

    fn num_queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        vec![0; 4]
    }

    fn shared_memory(&self) -> Vec<SharedRegion> {
        REGIONS.to_vec()
    }

    fn connected(&self, front_end: &FrontEnd) {
        if let Ok(mut place) = self.0.front_end.lock() {
            place.clone_from(front_end);
        }
    }

    /// The front-end has unmapped all.
    fn new_driver(&self) {
        self.0.is_page_mapped.store(false, Ordering::Relaxed);
    }

    fn reset(&self) {
        self.new_driver();
    }

    /// Unmaps the first page.
    fn reload(&self) {
        let asked = self.0.front_end().unmap(PAGE, &self.0.replies, RELOAD);
        log::info!("asked to unmap: {asked:?}");
    }

    fn needs(&self) -> Needs {
        Needs {
            control: vec![Call::new(libc::SYS_sendmsg)],
            ..Needs::default()
        }
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<Handler> {
        watcher.add(&self.0.replies, Readiness::READABLE, REPLIES)?;
        Ok(Handler {
            shared: Arc::clone(&self.0),
            held: HashMap::new(),
            number: RELOAD,
        })
    }
}

/// What works on both queues.
pub struct Handler {
    shared: Arc<Shared>,
    /// Requests that wait for a reply, by its number, with their queues, and whether they are about the first page.
    held: HashMap<u64, (u16, Chain, bool)>,
    number: u64,
}

impl Handler {
    /// Carries a request out, or has the front-end do so.
    fn begin(&mut self, command: &Command) -> Option<Result<(), SharedMemoryError>> {
        let front_end = self.shared.front_end();
        let range = SharedRange {
            region: command.region as u8,
            offset: command.offset,
            length: command.length,
        };
        self.number += 1;
        let asked = match command.kind {
            MAP => front_end.map(
                &Mapping {
                    range,
                    file: self.shared.file.as_fd(),
                    file_offset: command.file_offset,
                    writable: command.writable != 0,
                },
                &self.shared.replies,
                self.number,
            ),
            UNMAP => front_end.unmap(range, &self.shared.replies, self.number),
            NOTIFY => {
                front_end.config_changed();
                return Some(Ok(()));
            }
            _ => return Some(Ok(())),
        };
        asked.err().map(Err)
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = queue.take() {
            let page = Command {
                kind: match self.shared.is_page_mapped.load(Ordering::Relaxed) {
                    true => 0,
                    false => MAP,
                },
                length: PAGE.length,
                ..Command::default()
            };
            let is_page = chain.readable_len() == 0;
            let command = match is_page {
                true => page,
                false => chain.read_object().unwrap_or_default(),
            };
            match self.begin(&command) {
                None => {
                    let held = (queue.index(), chain, is_page);
                    self.held.insert(self.number, held);
                }
                Some(outcome) => complete(queue, chain, outcome),
            }
        }
    }

    fn ready(&mut self, _token: u32, _readiness: Readiness, queues: &mut Queues) {
        for reply in self.shared.replies.take() {
            log::info!("reply {}: {:?}", reply.number, reply.outcome);
            if reply.number == RELOAD {
                continue;
            }
            let Some((index, chain, is_page)) = self.held.remove(&reply.number) else {
                continue;
            };
            if is_page {
                let is_mapped = reply.outcome.is_ok();
                self.shared
                    .is_page_mapped
                    .store(is_mapped, Ordering::Relaxed);
            }
            if let Some(queue) = queues.get_mut(index) {
                complete(queue, chain, reply.outcome);
            }
        }
    }
}

fn complete(queue: &mut Queue, mut chain: Chain, outcome: Result<(), SharedMemoryError>) {
    let written = chain.write(&[status(outcome)]);
    queue.complete(chain, if written.is_ok() { 1 } else { 0 });
}
