// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's drawing, scanouts and cursor, taken over by another device (DEVICE_STATE).

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vhost_device_tests::front_end::device::RING_PACKED;
use vhost_device_tests::front_end::dirty_log::LOG_ALL;
use vhost_device_tests::front_end::gpu::{
    Answers, Display, GpuDriver, Shown, command, number, words,
};
use vhost_device_tests::front_end::state::{HEADER_SIZE, sealed};
use vhost_device_tests::front_end::{Buffer, FrontEnd, GuestMemory, Options};
use vhost_device_tests::process::PATIENCE;
use vhost_device_tests::stand_in::StandIn;

use virtio_bindings::virtio_gpu::VIRTIO_GPU_F_VIRGL;

use crate::virgl::{CONTEXT, create_context, done_in, picture};
use crate::{B8G8R8X8, Device, QUIET, bytes, pattern};

const B8G8R8A8: u32 = 1;

/// Connects to a device without state, whose queues are stopped. The guest's memory is that of another connection.
fn front_end(device: &Device, memory: &GuestMemory) -> FrontEnd {
    let socket = device.directory.path().join("socket");
    FrontEnd::connect_with_memory(&socket, &Options::default(), memory.clone()).unwrap()
}

fn stop(driver: &GpuDriver) {
    driver.front_end.stop(0).unwrap();
    driver.front_end.stop(1).unwrap();
}

fn save(driver: &GpuDriver) -> Vec<u8> {
    stop(driver);
    driver.front_end.save_state().unwrap()
}

fn uuid(driver: &mut GpuDriver, resource: u32) -> Vec<u8> {
    let response = driver.run(&command(number::ASSIGN_UUID, &words(&[resource, 0])));
    assert_eq!(response.kind(), number::OK_RESOURCE_UUID);
    response.body().to_vec()
}

fn show_cursor(driver: &mut GpuDriver, resource: u32) {
    driver.update_cursor(0, [10, 20], resource, [3, 4]);
}

/// Returns the pixels of columns 2 to 9 and rows 1 to 6 of a picture with 16 columns.
fn part(pixels: &[u32]) -> Vec<u32> {
    let rows = pixels.chunks(16).skip(1).take(6);
    rows.flat_map(|row| &row[2..10]).copied().collect()
}

/// Draws on two scanouts and sets a cursor. Returns the pages of the picture that both show.
fn draw(driver: &mut GpuDriver) -> Vec<u64> {
    let pages = driver.create_drawn(5, B8G8R8X8, [16, 32], &bytes(&pattern(512)));
    driver.set_scanout(0, 5, [0, 0, 16, 32]);
    driver.set_scanout(3, 5, [2, 1, 8, 6]);
    driver.create_drawn(9, B8G8R8A8, [64, 64], &bytes(&pattern(4096)));
    show_cursor(driver, 9);
    // Not shown, and without backing.
    driver.done(number::CREATE_2D, &words(&[6, B8G8R8X8, 1, 1]));
    pages
}

/// Runs commands that fail, as many at once as fit.
fn carry_out(driver: &mut GpuDriver, count: usize) {
    let memory = driver.front_end.memory();
    let bytes = command(number::UNREF, &words(&[99, 0]));
    let place = memory.allocate(4096, 4096);
    memory.write(place, &bytes);
    let chain = [
        Buffer::readable(place, bytes.len() as u32),
        Buffer::writable(place + 2048, 64),
    ];
    let (mut sent, mut done) = (0, 0);
    while done < count {
        while sent < count && driver.control.add(&chain).is_some() {
            sent += 1;
        }
        driver.control.publish();
        driver.control.kick();
        assert!(driver.control.wait_used(PATIENCE));
        while driver.control.take_used().is_some() {
            done += 1;
        }
    }
}

