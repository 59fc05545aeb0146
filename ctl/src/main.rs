// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program `vhost-device-ctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_device_ctl::run()
}
