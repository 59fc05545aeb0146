// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the disks of all devices share: image, locks, limits and I/O engines.

pub mod disk;
#[allow(unsafe_code)]
pub mod engine;
pub mod image;
mod layout;
pub mod lock;
#[allow(unsafe_code)]
pub mod operation;
pub mod options;
pub mod sync;
pub mod throttle;
pub mod work;
