// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Header, data and status divided among descriptors in any way (VIRTIO 1.3, section 2.7.4.1).

use std::fs::File;
use std::os::unix::fs::FileExt;

use fastrand::Rng;
use vhost_device_tests::front_end::block::{
    BlockDriver, DISCARD, FLUSH, Framing, GET_ID, HEADER_SIZE, ID_SIZE, IN, NO_STATUS, OK, OUT,
    Request, SECTOR_SIZE, UNMAP, UNSUPP, WRITE_ZEROES, header, segment,
};
use vhost_device_tests::front_end::{Buffer, FrontEnd, GuestMemory, Options, Queue, QueueOptions};

use crate::{Disk, IMAGE_SIZE, PATIENCE, SECTORS, Variant, assert_same, driver, noise, ok, skip};

/// Rings without and with indirect tables: ring size, table entries.
const RINGS: [(u16, u16); 2] = [(1024, 0), (1024, 600)];

pub fn ring(front_end: &FrontEnd, size: u16, indirect: u16) -> Queue {
    let options = QueueOptions {
        indirect,
        ..front_end.queue_options(size)
    };
    front_end.queue_with(0, options).unwrap()
}

/// Runs `test` with a driver for each of [`RINGS`], and panics unless the image then equals the copy that `test` changed.
fn for_each_ring(variant: Variant, mut test: impl FnMut(&mut BlockDriver, &mut [u8])) {
    let mut image = noise(1, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    for (size, indirect) in RINGS {
        disk.front_end.stop(0).unwrap();
        let queue = ring(&disk.front_end, size, indirect);
        disk.driver = BlockDriver::new(disk.front_end.memory(), queue, 64 << 10);
        test(&mut disk.driver, &mut image);
    }
    disk.front_end.stop(0).unwrap();
    disk.driver = driver(&disk.front_end);
    disk.assert_contents(&image);
}

fn overwrite(image: &mut [u8], sector: u64, data: &[u8]) {
    let start = sector as usize * SECTOR_SIZE;
    image[start..start + data.len()].copy_from_slice(data);
}

fn write_in(driver: &mut BlockDriver, sector: u64, data: &[u8], pieces: &[u32]) {
    let write = Request {
        kind: OUT,
        sector,
        data,
        framing: Framing::Pieces {
            readable: pieces,
            writable: &[],
        },
        ..Default::default()
    };
    ok(driver.request(&write).unwrap());
}

fn read_in(driver: &mut BlockDriver, sector: u64, length: u32, pieces: &[u32]) -> Vec<u8> {
    let read = Request {
        kind: IN,
        sector,
        reply_length: length,
        framing: Framing::Pieces {
            readable: &[],
            writable: pieces,
        },
        ..Default::default()
    };
    ok(driver.request(&read).unwrap())
}

fn header_and_data_to_write_may_be_cut_anywhere(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        // The header is in pieces, alone, or shares a descriptor with some or all data.
        for cut in 1..=HEADER_SIZE + 512 {
            let data = noise(u64::from(cut), 512);
            write_in(driver, u64::from(cut), &data, &[cut]);
            overwrite(image, u64::from(cut), &data);
        }
    });
}

fn data_to_read_and_status_may_be_cut_anywhere(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        // The status is alone, or shares a descriptor with some or all data.
        for cut in 1..=1025 {
            let data = read_in(driver, u64::from(cut), 1024, &[cut]);
            let start = cut as usize * SECTOR_SIZE;
            assert_same(&data, &image[start..start + 1024], "data");
        }
    });
}

fn every_byte_may_have_a_descriptor_of_its_own(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        let data = noise(2, 512);
        write_in(driver, 5, &data, &[1; HEADER_SIZE as usize + 512]);
        overwrite(image, 5, &data);
        assert_eq!(read_in(driver, 5, 512, &[1; 513]), data);
    });
}

fn a_header_may_come_in_any_three_pieces(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        for first in 1..HEADER_SIZE - 1 {
            for second in 1..HEADER_SIZE - first {
                let sector = u64::from(first * HEADER_SIZE + second);
                let data = noise(sector, 512);
                write_in(driver, sector, &data, &[first, second]);
                overwrite(image, sector, &data);
            }
        }
    });
}

