// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI device: features, queues, config space, and its logical units.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::Value;
use vhost_device_common::device::{
    Arguments, CommandError, ConfigError, Device, Needs, StartError, StateError, Verb, Watcher,
};
use vhost_device_common::state;
use vhost_device_storage::disk::Disk;
use vhost_device_storage::engine::Engines;
use vhost_device_storage::image::Source;
use virtio_bindings::virtio_scsi::{VIRTIO_SCSI_F_CHANGE, VIRTIO_SCSI_F_HOTPLUG};

use crate::address::Address;
use crate::commands;
use crate::config::{Config, FIRST_REQUEST};
use crate::handler::ScsiHandler;
use crate::options::{DiskArguments, Options, PassThroughArguments};
use crate::passthrough::PassThrough;
use crate::request::KINDS;
use crate::reservations::Reservations;
use crate::saved::{MAX_STATE_SIZE, Saved};
use crate::shared::Shared;
use crate::target::TargetView;
use crate::unit::{Settings, Unit};

/// The most data segments of a request, if queues are large enough: what fits a ring of 128 without indirect descriptors.
const SEG_MAX: u16 = 126;

/// Files that are open beside those of disks, at most: sockets, eventfds, rings, guest memory.
const OPEN_FILES: u64 = 512;

/// The SCSI device.
pub struct Scsi {
    shared: Arc<Shared>,
    settings: Settings,
    queue_size: u16,
    engines: Engines,
}

