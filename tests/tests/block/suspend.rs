// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that migrates while its disk works for seconds: its rings stop at once, and requests in flight migrate too (vhost-user,
//! GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserProtocolFeatures};
use vhost_device_storage::engine::slow::SLOW_DISK;
use vhost_device_tests::front_end::block::{
    DISCARD, FLUSH, IOERR, Request, SECTOR_SIZE, WRITE_ZEROES, segment,
};
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::device::RING_PACKED;
use vhost_device_tests::front_end::dirty_log::{Pages, Shadow};
use vhost_device_tests::front_end::{DirtyLog, FrontEnd, GuestMemory, Options};
use vhost_device_tests::process::{Program, inherit};

use crate::failed_sync::Small;
use crate::load::{Load, read, write};
use crate::{Device, Variant, assert_same, noise, ok};

/// The message, and the protocol feature, that the `vhost` crate does not have.
const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
const SKIP_DRAIN: u64 = 1 << 23;
const INFLIGHT: VhostUserProtocolFeatures = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;

/// How long the disk takes for each operation.
const SLOW: Duration = Duration::from_secs(2);
/// How long a ring may take to stop, at the best of several times; and at the worst, on a busy machine.
const SOON: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_millis(1000);
/// Environment variable with another number of migrations, there and back again in turn.
const MIGRATIONS: &str = "VHOST_DEVICE_MIGRATIONS";

/// Queues, requests in flight on each, and bytes of their data.
const QUEUES: usize = 2;
const DEPTH: usize = 10;
const SIZE: usize = 8192;
/// Size of the image: each request has a place of its own.
const IMAGE: usize = QUEUES * DEPTH * SIZE;
/// Writes of which a small disk loses some.
const LOST: usize = 1024;
/// Descriptors that the file of requests in flight has room for.
const ROOM: u16 = 256;

/// How a front-end asks for rings to stop without their requests being completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    /// As QEMU 11: GET_VRING_BASE while the guest migrates.
    Choice,
    /// As newer ones: by a message of its own, at any time.
    Message,
}

/// Each format of the rings, with each way to ask.
const WAYS: [(bool, Ask); 4] = [
    (false, Ask::Choice),
    (false, Ask::Message),
    (true, Ask::Choice),
    (true, Ask::Message),
];

/// A device on a disk that can be slow.
struct Side {
    device: Device,
    speed: PathBuf,
    _directory: TempDir,
}

impl Side {
    /// A device on `image`, or on a new one.
    fn start(variant: Variant, image: Option<&Path>, arguments: &[&str]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let speed = files.path().join("milliseconds");
        std::fs::write(&speed, "0").unwrap();
        let directory = variant.directory();
        let own = directory.path().join("image");
        match image {
            None => std::fs::write(&own, noise(3, IMAGE)).unwrap(),
            Some(image) => std::os::unix::fs::symlink(image, &own).unwrap(),
        }
        let device = variant.start_in(directory, arguments, |command| {
            command.env(SLOW_DISK, &speed);
        });
        Self {
            device,
            speed,
            _directory: files,
        }
    }

    /// A device on an open file, which does not open it once more for its operations.
    fn inherit(file: &File, arguments: &[&str]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let (socket, speed) = (
            files.path().join("socket"),
            files.path().join("milliseconds"),
        );
        std::fs::write(&speed, "0").unwrap();
        let mut command = Variant::THREADS.command(Path::new("/dev/fd/7"), &socket, arguments);
        inherit(&mut command, file.try_clone().unwrap().into(), 7);
        command.env(SLOW_DISK, &speed);
        let mut program = Program::spawn(&mut command).unwrap();
        program.wait_for_listener(&socket).unwrap();
        let device = Device {
            program,
            socket,
            image: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            _directories: Vec::new(),
        };
        Self {
            device,
            speed,
            _directory: files,
        }
    }

    /// Has each operation from now on begin so late.
    fn set_slow(&self, delay: Duration) {
        std::fs::write(&self.speed, format!("{:<8}", delay.as_millis())).unwrap();
    }
}

/// A guest and its front-end, with what goes along when it migrates.
struct Guest {
    memory: GuestMemory,
    packed: bool,
    ask: Ask,
    inflight: (VhostUserInflight, File),
    log: DirtyLog,
    front_end: FrontEnd,
    loads: Vec<Load>,
    /// What the image holds once all requests are carried out.
    image: Vec<u8>,
}

