// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device state, and reservations that survive a restart.

use vhost_device_tests::front_end::scsi::{EVENT_QUEUE, EventDriver, GOOD, ScsiDriver};
use vhost_device_tests::process::Signal;

use crate::{Device, FIRST, Host, PATIENCE, SHORT, SIZE, serve};

/// The offset of `cdb_size` in the config space.
const CDB_SIZE: u32 = 24;

/// Stops all queues of a host, and returns its state.
fn save(host: &Host) -> Vec<u8> {
    for queue in 0..3 {
        host.front_end.stop(queue).unwrap();
    }
    host.front_end.save_state().unwrap()
}

#[test]
fn unit_attentions_and_sizes_move_with_the_guest() {
    let source = Host::with_one(&[]);
    let size = 64u32.to_le_bytes();
    source.front_end.set_config(CDB_SIZE, &size).unwrap();
    let state = save(&source);
    let device = Device::with_one(&[]);
    let target = device.connect();
    target.load_state(&state).unwrap();
    assert_eq!(target.config(CDB_SIZE, 4).unwrap(), size);
    let queue = target.queue(2, 256).unwrap();
    let mut driver = ScsiDriver::new(target.memory(), queue, 4096);
    driver.area.cdb_size = 64;
    // The attention of its start is gone, as at the source.
    assert_eq!(driver.command(FIRST, &[0; 6], 0).status, GOOD);
}

#[test]
fn a_guest_that_was_loaded_learns_that_it_may_have_missed_events() {
    const MISSED: u32 = 1 << 31;
    let state = save(&Host::with_one(&[]));
    let device = Device::with_one(&[]);
    let target = device.connect();
    target.load_state(&state).unwrap();
    let queue = target.queue(EVENT_QUEUE, 16).unwrap();
    let mut events = EventDriver::new(target.memory(), queue);
    events.add(2);
    assert_eq!(events.next(PATIENCE), Some((MISSED, [0; 8], 0)));
    assert_eq!(events.next(SHORT), None);
}

#[test]
fn a_state_of_other_disks_is_refused() {
    let state = save(&Host::with_one(&[]));
    let disks: [(&[u8], &str); 1] = [(&[0; SIZE], ",target=4")];
    let device = Device::start(&disks, &[]);
    let target = device.connect();
    assert!(target.load_state(&state).is_err());
}

/// PERSISTENT RESERVE OUT: REGISTER.
pub const REGISTER: [u8; 10] = [0x5f, 0, 0, 0, 0, 0, 0, 0, 24, 0];

/// The parameter list of PERSISTENT RESERVE OUT: the key that the driver has, the one that it gets, and APTPL.
pub fn keys(old: u64, new: u64) -> Vec<u8> {
    let mut list = old.to_be_bytes().to_vec();
    list.extend(new.to_be_bytes());
    list.extend([0, 0, 0, 0, 1, 0, 0, 0]);
    list
}

/// Returns the keys that are registered.
pub fn registered(driver: &mut ScsiDriver) -> Vec<u64> {
    let cdb = [0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    let completion = driver.command(FIRST, &cdb, 256);
    assert_eq!(completion.status, GOOD);
    let length = u32::from_be_bytes(completion.data[4..8].try_into().unwrap()) as usize;
    let keys = completion.data[8..8 + length].chunks(8);
    keys.map(|key| u64::from_be_bytes(key.try_into().unwrap()))
        .collect()
}

#[test]
fn reservations_survive_a_restart_in_their_file() {
    let mut device = Device::with_one(&[]);
    let image = device.path("image0");
    let with = format!(
        "--disk=file={},reservations={}",
        image.display(),
        device.path("reservations").display()
    );
    let without = format!("--disk=file={}", image.display());
    let restart = |device: &mut Device, disk: &String| {
        device.program.end(Signal::TERM, PATIENCE).unwrap();
        device.program = serve(device.directory.path(), std::slice::from_ref(disk));
    };
    restart(&mut device, &with);
    let mut host = Host::new(device);
    host.driver.clear_attentions(FIRST);
    let completion = host.driver.send(FIRST, &REGISTER, &keys(0, 0x1234));
    assert_eq!(completion.status, GOOD, "{completion:?}");
    for (disk, expected) in [(&with, &[0x1234][..]), (&without, &[]), (&with, &[0x1234])] {
        let mut device = host.device;
        restart(&mut device, disk);
        host = Host::new(device);
        host.driver.clear_attentions(FIRST);
        assert_eq!(registered(&mut host.driver), expected, "{disk}");
    }
    // Without a file, nothing is promised that is not kept.
    let mut device = host.device;
    restart(&mut device, &without);
    host = Host::new(device);
    host.driver.clear_attentions(FIRST);
    let completion = host.driver.send(FIRST, &REGISTER, &keys(0, 0x1234));
    assert_ne!(completion.status, GOOD);
    assert!(registered(&mut host.driver).is_empty());
}