impl Device for Scsi {
    const TYPE: &'static str = "scsi";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio SCSI host with disks";
    // Images are handed over when the last queue has stopped.
    const KEEPS_THREADS: bool = false;
    const SUSPENDS: bool = true;
    const STATE_VERSION: u32 = 1;
    const RELOADS: bool = true;
    const REQUESTS: &'static [&'static str] = KINDS;
    const VERBS: &'static [Verb] = commands::VERBS;

    type Options = Options;
    type Handler = ScsiHandler;

    fn open(options: Options) -> Result<Self, StartError> {
        let request_queues = options.num_queues;
        let settings = Settings {
            incoming: options.incoming,
            engine: options.io_engine,
            queues: FIRST_REQUEST + request_queues,
        };
        // A request also has a descriptor for its header and one for its response.
        let seg_max = options.queue_size.saturating_sub(2).clamp(1, SEG_MAX);
        let devices = open_devices(&options.passthrough)?;
        let limits = devices.iter().filter_map(|device| device.max_bytes);
        let max_bytes = limits.min().unwrap_or(u64::MAX);
        let config = Config::new(request_queues, seg_max.into(), max_bytes);
        let shared = Shared::new(config, devices);
        // Those with a target have the first choice.
        let (placed, others): (Vec<_>, Vec<_>) =
            options.disks.iter().partition(|disk| disk.target.is_some());
        for arguments in placed.into_iter().chain(others) {
            open_disk(&shared, arguments, settings)?;
        }
        Ok(Self {
            engines: Engines::open(None, options.io_engine, request_queues)?,
            shared,
            settings,
            queue_size: options.queue_size,
        })
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_SCSI_F_HOTPLUG | 1 << VIRTIO_SCSI_F_CHANGE
    }

    fn set_features(&self, accepted: u64) {
        self.shared.events().features = accepted;
    }

    fn expect_suspend(&self, expected: bool) {
        self.shared
            .expects_suspend
            .store(expected, Ordering::Relaxed);
        for unit in self.shared.table.units() {
            unit.disk.expect_suspend(expected);
        }
    }

    fn num_queues(&self) -> u16 {
        self.settings.queues
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn config(&self) -> Vec<u8> {
        self.shared.config.bytes()
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        match self.shared.config.write(offset, data) {
            true => Ok(()),
            false => Err(ConfigError { offset, size }),
        }
    }

    /// Control and events share the thread of the first request queue.
    fn thread_of(&self, queue: u16) -> u16 {
        self.engines.thread_of(queue.saturating_sub(FIRST_REQUEST))
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<ScsiHandler> {
        ScsiHandler::new(&self.shared, &self.engines, &watcher)
    }

    fn needs(&self) -> Needs {
        let mut needs = self.engines.needs();
        Disk::add_needs_to_open(&mut needs);
        Reservations::add_needs(&mut needs);
        if !self.shared.devices.is_empty() {
            PassThrough::add_needs(&mut needs);
        }
        let units = self.shared.table.units();
        for unit in &units {
            unit.disk.add_needs(&mut needs);
        }
        // The image, its lock, and its reservations; and what all devices open.
        needs.open_files = 3 * units.len() as u64 + OPEN_FILES;
        needs
    }

    fn reload(&self) {
        for unit in self.shared.table.units() {
            unit.disk.reload();
            self.shared.update_size(&unit);
        }
    }

    fn command(
        &self,
        name: &str,
        arguments: &Arguments,
        files: Vec<OwnedFd>,
    ) -> Result<Value, CommandError> {
        commands::execute(&self.shared, self.settings, name, arguments, files)
    }

    fn new_driver(&self) {
        for unit in self.shared.table.units() {
            unit.logical.reset();
        }
    }

    fn reset(&self) {
        self.shared.config.reset();
        self.shared.events().reset();
        self.new_driver();
    }

    fn max_state_size(&self) -> u64 {
        MAX_STATE_SIZE
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        match self.shared.devices.is_empty() {
            true => state::encode(&Saved::of(&self.shared)),
            false => Err(StateError::NotSaveable("a SCSI device of the host")),
        }
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        state::decode::<Saved>(state)?.restore(&self.shared)
    }
}

/// Opens the devices of the host.
fn open_devices(options: &[PassThroughArguments]) -> Result<Vec<Arc<PassThrough>>, StartError> {
    let mut devices: Vec<Arc<PassThrough>> = Vec::new();
    for arguments in options {
        let is_taken = |address: Address| devices.iter().any(|device| device.address == address);
        let lun = arguments.lun;
        let mut targets = (0..=u8::MAX).map(|target| Address { target, lun });
        let address = match arguments.target {
            Some(target) => Some(Address { target, lun }),
            None => targets.find(|address| !is_taken(*address)),
        };
        let free = address.filter(|address| !is_taken(*address));
        let address = free.ok_or_else(|| {
            let path = arguments.path.display();
            StartError(format!(
                "{path}: its address has a device already; give it another target= or lun="
            ))
        })?;
        let device = PassThrough::open(&arguments.path, address, arguments.read_only)?;
        devices.push(Arc::new(device));
    }
    Ok(devices)
}

/// Opens a disk of the command line.
fn open_disk(
    shared: &Arc<Shared>,
    arguments: &DiskArguments,
    settings: Settings,
) -> Result<(), StartError> {
    let path = arguments.file.clone().unwrap_or_default();
    let source = Source::path(path, "--disk file");
    let address = match arguments.target {
        Some(target) => Address {
            target,
            lun: arguments.lun,
        },
        None => Address {
            lun: arguments.lun,
            ..commands::free(shared)
        },
    };
    let reservations = arguments.reservations.as_deref();
    let reservations = reservations.map(|path| Reservations::open(path, settings.incoming));
    let reservations = reservations.transpose().map_err(StartError)?;
    let reservations = reservations.map(|(file, state)| (Arc::new(file), state));
    let file = reservations.as_ref().map(|(file, _)| Arc::clone(file));
    let target = TargetView::new(shared, address.target).with_reservations(file);
    let name = source.to_string();
    let unit = Unit::open(
        address,
        target.identity(),
        Arc::new(target),
        source,
        reservations,
        arguments,
        settings,
    )?;
    match commands::add(shared, unit) {
        Ok(()) => Ok(()),
        Err(what) => Err(StartError(format!("{name}: {what}"))),
    }
}
