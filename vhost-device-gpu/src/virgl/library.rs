// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The functions of libvirglrenderer, loaded at run time: those that releases 0.10 and 1.x share, and optional ones.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;

use super::error::VirglError;
use crate::protocol::Transfer3d;

/// File name of the library in all releases so far.
const NAME: &CStr = c"libvirglrenderer.so.1";
/// Longest logged message of the library, in bytes.
const MAX_LINE: usize = 256;

/// Flag of virgl_renderer_init: create an EGL context.
pub const USE_EGL: c_int = 1 << 0;
/// Flag of virgl_renderer_init: wait for fences in a thread, and signal them through a file.
pub const THREAD_SYNC: c_int = 1 << 1;
/// Flag of virgl_renderer_init: do not open a GPU.
pub const USE_SURFACELESS: c_int = 1 << 3;

/// `struct virgl_renderer_callbacks`, version 2.
#[repr(C)]
pub struct Callbacks {
    pub version: c_int,
    pub write_fence: extern "C" fn(*mut c_void, u32),
    /// Callbacks for contexts that the caller creates. Unused.
    pub contexts: [Option<extern "C" fn()>; 3],
    pub get_drm_fd: extern "C" fn(*mut c_void) -> c_int,
}

/// `struct virgl_renderer_resource_create_args`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ResourceCreateArgs {
    pub handle: u32,
    pub target: u32,
    pub format: u32,
    pub bind: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub array_size: u32,
    pub last_level: u32,
    pub samples: u32,
    pub flags: u32,
}

/// `struct virgl_box`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TransferBox {
    pub x: u32,
    pub y: u32,
    pub z: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
}

impl From<&Transfer3d> for TransferBox {
    fn from(command: &Transfer3d) -> Self {
        Self {
            x: command.x.get(),
            y: command.y.get(),
            z: command.z.get(),
            width: command.width.get(),
            height: command.height.get(),
            depth: command.depth.get(),
        }
    }
}

/// `struct virgl_renderer_resource_info`. Release 0.10 has no `fd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ResourceInfo {
    pub handle: u32,
    pub virgl_format: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub flags: u32,
    pub texture: u32,
    pub stride: u32,
    pub fourcc: c_int,
    pub fd: c_int,
}

/// `struct virgl_renderer_resource_info_ext`, with room for fields that newer releases append.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ResourceInfoExt {
    pub version: c_int,
    pub base: ResourceInfo,
    /// A C `bool`.
    pub has_dmabuf_export: u8,
    pub planes: c_int,
    pub modifier: u64,
    pub room: [u64; 16],
}

const _: () = assert!(size_of::<ResourceInfo>() == 40);
const _: () = assert!(std::mem::offset_of!(ResourceInfoExt, modifier) == 56);

/// Most planes of a format.
pub const MAX_PLANES: usize = 4;

type Log = extern "C" fn(*const c_char, *mut c_void);

macro_rules! functions {
    (
        required { $($name:ident: $type:ty,)* }
        optional { $($optional:ident: $optional_type:ty,)* }
    ) => {
        /// The functions, named without the prefix `virgl_renderer_`.
        pub struct Library {
            $(pub $name: $type,)*
            $(pub $optional: Option<$optional_type>,)*
        }

        impl Library {
            fn open() -> Result<Self, VirglError> {
                // SAFETY: the library's initialisers are trusted, like those of a linked library.
                let library = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
                if library.is_null() {
                    return Err(VirglError::Load(dl_error()));
                }
                redirect_log(library);
                Ok(Self {
                    $($name: {
                        let symbol = find_symbol(library, concat!("virgl_renderer_", stringify!($name), "\0"))
                            .ok_or_else(|| VirglError::Load(dl_error()))?;
                        // SAFETY: this is the function's type in virglrenderer.h of all releases.
                        unsafe { std::mem::transmute::<*mut c_void, $type>(symbol.as_ptr()) }
                    },)*
                    $($optional: {
                        let symbol = find_symbol(library, concat!("virgl_renderer_", stringify!($optional), "\0"));
                        // SAFETY: as above, in the releases that have the function.
                        symbol.map(|symbol| unsafe {
                            std::mem::transmute::<*mut c_void, $optional_type>(symbol.as_ptr())
                        })
                    },)*
                })
            }
        }
    };
}

