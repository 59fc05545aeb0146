// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device state for migration and snapshots: resources, scanouts and cursors. The state of the renderer cannot be
//! saved.

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
use crate::resource_table::ResourceTable;
use crate::state::State;

/// Version of the state: [`SavedScanouts`], the number of resources as u64, then a [`SavedResource`] for each.
pub const VERSION: u32 = 1;
/// Upper limit for everything but the resources, in bytes. A saved resource is smaller than the memory charged for it.
pub const MAX_SCANOUTS_SIZE: u64 = 1 << 20;

/// Size of a pixel in bytes.
const PIXEL_SIZE: usize = format::PIXEL_SIZE as usize;

/// The source and cursor of each scanout.
type SavedScanouts<'a> = [SavedScanout<'a>; MAX_SCANOUTS];

#[derive(Serialize, Deserialize)]
struct SavedScanout<'a> {
    /// The resource, and the rectangle that is shown: x, y, width and height.
    source: Option<(u32, [u32; 4])>,
    /// x and y.
    cursor: (u32, u32),
    is_cursor_visible: bool,
    hot_spot: (u32, u32),
    /// Little-endian 0xAARRGGBB pixels. Empty until the driver sets a cursor.
    #[serde(borrow, with = "serde_bytes")]
    cursor_image: Cow<'a, [u8]>,
}

#[derive(Serialize, Deserialize)]
struct SavedResource<'a> {
    id: u32,
    /// VIRTIO number of the format.
    format: u32,
    width: u32,
    height: u32,
    uuid: Option<[u8; 16]>,
    /// Entries as in RESOURCE_ATTACH_BACKING. Empty if there is no backing.
    #[serde(borrow, with = "serde_bytes")]
    backing: Cow<'a, [u8]>,
    /// Little-endian 0xAARRGGBB pixels.
    #[serde(borrow, with = "serde_bytes")]
    pixels: Cow<'a, [u8]>,
}

/// Encodes the state for [`load`].
///
/// # Errors
/// The guest uses 3D, or the host does not have enough memory.
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
            source: source.map(|source| (source.resource, source.rectangle.words())),
            cursor: (cursor.x, cursor.y),
            is_cursor_visible: cursor.visible,
            hot_spot: (cursor.hot_x, cursor.hot_y),
            cursor_image: encode_pixels(&cursor.image),
        });
    bytes = encode_next(&scanouts, bytes)?;
    let mut all: Vec<_> = resources.iter().collect();
    // Equal states are saved as equal bytes.
    all.sort_unstable_by_key(|(id, _)| *id);
    bytes = encode_next(&(all.len() as u64), bytes)?;
    for (id, resource) in all {
        let resource = SavedResource {
            id,
            format: resource.format.map_or(0, Format::number),
            width: resource.width,
            height: resource.height,
            uuid: resource.uuid,
            backing: encode_entries(resource.backing.as_ref()).into(),
            pixels: encode_pixels(resource.rows(0, resource.height)),
        };
        bytes = encode_next(&resource, bytes)?;
    }
    Ok(bytes)
}

/// Restores a saved state. A connected display is sent everything again.
///
/// # Errors
/// The state is invalid, or exceeds `--max-hostmem`. The device is unchanged.
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

    // Nothing fails from here on.
    state.clear();
    state.resources = resources;
    for ((index, source), scanout) in (0..).zip(sources).zip(&scanouts) {
        if let Some(source) = source {
            state.display.set_scanout(index, Some(source), None);
            state.display.flush(source.resource, &source.rectangle);
        }
        let was_moved = scanout.cursor != (0, 0);
        if scanout.is_cursor_visible || was_moved || !scanout.cursor_image.is_empty() {
            let mut image = vec![0; scanout.cursor_image.len() / PIXEL_SIZE];
            decode_pixels(&mut image, &scanout.cursor_image);
            let image = (!image.is_empty()).then_some((scanout.hot_spot, image));
            let visible = scanout.is_cursor_visible;
            state
                .display
                .set_cursor(index, scanout.cursor, visible, image);
        }
    }
    Ok(())
}

/// Returns the source of a scanout, if it and the cursor are valid.
fn checked_source(
    resources: &ResourceTable,
    scanout: &SavedScanout,
) -> Result<Option<Source>, StateError> {
    let image = scanout.cursor_image.len();
    if image != 0 && image != CURSOR_SIZE as usize * CURSOR_SIZE as usize * PIXEL_SIZE {
        return Err(StateError::Contents("a cursor of invalid size"));
    }
    let Some((resource, [x, y, width, height])) = scanout.source else {
        return Ok(None);
    };
    Rectangle::new(x, y, width, height)
        .and_then(|rectangle| Source::new(resource, resources.get(resource).ok()?, rectangle))
        .map(Some)
        .ok_or(StateError::Contents(
            "a scanout of a rectangle outside its resource",
        ))
}

fn restore_resource(
    resources: &mut ResourceTable,
    saved: &SavedResource,
) -> Result<(), StateError> {
    let (id, width, height) = (saved.id, saved.width, saved.height);
    let format =
        Format::from_number(saved.format).ok_or(StateError::Contents("an unknown format"))?;
    let size = (u64::from(width) * u64::from(height)).checked_mul(PIXEL_SIZE as u64);
    if size != Some(saved.pixels.len() as u64) {
        return Err(StateError::Contents(
            "an image whose size does not match its resource",
        ));
    }
    let invalid = |error| match error {
        CommandError::OutOfMemory => {
            StateError::Contents("more resources than --max-hostmem allows")
        }
        _ => StateError::Contents("an invalid resource"),
    };
    resources
        .create(id, format, width, height)
        .map_err(invalid)?;
    let entries = <[MemoryEntry]>::ref_from_bytes(&saved.backing)
        .ok()
        .filter(|entries| entries.len() <= MAX_ENTRIES as usize)
        .ok_or(StateError::Contents("an invalid backing"))?;
    if !entries.is_empty() {
        let mut backing = Backing::with_capacity(entries.len() as u32);
        for entry in entries {
            backing.push(entry.address.get(), entry.length.get());
        }
        resources.attach_backing(id, backing).map_err(invalid)?;
    }
    let resource = resources.get_mut(id).map_err(invalid)?;
    resource.uuid = saved.uuid;
    decode_pixels(resource.pixels.as_mut_slice(), &saved.pixels);
    Ok(())
}

fn encode_entries(backing: Option<&Backing>) -> Vec<u8> {
    let entries = backing.into_iter().flat_map(Backing::entries);
    let entries = entries.map(|(address, length)| MemoryEntry {
        address: address.into(),
        // Was 32 bits wide in the command.
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

/// Reverses [`encode_pixels`].
fn decode_pixels(pixels: &mut [u32], bytes: &[u8]) {
    let (bytes, _) = bytes.as_chunks();
    for (pixel, bytes) in pixels.iter_mut().zip(bytes) {
        *pixel = u32::from_le_bytes(*bytes);
    }
}
