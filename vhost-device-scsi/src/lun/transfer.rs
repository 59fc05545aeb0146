// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! READ, WRITE, PRE-FETCH and SYNCHRONIZE CACHE (SBC-3, 5).

use std::ops::Range;

use super::LogicalUnit;
use super::call::{Call, Outcome, action, good};
use super::cdb::Fields;
use super::medium::Action;
use super::sense::{Sense, code};

/// The most bytes that one command reads or writes (MAXIMUM TRANSFER LENGTH).
pub const MAX_BYTES: u64 = 32 << 20;

/// Blocks that a command names.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub first: u64,
    pub count: u64,
    /// Where the count is in the CDB.
    count_at: u16,
}

impl Blocks {
    pub fn of_10(cdb: Fields<'_>) -> Self {
        Self {
            first: cdb.u32(2).into(),
            count: cdb.u16(7).into(),
            count_at: 7,
        }
    }

    pub fn of_12(cdb: Fields<'_>) -> Self {
        Self {
            first: cdb.u32(2).into(),
            count: cdb.u32(6).into(),
            count_at: 6,
        }
    }

    pub fn of_16(cdb: Fields<'_>) -> Self {
        Self {
            first: cdb.u64(2),
            count: cdb.u32(10).into(),
            count_at: 10,
        }
    }

    /// A CDB of six bytes. 0 are 256 blocks.
    fn of_6(cdb: Fields<'_>) -> Self {
        let count = cdb.byte(4);
        Self {
            first: (cdb.u32(0) & 0x001f_ffff).into(),
            count: if count == 0 { 256 } else { count.into() },
            count_at: 4,
        }
    }

    /// A CDB whose count is in one byte, at 13 of 16.
    pub fn of_compare(cdb: Fields<'_>) -> Self {
        Self {
            first: cdb.u64(2),
            count: cdb.byte(13).into(),
            count_at: 13,
        }
    }

    /// A block descriptor of UNMAP.
    pub fn of_descriptor(descriptor: Fields<'_>) -> Self {
        Self {
            first: descriptor.u64(0),
            count: descriptor.u32(8).into(),
            count_at: 0,
        }
    }

    /// Returns where the count is in the CDB.
    pub fn count_at(self) -> u16 {
        self.count_at
    }

    /// Returns the bytes of the blocks.
    ///
    /// # Errors
    /// The logical unit does not have all of them.
    pub fn bytes(self, unit: &LogicalUnit) -> Result<Range<u64>, Sense> {
        let blocks = unit.blocks();
        let end = self.first.checked_add(self.count);
        match end.filter(|end| *end <= blocks) {
            Some(end) => {
                let size = u64::from(unit.facts.block_size);
                Ok(self.first.saturating_mul(size)..end.saturating_mul(size))
            }
            // INFORMATION is the first block that is not there.
            None => {
                Err(Sense::illegal(code::LBA_OUT_OF_RANGE).with_information(self.first.max(blocks)))
            }
        }
    }

    /// As [`Blocks::bytes`], for commands that have a most of bytes.
    pub fn bytes_up_to(self, unit: &LogicalUnit, most: u64) -> Result<Range<u64>, Sense> {
        let bytes = self.bytes(unit)?;
        match length(&bytes) > most {
            true => Err(Sense::cdb(self.count_at)),
            false => Ok(bytes),
        }
    }
}

/// Returns how many bytes are in a range.
pub fn length(bytes: &Range<u64>) -> u64 {
    bytes.end.saturating_sub(bytes.start)
}

/// Checks RDPROTECT, WRPROTECT and VRPROTECT: there is no protection information.
pub fn check_protect(cdb: Fields<'_>) -> Result<(), Sense> {
    match cdb.byte(1) >> 5 {
        0 => Ok(()),
        _ => Err(Sense::cdb_bit(1, 7)),
    }
}

/// Returns whether the data must be on stable storage: FUA, or no write cache.
pub fn is_stable(call: &Call<'_>) -> bool {
    call.cdb.bit(1, 3) || call.unit.state.is_write_through()
}

fn read(call: &Call<'_>, blocks: Blocks) -> Outcome {
    let bytes = blocks.bytes_up_to(call.unit, MAX_BYTES)?;
    let length = length(&bytes);
    call.has_data_in(length)?;
    match length {
        0 => good(),
        _ => action(Action::Read {
            offset: bytes.start,
            length,
        }),
    }
}

fn write(call: &Call<'_>, blocks: Blocks, stable: bool) -> Outcome {
    let bytes = blocks.bytes_up_to(call.unit, MAX_BYTES)?;
    let length = length(&bytes);
    call.has_data_out(length)?;
    match length {
        0 => good(),
        _ => action(Action::Write {
            offset: bytes.start,
            length,
            stable,
        }),
    }
}

pub fn read_6(call: &mut Call<'_>) -> Outcome {
    read(call, Blocks::of_6(call.cdb))
}

pub fn read_10(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    read(call, Blocks::of_10(call.cdb))
}

pub fn read_12(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    read(call, Blocks::of_12(call.cdb))
}

pub fn read_16(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    read(call, Blocks::of_16(call.cdb))
}

pub fn write_6(call: &mut Call<'_>) -> Outcome {
    let stable = call.unit.state.is_write_through();
    write(call, Blocks::of_6(call.cdb), stable)
}

pub fn write_10(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    write(call, Blocks::of_10(call.cdb), is_stable(call))
}

pub fn write_12(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    write(call, Blocks::of_12(call.cdb), is_stable(call))
}

pub fn write_16(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    write(call, Blocks::of_16(call.cdb), is_stable(call))
}

/// PRE-FETCH: the host reads ahead by itself.
fn pre_fetch(call: &Call<'_>, blocks: Blocks) -> Outcome {
    blocks.bytes(call.unit)?;
    good()
}

pub fn pre_fetch_10(call: &mut Call<'_>) -> Outcome {
    pre_fetch(call, Blocks::of_10(call.cdb))
}

pub fn pre_fetch_16(call: &mut Call<'_>) -> Outcome {
    pre_fetch(call, Blocks::of_16(call.cdb))
}

/// SYNCHRONIZE CACHE: of all blocks, because the host cannot flush some of them alone.
fn synchronize_cache(call: &Call<'_>, blocks: Blocks) -> Outcome {
    blocks.bytes(call.unit)?;
    match call.facts().read_only {
        true => good(),
        false => action(Action::Flush),
    }
}

pub fn synchronize_cache_10(call: &mut Call<'_>) -> Outcome {
    synchronize_cache(call, Blocks::of_10(call.cdb))
}

pub fn synchronize_cache_16(call: &mut Call<'_>) -> Outcome {
    synchronize_cache(call, Blocks::of_16(call.cdb))
}
