// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the control queue (VIRTIO 1.3, 5.7.6.8).

pub mod cursor;
pub mod reply;
mod three_d;

use std::sync::Arc;

use vhost_device_common::chain::Chain;
use virtio_bindings::virtio_gpu as gpu;

use crate::backing::{Backing, MAX_ENTRIES};
use crate::display::{Query, Source};
use crate::format::Format;
use crate::protocol::{
    AttachBacking, Create2d, Flush, Header, MemoryEntry, Number, Refusal, Response, SetScanout,
    Transfer2d, check_scanout, read,
};
use crate::state::State;
use crate::three_d::{ThreeD, read_back};

/// What has become of a command.
#[derive(Debug)]
pub enum Outcome {
    /// It is carried out.
    Done(Response),
    /// It is carried out when the display has what was flushed.
    Flushing,
    /// It is carried out when the display has answered.
    Asking(Query),
}

/// Carries out a command of the control queue, whose header was taken. There is no `three_d` for a driver that did not ask for it.
pub fn control(
    state: &mut State,
    mut three_d: Option<&mut ThreeD>,
    header: &Header,
    chain: &mut Chain,
) -> Result<Outcome, Refusal> {
    match header.kind.get() {
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO => {
            return Ok(Outcome::Asking(Query::DisplayInfo));
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_EDID => {
            let scanout = read::<Number>(chain)?.number.get();
            check_scanout(scanout)?;
            return Ok(Outcome::Asking(Query::Edid { scanout }));
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH => {
            flush(state, three_d, &read(chain)?)?;
            return Ok(Outcome::Flushing);
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D => {
            create_2d(state, three_d, &read(chain)?)?
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF => {
            let number = read::<Number>(chain)?.number.get();
            state.resources.get(number)?;
            state.display.detach(Some(number), &state.resources);
            state.resources.remove(number)?;
            if let Some(renderer) = three_d.and_then(ThreeD::started) {
                renderer.remove_resource(number);
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT => {
            set_scanout(state, three_d, &read(chain)?)?
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D => {
            let command: Transfer2d = read(chain)?;
            let rectangle = command.rectangle.checked().ok_or(Refusal::Parameter)?;
            let (number, offset) = (command.resource.get(), command.offset.get());
            let resource = state.resources.get_mut(number)?;
            match three_d.filter(|_| resource.is_rendered()) {
                Some(three_d) if resource.has(&rectangle) => {
                    three_d.transfer_2d(number, &rectangle, offset)?
                }
                _ => resource.transfer(chain.memory(), &rectangle, offset)?,
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING => {
            attach_backing(state, three_d, chain)?
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING => {
            let number = read::<Number>(chain)?.number.get();
            state.resources.detach(number)?;
            if let Some(renderer) = three_d.and_then(ThreeD::started) {
                renderer.detach_backing(number);
            }
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID => {
            let resource = state
                .resources
                .get_mut(read::<Number>(chain)?.number.get())?;
            let uuid = match resource.uuid {
                Some(uuid) => uuid,
                None => *resource.uuid.insert(random_uuid()?),
            };
            return Ok(Outcome::Done(Response {
                kind: gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_RESOURCE_UUID,
                body: uuid.to_vec(),
            }));
        }
        kind => match three_d.take() {
            Some(three_d) => {
                let response = three_d::control(three_d, &mut state.resources, header, chain)?;
                return Ok(Outcome::Done(response));
            }
            // There is no set of capabilities that one could ask for.
            None if matches!(
                kind,
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO
                    | gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET
            ) =>
            {
                return Err(Refusal::Parameter);
            }
            // Unknown, or of a feature that is not offered.
            None => return Err(Refusal::Unspecified),
        },
    }
    Ok(Outcome::Done(Response::no_data()))
}

/// A random UUID (RFC 9562, version 4).
fn random_uuid() -> Result<[u8; 16], Refusal> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
        .map_err(|_| Refusal::Unspecified)?;
    let [.., version, _, variant, _, _, _, _, _, _, _] = &mut uuid;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    Ok(uuid)
}

/// RESOURCE_CREATE_2D. A driver that has contexts may attach it to them: then it is the renderer's too, if that knows the format.
fn create_2d(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    command: &Create2d,
) -> Result<(), Refusal> {
    let format = Format::from_number(command.format.get()).ok_or(Refusal::Parameter)?;
    let (width, height) = (command.width.get(), command.height.get());
    let resources = &mut state.resources;
    if let Some(three_d) = three_d.filter(|_| width > 0 && height > 0) {
        match three_d.create_2d(resources, command) {
            Err(Refusal::Parameter | Refusal::Unspecified) => {}
            outcome => return outcome,
        }
    }
    resources.create(command.resource.get(), format, width, height)
}

fn set_scanout(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    command: &SetScanout,
) -> Result<(), Refusal> {
    let (scanout, number) = (command.scanout.get(), command.resource.get());
    check_scanout(scanout)?;
    let mut buffer = None;
    let source = match number {
        0 => None,
        resource => {
            let rectangle = command.rectangle.checked().ok_or(Refusal::Parameter)?;
            let source = Source::new(resource, state.resources.get(resource)?, rectangle)
                .ok_or(Refusal::Parameter)?;
            // QEMU takes the part that is shown for one that begins at (0, 0) of a buffer.
            if (rectangle.x, rectangle.y) == (0, 0) {
                buffer = state.display.buffer(resource);
                buffer = buffer.or_else(|| three_d?.export(resource).map(Arc::new));
            }
            if buffer.is_none() {
                state.resources.prepare(resource)?;
            }
            Some(source)
        }
    };
    state.display.set_scanout(scanout, source, buffer);
    Ok(())
}

fn flush(
    state: &mut State,
    mut three_d: Option<&mut ThreeD>,
    command: &Flush,
) -> Result<(), Refusal> {
    let rectangle = command.rectangle.checked().ok_or(Refusal::Parameter)?;
    let number = command.resource.get();
    if !state.resources.get(number)?.has(&rectangle) {
        return Err(Refusal::Parameter);
    }
    if state.display.shows_pixels(number) {
        read_back(
            three_d.as_deref_mut(),
            &mut state.resources,
            number,
            &rectangle,
        )?;
    }
    if state.display.buffer(number).is_some()
        && let Some(renderer) = three_d.and_then(ThreeD::started)
    {
        // Has the GPU begin with all that was submitted; whoever reads the buffer waits for the end of it.
        let _ = renderer.create_fence();
    }
    state.display.flush(number, &rectangle);
    Ok(())
}

fn attach_backing(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    chain: &mut Chain,
) -> Result<(), Refusal> {
    let command: AttachBacking = read(chain)?;
    let number = command.resource.get();
    state.resources.get(number)?;
    let count = command.entries.get();
    let size = u64::from(count) * size_of::<MemoryEntry>() as u64;
    if count == 0 || count > MAX_ENTRIES || chain.readable_len() < size {
        return Err(Refusal::Parameter);
    }
    let mut backing = Backing::with_room_for(count);
    for _ in 0..count {
        let entry: MemoryEntry = read(chain)?;
        backing.push(entry.address.get(), entry.length.get());
    }
    state.resources.attach(number, backing)?;
    let resource = state.resources.get(number)?;
    if resource.is_rendered()
        && let Some(renderer) = three_d.and_then(ThreeD::started)
        && let Some(backing) = resource.backing()
    {
        let outcome = renderer.attach_backing(number, backing, chain.memory());
        return outcome.inspect_err(|_| {
            let _ = state.resources.detach(number);
        });
    }
    Ok(())
}