/// A ring returns to its initial position: a split one after 65,536 requests, a packed one after two rounds. Its driver continues there, or
/// another driver starts there; then its rings are elsewhere.
#[test]
fn a_new_driver_at_the_old_base_finds_no_old_resources() {
    let device = Device::start(&["--headless"]);
    for (ring, requests) in [(0, 0x1_0000), (RING_PACKED, 128)] {
        let mut options = Options::default();
        options.features = options.features & !RING_PACKED | ring;
        let mut driver = device.connect_with(&options);
        let create = command(number::CREATE_2D, &words(&[5, B8G8R8X8, 16, 16]));
        assert_eq!(driver.run(&create).kind(), number::OK_NODATA);
        let start = driver.control.options().start();
        carry_out(&mut driver, requests - 1);
        let [control, cursor] = [0, 1].map(|queue| driver.front_end.stop(queue).unwrap());
        assert_eq!((control, cursor), (start, start));
        for (index, queue) in [&driver.control, &driver.cursor].into_iter().enumerate() {
            driver.front_end.start(index, queue, start).unwrap();
        }
        assert_eq!(driver.run(&create).kind(), number::INVALID_RESOURCE_ID);
        carry_out(&mut driver, requests - 1);
        assert_eq!(driver.front_end.stop(0).unwrap(), start);
        assert_eq!(driver.front_end.stop(1).unwrap(), start);
        let mut next = GpuDriver::new(driver.front_end).unwrap();
        assert_eq!(next.run(&create).kind(), number::OK_NODATA);
    }
}

/// Asserts that a new display receives the picture that [`draw`] draws.
fn assert_shown(display: &Display, pixels: &[u32]) {
    let mut told: Vec<_> = (0..5).map(|_| display.next()).collect();
    // Updates come last.
    let expected = [
        Shown::Scanout(0, 16, 32),
        Shown::CursorImage(0, [10, 20, 3, 4], pattern(4096)),
        Shown::Scanout(3, 8, 6),
        Shown::Update(0, [0, 0, 16, 32], pixels.to_vec()),
        Shown::Update(3, [0, 0, 8, 6], part(pixels)),
    ];
    // The order of the small messages is unspecified.
    told[..3].sort_by_key(|shown| expected.iter().position(|other| other == shown));
    assert!(told == expected, "{told:.200?}");
}

#[test]
fn a_migrated_guest_keeps_its_pictures_scanouts_cursor_and_uuids() {
    let (here, there) = (Device::start(&[]), Device::start(&[]));
    let mut driver = here.connect();
    let pages = draw(&mut driver);
    let known = uuid(&mut driver, 5);
    let state = save(&driver);

    let destination = front_end(&there, driver.front_end.memory());
    destination.load_state(&state).unwrap();
    let mut driver = GpuDriver::new(destination).unwrap();
    let display = driver.connect_display(Answers::default());
    assert_shown(&display, &pattern(512));
    assert_eq!(uuid(&mut driver, 5), known);
    // The guest continues drawing, in the same memory.
    let picture: Vec<u32> = pattern(512).iter().map(|pixel| !pixel).collect();
    driver.draw(&pages, &bytes(&picture));
    driver.transfer(5, 16, [0, 0, 16, 32]);
    driver.flush(5, [2, 1, 8, 6]);
    let update = Shown::Update(0, [2, 1, 8, 6], part(&picture));
    assert_eq!(display.next(), update);
    assert_eq!(
        display.next(),
        Shown::Update(3, [0, 0, 8, 6], part(&picture))
    );
    driver.done(number::ATTACH_BACKING, &attach_one(6));
    let response = driver.run(&command(number::ATTACH_BACKING, &attach_one(5)));
    assert_eq!(response.kind(), number::UNSPEC, "it has a backing");
    let taken = words(&[9, B8G8R8X8, 1, 1]);
    let response = driver.run(&command(number::CREATE_2D, &taken));
    assert_eq!(response.kind(), number::INVALID_RESOURCE_ID);
    driver.unref(5);
    assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
    assert_eq!(display.next(), Shown::Scanout(3, 0, 0));
}

