// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the cursor queue (VIRTIO 1.3, 5.7.6.10).

use vhost_device_common::chain::Chain;
use virtio_bindings::virtio_gpu as gpu;

use crate::protocol::{CURSOR_SIZE, CommandError, Cursor, Header, check_scanout, read};
use crate::state::State;
use crate::three_d::{ThreeD, read_back};

/// Executes a command of the cursor queue.
pub fn process(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    chain: &mut Chain,
) -> Result<(), CommandError> {
    let header: Header = read(chain)?;
    let command: Cursor = read(chain)?;
    let (scanout, id) = (command.scanout.get(), command.resource.get());
    log::trace!("cursor command {:#x}", header.kind);
    check_scanout(scanout)?;
    let image = match header.kind.get() {
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_MOVE_CURSOR => None,
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR if id == 0 => None,
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR => {
            let hot_spot = (command.hot_x.get(), command.hot_y.get());
            Some((hot_spot, cursor_image(state, three_d, id)?))
        }
        _ => return Err(CommandError::Unspecified),
    };
    let position = (command.x.get(), command.y.get());
    state.display.set_cursor(scanout, position, id != 0, image);
    Ok(())
}

/// Returns the pixels of a resource that has the size of a cursor. The alpha byte is used even if the format has no
/// alpha, because Linux creates its cursors in such a format.
fn cursor_image(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    id: u32,
) -> Result<Vec<u32>, CommandError> {
    let resource = state.resources.get(id)?;
    let all = resource.bounds()?;
    if (all.width, all.height) != (CURSOR_SIZE, CURSOR_SIZE) {
        return Err(CommandError::InvalidParameter);
    }
    state.resources.prepare_scanout(id)?;
    read_back(three_d, &mut state.resources, id, &all)?;
    let resource = state.resources.get(id)?;
    Ok(resource.rows(0, CURSOR_SIZE).to_vec())
}
