// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! io_uring does not go through the filter of system calls: what it can do is restricted otherwise.

#![allow(unsafe_code)]

use std::fs;
use std::mem;

use vhost_device_tests::intruder::{Intruder, Outcome};

use crate::{BLOCK, MAIN, Scene, mode};

const OFFSET_OF_ENTRIES: u64 = 0x1000_0000;
const ENTRY_SIZE: u64 = 64;
const COMPLETION_SIZE: u64 = 16;
const GET_EVENTS: u64 = 1;
/// Operations, by their numbers.
const OPENAT: u8 = 18;
const SOCKET: u8 = 45;
/// Marks the completion that is waited for.
const MARK: u64 = 0x7e57_7e57_7e57_7e57;

/// `struct io_uring_params`: flags, sizes, and where all is in the mappings.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Parameters {
    entries: u32,
    completions: u32,
    flags: u32,
    _more: [u32; 7],
    /// head, tail, mask, entries, flags, dropped, array, reserved, and an address.
    submission: [u32; 10],
    /// head, tail, mask, entries, overflow, completions, flags, reserved, and an address.
    completion: [u32; 10],
}

const _: () = assert!(size_of::<Parameters>() == 120);

impl Parameters {
    fn bytes(&self) -> [u8; 120] {
        // SAFETY: a structure of numbers without padding.
        unsafe { mem::transmute(*self) }
    }
}

fn call(intruder: &mut Intruder, number: i64, arguments: &[u64]) -> u64 {
    let outcome = intruder.call(number, arguments).unwrap();
    let Outcome::Returned(result @ 0..) = outcome else {
        panic!("system call {number}: {outcome:?}");
    };
    result as u64
}

/// A ring, in the memory of a thread that was taken over.
struct Ring {
    file: u64,
    ring: u64,
    entries: u64,
    parameters: Parameters,
}

impl Ring {
    /// Makes one.
    fn make(intruder: &mut Intruder) -> Self {
        let address = intruder.bytes(&Parameters::default().bytes()).unwrap();
        let file = call(intruder, libc::SYS_io_uring_setup, &[4, address]);
        let mut bytes = [0; 120];
        intruder.read(address, &mut bytes).unwrap();
        // SAFETY: a structure of numbers, for which all bytes are good.
        let parameters = unsafe { mem::transmute::<[u8; 120], Parameters>(bytes) };
        Self::map(intruder, file, parameters)
    }

    /// Takes one that is there.
    fn map(intruder: &mut Intruder, file: u64, parameters: Parameters) -> Self {
        let size = u64::from(parameters.submission[6]) + 4 * u64::from(parameters.entries);
        let mut map = |size, offset| {
            let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let arguments = [0, size, protection, libc::MAP_SHARED as u64, file, offset];
            call(intruder, libc::SYS_mmap, &arguments)
        };
        let ring = map(size, 0);
        let entries = map(
            ENTRY_SIZE * u64::from(parameters.entries),
            OFFSET_OF_ENTRIES,
        );
        Self {
            file,
            ring,
            entries,
            parameters,
        }
    }

    fn number(&self, intruder: &Intruder, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        intruder
            .read(self.ring + u64::from(offset), &mut bytes)
            .unwrap();
        u32::from_ne_bytes(bytes)
    }

    /// Submits an operation, and gives its result.
    fn run(&self, intruder: &mut Intruder, entry: [u8; 64]) -> i32 {
        let submission = self.parameters.submission;
        let tail = self.number(intruder, submission[1]);
        let index = tail & (self.parameters.entries - 1);
        let entry_address = self.entries + ENTRY_SIZE * u64::from(index);
        intruder.write(entry_address, &entry).unwrap();
        let array = self.ring + u64::from(submission[6]) + 4 * u64::from(index);
        intruder.write(array, &index.to_ne_bytes()).unwrap();
        let tail_address = self.ring + u64::from(submission[1]);
        intruder
            .write(tail_address, &(tail + 1).to_ne_bytes())
            .unwrap();
        call(
            intruder,
            libc::SYS_io_uring_enter,
            &[self.file, 1, 1, GET_EVENTS],
        );
        self.result(intruder)
    }

