// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The User-Mode Linux kernel that tests run in: built from Debian's kernel source with the options in `config`, and kept in the
//! [`cache`].
//! A processor with a large XSAVE state needs a kernel of its own.
//!
//! The source package is kept too, so that a build with other options needs no network. It is downloaded, not installed, which needs no root.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::cache;
use crate::guest::kernel::download;
use crate::guest::{GuestError, find_program, output, system};
use crate::uml::processor::{self, LargeState};

/// The options that are on.
const CONFIG: &str = include_str!("config");

/// The package with the kernel's source.
pub(super) const PACKAGE: &str = "linux-source-6.12";

/// Patterns of the largest parts of the source, which are not built. Their Kconfig files and Makefiles are needed nevertheless.
const NOT_BUILT: &[&str] = &[
    "Documentation",
    "arch/arm",
    "arch/arm64",
    "drivers/gpu",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/scsi/*",
    "sound/isa",
    "sound/pci",
    "sound/soc",
    "sound/usb",
    "tools/perf",
    "tools/testing",
];

/// Returns the path of `name` in the cache directory.
pub(super) fn kept(name: &str) -> PathBuf {
    cache::directory().join("uml").join(name)
}

/// The executable's name depends on the options and the processor, so that changes cause a build.
fn image(state: Option<LargeState>) -> PathBuf {
    let mut hash = DefaultHasher::new();
    CONFIG.hash(&mut hash);
    let suffix = state.map(LargeState::suffix).unwrap_or_default();
    kept(&format!("{PACKAGE}-{:016x}{suffix}", hash.finish()))
}

/// Returns whether the kernel is kept, so that [`prepare`] takes no time.
pub fn is_kept() -> bool {
    image(LargeState::of_host()).is_file()
}

/// Returns the source package, and downloads it if it is not cached.
pub fn source() -> Result<PathBuf, GuestError> {
    let _lock = lock()?;
    download_source()
}

/// Returns the kernel, an executable of the host. If it is not cached, it is built, which takes two minutes; the output of `make` goes to stdout.
/// Many processes may call this at once; one builds.
pub fn prepare() -> Result<PathBuf, GuestError> {
    let state = LargeState::of_host();
    let image = image(state);
    if image.is_file() {
        return Ok(image);
    }
    let _lock = lock()?;
    if !image.is_file() {
        let package = download_source()?;
        let work = work()?;
        println!("unpacking {PACKAGE}");
        let source = unpack(&package, &work, leave_out)?;
        fs::rename(build(&source, &work, state)?, &image).map_err(system("keep the kernel"))?;
        remove(&work)?;
    }
    Ok(image)
}

/// Holds a lock against other processes.
pub(super) fn lock() -> Result<File, GuestError> {
    let path = kept("lock");
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(system(format!("create {}", directory.display())))?;
    let lock = File::create(&path).map_err(system(format!("create {}", path.display())))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| GuestError::System("lock the kernel".into(), error.into()))?;
    Ok(lock)
}

pub(super) fn download_source() -> Result<PathBuf, GuestError> {
    let package = kept(&format!("{PACKAGE}.deb"));
    if !package.is_file() {
        let download = download(PACKAGE, &work()?)?;
        fs::rename(download, &package).map_err(system("keep the kernel's source"))?;
    }
    Ok(package)
}

/// Creates an empty directory. Removes what an interrupted build has left.
pub(super) fn work() -> Result<PathBuf, GuestError> {
    let work = kept("build");
    remove(&work)?;
    fs::create_dir(&work).map_err(system("create a directory to build in"))?;
    Ok(work)
}

pub(super) fn remove(directory: &Path) -> Result<(), GuestError> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let what = format!("remove {}", directory.display());
            Err(GuestError::System(what, error))
        }
        _ => Ok(()),
    }
}

/// Unpacks the archive in the package; `choose` adds arguments that say which parts.
pub(super) fn unpack(
    package: &Path,
    work: &Path,
    choose: impl Fn(&mut Command),
) -> Result<PathBuf, GuestError> {
    let root = work.join("package");
    output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([package, &root]),
    )?;
    let source = work.join("source");
    fs::create_dir(&source).map_err(system("create a directory for the source"))?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--strip-components=1", "--directory"])
        .arg(&source)
        .arg("--file")
        .arg(root.join(format!("usr/src/{PACKAGE}.tar.xz")));
    choose(&mut tar);
    output(&mut tar)?;
    Ok(source)
}

/// Leaves out most of [`NOT_BUILT`].
fn leave_out(tar: &mut Command) {
    for directory in NOT_BUILT {
        for kind in ["[ch]", "S", "rst", "dts", "dtsi", "json", "yaml"] {
            tar.arg(format!("--exclude=*/{directory}/*.{kind}"));
        }
    }
}

/// Enlarges the room in the source for the state of the processor.
fn patch(source: &Path, state: LargeState) -> Result<(), GuestError> {
    let path = source.join(processor::SOURCE);
    let text = fs::read_to_string(&path).map_err(system(format!("read {}", path.display())))?;
    let patched = state.patch(&text).ok_or_else(|| {
        GuestError::NoKernel(format!(
            "this host's processor needs a change of {}, which is not as expected in {PACKAGE}",
            processor::SOURCE
        ))
    })?;
    fs::write(&path, patched).map_err(system(format!("write {}", path.display())))
}

/// Builds the executable.
fn build(source: &Path, work: &Path, state: Option<LargeState>) -> Result<PathBuf, GuestError> {
    let mut config = CONFIG.to_owned();
    if let Some(state) = state {
        patch(source, state)?;
        config.push_str(state.option());
    }
    let objects = work.join("objects");
    fs::create_dir(&objects).map_err(system("create a directory for the objects"))?;
    let options = work.join("config");
    fs::write(&options, &config).map_err(system("write the kernel's options"))?;
    let make = |target: &str| {
        let mut make = Command::new("make");
        make.current_dir(source)
            // The settings of an outer make are not for this one.
            .env_remove("MAKEFLAGS")
            .env("KCONFIG_ALLCONFIG", &options)
            .arg("ARCH=um")
            .arg(format!("O={}", objects.display()))
            .arg(target);
        make
    };
    output(&mut make("allnoconfig"))?;
    let set = fs::read_to_string(objects.join(".config")).map_err(system("read .config"))?;
    let lost: Vec<&str> = config
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !set.lines().any(|other| other == *line))
        .collect();
    if !lost.is_empty() {
        return Err(GuestError::NoKernel(format!(
            "these options need others that are not on: {}",
            lost.join(" ")
        )));
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = make("linux");
    make.arg(format!("--jobs={processors}"))
        .stdin(Stdio::null());
    let status = make.status().map_err(system("run make"))?;
    if !status.success() {
        return Err(GuestError::NoKernel(format!("make failed ({status})")));
    }
    let stripped = work.join("linux");
    let strip = find_program("strip").ok_or(GuestError::NotInstalled("strip".into()))?;
    output(
        Command::new(strip)
            .arg("-o")
            .args([&stripped, &objects.join("linux")]),
    )?;
    Ok(stripped)
}