impl Guest {
    fn boot(side: &Side, packed: bool, ask: Ask) -> Self {
        let memory = GuestMemory::new(&Options::default().memory);
        let front_end = connect(side, packed, ask, &memory);
        let wanted = VhostUserInflight::new(0, 0, QUEUES as u16, ROOM);
        let inflight = front_end.call().get_inflight_fd(&wanted).unwrap();
        let end = memory.regions().iter();
        let end = end.map(|region| region.guest_address() + region.size());
        let mut guest = Self {
            image: side.device.contents(),
            loads: Vec::new(),
            log: DirtyLog::new(end.max().unwrap()),
            memory,
            packed,
            ask,
            inflight,
            front_end,
        };
        guest.share_inflight();
        let load = |index| Load::new(&guest.front_end, index, DEPTH, SIZE as u32);
        guest.loads = (0..QUEUES).map(load).collect();
        guest
    }

    fn share_inflight(&self) {
        let (inflight, file) = &self.inflight;
        let mut call = self.front_end.call();
        call.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
    }

    /// The front-end begins to copy memory.
    fn begin_migration(&self) {
        self.front_end.set_log(&self.log).unwrap();
        self.front_end.log_writes(true).unwrap();
    }

    /// Stops all rings with their requests in flight. Returns where they continue, and how long that took.
    fn stop(&self) -> (Vec<u32>, Duration) {
        for index in 0..QUEUES {
            self.front_end
                .call()
                .set_vring_enable(index, false)
                .unwrap();
        }
        let begin = Instant::now();
        let stop = |index| match self.ask {
            Ask::Choice => self.front_end.stop(index).unwrap(),
            Ask::Message => {
                let raw = self.front_end.raw().unwrap();
                let payload = payload::vring_state(index as u32, 0);
                let reply = raw.ask(GET_VRING_BASE_SKIP_DRAIN, &payload, &[]).unwrap();
                u32::from_ne_bytes(reply.payload[4..8].try_into().unwrap())
            }
        };
        let bases = (0..QUEUES).map(stop).collect();
        (bases, begin.elapsed())
    }

    /// Starts all rings again.
    fn start(&self, bases: &[u32]) {
        for (index, (load, base)) in self.loads.iter().zip(bases).enumerate() {
            self.front_end.start(index, load.queue(), *base).unwrap();
        }
    }

    /// Goes on with the rings on another device. Returns the connection to the one before.
    fn move_to(&mut self, side: &Side, bases: &[u32]) -> FrontEnd {
        let front_end = connect(side, self.packed, self.ask, &self.memory);
        let before = std::mem::replace(&mut self.front_end, front_end);
        self.share_inflight();
        self.start(bases);
        before
    }

    /// Makes all requests available, writes with contents of this seed.
    fn submit(&mut self, seed: u64) {
        let parts = self.image.chunks_mut(SIZE).enumerate();
        for (place, part) in parts {
            let (queue, number) = (place / DEPTH, place % DEPTH);
            let sector = (place * SIZE / SECTOR_SIZE) as u64;
            let data;
            let request = match KINDS[number] {
                Kind::Write => {
                    part.copy_from_slice(&noise(seed + place as u64, SIZE));
                    write(sector, part)
                }
                Kind::Read => read(sector, SIZE),
                Kind::Zero(kind) => {
                    part.fill(0);
                    data = segment(sector, (SIZE / SECTOR_SIZE) as u32, 0);
                    Request {
                        kind,
                        data: &data,
                        ..Request::default()
                    }
                }
                Kind::Flush => Request {
                    kind: FLUSH,
                    ..Request::default()
                },
            };
            self.loads[queue].add(number, &request);
        }
        self.loads.iter_mut().for_each(Load::publish);
    }

    /// Waits until each request is answered once, and looks at what was read.
    fn settle(&mut self) {
        for (load, image) in self.loads.iter_mut().zip(self.image.chunks(DEPTH * SIZE)) {
            let mut left = [true; DEPTH];
            while left.contains(&true) {
                let (number, completion) = load.wait();
                assert!(std::mem::take(&mut left[number]), "{number} twice");
                let data = ok(completion);
                if let Kind::Read = KINDS[number] {
                    assert_same(&data, &image[number * SIZE..][..SIZE], "what was read");
                }
            }
        }
    }

    fn assert_nothing_is_answered(&mut self) {
        let answered = self.loads.iter_mut().find_map(Load::take);
        assert!(answered.is_none(), "{answered:?}");
    }

