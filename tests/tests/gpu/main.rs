// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-gpu` as a driver and a display see it.

#![cfg(test)]

mod answers;
mod backing;
mod bounds;
mod commands;
mod cursor;
mod display;
mod dmabuf;
mod framing;
mod fuzz;
mod pictures;
mod scanouts;
mod start;
mod state;
mod stuck;
mod unanswered;
mod virgl;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::gpu::{Answers, Display, GpuDriver, words};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{PATIENCE, Program, command, option};

/// How long to watch for something that must not happen.
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
        Self::start_configured(arguments, |_| {})
    }

    /// Starts it with a changed command.
    fn start_configured(arguments: &[&str], configure: impl FnOnce(&mut Command)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-gpu").unwrap();
        command.env_remove("RUST_LOG").args(arguments);
        command.arg(option("socket-path", &socket));
        configure(&mut command);
        let mut program = Program::serve(&mut command, &socket).unwrap();
        // The 3D libraries keep some resources.
        if !arguments.contains(&"--virgl") {
            program.expect_no_leak().unwrap();
        }
        Self { program, directory }
    }

    /// Connects a driver, without a display.
    fn connect(&self) -> GpuDriver {
        self.connect_with(&Options::default())
    }

    /// Connects a driver with other options.
    fn connect_with(&self, options: &Options) -> GpuDriver {
        let socket = self.directory.path().join("socket");
        GpuDriver::new(FrontEnd::connect(&socket, options).unwrap()).unwrap()
    }

    /// Connects a driver, and a display that has completed the handshake.
    fn connect_with_display(&self, answers: Answers) -> (GpuDriver, Display) {
        let driver = self.connect();
        let display = driver.connect_display(answers);
        (driver, display)
    }
}

/// Passes a display, or another file, and waits until the device has it.
fn pass_display(driver: &GpuDriver, file: BorrowedFd<'_>) {
    let raw = driver.front_end.raw().unwrap();
    let refused = raw.acknowledged(FrontendReq::GPU_SET_SOCKET, &[], &[file]);
    assert_eq!(refused.unwrap(), 0);
}

/// A display that only does what a test tells it to. Dropping it closes it.
struct ManualDisplay(UnixStream);

impl ManualDisplay {
    /// Passes a new display to the device, and waits until the device has it.
    fn connect(driver: &GpuDriver) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        pass_display(driver, theirs.as_fd());
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(ours)
    }

    /// Does the same, and negotiates the protocol features.
    fn greeted(driver: &GpuDriver, features: u64) -> Self {
        let mut display = Self::connect(driver);
        display.greet(features);
        display
    }

    /// Does the same, and shows resource 1, which is created with this size.
    fn showing(driver: &mut GpuDriver, width: u32, height: u32) -> Self {
        let mut display = Self::greeted(driver, 3);
        driver.create(1, B8G8R8X8, width, height);
        driver.set_scanout(0, 1, [0, 0, width, height]);
        assert_eq!(display.receive(), (7, words(&[0, width, height])));
        display
    }

    fn greet(&mut self, features: u64) {
        self.is_greeted();
        self.answer(1, &features.to_ne_bytes());
        self.answer(3, &[0; 408]);
        assert_eq!(self.receive(), (2, (features & 3).to_ne_bytes().to_vec()));
    }

    /// Receives the requests of the handshake: for its features, and for its modes.
    fn is_greeted(&mut self) {
        assert_eq!(self.receive(), (1, Vec::new()));
        assert_eq!(self.receive(), (3, Vec::new()));
    }

    /// Receives a request for an EDID, and one that every display answers.
    fn is_asked_for_edid(&mut self, scanout: u32) {
        assert_eq!(self.receive(), (11, words(&[scanout])));
        assert_eq!(self.receive(), (3, Vec::new()));
    }

    /// Receives the next request, and its payload.
    fn receive(&mut self) -> (u32, Vec<u8>) {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap()));
        assert_eq!(flags, 0, "flags of request {request}");
        let mut payload = vec![0; size as usize];
        self.0.read_exact(&mut payload).unwrap();
        (request, payload)
    }

    fn answer(&mut self, request: u32, payload: &[u8]) {
        let header = words(&[request, 4, payload.len() as u32]);
        self.0.write_all(&[&header, payload].concat()).unwrap();
    }

    /// Returns the number of bytes that the display receives until nothing more arrives. The device keeps the socket open.
    fn told_until_silent(&mut self) -> usize {
        let mut told = Vec::new();
        self.0.set_read_timeout(Some(QUIET)).unwrap();
        let silent = self.0.read_to_end(&mut told);
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let silent = silent.expect_err("the device has closed its end");
        assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock);
        told.len()
    }

    /// Reads the remaining bytes, until the device closes its end.
    fn wait_until_closed(mut self) {
        if let Err(error) = std::io::copy(&mut self.0, &mut std::io::sink()) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
}

/// Resets the device (RESET_DEVICE).
fn reset(driver: &GpuDriver) {
    let raw = driver.front_end.raw().unwrap();
    let refused = raw.acknowledged(FrontendReq::RESET_DEVICE, &[], &[]);
    assert_eq!(refused.unwrap(), 0);
}

/// Returns pixels that are all different.
fn pattern(count: u32) -> Vec<u32> {
    (0..count)
        .map(|index| index.wrapping_mul(0x9e37_79b9))
        .collect()
}

/// Returns pixels as they are stored in the memory of a guest that draws in B8G8R8X8.
fn bytes(pixels: &[u32]) -> Vec<u8> {
    pixels
        .iter()
        .flat_map(|pixel| pixel.to_le_bytes())
        .collect()
}
