// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The permitted contents of a disk. Each written sector carries its number and that of its write; the model knows which writes it may hold.

use std::ops::Range;

use crate::front_end::block::SECTOR_SIZE;
use crate::soak::loss::Loss;

/// Number of the write that a sector of zeroes counts as.
const ZEROES: u32 = 0;

/// Writes that a sector may hold.
#[derive(Clone, Debug, Default)]
struct Sector {
    /// The last one that was acknowledged.
    acknowledged: u32,
    /// Writes in flight, and writes with an unknown result.
    others: Vec<u32>,
    /// How many requests read it now; a write counts as the maximum.
    busy: u16,
}

const WRITTEN: u16 = u16::MAX;

/// The model of a disk that was all zeroes at first.
#[derive(Debug)]
pub struct Disk {
    sectors: Vec<Sector>,
    last_write: u32,
}

/// Fills in what write number `write` writes to `sector`.
fn fill(sector: u64, write: u32, bytes: &mut [u8]) {
    if write == ZEROES {
        return bytes.fill(0);
    }
    let mut state = sector << 32 | u64::from(write);
    let (words, _) = bytes.as_chunks_mut::<8>();
    for word in &mut *words {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *word = (state ^ state >> 33).to_le_bytes();
    }
    words[0] = sector.to_le_bytes();
    words[1] = u64::from(write).to_le_bytes();
}

impl Disk {
    /// Creates a disk of zeroes.
    pub fn new(sectors: u64) -> Self {
        Self {
            sectors: vec![Sector::default(); sectors as usize],
            last_write: ZEROES,
        }
    }

    /// Returns its size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn range(&mut self, sectors: &Range<u64>) -> &mut [Sector] {
        &mut self.sectors[sectors.start as usize..sectors.end as usize]
    }

    /// Reserves sectors for a read, which other reads may share. Returns false if some are being written.
    pub fn begin_read(&mut self, sectors: &Range<u64>) -> bool {
        let range = self.range(sectors);
        let free = range.iter().all(|sector| sector.busy < WRITTEN - 1);
        if free {
            range.iter_mut().for_each(|sector| sector.busy += 1);
        }
        free
    }

    /// Ends a read that was answered or dropped.
    pub fn end_read(&mut self, sectors: &Range<u64>) {
        for sector in self.range(sectors) {
            sector.busy -= 1;
        }
    }

    fn begin(&mut self, sectors: &Range<u64>, write: u32) -> bool {
        let range = self.range(sectors);
        let free = range.iter().all(|sector| sector.busy == 0);
        if free {
            for sector in range {
                sector.busy = WRITTEN;
                sector.others.push(write);
            }
        }
        free
    }

    /// Reserves sectors for a write, and returns its number and data. `None` if some are in use.
    pub fn begin_write(&mut self, sectors: &Range<u64>) -> Option<(u32, Vec<u8>)> {
        if !self.begin(sectors, self.last_write + 1) {
            return None;
        }
        self.last_write += 1;
        let mut data = vec![0; (sectors.end - sectors.start) as usize * SECTOR_SIZE];
        for (sector, bytes) in sectors.clone().zip(data.chunks_exact_mut(SECTOR_SIZE)) {
            fill(sector, self.last_write, bytes);
        }
        Some((self.last_write, data))
    }

    /// Reserves sectors for a request that zeroes them. Returns its number.
    pub fn begin_zeroes(&mut self, sectors: &Range<u64>) -> Option<u32> {
        self.begin(sectors, ZEROES).then_some(ZEROES)
    }

    /// Notes that the write was acknowledged: the sectors must hold nothing else.
    pub fn acknowledge(&mut self, sectors: &Range<u64>, write: u32) {
        for sector in self.range(sectors) {
            sector.busy = 0;
            sector.acknowledged = write;
            sector.others.clear();
        }
    }

    /// Notes that the write has ended with an unknown result.
    pub fn give_up(&mut self, sectors: &Range<u64>) {
        for sector in self.range(sectors) {
            sector.busy = 0;
        }
    }

    /// Fails unless each sector holds one of the permitted writes. Contents read while nothing is in flight must stay.
    pub fn check(&mut self, first: u64, bytes: &[u8]) -> Result<(), Loss> {
        let mut expected = [0; SECTOR_SIZE];
        for (number, seen) in (first..).zip(bytes.chunks_exact(SECTOR_SIZE)) {
            let sector = &mut self.sectors[number as usize];
            let write = claimed_write(seen);
            let is_possible = write == sector.acknowledged || sector.others.contains(&write);
            fill(number, write, &mut expected);
            if !is_possible || seen != expected {
                return Err(Loss(describe(number, sector, seen)));
            }
            if sector.busy != WRITTEN {
                sector.acknowledged = write;
                sector.others.clear();
            }
        }
        Ok(())
    }
}

