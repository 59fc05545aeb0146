// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the console device.

use std::path::PathBuf;

use clap::Args;
use vhost_device_common::program::size;

use crate::log_file::Rotation;

/// Most characters of the name of a port.
const MAX_NAME: usize = 128;
/// Smallest size of files that are rotated.
const MIN_SIZE: u64 = 4 << 10;
/// Most older files that are kept.
const MAX_KEEP: u32 = 1000;
/// How files of --log are rotated by default.
const LOG_ROTATION: Rotation = Rotation {
    max_size: 16 << 20,
    keep: 1,
};

/// Options of the console device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Add a port that leads to BACKEND. The first port is the console. Repeat for up to 31 ports.
    ///
    /// BACKEND is one of pty[=LINK], unix=PATH, unix-connect=PATH, file=PATH[,append,max-size=SIZE,keep=N], fd=N and stdio.
    /// A port with a name is a channel, which programs in the guest open by this name; other ports are consoles. Write ,, for a
    /// comma in a path.
    #[arg(long = "port", value_name = "[name=NAME,]BACKEND", required = true, value_parser = PortOption::parse)]
    pub ports: Vec<PortOption>,

    /// Also write what the guest writes to a port to the file PATH. Repeat for several files.
    ///
    /// OPTIONS are port=N (0 by default), max-size=SIZE (16M) and keep=N (1). At max-size, PATH is renamed to PATH.1, PATH.1 to
    /// PATH.2, and so on; N older files are kept.
    #[arg(long = "log", value_name = "PATH[,OPTIONS]", value_parser = LogOption::parse)]
    pub logs: Vec<LogOption>,

    /// Remove control sequences that can harm a terminal from what the guest writes to consoles.
    #[arg(long)]
    pub filter: bool,

    /// Send rows before columns when a console is resized.
    ///
    /// Linux guests without the correction of 2025 expect this order.
    #[arg(long)]
    pub swap_resize: bool,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortOption {
    /// Its name for programs in the guest.
    pub name: Option<String>,
    pub backend: Backend,
}

/// Where a port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A pseudoterminal, with a symbolic link to it.
    Pty(Option<PathBuf>),
    /// A socket that clients connect to.
    Listen(PathBuf),
    /// A socket of another program.
    Connect(PathBuf),
    /// A file that is written.
    File {
        path: PathBuf,
        append: bool,
        rotation: Option<Rotation>,
    },
    /// An inherited file.
    Fd(i32),
    /// Standard input and output.
    Stdio,
}

/// A file beside a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOption {
    pub path: PathBuf,
    pub port: usize,
    pub rotation: Rotation,
}

/// Splits an option at its commas. Two commas stand for one that is a part of a value.
fn split(text: &str) -> Vec<(String, Option<String>)> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match (items.last_mut(), character) {
            (Some(item), ',') if characters.next_if_eq(&',').is_some() => item.push(','),
            (_, ',') => items.push(String::new()),
            (Some(item), other) => item.push(other),
            (None, _) => {}
        }
    }
    let item = |item: String| match item.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (item, None),
    };
    items.into_iter().map(item).collect()
}

fn path(key: &str, value: Option<String>) -> Result<PathBuf, String> {
    match value {
        Some(value) if !value.is_empty() => Ok(value.into()),
        _ => Err(format!("{key} needs a path")),
    }
}

fn number<T: std::str::FromStr>(key: &str, value: Option<String>) -> Result<T, String> {
    let number = value.and_then(|value| value.parse().ok());
    number.ok_or_else(|| format!("{key} needs a number"))
}

/// Options for rotation, as they are read.
#[derive(Default)]
struct Sizes {
    max_size: Option<u64>,
    keep: Option<u32>,
}

