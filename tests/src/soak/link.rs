// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end, the connection to it, and its rings.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::back_end::BackEnd;
use super::loss::{Loss, patience};
use super::report::{Starts, Tally};
use crate::front_end::connection::{VERSION, message};
use crate::front_end::device::RING_PACKED;
use crate::front_end::{DirtyLog, FrontEnd, GuestMemory, Options, Queue, QueueOptions};

/// Address of the removable memory. It changes each time: no driver reuses an address while requests point to it.
const MOVING: u64 = 1 << 36;
/// Its size.
pub const MOVING_SIZE: usize = 4 << 20;

/// The current log, and its start.
pub type Logging = Option<(Instant, DirtyLog)>;

/// A connected device. Each new driver chooses split or packed rings, and keeps the choice until it starts again.
pub struct Link {
    /// The process.
    pub back_end: BackEnd,
    /// The connection.
    pub front_end: FrontEnd,
    /// The running rings.
    pub queues: Vec<Queue>,
    /// The same in the other format.
    others: Vec<Queue>,
    /// How often the rings were started.
    starts: Starts,
    /// The inflight region, for the next device.
    inflight: (VhostUserInflight, File),
    /// The removable memory, while it is there.
    pub(super) moving: Option<u64>,
    next_moving: u64,
    /// The log of the device.
    pub(super) logging: Logging,
    /// Other connected clients.
    pub(super) garbage: Vec<UnixStream>,
}

impl Link {
    /// Connects to a back-end, and starts rings of these sizes. `memory` is the memory of the guest beside the rings.
    pub fn new(
        back_end: BackEnd,
        sizes: &[u16],
        memory: &[(u64, usize)],
        random: &mut Rng,
    ) -> Result<Self, Loss> {
        let defaults = Options::default();
        let options = Options {
            features: defaults.features | RING_PACKED,
            memory: memory.to_vec(),
            timeout: patience(),
            ..defaults
        };
        let mut front_end = FrontEnd::connect(back_end.socket(), &options)?;
        let queues = |front_end: &FrontEnd| -> Vec<Queue> {
            let queue = |&size| {
                let options = QueueOptions {
                    indirect: front_end.queue_options(size).indirect.min(8),
                    ..front_end.queue_options(size)
                };
                Queue::new(front_end.memory(), options)
            };
            sizes.iter().map(queue).collect()
        };
        let packed = queues(&front_end);
        front_end.set_features(front_end.features() & !RING_PACKED)?;
        let split = queues(&front_end);
        let most = sizes.iter().copied().max().unwrap_or_default();
        let inflight = inflight(&front_end, sizes.len() as u16, most)?;
        let mut link = Self {
            queues: split,
            others: packed,
            starts: Starts::default(),
            back_end,
            front_end,
            inflight,
            moving: None,
            next_moving: MOVING,
            logging: None,
            garbage: Vec::new(),
        };
        link.renew(random)?;
        Ok(link)
    }

    /// Returns how often the rings were started.
    pub fn starts(&self) -> Starts {
        self.starts
    }

    /// Returns whether the rings that run are packed.
    fn is_packed(&self) -> bool {
        self.front_end.features() & RING_PACKED != 0
    }

    /// Returns guest memory.
    pub fn memory(&self) -> &GuestMemory {
        self.front_end.memory()
    }

    /// Returns the address of the removable memory, while it is there.
    pub fn moving(&self) -> Option<u64> {
        self.moving
    }

    pub(super) fn start_all(&mut self, bases: &[u32]) -> Result<(), Loss> {
        match self.is_packed() {
            true => self.starts.packed += 1,
            false => self.starts.split += 1,
        }
        let (inflight, file) = &self.inflight;
        self.front_end
            .call()
            .set_inflight_fd(inflight, file.as_raw_fd())?;
        // Enabled after all have started, as QEMU does: a driver may start again where some of them had stopped.
        for (index, base) in bases.iter().enumerate() {
            self.start(index, *base)?;
        }
        (0..bases.len()).try_for_each(|index| self.enable(index, true))
    }

    pub(super) fn start(&self, index: usize, base: u32) -> Result<(), Loss> {
        let (queue, front_end) = (&self.queues[index], &self.front_end);
        front_end.configure(index, queue, base)?;
        if self.logging.is_some() {
            self.log_ring(index, true)?;
        }
        front_end.call().set_vring_kick(index, queue.kick_fd())?;
        Ok(())
    }

