// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What another device must know to go on with a guest: its resources, and what of them is shown. What the renderer has can
//! not be had from it.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use vhost_device_common::device::StateError;
use vhost_device_common::state::{decode_next, encode_next};
use zerocopy::{FromBytes, IntoBytes};

use crate::backing::{Backing, MAX_ENTRIES};
use crate::display::Source;
use crate::format::{self, Format};
use crate::protocol::{CURSOR_SIZE, MAX_SCANOUTS, MemoryEntry, Refusal};
use crate::rectangle::Rectangle;
use crate::resource::Resources;
use crate::state::State;

/// Version of the state: [`Outputs`], how many resources there are, then each [`SavedResource`].
pub const VERSION: u32 = 1;
/// More bytes than all takes beside the resources. Those take less here than what they are counted for.
pub const MAX_OUTPUTS_SIZE: u64 = 1 << 20;

/// Bytes of a pixel.
const PIXEL_SIZE: usize = format::PIXEL_SIZE as usize;

/// What each scanout shows.
type Outputs<'a> = [Output<'a>; MAX_SCANOUTS];

#[derive(Serialize, Deserialize)]
struct Output<'a> {
    /// The resource, and the part of it: x, y, width and height.
    source: Option<(u32, [u32; 4])>,
    /// x and y.
    cursor: (u32, u32),
    is_cursor_visible: bool,
    hot_spot: (u32, u32),
    /// Pixels, each a little-endian number 0xAARRGGBB. Empty until the driver has set a cursor.
    #[serde(borrow, with = "serde_bytes")]
    cursor_image: Cow<'a, [u8]>,
}

#[derive(Serialize, Deserialize)]
struct SavedResource<'a> {
    number: u32,
    /// The number of its format.
    format: u32,
    width: u32,
    height: u32,
    uuid: Option<[u8; 16]>,
    /// Pieces of guest memory, as in RESOURCE_ATTACH_BACKING; none where nothing is attached.
    #[serde(borrow, with = "serde_bytes")]
    backing: Cow<'a, [u8]>,
    /// Pixels, as those of a cursor.
    #[serde(borrow, with = "serde_bytes")]
    pixels: Cow<'a, [u8]>,
}

/// The state, for [`load`].
pub fn save(state: &State) -> Result<Vec<u8>, StateError> {
    let resources = &state.resources;
    if state.has_contexts || resources.rendered().next().is_some() {
        return Err(StateError::NotSaveable("3D"));
    }
    let mut bytes = Vec::new();
    let size = resources.cost().saturating_add(MAX_OUTPUTS_SIZE);
    usize::try_from(size)
        .ok()
        .and_then(|size| bytes.try_reserve_exact(size).ok())
        .ok_or(StateError::NoMemory(size))?;
    let outputs: Outputs = state.display.shown().map(|(source, cursor)| Output {
        source: source.map(|source| {
            let Rectangle {
                x,
                y,
                width,
                height,
            } = source.rectangle;
            (source.resource, [x, y, width, height])
        }),
        cursor: (cursor.x, cursor.y),
        is_cursor_visible: cursor.visible,
        hot_spot: (cursor.hot_x, cursor.hot_y),
        cursor_image: to_bytes(&cursor.image),
    });
    bytes = encode_next(&outputs, bytes)?;
    let mut all: Vec<_> = resources.iter().collect();
    // The same state is the same bytes.
    all.sort_unstable_by_key(|(number, _)| *number);
    bytes = encode_next(&(all.len() as u64), bytes)?;
    for (number, resource) in all {
        let resource = SavedResource {
            number,
            format: resource.format().map_or(0, Format::number),
            width: resource.width,
            height: resource.height,
            uuid: resource.uuid,
            backing: resource.backing().map(entries).unwrap_or_default().into(),
            pixels: to_bytes(resource.rows(0, resource.height)),
        };
        bytes = encode_next(&resource, bytes)?;
    }
    Ok(bytes)
}

