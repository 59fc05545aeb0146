// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space of the device (GET_CONFIG, SET_CONFIG).

use vhost::vhost_user::message::{VHOST_USER_CONFIG_SIZE, VhostUserConfig};
use vm_memory::ByteValued;

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::wire::{Message, leading_object};

impl<D: Device> Session<'_, D> {
    /// `None` if the payload is malformed. Past the end of the config space all is zero.
    pub(super) fn get_config(&self, message: &Message) -> Option<Answer> {
        let config: VhostUserConfig = leading_object(&message.payload)?;
        let (offset, size) = (config.offset as usize, config.size as usize);
        let end = offset.checked_add(size)?;
        // The header must be followed by as many bytes as the answer will have.
        let room = message.payload.len() - size_of::<VhostUserConfig>();
        if end > VHOST_USER_CONFIG_SIZE as usize || room != size {
            // An answer without payload is how this request fails.
            return Some(Answer::Reply(Vec::new()));
        }
        let mut space = self.device.config();
        space.resize(space.len().max(end), 0);
        let mut reply = config.as_slice().to_vec();
        reply.extend_from_slice(space.get(offset..end)?);
        Some(Answer::Reply(reply))
    }

    /// `None` if the payload is malformed.
    pub(super) fn set_config(&self, message: &Message) -> Option<Result<Answer, SessionError>> {
        let (config, data) = config_payload(message)?;
        Some(
            match self.device.write_config(config.offset as usize, data) {
                Ok(()) => {
                    self.keep();
                    Ok(Answer::Ack)
                }
                Err(error) => Err(error.into()),
            },
        )
    }
}

/// Where the driver writes in the config space, and what.
fn config_payload(message: &Message) -> Option<(VhostUserConfig, &[u8])> {
    let config: VhostUserConfig = leading_object(&message.payload)?;
    let data = message.payload.get(size_of::<VhostUserConfig>()..)?;
    let end = config.offset.checked_add(config.size)?;
    let valid = end <= VHOST_USER_CONFIG_SIZE && data.len() == config.size as usize;
    valid.then_some((config, data))
}
