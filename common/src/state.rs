// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of a device as bytes, which another process can load: after a migration, or from a snapshot (vhost-user, "Migrating device
//! state").
//!
//! The bytes are a header, then the device's part, which [`Device::save`](crate::device::Device::save) returns. All numbers are
//! little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `vhdstate` |
//! | 4 | version of this header: 1 |
//! | 16 | type of the device, such as `gpu`, padded with zeroes |
//! | 4 | version of the device's part |
//! | 8 | length of the device's part, in bytes |
//! | 4 | CRC-32 (IEEE 802.3) of the fields above and the device's part |
//!
//! The device's part is in the [wire format of postcard](https://postcard.jamesmunns.com).
//!
//! A program loads states of its own version and of older ones. It refuses newer ones, because it cannot know what they contain. So a
//! guest can migrate to a newer program, and back only if both have the same version of the device's part. This version increases with
//! each change of what is saved.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"vhdstate";
const HEADER_VERSION: u32 = 1;
/// Most bytes of the name of a type.
const TYPE_SIZE: usize = 16;

/// Why a state cannot be saved or loaded.
#[derive(Debug, Error)]
pub enum StateError {
    /// The guest uses something that cannot be moved to another process.
    #[error("the guest uses {0}, which cannot be saved")]
    NotSaveable(&'static str),
    /// It is not a saved state.
    #[error("it is not a saved state")]
    Unknown,
    /// It is the state of a device of another type.
    #[error("it is the state of a device of another type: {0:?}")]
    OtherDevice(String),
    /// The program that saved it is newer.
    #[error("its version is {found}; this program knows those up to {known}: use a newer one here")]
    Version {
        /// Version of the state.
        found: u32,
        /// Newest version that this program can load.
        known: u32,
    },
    /// It is larger than a state of this device can be.
    #[error("it has {size} bytes; this device takes {limit} at most")]
    TooLarge {
        /// Size in bytes.
        size: u64,
        /// Most bytes.
        limit: u64,
    },
    /// There is not enough memory for it.
    #[error("there is not enough memory for {0} bytes")]
    NoMemory(u64),
    /// It ends too early.
    #[error("it ends after {0} bytes, which is too early")]
    Truncated(usize),
    /// It is longer than its header says.
    #[error("it is longer than its header says")]
    TooLong,
    /// It differs from what was saved.
    #[error("its checksum is wrong")]
    Checksum,
    /// The device's part does not have the form that this device saves.
    #[error("it cannot be read: {0}")]
    Form(#[from] postcard::Error),
    /// It contains something that this device does not accept.
    #[error("it has {0}")]
    Contents(&'static str),
}

/// Encodes `state`.
///
/// # Errors
/// It cannot be encoded.
pub fn encode(state: &impl Serialize) -> Result<Vec<u8>, StateError> {
    encode_next(state, Vec::new())
}

/// Encodes `part` after other bytes.
///
/// # Errors
/// It cannot be encoded.
pub fn encode_next(part: &impl Serialize, bytes: Vec<u8>) -> Result<Vec<u8>, StateError> {
    Ok(postcard::to_extend(part, bytes)?)
}

/// Decodes `bytes`, which contain nothing else.
///
/// # Errors
/// They do not have this form.
pub fn decode<'a, T: Deserialize<'a>>(mut bytes: &'a [u8]) -> Result<T, StateError> {
    let state = decode_next(&mut bytes)?;
    match bytes {
        [] => Ok(state),
        _ => Err(StateError::TooLong),
    }
}

/// Decodes the part of a state at the start of `bytes`, and removes it from them. A list in a part can take many times the memory of its
/// bytes: if a list can be long, make each element a part of its own. What a part borrows takes no memory.
///
/// # Errors
/// It does not have this form.
pub fn decode_next<'a, T: Deserialize<'a>>(bytes: &mut &'a [u8]) -> Result<T, StateError> {
    let (part, rest) = postcard::take_from_bytes(bytes)?;
    *bytes = rest;
    Ok(part)
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    header_version: U32,
    device: [u8; TYPE_SIZE],
    version: U32,
    length: U64,
    checksum: U32,
}

/// Bytes before the device's part.
pub(crate) const HEADER_SIZE: usize = 44;
const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

/// The format of a device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// Type of the device.
    pub device: &'static str,
    /// Newest version of the device's part that can be loaded.
    pub version: u32,
    /// Most bytes of the device's part.
    pub limit: u64,
}

impl Header {
    fn new(format: Format, part: &[u8]) -> Self {
        let mut header = Self {
            magic: MAGIC,
            header_version: HEADER_VERSION.into(),
            device: type_name(format.device),
            version: format.version.into(),
            length: (part.len() as u64).into(),
            checksum: 0.into(),
        };
        header.checksum = header.checksum_with(part).into();
        header
    }

    fn checksum_with(&self, part: &[u8]) -> u32 {
        let header = Self {
            checksum: 0.into(),
            ..*self
        };
        let mut checksum = crc32fast::Hasher::new();
        let (before, _) = header.as_bytes().split_at(HEADER_SIZE - size_of::<U32>());
        checksum.update(before);
        checksum.update(part);
        checksum.finalize()
    }

    /// Reads the header at the start of `bytes`. Fails unless a device of this format can load what follows.
    fn read(format: Format, bytes: &[u8]) -> Result<Self, StateError> {
        let (header, _) =
            Self::read_from_prefix(bytes).map_err(|_| StateError::Truncated(bytes.len()))?;
        if header.magic != MAGIC {
            return Err(StateError::Unknown);
        }
        let check = |found, known| match found > known {
            true => Err(StateError::Version { found, known }),
            false => Ok(()),
        };
        check(header.header_version.get(), HEADER_VERSION)?;
        if header.device != type_name(format.device) {
            let name = header.device.split(|byte| *byte == 0).next();
            let name = String::from_utf8_lossy(name.unwrap_or_default());
            return Err(StateError::OtherDevice(name.into_owned()));
        }
        check(header.version.get(), format.version)?;
        let (size, limit) = (header.length.get(), format.limit);
        if size > limit {
            return Err(StateError::TooLarge { size, limit });
        }
        Ok(header)
    }
}

fn type_name(device: &str) -> [u8; TYPE_SIZE] {
    let mut name = [0; TYPE_SIZE];
    for (to, from) in name.iter_mut().zip(device.bytes()) {
        *to = from;
    }
    name
}

/// Puts the header before a device's part.
pub(crate) fn with_header(format: Format, mut part: Vec<u8>) -> Vec<u8> {
    let header = Header::new(format, &part);
    part.splice(..0, header.as_bytes().iter().copied());
    part
}

/// Returns the size in bytes of the state that starts with this header.
pub(crate) fn size(format: Format, header: &[u8]) -> Result<usize, StateError> {
    let length = Header::read(format, header)?.length.get();
    let limit = format.limit;
    usize::try_from(length)
        .ok()
        .and_then(|length| length.checked_add(HEADER_SIZE))
        .ok_or(StateError::TooLarge {
            size: length,
            limit,
        })
}

/// Removes the header from a whole state. Returns the version of the device's part, and the part.
pub(crate) fn without_header(format: Format, bytes: &[u8]) -> Result<(u32, &[u8]), StateError> {
    let header = Header::read(format, bytes)?;
    let part = bytes.get(HEADER_SIZE..).unwrap_or_default();
    if (part.len() as u64) < header.length.get() {
        return Err(StateError::Truncated(bytes.len()));
    }
    if (part.len() as u64) > header.length.get() {
        return Err(StateError::TooLong);
    }
    if header.checksum.get() != header.checksum_with(part) {
        return Err(StateError::Checksum);
    }
    Ok((header.version.get(), part))
}
