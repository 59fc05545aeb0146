// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the disk images are: on a tmpfs, and on a disk, with O_DIRECT and through the page cache; or nowhere.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::BlockOptions;
use crate::bench::{BenchError, at};

/// Bytes written between two checks for an interruption. Linux keeps bytes that are written in one call in one folio of its page cache, and each
/// small write to a large folio is slow on ext4. Read-ahead creates folios of this size.
const CHUNK: usize = 128 << 10;

/// Where an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On a tmpfs: what the back-end itself costs.
    Tmpfs,
    /// On a disk, with O_DIRECT.
    Disk,
    /// On a disk, all of it in the page cache.
    PageCache,
    /// Nowhere: the device answers at once, without data. Measures the core of the back-end.
    Null,
}

impl Place {
    /// All.
    pub const ALL: [Place; 4] = [Place::Tmpfs, Place::Disk, Place::PageCache, Place::Null];
    /// Those that hold data.
    pub const STORAGE: [Place; 3] = [Place::Tmpfs, Place::Disk, Place::PageCache];

    /// Returns the name in the table and for `--rows`.
    pub fn name(self) -> &'static str {
        match self {
            Place::Tmpfs => "tmpfs",
            Place::Disk => "disk",
            Place::PageCache => "page-cache",
            Place::Null => "null",
        }
    }

    /// Returns the name for people.
    pub fn title(self) -> &'static str {
        match self {
            Place::Tmpfs => "tmpfs",
            Place::Disk => "disk, O_DIRECT",
            Place::PageCache => "disk, page cache",
            Place::Null => "no I/O",
        }
    }

    /// Size of the disk in bytes.
    pub fn size(self) -> usize {
        match self {
            Place::Tmpfs | Place::PageCache | Place::Null => 512 << 20,
            Place::Disk => 1 << 30,
        }
    }

    /// Creates a directory there, which is removed at the end.
    pub fn directory(self, options: &BlockOptions) -> Result<TempDir, BenchError> {
        let parent = match (self, &options.disk_dir) {
            (Place::Tmpfs | Place::Null, _) => options.tmpfs_dir.clone(),
            (Place::Disk | Place::PageCache, Some(directory)) => directory.clone(),
            (Place::Disk | Place::PageCache, None) => beside_this_program()?,
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix("bench-");
        builder.tempdir_in(&parent).map_err(at(&parent))
    }
}

/// A disk image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
    /// Where it is, and how it is to be opened.
    pub place: Place,
}

impl Image {
    /// Creates the image in a directory at `place`. The file need not be there yet.
    pub fn new(place: Place, directory: &TempDir) -> Self {
        Image {
            path: directory.path().join("disk.img"),
            place,
        }
    }

    fn is_on_disk(&self) -> bool {
        matches!(self.place, Place::Disk | Place::PageCache)
    }

    /// Open it with O_DIRECT.
    pub fn is_direct(&self) -> bool {
        self.place == Place::Disk
    }

    /// The socket at which the current back-end serves it.
    pub fn socket(&self) -> PathBuf {
        self.path.with_extension("sock")
    }

    /// Fails with advice if O_DIRECT is required and does not work.
    pub fn check(&self) -> Result<(), BenchError> {
        match self.is_direct() {
            true => takes_direct(&self.path),
            false => Ok(()),
        }
    }
}

/// The images, removed at the end.
pub struct Places {
    images: Vec<(Image, TempDir)>,
}

impl Places {
    /// Makes and fills the images at `places`.
    pub fn new(
        options: &BlockOptions,
        places: &[Place],
        go_on: &dyn Fn() -> Result<(), BenchError>,
    ) -> Result<Self, BenchError> {
        let mut images = Vec::new();
        for place in Place::ALL {
            if !places.contains(&place) {
                continue;
            }
            let directory = place.directory(options)?;
            let image = Image::new(place, &directory);
            if place != Place::Null {
                let (name, mebibytes) = (place.name(), place.size() >> 20);
                let path = directory.path().display();
                eprintln!("{name}: filling {mebibytes} MiB in {path}");
                fill(&image.path, place.size(), go_on)?;
                image.check()?;
            }
            images.push((image, directory));
        }
        Ok(Places { images })
    }

    /// Prepares the image at `place` for a measurement: the page cache holds all of it if it is to be cached.
    /// Flushes earlier writes to all images, so that no writeback runs during the measurement.
    pub fn prepare(&self, place: Place) -> Result<&Image, BenchError> {
        let images = || self.images.iter().map(|(image, _)| image);
        for image in images().filter(|image| image.is_on_disk()) {
            let file = File::open(&image.path).map_err(at(&image.path))?;
            file.sync_data().map_err(at(&image.path))?;
        }
        let image = images()
            .find(|image| image.place == place)
            .expect("it was asked for");
        if place == Place::PageCache {
            let mut file = File::open(&image.path).map_err(at(&image.path))?;
            let mut chunk = vec![0; CHUNK];
            while file.read(&mut chunk).map_err(at(&image.path))? > 0 {}
        }
        Ok(image)
    }

    /// Returns the first image, if there is one.
    pub fn any(&self) -> Option<&Image> {
        let mut images = self.images.iter().map(|(image, _)| image);
        images.find(|image| image.place != Place::Null)
    }
}

fn beside_this_program() -> Result<PathBuf, BenchError> {
    let program = std::env::current_exe().map_err(at(Path::new("this program")))?;
    Ok(program.parent().unwrap_or(Path::new(".")).to_owned())
}

fn fill(
    path: &Path,
    size: usize,
    go_on: &dyn Fn() -> Result<(), BenchError>,
) -> Result<(), BenchError> {
    let mut file = File::create_new(path).map_err(at(path))?;
    // Data that no file system or host can compress, share or leave out.
    let mut state = 1u64;
    for _ in 0..size / CHUNK {
        go_on()?;
        let chunk: Vec<u8> = (0..CHUNK / 8)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .collect();
        file.write_all(&chunk).map_err(at(path))?;
    }
    file.sync_all().map_err(at(path))
}

fn takes_direct(path: &Path) -> Result<(), BenchError> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path);
    opened.map(drop).map_err(|error| {
        let advice = format!(
            "O_DIRECT does not work here ({error}): name another directory with --disk-dir"
        );
        at(path)(io::Error::new(error.kind(), advice))
    })
}

/// Keeps idle CPUs polling for as long as the file is held open.
pub fn poll_when_idle() -> Result<File, BenchError> {
    let path = Path::new("/dev/cpu_dma_latency");
    let mut file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(at(path))?;
    file.write_all(&0u32.to_ne_bytes()).map_err(at(path))?;
    Ok(file)
}
