// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel tells about the storage behind an image (sysfs).

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Dev, major, minor};

/// Directories that [`Topology::of`] and the limits of discards read.
pub const FOLDERS: [&str; 2] = ["/sys/dev/block", "/sys/devices"];

/// The storage behind an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Whether the medium rotates; `None` if the kernel does not tell, as for some file systems.
    pub rotational: Option<bool>,
    /// The best size of a transfer, in bytes; 0 if there is none.
    pub optimal_io_size: u32,
}

impl Topology {
    /// Examines the block device with this metadata, or that of the file system of the file.
    pub fn of(metadata: &Metadata) -> Self {
        let is_device = metadata.file_type().is_block_device();
        let device = match is_device {
            true => metadata.rdev(),
            false => metadata.dev(),
        };
        let Some(queue) = queue_folder(device) else {
            return Self::default();
        };
        Self {
            rotational: attribute(&queue, "rotational").map(|value| value != 0),
            optimal_io_size: attribute(&queue, "optimal_io_size")
                .filter(|_| is_device)
                .and_then(|size| u32::try_from(size).ok())
                .unwrap_or(0),
        }
    }
}

/// Returns the directory that describes the queue of a block device; for a partition, that of the whole device.
pub fn queue_folder(device: Dev) -> Option<PathBuf> {
    let folder = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let queues = ["queue", "../queue"].map(|queue| Path::new(&folder).join(queue));
    queues.into_iter().find(|queue| queue.is_dir())
}

/// Reads a number from it.
pub fn attribute(queue: &Path, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(queue.join(name)).ok()?;
    text.trim().parse().ok()
}
