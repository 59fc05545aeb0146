// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Migrations with requests in flight: the log is switched on, replaced, and switched off, and the driver does not notice.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use vhost_device_tests::front_end::Shadow;
use vhost_device_tests::front_end::dirty_log::Pages;
use vhost_device_tests::target::Target;

use crate::{DirtyLog, PATIENCE, Ring, Scene, USUAL, new_log};

/// Requests in flight on each ring.
const DEPTH: usize = 32;
/// Requests answered between two steps of a migration.
const STEP: u64 = 100;
/// Rounds in which pages are copied while the guest runs.
const ROUNDS: usize = 4;
const MIGRATIONS: usize = 6;

/// A guest that sends requests until it is stopped.
struct Guest<'a> {
    rings: Mutex<Vec<Ring<'a>>>,
    /// Pages that the driver wrote to in the device's region.
    dirty: Mutex<Pages>,
    answered: AtomicU64,
    /// Another thread wants the rings.
    paused: AtomicBool,
    ended: AtomicBool,
}

impl<'a> Guest<'a> {
    fn run(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            if self.paused.load(Ordering::Relaxed) {
                std::thread::yield_now();
                continue;
            }
            for ring in &mut *self.rings.lock().unwrap() {
                let added: Pages = std::iter::from_fn(|| ring.add_over(false))
                    .flatten()
                    .collect();
                ring.publish();
                self.dirty.lock().unwrap().extend(added);
                self.answered.fetch_add(ring.take(), Ordering::Relaxed);
            }
        }
    }

    /// Pauses the guest until the result is dropped.
    fn pause(&self) -> Paused<'_, 'a> {
        self.paused.store(true, Ordering::Relaxed);
        Paused {
            paused: &self.paused,
            rings: self.rings.lock().unwrap(),
        }
    }

    /// Waits until some more requests are answered.
    fn wait(&self) {
        let enough = self.answered.load(Ordering::Relaxed) + STEP;
        let deadline = Instant::now() + PATIENCE;
        while self.answered.load(Ordering::Relaxed) < enough {
            assert!(Instant::now() < deadline, "requests are not answered");
            std::thread::yield_now();
        }
    }

    fn take_dirty(&self) -> Pages {
        std::mem::take(&mut self.dirty.lock().unwrap())
    }
}

struct Paused<'a, 'b> {
    paused: &'a AtomicBool,
    rings: MutexGuard<'a, Vec<Ring<'b>>>,
}

impl Drop for Paused<'_, '_> {
    fn drop(&mut self) {
        self.paused.store(false, Ordering::Relaxed);
    }
}

/// Ends the guest, also when a test fails.
struct End<'a, 'b>(&'a Guest<'b>);

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
    }
}

/// Switches logging of all rings on or off, while the guest runs.
fn log_rings(scene: &Scene, guest: &Guest, on: bool) {
    let rings = guest.rings.lock().unwrap();
    let places: Vec<_> = rings
        .iter()
        .map(|ring| (ring.addresses, ring.queue.layout().used))
        .collect();
    drop(rings);
    for (index, (addresses, used)) in places.iter().enumerate() {
        scene
            .front_end
            .log_ring(index, addresses, on.then_some(*used))
            .unwrap();
    }
}

/// Copies pages in rounds while the guest runs; each second time a new log replaces the old one. Returns the last log, and those before it.
fn copy_while_running(
    scene: &Scene,
    guest: &Guest,
    mut log: DirtyLog,
    shadow: &mut Shadow,
) -> (DirtyLog, Vec<DirtyLog>) {
    let mut old = Vec::new();
    for round in 0..ROUNDS {
        guest.wait();
        if round % 2 == 1 {
            let new = new_log();
            scene.front_end.set_log(&new).unwrap();
            old.push(std::mem::replace(&mut log, new));
        }
        let marked = old.last().filter(|_| round % 2 == 1).unwrap_or(&log).take();
        shadow.copy(&(&marked | &guest.take_dirty()));
    }
    (log, old)
}

fn a_working_guest_arrives_complete(target: &dyn Target) {
    let running = target.start();
    let scene = Scene::new(&running, USUAL);
    let rings = (0..scene.queues(target)).map(|index| {
        let mut ring = scene.ring(target);
        ring.make_room(&scene, DEPTH);
        let start = ring.queue.options().start();
        scene.front_end.start(index, &ring.queue, start).unwrap();
        ring
    });
    let guest = Guest {
        rings: Mutex::new(rings.collect()),
        dirty: Mutex::default(),
        answered: AtomicU64::new(0),
        paused: AtomicBool::new(false),
        ended: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| guest.run());
        let _end = End(&guest);
        for number in 0..MIGRATIONS {
            guest.wait();
            let log = new_log();
            if number % 3 == 2 {
                scene.front_end.log_writes(true).unwrap();
                scene.front_end.set_log(&log).unwrap();
            } else {
                scene.front_end.set_log(&log).unwrap();
                scene.front_end.log_writes(true).unwrap();
            }
            log_rings(&scene, &guest, true);
            guest.take_dirty();
            let mut shadow = Shadow::new(&scene.high);
            let (log, old) = copy_while_running(&scene, &guest, log, &mut shadow);
            if number % 2 == 0 {
                arrive(&scene, &guest, &log, shadow);
            } else {
                // The migration is cancelled, and the guest continues here.
                scene.front_end.log_writes(false).unwrap();
                log_rings(&scene, &guest, false);
            }
            log.take();
            guest.wait();
            assert!(log.take().is_empty(), "logged while logging is off");
            assert!(
                old.iter().all(|log| log.take().is_empty()),
                "logged in a log that was replaced"
            );
        }
    });
}

/// Stops the guest, copies the last pages, and continues here without logging.
fn arrive(scene: &Scene, guest: &Guest, log: &DirtyLog, mut shadow: Shadow) {
    let paused = guest.pause();
    let bases: Vec<u32> = (0..paused.rings.len())
        .map(|index| scene.front_end.stop(index).unwrap())
        .collect();
    let last = &log.take() | &guest.take_dirty();
    shadow.copy(&last);
    let missing = shadow.differences();
    assert!(missing.is_empty(), "missing pages: {missing:x?}");
    scene.front_end.log_writes(false).unwrap();
    for (index, (ring, base)) in paused.rings.iter().zip(bases).enumerate() {
        scene.front_end.start(index, &ring.queue, base).unwrap();
    }
}

crate::for_each_device![a_working_guest_arrives_complete];
