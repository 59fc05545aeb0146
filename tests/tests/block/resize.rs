// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image that grows under its guest: SIGHUP makes the device check its size. It does not shrink.

use std::fs;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::BackendReq;
use vhost_device_tests::front_end::block::{IOERR, SECTOR_SIZE, UNMAP};
use vhost_device_tests::front_end::{Error, FrontEnd, Options, RawConnection};
use vhost_device_tests::process::{Program, Signal};

use crate::config::{capacity, discard_limits, write_zeroes_limits};
use crate::load::{Load, read, write};
use crate::{
    Device, Disk, IMAGE_SIZE, PATIENCE, SECTORS, Variant, assert_failed, assert_same, driver,
    noise, ok,
};

/// How long to wait for a message that must not arrive.
const SHORT: Duration = Duration::from_millis(50);

/// The log lines of the three possible results.
const GROWN: &str = "the disk grows from";
const SAME: &str = "the disk keeps its size";
const SHRUNK: &str = "the image has only";

impl Device {
    /// Sets the length of the image.
    fn set_length(&self, length: usize) {
        self.file().set_len(length as u64).unwrap();
    }

    /// Makes the device check its image, and waits for `line` in the log. Returns the whole line.
    fn measure(&mut self, line: &'static str) -> String {
        let log = |program: &Program| -> Vec<String> {
            let stderr = program.stderr();
            let lines = stderr.lines().filter(|logged| logged.contains(line));
            lines.map(str::to_owned).collect()
        };
        let before = log(&self.program).len();
        // Its contents are checked at the end all the same.
        self.program.signal(Signal::HUP).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = log(&self.program).into_iter().nth(before) {
                return line;
            }
            assert!(Instant::now() < deadline, "{}", self.program.stderr());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A user who replaced the file, as `cp --remove-destination` and many tools do, must learn that the guest does not see the new one.
fn a_path_that_names_another_file_is_reported(variant: Variant) {
    const OTHER: &str = "another file now";
    const GONE: &str = "no file any more";
    let mut device = variant.start(&noise(1, IMAGE_SIZE), &[]);
    device.measure(SAME);
    let kept = device.image.with_file_name("kept");
    fs::rename(&device.image, &kept).unwrap();
    let line = device.measure(GONE);
    assert!(line.contains(device.image.to_str().unwrap()), "{line}");
    fs::write(&device.image, noise(2, 2 * IMAGE_SIZE)).unwrap();
    let line = device.measure(OTHER);
    assert!(line.contains(device.image.to_str().unwrap()), "{line}");
    fs::rename(&kept, &device.image).unwrap();
    device.measure(SAME);
    let log = device.program.stderr();
    for line in [OTHER, GONE] {
        assert_eq!(log.matches(line).count(), 1, "{log}");
    }
}

/// Waits for the next message on a channel of the back-end, which must be CONFIG_CHANGE_MSG without a request for a reply.
fn assert_told(channel: &RawConnection) {
    let message = channel.receive().unwrap();
    assert_eq!(message.request, BackendReq::CONFIG_CHANGE_MSG as u32);
    assert_eq!((message.flags, message.payload.len()), (1, 0));
}

/// Panics if there is a message on a channel of the back-end.
fn assert_not_told(channel: &mut RawConnection) {
    channel.set_timeout(SHORT).unwrap();
    assert!(matches!(channel.receive(), Err(Error::Timeout(_))));
}

fn a_driver_is_notified_and_can_use_the_new_part(variant: Variant) {
    let image = noise(1, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    let channel = disk.front_end.back_end_channel().unwrap();
    let beyond = disk.driver.read(SECTORS, 512).unwrap();
    assert_failed(&beyond, IOERR, "a read beyond the end");
    assert_eq!(capacity(&disk.front_end), SECTORS);
    let limits = discard_limits(&disk.front_end);

    disk.device.set_length(3 * IMAGE_SIZE);
    // Nothing happens by itself.
    assert_eq!(capacity(&disk.front_end), SECTORS);
    let line = disk.device.measure(GROWN);
    assert!(line.contains(&IMAGE_SIZE.to_string()), "{line}");
    assert!(line.contains(&(3 * IMAGE_SIZE).to_string()), "{line}");
    assert!(line.contains(": info: "), "{line}");
    assert_told(&channel);
    assert_eq!(capacity(&disk.front_end), 3 * SECTORS);
    assert_eq!(discard_limits(&disk.front_end), limits);
    assert_eq!(write_zeroes_limits(&disk.front_end).segments, 16);

    // Across the old end, and to the new one.
    let data = noise(2, IMAGE_SIZE);
    ok(disk.driver.write(SECTORS - 1, &data).unwrap());
    assert_same(
        &ok(disk.driver.read(SECTORS - 1, IMAGE_SIZE as u32).unwrap()),
        &data,
        "data",
    );
    ok(disk.driver.write(3 * SECTORS - 1, &data[..512]).unwrap());
    ok(disk.driver.discard(2 * SECTORS - 8, 16).unwrap());
    ok(disk.driver.write_zeroes(2 * SECTORS - 8, 16, 0).unwrap());
    ok(disk
        .driver
        .write_zeroes(2 * SECTORS - 16, 16, UNMAP)
        .unwrap());
    for (sector, sectors) in [(3 * SECTORS, 1), (3 * SECTORS - 1, 2)] {
        let length = sectors * SECTOR_SIZE as u32;
        let beyond = disk.driver.read(sector, length).unwrap();
        assert_failed(&beyond, IOERR, "a read beyond the end");
        let beyond = disk.driver.discard(sector, sectors).unwrap();
        assert_failed(&beyond, IOERR, "a discard beyond the end");
        let beyond = disk.driver.write_zeroes(sector, sectors, 0).unwrap();
        assert_failed(&beyond, IOERR, "write-zeroes beyond the end");
    }
    let mut expected = image;
    expected.resize(3 * IMAGE_SIZE, 0);
    let start = IMAGE_SIZE - 512;
    expected[start..start + IMAGE_SIZE].copy_from_slice(&data);
    expected[3 * IMAGE_SIZE - 512..].copy_from_slice(&data[..512]);
    let old_end = 2 * IMAGE_SIZE;
    expected[old_end - 16 * 512..old_end + 8 * 512].fill(0);
    disk.assert_contents(&expected);
}

fn an_image_may_grow_more_than_once_and_in_whole_blocks_only(variant: Variant) {
    let mut disk = variant.disk(&noise(1, IMAGE_SIZE), &["--logical-block-size=4096"]);
    let mut channel = disk.front_end.back_end_channel().unwrap();
    disk.device.set_length(IMAGE_SIZE + 4095);
    let line = disk.device.measure(SAME);
    assert!(line.contains(": info: "), "{line}");
    assert_not_told(&mut channel);
    for blocks in [1, 2, 5] {
        disk.device.set_length(IMAGE_SIZE + blocks * 4096 + 512);
        disk.device.measure(GROWN);
        channel.set_timeout(PATIENCE).unwrap();
        assert_told(&channel);
        assert_eq!(capacity(&disk.front_end), SECTORS + 8 * blocks as u64);
        disk.device.measure(SAME);
        assert_not_told(&mut channel);
    }
}

fn a_guest_keeps_its_size_when_the_image_shrinks(variant: Variant) {
    let image = noise(1, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    let mut channel = disk.front_end.back_end_channel().unwrap();
    disk.device.set_length(IMAGE_SIZE / 2);
    let line = disk.device.measure(SHRUNK);
    for part in [
        ": warn: ",
        &IMAGE_SIZE.to_string(),
        &(IMAGE_SIZE / 2).to_string(),
    ] {
        assert!(line.contains(part), "{line}");
    }
    assert_not_told(&mut channel);
    assert_eq!(capacity(&disk.front_end), SECTORS);
    // Existing data can be read; reads beyond it fail.
    let half = IMAGE_SIZE / 2;
    assert_same(
        &ok(disk.driver.read(0, half as u32).unwrap()),
        &image[..half],
        "data",
    );
    let gone = disk.driver.read(SECTORS / 2, 512).unwrap();
    assert_eq!(u32::from(gone.status), IOERR);
    // With its old length, it works as before.
    disk.device.set_length(IMAGE_SIZE);
    disk.device.measure(SAME);
    assert_eq!(ok(disk.driver.read(SECTORS / 2, 512).unwrap()), [0; 512]);
    disk.device.set_length(2 * IMAGE_SIZE);
    disk.device.measure(GROWN);
    channel.set_timeout(PATIENCE).unwrap();
    assert_told(&channel);
}

fn an_image_grows_without_a_front_end_or_without_a_channel_to_one(variant: Variant) {
    let mut device = variant.start(&noise(1, IMAGE_SIZE), &[]);
    device.set_length(2 * IMAGE_SIZE);
    device.measure(GROWN);
    let front_end = device.connect();
    assert_eq!(capacity(&front_end), 2 * SECTORS);
    device.set_length(3 * IMAGE_SIZE);
    device.measure(GROWN);
    assert_eq!(capacity(&front_end), 3 * SECTORS);
    ok(driver(&front_end)
        .write(3 * SECTORS - 1, &[1; 512])
        .unwrap());
    // The channel of a lost front-end is closed.
    let channel = front_end.back_end_channel().unwrap();
    drop(front_end);
    assert!(channel.closed(PATIENCE));
    device.set_length(4 * IMAGE_SIZE);
    device.measure(GROWN);
    assert_eq!(capacity(&device.connect()), 4 * SECTORS);
    // A channel that is not read blocks nothing.
    let front_end = device.connect();
    let channel = front_end.back_end_channel().unwrap();
    for size in 5..=200 {
        device.set_length(size * IMAGE_SIZE);
        device.measure(GROWN);
    }
    assert_eq!(capacity(&front_end), 200 * SECTORS);
    assert_told(&channel);
}

fn requests_continue_while_the_image_grows(variant: Variant) {
    const DEPTH: usize = 32;
    const GROWTHS: usize = 100;
    let mut device = variant.start(&noise(1, IMAGE_SIZE), &[]);
    let front_end = device.connect();
    let channel = front_end.back_end_channel().unwrap();
    let mut load = Load::new(&front_end, 0, DEPTH, 4096);
    let mut sizes = vec![1; DEPTH];
    let mut contents: Vec<_> = (0..DEPTH)
        .map(|number| noise(number as u64, 4096))
        .collect();
    // Each request writes and reads in turn, near the current end of the disk.
    let place = |number: usize, size: usize| {
        ((size * IMAGE_SIZE - (number + 1) * 4096) / SECTOR_SIZE) as u64
    };
    for (number, contents) in contents.iter().enumerate() {
        load.add(number, &write(place(number, 1), contents));
    }
    load.publish();
    let mut size = 1;
    let mut seed = DEPTH as u64;
    let mut answered = 0;
    while size < GROWTHS || answered < 2 * DEPTH {
        if size < GROWTHS {
            size += 1;
            device.set_length(size * IMAGE_SIZE);
            device.measure(GROWN);
            assert_told(&channel);
            assert_eq!(capacity(&front_end), size as u64 * SECTORS);
        } else {
            answered += 1;
        }
        let (number, completion) = load.wait();
        let was_read = !completion.data.is_empty();
        let data = ok(completion);
        if was_read {
            assert_same(&data, &contents[number], "what was written");
            seed += 1;
            (sizes[number], contents[number]) = (size, noise(seed, 4096));
            load.add(number, &write(place(number, size), &contents[number]));
        } else {
            load.add(number, &read(place(number, sizes[number]), 4096));
        }
        load.publish();
    }
}

fn an_image_that_bypasses_the_page_cache_grows(variant: Variant) {
    let mut device = variant.start(&noise(1, IMAGE_SIZE), &["--direct"]);
    device.set_length(2 * IMAGE_SIZE);
    device.measure(GROWN);
    let mut disk = Disk::connect(device);
    let data = noise(2, IMAGE_SIZE);
    ok(disk.driver.write(SECTORS, &data).unwrap());
    assert_same(
        &ok(disk.driver.read(SECTORS, IMAGE_SIZE as u32).unwrap()),
        &data,
        "data",
    );
}

fn a_read_only_image_grows(variant: Variant) {
    let mut device = variant.start(&noise(1, IMAGE_SIZE), &["--read-only"]);
    device
        .file()
        .write_all_at(&[7; 512], IMAGE_SIZE as u64)
        .unwrap();
    device.measure(GROWN);
    let mut disk = Disk::connect(device);
    assert_eq!(capacity(&disk.front_end), SECTORS + 1);
    assert_eq!(ok(disk.driver.read(SECTORS, 512).unwrap()), [7; 512]);
}

/// The destination of a migration has opened the image long before.
fn an_image_is_measured_when_it_is_taken_over(variant: Variant) {
    let mut here = variant.start(&noise(1, IMAGE_SIZE), &[]);
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("socket");
    let mut command = variant.command(&here.image, &socket, &["--incoming"]);
    let mut there = Program::spawn(&mut command).unwrap();
    there.wait_for_listener(&socket).unwrap();
    let source = here.connect();
    let queue = source.queue(0, 16).unwrap();
    let destination = FrontEnd::connect(&socket, &Options::default()).unwrap();
    let channel = destination.back_end_channel().unwrap();
    here.set_length(2 * IMAGE_SIZE);
    here.measure(GROWN);
    assert_eq!(capacity(&destination), SECTORS);
    source.stop(0).unwrap();
    drop(queue);
    let mut driver = driver(&destination);
    assert_told(&channel);
    assert_eq!(capacity(&destination), 2 * SECTORS);
    ok(driver.write(2 * SECTORS - 1, &[1; 512]).unwrap());
    assert!(there.stderr().contains(GROWN), "{}", there.stderr());
}

crate::for_each_variant![
    a_path_that_names_another_file_is_reported,
    a_driver_is_notified_and_can_use_the_new_part,
    an_image_may_grow_more_than_once_and_in_whole_blocks_only,
    a_guest_keeps_its_size_when_the_image_shrinks,
    an_image_grows_without_a_front_end_or_without_a_channel_to_one,
    requests_continue_while_the_image_grows,
    a_read_only_image_grows,
    an_image_is_measured_when_it_is_taken_over,
];

mod direct {
    use crate::{Variant, run};

    #[test]
    fn io_uring() {
        run(
            super::an_image_that_bypasses_the_page_cache_grows,
            Variant::IO_URING,
        );
    }

    #[test]
    fn threads() {
        run(
            super::an_image_that_bypasses_the_page_cache_grows,
            Variant::THREADS,
        );
    }
}
