// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel of guests: Debian's own, unpacked into the [`cache`].
//!
//! The package is downloaded and unpacked, not installed: this needs no root, does not change the system, builds no initramfs for a
//! machine that will never boot it, and takes two seconds. No version is pinned: the newest one that apt offers is used, and kept until
//! `guest` in the cache is removed.
//!
//! The flavour is `cloud`, which has all virtio drivers except the one for GPUs; only the generic one, three times the size, has that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use super::error::{GuestError, system};
use super::host::{find_program, output};
use crate::cache;

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavour {
    /// For virtual machines without a screen.
    #[default]
    Cloud,
    /// For all machines.
    Plain,
}

impl Flavour {
    /// Returns what the names of its packages end in.
    fn suffix(self) -> &'static str {
        match self {
            Self::Cloud => "-cloud-amd64",
            Self::Plain => "-amd64",
        }
    }

    fn has(self, release: &str) -> bool {
        let is_other = |other: &str| release.ends_with(other) && self.suffix() != other;
        release.ends_with(self.suffix()) && !["-cloud-amd64", "-rt-amd64"].into_iter().any(is_other)
    }
}

/// How many versions to try: apt's lists can name versions that the archive no longer has.
const CANDIDATES: usize = 3;

/// An unpacked kernel package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The release, as `uname -r` says it in the guest.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// The directory that has `lib/modules`.
    pub root: PathBuf,
}

impl Kernel {
    /// Returns the cached kernel, or the newest that apt has. Many processes may call this at once; one downloads.
    pub fn prepare(flavour: Flavour) -> Result<Self, GuestError> {
        let cache = directory();
        // Also used where the cache cannot be written.
        if let Some(kernel) = Self::kept(&cache, flavour)? {
            return Ok(kernel);
        }
        fs::create_dir_all(&cache).map_err(system(format!("create {}", cache.display())))?;
        let lock = cache.join("lock");
        let lock = File::create(&lock).map_err(system(format!("create {}", lock.display())))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| GuestError::System("lock the kernel cache".into(), error.into()))?;
        match Self::kept(&cache, flavour)? {
            Some(kernel) => Ok(kernel),
            None => Self::download(&cache, flavour),
        }
    }

    /// Returns whether a kernel is cached, so that [`Kernel::prepare`] needs no network.
    pub fn is_kept(flavour: Flavour) -> bool {
        matches!(Self::kept(&directory(), flavour), Ok(Some(_)))
    }

    fn kept(cache: &Path, flavour: Flavour) -> Result<Option<Self>, GuestError> {
        let Ok(entries) = fs::read_dir(cache) else {
            return Ok(None);
        };
        let newest = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| flavour.has(name))
            .max_by_key(|name| numbers(name));
        Ok(newest.map(|release| {
            let root = cache.join(&release);
            let image = root.join("boot").join(format!("vmlinuz-{release}"));
            Self {
                release,
                image,
                root,
            }
        }))
    }

    fn download(cache: &Path, flavour: Flavour) -> Result<Self, GuestError> {
        let packages = output(Command::new("apt-cache").args(["pkgnames", "linux-image-"]))?;
        let mut releases: Vec<_> = String::from_utf8_lossy(&packages)
            .lines()
            .filter_map(|package| package.strip_prefix("linux-image-"))
            .filter(|release| {
                flavour.has(release) && release.starts_with(|first: char| first.is_ascii_digit())
            })
            .map(str::to_owned)
            .collect();
        releases.sort_by_key(|release| numbers(release));
        let mut refusal = GuestError::NoKernel(format!(
            "apt knows no package linux-image-…{}; run `apt-get update`",
            flavour.suffix()
        ));
        for release in releases
            .iter()
            .rev()
            .filter(|r| is_version(r))
            .take(CANDIDATES)
        {
            match unpack(cache, release) {
                Ok(()) => break,
                Err(error) => refusal = error,
            }
        }
        Self::kept(cache, flavour)?.ok_or(refusal)
    }
}

/// Returns the directory of kernels.
fn directory() -> PathBuf {
    cache::directory().join("guest")
}

/// Returns whether a release names one kernel, and not a package that follows a series, like `6.12-cloud-amd64`.
fn is_version(release: &str) -> bool {
    release.bytes().filter(|byte| *byte == b'.').count() >= 2
}

/// Downloads a package into `directory`, which is empty.
pub(crate) fn download(package: &str, directory: &Path) -> Result<PathBuf, GuestError> {
    let mut download = Command::new("apt-get");
    // As root, apt would switch to a user that cannot write here.
    download.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]);
    output(download.arg(package).current_dir(directory))?;
    fs::read_dir(directory)
        .ok()
        .and_then(|mut entries| entries.next()?.ok())
        .map(|entry| entry.path())
        .ok_or_else(|| GuestError::NoKernel(format!("apt-get downloaded nothing for {package}")))
}

/// Downloads and unpacks one package. Its directory gets its name when it is complete.
fn unpack(cache: &Path, release: &str) -> Result<(), GuestError> {
    let work = tempfile::tempdir_in(cache).map_err(system("create a temporary directory"))?;
    let package = work.path().join("package");
    fs::create_dir(&package).map_err(system("create a temporary directory"))?;
    let package = download(&format!("linux-image-{release}"), &package)?;
    let root = work.path().join("root");
    output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(&root),
    )?;
    // modprobe reads the modules where current systems install them.
    output(
        Command::new(find_program("depmod").unwrap_or("depmod".into()))
            .arg("--basedir")
            .arg(&root)
            .arg(release),
    )?;
    fs::rename(&root, cache.join(release)).map_err(system("keep the kernel"))
}

/// Returns the numbers in a release, which order releases by age.
fn numbers(release: &str) -> Vec<u64> {
    release
        .trim_end_matches("amd64")
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_releases_sort_after_older_ones() {
        let mut releases = [
            "6.12.117+deb12-cloud-amd64",
            "6.12.90+deb12.1-cloud-amd64",
            "6.12.90+deb12-cloud-amd64",
            "6.1.0-40-cloud-amd64",
        ];
        releases.sort_by_key(|release| numbers(release));
        assert_eq!(
            releases,
            [
                "6.1.0-40-cloud-amd64",
                "6.12.90+deb12-cloud-amd64",
                "6.12.90+deb12.1-cloud-amd64",
                "6.12.117+deb12-cloud-amd64",
            ]
        );
    }

    #[test]
    fn flavours_are_told_apart() {
        for (release, cloud, plain) in [
            ("6.12.117+deb12-cloud-amd64", true, false),
            ("6.12.117+deb12-amd64", false, true),
            ("6.12.117+deb12-rt-amd64", false, false),
        ] {
            assert_eq!(Flavour::Cloud.has(release), cloud);
            assert_eq!(Flavour::Plain.has(release), plain);
        }
    }

    #[test]
    fn a_series_is_no_version() {
        assert!(is_version("6.12.117+deb12-cloud-amd64"));
        assert!(!is_version("6.12-cloud-amd64"));
    }
}
