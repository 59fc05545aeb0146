// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's choice between write-back and write-through caching (VIRTIO 1.3, 5.2.5): QEMU sends it once, and keeps a copy of the field
//! that it never reads again. So the choice must survive as long as that front-end.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost_device_tests::front_end::block::BlockDriver;
use vhost_device_tests::front_end::{FrontEnd, GuestMemory, Options, Queue};
use vhost_device_tests::process::{Program, Signal};

use crate::config::{set_writeback, writeback};
use crate::durability::unwritten_pages_in;
use crate::{Device, IMAGE_SIZE, PATIENCE, Variant, driver, noise, ok};

/// What happens to the device while its front-end continues.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Killed,
    Disconnected,
}

/// A guest with a disk, which another process may take over. The connection is dropped first.
struct Guest {
    driver: BlockDriver,
    front_end: Option<FrontEnd>,
    device: Device,
    variant: Variant,
    memory: GuestMemory,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Guest {
    fn start(variant: Variant, has_inflight: bool) -> Self {
        let device = variant.start(&vec![0; IMAGE_SIZE], &[]);
        let front_end = device.connect();
        let inflight = has_inflight.then(|| {
            let wanted = VhostUserInflight::new(0, 0, 1, 64);
            let (inflight, file) = front_end.call().get_inflight_fd(&wanted).unwrap();
            let call = front_end
                .call()
                .set_inflight_fd(&inflight, file.as_raw_fd());
            call.unwrap();
            (inflight, file)
        });
        let queue = front_end.queue(0, 64).unwrap();
        Self {
            variant,
            device,
            memory: front_end.memory().clone(),
            driver: BlockDriver::new(front_end.memory(), queue, 1 << 16),
            front_end: Some(front_end),
            inflight,
        }
    }

    fn front_end(&self) -> &FrontEnd {
        self.front_end.as_ref().unwrap()
    }

    fn writeback(&self) -> u64 {
        writeback(self.front_end())
    }

    /// Connects the front-end again, and continues at the position of the ring.
    fn go_on(&mut self, fate: Fate) {
        self.front_end = None;
        if let Fate::Killed = fate {
            self.device.program.end(Signal::KILL, PATIENCE).unwrap();
            let (image, socket) = (&self.device.image, &self.device.socket);
            let mut command = self.variant.command(image, socket, &[]);
            self.device.program = Program::spawn(&mut command).unwrap();
            self.device.program.wait_for_listener(socket).unwrap();
        }
        let (options, memory) = (Options::default(), self.memory.clone());
        let front_end =
            FrontEnd::connect_with_memory(&self.device.socket, &options, memory).unwrap();
        if let Some((inflight, file)) = &self.inflight {
            let call = front_end.call().set_inflight_fd(inflight, file.as_raw_fd());
            call.unwrap();
        }
        let base = self.driver.queue.used_base();
        front_end.start(0, &self.driver.queue, base).unwrap();
        self.front_end = Some(front_end);
    }

    /// Panics unless writes behave as the field says.
    fn assert_write(&mut self) {
        ok(self.driver.write(0, &noise(1, 4096)).unwrap());
        if self.writeback() == 0
            && let Ok(unwritten) = unwritten_pages_in(&self.device.file(), 0..4096)
        {
            assert_eq!(unwritten, 0, "a write was not written through");
        }
    }
}

fn the_caching_mode_survives_a_crash_and_a_lost_connection(variant: Variant) {
    for fate in [Fate::Killed, Fate::Disconnected] {
        for choices in [&[][..], &[0], &[1], &[0, 1], &[1, 0]] {
            let mut guest = Guest::start(variant, true);
            for &choice in choices {
                set_writeback(guest.front_end(), choice);
            }
            let expected = u64::from(choices.last().copied().unwrap_or(1));
            guest.assert_write();
            for _ in 0..2 {
                guest.go_on(fate);
                assert_eq!(guest.writeback(), expected, "{fate:?} after {choices:?}");
                guest.assert_write();
            }
            // And the next one too.
            set_writeback(guest.front_end(), 0);
            guest.go_on(fate);
            assert_eq!(guest.writeback(), 0, "{fate:?} after {choices:?} and 0");
        }
    }
}

/// The choice is unknown, so the safe mode is used.
fn without_a_file_writes_are_written_through_until_the_driver_chooses(variant: Variant) {
    for fate in [Fate::Killed, Fate::Disconnected] {
        let mut guest = Guest::start(variant, false);
        assert_eq!(guest.writeback(), 1);
        guest.assert_write();
        guest.go_on(fate);
        assert_eq!(guest.writeback(), 0, "{fate:?}");
        guest.assert_write();
        set_writeback(guest.front_end(), 1);
        assert_eq!(guest.writeback(), 1, "{fate:?}");
    }
}

/// A ring that is stopped and started, as when a virtual machine is paused, keeps the choice.
fn a_pause_changes_nothing(variant: Variant) {
    let mut guest = Guest::start(variant, false);
    for choice in [None, Some(0), Some(1)] {
        if let Some(choice) = choice {
            set_writeback(guest.front_end(), choice);
        }
        guest.assert_write();
        let base = guest.front_end().stop(0).unwrap();
        guest
            .front_end()
            .start(0, &guest.driver.queue, base)
            .unwrap();
        assert_eq!(guest.writeback(), u64::from(choice.unwrap_or(1)));
    }
}

/// A driver that starts again reads QEMU's copy of the field, which a reset does not change.
fn the_caching_mode_survives_a_reset(variant: Variant) {
    let mut guest = Guest::start(variant, false);
    for choice in [0, 1] {
        set_writeback(guest.front_end(), choice);
        let front_end = guest.front_end();
        front_end.call().reset_device().unwrap();
        front_end.call().set_features(front_end.features()).unwrap();
        assert_eq!(guest.writeback(), u64::from(choice));
        guest.driver = driver(guest.front_end());
        guest.assert_write();
    }
}

/// It may belong to a program of another kind, or be damaged.
fn an_invalid_note_in_the_inflight_file_is_ignored(variant: Variant) {
    use std::os::unix::fs::FileExt;
    for fill in [0x00, 0x01, 0xff] {
        let mut guest = Guest::start(variant, true);
        guest.assert_write();
        let (inflight, file) = guest.inflight.as_ref().unwrap();
        let place = inflight.mmap_size - 64;
        file.write_all_at(&[fill; 64], place).unwrap();
        guest.go_on(Fate::Killed);
        let expected = u64::from(fill == 0);
        assert_eq!(guest.writeback(), expected, "filled with {fill:#x}");
        guest.assert_write();
    }
    // A region without room for it.
    let mut guest = Guest::start(variant, true);
    guest.assert_write();
    guest.inflight.as_mut().unwrap().0.mmap_size -= 64;
    guest.go_on(Fate::Killed);
    assert_eq!(guest.writeback(), 0);
    guest.assert_write();
}

/// For a front-end that starts a guest.
fn a_new_ring_begins_with_write_back(variant: Variant) {
    let mut guest = Guest::start(variant, false);
    set_writeback(guest.front_end(), 0);
    guest.front_end = None;
    let options = Options {
        protocol_features: Options::default().protocol_features
            - VhostUserProtocolFeatures::INFLIGHT_SHMFD,
        ..Options::default()
    };
    let front_end = guest.device.connect_with(options);
    let _queue: Queue = front_end.queue(0, 64).unwrap();
    assert_eq!(writeback(&front_end), 1);
}

crate::for_each_engine!(
    the_caching_mode_survives_a_crash_and_a_lost_connection,
    without_a_file_writes_are_written_through_until_the_driver_chooses,
    a_pause_changes_nothing,
    the_caching_mode_survives_a_reset,
    an_invalid_note_in_the_inflight_file_is_ignored,
    a_new_ring_begins_with_write_back,
);
