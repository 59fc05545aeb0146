// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device: features, config space, and what its queues share.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vhost_device_common::device::{
    Call, ConfigChange, ConfigError, Device, Needs, StartError, StateError,
};
use vhost_device_common::{state, warn_limited};
use vhost_device_storage::engine::{Engine, Engines};
use vhost_device_storage::image::{Image, Measured, SECTOR_SIZE, discard};
use vhost_device_storage::lock;
use vhost_device_storage::operation::{Operation, discard_call};
use vhost_device_storage::options::{Discard, IoEngine};
use vhost_device_storage::throttle::{Limit, Throttle};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::handler::BlockHandler;
use crate::options::Options;
use crate::request::{KINDS, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, Status};

/// Bytes of the config space without the fields of features that are not offered.
const CONFIG_SIZE: usize = 60;
/// Place of `writeback` in it.
const WRITEBACK: usize = 32;
/// Most data segments of a request, where queues are large enough: what fits a ring of 128 without indirect descriptors.
const SEG_MAX: u16 = 126;

/// What is kept of a driver's choice of caching.
const WRITE_BACK: u8 = 1;
const WRITE_THROUGH: u8 = 2;

/// The disk, as all queues see it.
pub struct Disk {
    pub image: Arc<Image>,
    pub read_only: bool,
    pub serial: String,
    pub discard: Discard,
    io_engine: IoEngine,
    /// Features that the driver accepted.
    features: AtomicU64,
    /// The driver chose write-back caching in the config space.
    writeback: AtomicBool,
    /// What it chose last on this connection, as [`Device::kept`] tells: nothing, [`WRITE_BACK`] or [`WRITE_THROUGH`].
    chosen: AtomicU8,
}

impl Disk {
    /// The offset of `sector`, if `length` bytes from there are whole sectors of the disk.
    pub fn locate(&self, sector: u64, length: u64) -> Result<u64, Status> {
        sector
            .checked_mul(SECTOR_SIZE)
            .filter(|_| length.is_multiple_of(SECTOR_SIZE))
            .filter(|offset| {
                offset
                    .checked_add(length)
                    .is_some_and(|end| end <= self.image.size())
            })
            .ok_or(Status::IoError)
    }

    /// Whether the kernel takes this memory as it is.
    pub fn is_aligned(&self, iovecs: &[libc::iovec]) -> bool {
        let Some(direct) = self.image.direct else {
            return true;
        };
        iovecs.iter().all(|iovec| {
            iovec.iov_base.addr().is_multiple_of(direct.memory as usize)
                && iovec.iov_len.is_multiple_of(direct.offset as usize)
        })
    }

    /// Whether a write must be on stable storage before it is answered (VIRTIO 1.3, 5.2.6.2).
    pub fn is_write_through(&self) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        if features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 {
            !self.writeback.load(Ordering::Relaxed)
        } else {
            features & 1 << VIRTIO_BLK_F_FLUSH == 0
        }
    }

    /// The driver chooses. Returns whether there was write-back caching before.
    fn choose(&self, writeback: bool) -> bool {
        let chosen = if writeback { WRITE_BACK } else { WRITE_THROUGH };
        self.chosen.store(chosen, Ordering::Relaxed);
        self.writeback.swap(writeback, Ordering::Relaxed)
    }

    /// Whether discards are ioctls.
    pub fn takes_ioctls(&self) -> bool {
        self.image.is_device && !self.read_only && self.discard == Discard::Unmap
    }

    /// Whether operations are carried out at once: those on memory wait for nothing.
    pub fn is_inline(&self) -> bool {
        self.image.in_memory && self.io_engine == IoEngine::Auto
    }
}

/// What a guest leaves in the device, version 1.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// [`Disk::writeback`]: to write back what the driver believes to be written through would be to lose it.
    writeback: bool,
}

/// The block device.
pub struct Block {
    disk: Arc<Disk>,
    options: Options,
    engines: Engines,
    throttle: Option<Arc<Throttle>>,
    /// Tells the front-end that the disk has grown.
    config_change: Mutex<Option<ConfigChange>>,
}

