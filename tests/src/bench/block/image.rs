// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the disk images are: on a tmpfs, and on a disk, with O_DIRECT and through the page cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::TempDir;

use super::peer::Image;
use super::{BlockOptions, Row};
use crate::bench::{BenchError, at};

/// Bytes written between two looks at whether to go on.
const CHUNK: usize = 4 << 20;

/// Where an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On a tmpfs: what the back-end itself costs.
    Tmpfs,
    /// On a disk, with O_DIRECT.
    Disk,
    /// On a disk, all of it in the page cache.
    PageCache,
}

impl Place {
    /// All.
    pub const ALL: [Place; 3] = [Place::Tmpfs, Place::Disk, Place::PageCache];

    /// The name in the table and for `--rows`.
    pub fn name(self) -> &'static str {
        match self {
            Place::Tmpfs => "tmpfs",
            Place::Disk => "disk",
            Place::PageCache => "page-cache",
        }
    }

    fn image_size(self) -> usize {
        match self {
            Place::Tmpfs | Place::PageCache => 512 << 20,
            Place::Disk => 1 << 30,
        }
    }
}

/// The images, removed at the end.
pub struct Places {
    images: Vec<(Place, Image, TempDir)>,
}

impl Places {
    /// Makes and fills the images that the cells of the table need.
    pub fn new(
        options: &BlockOptions,
        cells: &[(Place, Row)],
        go_on: &dyn Fn() -> Result<(), BenchError>,
    ) -> Result<Self, BenchError> {
        let mut images = Vec::new();
        for place in Place::ALL {
            if !cells.iter().any(|(wanted, _)| *wanted == place) {
                continue;
            }
            let directory = match place {
                Place::Tmpfs => options.tmpfs_dir.clone(),
                Place::Disk | Place::PageCache => match &options.disk_dir {
                    Some(directory) => directory.clone(),
                    None => beside_this_program()?,
                },
            };
            let directory = tempfile::Builder::new()
                .prefix("bench-")
                .tempdir_in(&directory)
                .map_err(at(&directory))?;
            let image = Image {
                path: directory.path().join("disk.img"),
                direct: place == Place::Disk,
            };
            let mebibytes = place.image_size() >> 20;
            eprintln!(
                "{}: filling {mebibytes} MiB in {}",
                place.name(),
                directory.path().display()
            );
            fill(&image.path, place.image_size(), go_on)?;
            if image.direct {
                takes_direct(&image.path)?;
            }
            images.push((place, image, directory));
        }
        Ok(Places { images })
    }

    /// The image at `place`, which a cell must have asked for.
    pub fn image(&self, place: Place) -> &Image {
        let (_, image, _) = self
            .images
            .iter()
            .find(|(at, _, _)| *at == place)
            .expect("made for the cells");
        image
    }

    /// Makes the image at `place` ready for a measurement: what the one before it wrote is on the disk, and all of it is in the page
    /// cache where it is to be.
    pub fn prepare(&self, place: Place) -> Result<&Image, BenchError> {
        let image = self.image(place);
        if place != Place::Tmpfs {
            let mut file = File::open(&image.path).map_err(at(&image.path))?;
            file.sync_data().map_err(at(&image.path))?;
            let mut chunk = vec![0; CHUNK];
            while place == Place::PageCache && file.read(&mut chunk).map_err(at(&image.path))? > 0 {
            }
        }
        Ok(image)
    }

    /// The first image.
    pub fn any(&self) -> &Image {
        &self.images[0].1
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
    // Nothing that a file system or a host below could compress, share or leave out.
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