    pub(super) fn enable(&self, index: usize, enabled: bool) -> Result<(), Loss> {
        Ok(self.front_end.enable(index, enabled)?)
    }

    /// Starts all rings after a crash of the back-end: their positions are in the inflight region.
    pub(super) fn start_unknown(&mut self) -> Result<(), Loss> {
        self.start_all(&vec![0; self.queues.len()])
    }

    /// Stops a ring. All requests that the device has taken must have been returned.
    pub(super) fn stop(&self, index: usize) -> Result<u32, Loss> {
        let base = self.front_end.stop(index)?;
        // The base of a packed ring has both positions: of the next available descriptor, and of the next used one.
        let used = match self.is_packed() {
            true => base >> 16 | base & 0xffff_0000,
            false => self.queues[index].split().used_index().into(),
        };
        match base == used {
            true => Ok(base),
            false => Err(Loss(format!(
                "queue {index}: GET_VRING_BASE returns {base:#x}, but the used position is {used:#x}"
            ))),
        }
    }

    pub(super) fn stop_all(&self) -> Result<Vec<u32>, Loss> {
        (0..self.queues.len())
            .map(|index| self.enable(index, false).and_then(|()| self.stop(index)))
            .collect()
    }

    /// Connects to the same back-end, or another one, with the same memory.
    pub(super) fn connect(&mut self) -> Result<(), Loss> {
        let options = Options {
            timeout: patience(),
            features: self.front_end.features(),
            ..Options::default()
        };
        let memory = self.memory().clone();
        self.logging = None;
        self.front_end = FrontEnd::connect_with_memory(self.back_end.socket(), &options, memory)?;
        Ok(())
    }

    /// Disconnects, and samples what the process holds without a connection.
    pub(super) fn disconnect(&mut self, tally: &Tally) -> Result<(), Loss> {
        self.front_end.disconnect();
        self.garbage.clear();
        tally.sample(self.back_end.wait_until_idle()?);
        Ok(())
    }

    /// Resets the rings for a driver that starts again, and may choose the other format.
    pub(super) fn renew(&mut self, random: &mut Rng) -> Result<(), Loss> {
        if random.bool() {
            std::mem::swap(&mut self.queues, &mut self.others);
            let features = self.front_end.features() ^ RING_PACKED;
            self.front_end.set_features(features)?;
            if self.logging.is_some() {
                self.front_end.log_writes(true)?;
            }
        }
        self.queues.iter_mut().for_each(Queue::reset);
        self.renew_inflight()?;
        let bases: Vec<u32> = self
            .queues
            .iter()
            .map(|queue| queue.options().start())
            .collect();
        self.start_all(&bases)
    }

    /// Clears the inflight region.
    pub(super) fn renew_inflight(&mut self) -> Result<(), Loss> {
        let (old, _) = self.inflight;
        self.inflight = inflight(&self.front_end, old.num_queues, old.queue_size)?;
        Ok(())
    }

    pub(super) fn add_moving(&mut self) -> u64 {
        let address = self.next_moving;
        self.next_moving += MOVING_SIZE as u64;
        self.moving = Some(address);
        address
    }

    /// Connects other clients, which send garbage, and may stay until the next front-end connects.
    pub(super) fn send_garbage(&mut self, random: &mut Rng) -> Result<(), Loss> {
        for _ in 0..random.usize(1..4) {
            let stream = UnixStream::connect(self.back_end.socket())?;
            stream.set_write_timeout(Some(Duration::from_millis(100)))?;
            let mut bytes = vec![0; random.usize(..300)];
            random.fill(&mut bytes);
            if random.bool() {
                bytes = message(random.u32(..48), VERSION | random.u32(..16), &bytes);
            }
            // The back-end may refuse them.
            let _ = (&stream).write_all(&bytes);
            if self.garbage.len() < 4 && random.bool() {
                self.garbage.push(stream);
            }
        }
        Ok(())
    }
}

/// Creates an inflight region for new rings.
fn inflight(
    front_end: &FrontEnd,
    queues: u16,
    size: u16,
) -> Result<(VhostUserInflight, File), Loss> {
    let wanted = VhostUserInflight::new(0, 0, queues, size);
    let (inflight, file) = front_end.call().get_inflight_fd(&wanted)?;
    // The copy is not inherited by programs that are started.
    Ok((inflight, file.try_clone()?))
}
