// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Invalid logs. Those that are refused at once are in the suite `protocol`.

use rustix::fs::ftruncate;
use vhost_device_tests::front_end::Shadow;
use vhost_device_tests::front_end::dirty_log::pages;
use vhost_device_tests::target::Target;

use crate::{END, HIGH, PATIENCE, REGION_SIZE, Ring, Scene, USUAL, new_log};

fn started<'a>(scene: &Scene, target: &'a dyn Target) -> Ring<'a> {
    let mut ring = scene.ring(target);
    ring.make_room(scene, 2);
    ring.start(&scene.front_end);
    ring
}

/// Sends requests and checks their answers.
fn work(ring: &mut Ring) {
    while ring.add() {}
    ring.publish();
    ring.finish();
}

fn a_truncated_log_ends_only_its_connection(target: &dyn Target) {
    let running = target.start();
    let scene = Scene::new(&running, USUAL);
    let log = scene.start_log();
    let mut ring = started(&scene, target);
    ftruncate(log.file(), 0).unwrap();
    while ring.add() {}
    ring.publish();
    assert!(scene.front_end.raw().unwrap().closed(PATIENCE));
    let scene = Scene::new(&running, USUAL);
    work(&mut started(&scene, target));
}

/// Outside the log, at its very end, or wrapping around.
fn a_used_ring_may_be_logged_outside_the_log(target: &dyn Target) {
    let running = target.start();
    let scene = Scene::new(&running, USUAL);
    let log = new_log();
    let mut ring = started(&scene, target);
    scene.front_end.set_log(&log).unwrap();
    scene.front_end.log_writes(true).unwrap();
    for place in [END, END - 1, u64::MAX, u64::MAX - 5, 1] {
        scene
            .front_end
            .log_ring(0, &ring.addresses, Some(place))
            .unwrap();
        log.take();
        work(&mut ring);
        let data = ring.slots.iter().flat_map(|slot| slot.pages()).collect();
        assert!(log.take().is_superset(&data), "{place:#x}");
    }
}

/// The front-end may have created it before it had that memory.
fn memory_without_bits_does_no_harm(target: &dyn Target) {
    let running = target.start();
    let mut scene = Scene::new(&running, USUAL);
    let log = scene.start_log();
    scene.front_end.add_region(1 << 40, 1 << 16).unwrap();
    let mut ring = started(&scene, target);
    let (outside, inside) = (1 << 40, HIGH + REGION_SIZE as u64 - 1);
    for slot in &mut ring.slots {
        slot.writable[0].address = outside;
        slot.writable[1].address = inside;
    }
    let slots = std::mem::take(&mut ring.idle);
    for slot in slots {
        // Both have the same buffers, one after the other.
        ring.idle.push(slot);
        ring.memory = scene.front_end.memory().clone();
        let mut shadow = Shadow::new(&scene.high);
        log.take();
        assert!(ring.add());
        ring.publish();
        while ring.take() == 0 {
            assert!(ring.queue.wait_used(PATIENCE));
        }
        let marked = log.take();
        assert_eq!(&marked & &pages(inside, 1), pages(inside, 1));
        assert!(marked.is_disjoint(&pages(outside, 1 << 16)));
        shadow.copy(&marked);
        // The device may ask for the next kick at any time.
        assert!(shadow.differences().is_subset(&ring.used_pages()));
    }
}

/// The previous log stays in force.
fn a_log_that_is_too_small_is_refused(target: &dyn Target) {
    let running = target.start();
    let scene = Scene::new(&running, USUAL);
    let log = scene.start_log();
    let mut ring = started(&scene, target);
    let small = vhost_device_tests::front_end::DirtyLog::new(HIGH + REGION_SIZE as u64 - (8 << 12));
    let region = small.region();
    let payload = [region.mmap_size, region.mmap_offset].map(u64::to_ne_bytes);
    let file = std::os::fd::AsFd::as_fd(small.file());
    let request = vhost::vhost_user::message::FrontendReq::SET_LOG_BASE;
    let raw = scene.front_end.raw().unwrap();
    assert_ne!(
        raw.acknowledged(request, &payload.concat(), &[file])
            .unwrap(),
        0
    );
    work(&mut ring);
    assert!(small.take().is_empty());
    assert!(!log.take().is_empty());
}

crate::for_each_device![
    a_truncated_log_ends_only_its_connection,
    a_used_ring_may_be_logged_outside_the_log,
    memory_without_bits_does_no_harm,
    a_log_that_is_too_small_is_refused,
];
