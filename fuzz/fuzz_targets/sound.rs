// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! See `vhost_device_fuzz::sound`.

#![no_main]

use vhost_device_fuzz::sound::Input;

libfuzzer_sys::fuzz_target!(|input: Input| input.run());
