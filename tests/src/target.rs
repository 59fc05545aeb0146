// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-ends of the device-independent suites: how to start one, what it supports, and a request that it can answer.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN};
use virtio_bindings::virtio_scsi::VIRTIO_SCSI_S_FAILURE;

use crate::front_end::gpu::{HEADER_SIZE, fenced_command, number, words};
use crate::front_end::{Buffer, FrontEnd, GuestMemory, Options, Queue, Used};
use crate::process::{PATIENCE, Program, command, option};
use crate::skip;

/// A property that not every back-end has. The suites skip what a target does not claim; optional requests are skipped by the features it offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A message that arrives in pieces is reassembled.
    Pieces,
    /// A refused request gets a NAK if an acknowledgement was asked for, and the connection continues.
    Refusal,
    /// An unknown request gets a NAK if an acknowledgement was asked for, and the connection continues.
    Unknown,
    /// Files that a message does not use are closed, and a connection that ended leaves no resources behind.
    NoLeak,
    /// The rules of the protocol for ring set-up are checked, beyond the needs of the implementation.
    RingChecks,
    /// Only a corrupt ring stops, its ERR eventfd is signalled, and it can be started again.
    BrokenRing,
    /// The no-interrupt flag is respected without EVENT_IDX too, where it is a hint.
    NoInterrupt,
    /// A ring without a kick eventfd is polled.
    Polling,
    /// Errors of a guest cannot fill the log.
    ShortLog,
    /// A request whose buffers are not all in guest memory fails, and no other one does.
    BadBuffer,
    /// The process survives the loss of memory that the front-end truncates.
    LostMemory,
    /// Packed rings are supported.
    Packed,
}

/// Changes a command and the directory with its files.
pub type Configure<'a> = &'a dyn Fn(&Path, &mut Command);

/// A back-end that the suites can run against.
pub trait Target: Sync {
    /// Returns the name of its program, which is also used for skips.
    fn name(&self) -> &'static str;

    /// Returns whether this host can run it.
    fn is_possible(&self) -> bool {
        true
    }

    /// Starts it and waits until it listens.
    fn start(&self) -> Running {
        self.start_with(&|_, _| {})
    }

    /// Starts it and waits until it listens, after `configure` has changed its command or the directory with its files.
    fn start_with(&self, configure: Configure<'_>) -> Running;

    /// Returns whether it has this property.
    fn claims(&self, claim: Claim) -> bool;

    /// Returns the range of the config space that the driver can write zeroes and ones to: offset and size.
    fn writable_config(&self) -> (u32, usize);

    /// Returns how many of its queues, from the first on, accept the request that [`Request::write`] writes.
    fn request_queues(&self) -> usize {
        usize::MAX
    }

    /// Returns the number of readable and writable bytes of the request that [`Request::write`] writes.
    fn request_size(&self) -> (usize, usize);

    /// Returns whether the device has failed a request: it returned it with `used`, and `last` is the last writable byte.
    fn has_failed(&self, used: Used, last: u8) -> bool;

    /// Returns the readable bytes of a request, and the expected writable bytes. Both depend on `tag`, unless
    /// the device ignores the readable bytes.
    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>);
}

/// A running back-end.
pub struct Running {
    /// The process.
    pub program: Program,
    /// Its socket.
    pub socket: PathBuf,
    _directory: TempDir,
}

impl Running {
    /// Starts the program of `target`. If the target claims this, it must survive the test, and hold no more after it than before.
    fn start(
        target: &dyn Target,
        directory: TempDir,
        arguments: Vec<OsString>,
        configure: Configure<'_>,
    ) -> Self {
        let socket = directory.path().join("socket");
        let mut command = command(target.name()).unwrap_or_else(|error| panic!("{error}"));
        command.args(arguments).arg(option("socket-path", &socket));
        configure(directory.path(), &mut command);
        let mut program =
            Program::serve(&mut command, &socket).unwrap_or_else(|error| panic!("{error}"));
        if target.claims(Claim::NoLeak) {
            program
                .expect_no_leak()
                .unwrap_or_else(|error| panic!("{error}"));
        }
        Running {
            program,
            socket,
            _directory: directory,
        }
    }
}

