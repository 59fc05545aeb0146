// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The renderer: contexts, resources and fences of virglrenderer, and the memory that they point to.

use std::collections::{HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::fs::{DirEntry, File};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::ThreadId;

use vhost_device_common::memory::GuestMemory;
use zerocopy::IntoBytes;

use super::error::VirglError;
use super::library::{
    Callbacks, Library, ResourceCreateArgs, THREAD_SYNC, TransferBox, USE_EGL, USE_SURFACELESS,
};
use crate::backing::Backing;
use crate::protocol::{CommandError, Create3d, Transfer3d};
use crate::rectangle::Rectangle;

/// Capability sets that the library supports: VIRTIO_GPU_CAPSET_VIRGL and VIRTIO_GPU_CAPSET_VIRGL2.
const CAPSETS: [u32; 2] = [1, 2];
/// Largest capability set in bytes. Actual ones have a few hundred bytes; larger ones are not offered.
const MAX_CAPSET_SIZE: u32 = 64 << 10;
/// Most contexts of a guest. Each program that uses 3D has one.
const MAX_CONTEXTS: usize = 256;

/// The library has one state per process.
static IN_USE: AtomicBool = AtomicBool::new(false);

/// A capability set.
#[derive(Clone, Copy, Debug)]
pub struct Capset {
    pub id: u32,
    pub max_version: u32,
    /// Size in bytes: from 1 to [`MAX_CAPSET_SIZE`].
    pub size: u32,
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug)]
pub enum Direction {
    ToHost,
    FromHost,
}

/// Functions that the library calls.
static CALLBACKS: Callbacks = Callbacks {
    version: 2,
    write_fence,
    contexts: [None; 3],
    get_drm_fd,
};

/// Guest memory that the library may access during any call.
struct Attached {
    /// The library keeps a pointer to these.
    iovecs: Box<[libc::iovec]>,
    /// Keeps the memory mapped.
    _memory: Arc<GuestMemory>,
}

/// Argument of the callbacks.
struct Cookie {
    /// The last fence that has signalled.
    fence: AtomicU32,
    node: Option<PathBuf>,
}

/// The renderer. EGL contexts belong to a thread: the thread that creates the renderer must make all calls, and drop
/// it.
pub struct Renderer {
    library: &'static Library,
    thread: ThreadId,
    /// The library keeps a pointer to it.
    cookie: Box<Cookie>,
    contexts: HashSet<u32>,
    /// The resources in the library, with the backing of each.
    resources: HashMap<u32, Option<Attached>>,
    /// The last fence that was created.
    fence: u32,
}

// SAFETY: only the iovecs and the library's state are not Send. Both are used only after `Renderer::library` has
// checked that this is the thread that created the renderer.
unsafe impl Send for Renderer {}

impl Renderer {
    /// Starts the library on this thread with a render node, or with the GPU or software renderer that it finds.
    pub fn new(node: Option<&Path>) -> Result<Self, VirglError> {
        let library = Library::get()?;
        if let Some(path) = node {
            open(path).map_err(|error| VirglError::Node {
                path: path.display().to_string(),
                error: error.to_string(),
            })?;
        }
        if IN_USE.swap(true, Ordering::AcqRel) {
            return Err(VirglError::Busy);
        }
        let mut cookie = Box::new(Cookie {
            fence: AtomicU32::new(0),
            node: node.map(Path::to_owned),
        });
        let mut flags = USE_EGL | THREAD_SYNC;
        if node.is_none() && !has_render_node() {
            flags |= USE_SURFACELESS;
        }
        let callbacks = (&raw const CALLBACKS).cast_mut();
        // SAFETY: the cookie stays in place until the cleanup, after which the library does not use it. The library
        // only reads the callbacks.
        let outcome = unsafe { (library.init)((&raw mut *cookie).cast(), flags, callbacks) };
        if outcome != 0 {
            IN_USE.store(false, Ordering::Release);
            return Err(VirglError::Init);
        }
        Ok(Self {
            library,
            thread: std::thread::current().id(),
            cookie,
            contexts: HashSet::new(),
            resources: HashMap::new(),
            fence: 0,
        })
    }

