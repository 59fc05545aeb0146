// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device as a driver sees it (VIRTIO 1.3, section 5.2): every request, every error, every framing, and the resulting
//! image.
//!
//! The tests run with each I/O engine on a disk, with the choice of `auto` there, and on an image in memory.

#![cfg(test)]

mod config;
mod crash;
mod direct;
mod durability;
mod errors;
mod failed_sync;
mod faults;
mod framing;
mod limits;
mod load;
mod locking;
mod open;
mod ranges;
mod requests;
mod resize;
mod stall;
mod suspend;
mod throttle;
mod writeback;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use vhost_device_tests::front_end::block::{BlockDriver, Completion, OK, SECTOR_SIZE};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{Program, command, option};
use vhost_device_tests::skip::skip;
use vhost_device_tests::target::{Block, Target};

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(20);

/// Default size of the image.
const IMAGE_SIZE: usize = 1 << 20;

/// Sectors of that image.
const SECTORS: u64 = (IMAGE_SIZE / SECTOR_SIZE) as u64;

/// Default maximum data of a request.
const LARGEST: u32 = 1 << 20;

/// Byte that the front-end library fills the writable data with before a request.
const UNTOUCHED: u8 = 0xdd;

/// A directory on a tmpfs.
const MEMORY: &str = "/dev/shm";

/// Location of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On a disk, if the target directory of the build is.
    Disk,
    /// On a tmpfs.
    Memory,
}

/// How an image is accessed.
#[derive(Clone, Copy, Debug)]
struct Variant {
    /// Value of `--io-engine`.
    engine: &'static str,
    place: Place,
}

impl Variant {
    const IO_URING: Self = Variant {
        engine: "io_uring",
        place: Place::Disk,
    };
    const THREADS: Self = Variant {
        engine: "threads",
        place: Place::Disk,
    };
    /// The host's default: io_uring, usually.
    const AUTO: Self = Variant {
        engine: "auto",
        place: Place::Disk,
    };
    /// The queue's own thread performs the I/O.
    const INLINE: Self = Variant {
        engine: "auto",
        place: Place::Memory,
    };

    /// Returns the same with the image in memory.
    fn in_memory(self) -> Self {
        Variant {
            place: Place::Memory,
            ..self
        }
    }

    /// Returns whether this host can run it.
    fn is_possible(self) -> bool {
        let block = Block {
            io_engine: self.engine,
        };
        block.is_possible() && (self.place == Place::Disk || Path::new(MEMORY).is_dir())
    }

    /// Returns a new directory for an image.
    fn directory(self) -> TempDir {
        let parent = match self.place {
            Place::Disk => env!("CARGO_TARGET_TMPDIR"),
            Place::Memory => MEMORY,
        };
        fs::create_dir_all(parent).unwrap();
        tempfile::tempdir_in(parent).unwrap()
    }

    /// Returns the device with an image of these contents, listening.
    fn start(self, contents: &[u8], arguments: &[&str]) -> Device {
        let directory = self.directory();
        fs::write(directory.path().join("image"), contents).unwrap();
        self.start_in(directory, arguments, |_| {})
    }

    /// Returns the device with the file `image` in `directory`, listening. `prepare` may change the command.
    fn start_in(
        self,
        directory: TempDir,
        arguments: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Device {
        let sockets = tempfile::tempdir().unwrap();
        let socket = sockets.path().join("socket");
        let image = directory.path().join("image");
        let mut command = self.command(&image, &socket, arguments);
        prepare(&mut command);
        let mut program = Program::serve(&mut command, &socket).unwrap();
        program.expect_no_leak().unwrap();
        Device {
            program,
            socket,
            image,
            _directories: vec![sockets, directory],
        }
    }

    /// Returns what starts the device with this image.
    fn command(self, image: &Path, socket: &Path, arguments: &[&str]) -> Command {
        let mut command = command("vhost-device-block").unwrap();
        command
            .env_remove("RUST_LOG")
            .arg(option("blk-file", image))
            .arg(option("io-engine", self.engine))
            .arg(option("socket-path", socket))
            .args(arguments);
        command
    }

    /// Returns a started device with an image of these contents, and a driver on its first queue.
    fn disk(self, contents: &[u8], arguments: &[&str]) -> Disk {
        Disk::connect(self.start(contents, arguments))
    }
}

/// A running device.
struct Device {
    program: Program,
    socket: PathBuf,
    image: PathBuf,
    /// Directories of its socket and its image, if they are temporary.
    _directories: Vec<TempDir>,
}

impl Device {
    fn connect(&self) -> FrontEnd {
        self.connect_with(Options::default())
    }