impl Running {
    /// Connects a front-end with these options.
    pub fn connect_with(&self, options: &Options) -> FrontEnd {
        FrontEnd::connect(&self.socket, options).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Connects a front-end with the default options.
    pub fn connect(&self) -> FrontEnd {
        self.connect_with(&Options::default())
    }
}

/// Returns whether `target` claims this; the running test is skipped if it does not.
pub fn claims(target: &dyn Target, claim: Claim) -> bool {
    let claims = target.claims(claim);
    if !claims {
        skip(target, &format!("{claim:?}"));
    }
    claims
}

/// Skips the running test, because `target` does not offer `feature`.
pub fn skip(target: &dyn Target, feature: &str) {
    skip::skip(&format!("{} does not claim {feature}", target.name()));
}

/// Runs the test `name` with `target`; skips it if this host cannot run that.
pub fn run(name: &'static str, test: fn(&dyn Target), target: &dyn Target) {
    skip::set_name(name);
    if target.is_possible() {
        test(target);
    } else {
        let name = target.name();
        skip::skip(&format!("this host cannot run {name} as asked"));
    }
}

/// Runs the test `name` with `target` like [`run`]; skips it if the target does not claim this.
pub fn run_claim(name: &'static str, claim: Claim, test: fn(&dyn Target), target: &dyn Target) {
    skip::set_name(name);
    if claims(target, claim) {
        run(name, test, target);
    }
}

/// Turns functions that take a [`Target`] into tests: creates a module with a test for each of them, which runs it with this target. With
/// `claim => ` in front, a target without this property skips them all.
#[macro_export]
macro_rules! tests_with {
    ($module:ident, $target:expr, $($test:ident),+ $(,)?) => {
        mod $module {
            #[allow(unused_imports, reason = "the target is one of these")]
            use $crate::target::*;
            $(#[test] fn $test() { run(stringify!($test), super::$test, &$target) })+
        }
    };
    ($module:ident, $target:expr, $claim:path => $($test:ident),+ $(,)?) => {
        mod $module {
            #[allow(unused_imports, reason = "the target is one of these")]
            use $crate::target::*;
            $(#[test] fn $test() { run_claim(stringify!($test), $claim, super::$test, &$target) })+
        }
    };
}

/// A request in guest memory, which can be sent repeatedly.
pub struct Request<'a> {
    target: &'a dyn Target,
    memory: &'a GuestMemory,
    readable: Buffer,
    writable: Buffer,
    expected: Vec<u8>,
}

impl<'a> Request<'a> {
    /// Allocates memory for a request.
    pub fn new(target: &'a dyn Target, memory: &'a GuestMemory) -> Self {
        let (readable, writable) = target.request_size();
        let allocate = |size: usize| memory.allocate(size as u64, 1);
        Request {
            target,
            memory,
            readable: Buffer::readable(allocate(readable), readable as u32),
            writable: Buffer::writable(allocate(writable), writable as u32),
            expected: Vec::new(),
        }
    }

    /// Writes request `tag`, and returns its buffers: one readable, one writable.
    pub fn write(&mut self, tag: u32) -> [Buffer; 2] {
        let (readable, expected) = self.target.request(tag);
        self.memory.write(self.readable.address, &readable);
        // Whatever is expected, none of it is there yet.
        let nothing: Vec<u8> = expected.iter().map(|byte| !byte).collect();
        self.memory.write(self.writable.address, &nothing);
        self.expected = expected;
        [self.readable, self.writable]
    }

    /// Sends request `tag` on `queue`, and panics unless it is carried out.
    #[track_caller]
    pub fn run(&mut self, queue: &mut Queue, tag: u32) {
        queue.submit(&self.write(tag));
        self.finish(queue);
    }

    /// Waits until the device has used the next chain of `queue`. Panics unless that is this request, carried out.
    #[track_caller]
    pub fn finish(&self, queue: &mut Queue) {
        self.assert_done(queue.take_used_within(PATIENCE));
    }

    /// Returns the readable bytes.
    pub fn readable(&self) -> Buffer {
        self.readable
    }

    /// Returns the writable bytes.
    pub fn writable(&self) -> Buffer {
        self.writable
    }

    /// Panics unless the request has been carried out, and `used` says so.
    #[track_caller]
    pub fn assert_done(&self, used: Used) {
        assert_eq!(
            used.length, self.writable.length,
            "the length that the device says it wrote"
        );
        self.assert_written();
    }

    /// Panics unless the writable bytes are as expected.
    #[track_caller]
    pub fn assert_written(&self) {
        let written = self
            .memory
            .read_vec(self.writable.address, self.writable.length as usize);
        assert_eq!(written, self.expected, "what the device wrote");
    }

    /// Panics unless no writable byte has been written.
    #[track_caller]
    pub fn assert_untouched(&self) {
        let written = self
            .memory
            .read_vec(self.writable.address, self.writable.length as usize);
        let nothing: Vec<u8> = self.expected.iter().map(|byte| !byte).collect();
        assert_eq!(written, nothing, "the device wrote");
    }
}

/// Panics unless a request is carried out on `queue`.
#[track_caller]
pub fn assert_works(target: &dyn Target, memory: &GuestMemory, queue: &mut Queue) {
    Request::new(target, memory).run(queue, 77);
}

/// `vhost-device-block`, with requests to read a sector.
pub struct Block {
    /// Value of `--io-engine`.
    pub io_engine: &'static str,
}

impl Block {
    const SECTOR_SIZE: usize = 512;
    const SECTORS: u32 = 2048;

    fn sector(index: u32) -> Vec<u8> {
        (0..Self::SECTOR_SIZE / 4)
            .flat_map(|word| (index << 8 | word as u32).to_le_bytes())
            .collect()
    }
}

impl Target for Block {
    fn name(&self) -> &'static str {
        "vhost-device-block"
    }

    fn is_possible(&self) -> bool {
        self.io_engine != "io_uring" || has_io_uring()
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        let image = directory.path().join("image");
        let contents: Vec<u8> = (0..Self::SECTORS).flat_map(Self::sector).collect();
        File::create_new(&image)
            .and_then(|mut file| file.write_all(&contents))
            .expect("an image");
        let arguments = vec![
            option("blk-file", image),
            option("io-engine", self.io_engine),
            option("queue-size", "32768"),
        ];
        Running::start(self, directory, arguments, configure)
    }

    fn claims(&self, _claim: Claim) -> bool {
        true
    }

    fn writable_config(&self) -> (u32, usize) {
        // The field writeback.
        (32, 1)
    }

    fn request_size(&self) -> (usize, usize) {
        (16, Self::SECTOR_SIZE + 1)
    }

    fn has_failed(&self, _used: Used, last: u8) -> bool {
        last == VIRTIO_BLK_S_IOERR as u8
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        let index = tag % Self::SECTORS;
        let header = [VIRTIO_BLK_T_IN, 0, index, 0]
            .map(u32::to_le_bytes)
            .concat();
        let mut expected = Self::sector(index);
        expected.push(VIRTIO_BLK_S_OK as u8);
        (header, expected)
    }
}

/// Containers often forbid io_uring.
fn has_io_uring() -> bool {
    // SAFETY: no memory is passed; where the call is allowed, it fails for lack of it.
    unsafe {
        libc::syscall(
            libc::SYS_io_uring_setup,
            0,
            std::ptr::null_mut::<libc::c_void>(),
        )
    };
    let error = io::Error::last_os_error().raw_os_error();
    !matches!(error, Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

/// `vhost-device-rng`, with a source of zeroes, so that the order of answers makes no difference.
pub struct Rng;

impl Target for Rng {
    fn name(&self) -> &'static str {
        "vhost-device-rng"
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments = vec![option("rng-source", "/dev/zero")];
        Running::start(self, directory, arguments, configure)
    }

    fn claims(&self, _claim: Claim) -> bool {
        true
    }

    fn writable_config(&self) -> (u32, usize) {
        // It has no config space.
        (0, 0)
    }

    fn request_size(&self) -> (usize, usize) {
        (64, 64)
    }

    fn has_failed(&self, used: Used, _last: u8) -> bool {
        used.length == 0
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        let bytes = (0..16).flat_map(|word| (tag << 4 | word).to_le_bytes());
        (bytes.collect(), vec![0; 64])
    }
}

/// `vhost-device-console` with a client that sends zeroes, to a driver that was started already.
pub struct Console;

impl Target for Console {
    fn name(&self) -> &'static str {
        "vhost-device-console"
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments = vec![option("port", "fd=0")];
        Running::start(self, directory, arguments, &|directory, command| {
            configure(directory, command);
            command.stdin(File::open("/dev/zero").expect("/dev/zero"));
        })
    }

    fn claims(&self, _claim: Claim) -> bool {
        true
    }

    fn writable_config(&self) -> (u32, usize) {
        // The field emerg_wr is not stored.
        (0, 0)
    }

    fn request_queues(&self) -> usize {
        // The others are for what the guest writes, and for control messages.
        1
    }

    fn request_size(&self) -> (usize, usize) {
        Rng.request_size()
    }

    fn has_failed(&self, used: Used, last: u8) -> bool {
        Rng.has_failed(used, last)
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        Rng.request(tag)
    }
}

/// `vhost-device-gpu` without a display, asked for its modes. The fence distinguishes requests.
pub struct Gpu;

impl Gpu {
    const DISPLAYS: usize = 16;
}

impl Target for Gpu {
    fn name(&self) -> &'static str {
        "vhost-device-gpu"
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments = vec!["--headless".into()];
        Running::start(self, directory, arguments, configure)
    }

