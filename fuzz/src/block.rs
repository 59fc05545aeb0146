// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to the block device, on an image in memory, executed without threads.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use arbitrary::Arbitrary;
use rustix::fs::{FallocateFlags, fallocate};
use vhost_device_block::Block;
use vhost_device_common::device::Device;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::bench::{Bench, load, open, poller, queue, save};
use crate::driver::{Driver, Shape};
use crate::guest::{Guest, Piece, file};
use crate::split::{Mistake, Start};

/// The size of the image, in bytes. It is larger than a bounce buffer.
const IMAGE_SIZE: u64 = 3 << 20;
const SECTOR: u64 = 512;
const SERIAL: &str = "fuzzed";
/// Offset of `writeback` in the config space.
const WRITEBACK: usize = 32;

/// A driver and a disk.
#[derive(Arbitrary, Debug)]
pub struct Input {
    disk: Kind,
    /// A device state, valid or not.
    state: Option<Vec<u8>>,
    start: Start,
    /// The driver does not negotiate VIRTIO_BLK_F_FLUSH.
    without_flush: bool,
    without_writeback: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    ReadOnly,
    IgnoreDiscard,
    Direct,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request. If the flag is set, the driver does not kick yet.
    Request(Request, bool),
    Err(Mistake),
    WriteBack(bool),
    WriteConfig(u16, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Request {
    operation: Operation,
    shape: Shape,
    /// Numbers of bytes that the driver adds to the readable and to the writable part, or removes.
    wrong: Option<(i8, i8)>,
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Read(Sector, Count),
    Write(Sector, Count, u8),
    Flush,
    GetId,
    Discard(Vec<Segment>),
    WriteZeroes(Vec<Segment>),
    Other(u32, Sector, Vec<u8>, u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sector {
    Near(u8),
    In(u16),
    /// Counted back from the end of the disk.
    Last(u8),
    Any(u64),
}

impl Sector {
    fn number(self) -> u64 {
        let sectors = IMAGE_SIZE / SECTOR;
        match self {
            Self::Near(number) => number.into(),
            Self::In(number) => u64::from(number) % sectors,
            Self::Last(number) => sectors - u64::from(number),
            Self::Any(number) => number,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Count {
    One,
    Few(u8),
    /// More than fits in a bounce buffer.
    Many(u16),
}

impl Count {
    fn number(self) -> u64 {
        match self {
            Self::One => 1,
            Self::Few(number) => u64::from(number) % 32,
            Self::Many(number) => u64::from(number) % 3000,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Segment {
    sector: Sector,
    sectors: Sectors,
    flags: Option<u8>,
    unmap: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sectors {
    Few(u8),
    Any(u32),
}

impl Segment {
    fn count(&self) -> u32 {
        match self.sectors {
            Sectors::Few(number) => number.into(),
            Sectors::Any(number) => number,
        }
    }

    fn flags(&self) -> u32 {
        self.flags.unwrap_or(self.unmap.into()).into()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.sector.number().to_le_bytes().to_vec();
        bytes.extend(self.count().to_le_bytes());
        bytes.extend(self.flags().to_le_bytes());
        bytes
    }
}

/// A disk. It lives as long as the process, because creating an io_uring for each input is slow.
struct Disk {
    image: File,
    device: Block,
    handler: <Block as Device>::Handler,
}

impl Disk {
    fn open(kind: Kind) -> Result<Self, String> {
        let image = File::from(file(IMAGE_SIZE));
        let path = format!("--blk-file=/proc/self/fd/{}", image.as_raw_fd());
        let mut arguments = vec![path, format!("--serial={SERIAL}")];
        arguments.extend(match kind {
            Kind::Plain => None,
            Kind::ReadOnly => Some("--read-only".to_owned()),
            Kind::IgnoreDiscard => Some("--discard=ignore".to_owned()),
            Kind::Direct => Some("--direct".to_owned()),
        });
        let device: Block = open(&arguments)?;
        let handler = device
            .handler(0, poller().1)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            image,
            device,
            handler,
        })
    }

    fn clear(&self) {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.image, how, 0, IMAGE_SIZE).expect("a file in memory can have holes");
    }
}

thread_local! {
    static DISKS: RefCell<[Option<Disk>; 4]> = const { RefCell::new([None, None, None, None]) };
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the device violates the specification.
    pub fn run(self) {
        DISKS.with_borrow_mut(|disks| {
            let mut kind = self.disk;
            if disks[kind as usize].is_none() {
                let disk = Disk::open(kind).or_else(|error| {
                    // tmpfs supports O_DIRECT since Linux 6.6.
                    assert_eq!(kind, Kind::Direct, "{error}");
                    eprintln!("without --direct: {error}");
                    kind = Kind::Plain;
                    Disk::open(kind)
                });
                disks[self.disk as usize] = Some(disk.expect("a disk"));
            }
            if let Some(disk) = &mut disks[self.disk as usize] {
                self.run_on(disk);
            }
        });
    }

    fn run_on(self, disk: &mut Disk) {
        disk.clear();
        let Disk {
            device, handler, ..
        } = disk;
        device.reset();
        device.set_kept(Some(0));
        let mut features = device.features();
        if self.without_flush {
            features &= !(1 << VIRTIO_BLK_F_FLUSH);
        }
        if self.without_writeback {
            features &= !(1 << VIRTIO_BLK_F_CONFIG_WCE);
        }
        device.set_features(features);
        load(device, self.state.as_deref());
        let mut guest = Guest::new();
        let mut driver = Driver::new(1, self.start, &mut guest);
        let queue = queue(0, &driver, &guest);
        let mut bench = Bench::new(handler, poller().0, vec![queue]);
        let mut submitted = 0;
        for step in self.steps {
            match step {
                Step::Request(request, waits) => {
                    let pieces = request.submit(&mut driver, &mut guest);
                    submitted += 1;
                    if waits {
                        continue;
                    }
                    bench.kick(0);
                    // Another thread can still work on large reads.
                    bench.finish(0);
                    let answers = driver.answers(0, &guest);
                    let is_apart = driver.is_apart();
                    driver.settle();
                    if driver.is_honest() && is_apart {
                        assert_eq!(answers.len(), submitted);
                        let length = answers.last().map_or(0, |(_, length)| *length);
                        request.check(self.disk, &disk.image, &guest, &pieces, length);
                    }
                    submitted = 0;
                }
                Step::Err(mistake) => {
                    driver.err(0, &mut guest, mistake);
                    bench.kick(0);
                    bench.finish(0);
                }
                Step::WriteBack(value) => {
                    let written = device.write_config(WRITEBACK, &[value.into()]);
                    written.expect("writeback can be written");
                }
                Step::WriteConfig(offset, data) => {
                    let _ = device.write_config(offset.into(), &data);
                    assert_eq!(device.config().len(), 60);
                }
            }
        }
        bench.kick(0);
        bench.finish(0);
        bench.stop(0);
        save(device);
        driver.assert_untouched(&mut guest);
        let length = disk.image.metadata().map_or(0, |metadata| metadata.len());
        assert_eq!(length, IMAGE_SIZE, "the size of the image has changed");
    }
}

impl Request {
    /// Makes the request available. Returns the pieces that the device may write.
    fn submit(&self, driver: &mut Driver, guest: &mut Guest) -> Vec<Piece> {
        let (kind, sector) = match &self.operation {
            Operation::Read(sector, _) => (VIRTIO_BLK_T_IN, sector.number()),
            Operation::Write(sector, ..) => (VIRTIO_BLK_T_OUT, sector.number()),
            Operation::Flush => (VIRTIO_BLK_T_FLUSH, 0),
            Operation::GetId => (VIRTIO_BLK_T_GET_ID, 0),
            Operation::Discard(_) => (VIRTIO_BLK_T_DISCARD, 0),
            Operation::WriteZeroes(_) => (VIRTIO_BLK_T_WRITE_ZEROES, 0),
            Operation::Other(kind, sector, ..) => (*kind, sector.number()),
        };
        let mut readable = kind.to_le_bytes().to_vec();
        readable.extend([0; 4]);
        readable.extend(sector.to_le_bytes());
        let mut writable = 1;
        match &self.operation {
            Operation::Read(_, count) => writable += count.number() * SECTOR,
            Operation::Write(_, count, byte) => readable.extend(pattern(*count, *byte)),
            Operation::Flush => {}
            Operation::GetId => writable += 20,
            Operation::Discard(segments) | Operation::WriteZeroes(segments) => {
                readable.extend(segments.iter().flat_map(Segment::bytes));
            }
            Operation::Other(_, _, data, room) => {
                readable.extend(data);
                writable += u64::from(*room);
            }
        }
        if let Some((more_readable, more_writable)) = self.wrong {
            let length = readable.len().saturating_add_signed(more_readable.into());
            readable.resize(length, 0);
            writable = writable.saturating_add_signed(more_writable.into());
        }
        driver.submit(0, guest, &readable, writable, &self.shape)
    }

    /// Checks the answer to a request without mistakes.
    fn check(&self, disk: Kind, image: &File, guest: &Guest, pieces: &[Piece], used: u32) {
        let room: u64 = pieces.iter().map(|piece| u64::from(piece.length)).sum();
        if self.wrong.is_some() || !self.shape.is_plain() {
            return;
        }
        let written: Vec<_> = pieces
            .iter()
            .filter_map(|piece| guest.read(piece.address, piece.length as usize))
            .flatten()
            .collect();
        let Some((&status, data)) = written.split_last() else {
            return;
        };
        let status = u32::from(status);
        assert!((1..=room).contains(&used.into()), "{used} bytes are used");
        let content = |sector: Sector, length: usize| {
            let mut content = vec![0; length];
            let read = image.read_exact_at(&mut content, sector.number() * SECTOR);
            read.expect("the image has what is read and written");
            content
        };
        let is_inside = |sector: Sector, count: u64| {
            let end = sector.number().checked_add(count);
            end.is_some_and(|end| end <= IMAGE_SIZE / SECTOR)
        };
        let may_write = disk != Kind::ReadOnly;
        let is_good = match &self.operation {
            Operation::Read(sector, count) => {
                let is_good = count.number() > 0 && is_inside(*sector, count.number());
                if is_good {
                    assert!(data == content(*sector, data.len()), "wrong data was read");
                }
                is_good
            }
            Operation::Write(sector, count, byte) => {
                let data = pattern(*count, *byte);
                let is_good = count.number() > 0 && is_inside(*sector, count.number()) && may_write;
                if is_good {
                    assert!(
                        data == content(*sector, data.len()),
                        "wrong data was written"
                    );
                }
                is_good
            }
            Operation::Flush => true,
            Operation::GetId => {
                assert_eq!(data.get(..SERIAL.len()), Some(SERIAL.as_bytes()));
                true
            }
            Operation::Discard(segments) | Operation::WriteZeroes(segments) => {
                let is_discard = matches!(self.operation, Operation::Discard(_));
                let most = if is_discard { 1 << 21 } else { 1 << 17 };
                let is_good = |segment: &Segment| {
                    let count = segment.count();
                    let flags = segment.flags();
                    flags & !u32::from(!is_discard) == 0
                        && count <= most
                        && is_inside(segment.sector, count.into())
                };
                let is_good =
                    (1..=16).contains(&segments.len()) && segments.iter().all(is_good) && may_write;
                if is_good && !(is_discard && disk == Kind::IgnoreDiscard) {
                    for segment in segments {
                        let content = content(segment.sector, segment.count() as usize * 512);
                        assert!(
                            content.iter().all(|byte| *byte == 0),
                            "{segment:?} is not 0"
                        );
                    }
                }
                is_good
            }
            Operation::Other(..) => return,
        };
        let expected: &[u32] = match is_good {
            true => &[VIRTIO_BLK_S_OK],
            false => &[VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP],
        };
        assert!(expected.contains(&status), "status {status} of {self:?}");
    }
}

/// Returns the data of a write.
fn pattern(count: Count, byte: u8) -> Vec<u8> {
    (0..count.number() * SECTOR)
        .map(|number| byte.wrapping_add((number % 251) as u8))
        .collect()
}
