// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A renderer that hangs, or is late.

use std::io;
use std::time::{Duration, Instant};

use stand_in_renderer::FILL;
use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::gpu::{GpuDriver, fenced_command, number};
use vhost_device_tests::process::{PATIENCE, Signal};
use vhost_device_tests::stand_in::StandIn;

use crate::virgl::{CONTEXT, FENCE, context, done_in, in_context, picture, submit};
use crate::{Device, QUIET};

/// More than the time that the program waits for unfinished requests.
const END: Duration = Duration::from_secs(10);

/// Exit handlers of libraries must not run while the renderer works: they would free what it uses.
#[test]
fn sigterm_ends_the_program_in_good_order_while_the_renderer_is_stuck() {
    let renderer = StandIn::new("stuck", &[]).unwrap();
    let mut device = Device::start_configured(&["--virgl"], |command| renderer.configure(command));
    let mut driver = device.connect();
    done_in(&mut driver, CONTEXT, number::CTX_CREATE, &context());
    driver.done(number::CREATE_3D, &picture(1, 64, 32, 0));
    let body = submit(&[FILL, 1, 0]);
    driver.send(&in_context(CONTEXT, number::SUBMIT_3D, &body), 4096);
    let is_stuck = || io::Result::Ok(renderer.calls("submit_cmd") > 0);
    let waited = device.program.wait_until("draw", PATIENCE, is_stuck);
    waited.unwrap();
    let status = device.program.end(Signal::TERM, END).unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
}

/// Makes commands with these fences available in the context, each of another kind: 3D, and 2D that waits for earlier commands. Returns where
/// the responses will be.
fn send_fenced(driver: &mut GpuDriver, fences: std::ops::Range<u64>) -> Vec<(u64, u64)> {
    let memory = driver.front_end.memory().clone();
    let mut responses = Vec::new();
    for fence in fences {
        let mut bytes = match fence % 2 {
            0 => fenced_command(number::GET_DISPLAY_INFO, FENCE, fence, &[]),
            _ => fenced_command(number::SUBMIT_3D, FENCE, fence, &submit(&[FILL, 1, 0])),
        };
        bytes[16..20].copy_from_slice(&CONTEXT.to_le_bytes());
        let [request, response] = [0; 2].map(|_| memory.allocate(512, 16));
        memory.write(request, &bytes);
        driver.control.submit(&[
            Buffer::readable(request, bytes.len() as u32),
            Buffer::writable(response, 512),
        ]);
        responses.push((fence, response));
    }
    responses
}

/// Starts a device with a renderer whose fences are late, and a driver that can draw.
fn late(renderer: &StandIn) -> (Device, GpuDriver) {
    let device = Device::start_configured(&["--virgl", "--headless"], |command| {
        renderer.configure(command);
    });
    let mut driver = device.connect();
    done_in(&mut driver, CONTEXT, number::CTX_CREATE, &context());
    driver.done(number::CREATE_3D, &picture(1, 64, 32, 0));
    (device, driver)
}

fn assert_in_order(driver: &mut GpuDriver, responses: Vec<(u64, u64)>) {
    for (fence, response) in responses {
        assert!(driver.control.wait_used(PATIENCE), "fence {fence}");
        driver.control.take_used().unwrap();
        let memory = driver.front_end.memory();
        assert_eq!(memory.read_u32(response + 4) & FENCE, FENCE);
        assert_eq!(memory.read_u64(response + 8), fence);
    }
}

#[test]
fn late_fences_hold_back_only_fenced_commands_and_return_in_order() {
    let renderer = StandIn::new("late", &[]).unwrap();
    let (_device, mut driver) = late(&renderer);
    let responses = send_fenced(&mut driver, 1..9);
    // Commands without a fence overtake.
    done_in(
        &mut driver,
        CONTEXT,
        number::SUBMIT_3D,
        &submit(&[FILL, 1, 1]),
    );
    driver.unref(1);
    assert!(!driver.control.wait_used(QUIET), "a fence is not done");
    renderer.finish_fences().unwrap();
    assert_in_order(&mut driver, responses);
}

#[test]
fn a_queue_that_stops_waits_a_while_for_late_fences_and_answers_them() {
    let renderer = StandIn::new("late", &[]).unwrap();
    let (device, mut driver) = late(&renderer);
    let responses = send_fenced(&mut driver, 1..9);
    // It has taken them once it has answered this.
    driver.unref(1);
    let start = Instant::now();
    let base = driver.front_end.stop(0).unwrap();
    let taken = start.elapsed();
    assert!(taken > Duration::from_millis(900), "{taken:?}");
    assert!(taken < END, "{taken:?}");
    assert_in_order(&mut driver, responses);
    assert!(
        device
            .program
            .stderr()
            .contains("renderer unresponsive for 1 s")
    );
    // The driver continues, with fences that have completed.
    renderer.finish_fences().unwrap();
    driver.front_end.start(0, &driver.control, base).unwrap();
    driver.done(number::CREATE_3D, &picture(1, 64, 32, 0));
    let responses = send_fenced(&mut driver, 9..13);
    assert_in_order(&mut driver, responses);
}