impl Block {
    /// Measures the image again. What came of it is logged, but for `silent` if nothing did.
    fn measure(&self, silent: bool) {
        let (disk, path) = (&self.disk, &self.disk.image.source);
        match disk.image.measure() {
            Ok(Measured::Same) if silent => {}
            Ok(Measured::Same) => log::info!(
                "{path}: the disk stays as large as it is: {} bytes",
                disk.image.size()
            ),
            Ok(Measured::Grown { before, now }) => {
                log::info!("{path}: the disk grows from {before} to {now} bytes");
                if let Some(config_change) = &*self.config_change() {
                    config_change.send();
                }
            }
            Ok(Measured::Smaller { now }) => log::warn!(
                "{path}: the image has only {now} bytes now, but the disk keeps the {} that its guest knows of, and what is read \
                 beyond the end of the image fails; give the image its length back, or start this program anew for a guest \
                 that starts anew",
                disk.image.size()
            ),
            Err(error) => log::warn!("{path}: cannot find out its size: {error}"),
        }
    }

    fn config_change(&self) -> MutexGuard<'_, Option<ConfigChange>> {
        self.config_change
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Block {
    const TYPE: &'static str = "block";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio block device";
    // The image is handed over when the last queue has stopped.
    const KEEPS_THREADS: bool = false;
    const STATE_VERSION: u32 = 1;
    const RELOADS: bool = true;
    const REQUESTS: &'static [&'static str] = KINDS;

    type Options = Options;
    type Handler = BlockHandler;