    fn claims(&self, _claim: Claim) -> bool {
        true
    }

    fn writable_config(&self) -> (u32, usize) {
        // Writes of the driver clear events, and are not stored.
        (0, 0)
    }

    fn request_queues(&self) -> usize {
        // The other one is the cursor queue.
        1
    }

    fn request_size(&self) -> (usize, usize) {
        (HEADER_SIZE, HEADER_SIZE + 24 * Self::DISPLAYS)
    }

    fn has_failed(&self, used: Used, _last: u8) -> bool {
        used.length <= HEADER_SIZE as u32
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        let command = fenced_command(number::GET_DISPLAY_INFO, 1, tag.into(), &[]);
        let mut response = fenced_command(number::OK_DISPLAY_INFO, 1, tag.into(), &[]);
        response.extend(words(&[0, 0, 1024, 768, 1, 0]));
        response.resize(HEADER_SIZE + 24 * Self::DISPLAYS, 0);
        (command, response)
    }
}

/// `vhost-device-scsi` without disks, asked on its control queue for something unknown.
pub struct Scsi;

impl Target for Scsi {
    fn name(&self) -> &'static str {
        "vhost-device-scsi"
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments = vec![option("queue-size", "32768")];
        Running::start(self, directory, arguments, configure)
    }

    fn claims(&self, _claim: Claim) -> bool {
        true
    }

    fn writable_config(&self) -> (u32, usize) {
        // Only sizes that are possible can be written.
        (0, 0)
    }

    fn request_queues(&self) -> usize {
        // The others are for events and commands.
        1
    }

    fn request_size(&self) -> (usize, usize) {
        (64, 64)
    }

    fn has_failed(&self, used: Used, _last: u8) -> bool {
        used.length == 0
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        let mut request = [u32::MAX, tag].map(u32::to_le_bytes).concat();
        request.resize(64, 0);
        // The last byte of all answers is the response.
        let mut expected = vec![0; 64];
        expected[63] = VIRTIO_SCSI_S_FAILURE as u8;
        (request, expected)
    }
}

