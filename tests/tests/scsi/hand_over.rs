// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two programs have the same image: the destination of a live migration waits until the source has stopped.

use std::fs;
use std::time::Instant;

use vhost_device_tests::front_end::scsi::{
    GOOD, OK, READ_16, REQUEST_QUEUE, Request, RequestArea, ScsiDriver, transfer,
};
use vhost_device_tests::process::{Program, Signal, command, option};

use crate::state::{REGISTER, keys, registered};
use crate::{Device, FIRST, Host, LARGEST, PATIENCE, SHORT, SIZE, for_each_engine, serve};

#[test]
fn the_destination_of_a_migration_waits_for_the_image() {
    for_each_engine(|engine| {
        let mut source = Host::with_one(&[engine]);
        let image = source.device.path("image0");
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("delay"), "0").unwrap();
        let arguments = [
            engine.to_owned(),
            "--incoming".to_owned(),
            format!("--disk=file={}", image.display()),
        ];
        let destination = Device {
            program: serve(directory.path(), &arguments),
            directory,
        };
        let front_end = destination.connect();
        let memory = front_end.memory().clone();
        let queue = front_end.queue(REQUEST_QUEUE, 256).unwrap();
        let mut driver = ScsiDriver::new(&memory, queue, LARGEST);
        let prepared = driver.area.prepare(&memory, &Request::default());
        driver.queue.submit(&prepared.chain);
        assert!(
            !driver.queue.wait_used(SHORT),
            "{engine}: the source has the image"
        );
        // Stopping does not wait for the image either; the request is carried out after the next start.
        let begin = Instant::now();
        let base = front_end.stop(REQUEST_QUEUE).unwrap();
        assert!(begin.elapsed() < PATIENCE / 2);
        front_end.start(REQUEST_QUEUE, &driver.queue, base).unwrap();

        assert_eq!(source.driver.write(FIRST, 5, &[5; 512]).status, GOOD);
        for queue in 0..3 {
            source.front_end.stop(queue).unwrap();
        }
        driver.queue.take_used_within(PATIENCE);
        let completion = prepared.completion(&memory, 0);
        assert_eq!(completion.response, OK);
        driver.clear_attentions(FIRST);
        assert_eq!(driver.read(FIRST, 5, 1).data, [5; 512]);

        // Now the source waits.
        let queue = source.front_end.queue(REQUEST_QUEUE, 256).unwrap();
        let mut again = ScsiDriver::new(source.front_end.memory(), queue, LARGEST);
        let area = RequestArea::new(source.front_end.memory(), 4096);
        let prepared = area.prepare(
            source.front_end.memory(),
            &Request {
                cdb: &transfer(READ_16, 5, 1),
                reply_length: 512,
                ..Request::default()
            },
        );
        again.queue.submit(&prepared.chain);
        assert!(!again.queue.wait_used(SHORT), "{engine}");
        drop(front_end);
        again.queue.take_used_within(PATIENCE);
    });
}

#[test]
fn a_second_program_without_incoming_is_refused() {
    let first = Device::start(&[(&[0; SIZE], "")], &[]);
    let image = first.path("image0");
    let mut command = command("vhost-device-scsi").unwrap();
    command
        .arg(option("socket-path", first.path("other")))
        .arg(format!("--disk=file={}", image.display()));
    let mut second = Program::spawn(&mut command).unwrap();
    assert_eq!(second.wait(PATIENCE).unwrap().code(), Some(1));
    let log = second.stderr();
    assert!(log.contains("in use by another program"), "{log}");
}

#[test]
fn the_file_of_reservations_is_handed_over_with_the_image() {
    hand_over_reservations(true);
}

#[test]
fn an_empty_file_of_reservations_is_handed_over() {
    hand_over_reservations(false);
}

fn hand_over_reservations(has_some: bool) {
    let mut device = Device::with_one(&[]);
    let disk = format!(
        "--disk=file={},reservations={}",
        device.path("image0").display(),
        device.path("reservations").display()
    );
    device.program.end(Signal::TERM, PATIENCE).unwrap();
    device.program = serve(device.directory.path(), std::slice::from_ref(&disk));
    let mut source = Host::new(device);
    source.driver.clear_attentions(FIRST);
    let key = if has_some { 0x1234 } else { 0 };
    if has_some {
        let completion = source.driver.send(FIRST, &REGISTER, &keys(0, key));
        assert_eq!(completion.status, GOOD, "{completion:?}");
    }

    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("delay"), "0").unwrap();
    let program = serve(directory.path(), &["--incoming".to_owned(), disk]);
    let destination = Device { program, directory };
    let front_end = destination.connect();
    for queue in 0..3 {
        source.front_end.stop(queue).unwrap();
    }
    front_end
        .load_state(&source.front_end.save_state().unwrap())
        .unwrap();
    let queue = front_end.queue(REQUEST_QUEUE, 256).unwrap();
    let mut driver = ScsiDriver::new(front_end.memory(), queue, LARGEST);
    let expected: &[u64] = if has_some { &[key] } else { &[] };
    assert_eq!(registered(&mut driver), expected);
    // It can store others.
    let completion = driver.send(FIRST, &REGISTER, &keys(key, 0x5678));
    assert_eq!(completion.status, GOOD, "{completion:?}");
    assert_eq!(registered(&mut driver), [0x5678]);
}
