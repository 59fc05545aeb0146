// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The input device: its config space, and the node that its queues share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vhost_device_common::device::{ConfigError, Device, Needs, StartError, StateError, Watcher};
use vhost_device_common::{lock, state};

use crate::config::{CONFIG_SIZE, Selection, config_space};
use crate::handler::InputHandler;
use crate::host_device::HostDevice;
use crate::identity::Identity;
use crate::options::Options;
use crate::report::Suspended;
use crate::saved::Saved;
use crate::source::{Evdev, Source};

/// The input device.
pub struct Input {
    identity: Arc<Identity>,
    selection: Mutex<Selection>,
    host: Arc<Mutex<HostDevice>>,
    /// What the next event queue needs from the one that has stopped.
    suspended: Arc<Mutex<Suspended>>,
}

impl Input {
    /// Creates a device whose events come from `node`. When that disappears, `source` opens it again.
    pub fn new(identity: Identity, source: impl Source + 'static, node: OwnedFd) -> Self {
        Self {
            identity: Arc::new(identity),
            selection: Mutex::default(),
            host: Arc::new(Mutex::new(HostDevice::new(source, node))),
            suspended: Arc::default(),
        }
    }
}

impl Device for Input {
    const TYPE: &'static str = "input";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio input device";
    const IN_ORDER: bool = true;
    const STATE_VERSION: u32 = 1;

    type Options = Options;
    type Handler = InputHandler;

    fn capabilities() -> Vec<&'static str> {
        vec!["evdev-path", "no-grab"]
    }

    fn open(options: Options) -> Result<Self, StartError> {
        let (evdev, node) = Evdev::new(options)?;
        let identity = evdev.identity().clone();
        log::info!(
            "serving input device {:?}",
            String::from_utf8_lossy(&identity.name)
        );
        Ok(Self::new(identity, evdev, node))
    }

    /// `eventq` and `statusq` (VIRTIO 1.3, 5.8.2).
    fn num_queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        config_space(&self.identity, *lock(&self.selection))
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        if offset.saturating_add(size) > CONFIG_SIZE {
            return Err(ConfigError { offset, size });
        }
        lock(&self.selection).write(offset, data);
        Ok(())
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<InputHandler> {
        InputHandler::new(
            Arc::clone(&self.identity),
            Arc::clone(&self.host),
            Arc::clone(&self.suspended),
            watcher,
        )
    }

    fn needs(&self) -> Needs {
        lock(&self.host).needs()
    }

    fn reset(&self) {
        *lock(&self.selection) = Selection::default();
        *lock(&self.suspended) = Suspended::default();
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(&Saved::new(*lock(&self.selection), &lock(&self.suspended)))
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let (selection, suspended) = state::decode::<Saved>(state)?.check()?;
        *lock(&self.selection) = selection;
        *lock(&self.suspended) = suspended;
        Ok(())
    }
}
