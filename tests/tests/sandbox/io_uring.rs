// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! io_uring bypasses the system call filter: no thread can create a ring, and the existing rings only do what a disk needs.

#![allow(unsafe_code)]

use std::fs;
use std::mem;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use vhost_device_tests::intruder::{Intruder, Outcome};
use vhost_device_tests::process::PATIENCE;

use crate::{BLOCK, MAIN, Scene, mode};

const OFFSET_OF_ENTRIES: u64 = 0x1000_0000;
const ENTRY_SIZE: u64 = 64;
const COMPLETION_SIZE: u64 = 16;
const GET_EVENTS: u64 = 1;
/// Operations, by their numbers.
const OPENAT: u8 = 18;
const SOCKET: u8 = 45;
/// Marks the expected completion.
const MARK: u64 = 0x7e57_7e57_7e57_7e57;

/// `struct io_uring_params`: flags, sizes, and the offsets in the mappings.
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

/// A ring, in the memory of a compromised thread.
struct Ring {
    file: u64,
    ring: u64,
    entries: u64,
    parameters: Parameters,
}

impl Ring {
    /// Creates a ring, or returns the outcome of the call.
    fn make(intruder: &mut Intruder) -> Result<Self, Outcome> {
        let address = intruder.bytes(&Parameters::default().bytes()).unwrap();
        let file = match intruder
            .call(libc::SYS_io_uring_setup, &[4, address])
            .unwrap()
        {
            Outcome::Returned(file @ 0..) => file,
            refused => return Err(refused),
        };
        let mut bytes = [0; 120];
        intruder.read(address, &mut bytes).unwrap();
        // SAFETY: a structure of numbers, for which all bytes are good.
        let parameters = unsafe { mem::transmute::<[u8; 120], Parameters>(bytes) };
        Ok(Self::map(intruder, file as u64, parameters))
    }

    /// Uses an existing ring.
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

    /// Submits an operation, and returns its result.
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

/// Returns `struct io_uring_sqe`.
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

/// Returns a TCP socket.
fn socket() -> [u8; 64] {
    entry(SOCKET, libc::AF_INET, libc::SOCK_STREAM as u64, 0, 0, 0)
}

/// Threads of other devices cannot create rings either: the attempts on each device include that.
#[test]
fn a_ring_cannot_be_created_to_open_a_socket() {
    if !BLOCK.is_possible() {
        return;
    }
    for thread in BLOCK.threads {
        let mut scene = BLOCK.start();
        let mut intruder = scene.enter(thread);
        let outcome = Ring::make(&mut intruder).map(|ring| ring.run(&mut intruder, socket()));
        assert_eq!(outcome, Err(Outcome::Trapped), "thread {thread}");
        drop(intruder);
        let status = scene.running.program.wait(PATIENCE).unwrap();
        assert_eq!(status.signal(), Some(libc::SIGSYS), "thread {thread}");
    }
}

/// Checks that the attack in the test above works without a sandbox.
#[test]
fn a_ring_opens_a_socket_where_there_is_no_sandbox() {
    if !BLOCK.is_possible() {
        return;
    }
    let scene = BLOCK.start_with(&|_, command| {
        command.arg(mode("off"));
    });
    let mut intruder = scene.enter(MAIN);
    let ring = Ring::make(&mut intruder).unwrap();
    assert!(ring.run(&mut intruder, socket()) >= 0);
}

/// Starts the device with a ring of its own, without any other restriction.
fn start_with_ring() -> (Scene, Intruder, Ring) {
    let scene = BLOCK.start_with(&|_, command| {
        command.arg(mode("off"));
    });
    // Offsets in the ring.
    let mut parameters = Parameters {
        completions: 256,
        // CQSIZE, R_DISABLED, COOP_TASKRUN and TASKRUN_FLAG
        flags: 1 << 3 | 1 << 6 | 1 << 8 | 1 << 9,
        ..Parameters::default()
    };
    // SAFETY: the kernel writes to the parameters.
    let file = unsafe { libc::syscall(libc::SYS_io_uring_setup, 64, &raw mut parameters) };
    assert!(file >= 0, "io_uring_setup");
    // SAFETY: it is open, and nobody else's.
    unsafe { libc::close(file as i32) };
    let number = rings(&scene)[0];
    let mut intruder = scene.enter("queues");
    let ring = Ring::map(&mut intruder, number, parameters);
    (scene, intruder, ring)
}

/// Returns the numbers of the device's files that are rings.
fn rings(scene: &Scene) -> Vec<u64> {
    let files = fs::read_dir(format!("/proc/{}/fd", scene.running.program.id())).unwrap();
    let is_ring = |path: &Path| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("io_uring"))
    };
    let files = files.map(|entry| entry.unwrap().path());
    let rings = files.filter(|path| is_ring(path));
    let number = |path: &Path| path.file_name()?.to_str()?.parse().ok();
    rings.map(|path| number(&path).unwrap()).collect()
}

#[test]
fn the_rings_of_the_device_make_no_sockets_and_open_no_files() {
    if !BLOCK.is_possible() {
        return;
    }
    for operation in [
        socket(),
        entry(OPENAT, libc::AT_FDCWD, 0, 0, 0, libc::O_RDONLY as u32),
    ] {
        let (_scene, mut intruder, ring) = start_with_ring();
        assert_eq!(ring.run(&mut intruder, operation), -libc::EACCES);
    }
}

#[test]
fn the_restrictions_of_a_ring_cannot_be_lifted() {
    if !BLOCK.is_possible() {
        return;
    }
    let (_scene, mut intruder, ring) = start_with_ring();
    // All known operations of io_uring_register, and more.
    for what in 0..64 {
        let arguments = [ring.file, what, 0, 0];
        let outcome = intruder.call(libc::SYS_io_uring_register, &arguments);
        let Ok(Outcome::Returned(result)) = outcome else {
            panic!("io_uring_register {what}: {outcome:?}");
        };
        let refused = [libc::EACCES, libc::EINVAL].map(|error| -i64::from(error));
        assert!(
            refused.contains(&result),
            "io_uring_register {what}: {result}"
        );
    }
    assert_eq!(ring.run(&mut intruder, socket()), -libc::EACCES);
}
