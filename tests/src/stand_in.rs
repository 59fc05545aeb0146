// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stand-in for virglrenderer, for the programs under test.

use std::io;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// The library, in a directory where a program finds it in place of virglrenderer.
#[derive(Debug)]
pub struct StandIn {
    directory: TempDir,
    settings: String,
}

impl StandIn {
    /// Creates a library with these settings, which it documents, and without some functions, like other releases of virglrenderer.
    pub fn new(settings: &str, without: &[&str]) -> io::Result<Self> {
        // Cargo builds it for the tests, into their directory.
        let library = std::env::current_exe()?.with_file_name("libstand_in_renderer.so");
        let mut bytes = std::fs::read(library)?;
        for function in without {
            // Programs search for this name.
            let name = format!("virgl_renderer_{function}\0").into_bytes();
            while let Some(place) = bytes.windows(name.len()).position(|window| window == name) {
                bytes[place] = b'X';
            }
        }
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("libvirglrenderer.so.1"), bytes)?;
        Ok(Self {
            directory,
            settings: settings.to_owned(),
        })
    }

    /// Makes a program use it.
    pub fn configure(&self, command: &mut Command) {
        command
            .env("LD_LIBRARY_PATH", self.directory.path())
            .env("STAND_IN", &self.settings)
            .env("STAND_IN_LOG", self.log());
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// Completes fences from now on, with the setting `late`.
    pub fn finish_fences(&self) -> io::Result<()> {
        std::fs::write(self.directory.path().join("done"), [])
    }

    /// Returns how many times a function was called.
    pub fn calls(&self, function: &str) -> usize {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let names = log.lines().map(|line| line.split(' ').next());
        names.filter(|name| *name == Some(function)).count()
    }
}
