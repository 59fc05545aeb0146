// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space of the device (GET_CONFIG, SET_CONFIG).

use vhost::vhost_user::message::{VHOST_USER_CONFIG_SIZE, VhostUserConfig};
use vm_memory::ByteValued;

use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::wire::{Message, leading_object};

impl<D: Device> Session<'_, D> {
    /// GET_CONFIG: reads from the config space. Bytes beyond the end of the config space are zero.
    pub(super) fn get_config(&self, message: &Message) -> Result<Answer, SessionError> {
        let config: VhostUserConfig =
            leading_object(&message.payload).ok_or_else(|| message.malformed())?;
        let (offset, size) = (config.offset as usize, config.size as usize);
        let end = offset.saturating_add(size);
        // The request must have room for the bytes of the reply.
        let room = message.payload.len() - size_of::<VhostUserConfig>();
        if end > VHOST_USER_CONFIG_SIZE as usize || room != size {
            // A reply without payload reports the failure.
            return Ok(Answer::Reply(Vec::new()));
        }
        let mut space = self.device.config();
        space.resize(space.len().max(end), 0);
        let mut reply = config.as_slice().to_vec();
        reply.extend_from_slice(space.get(offset..end).unwrap_or_default());
        Ok(Answer::Reply(reply))
    }

    /// SET_CONFIG: writes to the config space for the driver.
    pub(super) fn set_config(&self, message: &Message) -> Result<Answer, SessionError> {
        let (config, data) = config_payload(message).ok_or_else(|| message.malformed())?;
        self.device.write_config(config.offset as usize, data)?;
        self.keep();
        Ok(Answer::Ack)
    }
}

/// Decodes SET_CONFIG: where the driver writes, and which bytes.
fn config_payload(message: &Message) -> Option<(VhostUserConfig, &[u8])> {
    let config: VhostUserConfig = leading_object(&message.payload)?;
    let data = message.payload.get(size_of::<VhostUserConfig>()..)?;
    let end = config.offset.checked_add(config.size)?;
    let valid = end <= VHOST_USER_CONFIG_SIZE && data.len() == config.size as usize;
    valid.then_some((config, data))
}
