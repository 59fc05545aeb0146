// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The directories that are searched for descriptors.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Data files of the distribution.
const DATA: &str = "/usr/share";
/// Default of `$XDG_DATA_DIRS`, the most specific directory first.
const DATA_DIRS: &str = "/usr/local/share:/usr/share";
/// Configuration by the administrator.
const CONFIG: &str = "/etc";
/// The directory of the descriptors below each of these.
const FOLDER: &str = "qemu/vhost-user";

/// The directories that can contain descriptors, from general to specific.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    data: Vec<PathBuf>,
    config: PathBuf,
    home: Option<PathBuf>,
}

impl Directories {
    /// Returns the directories for the environment of this process.
    pub fn from_environment() -> Self {
        Self::new(|name| env::var_os(name))
    }

    /// Returns the directories for these environment variables.
    ///
    /// The schema names only `/usr/share`. This function adds the directories in `$XDG_DATA_DIRS` (default
    /// `/usr/local/share:/usr/share`), whose first directory is the most specific one, and `$XDG_DATA_HOME` (default
    /// `$HOME/.local/share`), which is more specific than they are. If `$XDG_DATA_DIRS` does not contain `/usr/share`, that is the most
    /// general directory. Values that are empty or relative count as unset, as the XDG Base Directory Specification requires.
    pub fn new(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let absolute = |path: &PathBuf| path.is_absolute();
        let path = |name| variable(name).map(PathBuf::from).filter(absolute);
        let mut data: Vec<PathBuf> = Vec::new();
        let home = |name, default| path(name).or_else(|| Some(path("HOME")?.join(default)));
        let extra = variable("XDG_DATA_DIRS").unwrap_or_default();
        let mut extra: Vec<_> = env::split_paths(&extra).filter(absolute).collect();
        if extra.is_empty() {
            extra = env::split_paths(DATA_DIRS).collect();
        }
        for directory in home("XDG_DATA_HOME", ".local/share")
            .into_iter()
            .chain(extra)
        {
            if !data.contains(&directory) {
                data.push(directory);
            }
        }
        if !data.iter().any(|directory| directory == Path::new(DATA)) {
            data.push(DATA.into());
        }
        let home = home("XDG_CONFIG_HOME", ".config");
        Self {
            data: data.iter().rev().map(|path| path.join(FOLDER)).collect(),
            config: Path::new(CONFIG).join(FOLDER),
            home: home.map(|path| path.join(FOLDER)),
        }
    }

    /// Returns all directories.
    pub fn all(&self) -> Vec<PathBuf> {
        let mut all = self.data.clone();
        all.push(self.config.clone());
        all.extend(self.home.clone());
        all
    }

    /// Returns the directories that libvirt reads for virtual machines of the system.
    pub fn libvirt_system(&self) -> Vec<PathBuf> {
        vec![Path::new(DATA).join(FOLDER), self.config.clone()]
    }

    /// Returns the directories that libvirt reads for virtual machines of a user.
    pub fn libvirt_session(&self) -> Vec<PathBuf> {
        let mut session = self.libvirt_system();
        session.extend(self.home.clone());
        session
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directories(variables: &[(&str, &str)]) -> Directories {
        Directories::new(|name| {
            let variable = variables.iter().find(|variable| variable.0 == name)?;
            Some(variable.1.into())
        })
    }

    fn all(variables: &[(&str, &str)]) -> Vec<String> {
        let all = directories(variables).all().into_iter();
        let all = all.map(|path| path.into_os_string().into_string().unwrap());
        all.map(|path| path.strip_suffix("/qemu/vhost-user").unwrap().to_owned())
            .collect()
    }

    #[test]
    fn variables_that_are_unset_have_defaults() {
        assert_eq!(
            all(&[("HOME", "/home/me")]),
            [
                "/usr/share",
                "/usr/local/share",
                "/home/me/.local/share",
                "/etc",
                "/home/me/.config"
            ]
        );
        assert_eq!(
            all(&[
                ("HOME", "/home/me"),
                ("XDG_CONFIG_HOME", "/config"),
                ("XDG_DATA_HOME", "/data")
            ]),
            ["/usr/share", "/usr/local/share", "/data", "/etc", "/config"]
        );
        assert_eq!(all(&[]), ["/usr/share", "/usr/local/share", "/etc"]);
    }

    #[test]
    fn empty_and_relative_variables_count_as_unset() {
        for value in ["", "config", "./config"] {
            assert_eq!(
                all(&[
                    ("HOME", "/home/me"),
                    ("XDG_CONFIG_HOME", value),
                    ("XDG_DATA_DIRS", value),
                    ("XDG_DATA_HOME", value)
                ]),
                all(&[("HOME", "/home/me")]),
                "{value:?}"
            );
            assert_eq!(all(&[("HOME", value)]), all(&[]));
        }
    }

    #[test]
    fn data_directories_come_first_and_the_last_of_them_is_the_most_general() {
        assert_eq!(
            all(&[("XDG_DATA_DIRS", "/usr/local/share:/usr/share/:/opt/share")]),
            ["/opt/share", "/usr/share", "/usr/local/share", "/etc"]
        );
        assert_eq!(
            all(&[("XDG_DATA_DIRS", "/a:b::/c:/a")]),
            ["/usr/share", "/c", "/a", "/etc"]
        );
    }

    #[test]
    fn libvirt_reads_no_others() {
        let directories = directories(&[("XDG_DATA_DIRS", "/a"), ("HOME", "/home/me")]);
        let folder = |path: &str| Path::new(path).join(FOLDER);
        assert_eq!(
            directories.libvirt_system(),
            ["/usr/share", "/etc"].map(folder)
        );
        assert_eq!(
            directories.libvirt_session(),
            ["/usr/share", "/etc", "/home/me/.config"].map(folder)
        );
    }
}