    fn connect_with(&self, options: Options) -> FrontEnd {
        FrontEnd::connect(&self.socket, &options).unwrap()
    }

    /// Connects a front-end that does not accept `features`.
    fn connect_without(&self, features: u64) -> FrontEnd {
        let defaults = Options::default();
        let front_end = self.connect_with(Options {
            features: defaults.features & !features,
            ..defaults
        });
        assert_eq!(front_end.features() & features, 0);
        front_end
    }

    /// Returns the image as the host sees it.
    fn contents(&self) -> Vec<u8> {
        fs::read(&self.image).unwrap()
    }

    /// Returns the image, to be changed by the host.
    fn file(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.image)
            .unwrap()
    }

    /// Returns bytes of storage that the image occupies.
    fn allocated(&self) -> u64 {
        self.file().sync_all().unwrap();
        self.image.metadata().unwrap().blocks() * 512
    }
}

/// A device with a connection and a driver, which are dropped in this order.
struct Disk {
    driver: BlockDriver,
    front_end: FrontEnd,
    device: Device,
}

impl Disk {
    fn connect(device: Device) -> Self {
        let front_end = device.connect();
        Disk {
            driver: driver(&front_end),
            front_end,
            device,
        }
    }

    /// Ends the connection.
    fn disconnect(self) -> Device {
        self.device
    }

    /// Panics unless the host and the driver see an image of these bytes.
    fn assert_contents(&mut self, expected: &[u8]) {
        assert_same(&self.device.contents(), expected, "the image on the host");
        for (index, expected) in expected.chunks(LARGEST as usize).enumerate() {
            let sector = index as u64 * u64::from(LARGEST) / SECTOR_SIZE as u64;
            let seen = ok(self.driver.read(sector, expected.len() as u32).unwrap());
            assert_same(&seen, expected, "what the driver reads");
        }
    }
}

/// Returns a driver on queue 0.
fn driver(front_end: &FrontEnd) -> BlockDriver {
    let queue = front_end.queue(0, 256).unwrap();
    BlockDriver::new(front_end.memory(), queue, LARGEST)
}

/// Returns bytes that depend on the seed, and have no regularity.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// Panics unless the request succeeded and wrote all its data. Returns the data.
fn ok(completion: Completion) -> Vec<u8> {
    let Completion {
        status,
        length,
        data,
    } = completion;
    assert_eq!(u32::from(status), OK, "status");
    assert_eq!(length as usize, data.len() + 1, "used length");
    data
}

/// Panics unless the request failed with `status`, and nothing else was written.
fn assert_failed(completion: &Completion, status: u32, what: &str) {
    assert_eq!(u32::from(completion.status), status, "status of {what}");
    assert_eq!(completion.length, 1, "used length of {what}");
    assert!(
        completion.data.iter().all(|&byte| byte == UNTOUCHED),
        "{what} has written data"
    );
}

/// Compares without printing all the bytes.
fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "length of {what}");
    let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(position) = differs {
        panic!(
            "{what} differs at byte {position}: {:#x}, not {:#x}",
            seen[position], expected[position]
        );
    }
}

/// Runs `test`; skips it if this host cannot run that variant.
fn run(test: fn(Variant), variant: Variant) {
    if variant.is_possible() {
        test(variant);
    } else {
        skip(&format!("this host cannot run {variant:?}"));
    }
}

/// Turns each function that takes a [`Variant`] into a test for each I/O engine, with the image on a disk.
macro_rules! for_each_engine {
    ($($test:ident),+ $(,)?) => {
        mod io_uring {
            $(#[test] fn $test() { crate::run(super::$test, crate::Variant::IO_URING) })+
        }
        mod threads {
            $(#[test] fn $test() { crate::run(super::$test, crate::Variant::THREADS) })+
        }
    };
}
use for_each_engine;

/// Turns each function that takes a [`Variant`] into a test for each variant.
macro_rules! for_each_variant {
    ($($test:ident),+ $(,)?) => {
        crate::for_each_engine!($($test),+);
        mod auto {
            $(#[test] fn $test() { crate::run(super::$test, crate::Variant::AUTO) })+
        }
        mod inline {
            $(#[test] fn $test() { crate::run(super::$test, crate::Variant::INLINE) })+
        }
    };
}
use for_each_variant;
