// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Draws a triangle with OpenGL ES off-screen, and prints who drew it and the result: `renderer NAME`, then `pixels` with the colours of two
//! corners and a checksum of all pixels. It loads Mesa's libraries at run time, so that it builds without them.

#![allow(
    unsafe_code,
    clippy::indexing_slicing,
    reason = "it calls OpenGL, and may panic"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};

const SIZE: c_int = 256;
const EGL_PLATFORM_SURFACELESS_MESA: c_uint = 0x31dd;
const EGL_OPENGL_ES_API: c_uint = 0x30a0;
const EGL_CONTEXT_CLIENT_VERSION: c_int = 0x3098;
const EGL_NONE: c_int = 0x3038;
const GL_TRIANGLES: c_uint = 4;
const GL_TEXTURE_2D: c_uint = 0x0de1;
const GL_UNSIGNED_BYTE: c_uint = 0x1401;
const GL_FLOAT: c_uint = 0x1406;
const GL_RGBA: c_uint = 0x1908;
const GL_RENDERER: c_uint = 0x1f01;
const GL_COLOR_BUFFER_BIT: c_uint = 0x4000;
const GL_FRAGMENT_SHADER: c_uint = 0x8b30;
const GL_VERTEX_SHADER: c_uint = 0x8b31;
const GL_COLOR_ATTACHMENT0: c_uint = 0x8ce0;
const GL_FRAMEBUFFER: c_uint = 0x8d40;

const VERTEX_SHADER: &CStr =
    c"attribute vec2 place; void main() { gl_Position = vec4(place, 0.0, 1.0); }";
const FRAGMENT_SHADER: &CStr = c"void main() { gl_FragColor = vec4(1.0, 0.5, 0.0, 1.0); }";

/// Loads a library and finds a function in it.
fn find(library: &CStr, name: &CStr) -> *mut c_void {
    // SAFETY: both are strings; the library is not closed.
    let function = unsafe {
        let library = libc::dlopen(library.as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null(), "a library of Mesa is missing");
        libc::dlsym(library, name.as_ptr())
    };
    assert!(!function.is_null(), "{name:?} is missing");
    function
}

/// Calls a function of a library, with arguments of C types.
macro_rules! call {
    ($library:literal, $name:literal, ($($value:expr => $type:ty),*) $(-> $result:ty)?) => {{
        let function = find($library, $name);
        // SAFETY: the types are those of this function in EGL or OpenGL ES, and what pointers point to is there until the program ends.
        unsafe {
            let function = std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(function);
            function($($value),*)
        }
    }};
}
macro_rules! egl { ($($rest:tt)*) => { call!(c"libEGL.so.1", $($rest)*) }; }
macro_rules! gl { ($($rest:tt)*) => { call!(c"libGLESv2.so.2", $($rest)*) }; }

fn shader(kind: c_uint, source: &CStr) -> c_uint {
    let shader = gl!(c"glCreateShader", (kind => c_uint) -> c_uint);
    let sources = [source.as_ptr()];
    gl!(c"glShaderSource", (shader => c_uint, 1 => c_int, sources.as_ptr() => *const *const c_char, null() => *const c_int));
    gl!(c"glCompileShader", (shader => c_uint));
    shader
}

fn start() {
    let display = egl!(c"eglGetPlatformDisplay", (EGL_PLATFORM_SURFACELESS_MESA => c_uint, null_mut() => *mut c_void, null() => *const isize) -> *mut c_void);
    let started = egl!(c"eglInitialize", (display => *mut c_void, null_mut() => *mut c_int, null_mut() => *mut c_int) -> c_uint);
    assert_eq!(started, 1, "EGL does not start");
    egl!(c"eglBindAPI", (EGL_OPENGL_ES_API => c_uint) -> c_uint);
    let attributes = [EGL_CONTEXT_CLIENT_VERSION, 2, EGL_NONE];
    let context = egl!(c"eglCreateContext", (display => *mut c_void, null_mut() => *mut c_void, null_mut() => *mut c_void, attributes.as_ptr() => *const c_int) -> *mut c_void);
    let current = egl!(c"eglMakeCurrent", (display => *mut c_void, null_mut() => *mut c_void, null_mut() => *mut c_void, context => *mut c_void) -> c_uint);
    assert_eq!(current, 1, "there is no context to draw in");
}

