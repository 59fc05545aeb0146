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
use crate::protocol::{CURSOR_SIZE, CommandError, MAX_SCANOUTS, MemoryEntry};
use crate::rectangle::Rectangle;
use crate::resource::Resources;
use crate::state::State;

/// Version of the state: [`SavedScanouts`], how many resources there are, then each [`SavedResource`].
pub const VERSION: u32 = 1;
/// More bytes than all takes beside the resources. Those take less here than what they are counted for.
pub const MAX_SCANOUTS_SIZE: u64 = 1 << 20;

/// Bytes of a pixel.
const PIXEL_SIZE: usize = format::PIXEL_SIZE as usize;

/// What each scanout shows.
type SavedScanouts<'a> = [SavedScanout<'a>; MAX_SCANOUTS];

#[derive(Serialize, Deserialize)]
struct SavedScanout<'a> {
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
    id: u32,
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
    if state.has_contexts || resources.in_renderer().next().is_some() {
        return Err(StateError::NotSaveable("3D"));
    }
    let mut bytes = Vec::new();
    let size = resources.cost().saturating_add(MAX_SCANOUTS_SIZE);
    usize::try_from(size)
        .ok()
        .and_then(|size| bytes.try_reserve_exact(size).ok())
        .ok_or(StateError::NoMemory(size))?;
    let scanouts: SavedScanouts = state
        .display
        .scanouts()
        .map(|(source, cursor)| SavedScanout {
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
            cursor_image: encode_pixels(&cursor.image),
        });
    bytes = encode_next(&scanouts, bytes)?;
    let mut all: Vec<_> = resources.iter().collect();
    // The same state is the same bytes.
    all.sort_unstable_by_key(|(id, _)| *id);
    bytes = encode_next(&(all.len() as u64), bytes)?;
    for (id, resource) in all {
        let resource = SavedResource {
            id,
            format: resource.format().map_or(0, Format::number),
            width: resource.width,
            height: resource.height,
            uuid: resource.uuid,
            backing: resource
                .backing()
                .map(encode_entries)
                .unwrap_or_default()
                .into(),
            pixels: encode_pixels(resource.rows(0, resource.height)),
        };
        bytes = encode_next(&resource, bytes)?;
    }
    Ok(bytes)
}

/// Goes on with the guest of another device. If there is a display, it is shown all anew.
pub fn load(state: &mut State, mut bytes: &[u8]) -> Result<(), StateError> {
    let scanouts: SavedScanouts = decode_next(&mut bytes)?;
    let count: u64 = decode_next(&mut bytes)?;
    let mut resources = state.resources.empty_copy();
    for _ in 0..count {
        restore_resource(&mut resources, &decode_next(&mut bytes)?)?;
    }
    if !bytes.is_empty() {
        return Err(StateError::TooLong);
    }
    let mut sources = [None; MAX_SCANOUTS];
    for (source, scanout) in sources.iter_mut().zip(&scanouts) {
        *source = checked_source(&resources, scanout)?;
    }

    // From here on nothing can go wrong.
    state.clear();
    state.resources = resources;
    for ((id, source), scanout) in (0..).zip(sources).zip(&scanouts) {
        if let Some(source) = source {
            state.display.set_scanout(id, Some(source), None);
            state.display.flush(source.resource, &source.rectangle);
        }
        let was_moved = scanout.cursor != (0, 0);
        if scanout.is_cursor_visible || was_moved || !scanout.cursor_image.is_empty() {
            let mut image = vec![0; scanout.cursor_image.len() / PIXEL_SIZE];
            decode_pixels(&mut image, &scanout.cursor_image);
            let image = (!image.is_empty()).then_some((scanout.hot_spot, image));
            let visible = scanout.is_cursor_visible;
            state.display.set_cursor(id, scanout.cursor, visible, image);
        }
    }
    Ok(())
}

/// What a scanout shows, if that and its cursor can be.
fn checked_source(
    resources: &Resources,
    scanout: &SavedScanout,
) -> Result<Option<Source>, StateError> {
    let image = scanout.cursor_image.len();
    if image != 0 && image != CURSOR_SIZE as usize * CURSOR_SIZE as usize * PIXEL_SIZE {
        return Err(StateError::Contents("a cursor of another size"));
    }
    let Some((resource, [x, y, width, height])) = scanout.source else {
        return Ok(None);
    };
    Rectangle::new(x, y, width, height)
        .and_then(|rectangle| Source::new(resource, resources.get(resource).ok()?, rectangle))
        .map(Some)
        .ok_or(StateError::Contents(
            "a scanout that shows what is not there",
        ))
}

fn restore_resource(resources: &mut Resources, saved: &SavedResource) -> Result<(), StateError> {
    let (id, width, height) = (saved.id, saved.width, saved.height);
    let format = Format::from_number(saved.format)
        .ok_or(StateError::Contents("a format that there is not"))?;
    let size = (u64::from(width) * u64::from(height)).checked_mul(PIXEL_SIZE as u64);
    if size != Some(saved.pixels.len() as u64) {
        return Err(StateError::Contents(
            "a picture of another size than its resource",
        ));
    }
    let invalid = |error| match error {
        CommandError::OutOfMemory => {
            StateError::Contents("more resources than --max-hostmem allows")
        }
        _ => StateError::Contents("a resource that can not be"),
    };
    resources
        .create(id, format, width, height)
        .map_err(invalid)?;
    let entries = <[MemoryEntry]>::ref_from_bytes(&saved.backing)
        .ok()
        .filter(|entries| entries.len() <= MAX_ENTRIES as usize)
        .ok_or(StateError::Contents("a backing that can not be"))?;
    if !entries.is_empty() {
        let mut backing = Backing::with_capacity(entries.len() as u32);
        for entry in entries {
            backing.push(entry.address.get(), entry.length.get());
        }
        resources.attach_backing(id, backing).map_err(invalid)?;
    }
    let resource = resources.get_mut(id).map_err(invalid)?;
    resource.uuid = saved.uuid;
    decode_pixels(resource.pixels_mut(), &saved.pixels);
    Ok(())
}

fn encode_entries(backing: &Backing) -> Vec<u8> {
    let entries = backing.entries().map(|(address, length)| MemoryEntry {
        address: address.into(),
        // It was one of 32 bits.
        length: (length as u32).into(),
        padding: 0.into(),
    });
    entries.collect::<Vec<_>>().as_bytes().to_vec()
}

fn encode_pixels(pixels: &[u32]) -> Cow<'_, [u8]> {
    match cfg!(target_endian = "little") {
        true => pixels.as_bytes().into(),
        false => pixels
            .iter()
            .flat_map(|pixel| pixel.to_le_bytes())
            .collect(),
    }
}

/// The reverse of [`encode_pixels`].
fn decode_pixels(pixels: &mut [u32], bytes: &[u8]) {
    let (bytes, _) = bytes.as_chunks();
    for (pixel, bytes) in pixels.iter_mut().zip(bytes) {
        *pixel = u32::from_le_bytes(*bytes);
    }
}
