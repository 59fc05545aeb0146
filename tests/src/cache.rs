// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cache of files that tests download or build, shared by all clones of this repository: kernels, and tools of xtask.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// Environment variable that names another cache directory.
pub const CACHE: &str = "VHOST_DEVICE_CACHE";

/// Returns the directory: `vhost-device` in the user's cache (`XDG_CACHE_HOME`, `~/.cache`), or, if that cannot be written, `cache` in the
/// target directory.
pub fn directory() -> PathBuf {
    let candidates = candidates(|name| std::env::var_os(name));
    let is_writable =
        |path: &PathBuf| fs::create_dir_all(path).is_ok() && access(path, Access::WRITE_OK).is_ok();
    match candidates {
        Candidates::Given(path) => path,
        Candidates::OfUser(path) => path.filter(is_writable).unwrap_or_else(|| {
            let target = target_directory();
            target.unwrap_or_else(|_| "/tmp".into()).join("cache")
        }),
    }
}

/// Returns the target directory in which this program was built.
pub(crate) fn target_directory() -> io::Result<PathBuf> {
    let executable = std::env::current_exe()?;
    let profile = executable
        .ancestors()
        .skip(1)
        .find(|directory| !directory.ends_with("deps"));
    let target = profile.and_then(Path::parent);
    Ok(target.unwrap_or(Path::new("/tmp")).to_owned())
}

#[derive(Debug, PartialEq, Eq)]
enum Candidates {
    Given(PathBuf),
    OfUser(Option<PathBuf>),
}

fn candidates(variable: impl Fn(&str) -> Option<OsString>) -> Candidates {
    let absolute = |name| {
        let path = variable(name).map(PathBuf::from);
        path.filter(|path| Path::is_absolute(path))
    };
    if let Some(given) = absolute(CACHE) {
        return Candidates::Given(given);
    }
    let home = || Some(absolute("HOME")?.join(".cache"));
    let cache = absolute("XDG_CACHE_HOME").or_else(home);
    Candidates::OfUser(cache.map(|cache| cache.join("vhost-device")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Candidates {
        candidates(|name| {
            let (_, value) = variables.iter().find(|(other, _)| *other == name)?;
            Some(value.into())
        })
    }

    #[test]
    fn what_is_kept_outlives_a_clone() {
        let user = |path: &str| Candidates::OfUser(Some(path.into()));
        let home = ("HOME", "/home/a");
        assert_eq!(with(&[home]), user("/home/a/.cache/vhost-device"));
        assert_eq!(
            with(&[home, ("XDG_CACHE_HOME", "/cache")]),
            user("/cache/vhost-device")
        );
        // The specification says to ignore it.
        assert_eq!(
            with(&[home, ("XDG_CACHE_HOME", "cache")]),
            user("/home/a/.cache/vhost-device")
        );
        assert_eq!(
            with(&[home, (CACHE, "/given")]),
            Candidates::Given("/given".into())
        );
        assert_eq!(with(&[]), Candidates::OfUser(None));
    }
}
