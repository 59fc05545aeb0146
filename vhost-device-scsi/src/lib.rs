// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO SCSI host device (VIRTIO 1.3, 5.6).
//!
//! A request comes from a ring to the `handler`, which finds the disk that it addresses. The command set (`lun`) says what to do for it: an
//! engine of `vhost-device-storage` moves the data, and a pool carries out what takes several steps. Task management functions (`control`)
//! mark requests in the disk's list of tasks (`tasks`); whoever completes such a request answers that it was aborted.

mod address;
mod commands;
mod config;
mod control;
mod device;
mod events;
mod handler;
pub mod lun;
mod options;
mod parked;
mod passing;
mod passthrough;
mod procedure;
mod request;
mod reservations;
mod saved;
mod shared;
mod steps;
mod sweep;
mod table;
mod target;
mod tasks;
mod unit;
mod units;

pub use device::Scsi;
