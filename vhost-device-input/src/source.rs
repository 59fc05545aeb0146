// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where events come from: a path at which an evdev node is, goes, and comes back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use vhost_device_common::device::{Needs, StartError};

use crate::event::FORWARDED_TYPES;
use crate::identity::Identity;
use crate::node;
use crate::opener::Opener;
use crate::options::Options;
use crate::state::State;

/// How long a grab waits until no key is down: the host would not see it come up, and repeat it for
/// ever. It is Enter, most often, that starts a program.
const KEY_RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// What opens a node: a file from which events are read as the kernel lays them out, and to which they are written. Tests have
/// sources of their own.
pub trait Source: Send {
    /// Opens the node, if it is there.
    ///
    /// # Errors
    /// What is in the way: it cannot be opened, or is of another device.
    fn open(&mut self) -> Result<Option<OwnedFd>, String>;

    /// How keys, switches, axes and touches are now.
    ///
    /// # Errors
    /// The device is gone.
    fn state(&self, node: BorrowedFd<'_>) -> io::Result<State>;

    /// What it does for that.
    fn needs(&self) -> Needs {
        Needs::default()
    }
}

/// The evdev node at a path.
pub struct Evdev {
    path: PathBuf,
    opener: Opener,
    grab: bool,
    identity: Identity,
}

impl Evdev {
    /// Opens the node that the options name, and learns what it is.
    ///
    /// # Errors
    /// One line for the person who started the program.
    pub fn new(options: Options) -> Result<(Self, OwnedFd), StartError> {
        let path = options.evdev_path;
        let opener = Opener::start(path.clone())?;
        let (node, identity) = open_node(&opener, &path).map_err(|error| {
            StartError(match error {
                OpenError::Missing => format!("cannot open {}: {}", path.display(), Errno::NOENT),
                OpenError::Other(message) => message,
            })
        })?;
        let evdev = Self {
            path,
            opener,
            grab: !options.no_grab,
            identity,
        };
        if evdev.grab {
            let deadline = Instant::now() + KEY_RELEASE_TIMEOUT;
            while Instant::now() < deadline && node::has_key_down(node.as_fd()) == Ok(true) {
                std::thread::sleep(Duration::from_millis(5));
            }
            evdev.grab(&node).map_err(StartError)?;
        }
        if !is_writable(&node) {
            log::info!(
                "{} can be read only; lights and sounds of the guest are ignored",
                evdev.path.display()
            );
        }
        Ok((evdev, node))
    }

    /// What the device is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn grab(&self, node: &OwnedFd) -> Result<(), String> {
        let path = self.path.display();
        match node::grab(node.as_fd()) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(format!(
                "another program has grabbed {path}; end that program first"
            )),
            Err(errno) => Err(format!("cannot grab {path}: {errno}")),
        }
    }
}

impl Source for Evdev {
    fn open(&mut self) -> Result<Option<OwnedFd>, String> {
        let (node, identity) = match open_node(&self.opener, &self.path) {
            Ok(found) => found,
            Err(OpenError::Missing) => return Ok(None),
            Err(OpenError::Other(message)) => return Err(message),
        };
        if identity != self.identity {
            return Err(format!(
                "{} is another device now, {:?}",
                self.path.display(),
                String::from_utf8_lossy(&identity.name)
            ));
        }
        if self.grab {
            self.grab(&node)?;
        }
        Ok(Some(node))
    }

    fn state(&self, node: BorrowedFd<'_>) -> io::Result<State> {
        Ok(node::state(node, &self.identity)?)
    }

    fn needs(&self) -> Needs {
        let calls = node::calls().into_iter().chain(Opener::needs());
        Needs {
            queue: calls.collect(),
            ..Needs::default()
        }
    }
}

/// Why there is no node.
enum OpenError {
    /// Nothing is at the path.
    Missing,
    /// What is in the way.
    Other(String),
}

/// Has the evdev node at `path` opened, and learns what it is.
fn open_node(opener: &Opener, path: &Path) -> Result<(OwnedFd, Identity), OpenError> {
    let path_text = path.display();
    let error_of = |errno: Errno| {
        OpenError::Other(match errno {
            Errno::CHILD => format!("cannot open {path_text}: the process that does so has ended"),
            Errno::NOTTY | Errno::INVAL => {
                format!("{path_text} is not an evdev node; those are /dev/input/event*")
            }
            errno => format!("cannot open {path_text}: {errno}"),
        })
    };
    let node = opener.open().map_err(|errno| match errno {
        Errno::NOENT => OpenError::Missing,
        errno => error_of(errno),
    })?;
    let identity = node::identity(node.as_fd()).map_err(error_of)?;
    if let Err(errno) = node::select_types(node.as_fd(), &FORWARDED_TYPES) {
        log::debug!("cannot leave out events that are of no use: {errno}");
    }
    Ok((node, identity))
}

fn is_writable(node: &OwnedFd) -> bool {
    rustix::fs::fcntl_getfl(node).is_ok_and(|flags| flags.contains(OFlags::RDWR))
}
