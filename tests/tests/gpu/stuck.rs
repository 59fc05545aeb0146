// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A renderer that does not come back.

use std::io;
use std::time::Duration;

use stand_in_renderer::FILL;
use vhost_device_tests::front_end::gpu::number;
use vhost_device_tests::process::{PATIENCE, Signal};
use vhost_device_tests::stand_in::StandIn;

use crate::Device;
use crate::virgl::{CONTEXT, context, done_in, in_context, picture, submit};

/// More than the program waits for requests that do not finish.
const END: Duration = Duration::from_secs(10);

/// Exit handlers of libraries may not run while the renderer works: they take away what it uses.
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