/// A request whose pieces are scattered in both regions of guest memory, with gaps.
struct Scattered {
    chain: Vec<Buffer>,
    writable: Vec<Buffer>,
    /// Earlier contents of the writable pieces.
    before: Vec<u8>,
}

/// Positions of the pieces in the first region and in the second one.
const ARENAS: [u64; 2] = [24 << 20, (1 << 32) + (16 << 20)];

impl Scattered {
    /// Allocates `readable` and `writable` bytes in at most `pieces` pieces each.
    fn new(
        memory: &GuestMemory,
        random: &mut Rng,
        readable: &[u8],
        writable: usize,
        pieces: [usize; 2],
    ) -> Self {
        let mut places = ARENAS;
        let mut place = |random: &mut Rng, length: u32| {
            let place = random.choice(&mut places).unwrap();
            *place += u64::from(random.u32(1..70));
            let address = *place;
            *place += u64::from(length);
            address
        };
        let readable_lengths = cut(random, readable.len(), pieces[0]);
        let writable_lengths = cut(random, writable, pieces[1]);
        let mut order: Vec<usize> = (0..readable_lengths.len() + writable_lengths.len()).collect();
        random.shuffle(&mut order);
        let lengths = [&readable_lengths[..], &writable_lengths].concat();
        let mut addresses = vec![0; lengths.len()];
        for index in order {
            addresses[index] = place(random, lengths[index]);
        }
        let mut rest = readable;
        let (mut chain, mut answer) = (Vec::new(), Vec::new());
        for (index, (&address, &length)) in addresses.iter().zip(&lengths).enumerate() {
            if index < readable_lengths.len() {
                let (piece, after) = rest.split_at(length as usize);
                memory.write(address, piece);
                rest = after;
                chain.push(Buffer::readable(address, length));
            } else {
                memory.fill(address, length as usize, NO_STATUS);
                answer.push(Buffer::writable(address, length));
            }
        }
        chain.extend(&answer);
        let before = surroundings(memory, &answer);
        Scattered {
            chain,
            writable: answer,
            before,
        }
    }

    /// Runs it; returns the used length, the writable bytes before the last, and the status.
    fn run(&self, memory: &GuestMemory, queue: &mut Queue) -> (u32, Vec<u8>, u32) {
        queue.submit(&self.chain);
        assert!(queue.wait_used(PATIENCE), "not answered: {:?}", self.chain);
        let used = queue.take_used().unwrap();
        let mut bytes: Vec<u8> = self
            .writable
            .iter()
            .flat_map(|piece| memory.read_vec(piece.address, piece.length as usize))
            .collect();
        assert_eq!(
            surroundings(memory, &self.writable),
            self.before,
            "the device wrote beside its buffers"
        );
        let status = bytes.pop().unwrap();
        (used.length, bytes, status.into())
    }
}

/// The byte before and after each piece, unless a piece of the same request is adjacent.
fn surroundings(memory: &GuestMemory, pieces: &[Buffer]) -> Vec<u8> {
    let is_free = |address: u64| {
        !pieces.iter().any(|piece| {
            (piece.address..piece.address + u64::from(piece.length)).contains(&address)
        })
    };
    pieces
        .iter()
        .flat_map(|piece| [piece.address - 1, piece.address + u64::from(piece.length)])
        .filter(|&address| is_free(address))
        .map(|address| memory.read_u8(address))
        .collect()
}

