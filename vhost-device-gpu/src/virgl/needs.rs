// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What virglrenderer and the drivers need from the sandbox. They start after the program has confined itself, load
//! libraries and compile code, in threads of their own. These lists are the result of observation; no document
//! specifies them.

use std::path::{Path, PathBuf};

use vhost_device_common::device::{Access, Call, Needs};

/// Directories of libraries, and files that libraries read.
const READ: [&str; 14] = [
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/run/opengl-driver",
    "/etc/ld.so.cache",
    "/etc/drirc",
    "/etc/glvnd",
    "/etc/egl",
    // Descriptions of processors and GPUs.
    "/sys/devices",
    "/sys/dev",
    "/sys/bus/pci",
    "/sys/class/drm",
];
/// GPUs.
const READ_WRITE: [&str; 1] = ["/dev/dri"];
/// Environment variables that name more directories of libraries.
const LIBRARY_PATHS: [&str; 2] = ["LD_LIBRARY_PATH", "LIBGL_DRIVERS_PATH"];

/// Makes Mesa keep no files. The process must have only one thread.
pub fn disable_shader_cache() {
    // SAFETY: no other thread exists that could use the environment.
    unsafe { std::env::set_var("MESA_SHADER_CACHE_DISABLE", "true") };
}

/// Types (bits 8 to 15) of the ioctls of GPUs and of dma-bufs.
const DRM_IOCTL_TYPE: u64 = b'd' as u64;
const DMABUF_IOCTL_TYPE: u64 = b'b' as u64;

/// Adds the system calls and files of the renderer. `node` is the render node of the options.
pub fn add_needs(needs: &mut Needs, node: Option<&Path>) {
    let calls = [
        libc::SYS_openat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_statfs,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_readlinkat,
        libc::SYS_getdents64,
        libc::SYS_getcwd,
        libc::SYS_lseek,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_fadvise64,
        libc::SYS_eventfd2,
        libc::SYS_epoll_create1,
        libc::SYS_timerfd_create,
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        libc::SYS_dup,
        libc::SYS_fcntl,
        // Executable memory: Mesa compiles shaders.
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mincore,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_uname,
        libc::SYS_sysinfo,
        libc::SYS_kcmp,
        libc::SYS_getcpu,
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_setscheduler,
        libc::SYS_sched_getscheduler,
        libc::SYS_sched_getparam,
        libc::SYS_getpriority,
        libc::SYS_setpriority,
    ];
    needs.queue.extend(calls.map(Call::new));
    #[cfg(target_arch = "x86_64")]
    needs.queue.extend(
        [
            libc::SYS_open,
            libc::SYS_stat,
            libc::SYS_lstat,
            libc::SYS_access,
            libc::SYS_readlink,
        ]
        .map(Call::new),
    );
    let ioctl = |group| Call::new(libc::SYS_ioctl).with_bits(1, 0xff00, group << 8);
    needs
        .queue
        .extend([DRM_IOCTL_TYPE, DMABUF_IOCTL_TYPE].map(ioctl));
    needs.queue.extend(Call::threads());

    let directories = LIBRARY_PATHS.iter().filter_map(std::env::var_os);
    let directories: Vec<PathBuf> = directories
        .flat_map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>())
        .filter(|path| path.is_absolute())
        .collect();
    let read = READ.iter().map(PathBuf::from);
    let read = read.chain(directories).map(|path| (path, Access::READ));
    let nodes = READ_WRITE.iter().map(Path::new).chain(node);
    let nodes = nodes.map(|path| (path.to_owned(), Access::READ_WRITE));
    needs.files.extend(read.chain(nodes));
}
