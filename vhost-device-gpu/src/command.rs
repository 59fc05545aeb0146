// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the control queue (VIRTIO 1.3, 5.7.6.8) and of the cursor queue (5.7.6.10).

use std::sync::Arc;

use vhost_device_common::chain::{Chain, ChainError};
use virtio_bindings::virtio_gpu as gpu;
use zerocopy::{FromZeros, IntoBytes};

use crate::display::{Display, Query, Source};
use crate::edid;
use crate::format::Format;
use crate::protocol::{
    AttachBacking, CURSOR_SIZE, Create2d, Cursor, DisplayMode, EdidHead, Flush, Header, MAX_EDID,
    MAX_SCANOUTS, MemoryEntry, Number, Refusal, Response, SetScanout, Transfer2d,
};
use crate::rectangle::Rectangle;
use crate::resource::{Backing, MAX_ENTRIES, Resource};
use crate::state::State;
use crate::three_d::{self, ThreeD};

/// Width and height of a scanout at most: displays count in 16 bits, with a sign.
const MAX_SCANOUT_SIDE: u32 = i16::MAX as u32;
/// Bytes of the header at the front of an answer of the display, which is the response to the driver.
const HEADER_SIZE: usize = size_of::<Header>();

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

impl From<ChainError> for Refusal {
    fn from(error: ChainError) -> Self {
        match error {
            ChainError::TooShort { .. } => Self::Parameter,
            ChainError::NotMemory => Self::Unspecified,
        }
    }
}

/// Takes a part of a command.
pub fn read<T: FromZeros + IntoBytes + zerocopy::FromBytes>(
    chain: &mut Chain,
) -> Result<T, ChainError> {
    let mut object = T::new_zeroed();
    chain.read(object.as_mut_bytes())?;
    Ok(object)
}

/// The response of a command that has nothing else to say.
pub fn no_data() -> Response {
    Response {
        kind: gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA,
        body: Vec::new(),
    }
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
    Ok(Outcome::Done(no_data()))
}

/// The response to a command that the display has answered.
pub fn answered(query: Query, answer: &[u8]) -> Response {
    let kind = match query {
        Query::DisplayInfo => gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO,
        Query::Edid { .. } => gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_EDID,
        Query::ProtocolFeatures | Query::Shown { .. } => return Refusal::Unspecified.into(),
    };
    Response {
        kind,
        body: answer.get(HEADER_SIZE..).unwrap_or_default().to_vec(),
    }
}

/// The response to a command that no display has answered: one screen. What its EDID is, a display that is there would have to say.
pub fn unanswered(query: Query, display: &Display) -> Response {
    let body = match query {
        Query::DisplayInfo => {
            let mut modes = [DisplayMode::default(); MAX_SCANOUTS];
            let [first, ..] = &mut modes;
            first.rectangle.width = edid::MODE.0.into();
            first.rectangle.height = edid::MODE.1.into();
            first.enabled = 1.into();
            [&[0; HEADER_SIZE], modes.as_bytes()].concat()
        }
        Query::Edid { .. } if !display.is_connected() => {
            let head = EdidHead {
                size: (edid::EDID.len() as u32).into(),
                padding: 0.into(),
            };
            let mut body = [&[0; HEADER_SIZE], head.as_bytes(), &edid::EDID].concat();
            body.resize(HEADER_SIZE + size_of::<EdidHead>() + MAX_EDID, 0);
            body
        }
        _ => return Refusal::Unspecified.into(),
    };
    answered(query, &body)
}

fn check_scanout(scanout: u32) -> Result<(), Refusal> {
    match (scanout as usize) < MAX_SCANOUTS {
        true => Ok(()),
        false => Err(Refusal::ScanoutId),
    }
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

/// Whether a scanout can show this part of a resource.
pub fn can_show(resource: &Resource, rectangle: &Rectangle) -> bool {
    resource.has(rectangle) && rectangle.width.max(rectangle.height) <= MAX_SCANOUT_SIDE
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
            if !can_show(state.resources.get(resource)?, &rectangle) {
                return Err(Refusal::Parameter);
            }
            // QEMU takes the part that is shown for one that begins at (0, 0) of a buffer.
            if (rectangle.x, rectangle.y) == (0, 0) {
                buffer = state.display.buffer(resource);
                buffer = buffer.or_else(|| three_d?.export(resource).map(Arc::new));
            }
            if buffer.is_none() {
                state.resources.prepare(resource)?;
            }
            Some(Source {
                resource,
                rectangle,
            })
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
        read_back(state, three_d.as_deref_mut(), number, &rectangle)?;
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

/// Takes over what the renderer has drawn, where the resource is the renderer's.
fn read_back(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    number: u32,
    rectangle: &Rectangle,
) -> Result<(), Refusal> {
    let resource = state.resources.get_mut(number)?;
    match three_d.and_then(ThreeD::started) {
        Some(renderer) if resource.is_rendered() => resource
            .read_back(rectangle, |rectangle, width, pixels| {
                renderer.read(number, rectangle, width, pixels)
            }),
        _ => Ok(()),
    }
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

/// Carries out a command of the cursor queue.
pub fn cursor(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    chain: &mut Chain,
) -> Result<(), Refusal> {
    let header: Header = read(chain)?;
    let command: Cursor = read(chain)?;
    let (scanout, number) = (command.scanout.get(), command.resource.get());
    log::trace!("cursor command {:#x}", header.kind);
    check_scanout(scanout)?;
    let image = match header.kind.get() {
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_MOVE_CURSOR => None,
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR if number == 0 => None,
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR => {
            let hot = (command.hot_x.get(), command.hot_y.get());
            Some((hot, cursor_image(state, three_d, number)?))
        }
        _ => return Err(Refusal::Unspecified),
    };
    let position = (command.x.get(), command.y.get());
    state
        .display
        .set_cursor(scanout, position, number != 0, image);
    Ok(())
}

/// The picture of a resource that has the size of a cursor. What would be alpha is, whatever the format says: Linux has its cursors in a format
/// without.
fn cursor_image(
    state: &mut State,
    three_d: Option<&mut ThreeD>,
    number: u32,
) -> Result<Vec<u32>, Refusal> {
    let resource = state.resources.get(number)?;
    let all = Rectangle::new(0, 0, resource.width, resource.height).ok_or(Refusal::Parameter)?;
    if (all.width, all.height) != (CURSOR_SIZE, CURSOR_SIZE) {
        return Err(Refusal::Parameter);
    }
    state.resources.prepare(number)?;
    read_back(state, three_d, number, &all)?;
    let resource = state.resources.get(number)?;
    Ok(resource.rows(0, CURSOR_SIZE).to_vec())
}
