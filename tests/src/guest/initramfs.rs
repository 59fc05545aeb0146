// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's root file system: BusyBox, kernel modules, programs of this host with their libraries, and the script.
//!
//! It is a cpio archive in the `newc` format (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`), uncompressed, because emulated
//! processors unpack slowly. For the same reason modules are decompressed here.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use super::error::{GuestError, system};
use super::host::{find_program, output};
use super::kernel::Kernel;

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// The guest's first process. Markers go to the second serial port; reading its settings back makes sure that all output is sent at the end.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/programs:/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
for module in /modules/*; do insmod $module || echo "insmod $module failed"; done
exec > /dev/ttyS1 2>&1
sh -e /script
echo "@end $?"
stty -F /dev/ttyS1 -echo
poweroff -f
"#;

/// Writes the archive to `path`.
pub fn write(
    path: &Path,
    kernel: &Kernel,
    modules: &[String],
    programs: &[String],
    script: &str,
) -> Result<(), GuestError> {
    let file = File::create(path).map_err(system(format!("create {}", path.display())))?;
    let mut archive = Archive::new(BufWriter::new(file));
    let mut add = |name: &Path, mode, data: &[u8]| {
        archive
            .add(name, mode, data)
            .map_err(system("write the initramfs"))
    };
    for directory in ["dev", "modules", "proc", "programs", "sys", "tmp"] {
        add(Path::new(directory), DIRECTORY, b"")?;
    }
    add(Path::new("init"), EXECUTABLE, INIT.as_bytes())?;
    add(Path::new("script"), EXECUTABLE, script.as_bytes())?;

    let busybox = find_program("busybox").ok_or(GuestError::NotInstalled("busybox".into()))?;
    add(Path::new("bin/busybox"), EXECUTABLE, &read(&busybox)?)?;

    for (index, module) in module_files(kernel, modules)?.iter().enumerate() {
        let name = module.file_stem().unwrap_or_default().to_string_lossy();
        let data = if module
            .extension()
            .is_some_and(|extension| extension == "xz")
        {
            output(
                Command::new("xz")
                    .args(["--decompress", "--stdout"])
                    .arg(module),
            )?
        } else {
            read(module)?
        };
        // The number gives the order in which they are loaded.
        add(
            Path::new(&format!("modules/{index:03}-{name}")),
            EXECUTABLE,
            &data,
        )?;
    }

    let mut libraries = BTreeSet::new();
    for program in programs {
        let path = find_program(program).ok_or(GuestError::NotInstalled(program.clone()))?;
        add(
            &Path::new("programs").join(path.file_name().unwrap_or_default()),
            EXECUTABLE,
            &read(&path)?,
        )?;
        libraries.extend(shared_libraries(&path)?);
    }
    for library in libraries {
        add(&library, EXECUTABLE, &read(&library)?)?;
    }
    archive.finish().map_err(system("write the initramfs"))
}

fn read(path: &Path) -> Result<Vec<u8>, GuestError> {
    fs::read(path).map_err(system(format!("read {}", path.display())))
}

/// Returns the files of `modules` and of their dependencies, in the order in which they must be loaded.
fn module_files(kernel: &Kernel, modules: &[String]) -> Result<Vec<PathBuf>, GuestError> {
    let mut files = Vec::new();
    for module in modules {
        let listing = output(
            Command::new(find_program("modprobe").unwrap_or("modprobe".into()))
                .args(["--config", "/dev/null", "--show-depends"])
                .args(["--set-version", &kernel.release, "--dirname"])
                .arg(&kernel.root)
                .arg(module),
        )?;
        // `insmod FILE`, or `builtin NAME` for a module that is built into the kernel.
        for line in String::from_utf8_lossy(&listing).lines() {
            if let Some(file) = line.strip_prefix("insmod ") {
                let file = PathBuf::from(file.trim());
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
    }
    Ok(files)
}

/// Returns the shared libraries of a program, and the loader.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>, GuestError> {
    let listing = output(Command::new("ldd").arg(program))?;
    Ok(String::from_utf8_lossy(&listing)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// A cpio archive in the `newc` format.
struct Archive<W> {
    writer: W,
    written: usize,
    directories: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    fn new(writer: W) -> Self {
        Self {
            writer,
            written: 0,
            directories: BTreeSet::new(),
        }
    }

    /// Adds a file or directory, and the directories above it.
    fn add(&mut self, path: &Path, mode: u32, data: &[u8]) -> io::Result<()> {
        // Names in the archive have no leading slash.
        let path: PathBuf = path
            .components()
            .filter(|component| matches!(component, Component::Normal(_)))
            .collect();
        let mut above: Vec<_> = path.ancestors().skip(1).map(Path::to_owned).collect();
        above.retain(|directory| directory.components().next().is_some());
        for directory in above.into_iter().rev() {
            if self.directories.insert(directory.clone()) {
                self.entry(&directory, DIRECTORY, b"")?;
            }
        }
        if mode != DIRECTORY || self.directories.insert(path.clone()) {
            self.entry(&path, mode, data)?;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, b"")?;
        self.writer.flush()
    }

    fn entry(&mut self, path: &Path, mode: u32, data: &[u8]) -> io::Result<()> {
        let name = path.as_os_str().as_encoded_bytes();
        let size = u32::try_from(data.len()).map_err(io::Error::other)?;
        let name_size = name.len() + 1;
        // Magic, inode, mode, user, group, links, time, size, device (2), special device (2), name size, checksum.
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            0, 0, 0, 1, 0, 0, 0, 0, 0, 0
        );
        self.put(header.as_bytes())?;
        self.put(name)?;
        self.put(b"\0")?;
        self.align()?;
        self.put(data)?;
        self.align()
    }

    fn put(&mut self, data: &[u8]) -> io::Result<()> {
        self.written += data.len();
        self.writer.write_all(data)
    }

    fn align(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 4][..padding])
    }
}
