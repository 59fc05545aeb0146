// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sources of events: the path of an evdev node that can disappear and return.

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

/// How long to wait for the release of held keys before a grab. The host would not see the release and would repeat the
/// key forever. Often, Enter is held because it started the program.
const KEY_RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// Opens a node: a file that is read and written as events in the kernel's layout. Tests have their own sources.
pub trait Source: Send {
    /// Opens the node. Returns `None` if it does not exist.
    ///
    /// # Errors
    /// The node cannot be opened, or belongs to another device.
    fn open(&mut self) -> Result<Option<OwnedFd>, String>;

    /// Returns the current state of keys, switches, axes and touches.
    ///
    /// # Errors
    /// The device has disappeared.
    fn state(&self, node: BorrowedFd<'_>) -> io::Result<State>;

    /// Returns what the source needs from the sandbox.
    fn needs(&self) -> Needs {
        Needs::default()
    }
}

/// An evdev node at a path.
pub struct Evdev {
    path: PathBuf,
    opener: Opener,
    grab: bool,
    identity: Identity,
}

impl Evdev {
    /// Opens the node that the options name, and grabs it if requested.
    ///
    /// # Errors
    /// The node cannot be opened or grabbed, or is not an evdev node.
    pub fn new(options: Options) -> Result<(Self, OwnedFd), StartError> {
        let path = options.evdev_path;
        let opener = Opener::start(path.clone())?;
        let found = open_node(&opener, &path).map_err(StartError)?;
        let (node, identity) = found.ok_or_else(|| {
            StartError(format!("cannot open {}: {}", path.display(), Errno::NOENT))
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
                "{} is read-only; ignoring LEDs and sounds of the guest",
                evdev.path.display()
            );
        }
        Ok((evdev, node))
    }

    /// Returns the identity of the device.
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
        let Some((node, identity)) = open_node(&self.opener, &self.path)? else {
            return Ok(None);
        };
        if identity != self.identity {
            return Err(format!(
                "{} is a different device now: {:?}",
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

/// Opens the evdev node at `path` and reads its identity. Returns `None` if the path does not exist.
///
/// # Errors
/// Returns a message for the user.
fn open_node(opener: &Opener, path: &Path) -> Result<Option<(OwnedFd, Identity)>, String> {
    let path_text = path.display();
    let error_of = |errno: Errno| match errno {
        Errno::CHILD => format!("cannot open {path_text}: the process that opens it has ended"),
        Errno::NOTTY | Errno::INVAL => {
            format!("{path_text} is not an evdev node; those are /dev/input/event*")
        }
        errno => format!("cannot open {path_text}: {errno}"),
    };
    let node = match opener.open() {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened.map_err(error_of)?,
    };
    let identity = node::identity(node.as_fd()).map_err(error_of)?;
    if let Err(errno) = node::select_types(node.as_fd(), &FORWARDED_TYPES) {
        log::debug!("cannot restrict the event types: {errno}");
    }
    Ok(Some((node, identity)))
}

fn is_writable(node: &OwnedFd) -> bool {
    rustix::fs::fcntl_getfl(node).is_ok_and(|flags| flags.contains(OFlags::RDWR))
}