functions! {
    required {
        init: unsafe extern "C" fn(*mut c_void, c_int, *mut Callbacks) -> c_int,
        cleanup: unsafe extern "C" fn(*mut c_void),
        poll: unsafe extern "C" fn(),
        get_poll_fd: unsafe extern "C" fn() -> c_int,
        force_ctx_0: unsafe extern "C" fn(),
        create_fence: unsafe extern "C" fn(c_int, u32) -> c_int,
        get_cap_set: unsafe extern "C" fn(u32, *mut u32, *mut u32),
        fill_caps: unsafe extern "C" fn(u32, u32, *mut c_void),
        context_create: unsafe extern "C" fn(u32, u32, *const c_char) -> c_int,
        context_destroy: unsafe extern "C" fn(u32),
        ctx_attach_resource: unsafe extern "C" fn(c_int, c_int),
        ctx_detach_resource: unsafe extern "C" fn(c_int, c_int),
        resource_create: unsafe extern "C" fn(*mut ResourceCreateArgs, *mut libc::iovec, u32) -> c_int,
        resource_unref: unsafe extern "C" fn(u32),
        resource_attach_iov: unsafe extern "C" fn(c_int, *mut libc::iovec, c_int) -> c_int,
        resource_detach_iov: unsafe extern "C" fn(c_int, *mut *mut libc::iovec, *mut c_int),
        submit_cmd: unsafe extern "C" fn(*mut c_void, c_int, c_int) -> c_int,
        transfer_read_iov: unsafe extern "C" fn(
            u32, u32, u32, u32, u32, *mut TransferBox, u64, *mut libc::iovec, c_int,
        ) -> c_int,
        transfer_write_iov: unsafe extern "C" fn(
            u32, u32, c_int, u32, u32, *mut TransferBox, u64, *mut libc::iovec, u32,
        ) -> c_int,
    }
    optional {
        get_fd_for_texture2: unsafe extern "C" fn(u32, *mut c_int, *mut c_int, *mut c_int) -> c_int,
        resource_get_info: unsafe extern "C" fn(c_int, *mut ResourceInfo) -> c_int,
        resource_get_info_ext: unsafe extern "C" fn(c_int, *mut ResourceInfoExt) -> c_int,
    }
}

impl Library {
    /// Returns the library. It is loaded once and never unloaded.
    pub fn get() -> Result<&'static Self, VirglError> {
        static LIBRARY: OnceLock<Result<Library, VirglError>> = OnceLock::new();
        LIBRARY
            .get_or_init(Self::open)
            .as_ref()
            .map_err(Clone::clone)
    }
}

/// Returns a function of the library. The name must end with a zero byte.
fn find_symbol(library: *mut c_void, name: &'static str) -> Option<NonNull<c_void>> {
    // SAFETY: the library is never unloaded, and the name ends with a zero byte.
    NonNull::new(unsafe { libc::dlsym(library, name.as_ptr().cast()) })
}

/// Returns the message of the dynamic linker.
fn dl_error() -> String {
    // SAFETY: the message is copied before this thread calls the linker again.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "a function is missing".to_owned();
    }
    // SAFETY: dlerror returns a C string.
    unsafe { CStr::from_ptr(message) }
        .to_string_lossy()
        .into_owned()
}

/// Sends the library's messages, which guests can cause, to the debug log. If the library does not support this, they
/// go to stderr.
fn redirect_log(library: *mut c_void) {
    if let Some(symbol) = find_symbol(library, "virgl_set_debug_callback\0") {
        // SAFETY: this is the function's type in virglrenderer.h. The previous callback, which it returns, is not used.
        unsafe {
            let set = std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Log) -> *mut c_void>(
                symbol.as_ptr(),
            );
            set(log);
        }
    }
}

unsafe extern "C" {
    /// On all supported architectures, a `va_list` argument is passed as a pointer.
    fn vsnprintf(
        buffer: *mut c_char,
        size: usize,
        format: *const c_char,
        arguments: *mut c_void,
    ) -> c_int;
}

extern "C" fn log(format: *const c_char, arguments: *mut c_void) {
    let mut line = [0u8; MAX_LINE];
    // SAFETY: the library passes a format and its arguments; the size is that of the line.
    unsafe { vsnprintf(line.as_mut_ptr().cast(), line.len(), format, arguments) };
    if let Ok(line) = CStr::from_bytes_until_nul(&line) {
        let line = line.to_string_lossy();
        log::debug!("virglrenderer: {}", line.trim_end());
    }
}