/// Creates ATTACH_BACKING with one page.
fn attach_one(resource: u32) -> Vec<u8> {
    let mut body = words(&[resource, 1]);
    body.extend(4096u64.to_le_bytes());
    body.extend(words(&[4096, 0]));
    body
}

#[test]
fn loaded_state_replaces_what_was_shown() {
    let (here, there) = (Device::start(&[]), Device::start(&[]));
    let mut driver = here.connect();
    draw(&mut driver);
    let state = save(&driver);

    // A guest on the same connection, as when a snapshot is restored.
    let (mut driver, display) = there.connect_with_display(Answers::default());
    driver.create(1, B8G8R8X8, 16, 16);
    driver.set_scanout(0, 1, [0, 0, 16, 16]);
    driver.set_scanout(7, 1, [0, 0, 16, 16]);
    driver.flush(1, [0, 0, 16, 16]);
    let black = vec![0; 256];
    let all = [0, 0, 16, 16];
    for expected in [
        Shown::Scanout(0, 16, 16),
        Shown::Scanout(7, 16, 16),
        Shown::Update(0, all, black.clone()),
        Shown::Update(7, all, black),
    ] {
        assert_eq!(display.next(), expected);
    }
    stop(&driver);
    driver.front_end.load_state(&state).unwrap();
    // Initial ring indices do not mean another guest here.
    let mut driver = GpuDriver::new(driver.front_end).unwrap();
    let mut told: Vec<_> = (0..6).map(|_| display.next()).collect();
    let expected = [
        Shown::Scanout(0, 16, 32),
        Shown::CursorImage(0, [10, 20, 3, 4], pattern(4096)),
        Shown::Scanout(3, 8, 6),
        Shown::Scanout(7, 0, 0),
        Shown::Update(0, [0, 0, 16, 32], pattern(512)),
        Shown::Update(3, [0, 0, 8, 6], part(&pattern(512))),
    ];
    told[..4].sort_by_key(|shown| expected.iter().position(|other| other == shown));
    assert!(told == expected, "{told:.200?}");
    driver.done(number::CREATE_2D, &words(&[1, B8G8R8X8, 1, 1]));
}

#[test]
fn a_saved_device_continues() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    draw(&mut driver);
    let state = save(&driver);
    let driver = restarted(driver);
    let display = driver.connect_display(Answers::default());
    assert_shown(&display, &pattern(512));
    assert!(save(&driver) == state, "nothing has changed");
}

#[test]
fn a_state_that_is_refused_changes_nothing() {
    let mut device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    draw(&mut driver);
    driver.flush(5, [0, 0, 16, 32]);
    // The features are negotiated already; the screen takes five messages.
    (0..5).for_each(|_| drop(display.next()));
    let state = save(&driver);
    let raw = driver.front_end.raw().unwrap();
    let part = &state[HEADER_SIZE..];
    let one_at_a_time = 200;
    for length in (0..one_at_a_time).chain((one_at_a_time..part.len()).step_by(97)) {
        let cut = sealed("gpu", 1, &part[..length]);
        assert!(!raw.loads(&cut), "{length} bytes of {}", part.len());
    }
    for other in ["block", "rng", "input"] {
        assert!(!raw.loads(&sealed(other, 1, part)));
    }
    assert!(raw.saved() == state, "the state has changed");
    assert_eq!(display.next_within(QUIET), None);
    let log = device.program.stderr();
    assert!(log.contains("the state of the device was not loaded"));
    assert!(device.program.status().unwrap().is_none());
}

#[test]
fn a_state_of_more_than_the_memory_that_it_may_have_is_refused() {
    let (here, there) = (Device::start(&[]), Device::start(&["--max-hostmem=3M"]));
    let mut driver = here.connect();
    driver.done(number::CREATE_2D, &words(&[1, B8G8R8X8, 1024, 640]));
    let fits = save(&driver);
    driver = restarted(driver);
    draw(&mut driver);
    for resource in 10..20 {
        driver.done(number::CREATE_2D, &words(&[resource, B8G8R8X8, 128, 128]));
    }
    let within_size = save(&driver);
    driver = restarted(driver);
    driver.done(number::CREATE_2D, &words(&[2, B8G8R8X8, 1024, 1024]));
    let too_large = save(&driver);

    let destination = front_end(&there, driver.front_end.memory());
    destination.load_state(&fits).unwrap();
    destination.load_state(&within_size).unwrap_err();
    destination.load_state(&too_large).unwrap_err();
    let log = there.program.stderr();
    assert!(
        log.contains("more resources than --max-hostmem allows"),
        "{log}"
    );
    assert!(log.contains("this device takes"), "{log}");
}