impl Sizes {
    /// Reads an option. Returns whether it is one for rotation.
    fn read(&mut self, key: &str, value: Option<String>) -> Result<(), String> {
        match key {
            "max-size" => {
                let bytes = size(value.as_deref().unwrap_or_default());
                let bytes = bytes.map_err(|error| format!("max-size {error}"))?;
                if bytes < MIN_SIZE {
                    return Err("max-size must be at least 4K".to_owned());
                }
                self.max_size = Some(bytes);
            }
            _ => {
                let keep = number("keep", value)?;
                if keep > MAX_KEEP {
                    return Err(format!("keep must be at most {MAX_KEEP}"));
                }
                self.keep = Some(keep);
            }
        }
        Ok(())
    }
}

impl PortOption {
    /// Parses a value of --port.
    ///
    /// # Errors
    /// Returns what is wrong, for the user.
    fn parse(text: &str) -> Result<Self, String> {
        let mut name = None;
        let mut backend = None;
        let mut sizes = Sizes::default();
        let mut append = false;
        for (key, value) in split(text) {
            let found = match key.as_str() {
                "name" => {
                    name = Some(check_name(value.unwrap_or_default())?);
                    continue;
                }
                "append" if value.is_none() => {
                    append = true;
                    continue;
                }
                "max-size" | "keep" => {
                    sizes.read(&key, value)?;
                    continue;
                }
                "pty" => Backend::Pty(value.map(|value| path("pty=", Some(value))).transpose()?),
                "unix" => Backend::Listen(path("unix", value)?),
                "unix-connect" => Backend::Connect(path("unix-connect", value)?),
                "file" => Backend::File {
                    path: path("file", value)?,
                    append: false,
                    rotation: None,
                },
                "fd" => {
                    let number = number("fd", value)?;
                    if number < 0 {
                        return Err("fd needs a number".to_owned());
                    }
                    Backend::Fd(number)
                }
                "stdio" if value.is_none() => Backend::Stdio,
                other => {
                    return Err(format!(
                        "unknown option {other:?}; use name, pty, unix, unix-connect, file, append, max-size, keep, fd or stdio"
                    ));
                }
            };
            if backend.replace(found).is_some() {
                return Err("a port leads to one place only; use --port once for each".to_owned());
            }
        }
        let mut backend = backend.ok_or("say where the port leads to, such as pty or unix=PATH")?;
        match &mut backend {
            Backend::File {
                append: appends,
                rotation,
                ..
            } => {
                *appends = append;
                *rotation = match (sizes.max_size, sizes.keep) {
                    (None, Some(_)) => return Err("keep needs max-size".to_owned()),
                    (max_size, keep) => max_size.map(|max_size| Rotation {
                        max_size,
                        keep: keep.unwrap_or(LOG_ROTATION.keep),
                    }),
                };
            }
            _ if append || sizes.max_size.or(sizes.keep.map(u64::from)).is_some() => {
                return Err("append, max-size and keep are for file= only".to_owned());
            }
            _ => {}
        }
        Ok(Self { name, backend })
    }
}

/// Checks the name of a port, which becomes the name of a file in the guest.
fn check_name(name: String) -> Result<String, String> {
    let is_good = |character: char| !character.is_control() && character != '/';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_good) {
        return Err(format!(
            "the name of a port has 1 to {MAX_NAME} bytes, without a slash and control characters"
        ));
    }
    Ok(name)
}

