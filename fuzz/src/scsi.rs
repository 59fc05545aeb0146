// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A logical unit of the SCSI device: CDBs and parameter lists of several initiators, on a medium in memory.
//!
//! A model of the medium knows what each command that succeeds changes. A command that fails must not change anything.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arbitrary::Arbitrary;
use vhost_device_scsi::lun::{
    Action, Answer, Attention, Command, DataOut, Extent, Facts, Identity, LogicalUnit, Medium,
    Nexus, Peer, Provisioning, Response, Status, Step, Target,
};

/// Bytes of the medium.
const SIZE: usize = 64 << 10;
/// Bytes of the CDB field.
const CDB: usize = 32;
const NAA: u64 = 0x3000_0000_0000_0001;

/// Properties of the unit, and what happens to it.
#[derive(Arbitrary, Debug)]
pub struct Input {
    large_blocks: bool,
    read_only: bool,
    removable: bool,
    is_thick: bool,
    persists: bool,
    events: Vec<Event>,
}

#[derive(Arbitrary, Debug)]
enum Event {
    /// A command with this data-out buffer, and so much room for data-in.
    Command(u8, Cdb, Data, u16),
    Reset,
    NexusLost(u8),
    LunsChanged,
    /// The state goes to another process and back.
    Migrate,
    /// An arbitrary state is loaded.
    LoadReservations(Vec<u8>),
    /// The host can no longer store reservations.
    BreakStore(bool),
}

#[derive(Arbitrary, Debug)]
enum Cdb {
    Any([u8; 16]),
    /// A supported command: which, its flags, block and number of blocks.
    Of(u8, u8, Place, u8),
    /// A supported command with arbitrary fields.
    Fields(u8, [u8; 15]),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Start(u8),
    /// So many blocks before the end.
    End(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Data {
    /// So many bytes of this value.
    Blocks(u8, u8),
    /// What is on the medium at this block, then blocks of this value.
    Found(u8, u8, u8),
    Any(Vec<u8>),
    /// A parameter list of UNMAP.
    Unmap(Vec<(Place, u8)>),
    /// A parameter list of EXTENDED COPY: segments of source, destination and blocks.
    Copy(Vec<(Place, Place, u8)>),
    /// A parameter list of PERSISTENT RESERVE OUT: two keys and flags.
    Reserve(u8, u8, u8),
    /// The current mode pages, with a byte that is changed.
    Modes(u8, u8),
}

/// The medium. It is also the other medium of copies.
struct Memory {
    bytes: Mutex<Vec<u8>>,
}

impl Memory {
    fn with<R>(&self, range: Range<u64>, change: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        // It panics beyond the end.
        change(&mut bytes[range.start as usize..range.end as usize])
    }

    fn content(&self) -> Vec<u8> {
        self.with(0..SIZE as u64, |bytes| bytes.to_vec())
    }
}

impl Medium for Memory {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + bytes.len() as u64;
        self.with(range, |found| bytes.copy_from_slice(found));
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let range = offset..offset + bytes.len() as u64;
        self.with(range, |found| found.copy_from_slice(bytes));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Every other part of 3000 bytes is a hole.
    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let part = offset / 3000;
        Ok(Extent {
            length: (part + 1) * 3000 - offset,
            is_mapped: part.is_multiple_of(2),
        })
    }
}

/// A data-out buffer.
struct Buffer<'a>(&'a [u8]);

impl DataOut for Buffer<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let (head, rest) = self
            .0
            .split_at_checked(bytes.len())
            .expect("a unit reads no more than there is");
        bytes.copy_from_slice(head);
        self.0 = rest;
        Ok(())
    }
}

struct Units {
    peer: Mutex<Option<Peer>>,
    is_broken: Mutex<bool>,
}

impl Target for Units {
    fn luns(&self) -> Vec<u16> {
        vec![0, 300]
    }

    fn find(&self, naa: u64) -> Option<Peer> {
        let peer = self.peer.lock().unwrap_or_else(PoisonError::into_inner);
        (naa == NAA).then(|| peer.clone()).flatten()
    }

