// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device: features, config space and saved state.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vhost_device_common::device::{
    ConfigError, Device, FrontEnd, Needs, StartError, StateError, Watcher,
};
use vhost_device_common::{info_limited, lock, state, warn_limited};
use vhost_device_storage::disk::Disk;
use vhost_device_storage::engine::{Engine, Engines};
use vhost_device_storage::image::{DiscardLimits, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE};
use vhost_device_storage::operation::Operation;
use vhost_device_storage::throttle::Throttle;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::caching::Caching;
use crate::handler::BlockHandler;
use crate::options::Options;
use crate::request::{KINDS, MAX_SEGMENTS};
use crate::shared::Shared;

/// Bytes of the config space without the fields of features that are not offered.
const CONFIG_SIZE: usize = 60;
/// The offset of `writeback` in it.
const WRITEBACK: usize = 32;
/// The most data segments of a request, if queues are large enough: what fits a ring of 128 without indirect descriptors.
const SEG_MAX: u16 = 126;

/// The saved state of the device, version 1.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// The driver chose write-back caching. If this were lost, writes that the driver believes to be on stable storage could be lost too.
    writeback: bool,
}

/// The block device.
pub struct Block {
    shared: Arc<Shared>,
    options: Options,
    engines: Engines,
    throttle: Option<Arc<Throttle>>,
}

impl Device for Block {
    const TYPE: &'static str = "block";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio block device";
    // The image is handed over when the last queue has stopped.
    const KEEPS_THREADS: bool = false;
    const SUSPENDS: bool = true;
    const STATE_VERSION: u32 = 1;
    const RELOADS: bool = true;
    const REQUESTS: &'static [&'static str] = KINDS;

    type Options = Options;
    type Handler = BlockHandler;

    fn capabilities() -> Vec<&'static str> {
        vec!["read-only", "blk-file"]
    }

    fn open(options: Options) -> Result<Self, StartError> {
        let (engine, queues) = (options.io_engine, options.num_queues);
        let disk = Disk::open(options.source(), &options.disk, options.incoming, engine)?;
        let engines = Engines::open(Some(&disk), engine, queues)?;
        let throttle = Throttle::open(&options.disk, queues);
        let serial = options.serial.clone();
        let serial = serial.unwrap_or_else(|| disk.serial());
        let caching = Caching::new();
        Ok(Self {
            shared: Arc::new(Shared {
                disk,
                caching,
                serial,
                front_end: Mutex::default(),
            }),
            options,
            engines,
            throttle: throttle.map(Arc::new),
        })
    }

    fn features(&self) -> u64 {
        let disk = &self.shared.disk;
        let read_write = if disk.check_writable().is_err() {
            1 << VIRTIO_BLK_F_RO
        } else {
            let discards = disk.discard_limits().is_some();
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
        self.shared.caching.set_features(accepted);
    }

    fn expect_suspend(&self, expected: bool) {
        self.shared.disk.expect_suspend(expected);
    }

    fn num_queues(&self) -> u16 {
        self.options.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.options.queue_size
    }

    /// `struct virtio_blk_config` (VIRTIO 1.3, 5.2.4).
    fn config(&self) -> Vec<u8> {
        let Shared { disk, caching, .. } = &*self.shared;
        let block = self.options.disk.logical_block_size;
        let physical = disk.physical_block_size();
        let blocks = physical / block;
        // Without discards the driver does not read these fields.
        let discard = disk
            .discard_limits()
            .unwrap_or(DiscardLimits::of_file(physical));
        // A request also has a descriptor for its header and one for its status.
        let seg_max = (self.options.queue_size.saturating_sub(2)).clamp(1, SEG_MAX);
        let mut config = Vec::with_capacity(CONFIG_SIZE);
        config.extend((disk.size() / SECTOR_SIZE).to_le_bytes()); // capacity
        config.extend(0u32.to_le_bytes()); // size_max: not offered
        config.extend(u32::from(seg_max).to_le_bytes());
        config.extend([0; 4]); // geometry: not offered
        config.extend(block.to_le_bytes()); // blk_size
        config.push(blocks.trailing_zeros() as u8); // physical_block_exp
        config.push(0); // alignment_offset
        config.extend((blocks as u16).to_le_bytes()); // min_io_size
        config.extend(0u32.to_le_bytes()); // opt_io_size: no size is best
        config.push(caching.is_writeback().into());
        config.push(0);
        config.extend(self.options.num_queues.to_le_bytes());
        config.extend(discard.max_sectors.to_le_bytes());
        config.extend((MAX_SEGMENTS as u32).to_le_bytes());
        config.extend(discard.alignment.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        config.extend((MAX_SEGMENTS as u32).to_le_bytes());
        config.push(disk.zeroes_may_unmap().into()); // write_zeroes_may_unmap
        config.extend([0; 3]);
        config
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        let (WRITEBACK, &[writeback @ (0 | 1)]) = (offset, data) else {
            return Err(ConfigError { offset, size });
        };
        let before = self.shared.caching.choose(writeback == 1);
        if before
            && writeback == 0
            && let Err(error) = self.shared.disk.execute(Operation::Flush)
        {
            // The driver expects earlier writes to be as safe as later ones. If they are not, later ones fail too.
            warn_limited(format_args!(
                "flush for write-through caching failed: {error}"
            ));
        }
        Ok(())
    }

    fn connected(&self, front_end: &FrontEnd) {
        lock(&self.shared.front_end).clone_from(front_end);
    }

    fn reload(&self) {
        if self.shared.disk.reload() {
            lock(&self.shared.front_end).config_changed();
        }
    }

    fn thread_of(&self, queue: u16) -> u16 {
        self.engines.thread_of(queue)
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<BlockHandler> {
        let disk = &self.shared.disk;
        let mut access = disk.access();
        match self.shared.open(&mut access) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                info_limited(format_args!(
                    "waiting until the requests that were suspended have ended"
                ));
            }
            opened => opened?,
        }
        let engine = Engine::new(&self.engines, Some(disk), &watcher)?;
        let (shared, throttle) = (Arc::clone(&self.shared), self.throttle.clone());
        Ok(BlockHandler::new(shared, engine, throttle, access))
    }

    fn needs(&self) -> Needs {
        let mut needs = self.engines.needs();
        self.shared.disk.add_needs(&mut needs);
        needs
    }

    fn reset(&self) {
        self.shared.caching.reset();
    }

    fn kept(&self) -> u8 {
        self.shared.caching.kept()
    }

    fn set_kept(&self, kept: Option<u8>) {
        self.shared.caching.set_kept(kept);
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let writeback = self.shared.caching.is_writeback();
        state::encode(&Saved { writeback })
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let Saved { writeback } = state::decode(state)?;
        self.shared.caching.choose(writeback);
        Ok(())
    }
}
