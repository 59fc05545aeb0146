// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stand-in for libvirglrenderer. It has the functions that `vhost-device-gpu` calls, and keeps each texture in a memfd, whose file it
//! returns in place of a dma-buf. It can draw only one colour.
//!
//! `STAND_IN` is a comma-separated list of settings: names of functions that fail, or words of `Settings`. Each call since the last start is
//! written as a line to the file that `STAND_IN_LOG` names.

#![allow(
    unsafe_code,
    clippy::missing_safety_doc,
    reason = "the functions are those of virglrenderer.h"
)]

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use libc::{EINVAL, iovec};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// A command of SUBMIT_3D, followed by the number of a resource and a pixel: fills the resource with that pixel.
pub const FILL: u32 = 0x5a;
/// Row stride of textures: a multiple of this many bytes.
pub const ROW: u32 = 256;
/// The modifier of all texture formats unless `modifier=` is given.
pub const MODIFIER: u64 = 0x0100_0000_0000_0002;

/// `struct virgl_renderer_callbacks`, as far as needed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Callbacks {
    version: c_int,
    write_fence: extern "C" fn(*mut c_void, u32),
}

/// `struct virgl_renderer_resource_create_args`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Arguments {
    handle: u32,
    target: u32,
    format: u32,
    bind: u32,
    width: u32,
    height: u32,
    more: [u32; 4],
    flags: u32,
}

/// `struct virgl_box`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Part {
    x: u32,
    y: u32,
    z: u32,
    width: u32,
    height: u32,
    depth: u32,
}

/// `struct virgl_renderer_resource_info`.
#[repr(C)]
pub struct Info {
    handle: u32,
    format: u32,
    width: u32,
    height: u32,
    depth: u32,
    flags: u32,
    texture: u32,
    stride: u32,
    fourcc: u32,
}

/// `struct virgl_renderer_resource_info_ext`.
#[repr(C)]
pub struct InfoExt {
    version: c_int,
    base: Info,
    fd: c_int,
    has_dmabuf_export: bool,
    planes: c_int,
    modifier: u64,
}

/// The settings.
struct Settings {
    fails: Vec<String>,
    /// `planes=`: planes of each texture.
    planes: usize,
    /// `offset=`: where the pixels start in a buffer.
    offset: c_int,
    /// `fourcc=`: the format code of all formats.
    fourcc: Option<u32>,
    /// `modifier=`: the modifier of all formats.
    modifier: u64,
    /// `unshared`: textures cannot be shared, as `virgl_renderer_resource_get_info_ext` reports.
    is_shared: bool,
    /// `missing`: the function that returns a file returns none.
    has_files: bool,
    /// `late`: fences complete only once a file `done` exists beside the log.
    is_late: bool,
    /// `afterwards`: functions fail only after a first start, during which the program found that it can draw.
    fails_afterwards: bool,
    /// `blank`: nothing that is drawn becomes visible.
    is_blank: bool,
    /// `stuck`: commands never return, and exit handlers must not run: Mesa's handlers would free what commands use.
    is_stuck: bool,
    log: Option<Mutex<File>>,
}

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let mut settings = Settings {
        fails: Vec::new(),
        planes: 1,
        offset: 0,
        fourcc: None,
        modifier: MODIFIER,
        is_shared: true,
        has_files: true,
        is_late: false,
        fails_afterwards: false,
        is_blank: false,
        is_stuck: false,
        log: std::env::var_os("STAND_IN_LOG").and_then(|path| {
            let file = File::options().create(true).append(true).open(path);
            file.ok().map(Mutex::new)
        }),
    };
    for word in std::env::var("STAND_IN").unwrap_or_default().split(',') {
        let number = |value: &str| value.parse().unwrap_or(0);
        match word.split_once('=') {
            Some(("planes", value)) => settings.planes = number(value) as usize,
            Some(("offset", value)) => settings.offset = number(value) as c_int,
            Some(("fourcc", value)) => settings.fourcc = Some(number(value) as u32),
            Some(("modifier", value)) => settings.modifier = number(value),
            _ => match word {
                "unshared" => settings.is_shared = false,
                "missing" => settings.has_files = false,
                "late" => settings.is_late = true,
                "afterwards" => settings.fails_afterwards = true,
                "blank" => settings.is_blank = true,
                "stuck" => settings.is_stuck = true,
                name => settings.fails.push(name.to_owned()),
            },
        }
    }
    settings
});

/// Returns whether no file of this name exists beside the log.
fn is_before(name: &str) -> bool {
    let log = std::env::var_os("STAND_IN_LOG").map(PathBuf::from);
    !log.is_some_and(|log| log.with_file_name(name).exists())
}