#[test]
fn no_content_of_a_state_does_harm() {
    let device = Device::start(&["--max-hostmem=16M"]);
    let mut driver = device.connect();
    draw(&mut driver);
    let state = save(&driver);
    let part = state[HEADER_SIZE..].to_vec();
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
    // The decisive bytes are around many pixels.
    let heads: Vec<usize> = (0..60)
        .chain(16_384..16_600)
        .chain((0..part.len()).step_by(61))
        .collect();
    let config = Config {
        cases: 300,
        failure_persistence: None,
        ..Config::default()
    };
    drop(driver);
    let socket = device.directory.path().join("socket");
    let options = Options {
        memory: vec![(0, 8 << 20)],
        ..Options::default()
    };
    let connect = || FrontEnd::connect(&socket, &options).unwrap();
    let mut runner = TestRunner::new(config);
    let harm = runner.run(&changes, |changes| {
        let mut changed = part.clone();
        for (index, value) in changes {
            changed[heads[index.index(heads.len())]] = value;
        }
        let front_end = connect();
        let raw = front_end.raw().unwrap();
        if raw.loads(&sealed("gpu", 1, &changed)) {
            // It can work with a state that it has accepted.
            let mut driver = GpuDriver::new(front_end).unwrap();
            let display = driver.connect_display(Answers::default());
            for resource in [5, 6, 9] {
                driver.run(&command(number::FLUSH, &words(&[0, 0, 1, 1, resource, 0])));
            }
            drop(display);
        }
        Ok(())
    });
    harm.unwrap();
    assert!(connect().raw().unwrap().loads(&state));
}

#[test]
fn renderer_state_is_not_saved_and_the_guest_continues() {
    let stand_in = StandIn::new("", &[]).unwrap();
    let device = crate::dmabuf::start(&stand_in, &[]);
    // A guest that does not use 3D is saved.
    let options = Options {
        features: !(1 << VIRTIO_GPU_F_VIRGL),
        ..Options::default()
    };
    let mut driver = device.connect_with(&options);
    draw(&mut driver);
    save(&driver);
    drop(driver);
    let mut driver = device.connect();
    create_context(&mut driver);
    stop(&driver);
    let refused = driver.front_end.save_state();
    assert!(refused.is_err(), "a context was saved");
    driver = restarted(driver);
    done_in(&mut driver, CONTEXT, number::CTX_DESTROY, &[]);
    driver.done(number::CREATE_3D, &picture(1, 64, 32, 0));
    stop(&driver);
    let refused = driver.front_end.save_state();
    assert!(refused.is_err(), "a resource of the renderer's was saved");
    driver = restarted(driver);
    driver.unref(1);
    save(&driver);
    let log = device.program.stderr();
    assert!(log.contains("3D, which cannot be saved"), "{log}");
}

/// Continues the queues where they stopped.
fn restarted(driver: GpuDriver) -> GpuDriver {
    for (index, queue) in [&driver.control, &driver.cursor].into_iter().enumerate() {
        // They are stopped already, so this changes nothing.
        let base = driver.front_end.stop(index).unwrap();
        driver.front_end.start(index, queue, base).unwrap();
    }
    driver
}

/// A front-end that cannot transfer the state would migrate the guest without its pictures.
#[test]
fn a_guest_cannot_migrate_without_the_state_of_the_device() {
    let device = Device::start(&["--headless"]);
    assert_eq!(device.connect().front_end.offered() & LOG_ALL, 0);
}