/// Cuts `length` bytes into 1 to `most` pieces.
fn cut(random: &mut Rng, length: usize, most: usize) -> Vec<u32> {
    let mut cuts: Vec<u32> = (1..length as u32).collect();
    random.shuffle(&mut cuts);
    cuts.truncate(random.usize(0..most.min(length).max(1)));
    cuts.extend([0, length as u32]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// Returns the request bytes that the device reads.
fn readable(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    [&header(kind, sector), data].concat()
}

fn requests_may_come_in_any_pieces(variant: Variant) {
    assert_any_pieces(variant, &[]);
}

/// Runs a few hundred requests of all kinds, in pieces of all sizes.
pub fn assert_any_pieces(variant: Variant, arguments: &[&str]) {
    const ROUNDS: u64 = 300;
    let mut image = noise(3, IMAGE_SIZE);
    // The contents of a discarded range are unspecified, so discards only test framing.
    let usual = ["--discard=ignore", "--serial=0123456789abcdefghij"];
    let mut disk = variant.disk(&image, &[&usual, arguments].concat());
    for (size, indirect) in RINGS {
        disk.front_end.stop(0).unwrap();
        let mut queue = ring(&disk.front_end, size, indirect);
        let memory = disk.front_end.memory().clone();
        for round in 0..ROUNDS {
            let random = &mut Rng::with_seed(round << 16 | u64::from(indirect));
            let sectors = random.u32(1..20);
            let sector = random.u64(0..SECTORS - u64::from(sectors));
            let start = sector as usize * SECTOR_SIZE;
            let range = start..start + sectors as usize * SECTOR_SIZE;
            let kinds = [IN, IN, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77];
            let kind = kinds[random.usize(..kinds.len())];
            let mut expected = Vec::new();
            let bytes = match kind {
                IN => {
                    expected = image[range].to_vec();
                    readable(kind, sector, &[])
                }
                OUT => {
                    random.fill(&mut image[range.clone()]);
                    readable(kind, sector, &image[range])
                }
                GET_ID => {
                    expected = b"0123456789abcdefghij".to_vec();
                    readable(kind, 0, &[])
                }
                DISCARD => readable(kind, 0, &segment(sector, sectors, 0)),
                WRITE_ZEROES => {
                    image[range].fill(0);
                    let first = segment(sector, 1, UNMAP);
                    let second = segment(sector + 1, sectors - 1, 0);
                    readable(kind, 0, &[first, second].concat())
                }
                _ => readable(kind, 0, &[]),
            };
            let most = [1, 3, 20, 250];
            let pieces = [most[random.usize(..4)], most[random.usize(..4)]];
            let request = Scattered::new(&memory, random, &bytes, expected.len() + 1, pieces);
            let (length, data, status) = request.run(&memory, &mut queue);
            let what = format!("round {round}: request {kind} in {:?}", request.chain);
            assert_eq!(status, if kind == 77 { UNSUPP } else { OK }, "{what}");
            assert_eq!(length as usize, expected.len() + 1, "{what}");
            assert_same(&data, &expected, &what);
        }
    }
    disk.front_end.stop(0).unwrap();
    disk.driver = driver(&disk.front_end);
    disk.assert_contents(&image);
}

/// Writes and reads `length` bytes in exactly `count` pieces, none next to another.
pub fn assert_transfer(memory: &GuestMemory, queue: &mut Queue, length: u32, count: u32) {
    let data = noise(u64::from(count), length as usize);
    let stride = u64::from(length.div_ceil(count) + 1);
    let pieces = |base: u64, writable: bool| -> Vec<Buffer> {
        (0..count)
            .map(|index| Buffer {
                address: base + u64::from(index) * stride,
                length: length / count + u32::from(index < length % count),
                writable,
            })
            .collect()
    };
    let (request, status) = (ARENAS[0], ARENAS[0] + 64);
    for (kind, writable) in [(OUT, false), (IN, true)] {
        memory.write(request, &header(kind, 3));
        memory.write_u8(status, NO_STATUS);
        let middle = pieces(ARENAS[1], writable);
        let mut rest = &data[..];
        for piece in &middle {
            let (bytes, after) = rest.split_at(piece.length as usize);
            rest = after;
            if writable {
                memory.fill(piece.address, bytes.len(), NO_STATUS);
            } else {
                memory.write(piece.address, bytes);
            }
        }
        let mut chain = vec![Buffer::readable(request, HEADER_SIZE)];
        chain.extend(&middle);
        chain.push(Buffer::writable(status, 1));
        queue.submit(&chain);
        assert!(queue.wait_used(PATIENCE), "{count} pieces: not answered");
        let used = queue.take_used().unwrap();
        assert_eq!(u32::from(memory.read_u8(status)), OK, "{count} pieces");
        if writable {
            let seen: Vec<u8> = middle
                .iter()
                .flat_map(|piece| memory.read_vec(piece.address, piece.length as usize))
                .collect();
            assert_same(&seen, &data, &format!("data in {count} pieces"));
            assert_eq!(used.length, length + 1, "{count} pieces");
        } else {
            assert_eq!(used.length, 1, "{count} pieces");
        }
    }
}

/// As many buffers as the ring has descriptors, the maximum for a driver.
fn requests_may_have_as_many_descriptors_as_the_ring(variant: Variant) {
    let disk = variant.disk(&vec![0; IMAGE_SIZE], &[]);
    for indirect in [0, 1024] {
        disk.front_end.stop(0).unwrap();
        let mut queue = ring(&disk.front_end, 1024, indirect);
        for count in [1, 2, 126, 127, 128, 129, 254, 256, 510, 1000, 1021, 1022] {
            assert_transfer(disk.front_end.memory(), &mut queue, 64 << 10, count);
        }
    }
}

/// Linux reads or writes no more than 1024 pieces at a time.
fn more_pieces_than_the_host_takes_at_once_are_carried_out(variant: Variant) {
    let device = variant.start(&vec![0; IMAGE_SIZE], &["--queue-size=4096"]);
    // Room for a table for each descriptor of the ring.
    let memory = vec![(0, 32 << 20), (1 << 32, 384 << 20)];
    let front_end = device.connect_with(Options {
        memory,
        ..Options::default()
    });
    for indirect in [0, 4000] {
        let mut queue = ring(&front_end, 4096, indirect);
        for count in [1023, 1024, 1025, 1536, 2048, 2049, 3998] {
            assert_transfer(front_end.memory(), &mut queue, 64 << 10, count);
        }
        front_end.stop(0).unwrap();
    }
}

fn requests_may_have_many_megabytes(variant: Variant) {
    const LENGTH: u32 = 6 << 20;
    let disk = variant.disk(&vec![0; 2 * LENGTH as usize], &[]);
    disk.front_end.stop(0).unwrap();
    let mut queue = ring(&disk.front_end, 128, 128);
    for count in [1, 2, 126] {
        assert_transfer(disk.front_end.memory(), &mut queue, LENGTH, count);
    }
}

/// Linux moves a little less than 2 GiB at a time. Reads into the same memory repeatedly, from a hole that takes no storage.
fn more_data_than_the_host_moves_at_once_is_read(variant: Variant) {
    let variant = variant.in_memory();
    if !variant.is_possible() {
        return skip("there is no file system in memory");
    }
    const PIECE: u32 = 24 << 20;
    const PIECES: usize = 85;
    const LAST: u32 = 8 << 20;
    let length = u64::from(PIECE) * PIECES as u64 + u64::from(LAST);
    assert_eq!(length, 2 << 30);
    let directory = variant.directory();
    let file = File::create_new(directory.path().join("image")).unwrap();
    file.set_len(length).unwrap();
    let last = noise(4, 4096);
    file.write_all_at(&last, length - 4096).unwrap();
    let disk = Disk::connect(variant.start_in(directory, &[], |_| {}));
    disk.front_end.stop(0).unwrap();
    let mut queue = ring(&disk.front_end, 128, 0);
    let memory = disk.front_end.memory();
    let (request, status) = (memory.allocate(16, 16), memory.allocate(1, 1));
    memory.write(request, &header(IN, 0));
    memory.write_u8(status, NO_STATUS);
    let place = 1 << 32;
    let mut chain = vec![Buffer::readable(request, HEADER_SIZE)];
    chain.extend([Buffer::writable(place, PIECE); PIECES]);
    chain.push(Buffer::writable(place, LAST));
    chain.push(Buffer::writable(status, 1));
    queue.submit(&chain);
    assert!(queue.wait_used(PATIENCE), "not answered");
    let used = queue.take_used().unwrap();
    assert_eq!(u32::from(memory.read_u8(status)), OK);
    assert_eq!(u64::from(used.length), length + 1);
    let end = memory.read_vec(place + u64::from(LAST) - 4096, 4096);
    assert_same(&end, &last, "the end of the data");
}

/// The whole request in one readable and one writable descriptor, with adjacent bytes.
fn a_request_may_lie_in_memory_without_a_gap(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        let memory = driver.memory().clone();
        let request = ARENAS[0] + 1;
        for sector in 0..8 {
            memory.write(request, &header(IN, sector));
            let answer = request + u64::from(HEADER_SIZE);
            memory.fill(answer, 513, NO_STATUS);
            driver.queue.submit(&[
                Buffer::readable(request, HEADER_SIZE),
                Buffer::writable(answer, 513),
            ]);
            assert!(driver.queue.wait_used(PATIENCE));
            assert_eq!(driver.queue.take_used().unwrap().length, 513);
            let start = sector as usize * SECTOR_SIZE;
            let mut expected = image[start..start + 512].to_vec();
            expected.push(OK as u8);
            assert_same(&memory.read_vec(answer, 513), &expected, "data and status");
        }
    });
}

