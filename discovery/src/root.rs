// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The directory that is used as `/`.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};
use std::{fs, io};

use rustix::io::Errno;

/// Limit for the symbolic links in one path. It is the same as the kernel's.
const MAX_LINKS: usize = 40;

/// The host's own `/`, or a directory in its place: paths, including absolute links and `..`, then have the meaning that they would have
/// after chroot(2).
#[derive(Clone, Debug)]
pub struct Root(Option<PathBuf>);

impl Root {
    /// Returns the `/` of this process.
    pub fn host() -> Self {
        Self(None)
    }

    /// Returns a root that uses `directory` as `/`.
    ///
    /// # Errors
    /// Fails if `directory` does not exist or is not a directory.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let directory = directory.canonicalize()?;
        if !directory.is_dir() {
            return Err(Errno::NOTDIR.into());
        }
        Ok(Self(Some(directory).filter(|path| path != Path::new("/"))))
    }

    /// Returns the path on the host of `path` in this root, if none of its directories is a link.
    pub fn outside(&self, path: &Path) -> PathBuf {
        match &self.0 {
            Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_owned(),
        }
    }

    /// Follows all links of `path`. Returns the path in this root.
    ///
    /// # Errors
    /// Fails if the file does not exist.
    pub fn real(&self, path: &Path) -> io::Result<PathBuf> {
        let Some(root) = &self.0 else {
            return path.canonicalize();
        };
        let resolved = self.resolve(path)?;
        let inside = resolved.strip_prefix(root).unwrap_or(&resolved);
        Ok(Path::new("/").join(inside))
    }

    /// Follows all links of `path` within this root. Returns the path on the host.
    ///
    /// # Errors
    /// Fails if the file does not exist. With the host's own root, the path is returned as it is.
    pub fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        let Some(root) = &self.0 else {
            return Ok(path.to_owned());
        };
        let mut resolved = PathBuf::new();
        let mut left = names(path);
        let mut links = 0;
        while let Some(name) = left.pop() {
            if name == ".." {
                resolved.pop();
                continue;
            }
            let here = root.join(&resolved).join(&name);
            if !fs::symlink_metadata(&here)?.is_symlink() {
                resolved.push(name);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP.into());
            }
            let target = fs::read_link(&here)?;
            if target.is_absolute() {
                resolved = PathBuf::new();
            }
            left.append(&mut names(&target));
        }
        Ok(root.join(resolved))
    }
}

/// Returns the names in `path`, the first one last.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        Component::ParentDir => Some(OsStr::new("..")),
        _ => None,
    });
    names.map(OsStr::to_owned).rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_and_parents_stay_inside() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::new(directory.path()).unwrap();
        let inside = directory.path().canonicalize().unwrap();
        fs::create_dir_all(inside.join("usr/bin")).unwrap();
        fs::write(inside.join("usr/bin/program"), "").unwrap();
        symlink("/usr/bin", inside.join("bin")).unwrap();
        symlink("../../../../bin/program", inside.join("usr/link")).unwrap();
        symlink("usr", inside.join("relative")).unwrap();
        for path in [
            "/usr/bin/program",
            "/bin/program",
            "/usr/link",
            "/relative/bin/program",
            "/../../usr/./bin/../bin/program",
        ] {
            let resolved = root.resolve(Path::new(path)).unwrap();
            assert_eq!(resolved, inside.join("usr/bin/program"), "{path}");
            let real = root.real(Path::new(path)).unwrap();
            assert_eq!(real, Path::new("/usr/bin/program"), "{path}");
        }
        assert_eq!(
            root.outside(Path::new("/bin/program")),
            inside.join("bin/program")
        );
    }

    #[test]
    fn a_path_that_leads_nowhere_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::new(directory.path()).unwrap();
        symlink("loop", directory.path().join("loop")).unwrap();
        symlink("/etc/passwd", directory.path().join("dangling")).unwrap();
        let error = |path: &str| root.resolve(Path::new(path)).unwrap_err();
        assert_eq!(
            error("/loop").raw_os_error(),
            Some(Errno::LOOP.raw_os_error())
        );
        assert_eq!(error("/dangling").kind(), io::ErrorKind::NotFound);
        assert_eq!(error("/usr/bin").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_root_must_be_a_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        Root::new(file.path()).unwrap_err();
        Root::new(&file.path().join("none")).unwrap_err();
    }
}
