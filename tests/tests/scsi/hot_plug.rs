// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that come, go and grow while a driver uses the host.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use serde_json::json;
use vhost_device_tests::front_end::scsi::{
    BAD_TARGET, Event, GOOD, OK, READ_16, Request, RequestArea, address, transfer,
};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::Signal;

use crate::{BLOCKS, Device, FIRST, Host, PATIENCE, SHORT, SIZE, for_each_engine, noise};

const ADDED: u32 = 1;
const REMOVED: u32 = 2;
const TRANSPORT_RESET: u32 = 1;
const PARAM_CHANGE: u32 = 3;
const MISSED: u32 = 1 << 31;

/// The address of a unit in an event.
fn place(target: u8) -> [u8; 8] {
    [1, target, 0, 0, 0, 0, 0, 0]
}

fn event(host: &mut Host) -> Event {
    host.events.next(PATIENCE).expect("an event")
}

/// Adds a disk with these contents.
fn add(device: &Device, name: &str, contents: &[u8], options: &str) -> Result<String, String> {
    fs::write(device.path(name), contents).unwrap();
    let file = format!("--file={}", device.path(name).display());
    device.ctl(&[&file, "add-disk", options])
}

#[test]
fn a_disk_is_added_and_removed_under_the_driver() {
    for_each_engine(|engine| {
        let mut host = Host::with_one(&[engine]);
        host.events.add(4);
        let lun = address(5, 2);
        let contents = noise(3, SIZE);
        add(&host.device, "new", &contents, "target=5,lun=2,serial=NEW").unwrap();
        let added = [1, 5, 0, 2, 0, 0, 0, 0];
        assert_eq!(event(&mut host), (TRANSPORT_RESET, added, ADDED));
        host.driver.clear_attentions(lun);
        assert!(host.driver.read(lun, 0, 64).data == contents[..64 * 512]);
        assert_eq!(host.driver.write(lun, 1, &[9; 512]).status, GOOD);
        // A sync goes another way.
        let completion = host
            .driver
            .command(lun, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0);
        assert_eq!(completion.status, GOOD);
        assert_eq!(
            fs::read(host.device.path("new")).unwrap()[512..1024],
            [9; 512]
        );
        let disks = host.device.execute("query-disks", json!({})).unwrap();
        assert_eq!(disks[1]["target"], 5);
        assert_eq!(disks[1]["serial"], "NEW");

        let arguments = json!({"target": 5, "lun": 2});
        host.device.execute("remove-disk", arguments).unwrap();
        assert_eq!(event(&mut host), (TRANSPORT_RESET, added, REMOVED));
        let completion = host.driver.command(lun, &[0; 6], 0);
        assert_eq!(completion.response, BAD_TARGET);
        // Its image is closed: another program can lock it.
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = add(&host.device, "new", &contents, "target=5") {
            assert!(error.contains("in use"), "{error}");
            assert!(Instant::now() < deadline, "{error}");
        }
    });
}

#[test]
fn requests_in_flight_end_before_a_removed_disk_is_closed() {
    for_each_engine(|engine| {
        let mut host = Host::with_one(&[engine]);
        host.device.set_delay(300);
        let memory = host.front_end.memory().clone();
        let prepared = RequestArea::new(&memory, 4096).prepare(
            &memory,
            &Request {
                cdb: &transfer(READ_16, 0, 8),
                reply_length: 4096,
                ..Request::default()
            },
        );
        host.driver.queue.submit(&prepared.chain);
        std::thread::sleep(SHORT);
        let removed = host.device.execute("remove-disk", json!({"target": 0}));
        removed.unwrap();
        host.driver.queue.take_used_within(PATIENCE);
        let completion = prepared.completion(&memory, 0);
        assert_eq!((completion.response, completion.status), (OK, GOOD));
        assert_eq!(completion.data, [0; 4096]);
        // Its image is closed then, though no other request comes.
        let file = format!("--file={}", host.device.path("image0").display());
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = host.device.ctl(&[&file, "add-disk", "target=1"]) {
            assert!(error.contains("in use"), "{error}");
            assert!(Instant::now() < deadline, "{error}");
        }
    });
}

#[test]
fn a_driver_without_buffers_learns_that_it_missed_events() {
    let mut host = Host::with_one(&[]);
    add(&host.device, "a", &[0; 4096], "target=1").unwrap();
    std::thread::sleep(SHORT);
    host.events.add(2);
    assert_eq!(event(&mut host), (MISSED, [0; 8], 0));
    add(&host.device, "b", &[0; 4096], "target=2").unwrap();
    assert_eq!(event(&mut host), (TRANSPORT_RESET, place(2), ADDED));
    assert_eq!(host.events.next(SHORT), None);
}