/// Goes on with the guest of another device. If there is a display, it is shown all anew.
pub fn load(state: &mut State, mut bytes: &[u8]) -> Result<(), StateError> {
    let outputs: Outputs = decode_next(&mut bytes)?;
    let count: u64 = decode_next(&mut bytes)?;
    let mut resources = state.resources.none();
    for _ in 0..count {
        add(&mut resources, &decode_next(&mut bytes)?)?;
    }
    if !bytes.is_empty() {
        return Err(StateError::TooLong);
    }
    let mut sources = [None; MAX_SCANOUTS];
    for (source, output) in sources.iter_mut().zip(&outputs) {
        *source = check(&resources, output)?;
    }

    // From here on nothing can go wrong.
    state.clear();
    state.resources = resources;
    for ((number, source), output) in (0..).zip(sources).zip(&outputs) {
        if let Some(source) = source {
            state.display.set_scanout(number, Some(source), None);
            state.display.flush(source.resource, &source.rectangle);
        }
        let was_moved = output.cursor != (0, 0);
        if output.is_cursor_visible || was_moved || !output.cursor_image.is_empty() {
            let mut image = vec![0; output.cursor_image.len() / PIXEL_SIZE];
            fill(&mut image, &output.cursor_image);
            let image = (!image.is_empty()).then_some((output.hot_spot, image));
            let visible = output.is_cursor_visible;
            state
                .display
                .set_cursor(number, output.cursor, visible, image);
        }
    }
    Ok(())
}

/// What a scanout shows, if that and its cursor can be.
fn check(resources: &Resources, output: &Output) -> Result<Option<Source>, StateError> {
    let image = output.cursor_image.len();
    if image != 0 && image != CURSOR_SIZE as usize * CURSOR_SIZE as usize * PIXEL_SIZE {
        return Err(StateError::Contents("a cursor of another size"));
    }
    let Some((resource, [x, y, width, height])) = output.source else {
        return Ok(None);
    };
    Rectangle::new(x, y, width, height)
        .and_then(|rectangle| Source::new(resource, resources.get(resource).ok()?, rectangle))
        .map(Some)
        .ok_or(StateError::Contents(
            "a scanout that shows what is not there",
        ))
}

fn add(resources: &mut Resources, saved: &SavedResource) -> Result<(), StateError> {
    let (number, width, height) = (saved.number, saved.width, saved.height);
    let format = Format::from_number(saved.format)
        .ok_or(StateError::Contents("a format that there is not"))?;
    let size = (u64::from(width) * u64::from(height)).checked_mul(PIXEL_SIZE as u64);
    if size != Some(saved.pixels.len() as u64) {
        return Err(StateError::Contents(
            "a picture of another size than its resource",
        ));
    }
    let refused = |refusal| match refusal {
        Refusal::OutOfMemory => StateError::Contents("more resources than --max-hostmem allows"),
        _ => StateError::Contents("a resource that can not be"),
    };
    resources
        .create(number, format, width, height)
        .map_err(refused)?;
    let entries = <[MemoryEntry]>::ref_from_bytes(&saved.backing)
        .ok()
        .filter(|entries| entries.len() <= MAX_ENTRIES as usize)
        .ok_or(StateError::Contents("a backing that can not be"))?;
    if !entries.is_empty() {
        let mut backing = Backing::with_room_for(entries.len() as u32);
        for entry in entries {
            backing.push(entry.address.get(), entry.length.get());
        }
        resources.attach(number, backing).map_err(refused)?;
    }
    let resource = resources.get_mut(number).map_err(refused)?;
    resource.uuid = saved.uuid;
    fill(resource.pixels_mut(), &saved.pixels);
    Ok(())
}

fn entries(backing: &Backing) -> Vec<u8> {
    let entries = backing.pieces().map(|(address, length)| MemoryEntry {
        address: address.into(),
        // It was one of 32 bits.
        length: (length as u32).into(),
        padding: 0.into(),
    });
    entries.collect::<Vec<_>>().as_bytes().to_vec()
}

fn to_bytes(pixels: &[u32]) -> Cow<'_, [u8]> {
    match cfg!(target_endian = "little") {
        true => pixels.as_bytes().into(),
        false => pixels
            .iter()
            .flat_map(|pixel| pixel.to_le_bytes())
            .collect(),
    }
}

/// The reverse of [`to_bytes`].
fn fill(pixels: &mut [u32], bytes: &[u8]) {
    let (bytes, _) = bytes.as_chunks();
    for (pixel, bytes) in pixels.iter_mut().zip(bytes) {
        *pixel = u32::from_le_bytes(*bytes);
    }
}
