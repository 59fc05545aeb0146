// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end's own channel to the front-end (SET_BACKEND_REQ_FD).

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use vhost::vhost_user::message::BackendReq;

use super::message::send_backend_request;

/// Tells the front-end that the config space has changed (CONFIG_CHANGE_MSG).
///
/// No reply is asked for: QEMU reads the config space, by the very socket that the session serves,
/// before it would answer. The channel goes with the connection, whoever still has this.
#[derive(Clone, Debug)]
pub struct ConfigChange(Weak<OwnedFd>);

impl ConfigChange {
    /// Makes one that sends on `channel`.
    pub fn new(channel: &Arc<OwnedFd>) -> Self {
        Self(Arc::downgrade(channel))
    }

    /// Sends the notification. Never waits: a front-end that does not read has unread notifications
    /// already, and one is enough.
    pub fn send(&self) {
        let Some(channel) = self.0.upgrade() else {
            return;
        };
        if let Err(error) = send_backend_request(&channel, BackendReq::CONFIG_CHANGE_MSG.into()) {
            log::debug!("the front-end was not told of a change in the config space: {error}");
        }
    }
}
