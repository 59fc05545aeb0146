// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests whether the renderer can draw on this host. Where a driver is not allowed to create executable memory, it
//! aborts when it first draws, so the test runs in a process of its own when the program starts.

use std::fs::File;
use std::panic::catch_unwind;
use std::path::Path;

use rustix::process::{Pid, Resource, Rlimit, WaitOptions, setrlimit, waitpid};
use vhost_device_common::program::forked;

use super::error::VirglError;
use super::renderer::Renderer;
use crate::protocol::{CommandError, Create2d, Create3d};
use crate::rectangle::Rectangle;

/// Exit statuses of the process.
const DRAWN: i32 = 0;
const NO_RENDERER: i32 = 1;
const WRONG_PIXELS: i32 = 2;
/// `VIRGL_FORMAT_B8G8R8A8_UNORM`, `VIRGL_BIND_RENDER_TARGET` and `VIRGL_BIND_SAMPLER_VIEW`.
const FORMAT: u32 = 1;
const BIND: u32 = 1 << 1 | 1 << 3;
/// IDs of the objects.
const CONTEXT: u32 = 1;
const SOURCE: u32 = 1;
const TARGET: u32 = 2;
const SURFACE: u32 = 3;
/// Width and height of the two images. They differ, because otherwise a blit would only be a copy.
const SMALL: u32 = 8;
const LARGE: u32 = 32;
/// The colour of the test image: red and blue.
const PIXEL: u32 = 0xffff_00ff;

/// Draws a test image in a new process. Returns false if no renderer starts. The process must have only one thread.
///
/// # Errors
/// The renderer starts but cannot draw, or the process cannot be created.
pub fn test_draw(node: Option<&Path>) -> Result<bool, VirglError> {
    let system = |error: std::io::Error| VirglError::System(error.kind());
    // SAFETY: no other thread exists that could hold a lock, and the child never returns.
    let child = match unsafe { libc::fork() } {
        0 => {
            forked();
            let status = catch_unwind(|| run_test(node)).unwrap_or(WRONG_PIXELS);
            // SAFETY: the child must not run the exit handlers of the parent.
            unsafe { libc::_exit(status) }
        }
        pid => Pid::from_raw(pid).filter(|_| pid > 0),
    };
    let child = child.ok_or_else(|| system(std::io::Error::last_os_error()))?;
    let status = loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => break status,
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(system(errno.into())),
        }
    };
    match (status.exit_status(), status.terminating_signal()) {
        (Some(DRAWN), _) => Ok(true),
        (Some(NO_RENDERER), _) => Ok(false),
        (_, Some(signal)) => Err(VirglError::Killed(signal)),
        _ => Err(VirglError::WrongPixels),
    }
}

/// Draws the test image, and returns the exit status.
fn run_test(node: Option<&Path>) -> i32 {
    if !log::log_enabled!(log::Level::Debug)
        && let Ok(null) = File::options().write(true).open("/dev/null")
    {
        // The program reports the error in one line.
        let _ = rustix::stdio::dup2_stderr(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    // A crash here is an expected result. A limit of 1 byte prevents core files, and core handlers ignore the crash
    // (core(5)).
    let limit = Rlimit {
        current: Some(1),
        maximum: Some(1),
    };
    let _ = setrlimit(Resource::Core, limit);
    let Ok(mut renderer) = Renderer::new(node) else {
        return NO_RENDERER;
    };
    let status = match draw_test_image(&mut renderer) {
        Ok(pixels) if pixels.iter().all(|pixel| *pixel == PIXEL) => DRAWN,
        _ => WRONG_PIXELS,
    };
    // The process is about to exit.
    std::mem::forget(renderer);
    status
}

/// Clears a small image and blits it to a larger one, which requires shaders. Returns the pixels of the larger one.
fn draw_test_image(renderer: &mut Renderer) -> Result<Vec<u32>, CommandError> {
    renderer.create_context(CONTEXT, b"probe")?;
    for (id, side) in [(SOURCE, SMALL), (TARGET, LARGE)] {
        let image = Create2d {
            resource: id.into(),
            format: FORMAT.into(),
            width: side.into(),
            height: side.into(),
        };
        renderer.create_resource(&Create3d::image(&image, BIND))?;
        renderer.attach_to_context(CONTEXT, id)?;
    }
    renderer.submit(CONTEXT, &mut commands())?;
    let all = Rectangle::new(0, 0, LARGE, LARGE).ok_or(CommandError::InvalidParameter)?;
    let mut pixels = vec![0; (LARGE * LARGE) as usize];
    renderer.read_pixels(TARGET, &all, LARGE, &mut pixels)?;
    Ok(pixels)
}

/// Returns the commands for this (virgl_protocol.h of virglrenderer). Each starts with a header of command, object type
/// and length in words.
fn commands() -> Vec<u32> {
    let head = |command: u32, object: u32, length: u32| command | object << 8 | length << 16;
    let surface = [head(1, 8, 5), SURFACE, SOURCE, FORMAT, 0, 0];
    let frame_buffer = [head(5, 0, 3), 1, 0, SURFACE];
    let (one, zero) = (1f32.to_bits(), 0f32.to_bits());
    let clear = [head(7, 0, 8), 1 << 2, one, zero, one, one, 0, 0, 0];
    let all = |resource: u32, side: u32| [resource, 0, FORMAT, 0, 0, 0, side, side, 1];
    // The mask is red, green, blue and alpha. No filter, no scissor.
    let blit = [head(16, 0, 21), 0xf, 0, 0];
    let (target, source) = (all(TARGET, LARGE), all(SOURCE, SMALL));
    [&surface[..], &frame_buffer, &clear, &blit, &target, &source].concat()
}
