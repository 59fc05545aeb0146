// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device with shared memory, for tests ([`vhost_device_tests::shared_memory`]).

use std::process::ExitCode;

use vhost_device_common::program;
use vhost_device_tests::shared_memory::SharedMemory;

fn main() -> ExitCode {
    program::run::<SharedMemory>()
}