impl LogOption {
    /// Parses a value of --log.
    ///
    /// # Errors
    /// Returns what is wrong, for the user.
    fn parse(text: &str) -> Result<Self, String> {
        let mut items = split(text).into_iter();
        let first = items.next().map(|(key, value)| match value {
            Some(value) => format!("{key}={value}"),
            None => key,
        });
        let path = path("--log", first)?;
        let mut port = 0;
        let mut sizes = Sizes::default();
        for (key, value) in items {
            match key.as_str() {
                "port" => port = number("port", value)?,
                "max-size" | "keep" => sizes.read(&key, value)?,
                other => {
                    return Err(format!(
                        "unknown option {other:?}; use port, max-size or keep"
                    ));
                }
            }
        }
        Ok(Self {
            path,
            port,
            rotation: Rotation {
                max_size: sizes.max_size.unwrap_or(LOG_ROTATION.max_size),
                keep: sizes.keep.unwrap_or(LOG_ROTATION.keep),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn port(text: &str) -> PortOption {
        PortOption::parse(text).unwrap()
    }

    #[test]
    fn each_backend_is_understood() {
        let plain = |backend| PortOption {
            name: None,
            backend,
        };
        assert_eq!(port("pty"), plain(Backend::Pty(None)));
        assert_eq!(port("pty=/a"), plain(Backend::Pty(Some("/a".into()))));
        assert_eq!(port("unix=/a,,b"), plain(Backend::Listen("/a,b".into())));
        assert_eq!(
            port("unix-connect=a=b"),
            plain(Backend::Connect("a=b".into()))
        );
        assert_eq!(port("fd=7"), plain(Backend::Fd(7)));
        assert_eq!(port("stdio"), plain(Backend::Stdio));
        let named = PortOption {
            name: Some("org.qemu.guest_agent.0".to_owned()),
            backend: Backend::Listen("/a".into()),
        };
        assert_eq!(port("name=org.qemu.guest_agent.0,unix=/a"), named);
        assert_eq!(port("unix=/a,name=org.qemu.guest_agent.0"), named);
        let file = |append, rotation| {
            plain(Backend::File {
                path: "/a".into(),
                append,
                rotation,
            })
        };
        assert_eq!(port("file=/a"), file(false, None));
        assert_eq!(port("file=/a,append"), file(true, None));
        let rotation = |max_size, keep| Some(Rotation { max_size, keep });
        assert_eq!(
            port("file=/a,max-size=1M"),
            file(false, rotation(1 << 20, 1))
        );
        assert_eq!(
            port("file=/a,append,max-size=4K,keep=0"),
            file(true, rotation(4096, 0))
        );
    }

    #[test]
    fn each_mistake_is_named() {
        for (text, word) in [
            ("", "unknown option"),
            ("name=x", "where the port leads to"),
            ("pty,stdio", "one place only"),
            ("pty=", "needs a path"),
            ("unix", "needs a path"),
            ("unix=", "needs a path"),
            ("stdio=x", "unknown option"),
            ("fd=x", "needs a number"),
            ("fd=-1", "needs a number"),
            ("tcp=1", "unknown option \"tcp\""),
            ("name=,pty", "name of a port"),
            ("name=a/b,pty", "name of a port"),
            ("name=a\nb,pty", "name of a port"),
            ("pty,append", "for file= only"),
            ("unix=/a,max-size=4K", "for file= only"),
            ("file=/a,keep=1", "needs max-size"),
            ("file=/a,max-size=1", "at least 4K"),
            ("file=/a,max-size=x", "number of bytes"),
            ("file=/a,max-size=4K,keep=x", "needs a number"),
            ("file=/a,max-size=4K,keep=1001", "at most 1000"),
        ] {
            let error = PortOption::parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        let long = format!("name={},pty", "x".repeat(129));
        assert!(PortOption::parse(&long).is_err());
    }

    #[test]
    fn logs_are_rotated_by_default() {
        let log = |path: &str, port, max_size, keep| {
            let rotation = Rotation { max_size, keep };
            let path = path.into();
            Ok(LogOption {
                path,
                port,
                rotation,
            })
        };
        assert_eq!(LogOption::parse("/a=b"), log("/a=b", 0, 16 << 20, 1));
        assert_eq!(
            LogOption::parse("/a,port=3,keep=0,max-size=4k"),
            log("/a", 3, 4096, 0)
        );
        for text in ["", "/a,append", "/a,port", "/a,port=-1"] {
            assert!(LogOption::parse(text).is_err(), "{text}");
        }
    }
}
