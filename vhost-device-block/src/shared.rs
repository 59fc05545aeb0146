// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device and the handlers of all its queues share.

use vhost_device_storage::disk::Disk;

use crate::caching::Caching;

/// The disk that the guest sees.
pub struct Shared {
    pub disk: Disk,
    pub caching: Caching,
    /// The answer to GET_ID, at most [`SERIAL_LENGTH`](crate::options::SERIAL_LENGTH) bytes.
    pub serial: String,
}
