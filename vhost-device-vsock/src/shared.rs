// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device and the handler share: the options, and the state that other threads read or change.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::options::{Forward, Options};
use crate::packet::Kind;

/// VIRTIO_VSOCK_F_SEQPACKET: connections of messages.
pub const SEQPACKET: u64 = 1 << 1;

/// A socket on which programs of the host connect to the guest.
pub type Listener = (Arc<OwnedFd>, Kind);

/// Shared by the device and its handler.
#[derive(Debug)]
pub struct Shared {
    pub options: Options,
    /// The listening sockets, once they are open.
    listeners: Mutex<Vec<Listener>>,
    /// The features that the driver accepted.
    pub features: AtomicU64,
    /// Increases with each new driver, which does not know the connections of the previous one.
    pub driver: AtomicU64,
    /// The driver has connections of which this process does not know.
    pub is_reset_due: AtomicBool,
    pub counters: Counters,
}

impl Shared {
    pub fn new(options: Options) -> Self {
        Self {
            options,
            listeners: Mutex::default(),
            features: AtomicU64::new(0),
            driver: AtomicU64::new(0),
            is_reset_due: AtomicBool::new(false),
            counters: Counters::default(),
        }
    }

    pub fn listeners(&self) -> MutexGuard<'_, Vec<Listener>> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the paths of the listening sockets.
    pub fn listening_paths(&self) -> Vec<(PathBuf, Kind)> {
        let path = self.options.uds_path.as_ref();
        let paths = path.map(|path| {
            [
                (path.clone(), Kind::Stream),
                (seqpacket_path(path.clone()), Kind::Seqpacket),
            ]
        });
        paths.into_iter().flatten().collect()
    }

    /// Returns the sibling guest with this address.
    pub fn sibling(&self, cid: u32) -> Option<&Forward> {
        let mut forwards = self.options.forward.iter();
        forwards.find(|forward| forward.cid == cid)
    }

    /// Returns whether the guest can use connections of this type.
    pub fn accepts(&self, kind: Kind) -> bool {
        kind == Kind::Stream || self.features.load(Ordering::Relaxed) & SEQPACKET != 0
    }
}

/// Returns the path of the socket for messages, beside that for streams.
pub fn seqpacket_path(path: PathBuf) -> PathBuf {
    let mut path = path.into_os_string();
    path.push("_seqpacket");
    path.into()
}

/// Numbers of connections. The queue thread writes them.
#[derive(Debug, Default)]
pub struct Counters {
    /// At present.
    pub open: AtomicU64,
    /// Opened by the guest, since the start of the process.
    pub by_guest: AtomicU64,
    /// Opened by the host.
    pub by_host: AtomicU64,
    /// Refused.
    pub refused: AtomicU64,
    /// Reset by the guest.
    pub reset_by_guest: AtomicU64,
    /// Reset by the device, because of an error or a timeout.
    pub reset_by_device: AtomicU64,
}

/// Adds one to a counter.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    /// Returns all numbers by their names.
    pub fn to_json(&self) -> Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "open": get(&self.open),
            "opened-by-guest": get(&self.by_guest),
            "opened-by-host": get(&self.by_host),
            "refused": get(&self.refused),
            "reset-by-guest": get(&self.reset_by_guest),
            "reset-by-device": get(&self.reset_by_device),
        })
    }
}