/// How often this process has started the renderer.
static STARTS: AtomicU32 = AtomicU32::new(0);

/// Writes to the log, and returns whether the call is to fail.
fn called(name: &str, number: u32) -> bool {
    if let Some(log) = &SETTINGS.log {
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = log.write_all(format!("{name} {number}\n").as_bytes());
    }
    let may_fail = !SETTINGS.fails_afterwards || STARTS.load(Ordering::Relaxed) > 1;
    may_fail && SETTINGS.fails.iter().any(|failing| failing == name)
}

struct Texture {
    file: File,
    arguments: Arguments,
    /// Where the iovecs of the caller are, and how many.
    attached: Option<(usize, usize)>,
}

impl Texture {
    fn new(arguments: Arguments) -> Option<Self> {
        let file = memfd_create("texture", MemfdFlags::CLOEXEC).ok()?;
        let stride = u64::from(stride(&arguments));
        ftruncate(&file, stride * u64::from(arguments.height)).ok()?;
        Some(Self {
            file: file.into(),
            arguments,
            attached: None,
        })
    }
}

fn stride(arguments: &Arguments) -> u32 {
    (arguments.width * 4).next_multiple_of(ROW)
}

#[derive(Default)]
struct Renderer {
    caller: Option<(usize, Callbacks)>,
    contexts: Vec<u32>,
    textures: HashMap<u32, Texture>,
    fence: u32,
}

static RENDERER: LazyLock<Mutex<Renderer>> = LazyLock::new(Mutex::default);

fn renderer() -> MutexGuard<'static, Renderer> {
    RENDERER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(fails: bool) -> c_int {
    if fails { EINVAL } else { 0 }
}