/// `vhost-device-sound` with as many streams as it can have, asked for one of them.
pub struct Sound;

impl Sound {
    const STREAMS: u32 = 64;
    /// Size of the driver's structure for a stream, larger than that of the specification.
    const ITEM: u32 = 60;
    const PCM_INFO: u32 = 0x100;
    const OK: u32 = 0x8000;
    /// Size of a response that is only a status.
    const STATUS: u32 = 4;
}

impl Target for Sound {
    fn name(&self) -> &'static str {
        "vhost-device-sound"
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        let stream = "--streams=output,channels=2,formats=s16,rates=48000";
        let mut arguments = vec![stream.into(); Self::STREAMS as usize];
        arguments.push("--backend=null".into());
        Running::start(self, directory, arguments, configure)
    }

    fn claims(&self, _claim: Claim) -> bool {
        true
    }

    fn writable_config(&self) -> (u32, usize) {
        // The driver can only read it.
        (0, 0)
    }

    fn request_queues(&self) -> usize {
        // The others have events and sound.
        1
    }

    fn request_size(&self) -> (usize, usize) {
        (16, (Self::STATUS + Self::ITEM) as usize)
    }

    fn has_failed(&self, used: Used, _last: u8) -> bool {
        used.length <= Self::STATUS
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        let stream = tag % Self::STREAMS;
        let query = words(&[Self::PCM_INFO, stream, 1, Self::ITEM]);
        // The PCM device, underrun events, S16, 48 kHz, two channels.
        let mut response = words(&[Self::OK, stream, 1 << 4, 1 << 5, 0, 1 << 7, 0]);
        response.extend([0, 2, 2]);
        response.resize((Self::STATUS + Self::ITEM) as usize, 0);
        (query, response)
    }
}

/// The device of `src/bin/reference-device.rs`, which echoes.
pub struct Reference;

impl Target for Reference {
    fn name(&self) -> &'static str {
        "reference-device"
    }

    fn start_with(&self, configure: Configure<'_>) -> Running {
        let directory = tempfile::tempdir().expect("a directory");
        Running::start(self, directory, Vec::new(), configure)
    }

    fn claims(&self, claim: Claim) -> bool {
        // `vhost-user-backend` ends the connection, or the worker, on most errors.
        claim == Claim::BadBuffer
    }

    fn writable_config(&self) -> (u32, usize) {
        (0, 16)
    }

    fn request_size(&self) -> (usize, usize) {
        (64, 64)
    }

    fn has_failed(&self, used: Used, _last: u8) -> bool {
        used.length == 0
    }

    fn request(&self, tag: u32) -> (Vec<u8>, Vec<u8>) {
        let bytes: Vec<u8> = (0..16)
            .flat_map(|word| (tag << 4 | word).to_le_bytes())
            .collect();
        (bytes.clone(), bytes)
    }
}
