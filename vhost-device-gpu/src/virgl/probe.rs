// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the renderer can draw on this host. Where the driver may not make the code that it draws with, it ends the process at the first
//! picture: so that is tried in a process of its own, when the program starts.

use std::fs::File;
use std::panic::catch_unwind;
use std::path::Path;

use rustix::process::{Pid, Resource, Rlimit, WaitOptions, setrlimit, waitpid};
use vhost_device_common::program::forked;
use virtio_bindings::virtio_gpu::VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP;

use super::error::VirglError;
use super::renderer::Renderer;
use crate::protocol::{CommandError, Create3d};
use crate::rectangle::Rectangle;

/// Exit statuses of the process.
const DRAWN: i32 = 0;
const NO_RENDERER: i32 = 1;
const WRONG_PIXELS: i32 = 2;
/// `VIRGL_FORMAT_B8G8R8A8_UNORM`, `PIPE_TEXTURE_2D`, `VIRGL_BIND_RENDER_TARGET` and `VIRGL_BIND_SAMPLER_VIEW`.
const FORMAT: u32 = 1;
const PIPE_TEXTURE_2D: u32 = 2;
const BIND: u32 = 1 << 1 | 1 << 3;
/// Numbers of what is made.
const CONTEXT: u32 = 1;
const SOURCE: u32 = 1;
const TARGET: u32 = 2;
const SURFACE: u32 = 3;
/// Width and height of the two pictures. They differ, as else one would only be copied.
const SMALL: u32 = 8;
const LARGE: u32 = 32;
/// What is drawn: red and blue.
const PIXEL: u32 = 0xffff_00ff;

/// Has a new process draw. Returns whether it did, or found no renderer at all. To be called while the process has one thread.
///
/// # Errors
/// There is a renderer, and it cannot draw.
pub fn test_draw(node: Option<&Path>) -> Result<bool, VirglError> {
    let system = |error: std::io::Error| VirglError::System(error.kind());
    // SAFETY: there is no other thread that could hold a lock, and the child returns to nobody: it ends here.
    let child = match unsafe { libc::fork() } {
        0 => {
            forked();
            let status = catch_unwind(|| run_test(node)).unwrap_or(WRONG_PIXELS);
            // SAFETY: nothing of the parent's is to be ended in order.
            unsafe { libc::_exit(status) }
        }
        id => Pid::from_raw(id).filter(|_| id > 0),
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

/// Draws, and gives the exit status that says how that went.
fn run_test(node: Option<&Path>) -> i32 {
    if !log::log_enabled!(log::Level::Debug)
        && let Ok(null) = File::options().write(true).open("/dev/null")
    {
        // The program says in one line what is wrong.
        let _ = rustix::stdio::dup2_stderr(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    // What ends here is no fault of the program that anyone would look into. No core file is that small, and no program takes it for one
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
    // It ends with the process.
    std::mem::forget(renderer);
    status
}

/// Fills a small picture, and draws it larger in another one, for which shaders are needed. Gives the pixels of that.
fn draw_test_image(renderer: &mut Renderer) -> Result<Vec<u32>, CommandError> {
    renderer.create_context(CONTEXT, b"probe")?;
    for (id, side) in [(SOURCE, SMALL), (TARGET, LARGE)] {
        renderer.create_resource(&Create3d {
            resource: id.into(),
            target: PIPE_TEXTURE_2D.into(),
            format: FORMAT.into(),
            bind: BIND.into(),
            width: side.into(),
            height: side.into(),
            depth: 1.into(),
            array_size: 1.into(),
            flags: VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP.into(),
            ..Create3d::default()
        })?;
        renderer.attach_to_context(CONTEXT, id)?;
    }
    renderer.submit(CONTEXT, &mut commands())?;
    let all = Rectangle::new(0, 0, LARGE, LARGE).ok_or(CommandError::InvalidParameter)?;
    let mut pixels = vec![0; (LARGE * LARGE) as usize];
    renderer.read_pixels(TARGET, &all, LARGE, &mut pixels)?;
    Ok(pixels)
}

/// The commands that do so (virgl_protocol.h of virglrenderer): a head of command, kind of object and length, then as many words.
fn commands() -> Vec<u32> {
    let head = |command: u32, object: u32, length: u32| command | object << 8 | length << 16;
    let surface = [head(1, 8, 5), SURFACE, SOURCE, FORMAT, 0, 0];
    let frame_buffer = [head(5, 0, 3), 1, 0, SURFACE];
    let (one, zero) = (1f32.to_bits(), 0f32.to_bits());
    let clear = [head(7, 0, 8), 1 << 2, one, zero, one, one, 0, 0, 0];
    let all = |resource: u32, side: u32| [resource, 0, FORMAT, 0, 0, 0, side, side, 1];
    // All of red, green, blue and alpha; no filter, and no scissor.
    let blit = [head(16, 0, 21), 0xf, 0, 0];
    let (target, source) = (all(TARGET, LARGE), all(SOURCE, SMALL));
    [&surface[..], &frame_buffer, &clear, &blit, &target, &source].concat()
}