#[test]
fn a_driver_gets_no_events_that_it_has_not_accepted() {
    let device = Device::with_one(&[]);
    let defaults = Options::default();
    let options = Options {
        features: defaults.features & !0b110,
        ..defaults
    };
    let front_end = FrontEnd::connect(&device.path("socket"), &options).unwrap();
    let queue = front_end.queue(1, 16).unwrap();
    let mut events =
        vhost_device_tests::front_end::scsi::EventDriver::new(front_end.memory(), queue);
    events.add(2);
    add(&device, "a", &[0; 4096], "target=1").unwrap();
    assert_eq!(events.next(SHORT), None);
}

#[test]
fn a_disk_that_grows_is_announced() {
    for_each_engine(|engine| {
        let mut host = Host::with_one(&[engine]);
        host.events.add(4);
        let capacity = |host: &mut Host| {
            let mut cdb = [0; 16];
            (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
            let data = host.driver.command(FIRST, &cdb, 32).data;
            u64::from_be_bytes(data[..8].try_into().unwrap()) + 1
        };
        assert_eq!(capacity(&mut host), BLOCKS);
        let image = File::options()
            .write(true)
            .open(host.device.path("image0"))
            .unwrap();
        image.set_len(2 * SIZE as u64).unwrap();
        host.device.program.signal(Signal::HUP).unwrap();
        let begin = Instant::now();
        let changed = (PARAM_CHANGE, place(0), 0x092a);
        assert_eq!(event(&mut host), changed, "{engine}");
        assert!(begin.elapsed() < Duration::from_secs(1));
        let completion = host.driver.command(FIRST, &[0; 6], 0);
        assert_eq!(completion.sense_codes(), (6, 0x2a, 9));
        assert_eq!(capacity(&mut host), 2 * BLOCKS);
        assert_eq!(host.driver.read(FIRST, 2 * BLOCKS - 1, 1).status, GOOD);

        let arguments = json!({"target": 0, "size": 4 * SIZE});
        let disk = host.device.execute("resize-disk", arguments).unwrap();
        assert_eq!(disk["size"], 4 * SIZE);
        assert_eq!(event(&mut host), changed);
        assert_eq!(image.metadata().unwrap().len(), 4 * SIZE as u64);
        assert_eq!(host.driver.command(FIRST, &[0; 6], 0).sense_codes().0, 6);
        assert_eq!(capacity(&mut host), 4 * BLOCKS);
    });
}

#[test]
fn commands_that_cannot_be_executed_say_why() {
    let host = Host::with_one(&[]);
    let device = &host.device;
    let fails = |name: &str, arguments, word: &str| {
        let error = device.execute(name, arguments).unwrap_err();
        assert!(error.contains(word), "{error}");
    };
    fails("add-disk", json!({"options": "target=1"}), "--file");
    fails(
        "add-disk",
        json!({"options": "file=/etc/passwd"}),
        "by name",
    );
    fails("add-disk", json!({"options": "colour=1"}), "colour");
    fails("remove-disk", json!({"target": 9}), "no disk");
    fails("remove-disk", json!({"target": 256}), "0 to 255");
    fails("remove-disk", json!({"target": 0, "lun": 16384}), "16383");
    fails(
        "resize-disk",
        json!({"target": 0, "size": 512}),
        "cannot shrink",
    );
    let error = add(device, "same", &[0; 4096], "target=0").unwrap_err();
    assert!(error.contains("target 0 lun 0 has a disk"), "{error}");
    let error = add(device, "small", &[0; 100], "target=1").unwrap_err();
    assert!(error.contains("smaller than one logical block"), "{error}");
    // An image that this program has already.
    let file = format!("--file={}", device.path("image0").display());
    let error = device.ctl(&[&file, "add-disk", "target=1"]).unwrap_err();
    assert!(error.contains("in use"), "{error}");
}

#[test]
fn a_target_full_of_units_can_be_added_and_removed() {
    let mut host = Host::with_one(&[]);
    host.events.add(64);
    for lun in 0..30u16 {
        let name = format!("disk{lun}");
        add(
            &host.device,
            &name,
            &[lun as u8; 4096],
            &format!("target=1,lun={lun}"),
        )
        .unwrap();
        let (kind, _, reason) = event(&mut host);
        assert_eq!((kind, reason), (TRANSPORT_RESET, ADDED));
    }
    for lun in 0..30u16 {
        let lun_field = address(1, lun);
        host.driver.clear_attentions(lun_field);
        assert_eq!(host.driver.read(lun_field, 0, 1).data, [lun as u8; 512]);
    }
    for lun in 0..30u16 {
        let arguments = json!({"target": 1, "lun": lun});
        host.device.execute("remove-disk", arguments).unwrap();
    }
    let completion = host.driver.command(address(1, 0), &[0; 6], 0);
    assert_eq!(completion.response, BAD_TARGET);
}
