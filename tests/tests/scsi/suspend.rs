// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest migrates without waiting for its disks: requests stay noted in flight, and the next device carries them out.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserProtocolFeatures};
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::scsi::{
    CHECK_CONDITION, OK, READ_16, REQUEST_QUEUE, Request, RequestArea, WRITE_16, transfer,
};
use vhost_device_tests::front_end::{DirtyLog, FrontEnd, GuestMemory, Options};
use vhost_device_tests::process::Signal;

use crate::{Device, FIRST, PATIENCE, SIZE, for_each_engine, noise, serve};

const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
const SKIP_DRAIN: u64 = 1 << 23;
const INFLIGHT: VhostUserProtocolFeatures = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;

/// Requests in flight: writes and reads take turns, and a flush is the last one.
const COUNT: usize = 9;
const PART: usize = 4096;
/// How late operations begin.
const LATE: Duration = Duration::from_millis(1500);

fn connect(device: &Device, memory: &GuestMemory) -> FrontEnd {
    let defaults = Options::default();
    let options = Options {
        protocol_features: defaults.protocol_features | INFLIGHT,
        ..defaults
    };
    let front_end =
        FrontEnd::connect_with_memory(&device.path("socket"), &options, memory.clone()).unwrap();
    let raw = front_end.raw().unwrap();
    let wanted = front_end.protocol_features().bits() | SKIP_DRAIN;
    let request = FrontendReq::SET_PROTOCOL_FEATURES;
    let answer = raw.acknowledged(request, &payload::u64(wanted), &[]);
    assert_eq!(answer.unwrap(), 0);
    front_end
}

fn stop(front_end: &FrontEnd, queue: usize) -> u32 {
    let raw = front_end.raw().unwrap();
    let payload = payload::vring_state(queue as u32, 0);
    let reply = raw.ask(GET_VRING_BASE_SKIP_DRAIN, &payload, &[]).unwrap();
    u32::from_ne_bytes(reply.payload[4..8].try_into().unwrap())
}

/// The same device, or another process on the same image, continues.
fn requests_move(engine: &str, is_other_process: bool) {
    let contents = noise(1, SIZE);
    let mut device = Device::start(&[(&contents, "")], &[engine]);
    let memory = GuestMemory::new(&Options::default().memory);
    let mut front_end = connect(&device, &memory);
    let wanted = VhostUserInflight::new(0, 0, 3, 64);
    let (inflight, file) = front_end.call().get_inflight_fd(&wanted).unwrap();
    let share = |front_end: &FrontEnd| {
        let call = front_end
            .call()
            .set_inflight_fd(&inflight, file.as_raw_fd());
        call.unwrap();
    };
    share(&front_end);
    let mut queue = front_end.queue(REQUEST_QUEUE, 64).unwrap();
    // The unit attention of the start.
    let ready = RequestArea::new(&memory, 4096).prepare(&memory, &Request::default());
    queue.submit(&ready.chain);
    queue.take_used_within(PATIENCE);
    let end = memory.regions().iter();
    let end = end
        .map(|region| region.guest_address() + region.size())
        .max();
    let log = DirtyLog::new(end.unwrap());
    front_end.set_log(&log).unwrap();
    front_end.log_writes(true).unwrap();

    device.set_delay(LATE.as_millis() as u32);
    let mut expected = contents.clone();
    let requests: Vec<_> = (0..COUNT)
        .map(|number| {
            let area = RequestArea::new(&memory, PART as u32);
            let block = (number * PART / 512) as u64;
            let data = [number as u8; PART];
            let (write, read) = (transfer(WRITE_16, block, 8), transfer(READ_16, block, 8));
            let mut request = Request {
                lun: FIRST,
                id: number as u64,
                cdb: &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                ..Request::default()
            };
            if number % 2 == 1 {
                (request.cdb, request.reply_length) = (&read, PART as u32);
            } else if number + 1 < COUNT {
                (request.cdb, request.data) = (&write, &data);
                expected[number * PART..][..PART].copy_from_slice(&data);
            }
            let prepared = area.prepare(&memory, &request);
            (queue.submit(&prepared.chain), prepared)
        })
        .collect();
    std::thread::sleep(LATE / 5);
    let begin = Instant::now();
    let base = stop(&front_end, REQUEST_QUEUE);
    let took = begin.elapsed();
    assert!(took < LATE / 2, "{engine}: it waited for {took:?}");
    assert!(!queue.has_used(), "{engine}: a request is answered");
    let state = front_end.save_state().unwrap();

    device.set_delay(0);
    drop(front_end);
    if is_other_process {
        let arguments = [
            engine.to_owned(),
            format!("--disk=file={}", device.path("image0").display()),
        ];
        device.program.end(Signal::TERM, PATIENCE).unwrap();
        device.program = serve(device.directory.path(), &arguments);
    }
    front_end = connect(&device, &memory);
    front_end.load_state(&state).unwrap();
    share(&front_end);
    front_end.start(REQUEST_QUEUE, &queue, base).unwrap();
    let mut left: Vec<_> = requests.iter().map(|(head, _)| *head).collect();
    while !left.is_empty() {
        let used = queue.take_used_within(PATIENCE);
        let place = left.iter().position(|head| *head == used.head);
        left.remove(place.expect("answered once"));
    }
    for (number, (_, prepared)) in requests.iter().enumerate() {
        let completion = prepared.completion(&memory, 0);
        assert_eq!(completion.response, OK, "{engine}: {number}");
        assert_ne!(
            completion.status, CHECK_CONDITION,
            "{engine}: {completion:?}"
        );
        if number % 2 == 1 {
            assert!(
                completion.data == contents[number * PART..][..PART],
                "{engine}: {number}"
            );
        }
    }
    assert_eq!(front_end.stop(REQUEST_QUEUE).unwrap(), queue.used_base());
    assert!(device.contents(0) == expected, "{engine}");
}

#[test]
fn requests_in_flight_move_to_another_process() {
    for_each_engine(|engine| requests_move(engine, true));
}

#[test]
fn requests_in_flight_go_on_in_the_same_process() {
    for_each_engine(|engine| requests_move(engine, false));
}
