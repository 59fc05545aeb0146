// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands that bring data and the medium together in memory: VERIFY, WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE (SBC-3, 5).

use std::ops::Range;
use std::sync::Arc;

use super::LogicalUnit;
use super::answer::{Answer, Failure, Response};
use super::call::{Call, Outcome, good, procedure};
use super::cdb::Fields;
use super::medium::{DataOut, Medium, Procedure};
use super::sense::{Key, Sense, code};
use super::transfer::{Blocks, MAX_BYTES, check_protect, is_stable, length};

/// The most blocks of COMPARE AND WRITE (MAXIMUM COMPARE AND WRITE LENGTH).
pub const MAX_BLOCKS: u8 = 255;

/// Bytes that are in memory at once: a multiple of all block sizes.
const CHUNK: u64 = 256 << 10;

/// What a procedure works with.
struct Run<'a> {
    unit: &'a LogicalUnit,
    medium: &'a dyn Medium,
    data: &'a mut dyn DataOut,
}

impl Run<'_> {
    /// Reads from the medium.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let read = self.medium.read(offset, bytes);
        self.unit.check_medium(read, offset, true)
    }

    /// Writes to the medium.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let written = self.medium.write(offset, bytes);
        self.unit.check_medium(written, offset, false)
    }

    /// Takes the next bytes of the data-out buffer.
    fn take(&mut self, bytes: &mut [u8]) -> Result<(), Failure> {
        let failed = |_| Failure::Response(Response::Failure);
        self.data.read(bytes).map_err(failed)
    }

    /// Brings what was written to stable storage, if that is asked for.
    fn flush(&self, stable: bool, offset: u64) -> Result<(), Failure> {
        match stable {
            true => self.unit.check_medium(self.medium.flush(), offset, false),
            false => Ok(()),
        }
    }

    /// Compares bytes of the medium with those that were expected. `at` is where these are in the data-out buffer.
    fn compare(&self, offset: u64, expected: &[u8], at: u64) -> Result<(), Failure> {
        let mut found = vec![0; expected.len()];
        self.read(offset, &mut found)?;
        let mut pairs = found.iter().zip(expected);
        match pairs.position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(position) => Err(Sense::new(Key::Miscompare, code::MISCOMPARE)
                .with_information(at.saturating_add(position as u64))
                .into()),
        }
    }
}

/// Cuts a range into chunks: offsets, and lengths in bytes.
pub fn chunks(bytes: Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let starts = bytes.clone().step_by(CHUNK as usize);
    starts.map(move |start| {
        let length = (bytes.end - start).min(CHUNK);
        (start, length as usize)
    })
}

/// Makes a procedure of `run`.
fn make(
    call: &Call<'_>,
    run: impl FnOnce(&mut Run<'_>) -> Result<(), Failure> + Send + 'static,
) -> Procedure {
    let unit = Arc::clone(call.unit);
    Procedure::new(call.unit, move |medium, data| {
        let mut context = Run {
            unit: &unit,
            medium,
            data,
        };
        run(&mut context).map(|()| Answer::good())
    })
}

/// What VERIFY compares the medium with (BYTCHK).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    /// Nothing: the medium must be readable.
    Medium,
    /// The data-out buffer.
    Data,
    /// The block in the data-out buffer, repeated.
    Block,
}

impl Check {
    fn of(cdb: Fields<'_>) -> Result<Self, Sense> {
        match cdb.byte(1) >> 1 & 3 {
            0 => Ok(Self::Medium),
            1 => Ok(Self::Data),
            3 => Ok(Self::Block),
            _ => Err(Sense::cdb_bit(1, 2)),
        }
    }
}

fn verify(call: &Call<'_>, blocks: Blocks) -> Outcome {
    check_protect(call.cdb)?;
    let check = Check::of(call.cdb)?;
    let size = call.facts().block_size;
    let bytes = blocks.bytes_up_to(call.unit, MAX_BYTES)?;
    if bytes.is_empty() {
        return good();
    }
    match check {
        Check::Medium => {}
        Check::Data => call.has_data_out(length(&bytes))?,
        Check::Block => call.has_data_out(size.into())?,
    }
    let moved = length(&bytes);
    let verify = make(call, move |run| {
        let mut block = Vec::new();
        if check == Check::Block {
            block.resize(size as usize, 0);
            run.take(&mut block)?;
        }
        for (offset, length) in chunks(bytes.clone()) {
            let mut expected = vec![0; length];
            match check {
                Check::Medium => run.read(offset, &mut expected)?,
                Check::Data => {
                    run.take(&mut expected)?;
                    run.compare(offset, &expected, offset - bytes.start)?;
                }
                Check::Block => run.compare(offset, &block.repeat(length / block.len()), 0)?,
            }
        }
        Ok(())
    });
    procedure(verify.moving(moved))
}

