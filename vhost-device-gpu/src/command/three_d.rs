// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The 3D commands (VIRTIO 1.3, 5.7.6.8).

use vhost_device_common::chain::Chain;
use virtio_bindings::virtio_gpu as gpu;
use zerocopy::IntoBytes;

use crate::capsets::Capsets;
use crate::protocol::{
    CapsetInfo, CommandError, CreateContext, GetCapset, Header, IdCommand, Response, Transfer3d,
    read,
};
use crate::resource_table::ResourceTable;
use crate::three_d::ThreeD;
use crate::virgl::Direction;

/// Most bytes of commands in one SUBMIT_3D. Linux guests stay far below.
const MAX_COMMAND_BYTES: u32 = 16 << 20;

/// Executes a command that requires VIRTIO_GPU_F_VIRGL.
pub fn process(
    three_d: &mut ThreeD,
    resources: &mut ResourceTable,
    header: &Header,
    chain: &mut Chain,
) -> Result<Response, CommandError> {
    let context = header.context_id.get();
    match header.kind.get() {
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO => {
            return capset_info(&three_d.capsets, read::<IdCommand>(chain)?.id.get());
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET => {
            return capset(three_d, &read(chain)?);
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_CREATE => {
            let command: CreateContext = read(chain)?;
            let length = command.name_length.get() as usize;
            let name = command
                .name
                .as_flattened()
                .get(..length)
                .ok_or(CommandError::InvalidParameter)?;
            three_d.start_renderer()?.create_context(context, name)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DESTROY => {
            three_d.start_renderer()?.destroy_context(context)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE => {
            let id = read::<IdCommand>(chain)?.id.get();
            // Linux also attaches resources whose format the renderer does not support; contexts cannot use them.
            if resources.get(id)?.is_in_renderer() {
                three_d.start_renderer()?.attach_to_context(context, id)?;
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE => {
            let id = read::<IdCommand>(chain)?.id.get();
            if resources.get(id)?.is_in_renderer() {
                three_d.start_renderer()?.detach_from_context(context, id)?;
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_3D => {
            three_d.create(resources, &read(chain)?)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D => {
            let command = transfer(resources, chain)?;
            three_d.transfer(Direction::ToHost, context, &command)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D => {
            let command = transfer(resources, chain)?;
            three_d.transfer(Direction::FromHost, context, &command)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SUBMIT_3D => {
            let size = read::<IdCommand>(chain)?.id.get();
            if size > MAX_COMMAND_BYTES
                || !size.is_multiple_of(4)
                || chain.readable_len() < size.into()
            {
                return Err(CommandError::InvalidParameter);
            }
            let mut commands = vec![0u32; size as usize / 4];
            chain.read(commands.as_mut_bytes())?;
            three_d.start_renderer()?.submit(context, &mut commands)?;
        }
        _ => return Err(CommandError::Unspecified),
    }
    Ok(Response::no_data())
}

fn capset_info(capsets: &Capsets, index: u32) -> Result<Response, CommandError> {
    let capset = capsets
        .sets
        .get(index as usize)
        .ok_or(CommandError::InvalidParameter)?;
    let info = CapsetInfo {
        id: capset.id.into(),
        max_version: capset.max_version.into(),
        max_size: capset.size.into(),
        padding: 0.into(),
    };
    let kind = gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET_INFO;
    Ok(Response::new(kind, info.as_bytes()))
}

fn capset(three_d: &mut ThreeD, command: &GetCapset) -> Result<Response, CommandError> {
    let (id, version) = (command.id.get(), command.version.get());
    let mut capsets = three_d.capsets.sets.iter();
    let capset = *capsets
        .find(|capset| capset.id == id && version <= capset.max_version)
        .ok_or(CommandError::InvalidParameter)?;
    let kind = gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET;
    let body = three_d.start_renderer()?.fill_capset(&capset, version)?;
    Ok(Response::new(kind, body))
}

/// Reads the command of a transfer, whose resource must be in the renderer.
fn transfer(resources: &ResourceTable, chain: &mut Chain) -> Result<Transfer3d, CommandError> {
    let command: Transfer3d = read(chain)?;
    match resources.get(command.resource.get())?.is_in_renderer() {
        true => Ok(command),
        false => Err(CommandError::InvalidParameter),
    }
}
