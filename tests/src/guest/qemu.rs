// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The QEMU that runs a guest: the installed one, or a newer one of Debian's, unpacked into the [`cache`].
//!
//! The newer one needs nothing of the host: its packages are downloaded with lists of packages of its own and unpacked with all their
//! libraries into one directory, and it is started by the loader found there. That needs no root and changes nothing of the system.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use super::{GuestError, QEMU, find_program, output, system};
use crate::cache;
use crate::skip::skip;

/// The archive that the newer QEMU comes from.
const ARCHIVE: &str = "http://deb.debian.org/debian";
/// What the archive is signed with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The release that the newer QEMU is taken from, and the one that its libraries are taken from.
const RELEASES: [&str; 2] = ["trixie-backports", "trixie"];
/// The package.
const PACKAGE: &str = "qemu-system-x86";
/// Where its libraries and its loader are.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The beginning of the reason to skip a test that needs the newer QEMU, where there is no network.
pub const NOT_FETCHED: &str = "QEMU 11 cannot be fetched";

/// A QEMU of version 11 or newer. Beside what the installed one has, it migrates a vhost-user-blk with its requests in flight, and has
/// `vhost-user-test-device-pci`, a device of any virtio id, with the shared memory that its back-end declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewQemu {
    /// The directory that has `usr`.
    root: PathBuf,
}

impl NewQemu {
    /// Returns the QEMU that is kept here, or fetches it, which takes 40 MB and ten seconds. Many processes may call this at once; one
    /// fetches.
    ///
    /// # Errors
    /// The host is not Debian, or has no network.
    pub fn prepare() -> Result<Self, GuestError> {
        let cache = cache::directory().join("qemu");
        let root = cache.join(RELEASES[0]);
        if !root.is_dir() {
            fs::create_dir_all(&cache).map_err(system(format!("create {}", cache.display())))?;
            let lock = cache.join("lock");
            let lock = File::create(&lock).map_err(system(format!("create {}", lock.display())))?;
            flock(&lock, FlockOperation::LockExclusive)
                .map_err(|error| GuestError::System("lock the cache".into(), error.into()))?;
            if !root.is_dir() {
                fetch(&cache, &root)?;
            }
        }
        Ok(Self { root })
    }

    /// The same; where it cannot be fetched, says that the test is skipped.
    pub fn prepare_or_skip() -> Option<Self> {
        Self::prepare()
            .inspect_err(|error| skip(&format!("{NOT_FETCHED}: {}", reason(error))))
            .ok()
    }
}

/// Returns one line.
fn reason(error: &GuestError) -> String {
    match error {
        GuestError::Command { stderr, .. } => stderr.lines().next().unwrap_or_default().into(),
        error => error.to_string(),
    }
}

/// Starts the command line of `qemu`, or of the installed one.
pub(super) fn command(qemu: Option<&NewQemu>) -> Result<Command, GuestError> {
    let Some(NewQemu { root }) = qemu else {
        find_program(QEMU).ok_or(GuestError::NotInstalled(QEMU.into()))?;
        return Ok(Command::new(QEMU));
    };
    let libraries = root.join(LIBRARIES);
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(&libraries)
        .arg(root.join("usr/bin").join(QEMU))
        .env("QEMU_MODULE_DIR", libraries.join("qemu"));
    for data in ["qemu", "seabios"] {
        command.arg("-L").arg(root.join("usr/share").join(data));
    }
    Ok(command)
}

/// Downloads the packages and unpacks them to `root`, which gets its name when it is complete.
fn fetch(cache: &Path, root: &Path) -> Result<(), GuestError> {
    let work = tempfile::tempdir_in(cache).map_err(system("create a temporary directory"))?;
    let work = work.path();
    let create = |name: &str| -> Result<PathBuf, GuestError> {
        let path = work.join(name);
        fs::create_dir_all(&path).map_err(system(format!("create {}", path.display())))?;
        Ok(path)
    };
    create("lists/partial")?;
    let archives = create("cache/archives/partial")?;
    let sources =
        RELEASES.map(|release| format!("deb [signed-by={KEYRING}] {ARCHIVE} {release} main\n"));
    for (name, text) in [("sources", sources.concat()), ("status", String::new())] {
        fs::write(work.join(name), text).map_err(system(format!("write {name}")))?;
    }
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        for (option, value) in [
            ("Dir::State", ""),
            ("Dir::State::lists", "lists"),
            // No package is installed: all that is needed comes along.
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
            ("Dir::Etc::sourcelist", "sources"),
        ] {
            let value = work.join(value);
            apt.arg("-o").arg(format!("{option}={}", value.display()));
        }
        for option in [
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            "Acquire::Languages=none",
            // The lists are this directory's own.
            "Debug::NoLocking=1",
            // As root, apt would otherwise become a user that cannot write here.
            "APT::Sandbox::User=root",
            // Without a network, a list that is missing is only a warning otherwise.
            "APT::Update::Error-Mode=any",
        ] {
            apt.args(["-o", option]);
        }
        output(apt.arg("-qq").args(arguments))
    };
    apt(&["update"])?;
    let options = ["--download-only", "--no-install-recommends", "--yes"];
    let package = ["--target-release", RELEASES[0], PACKAGE];
    apt(&[&["install"], options.as_slice(), package.as_slice()].concat())?;

    let unpacked = create("root")?;
    let archives = archives.parent().unwrap_or(&archives);
    let entries = fs::read_dir(archives).map_err(system("list the packages"))?;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.extension().is_some_and(|extension| extension == "deb") {
            output(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .args([&path, &unpacked]),
            )?;
        }
    }
    fs::rename(unpacked, root).map_err(system("keep QEMU"))
}
