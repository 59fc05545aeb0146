// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device and the handlers of all its queues share.

use std::io;
use std::sync::Mutex;

use vhost_device_common::device::FrontEnd;
use vhost_device_common::lock;
use vhost_device_storage::access::Access;
use vhost_device_storage::disk::Disk;

use crate::caching::Caching;

/// The disk that the guest sees.
pub struct Shared {
    pub disk: Disk,
    pub caching: Caching,
    /// The answer to GET_ID, at most [`SERIAL_LENGTH`](crate::options::SERIAL_LENGTH) bytes.
    pub serial: String,
    /// Tells the front-end that the disk has grown.
    pub front_end: Mutex<FrontEnd>,
}

impl Shared {
    /// Opens the access of a queue thread.
    ///
    /// # Errors
    /// As [`Access::open`].
    pub fn open(&self, access: &mut Access) -> io::Result<()> {
        // The program that had the image may have seen it grow.
        if access.open()? && self.disk.measure(true) {
            lock(&self.front_end).config_changed();
        }
        Ok(())
    }
}