    /// Returns the library if this is the renderer's thread.
    fn library(&self) -> Result<&'static Library, CommandError> {
        match self.thread == std::thread::current().id() {
            true => Ok(self.library),
            false => Err(CommandError::Unspecified),
        }
    }

    /// Returns the library for a call with a resource, if the resource exists.
    pub(super) fn library_of(&self, id: u32) -> Result<&'static Library, CommandError> {
        match self.resources.contains_key(&id) {
            true => self.library(),
            false => Err(CommandError::InvalidResourceId),
        }
    }

    /// Returns the capability sets that the library supports.
    pub fn capsets(&self) -> Vec<Capset> {
        let Ok(library) = self.library() else {
            return Vec::new();
        };
        let all = CAPSETS.map(|id| {
            let (mut max_version, mut size) = (0, 0);
            // SAFETY: both pointers point to a u32.
            unsafe { (library.get_cap_set)(id, &raw mut max_version, &raw mut size) };
            Capset {
                id,
                max_version,
                size,
            }
        });
        all.into_iter()
            .filter(|capset| (1..=MAX_CAPSET_SIZE).contains(&capset.size))
            .collect()
    }

    /// Returns the contents of a capability set.
    pub fn fill_capset(&self, capset: &Capset, version: u32) -> Result<Vec<u8>, CommandError> {
        let library = self.library()?;
        // Of u64, because the library treats it as a struct. It has room for the largest set.
        let mut room = vec![0u64; MAX_CAPSET_SIZE as usize / 8];
        // SAFETY: the library writes at most the size that it reported, which `capsets` has compared to the size of the
        // buffer.
        unsafe { (library.fill_caps)(capset.id, version, room.as_mut_ptr().cast()) };
        let bytes = room.as_bytes().get(..capset.size as usize);
        Ok(bytes.unwrap_or_default().to_vec())
    }

    /// Returns whether any contexts exist.
    pub fn has_contexts(&self) -> bool {
        !self.contexts.is_empty()
    }

    fn check_context(&self, context: u32) -> Result<(), CommandError> {
        match self.contexts.contains(&context) {
            true => Ok(()),
            false => Err(CommandError::InvalidContextId),
        }
    }

    /// Creates a context with a name for debugging.
    pub fn create_context(&mut self, context: u32, name: &[u8]) -> Result<(), CommandError> {
        let library = self.library()?;
        if context == 0 || self.contexts.contains(&context) {
            return Err(CommandError::InvalidContextId);
        }
        if self.contexts.len() >= MAX_CONTEXTS {
            return Err(CommandError::OutOfMemory);
        }
        // SAFETY: the length is that of the name, which the library copies.
        let outcome =
            unsafe { (library.context_create)(context, name.len() as u32, name.as_ptr().cast()) };
        check(outcome)?;
        self.contexts.insert(context);
        Ok(())
    }

    /// Destroys a context.
    pub fn destroy_context(&mut self, context: u32) -> Result<(), CommandError> {
        let library = self.library()?;
        self.check_context(context)?;
        self.contexts.remove(&context);
        // SAFETY: the context exists.
        unsafe { (library.context_destroy)(context) };
        Ok(())
    }

    /// Makes a resource available to a context.
    pub fn attach_to_context(&mut self, context: u32, resource: u32) -> Result<(), CommandError> {
        let library = self.library()?;
        self.check_context(context)?;
        // SAFETY: the context exists; the library ignores unknown resources.
        unsafe { (library.ctx_attach_resource)(context as c_int, resource as c_int) };
        Ok(())
    }

    /// Reverses [`Renderer::attach_to_context`].
    pub fn detach_from_context(&mut self, context: u32, resource: u32) -> Result<(), CommandError> {
        let library = self.library()?;
        self.check_context(context)?;
        // SAFETY: the context exists; the library ignores unknown resources.
        unsafe { (library.ctx_detach_resource)(context as c_int, resource as c_int) };
        Ok(())
    }

    /// Creates a resource without a backing.
    pub fn create_resource(&mut self, command: &Create3d) -> Result<(), CommandError> {
        let library = self.library()?;
        let mut arguments = ResourceCreateArgs {
            handle: command.resource.get(),
            target: command.target.get(),
            format: command.format.get(),
            bind: command.bind.get(),
            width: command.width.get(),
            height: command.height.get(),
            depth: command.depth.get(),
            array_size: command.array_size.get(),
            last_level: command.last_level.get(),
            samples: command.samples.get(),
            flags: command.flags.get(),
        };
        // SAFETY: the library reads the arguments during the call only; there are no iovecs.
        let outcome = unsafe {
            (library.force_ctx_0)();
            (library.resource_create)(&raw mut arguments, null_mut(), 0)
        };
        check(outcome)?;
        self.resources.insert(arguments.handle, None);
        Ok(())
    }

    /// Detaches the backing and destroys the resource.
    pub fn remove_resource(&mut self, id: u32) {
        self.detach_backing(id);
        if let Ok(library) = self.library()
            && self.resources.remove(&id).is_some()
        {
            // SAFETY: the resource exists and has no iovecs attached.
            unsafe {
                (library.force_ctx_0)();
                (library.resource_unref)(id);
            }
        }
    }

    /// Attaches guest memory to a resource, instead of any that it has.
    pub fn attach_backing(
        &mut self,
        id: u32,
        backing: &Backing,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), CommandError> {
        let library = self.library()?;
        self.detach_backing(id);
        let resource = self.resources.get_mut(&id);
        let resource = resource.ok_or(CommandError::InvalidResourceId)?;
        let mut iovecs = iovecs(backing, memory).ok_or(CommandError::Unspecified)?;
        let (start, count) = (iovecs.as_mut_ptr(), iovecs.len() as c_int);
        // Stored before the call, so that it lives at least as long as the library uses it.
        let attached = resource.insert(Attached {
            iovecs,
            _memory: Arc::clone(memory),
        });
        debug_assert_eq!(attached.iovecs.as_ptr(), start.cast_const());
        // SAFETY: iovecs and memory stay in place until `detach_backing` detaches them.
        let outcome = unsafe {
            (library.force_ctx_0)();
            (library.resource_attach_iov)(id as c_int, start, count)
        };
        check(outcome).inspect_err(|_| *resource = None)
    }

    /// Detaches guest memory from a resource. Does nothing if none is attached.
    pub fn detach_backing(&mut self, id: u32) {
        if let Ok(library) = self.library()
            && let Some(resource) = self.resources.get_mut(&id)
            && let Some(attached) = resource.take()
        {
            // SAFETY: the iovecs still exist while the library detaches them. It writes nothing through null pointers.
            unsafe {
                (library.force_ctx_0)();
                (library.resource_detach_iov)(id as c_int, null_mut(), null_mut());
            }
            drop(attached);
        }
    }

    /// Transfers data between a resource and its backing. Context 0 stands for none.
    pub fn transfer(
        &mut self,
        direction: Direction,
        context: u32,
        command: &Transfer3d,
    ) -> Result<(), CommandError> {
        let library = self.library()?;
        if context != 0 {
            self.check_context(context)?;
        }
        let id = command.resource.get();
        let backing = self.resources.get(&id);
        let backing = backing.ok_or(CommandError::InvalidResourceId)?;
        backing.as_ref().ok_or(CommandError::Unspecified)?;
        let level = command.level.get();
        let (stride, layer_stride) = (command.stride.get(), command.layer_stride.get());
        let offset = command.offset.get();
        let mut region = TransferBox::from(command);
        let region = &raw mut region;
        // SAFETY: a call without iovecs uses the attached ones, and the library checks that box and offset are within
        // them.
        let outcome = unsafe {
            match direction {
                Direction::ToHost => (library.transfer_write_iov)(
                    id,
                    context,
                    level as c_int,
                    stride,
                    layer_stride,
                    region,
                    offset,
                    null_mut(),
                    0,
                ),
                Direction::FromHost => (library.transfer_read_iov)(
                    id,
                    context,
                    level,
                    stride,
                    layer_stride,
                    region,
                    offset,
                    null_mut(),
                    0,
                ),
            }
        };
        check(outcome)
    }

    /// Reads a rectangle of a resource into an image of `width`, at the same position. The first row is always the top:
    /// the library flips the image if the flags of the resource require it.
    pub fn read_pixels(
        &mut self,
        id: u32,
        rectangle: &Rectangle,
        width: u32,
        pixels: &mut [u32],
    ) -> Result<(), CommandError> {
        let library = self.library()?;
        let pixels = pixels.as_mut_bytes();
        let mut region = TransferBox {
            x: rectangle.x,
            y: rectangle.y,
            z: 0,
            width: rectangle.width,
            height: rectangle.height,
            depth: 1,
        };
        let offset = (u64::from(rectangle.y) * u64::from(width) + u64::from(rectangle.x)) * 4;
        let last_row = u64::from(rectangle.height - 1) * u64::from(width) * 4;
        let end = offset + last_row + u64::from(rectangle.width) * 4;
        let stride = width.checked_mul(4).ok_or(CommandError::InvalidParameter)?;
        if end > pixels.len() as u64 || !rectangle.is_within(width, u32::MAX) {
            return Err(CommandError::InvalidParameter);
        }
        let mut iovec = libc::iovec {
            iov_base: pixels.as_mut_ptr().cast(),
            iov_len: pixels.len(),
        };
        // SAFETY: the iovec covers `pixels`, which are borrowed; the library stays within it.
        let outcome = unsafe {
            (library.force_ctx_0)();
            (library.transfer_read_iov)(
                id,
                0,
                0,
                stride,
                0,
                &raw mut region,
                offset,
                &raw mut iovec,
                1,
            )
        };
        check(outcome)
    }

    /// Executes commands in a context.
    pub fn submit(&mut self, context: u32, commands: &mut [u32]) -> Result<(), CommandError> {
        let library = self.library()?;
        self.check_context(context)?;
        // SAFETY: pointer and length are those of `commands`.
        let outcome = unsafe {
            (library.submit_cmd)(
                commands.as_mut_ptr().cast(),
                context as c_int,
                commands.len() as c_int,
            )
        };
        check(outcome)
    }

    /// Creates a fence that signals when all submitted commands have finished.
    pub fn create_fence(&mut self) -> Result<u32, CommandError> {
        let library = self.library()?;
        let fence = self.fence.wrapping_add(1);
        // SAFETY: the call has no preconditions.
        check(unsafe { (library.create_fence)(fence as c_int, 0) })?;
        self.fence = fence;
        Ok(fence)
    }

    /// Returns the last fence that has signalled.
    pub fn poll(&mut self) -> u32 {
        if let Ok(library) = self.library() {
            // SAFETY: the library calls `write_fence` on this thread, with the cookie, which still exists.
            unsafe { (library.poll)() };
        }
        self.cookie.fence.load(Ordering::Relaxed)
    }

    /// Returns the file that becomes readable when a fence signals, if the library provides one.
    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the call only returns a number.
        let fd = unsafe { (self.library().ok()?.get_poll_fd)() };
        // SAFETY: the library keeps the file open until the cleanup, when this object is dropped.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Destroys all contexts and resources.
    pub fn clear(&mut self) {
        let Ok(library) = self.library() else { return };
        let ids: Vec<u32> = self.resources.keys().copied().collect();
        for context in std::mem::take(&mut self.contexts) {
            // SAFETY: the context exists.
            unsafe { (library.context_destroy)(context) };
        }
        for id in ids {
            self.remove_resource(id);
        }
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        let Ok(library) = self.library() else {
            // The library may still use these objects, and this thread cannot make it stop.
            log::error!("bug: the renderer was dropped on another thread; please report this");
            let resources = std::mem::take(&mut self.resources);
            std::mem::forget(resources);
            let cookie = Cookie {
                fence: AtomicU32::new(0),
                node: None,
            };
            std::mem::forget(std::mem::replace(&mut self.cookie, Box::new(cookie)));
            return;
        };
        self.clear();
        // SAFETY: this thread started the library, and no call follows.
        unsafe { (library.cleanup)((&raw mut *self.cookie).cast()) };
        IN_USE.store(false, Ordering::Release);
    }
}

