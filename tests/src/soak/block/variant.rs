// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ways in which an image is accessed.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::guest::target_directory;
use crate::soak::loss::Loss;
use crate::target::{Block as Target, Target as _};

/// A directory on a tmpfs.
const MEMORY: &str = "/dev/shm";

/// How the image is accessed.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// Name of the scenario.
    pub name: &'static str,
    /// Value of `--io-engine`.
    pub engine: &'static str,
    /// Whether to bypass the page cache.
    pub direct: bool,
    /// Whether the image is on a tmpfs.
    pub in_memory: bool,
}

/// Each I/O engine.
pub const VARIANTS: [Variant; 4] = [
    Variant {
        name: "block io_uring",
        engine: "io_uring",
        direct: false,
        in_memory: false,
    },
    Variant {
        name: "block io_uring direct",
        engine: "io_uring",
        direct: true,
        in_memory: false,
    },
    Variant {
        name: "block threads",
        engine: "threads",
        direct: false,
        in_memory: false,
    },
    Variant {
        name: "block in memory",
        engine: "auto",
        direct: false,
        in_memory: true,
    },
];

impl Variant {
    /// Returns whether this host can run it; if not, prints why.
    pub fn is_possible(&self) -> bool {
        let target = Target {
            io_engine: self.engine,
        };
        let possible = target.is_possible() && (!self.in_memory || Path::new(MEMORY).is_dir());
        if !possible {
            println!("soak: this host cannot run {}", self.name);
        }
        possible
    }

    /// Creates a directory for an image.
    pub fn directory(&self) -> Result<TempDir, Loss> {
        let parent = match self.in_memory {
            true => PathBuf::from(MEMORY),
            false => target_directory()
                .map_err(|error| Loss(error.to_string()))?
                .join("tmp"),
        };
        fs::create_dir_all(&parent)?;
        Ok(tempfile::tempdir_in(parent)?)
    }
}
