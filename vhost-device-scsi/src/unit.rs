// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A logical unit and its disk.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_device_common::device::StartError;
use vhost_device_common::warn_limited;
use vhost_device_storage::disk::Disk;
use vhost_device_storage::image::{MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE, Source};
use vhost_device_storage::options::IoEngine;
use vhost_device_storage::throttle::Throttle;

use crate::address::Address;
use crate::lun::{Facts, Identity, LogicalUnit, Provisioning, Target};
use crate::options::DiskArguments;
use crate::reservations::Reservations;
use crate::tasks::Tasks;

/// The type of locally assigned NAA designators (SPC-5, 7.7.6.6.3).
const LOCAL: u64 = 3 << 60;

/// What all disks of a device have in common.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Another program may have the images.
    pub incoming: bool,
    pub engine: IoEngine,
    /// All queues of the device.
    pub queues: u16,
}

/// A logical unit and its disk.
pub struct Unit {
    pub address: Address,
    /// The command set.
    pub logical: Arc<LogicalUnit>,
    /// What it asks of its target.
    pub target: Arc<dyn Target>,
    pub disk: Disk,
    /// Limits of `--iops` and `--bps`.
    pub throttle: Option<Throttle>,
    pub tasks: Tasks,
    /// The file of persistent reservations.
    pub reservations: Option<Arc<Reservations>>,
    /// The persistent reservations are those of a guest that was saved, or of the file.
    pub has_reservations: AtomicBool,
}

impl Unit {
    /// Opens and locks the image of a disk. `identity` is the designator of the target, if it has units already.
    ///
    /// # Errors
    /// One line that names the file, what is wrong with it, and what to do.
    pub fn open(
        address: Address,
        identity: Option<u64>,
        target: Arc<dyn Target>,
        source: Source,
        reservations: Option<(Arc<Reservations>, Vec<u8>)>,
        arguments: &DiskArguments,
        settings: Settings,
    ) -> Result<Self, StartError> {
        let options = &arguments.disk;
        let Settings {
            incoming,
            engine,
            queues,
        } = settings;
        let disk = Disk::open(source, options, incoming, engine)?;
        let mut facts = facts(&disk, arguments);
        facts.persists = reservations.is_some();
        // All units of a target name the same one, and targets of other hosts have other names.
        let first = facts.identity.naa.to_be_bytes();
        facts.identity.target =
            identity.unwrap_or_else(|| locally_assigned(&[b"target", &[address.target], &first]));
        let blocks = disk.size() / u64::from(options.logical_block_size);
        let logical = Arc::new(LogicalUnit::new(facts, blocks));
        let reservations = match reservations {
            Some((file, state)) => {
                if !state.is_empty() {
                    logical.load_reservations(&state).map_err(|error| {
                        StartError(format!(
                            "{address}: its reservations cannot be used: {error}"
                        ))
                    })?;
                }
                Some(file)
            }
            None => None,
        };
        Ok(Self {
            address,
            logical,
            target,
            throttle: Throttle::open(options, queues),
            tasks: Tasks::default(),
            has_reservations: AtomicBool::new(!incoming),
            reservations,
            disk,
        })
    }

    /// Takes the file of persistent reservations, if another program had it. Returns whether this program has it now.
    pub fn take_reservations(&self) -> bool {
        let Some(file) = self.reservations.as_ref().filter(|file| !file.is_held()) else {
            return true;
        };
        match file.take() {
            Ok(state) => {
                // A guest that was loaded has brought them.
                if !self.has_reservations.swap(true, Ordering::AcqRel)
                    && let Err(error) = self.logical.load_reservations(&state)
                {
                    let address = self.address;
                    warn_limited(format_args!(
                        "{address}: its reservations cannot be used: {error}"
                    ));
                }
                true
            }
            Err(error) => {
                let address = self.address;
                warn_limited(format_args!(
                    "{address} waits for its reservations: {error}"
                ));
                false
            }
        }
    }

    /// Hands the file of persistent reservations over if the image was.
    pub fn release_reservations(&self) {
        if let Some(file) = &self.reservations
            && !self.disk.has_image()
        {
            file.release();
        }
    }

    /// Tells the logical unit the size of the disk. Returns whether it is another one.
    pub fn update_size(&self) -> bool {
        let blocks = self.disk.size() / u64::from(self.logical.facts().block_size);
        let is_new = blocks != self.logical.blocks();
        if is_new {
            self.logical.set_blocks(blocks);
        }
        is_new
    }
}

fn facts(disk: &Disk, arguments: &DiskArguments) -> Facts {
    let options = &arguments.disk;
    let serial = arguments.serial.clone();
    let serial = serial.unwrap_or_else(|| disk.serial());
    let rotation = arguments.rotational.unwrap_or_else(|| {
        // A file whose file system says nothing is most often on flash.
        let rotates = disk.rotational().unwrap_or(false);
        if rotates { 0 } else { 1 }
    });
    let provisioning = disk
        .discards()
        .then(|| disk.discard_limits())
        .flatten()
        .map(|limits| Provisioning {
            granularity: limits.alignment.saturating_mul(SECTOR_SIZE as u32),
            max_bytes: u64::from(limits.max_sectors) * SECTOR_SIZE,
            reads_zeroes: disk.discarded_reads_zeroes(),
        });
    Facts {
        block_size: options.logical_block_size,
        physical_block_size: disk.physical_block_size(),
        optimal_io_size: disk.optimal_io_size(),
        max_zero_bytes: u64::from(MAX_WRITE_ZEROES_SECTORS) * SECTOR_SIZE,
        read_only: options.read_only,
        removable: arguments.removable,
        persists: false,
        rotation,
        provisioning,
        identity: Identity {
            vendor: *b"VHOST   ",
            product: *b"vhost-user disk ",
            revision: revision(),
            naa: arguments
                .wwn
                .unwrap_or_else(|| locally_assigned(&[serial.as_bytes()])),
            target: 0,
            serial,
        },
    }
}

/// Returns the version of the program: four characters.
fn revision() -> [u8; 4] {
    let mut revision = [b' '; 4];
    let version = env!("CARGO_PKG_VERSION").bytes();
    revision
        .iter_mut()
        .zip(version)
        .for_each(|(place, byte)| *place = byte);
    revision
}

/// Returns a designator that depends on `parts` only (FNV-1a).
fn locally_assigned(parts: &[&[u8]]) -> u64 {
    let bytes = parts.iter().copied().flatten();
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    LOCAL | hash >> 4
}

/// Takes over a file of reservations that a client has passed.
///
/// # Errors
/// What is wrong with it.
pub fn adopt_reservations(file: File) -> Result<(Reservations, Vec<u8>), String> {
    Reservations::adopt(file).map_err(|what| format!("the file of reservations: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn designators_are_locally_assigned_and_differ_by_serial_number() {
        let one = locally_assigned(&[b"one"]);
        assert_eq!(one >> 60, 3);
        assert_eq!(one, locally_assigned(&[b"one"]));
        assert_ne!(one, locally_assigned(&[b"two"]));
    }
}
