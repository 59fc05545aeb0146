// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the logical unit on a medium in memory.

mod attentions;
mod blocks;
mod copies;
mod pages;
mod provisioning;
mod reservations;
mod table;

use std::io;
use std::sync::{Arc, Mutex};

use super::*;

/// Bytes of a logical block.
const BLOCK: usize = 512;
/// Logical blocks of the medium.
const BLOCKS: u64 = 8192;
/// Bytes that are mapped or not together.
const PAGE: usize = 4096;
const NAA: u64 = 0x3000_0000_0000_0001;

const FIRST: Nexus = Nexus(1);
const SECOND: Nexus = Nexus(2);

/// A medium in memory. Pages that were not written are holes.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    mapped: Mutex<Vec<bool>>,
    /// What happened besides reads: flushes and writes.
    log: Mutex<Vec<String>>,
    /// The error of all calls.
    error: Mutex<Option<io::ErrorKind>>,
}

impl Memory {
    fn new(length: usize) -> Self {
        Self {
            bytes: Mutex::new(vec![0; length]),
            mapped: Mutex::new(vec![false; length / PAGE]),
            ..Self::default()
        }
    }

    fn fail(&self) -> io::Result<()> {
        self.error
            .lock()
            .unwrap()
            .map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn map(&self, range: std::ops::Range<u64>, is_mapped: bool) {
        let mut mapped = self.mapped.lock().unwrap();
        let (start, end) = (range.start as usize, range.end as usize);
        // A page is unmapped only as a whole.
        let pages = match is_mapped {
            true => start / PAGE..end.div_ceil(PAGE),
            false => start.div_ceil(PAGE)..end / PAGE,
        };
        for page in pages {
            mapped[page] = is_mapped;
        }
    }

    fn zero(&self, range: std::ops::Range<u64>) {
        self.bytes.lock().unwrap()[range.start as usize..range.end as usize].fill(0);
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Medium for Memory {
    fn check(&self) -> io::Result<()> {
        self.fail()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.check()?;
        let start = offset as usize;
        bytes.copy_from_slice(&self.bytes.lock().unwrap()[start..start + bytes.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        let start = offset as usize;
        self.bytes.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        self.map(offset..offset + bytes.len() as u64, true);
        let entry = format!("write {} at {offset}", bytes.len());
        self.log.lock().unwrap().push(entry);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.check()?;
        self.log.lock().unwrap().push("flush".to_owned());
        Ok(())
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.check()?;
        let mapped = self.mapped.lock().unwrap();
        let page = offset as usize / PAGE;
        let same = mapped[page..]
            .iter()
            .take_while(|one| **one == mapped[page]);
        let end = ((page + same.count()) * PAGE) as u64;
        Ok(Extent {
            length: end - offset,
            is_mapped: mapped[page],
        })
    }
}

/// A data-out buffer.
struct Buffer<'a>(&'a [u8]);

impl DataOut for Buffer<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let (head, rest) = (self.0)
            .split_at_checked(bytes.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(head);
        self.0 = rest;
        Ok(())
    }
}

/// The target, which has one or two logical units.
#[derive(Default)]
struct Units {
    peers: Mutex<Vec<Peer>>,
    stored: Mutex<Vec<u8>>,
    cannot_store: Mutex<bool>,
}

impl Target for Units {
    fn luns(&self) -> Vec<u16> {
        vec![0, 5, 300]
    }

    fn find(&self, naa: u64) -> Option<Peer> {
        let peers = self.peers.lock().unwrap();
        let found = peers
            .iter()
            .find(|peer| peer.unit.facts().identity.naa == naa);
        found.cloned()
    }

    fn store(&self, _naa: u64, state: &[u8]) -> io::Result<()> {
        if *self.cannot_store.lock().unwrap() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        *self.stored.lock().unwrap() = state.to_vec();
        Ok(())
    }
}

fn facts() -> Facts {
    Facts {
        block_size: BLOCK as u32,
        physical_block_size: PAGE as u32,
        optimal_io_size: 0,
        max_zero_bytes: 64 << 20,
        read_only: false,
        removable: true,
        persists: true,
        rotation: 1,
        provisioning: Some(Provisioning {
            granularity: PAGE as u32,
            max_bytes: 1 << 30,
            reads_zeroes: true,
        }),
        identity: Identity {
            vendor: *b"VENDOR  ",
            product: *b"PRODUCT         ",
            revision: *b"1.0 ",
            serial: "serial".to_owned(),
            naa: NAA,
            target: 0x3000_0000_0000_0099,
        },
    }
}

/// A logical unit with its medium and target.
struct Rig {
    unit: Arc<LogicalUnit>,
    medium: Arc<Memory>,
    units: Arc<Units>,
    target: Arc<dyn Target>,
}

impl Rig {
    /// A rig whose first initiator has seen the unit attention of the start.
    fn new() -> Self {
        Self::with(facts())
    }

    fn with(facts: Facts) -> Self {
        let rig = Self::fresh(facts);
        rig.attention(FIRST);
        rig.attention(SECOND);
        rig.ok(FIRST, &[0, 0, 0, 0, 0, 0], &[]);
        rig
    }

    fn fresh(facts: Facts) -> Self {
        let length = BLOCKS as usize * facts.block_size as usize;
        let unit = Arc::new(LogicalUnit::new(facts, BLOCKS));
        let medium = Arc::new(Memory::new(length));
        let units = Arc::new(Units::default());
        units.peers.lock().unwrap().push(Peer {
            unit: Arc::clone(&unit),
            medium: medium.clone(),
        });
        Self {
            unit,
            medium,
            target: units.clone(),
            units,
        }
    }

    fn start(&self, nexus: Nexus, cdb: &[u8], out: &mut Buffer<'_>, data_in: u64) -> Step {
        let mut field = [0; 32];
        field[..cdb.len()].copy_from_slice(cdb);
        let command = Command {
            cdb: &field,
            nexus,
            data_out: out.0.len() as u64,
            data_in,
        };
        self.unit.start(&command, out, &self.target)
    }

    /// Carries a command out, as a transport does.
    fn run(&self, nexus: Nexus, cdb: &[u8], out: &[u8], data_in: u64) -> Answer {
        let mut buffer = Buffer(out);
        match self.start(nexus, cdb, &mut buffer, data_in) {
            Step::Done(answer) => answer,
            Step::Procedure(procedure) => procedure.run(&*self.medium, &mut buffer),
            Step::Action(action) => {
                let mut data = Vec::new();
                let outcome = self.act(&action, &mut buffer, &mut data);
                let mut answer = self.unit.finish(&action, outcome, 0);
                answer.data = data;
                answer
            }
        }
    }

    fn act(&self, action: &Action, out: &mut Buffer<'_>, data: &mut Vec<u8>) -> io::Result<()> {
        match action {
            Action::Read { offset, length } => {
                data.resize(*length as usize, 0);
                self.medium.read(*offset, data)
            }
            Action::Write {
                offset,
                length,
                stable,
                ..
            } => {
                let mut bytes = vec![0; *length as usize];
                out.read(&mut bytes)?;
                self.medium.write(*offset, &bytes)?;
                if *stable { self.medium.flush() } else { Ok(()) }
            }
            Action::Flush => self.medium.flush(),
            Action::Unmap(ranges) => {
                self.medium.check()?;
                for range in ranges {
                    self.medium.zero(range.clone());
                    self.medium.map(range.clone(), false);
                }
                Ok(())
            }
            Action::Zero { range, unmap, .. } => {
                self.medium.check()?;
                self.medium.zero(range.clone());
                self.medium.map(range.clone(), !unmap);
                Ok(())
            }
        }
    }

    /// Carries out a command that must succeed. Returns its data.
    #[track_caller]
    fn ok(&self, nexus: Nexus, cdb: &[u8], out: &[u8]) -> Vec<u8> {
        let answer = self.run(nexus, cdb, out, 1 << 30);
        assert_eq!(
            (answer.response, answer.status, &answer.sense),
            (Response::Ok, Status::Good, &Vec::new()),
            "{cdb:02x?}"
        );
        answer.data
    }

    /// Carries out a command that must fail with sense data in fixed format. Returns the key and the additional sense code.
    #[track_caller]
    fn sense(&self, nexus: Nexus, cdb: &[u8], out: &[u8]) -> (u8, u16) {
        let answer = self.run(nexus, cdb, out, 1 << 30);
        assert_eq!(answer.status, Status::CheckCondition, "{cdb:02x?}");
        let sense = &answer.sense;
        (sense[2] & 0x0f, u16::from_be_bytes([sense[12], sense[13]]))
    }

    #[track_caller]
    fn conflicts(&self, nexus: Nexus, cdb: &[u8], out: &[u8]) {
        let answer = self.run(nexus, cdb, out, 1 << 30);
        assert_eq!(answer.status, Status::ReservationConflict, "{cdb:02x?}");
        assert!(answer.sense.is_empty());
    }

    /// Asks for the next unit attention by REQUEST SENSE. 0 if there is none.
    fn attention(&self, nexus: Nexus) -> u16 {
        let sense = self.ok(nexus, &[3, 0, 0, 0, 18, 0], &[]);
        u16::from_be_bytes([sense[12], sense[13]])
    }

    fn read(&self, block: u64, count: u16) -> Vec<u8> {
        self.ok(FIRST, &cdb_16(0x88, block, count.into()), &[])
    }

    fn write(&self, block: u64, data: &[u8]) {
        let count = data.len() / BLOCK;
        self.ok(FIRST, &cdb_16(0x8a, block, count as u32), data);
    }
}

/// A CDB of 16 bytes with a block and a number of blocks.
fn cdb_16(opcode: u8, block: u64, count: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// A CDB of 10 bytes with a block and a number of blocks.
fn cdb_10(opcode: u8, flags: u8, block: u32, count: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    (cdb[0], cdb[1]) = (opcode, flags);
    cdb[2..6].copy_from_slice(&block.to_be_bytes());
    cdb[7..9].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// Data that differs from block to block.
fn pattern(blocks: usize, seed: u8) -> Vec<u8> {
    (0..blocks * BLOCK)
        .map(|byte| seed.wrapping_add((byte / 7 + byte / BLOCK) as u8) | 1)
        .collect()
}

const ILLEGAL: u8 = 5;
const PROTECTED: u8 = 7;
