// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The disks of all devices: images, locks, limits, and the engines that do the I/O.
//!
//! The rooms, each above those that it uses:
//!
//! - [`work`]: what a request asks of a disk, cut into operations; a device makes it and takes it through an engine;
//! - [`engine`]: carries out operations, by io_uring or by threads;
//! - [`disk`]: an open disk: image, layout, and what the options allow;
//! - [`throttle`]: `--iops` and `--bps`, shared fairly by all queues;
//! - [`image`]: one open file or block device: size, alignment, limits of discards;
//! - `layout`: where the bytes of a disk are in its image;
//! - [`access`]: when a queue thread may carry out requests;
//! - `lock`: one writer or several readers of an image; its hand-over in a migration;
//! - `sync`: remembers that storage has lost data;
//! - [`operation`]: one operation, and the system call that carries it out;
//! - [`options`]: the options of all disks.
//!
//! A *layout* says where bytes are and never moves them; an *engine* moves bytes and knows no format.

pub mod access;
pub mod disk;
#[allow(unsafe_code)]
pub mod engine;
pub mod image;
mod layout;
mod lock;
#[allow(unsafe_code)]
pub mod operation;
pub mod options;
mod sync;
pub mod throttle;
pub mod work;
