// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-gpu` as a driver and a display meet it.

#[path = "gpu/commands.rs"]
mod commands;
#[path = "gpu/display.rs"]
mod display;
#[path = "gpu/pictures.rs"]
mod pictures;
#[path = "gpu/virgl.rs"]
mod virgl;

use std::time::Duration;

use tempfile::TempDir;
use vhost_device_tests::front_end::gpu::{Answers, Display, GpuDriver, Shown};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{Program, command, option};

/// How long to look for what must not happen.
const QUIET: Duration = Duration::from_millis(50);

/// Blue, green, red, unused; in this order in memory.
const B8G8R8X8: u32 = 2;

/// A running device. Dropping it ends it.
struct Device {
    program: Program,
    directory: TempDir,
}

impl Device {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-gpu").unwrap();
        command.env_remove("RUST_LOG").args(arguments);
        command.arg(option("socket-path", &socket));
        let mut program = Program::spawn(&mut command).unwrap();
        program.wait_for_listener(&socket).unwrap();
        Self { program, directory }
    }

    /// A driver, without a display.
    fn connect(&self) -> GpuDriver {
        let socket = self.directory.path().join("socket");
        GpuDriver::new(FrontEnd::connect(&socket, &Options::default()).unwrap()).unwrap()
    }

    /// A driver, and a display that has been greeted.
    fn connect_with_display(&self, answers: Answers) -> (GpuDriver, Display) {
        let driver = self.connect();
        let (display, socket) = Display::new(answers);
        driver.set_display(&socket).unwrap();
        assert_eq!(display.next(), Shown::Features(1));
        (driver, display)
    }
}

/// Pixels that are all different.
fn pattern(count: u32) -> Vec<u32> {
    (0..count)
        .map(|index| index.wrapping_mul(0x9e37_79b9))
        .collect()
}

/// Pixels as they lie in the memory of a guest that draws in B8G8R8X8.
fn bytes(pixels: &[u32]) -> Vec<u8> {
    pixels
        .iter()
        .flat_map(|pixel| pixel.to_le_bytes())
        .collect()
}
