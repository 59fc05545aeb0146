// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Logging of the pages that events are written to during a migration.

use vhost_device_tests::front_end::dirty_log::{LOG_ALL, PAGE_SIZE, pages};
use vhost_device_tests::front_end::{DirtyLog, Shadow};

use super::*;

#[test]
fn pages_of_events_are_logged_during_a_migration() {
    let host = Host::new();
    let mut guest = host.guest();
    let memory = guest.front_end().memory().clone();
    assert_ne!(guest.front_end().offered() & LOG_ALL, 0);
    let high = memory.regions().last().unwrap();
    let log = DirtyLog::new(high.guest_address() + high.size());
    let used = guest.events.layout().used;
    guest.front_end().set_log(&log).unwrap();
    guest.front_end().log_writes(true).unwrap();
    let ring = guest.front_end().ring_addresses(&guest.events);
    guest.front_end().log_ring(0, &ring, Some(used)).unwrap();
    // No two buffers share a page. The second one crosses a page boundary.
    let start = memory.allocate(6 * PAGE_SIZE, PAGE_SIZE);
    let places = [start, start + 2 * PAGE_SIZE - 4, start + 5 * PAGE_SIZE + 1];
    let mut shadow = Shadow::new(&memory);
    log.take();
    for place in places {
        guest.give_buffer(Buffer::writable(place, 8));
    }
    host.happen(&[KEY_A, X, REPORT]);
    assert_eq!(
        [guest.take(), guest.take(), guest.take()],
        [KEY_A, X, REPORT]
    );
    guest.front_end().stop(0).unwrap();
    let marked = log.take();
    for place in places {
        assert!(marked.is_superset(&pages(place, 8)), "{marked:?}");
    }
    // What the driver has written.
    let layout = guest.events.layout();
    shadow.copy(&pages(layout.descriptors, u64::from(RING) * 16));
    shadow.copy(&pages(layout.avail, 6 + 2 * u64::from(RING)));
    assert!(!shadow.differences().is_empty());
    shadow.copy(&marked);
    assert!(shadow.differences().is_empty());
}