/// Translates a backing to addresses of this process. Returns `None` if part of it is not guest memory.
fn iovecs(backing: &Backing, memory: &GuestMemory) -> Option<Box<[libc::iovec]>> {
    let mut iovecs = Vec::new();
    for (mut address, mut left) in backing.entries() {
        while left > 0 {
            let slice = memory.slice_up_to(address, usize::try_from(left).ok()?)?;
            iovecs.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            address = address.checked_add(slice.len() as u64)?;
            left = left.checked_sub(slice.len() as u64)?;
        }
    }
    Some(iovecs.into_boxed_slice())
}

/// Converts the return value of a call.
fn check(outcome: c_int) -> Result<(), CommandError> {
    match outcome.checked_abs() {
        Some(0) => Ok(()),
        Some(libc::ENOMEM) => Err(CommandError::OutOfMemory),
        Some(libc::EINVAL) => Err(CommandError::InvalidParameter),
        _ => Err(CommandError::Unspecified),
    }
}

/// Returns whether this host has a render node.
pub fn has_render_node() -> bool {
    let is_node = |entry: DirEntry| entry.file_name().as_encoded_bytes().starts_with(b"renderD");
    std::fs::read_dir("/dev/dri").is_ok_and(|entries| entries.flatten().any(is_node))
}

fn open(node: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(node)
}

/// Records that a fence, and all before it, have signalled.
extern "C" fn write_fence(cookie: *mut c_void, fence: u32) {
    // SAFETY: the cookie is the renderer's, which outlives all calls of the library.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    cookie.fence.store(fence, Ordering::Relaxed);
}

/// Opens the render node. The library owns the file.
extern "C" fn get_drm_fd(cookie: *mut c_void) -> c_int {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    match cookie.node.as_deref().map(open) {
        Some(Ok(file)) => file.into_raw_fd(),
        _ => -1,
    }
}