    /// Waits until the device has noted all requests as in flight.
    fn wait_until_taken(&self) {
        let (_, file) = &self.inflight;
        // Where the flag of the first descriptor is, and how far the next one is from it.
        let (first, size) = if self.packed { (32, 32) } else { (16, 16) };
        let ring = (first + u64::from(ROOM) * size).next_multiple_of(64);
        let is_noted = |place: &u64| {
            let mut flag = [0];
            file.read_exact_at(&mut flag, *place).unwrap();
            flag == [1]
        };
        let room = u64::from(ROOM);
        let places = (0..QUEUES as u64)
            .flat_map(|index| (0..room).map(move |entry| index * ring + first + entry * size));
        let deadline = Instant::now() + SLOW / 2;
        while places.clone().filter(is_noted).count() < QUEUES * DEPTH {
            assert!(Instant::now() < deadline, "requests are not taken");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn connect(side: &Side, packed: bool, ask: Ask, memory: &GuestMemory) -> FrontEnd {
    let defaults = Options::default();
    let options = Options {
        features: defaults.features & !RING_PACKED | if packed { RING_PACKED } else { 0 },
        protocol_features: defaults.protocol_features | INFLIGHT,
        ..defaults
    };
    let front_end =
        FrontEnd::connect_with_memory(&side.device.socket, &options, memory.clone()).unwrap();
    assert!(front_end.protocol_features().contains(INFLIGHT));
    if ask == Ask::Message {
        let raw = front_end.raw().unwrap();
        let offered = raw.ask(FrontendReq::GET_PROTOCOL_FEATURES, &[], &[]);
        assert_ne!(offered.unwrap().u64() & SKIP_DRAIN, 0, "it is offered");
        let wanted = front_end.protocol_features().bits() | SKIP_DRAIN;
        let request = FrontendReq::SET_PROTOCOL_FEATURES;
        let answer = raw.acknowledged(request, &payload::u64(wanted), &[]);
        assert_eq!(answer.unwrap(), 0);
    }
    front_end
}

/// What the requests do, each in a place of its own.
#[derive(Clone, Copy)]
enum Kind {
    Write,
    Read,
    Zero(u32),
    Flush,
}

const KINDS: [Kind; DEPTH] = [
    Kind::Write,
    Kind::Read,
    Kind::Flush,
    Kind::Write,
    Kind::Zero(DISCARD),
    Kind::Read,
    Kind::Write,
    Kind::Zero(WRITE_ZEROES),
    Kind::Read,
    Kind::Write,
];

/// Migrates there and back again. Returns how long each stop took.
fn migrate(variant: Variant, packed: bool, ask: Ask, times: u64) -> Vec<Duration> {
    let mut here = Side::start(variant, None, &[]);
    let mut there = Side::start(variant, Some(&here.device.image), &["--incoming"]);
    let mut guest = Guest::boot(&here, packed, ask);
    let mut stops = Vec::new();
    for time in 0..times {
        guest.begin_migration();
        here.set_slow(SLOW);
        let begin = Instant::now();
        guest.submit(1000 * time);
        guest.wait_until_taken();
        let (bases, took) = guest.stop();
        stops.push(took);
        guest.assert_nothing_is_answered();
        here.set_slow(Duration::ZERO);
        let before = guest.move_to(&there, &bases);
        guest.settle();
        assert!(begin.elapsed() >= SLOW, "before the image was handed over");
        // What the guest writes next is not overwritten.
        guest.submit(1000 * time + 500);
        guest.settle();
        drop(before);
        assert_same(&there.device.contents(), &guest.image, "the image");
        std::mem::swap(&mut here, &mut there);
    }
    guest.front_end.stop(0).unwrap();
    guest.assert_nothing_is_answered();
    stops
}

fn a_guest_migrates_at_once_while_its_disk_works(variant: Variant) {
    let times = std::env::var(MIGRATIONS).map_or(2, |text| text.parse().unwrap());
    let stops = WAYS.map(|(packed, ask)| migrate(variant, packed, ask, times));
    let stops = stops.concat();
    println!("stops took {stops:?}");
    assert!(stops.iter().all(|took| *took < LATE), "{stops:?}");
    assert!(stops.iter().any(|took| *took < SOON), "{stops:?}");
}

fn no_guest_memory_is_written_after_the_stop(variant: Variant) {
    for (packed, ask) in WAYS {
        let side = Side::start(variant, None, &[]);
        let mut guest = Guest::boot(&side, packed, ask);
        guest.begin_migration();
        side.set_slow(SLOW / 4);
        guest.submit(0);
        guest.wait_until_taken();
        guest.stop();
        let shadow = Shadow::new(&guest.memory);
        guest.log.take();
        std::thread::sleep(SLOW / 2);
        assert_eq!(shadow.differences(), Pages::new());
        assert_eq!(guest.log.take(), Pages::new());
    }
}

/// The migration fails, and the guest continues at the source.
fn a_guest_that_goes_on_has_its_requests_carried_out_in_order(variant: Variant) {
    for (packed, ask) in WAYS {
        let side = Side::start(variant, None, &[]);
        let mut guest = Guest::boot(&side, packed, ask);
        guest.begin_migration();
        side.set_slow(SLOW / 2);
        let begin = Instant::now();
        guest.submit(0);
        guest.wait_until_taken();
        let (bases, _) = guest.stop();
        side.set_slow(Duration::ZERO);
        guest.front_end.log_writes(false).unwrap();
        guest.start(&bases);
        let asked = Instant::now();
        guest.front_end.call().get_features().unwrap();
        assert!(asked.elapsed() < LATE / 2, "{:?}", asked.elapsed());
        guest.settle();
        assert!(begin.elapsed() >= SLOW / 2, "beside the same operations");
        guest.submit(500);
        guest.settle();
        assert_same(&side.device.contents(), &guest.image, "the image");
    }
}

/// The guest comes to the other device and goes back before the image was handed over.
fn a_ring_that_waits_for_the_image_stops_at_once(variant: Variant) {
    for (packed, ask) in WAYS {
        let here = Side::start(variant, None, &[]);
        let there = Side::start(variant, Some(&here.device.image), &["--incoming"]);
        let mut guest = Guest::boot(&here, packed, ask);
        guest.begin_migration();
        here.set_slow(SLOW / 2);
        guest.submit(0);
        guest.wait_until_taken();
        let (bases, _) = guest.stop();
        here.set_slow(Duration::ZERO);
        let before = guest.move_to(&there, &bases);
        guest.begin_migration();
        let (bases, took) = guest.stop();
        assert!(took < LATE / 2, "{took:?}");
        guest.assert_nothing_is_answered();
        guest.front_end = before;
        guest.share_inflight();
        guest.start(&bases);
        guest.settle();
        assert_same(&here.device.contents(), &guest.image, "the image");
    }
}

/// The kernel may be writing to guest memory for it, and cannot be stopped.
fn a_read_from_before_the_migration_is_waited_for(variant: Variant) {
    for (packed, ask) in WAYS {
        let side = Side::start(variant, None, &[]);
        let mut guest = Guest::boot(&side, packed, ask);
        side.set_slow(SLOW / 4);
        let begin = Instant::now();
        guest.loads[0].add(0, &read(0, SIZE));
        guest.loads[0].publish();
        std::thread::sleep(SLOW / 20);
        guest.begin_migration();
        guest.stop();
        assert!(begin.elapsed() >= SLOW / 4, "{:?}", begin.elapsed());
        let (_, completion) = guest.loads[0].take().expect("it was answered");
        assert_same(&ok(completion), &guest.image[..SIZE], "what was read");
    }
}

/// Only a guest that migrates has its requests suspended, unless its front-end says so: other stops leave nothing in flight.
fn a_stop_without_a_migration_waits(variant: Variant) {
    for packed in [false, true] {
        let side = Side::start(variant, None, &[]);
        let mut guest = Guest::boot(&side, packed, Ask::Choice);
        side.set_slow(SLOW / 4);
        guest.submit(0);
        guest.wait_until_taken();
        guest.stop();
        guest.settle();
    }
}

/// The kernel tells of lost data once for each open file. Here both programs have the same one; on two hosts, only the first program hears
/// of it.
#[test]
fn a_failed_flush_goes_along() {
    let Some(small) = Small::with_device() else {
        return;
    };
    let file = File::options()
        .read(true)
        .write(true)
        .open(small.device())
        .unwrap();
    let here = Side::inherit(&file, &[]);
    let there = Side::inherit(&file, &["--incoming"]);
    let mut guest = Guest::boot(&here, false, Ask::Choice);
    guest.begin_migration();
    let load = &mut guest.loads[0];
    let data = noise(1, SIZE);
    for number in 0..LOST {
        load.add(0, &write((number * SIZE / SECTOR_SIZE) as u64, &data));
        load.publish();
        ok(load.wait().1);
    }
    let flush = Request {
        kind: FLUSH,
        ..Request::default()
    };
    here.set_slow(SLOW / 4);
    load.add(0, &flush);
    load.publish();
    std::thread::sleep(SLOW / 20);
    let (bases, _) = guest.stop();
    let _before = guest.move_to(&there, &bases);
    let (_, completion) = guest.loads[0].wait();
    assert_eq!(u32::from(completion.status), IOERR, "the flush");
}

crate::for_each_engine!(
    a_guest_migrates_at_once_while_its_disk_works,
    no_guest_memory_is_written_after_the_stop,
    a_guest_that_goes_on_has_its_requests_carried_out_in_order,
    a_ring_that_waits_for_the_image_stops_at_once,
    a_read_from_before_the_migration_is_waited_for,
    a_stop_without_a_migration_waits,
);