    fn store(&self, naa: u64, _state: &[u8]) -> io::Result<()> {
        assert_eq!(naa, NAA);
        let broken = *self
            .is_broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match broken {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

struct Run {
    unit: Arc<LogicalUnit>,
    medium: Arc<Memory>,
    units: Arc<Units>,
    target: Arc<dyn Target>,
    /// Opcodes and service actions that the unit reports.
    commands: Vec<(u8, u8)>,
    block: u64,
}

impl Input {
    fn facts(&self) -> Facts {
        let block_size = if self.large_blocks { 4096 } else { 512 };
        Facts {
            block_size,
            physical_block_size: 4096,
            optimal_io_size: 0,
            max_zero_bytes: SIZE as u64 / 2,
            read_only: self.read_only,
            removable: self.removable,
            persists: self.persists,
            rotation: 1,
            provisioning: (!self.is_thick).then_some(Provisioning {
                granularity: 4096,
                max_bytes: SIZE as u64 / 2,
                reads_zeroes: true,
            }),
            identity: Identity {
                vendor: *b"FUZZ    ",
                product: *b"FUZZ            ",
                revision: *b"1   ",
                serial: "fuzz".to_owned(),
                naa: NAA,
                target: NAA + 1,
            },
        }
    }

    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the unit violates the standard.
    pub fn run(self) {
        let facts = self.facts();
        let block = u64::from(facts.block_size);
        let unit = Arc::new(LogicalUnit::new(facts, SIZE as u64 / block));
        let medium = Arc::new(Memory {
            bytes: Mutex::new((0..SIZE).map(|at| (at / 512 * 3 + at % 5) as u8).collect()),
        });
        let units = Arc::new(Units {
            peer: Mutex::new(Some(Peer {
                unit: Arc::clone(&unit),
                medium: medium.clone(),
            })),
            is_broken: Mutex::new(false),
        });
        let mut run = Run {
            unit,
            medium,
            target: units.clone(),
            units,
            commands: Vec::new(),
            block,
        };
        run.meet();
        for event in self.events {
            run.happen(event, self.read_only);
        }
        // The unit and its target refer to each other.
        run.units.peer.lock().expect("no panic").take();
    }
}

impl Run {
    /// Lets the first initiator see the unit attention of the start, and learn which commands there are.
    fn meet(&mut self) {
        self.command(0, &[3, 0, 0, 0, 18, 0], &[], 18);
        let cdb = [0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0];
        let data = self.command(0, &cdb, &[], 65535).data;
        let descriptors = data[4..].chunks_exact(8);
        self.commands = descriptors.map(|one| (one[0], one[3])).collect();
        assert!(self.commands.len() > 50);
    }

    fn happen(&mut self, event: Event, read_only: bool) {
        match event {
            Event::Command(nexus, cdb, data, room) => {
                let (cdb, out) = (self.cdb(&cdb), self.data(&data));
                let before = self.medium.content();
                let answer = self.command(nexus % 3, &cdb, &out, room.into());
                let after = self.medium.content();
                let is_good = answer.response == Response::Ok && answer.status == Status::Good;
                if !is_good || read_only {
                    assert!(
                        before == after,
                        "a command that failed has changed the medium"
                    );
                } else if let Some(expected) = self.model(before, &cdb, &out) {
                    assert!(expected == after, "wrong data: {cdb:02x?}");
                }
            }
            Event::Reset => self.unit.reset(),
            Event::NexusLost(nexus) => self.unit.nexus_lost(Nexus(u64::from(nexus % 3))),
            Event::LunsChanged => self.unit.attend(Attention::LunsChanged),
            Event::Migrate => self.unit.load(self.unit.save()).expect("its own state"),
            Event::LoadReservations(bytes) => _ = self.unit.load_reservations(&bytes),
            Event::BreakStore(broken) => {
                *self.units.is_broken.lock().expect("no panic") = broken;
            }
        }
    }

    fn blocks(&self) -> u64 {
        SIZE as u64 / self.block
    }

    fn place(&self, place: Place) -> u64 {
        match place {
            Place::Start(block) => block.into(),
            Place::End(before) => self.blocks().saturating_sub(before.into()),
            Place::Any(block) => block,
        }
    }

    fn cdb(&self, cdb: &Cdb) -> [u8; CDB] {
        let mut field = [0; CDB];
        let pick = |index: u8| self.commands[usize::from(index) % self.commands.len()];
        match *cdb {
            Cdb::Any(bytes) => field[..16].copy_from_slice(&bytes),
            Cdb::Fields(index, bytes) => {
                let (opcode, action) = pick(index);
                field[0] = opcode;
                field[1..16].copy_from_slice(&bytes);
                if action > 0 {
                    field[1] = field[1] & 0xe0 | action;
                }
            }
            Cdb::Of(index, flags, place, count) => {
                let (opcode, action) = pick(index);
                let block = self.place(place);
                (field[0], field[1]) = (opcode, if action > 0 { action } else { flags });
                match opcode >> 5 {
                    0 => {
                        field[1..4].copy_from_slice(&(block as u32).to_be_bytes()[1..]);
                        field[4] = count;
                    }
                    1 | 2 => {
                        field[2..6].copy_from_slice(&(block as u32).to_be_bytes());
                        field[8] = count;
                    }
                    5 => {
                        field[2..6].copy_from_slice(&(block as u32).to_be_bytes());
                        field[9] = count;
                    }
                    _ => {
                        field[2..10].copy_from_slice(&block.to_be_bytes());
                        field[13] = count;
                    }
                }
            }
        }
        field
    }

    fn data(&mut self, data: &Data) -> Vec<u8> {
        let block = self.block as usize;
        match data {
            Data::Blocks(count, value) => vec![*value; usize::from(*count) * block],
            Data::Found(first, count, value) => {
                let content = self.medium.content();
                let start = usize::from(*first) * block;
                let length = usize::from(*count) * block;
                let found = content.get(start..start + length).unwrap_or_default();
                [found, &vec![*value; found.len()]].concat()
            }
            Data::Any(bytes) => bytes.clone(),
            Data::Unmap(ranges) => {
                let length = ranges.len() as u16 * 16;
                let mut list = vec![0, 0];
                list.extend(length.to_be_bytes());
                list.extend([0; 4]);
                for (place, count) in ranges {
                    list.extend(self.place(*place).to_be_bytes());
                    list.extend(u32::from(*count).to_be_bytes());
                    list.extend([0; 4]);
                }
                list
            }
            Data::Copy(segments) => {
                let mut list = vec![1, 0, 0, 32, 0, 0, 0, 0];
                list.extend((segments.len() as u32 * 28).to_be_bytes());
                list.extend([0, 0, 0, 0, 0xe4, 0, 0, 0, 1, 3, 0, 8]);
                list.extend(NAA.to_be_bytes());
                list.extend([0; 12]);
                list.extend((block as u32).to_be_bytes());
                for (from, to, count) in segments {
                    list.extend([2, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, *count]);
                    list.extend(self.place(*from).to_be_bytes());
                    list.extend(self.place(*to).to_be_bytes());
                }
                list
            }
            Data::Reserve(key, other, flags) => {
                let mut list = vec![0; 24];
                (list[7], list[15], list[20]) = (*key % 4, *other % 4, *flags);
                list
            }
            Data::Modes(at, value) => {
                let cdb = [0x5a, 0, 0x3f, 0xff, 0, 0, 0, 2, 0, 0];
                let mut list = self.command(0, &cdb, &[], 512).data;
                if let Some(byte) = list.get_mut(usize::from(*at)) {
                    *byte = *value;
                }
                list
            }
        }
    }

    /// Carries out a command, and checks each step.
    fn command(&mut self, nexus: u8, cdb: &[u8], out: &[u8], data_in: u64) -> Answer {
        let command = Command {
            cdb,
            nexus: Nexus(nexus.into()),
            data_out: out.len() as u64,
            data_in,
        };
        assert!(LogicalUnit::kind(cdb) < LogicalUnit::COMMANDS.len());
        let mut buffer = Buffer(out);
        let answer = match self.unit.start(&command, &mut buffer, &self.target) {
            Step::Done(answer) => answer,
            Step::Procedure(procedure) => {
                if let Some(range) = procedure.exclusive() {
                    self.check(&range);
                    assert!(procedure.changes());
                }
                let before = (!procedure.changes()).then(|| self.medium.content());
                let answer = procedure.run(&*self.medium, &mut buffer);
                assert!(before.is_none_or(|before| before == self.medium.content()));
                answer
            }
            Step::Action(action) => {
                self.act(&action, &mut buffer, data_in);
                self.unit.finish(&action, Ok(()), 0)
            }
        };
        match answer.status {
            Status::CheckCondition => {
                let format = answer.sense.first().copied().unwrap_or(0) & 0x7f;
                assert!(answer.response == Response::Ok && [0x70, 0x72].contains(&format));
                assert!(answer.sense.len() >= 8 && answer.sense.len() <= 96);
            }
            Status::Good | Status::ReservationConflict => assert!(answer.sense.is_empty()),
        }
        assert_ne!(answer.response, Response::Failure);
        answer
    }

    fn check(&self, range: &Range<u64>) {
        assert!(range.start < range.end && range.end <= SIZE as u64);
        assert!(range.start.is_multiple_of(self.block) && range.end.is_multiple_of(self.block));
    }

    fn act(&self, action: &Action, out: &mut Buffer<'_>, data_in: u64) {
        match action {
            Action::Read { offset, length } => {
                self.check(&(*offset..*offset + *length));
                assert!(*length <= data_in);
            }
            Action::Write { offset, length, .. } => {
                self.check(&(*offset..*offset + *length));
                let mut bytes = vec![0; *length as usize];
                out.read(&mut bytes).expect("enough data");
                self.medium.write(*offset, &bytes).expect("a medium");
            }
            Action::Flush => {}
            Action::Unmap(ranges) => {
                assert!(!ranges.is_empty());
                for range in ranges {
                    self.check(range);
                    self.medium.with(range.clone(), |bytes| bytes.fill(0));
                }
            }
            Action::Zero { range, .. } => {
                self.check(range);
                self.medium.with(range.clone(), |bytes| bytes.fill(0));
            }
        }
    }

    /// Returns what the medium contains after a command that has succeeded; `None` if the model does not know the command.
    fn model(&self, mut medium: Vec<u8>, cdb: &[u8], out: &[u8]) -> Option<Vec<u8>> {
        let number = |at: usize, length: usize| {
            let bytes = cdb[at..at + length].iter();
            bytes.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let (first, count) = match cdb[0] {
            0x0a if cdb[4] == 0 => (number(1, 3) & 0x1f_ffff, 256),
            0x0a => (number(1, 3) & 0x1f_ffff, number(4, 1)),
            0x2a | 0x2e | 0x41 => (number(2, 4), number(7, 2)),
            0xaa | 0xae => (number(2, 4), number(6, 4)),
            0x8a | 0x8b | 0x8e | 0x93 => (number(2, 8), number(10, 4)),
            0x89 => (number(2, 8), number(13, 1)),
            // These are checked where they are carried out.
            0x42 | 0x83 => return None,
            _ => return Some(medium),
        };
        let block = self.block as usize;
        let start = first as usize * block;
        let end = start + count as usize * block;
        let place = &mut medium[start..end];
        let length = place.len();
        match cdb[0] {
            0x89 => {
                assert!(place == &out[..length], "it has compared wrongly");
                place.copy_from_slice(&out[length..]);
            }
            0x8b => {
                for (byte, bits) in place.iter_mut().zip(out) {
                    *byte |= bits;
                }
            }
            0x93 if cdb[1] & 1 == 1 => place.fill(0),
            0x41 | 0x93 => {
                for part in place.chunks_mut(block) {
                    part.copy_from_slice(out);
                }
            }
            _ => place.copy_from_slice(&out[..length]),
        }
        Some(medium)
    }
}