/// The driver may reuse the memory of the request for the answer.
fn data_read_may_replace_the_header(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        let memory = driver.memory().clone();
        let place = ARENAS[0];
        for sector in 0..8 {
            memory.write(place, &header(IN, sector));
            driver.queue.submit(&[
                Buffer::readable(place, HEADER_SIZE),
                Buffer::writable(place, 512),
                Buffer::writable(place + 512, 1),
            ]);
            assert!(driver.queue.wait_used(PATIENCE));
            assert_eq!(driver.queue.take_used().unwrap().length, 513);
            let start = sector as usize * SECTOR_SIZE;
            let seen = memory.read_vec(place, 512);
            assert_same(&seen, &image[start..start + 512], "data");
        }
        // So may the status.
        memory.write(place, &header(GET_ID, 0));
        let id = place + 64;
        driver.queue.submit(&[
            Buffer::readable(place, HEADER_SIZE),
            Buffer::writable(id, ID_SIZE as u32),
            Buffer::writable(place, 1),
        ]);
        assert!(driver.queue.wait_used(PATIENCE));
        assert_eq!(driver.queue.take_used().unwrap().length, 21);
        assert_eq!(u32::from(memory.read_u8(place)), OK);
    });
}

/// The driver may place the status over the data: it is written last.
fn the_status_may_lie_in_the_data(variant: Variant) {
    for_each_ring(variant, |driver, image| {
        let memory = driver.memory().clone();
        let place = ARENAS[0];
        for at in [0, 100, 511] {
            memory.write(place + 1024, &header(IN, 3));
            memory.fill(place, 512, 0xdd);
            driver.queue.submit(&[
                Buffer::readable(place + 1024, HEADER_SIZE),
                Buffer::writable(place, 512),
                Buffer::writable(place + at, 1),
            ]);
            assert!(driver.queue.wait_used(PATIENCE));
            assert_eq!(driver.queue.take_used().unwrap().length, 513);
            let mut expected = image[3 * SECTOR_SIZE..][..512].to_vec();
            expected[at as usize] = OK as u8;
            assert_same(&memory.read_vec(place, 512), &expected, "data and status");
        }
    });
}

crate::for_each_variant!(
    the_status_may_lie_in_the_data,
    header_and_data_to_write_may_be_cut_anywhere,
    data_to_read_and_status_may_be_cut_anywhere,
    every_byte_may_have_a_descriptor_of_its_own,
    a_header_may_come_in_any_three_pieces,
    requests_may_come_in_any_pieces,
    requests_may_have_as_many_descriptors_as_the_ring,
    more_pieces_than_the_host_takes_at_once_are_carried_out,
    requests_may_have_many_megabytes,
    more_data_than_the_host_moves_at_once_is_read,
    a_request_may_lie_in_memory_without_a_gap,
    data_read_may_replace_the_header,
);
