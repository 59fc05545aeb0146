// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the control queue (VIRTIO 1.3, 5.7.6.8).

pub mod cursor;
pub mod display_info;
mod three_d;

use std::sync::Arc;

use vhost_device_common::chain::Chain;
use virtio_bindings::virtio_gpu as gpu;

use crate::backing::{Backing, MAX_ENTRIES};
use crate::display::{Query, Source};
use crate::format::Format;
use crate::protocol::{
    AttachBacking, CommandError, Create2d, Flush, Header, IdCommand, MemoryEntry, Response,
    SetScanout, Transfer2d, check_scanout, read,
};
use crate::state::State;
use crate::three_d::{ThreeD, read_back};

/// The state of a command that has not failed.
#[derive(Debug)]
pub enum Outcome {
    /// Finished.
    Done(Response),
    /// Finishes when the display has done something.
    Wait(Wait),
}

/// What a command waits for.
#[derive(Clone, Copy, Debug)]
pub enum Wait {
    /// The flushed rectangle has been sent to the display.
    Flush,
    /// The display has replied.
    Reply(Query),
}

/// Executes a command of the control queue. The header has already been read. `three_d` is `None` if the driver did not
/// accept VIRTIO_GPU_F_VIRGL.
pub fn process(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    header: &Header,
    chain: &mut Chain,
) -> Result<Outcome, CommandError> {
    match header.kind.get() {
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO => {
            return Ok(Outcome::Wait(Wait::Reply(Query::DisplayInfo)));
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_EDID => {
            let scanout = read::<IdCommand>(chain)?.id.get();
            check_scanout(scanout)?;
            return Ok(Outcome::Wait(Wait::Reply(Query::Edid { scanout })));
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH => {
            flush(state, three_d, &read(chain)?)?;
            return Ok(Outcome::Wait(Wait::Flush));
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D => {
            create_2d(state, three_d, &read(chain)?)?
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF => {
            let id = read::<IdCommand>(chain)?.id.get();
            state.resources.get(id)?;
            state.display.detach(Some(id), &state.resources);
            state.resources.remove(id)?;
            if let Some(renderer) = three_d.and_then(ThreeD::started_renderer) {
                renderer.remove_resource(id);
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT => {
            set_scanout(state, three_d, &read(chain)?)?
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D => {
            let command: Transfer2d = read(chain)?;
            let rectangle = command.rectangle.checked()?;
            let resource = state.resources.get_mut(command.resource.get())?;
            match three_d.filter(|_| resource.is_in_renderer()) {
                Some(three_d) if resource.contains(&rectangle) => three_d.transfer_2d(&command)?,
                _ => resource.transfer(chain.memory(), &rectangle, command.offset.get())?,
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING => {
            attach_backing(state, three_d, chain)?
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING => {
            let id = read::<IdCommand>(chain)?.id.get();
            state.resources.detach_backing(id)?;
            if let Some(renderer) = three_d.and_then(ThreeD::started_renderer) {
                renderer.detach_backing(id);
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID => {
            let id = read::<IdCommand>(chain)?.id.get();
            let resource = state.resources.get_mut(id)?;
            let uuid = match resource.uuid {
                Some(uuid) => uuid,
                None => *resource.uuid.insert(random_uuid()?),
            };
            let kind = gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_RESOURCE_UUID;
            return Ok(Outcome::Done(Response::new(kind, uuid)));
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO
        | gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET
            if three_d.is_none() =>
        {
            // No capability sets are offered.
            return Err(CommandError::InvalidParameter);
        }
        _ => {
            // Without 3D, the command is unknown, or part of a feature that is not offered.
            let three_d = three_d.ok_or(CommandError::Unspecified)?;
            let response = three_d::process(three_d, &mut state.resources, header, chain)?;
            return Ok(Outcome::Done(response));
        }
    }
    Ok(Outcome::Done(Response::no_data()))
}

/// Returns a random UUID (RFC 9562, version 4).
fn random_uuid() -> Result<[u8; 16], CommandError> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
        .map_err(|_| CommandError::Unspecified)?;
    let [.., version, _, variant, _, _, _, _, _, _, _] = &mut uuid;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    Ok(uuid)
}

/// Executes RESOURCE_CREATE_2D. A driver that uses contexts may attach the resource to them, so the renderer creates it
/// if it supports the format.
fn create_2d(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    command: &Create2d,
) -> Result<(), CommandError> {
    let format = Format::from_number(command.format.get()).ok_or(CommandError::InvalidParameter)?;
    let (width, height) = (command.width.get(), command.height.get());
    let resources = &mut state.resources;
    if let Some(three_d) = three_d.filter(|_| width > 0 && height > 0) {
        match three_d.create_2d(resources, command) {
            Err(CommandError::InvalidParameter | CommandError::Unspecified) => {}
            outcome => return outcome,
        }
    }
    resources.create(command.resource.get(), format, width, height)
}

fn set_scanout(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    command: &SetScanout,
) -> Result<(), CommandError> {
    let (scanout, id) = (command.scanout.get(), command.resource.get());
    check_scanout(scanout)?;
    let mut dmabuf = None;
    let source = match id {
        0 => None,
        resource => {
            let rectangle = command.rectangle.checked()?;
            let source = Source::new(resource, state.resources.get(resource)?, rectangle)
                .ok_or(CommandError::InvalidParameter)?;
            // QEMU shows the part of a dma-buf that starts at (0, 0), whatever the offset.
            if (rectangle.x, rectangle.y) == (0, 0) {
                dmabuf = state.display.dmabuf(resource);
                dmabuf = dmabuf.or_else(|| three_d?.export(resource).map(Arc::new));
            }
            if dmabuf.is_none() {
                state.resources.prepare_scanout(resource)?;
            }
            Some(source)
        }
    };
    state.display.set_scanout(scanout, source, dmabuf);
    Ok(())
}

fn flush(
    state: &mut State,
    mut three_d: Option<&mut ThreeD>,
    command: &Flush,
) -> Result<(), CommandError> {
    let rectangle = command.rectangle.checked()?;
    let id = command.resource.get();
    if !state.resources.get(id)?.contains(&rectangle) {
        return Err(CommandError::InvalidParameter);
    }
    if state.display.needs_pixels(id) {
        read_back(three_d.as_deref_mut(), &mut state.resources, id, &rectangle)?;
    }
    if state.display.dmabuf(id).is_some()
        && let Some(renderer) = three_d.and_then(ThreeD::started_renderer)
    {
        // Submits the pending work to the GPU. Readers of the dma-buf wait for its end through implicit fences.
        let _ = renderer.create_fence();
    }
    state.display.flush(id, &rectangle);
    Ok(())
}

fn attach_backing(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    chain: &mut Chain,
) -> Result<(), CommandError> {
    let command: AttachBacking = read(chain)?;
    let id = command.resource.get();
    state.resources.get(id)?;
    let count = command.entries.get();
    let size = u64::from(count) * size_of::<MemoryEntry>() as u64;
    if count == 0 || count > MAX_ENTRIES || chain.readable_len() < size {
        return Err(CommandError::InvalidParameter);
    }
    let mut backing = Backing::with_capacity(count);
    for _ in 0..count {
        let entry: MemoryEntry = read(chain)?;
        backing.push(entry.address.get(), entry.length.get());
    }
    state.resources.attach_backing(id, backing)?;
    let resource = state.resources.get(id)?;
    if resource.is_in_renderer()
        && let Some(renderer) = three_d.and_then(ThreeD::started_renderer)
        && let Some(backing) = &resource.backing
    {
        let outcome = renderer.attach_backing(id, backing, chain.memory());
        return outcome.inspect_err(|_| {
            let _ = state.resources.detach_backing(id);
        });
    }
    Ok(())
}