/// Returns the number of the write that a sector says it is from.
fn claimed_write(sector: &[u8]) -> u32 {
    sector[8..]
        .first_chunk()
        .map_or(ZEROES, |bytes| u32::from_le_bytes(*bytes))
}

/// Returns what is wrong with a sector.
fn describe(number: u64, sector: &Sector, seen: &[u8]) -> String {
    let address = u64::from_le_bytes(*seen.first_chunk().expect("a sector"));
    let write = claimed_write(seen);
    let mut expected = [0; SECTOR_SIZE];
    fill(address, write, &mut expected);
    let differs = expected.iter().zip(seen).position(|(a, b)| a != b);
    let what = match differs {
        None => format!("write {write} to sector {address}"),
        Some(at) => format!("what looks like write {write} to sector {address} up to byte {at}"),
    };
    format!(
        "sector {number} has {what}; acknowledged is write {}, possible are {:?} (0: zeroes)",
        sector.acknowledged, sector.others
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_acknowledged_write_may_be_there() {
        let mut disk = Disk::new(8);
        let (first, old) = disk.begin_write(&(2..4)).unwrap();
        // In flight: both are permitted.
        disk.check(2, &old).unwrap();
        disk.check(2, &[0; 2 * SECTOR_SIZE]).unwrap();
        disk.acknowledge(&(2..4), first);
        disk.check(2, &old).unwrap();
        assert!(disk.check(2, &[0; SECTOR_SIZE]).is_err());
        let (second, new) = disk.begin_write(&(3..5)).unwrap();
        disk.acknowledge(&(3..5), second);
        let Loss(what) = disk.check(3, &old[SECTOR_SIZE..]).unwrap_err();
        assert!(what.contains("sector 3 has write 1 to sector 3;"), "{what}");
        disk.check(2, &old[..SECTOR_SIZE]).unwrap();
        disk.check(3, &new).unwrap();
    }

    #[test]
    fn data_in_the_wrong_place_or_torn_is_seen() {
        let mut disk = Disk::new(8);
        let (write, mut data) = disk.begin_write(&(0..2)).unwrap();
        disk.acknowledge(&(0..2), write);
        assert!(disk.check(0, &data[SECTOR_SIZE..]).is_err());
        data[300] ^= 1;
        let Loss(what) = disk.check(0, &data).unwrap_err();
        assert!(what.contains("up to byte 300"), "{what}");
    }

    #[test]
    fn what_was_seen_of_a_write_that_was_given_up_stays() {
        let mut disk = Disk::new(1);
        let (_, data) = disk.begin_write(&(0..1)).unwrap();
        assert!(disk.begin_write(&(0..1)).is_none());
        assert!(!disk.begin_read(&(0..1)));
        disk.give_up(&(0..1));
        assert!(disk.begin_read(&(0..1)));
        disk.check(0, &data).unwrap();
        assert!(disk.check(0, &[0; SECTOR_SIZE]).is_err());
    }
}