    fn result(&self, intruder: &Intruder) -> i32 {
        let [head, tail, mask, _, _, completions, ..] = self.parameters.completion;
        let mask = self.number(intruder, mask);
        let (head, tail) = (self.number(intruder, head), self.number(intruder, tail));
        for index in head..tail {
            let offset = u64::from(completions) + COMPLETION_SIZE * u64::from(index & mask);
            let mut completion = [0; 12];
            intruder.read(self.ring + offset, &mut completion).unwrap();
            let (mark, result) = completion.split_at(8);
            if mark == MARK.to_ne_bytes() {
                return i32::from_ne_bytes(result.try_into().unwrap());
            }
        }
        panic!("the operation has not completed");
    }
}

/// `struct io_uring_sqe`.
fn entry(opcode: u8, file: i32, offset: u64, address: u64, length: u32, flags: u32) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[4..8].copy_from_slice(&file.to_ne_bytes());
    entry[8..16].copy_from_slice(&offset.to_ne_bytes());
    entry[16..24].copy_from_slice(&address.to_ne_bytes());
    entry[24..28].copy_from_slice(&length.to_ne_bytes());
    entry[28..32].copy_from_slice(&flags.to_ne_bytes());
    entry[32..40].copy_from_slice(&MARK.to_ne_bytes());
    entry
}

/// Makes a ring in the thread that serves the front-end, and opens a file by it.
fn open_by_new_ring(scene: &Scene) -> i32 {
    let file = scene.directory().join("file");
    fs::write(&file, "of value").unwrap();
    let mut intruder = scene.enter(MAIN);
    let ring = Ring::make(&mut intruder);
    let path = intruder.path(&file).unwrap();
    ring.run(
        &mut intruder,
        entry(OPENAT, libc::AT_FDCWD, 0, path, 0, libc::O_RDONLY as u32),
    )
}

#[test]
fn a_ring_of_the_session_opens_no_file() {
    if !BLOCK.is_possible() {
        return;
    }
    let scene = BLOCK.start();
    assert_eq!(open_by_new_ring(&scene), -libc::EACCES);
    // What the test does would work otherwise.
    let scene = BLOCK.start_with(&|_, command| {
        command.arg(mode("log"));
    });
    assert!(open_by_new_ring(&scene) >= 0);
}

/// Makes an operation on the ring that a queue has.
fn run_on_the_queues_ring(scene: &mut Scene, entry: [u8; 64]) -> i32 {
    // Where things are in it.
    let mut parameters = Parameters {
        completions: 512,
        // CQSIZE, R_DISABLED, TASKRUN_FLAG, SINGLE_ISSUER and DEFER_TASKRUN
        flags: 1 << 3 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 13,
        ..Parameters::default()
    };
    // SAFETY: the kernel writes to the parameters.
    let file = unsafe { libc::syscall(libc::SYS_io_uring_setup, 256, &raw mut parameters) };
    assert!(file >= 0, "io_uring_setup");
    // SAFETY: it is open, and nobody else's.
    unsafe { libc::close(file as i32) };
    let files = fs::read_dir(format!("/proc/{}/fd", scene.running.program.id())).unwrap();
    let is_ring = |path: &std::path::Path| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("io_uring"))
    };
    let ring = files
        .map(|entry| entry.unwrap().path())
        .find(|path| is_ring(path))
        .unwrap();
    let number = ring.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let mut intruder = scene.enter("queue-0");
    let ring = Ring::map(&mut intruder, number, parameters);
    ring.run(&mut intruder, entry)
}

#[test]
fn the_ring_of_a_queue_makes_no_sockets_and_opens_no_files() {
    if !BLOCK.is_possible() {
        return;
    }
    // Even where nothing else would keep it from that.
    let start = || {
        BLOCK.start_with(&|_, command| {
            command.arg(mode("off"));
        })
    };
    for operation in [
        entry(SOCKET, libc::AF_INET, libc::SOCK_STREAM as u64, 0, 0, 0),
        entry(OPENAT, libc::AT_FDCWD, 0, 0, 0, libc::O_RDONLY as u32),
    ] {
        let mut scene = start();
        assert_eq!(run_on_the_queues_ring(&mut scene, operation), -libc::EACCES);
    }
}