fn draw() -> Vec<u8> {
    let mut name = 0;
    gl!(c"glGenTextures", (1 => c_int, &raw mut name => *mut c_uint));
    gl!(c"glBindTexture", (GL_TEXTURE_2D => c_uint, name => c_uint));
    gl!(c"glTexImage2D", (GL_TEXTURE_2D => c_uint, 0 => c_int, GL_RGBA as c_int => c_int, SIZE => c_int, SIZE => c_int, 0 => c_int, GL_RGBA => c_uint, GL_UNSIGNED_BYTE => c_uint, null() => *const c_void));
    let texture = name;
    gl!(c"glGenFramebuffers", (1 => c_int, &raw mut name => *mut c_uint));
    gl!(c"glBindFramebuffer", (GL_FRAMEBUFFER => c_uint, name => c_uint));
    gl!(c"glFramebufferTexture2D", (GL_FRAMEBUFFER => c_uint, GL_COLOR_ATTACHMENT0 => c_uint, GL_TEXTURE_2D => c_uint, texture => c_uint, 0 => c_int));
    gl!(c"glViewport", (0 => c_int, 0 => c_int, SIZE => c_int, SIZE => c_int));
    gl!(c"glClearColor", (0.0 => f32, 0.0 => f32, 1.0 => f32, 1.0 => f32));
    gl!(c"glClear", (GL_COLOR_BUFFER_BIT => c_uint));
    let program = gl!(c"glCreateProgram", () -> c_uint);
    for (kind, source) in [
        (GL_VERTEX_SHADER, VERTEX_SHADER),
        (GL_FRAGMENT_SHADER, FRAGMENT_SHADER),
    ] {
        gl!(c"glAttachShader", (program => c_uint, shader(kind, source) => c_uint));
    }
    gl!(c"glBindAttribLocation", (program => c_uint, 0 => c_uint, c"place".as_ptr() => *const c_char));
    gl!(c"glLinkProgram", (program => c_uint));
    gl!(c"glUseProgram", (program => c_uint));
    let corners = [-1.0f32, -1.0, 1.0, -1.0, -1.0, 1.0];
    gl!(c"glVertexAttribPointer", (0 => c_uint, 2 => c_int, GL_FLOAT => c_uint, 0 => u8, 0 => c_int, corners.as_ptr() => *const f32));
    gl!(c"glEnableVertexAttribArray", (0 => c_uint));
    gl!(c"glDrawArrays", (GL_TRIANGLES => c_uint, 0 => c_int, 3 => c_int));
    let mut pixels = vec![0; (SIZE * SIZE * 4) as usize];
    gl!(c"glReadPixels", (0 => c_int, 0 => c_int, SIZE => c_int, SIZE => c_int, GL_RGBA => c_uint, GL_UNSIGNED_BYTE => c_uint, pixels.as_mut_ptr() => *mut u8));
    assert_eq!(gl!(c"glGetError", () -> c_uint), 0);
    pixels
}

fn main() {
    start();
    let renderer = gl!(c"glGetString", (GL_RENDERER => c_uint) -> *const c_char);
    // SAFETY: with a context that is current it is a string.
    let renderer = unsafe { CStr::from_ptr(renderer) };
    println!("renderer {}", renderer.to_string_lossy());
    let pixels = draw();
    let checksum = pixels.iter().fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let (first, last) = (&pixels[..4], &pixels[pixels.len() - 4..]);
    println!("pixels {first:?} {last:?} {checksum:016x}");
}
