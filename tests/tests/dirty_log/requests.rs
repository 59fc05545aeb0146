// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The marks of single requests in the log.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_device_tests::front_end::dirty_log::{PAGE_SIZE, Pages};
use vhost_device_tests::front_end::{DirtyLog, Shadow};
use vhost_device_tests::target::Target;

use crate::{ELSEWHERE, END, MODES, Ring, Scene, USUAL, new_log};

/// Requests at a time.
const COUNT: usize = 5;

/// A running ring with requests that are not published yet.
fn prepared<'a>(scene: &Scene, target: &'a dyn Target) -> Ring<'a> {
    let mut ring = scene.ring(target);
    ring.make_room(scene, COUNT);
    let start = ring.queue.options().start();
    scene.front_end.start(0, &ring.queue, start).unwrap();
    while ring.add() {}
    ring
}

fn data_pages(ring: &Ring) -> Pages {
    ring.slots.iter().flat_map(|slot| slot.pages()).collect()
}

/// Returns the marks of each request, with the ring logged at any address, or not logged.
fn request_pages(ring: &Ring) -> Pages {
    &data_pages(ring) | &ring.used_descriptors()
}

fn all_changed_pages_are_logged_and_few_others(target: &dyn Target) {
    let running = target.start();
    for mode in MODES {
        let scene = Scene::new(&running, mode);
        let mut ring = prepared(&scene, target);
        let log = new_log();
        let used = ring.queue.layout().used;
        scene.front_end.set_log(&log).unwrap();
        scene.front_end.log_writes(true).unwrap();
        scene
            .front_end
            .log_ring(0, &ring.addresses, Some(used))
            .unwrap();
        let mut shadow = Shadow::new(&scene.high);
        log.take();
        ring.publish();
        ring.finish();
        scene.front_end.stop(0).unwrap();
        let marked = log.take();
        // The test would see it if some of these were not logged.
        let changed = &request_pages(&ring) | &ring.device_area(used);
        assert_eq!(shadow.differences(), changed, "{mode:?}");
        shadow.copy(&marked);
        assert!(shadow.differences().is_empty(), "{mode:?}");
        let expected = &request_pages(&ring) | &ring.used_pages();
        assert!(marked.is_subset(&expected), "{mode:?}: {marked:?}");
    }
}

/// At an address that need not be memory, or not at all.
fn the_used_ring_is_logged_where_the_front_end_says(target: &dyn Target) {
    let running = target.start();
    for place in [None, Some(ELSEWHERE), Some(ELSEWHERE + 4)] {
        let scene = Scene::new(&running, USUAL);
        let mut ring = prepared(&scene, target);
        let log = new_log();
        scene.front_end.set_log(&log).unwrap();
        scene.front_end.log_ring(0, &ring.addresses, place).unwrap();
        scene.front_end.log_writes(true).unwrap();
        log.take();
        ring.publish();
        ring.finish();
        scene.front_end.stop(0).unwrap();
        let mut expected = request_pages(&ring);
        expected.extend(place.iter().flat_map(|place| ring.device_area(*place)));
        assert_eq!(log.take(), expected, "{place:x?}");
    }
}

/// With a ring that starts while logging is on, as after a reboot of the guest.
fn a_ring_that_starts_late_is_logged(target: &dyn Target) {
    let running = target.start();
    let scene = Scene::new(&running, USUAL);
    let log = new_log();
    scene.front_end.log_writes(true).unwrap();
    scene.front_end.set_log(&log).unwrap();
    let mut ring = scene.ring(target);
    ring.make_room(&scene, COUNT);
    while ring.add() {}
    let mut shadow = Shadow::new(&scene.high);
    ring.queue.publish();
    let start = ring.queue.options().start();
    scene.front_end.configure(0, &ring.queue, start).unwrap();
    scene
        .front_end
        .log_ring(0, &ring.addresses, Some(ring.queue.layout().used))
        .unwrap();
    let call = || scene.front_end.call();
    call().set_vring_kick(0, ring.queue.kick_fd()).unwrap();
    call().set_vring_enable(0, true).unwrap();
    ring.finish();
    scene.front_end.stop(0).unwrap();
    shadow.copy(&log.take());
    assert!(shadow.differences().is_empty());
}

/// A log may begin anywhere in its file.
fn a_log_may_start_at_an_offset_in_its_file(target: &dyn Target) {
    let running = target.start();
    for offset in [8, 4096, 4103] {
        let scene = Scene::new(&running, USUAL);
        let mut ring = prepared(&scene, target);
        let size = END.div_ceil(8 * PAGE_SIZE) as usize;
        let log = DirtyLog::at_offset(offset, size);
        scene.front_end.set_log(&log).unwrap();
        scene.front_end.log_writes(true).unwrap();
        ring.publish();
        ring.finish();
        scene.front_end.stop(0).unwrap();
        assert_eq!(log.take(), request_pages(&ring), "offset {offset}");
        let before = rustix::io::pread(log.file(), &mut vec![0; offset][..], 0);
        assert_eq!(before, Ok(offset));
    }
}

crate::for_each_device![
    all_changed_pages_are_logged_and_few_others,
    the_used_ring_is_logged_where_the_front_end_says,
    a_ring_that_starts_late_is_logged,
    a_log_may_start_at_an_offset_in_its_file,
];
