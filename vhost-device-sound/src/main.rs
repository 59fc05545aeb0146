// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program `vhost-device-sound`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_device_common::program::run::<vhost_device_sound::Sound>()
}