    fn capabilities() -> Vec<&'static str> {
        vec!["read-only", "blk-file"]
    }

    fn open(options: Options) -> Result<Self, StartError> {
        let image = Image::open(options.source(), &options.disk, options.incoming)?;
        let image = Arc::new(image);
        let engines = Engines::open(&image, options.io_engine, options.num_queues)?;
        log::debug!(
            "{}: {} bytes{}",
            image.source,
            image.size(),
            if options.disk.read_only {
                ", read-only"
            } else {
                ""
            }
        );
        let serial = options.serial.clone();
        let serial = serial.unwrap_or_else(|| image.identity.serial());
        let disk = Arc::new(Disk {
            image,
            read_only: options.disk.read_only,
            serial,
            discard: options.disk.discard,
            io_engine: options.io_engine,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            chosen: AtomicU8::new(0),
        });
        let limit = |rate: Option<u64>, burst| rate.map(|rate| Limit { rate, burst });
        let requests = limit(options.disk.iops, options.disk.iops_burst);
        let bytes = limit(options.disk.bps, options.disk.bps_burst);
        let throttle = Throttle::new(requests, bytes, options.num_queues);
        Ok(Self {
            disk,
            options,
            engines,
            throttle: throttle.map(Arc::new),
            config_change: Mutex::default(),
        })
    }

    fn features(&self) -> u64 {
        let discards =
            self.disk.image.discard.is_some() || self.options.disk.discard == Discard::Ignore;
        let read_write = if self.options.disk.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            u64::from(discards) << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        read_write
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
            | 1 << VIRTIO_BLK_F_MQ
    }

    fn set_features(&self, accepted: u64) {
        self.disk.features.store(accepted, Ordering::Relaxed);
        let has = |bit: u32| accepted & 1 << bit != 0;
        if has(VIRTIO_BLK_F_CONFIG_WCE) && !has(VIRTIO_BLK_F_FLUSH) {
            // A driver that cannot flush starts with write-through (VIRTIO 1.3, 5.2.5.2).
            self.disk.writeback.store(false, Ordering::Relaxed);
        }
    }

    fn num_queues(&self) -> u16 {
        self.options.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.options.queue_size
    }

    /// `struct virtio_blk_config` (VIRTIO 1.3, 5.2.4).
    fn config(&self) -> Vec<u8> {
        let disk = &self.disk;
        let block = self.options.disk.logical_block_size;
        let physical = disk.image.physical_block_size;
        let blocks = physical / block;
        let writeback = disk.writeback.load(Ordering::Relaxed);
        let discard = disk.image.discard;
        let discard = discard.unwrap_or(discard::Limits::of_file(physical));
        let unmap = self.options.disk.discard == Discard::Unmap;
        // A request has a descriptor for its header and one for its status too.
        let seg_max = (self.options.queue_size.saturating_sub(2)).clamp(1, SEG_MAX);
        let mut config = Vec::with_capacity(CONFIG_SIZE);
        config.extend((disk.image.size() / SECTOR_SIZE).to_le_bytes()); // capacity
        config.extend(0u32.to_le_bytes()); // size_max: not offered
        config.extend(u32::from(seg_max).to_le_bytes());
        config.extend([0; 4]); // geometry: not offered
        config.extend(block.to_le_bytes()); // blk_size
        config.push(blocks.trailing_zeros() as u8); // physical_block_exp
        config.push(0); // alignment_offset
        config.extend((blocks as u16).to_le_bytes()); // min_io_size
        config.extend(0u32.to_le_bytes()); // opt_io_size: none is best
        config.push(writeback.into());
        config.push(0);
        config.extend(self.options.num_queues.to_le_bytes());
        config.extend(discard.max_sectors.to_le_bytes());
        config.extend((MAX_SEGMENTS as u32).to_le_bytes());
        config.extend(discard.alignment.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        config.extend((MAX_SEGMENTS as u32).to_le_bytes());
        config.push(unmap.into()); // write_zeroes_may_unmap
        config.extend([0; 3]);
        config
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        let (WRITEBACK, &[writeback @ (0 | 1)]) = (offset, data) else {
            return Err(ConfigError { offset, size });
        };
        let before = self.disk.choose(writeback == 1);
        if before
            && writeback == 0
            && let image = &self.disk.image
            && let Err(error) = image.syncs.execute(&image.file, Operation::Flush)
        {
            // What was written so far is to be as safe as what comes, or else that fails too.
            warn_limited(format_args!(
                "flush for write-through caching failed: {error}"
            ));
        }
        Ok(())
    }

    fn set_config_change(&self, config_change: ConfigChange) {
        *self.config_change() = Some(config_change);
    }

    fn reload(&self) {
        let image = &self.disk.image;
        if let Some(what) = image.is_elsewhere() {
            log::warn!(
                "{}: {what}; the guest keeps the disk that was opened at the start, until this program is started anew",
                image.source
            );
        }
        self.measure(false);
    }

    fn thread_of(&self, queue: u16) -> u16 {
        self.engines.thread_of(queue)
    }

    fn handler(&self, _thread: u16) -> io::Result<BlockHandler> {
        let in_use = self.disk.image.lock.begin()?;
        if in_use.is_taken_over() {
            // The one that had it may have seen it grow.
            self.measure(true);
        }
        let engine = Engine::new(&self.engines, &self.disk.image)?;
        let helper = match self.engines {
            Engines::IoUring(..) if self.disk.takes_ioctls() => {
                Some(Engine::new(&Engines::Threads, &self.disk.image)?)
            }
            _ => None,
        };
        let (disk, throttle) = (Arc::clone(&self.disk), self.throttle.clone());
        BlockHandler::new(disk, engine, helper, throttle, in_use)
    }

    fn needs(&self) -> Needs {
        let mut needs = self.engines.needs();
        if self.disk.takes_ioctls() {
            needs.queue.push(discard_call());
            let helper = needs.helper.get_or_insert_default();
            helper.push(discard_call());
        }
        // The last queue to end lets go of the image.
        needs.session.extend(lock::calls());
        needs.queue.extend(lock::calls());
        // Looks what the path names, measures the image, and tells the front-end.
        let control = [
            libc::SYS_lseek,
            libc::SYS_sendmsg,
            libc::SYS_statx,
            libc::SYS_newfstatat,
        ];
        needs.control = control.map(Call::new).to_vec();
        needs
    }

    fn reset(&self) {
        self.disk.features.store(0, Ordering::Relaxed);
        // QEMU keeps a copy of the choice over resets, and tells it to the next driver.
        let writeback = self.kept() != WRITE_THROUGH;
        self.disk.writeback.store(writeback, Ordering::Relaxed);
    }

    fn kept(&self) -> u8 {
        self.disk.chosen.load(Ordering::Relaxed)
    }

    /// What makes no sense may have been write-through.
    fn set_kept(&self, kept: Option<u8>) {
        let disk = &self.disk;
        match kept {
            Some(0) => {
                disk.chosen.store(0, Ordering::Relaxed);
                disk.writeback.store(true, Ordering::Relaxed);
            }
            Some(WRITE_BACK) => _ = disk.choose(true),
            Some(WRITE_THROUGH) => _ = disk.choose(false),
            _ => {
                disk.choose(false);
                log::info!(
                    "nobody knows whether this driver chose write-through caching before: writes are written through until it chooses again"
                );
            }
        }
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let writeback = self.disk.writeback.load(Ordering::Relaxed);
        state::encode(&Saved { writeback })
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let Saved { writeback } = state::decode(state)?;
        self.disk.choose(writeback);
        Ok(())
    }
}