/// Ends the process like an invalid memory access.
extern "C" fn fault() {
    std::process::abort();
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_init(
    cookie: *mut c_void,
    _: c_int,
    callbacks: *const Callbacks,
) -> c_int {
    STARTS.fetch_add(1, Ordering::Relaxed);
    if let Some(log) = &SETTINGS.log {
        let _ = log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .set_len(0);
    }
    // SAFETY: the caller passes its callbacks.
    let callbacks = unsafe { *callbacks };
    renderer().caller = Some((cookie as usize, callbacks));
    failure(called("init", 0))
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_cleanup(_: *mut c_void) {
    let left = std::mem::take(&mut *renderer());
    called(
        "cleanup",
        (left.textures.len() + left.contexts.len()) as u32,
    );
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_poll() {
    let (caller, fence) = {
        let renderer = renderer();
        (renderer.caller, renderer.fence)
    };
    if let Some((cookie, callbacks)) = caller
        && !(SETTINGS.is_late && is_before("done"))
    {
        (callbacks.write_fence)(cookie as *mut c_void, fence);
    }
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_get_poll_fd() -> c_int {
    -1
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_force_ctx_0() {}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_create_fence(fence: c_int, _: u32) -> c_int {
    renderer().fence = fence as u32;
    failure(called("create_fence", fence as u32))
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_get_cap_set(set: u32, version: *mut u32, size: *mut u32) {
    // SAFETY: the caller passes pointers to numbers.
    unsafe { (*version, *size) = (1, if set == 1 { 308 } else { 0 }) };
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_fill_caps(_: u32, _: u32, caps: *mut c_void) {
    // SAFETY: the caller has room for as many bytes as it was told.
    unsafe { caps.cast::<[u8; 308]>().write([1; 308]) };
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_context_create(context: u32, _: u32, _: *const c_char) -> c_int {
    renderer().contexts.push(context);
    failure(called("context_create", context))
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_context_destroy(context: u32) {
    renderer().contexts.retain(|number| *number != context);
    called("context_destroy", context);
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_ctx_attach_resource(_: c_int, resource: c_int) {
    called("ctx_attach_resource", resource as u32);
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_ctx_detach_resource(_: c_int, resource: c_int) {
    called("ctx_detach_resource", resource as u32);
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_resource_create(
    arguments: *const Arguments,
    _: *mut iovec,
    _: u32,
) -> c_int {
    // SAFETY: the caller passes the arguments.
    let arguments = unsafe { *arguments };
    if called("resource_create", arguments.handle) {
        return EINVAL;
    }
    match Texture::new(arguments) {
        Some(texture) => {
            renderer().textures.insert(arguments.handle, texture);
            0
        }
        None => EINVAL,
    }
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_resource_unref(resource: u32) {
    called("resource_unref", resource);
    renderer().textures.remove(&resource);
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_resource_attach_iov(
    resource: c_int,
    iovecs: *mut iovec,
    count: c_int,
) -> c_int {
    match renderer().textures.get_mut(&(resource as u32)) {
        Some(texture) => texture.attached = Some((iovecs as usize, count as usize)),
        None => return EINVAL,
    }
    failure(called("resource_attach_iov", resource as u32))
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub extern "C" fn virgl_renderer_resource_detach_iov(
    resource: c_int,
    _: *mut *mut iovec,
    _: *mut c_int,
) {
    if let Some(texture) = renderer().textures.get_mut(&(resource as u32)) {
        texture.attached = None;
    }
    called("resource_detach_iov", resource as u32);
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_submit_cmd(
    commands: *const u32,
    context: c_int,
    count: c_int,
) -> c_int {
    // SAFETY: the caller has as many words as it says.
    let words = unsafe { std::slice::from_raw_parts(commands, count as usize) };
    let &[FILL, resource, pixel] = words else {
        return failure(called("submit_cmd", context as u32) || carry_out(words).is_none());
    };
    if SETTINGS.is_stuck {
        // SAFETY: the handler is there for as long as this library, which stays.
        unsafe { libc::atexit(fault) };
        called("submit_cmd", context as u32);
        loop {
            std::thread::park();
        }
    }
    if fill(resource, pixel).is_none() {
        return EINVAL;
    }
    failure(called("submit_cmd", context as u32))
}

/// Fills a resource with one pixel.
fn fill(resource: u32, pixel: u32) -> Option<()> {
    let renderer = renderer();
    let texture = renderer.textures.get(&resource)?;
    let size = stride(&texture.arguments) * texture.arguments.height;
    let all = pixel.to_ne_bytes().repeat(size as usize / 4);
    texture.file.write_all_at(&all, 0).ok()
}

/// Executes virglrenderer commands: surfaces, CLEAR, and BLIT of the first pixel to the whole of another resource.
fn carry_out(mut words: &[u32]) -> Option<()> {
    let mut surface = 0;
    while let [head, rest @ ..] = words {
        let (body, rest) = rest.split_at_checked(*head as usize >> 16)?;
        words = rest;
        match (head & 0xff, body) {
            (1, [_, resource, ..]) => surface = *resource,
            (7, [_, red, green, blue, alpha, ..]) => {
                let colours = [alpha, red, green, blue].map(|part| f32::from_bits(*part) * 255.0);
                let pixel = colours
                    .iter()
                    .fold(0, |pixel, part| pixel << 8 | *part as u32);
                fill(surface, pixel)?;
            }
            (16, [_, _, _, target, _, _, _, _, _, _, _, _, source, ..]) => {
                let mut pixel = [0; 4];
                let read = |file: &File| file.read_exact_at(&mut pixel, 0).ok();
                renderer()
                    .textures
                    .get(source)
                    .map(|texture| &texture.file)
                    .and_then(read)?;
                if !SETTINGS.is_blank {
                    fill(*target, u32::from_ne_bytes(pixel))?;
                }
            }
            _ => {}
        }
    }
    Some(())
}

/// The bytes of iovecs, one after the other.
struct Memory(Vec<(usize, usize)>);

impl Memory {
    /// SAFETY: the iovecs are there, and what they point to, for as long as this is used.
    unsafe fn new(iovecs: *const iovec, count: usize) -> Self {
        // SAFETY: as the caller says.
        let iovecs = unsafe { std::slice::from_raw_parts(iovecs, count) };
        Self(
            iovecs
                .iter()
                .map(|iovec| (iovec.iov_base as usize, iovec.iov_len))
                .collect(),
        )
    }

    /// Calls `copy` with each piece of a range. Returns false if the range is incomplete.
    fn each(&self, mut offset: usize, mut size: usize, mut copy: impl FnMut(&mut [u8])) -> bool {
        for (start, length) in &self.0 {
            if offset >= *length {
                offset -= length;
                continue;
            }
            let count = size.min(length - offset);
            // SAFETY: it is in one of the iovecs. The guest may write to it meanwhile, which only changes the picture.
            copy(unsafe { std::slice::from_raw_parts_mut((start + offset) as *mut u8, count) });
            (offset, size) = (0, size - count);
            if size == 0 {
                return true;
            }
        }
        false
    }
}

/// Copies between a texture and iovecs: those of the call, or the attached ones.
unsafe fn transfer(
    resource: u32,
    row: u32,
    part: *const Part,
    offset: u64,
    (iovecs, count): (*const iovec, usize),
    mut copy: impl FnMut(&File, &mut [u8], u64) -> std::io::Result<()>,
) -> c_int {
    // SAFETY: the caller passes a box.
    let part = unsafe { *part };
    let renderer = renderer();
    let Some(texture) = renderer.textures.get(&resource) else {
        return EINVAL;
    };
    let place = match iovecs.is_null() {
        false => (iovecs as usize, count),
        true => texture.attached.unwrap_or_default(),
    };
    let arguments = &texture.arguments;
    let is_within = part.x.saturating_add(part.width) <= arguments.width
        && part.y.saturating_add(part.height) <= arguments.height;
    if place.0 == 0 || !is_within {
        return EINVAL;
    }
    // SAFETY: the caller keeps them in place until it detaches them.
    let memory = unsafe { Memory::new(place.0 as *const iovec, place.1) };
    let row = if row == 0 { arguments.width * 4 } else { row };
    for line in 0..part.height {
        let mut to =
            u64::from(stride(arguments)) * u64::from(part.y + line) + u64::from(part.x) * 4;
        let from = offset as usize + (row * line) as usize;
        let all = memory.each(from, part.width as usize * 4, |piece| {
            let _ = copy(&texture.file, piece, to);
            to += piece.len() as u64;
        });
        if !all {
            return EINVAL;
        }
    }
    0
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_transfer_write_iov(
    resource: u32,
    _: u32,
    _: c_int,
    row: u32,
    _: u32,
    part: *const Part,
    offset: u64,
    iovecs: *const iovec,
    count: u32,
) -> c_int {
    if called("transfer_write_iov", resource) {
        return EINVAL;
    }
    let place = (iovecs, count as usize);
    // SAFETY: as the caller says.
    unsafe {
        transfer(resource, row, part, offset, place, |file, piece, to| {
            file.write_all_at(piece, to)
        })
    }
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_transfer_read_iov(
    resource: u32,
    _: u32,
    _: u32,
    row: u32,
    _: u32,
    part: *const Part,
    offset: u64,
    iovecs: *const iovec,
    count: c_int,
) -> c_int {
    if called("transfer_read_iov", resource) {
        return EINVAL;
    }
    let place = (iovecs, count as usize);
    // SAFETY: as the caller says.
    unsafe {
        transfer(resource, row, part, offset, place, |file, piece, from| {
            file.read_exact_at(piece, from)
        })
    }
}

fn info(texture: &Texture) -> Info {
    let arguments = &texture.arguments;
    // DRM's name for bytes in the order blue, green, red.
    let fourcc = match arguments.format {
        1 => u32::from_le_bytes(*b"AR24"),
        2 => u32::from_le_bytes(*b"XR24"),
        67 => u32::from_le_bytes(*b"AB24"),
        _ => 0,
    };
    Info {
        handle: arguments.handle,
        format: arguments.format,
        width: arguments.width,
        height: arguments.height,
        depth: 1,
        flags: arguments.flags,
        texture: arguments.handle + 1000,
        // Not the stride of the buffer.
        stride: arguments.width * 4,
        fourcc: SETTINGS.fourcc.unwrap_or(fourcc),
    }
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_resource_get_info(
    resource: c_int,
    result: *mut Info,
) -> c_int {
    if called("resource_get_info", resource as u32) {
        return EINVAL;
    }
    match renderer().textures.get(&(resource as u32)) {
        Some(texture) => {
            // SAFETY: the caller has room for it.
            unsafe { result.write(info(texture)) };
            0
        }
        None => EINVAL,
    }
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_resource_get_info_ext(
    resource: c_int,
    result: *mut InfoExt,
) -> c_int {
    if called("resource_get_info_ext", resource as u32) {
        return EINVAL;
    }
    match renderer().textures.get(&(resource as u32)) {
        Some(texture) => {
            let all = InfoExt {
                version: 0,
                base: info(texture),
                fd: 0,
                has_dmabuf_export: SETTINGS.is_shared,
                planes: SETTINGS.planes as c_int,
                modifier: SETTINGS.modifier,
            };
            // SAFETY: the caller has room for it.
            unsafe { result.write(all) };
            0
        }
        None => EINVAL,
    }
}

/// See virglrenderer.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn virgl_renderer_get_fd_for_texture2(
    texture: u32,
    files: *mut c_int,
    strides: *mut c_int,
    offsets: *mut c_int,
) -> c_int {
    let resource = texture - 1000;
    let renderer = renderer();
    let Some(texture) = renderer.textures.get(&resource) else {
        return EINVAL;
    };
    if called("get_fd_for_texture2", resource) {
        return EINVAL;
    }
    for plane in 0..SETTINGS.planes {
        let file = match SETTINGS.has_files.then(|| texture.file.try_clone()) {
            Some(Ok(file)) => file.into_raw_fd(),
            _ => -1,
        };
        // SAFETY: the caller has room for as many as a format has planes.
        unsafe {
            files.add(plane).write(file);
            strides
                .add(plane)
                .write(stride(&texture.arguments) as c_int);
            offsets.add(plane).write(SETTINGS.offset);
        }
    }
    0
}