pub fn verify_10(call: &mut Call<'_>) -> Outcome {
    verify(call, Blocks::of_10(call.cdb))
}

pub fn verify_12(call: &mut Call<'_>) -> Outcome {
    verify(call, Blocks::of_12(call.cdb))
}

pub fn verify_16(call: &mut Call<'_>) -> Outcome {
    verify(call, Blocks::of_16(call.cdb))
}

fn write_and_verify(call: &Call<'_>, blocks: Blocks) -> Outcome {
    check_protect(call.cdb)?;
    let check = Check::of(call.cdb)?;
    if check == Check::Block {
        return Err(Sense::cdb_bit(1, 2).into());
    }
    let bytes = blocks.bytes_up_to(call.unit, MAX_BYTES)?;
    call.has_data_out(length(&bytes))?;
    if bytes.is_empty() {
        return good();
    }
    let moved = length(&bytes).saturating_mul(2);
    let write = make(call, move |run| {
        for (offset, length) in chunks(bytes.clone()) {
            let mut data = vec![0; length];
            run.take(&mut data)?;
            run.write(offset, &data)?;
            match check {
                Check::Data => run.compare(offset, &data, offset - bytes.start)?,
                _ => run.read(offset, &mut data)?,
            }
        }
        // The data is verified on the medium, so it must be there.
        run.flush(true, bytes.start)
    });
    procedure(write.changing().moving(moved))
}

pub fn write_and_verify_10(call: &mut Call<'_>) -> Outcome {
    write_and_verify(call, Blocks::of_10(call.cdb))
}

pub fn write_and_verify_12(call: &mut Call<'_>) -> Outcome {
    write_and_verify(call, Blocks::of_12(call.cdb))
}

pub fn write_and_verify_16(call: &mut Call<'_>) -> Outcome {
    write_and_verify(call, Blocks::of_16(call.cdb))
}

/// COMPARE AND WRITE (SBC-3, 5.2): the first half of the data must be on the medium; then the second half is written, all together.
pub fn compare_and_write(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    let blocks = Blocks::of_compare(call.cdb);
    let bytes = blocks.bytes(call.unit)?;
    let half = length(&bytes);
    if call.command.data_out != half.saturating_mul(2) {
        return Err(Sense::cdb(13).into());
    }
    if bytes.is_empty() {
        return good();
    }
    let stable = is_stable(call);
    let exclusive = bytes.clone();
    let compare = make(call, move |run| {
        for (offset, length) in chunks(bytes.clone()) {
            let mut expected = vec![0; length];
            run.take(&mut expected)?;
            run.compare(offset, &expected, offset - bytes.start)?;
        }
        let mut data = vec![0; half as usize];
        run.take(&mut data)?;
        run.write(bytes.start, &data)?;
        run.flush(stable, bytes.start)
    });
    let compare = compare.changing().moving(half.saturating_mul(2));
    procedure(compare.exclusively(exclusive))
}

/// ORWRITE(16) (SBC-3, 5.8): sets the bits on the medium that are set in the data.
pub fn or_write(call: &mut Call<'_>) -> Outcome {
    check_protect(call.cdb)?;
    let bytes = Blocks::of_16(call.cdb).bytes_up_to(call.unit, MAX_BYTES)?;
    call.has_data_out(length(&bytes))?;
    if bytes.is_empty() {
        return good();
    }
    let stable = is_stable(call);
    let exclusive = bytes.clone();
    let moved = length(&bytes).saturating_mul(2);
    let or = make(call, move |run| {
        for (offset, length) in chunks(bytes.clone()) {
            let (mut data, mut found) = (vec![0; length], vec![0; length]);
            run.take(&mut data)?;
            run.read(offset, &mut found)?;
            for (byte, found) in data.iter_mut().zip(&found) {
                *byte |= found;
            }
            run.write(offset, &data)?;
        }
        run.flush(stable, bytes.start)
    });
    procedure(or.changing().moving(moved).exclusively(exclusive))
}
