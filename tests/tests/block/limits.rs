// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hosts with few resources: one processor, little locked memory, no more threads, an old kernel. All queues work there too.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use vhost_device_tests::front_end::block::{BlockDriver, IN, header};
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options};
use vhost_device_tests::process::Program;

use crate::config::set_writeback;
use crate::{Device, IMAGE_SIZE, PATIENCE, Variant, driver, noise, ok, skip};

/// Queues of the device, and the corresponding option.
const QUEUES: usize = 16;
const MANY: &str = "--num-queues=16";
/// The capability to lock memory without a limit.
const CAP_IPC_LOCK: libc::c_ulong = 14;

/// Changes the process of a command between fork and exec.
fn in_child(command: &mut Command, change: impl Fn() -> i32 + Send + Sync + 'static) {
    let change = move || match change() {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: what is called here makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(change) };
}

/// Makes the program run on one processor.
fn on_one_processor(command: &mut Command) {
    in_child(command, || {
        // SAFETY: a set of processors is plain memory, to which the kernel writes, and from which it reads.
        unsafe {
            let size = size_of::<libc::cpu_set_t>();
            let (mut all, mut one) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sched_getaffinity(0, size, &raw mut all);
            let first = (0..libc::CPU_SETSIZE as usize).find(|cpu| libc::CPU_ISSET(*cpu, &all));
            libc::CPU_SET(first.unwrap_or(0), &mut one);
            libc::sched_setaffinity(0, size, &raw const one)
        }
    });
}

/// Sets resource limits for the program, as a user that runs nothing else.
fn as_somebody(command: &mut Command) {
    static USERS: AtomicU32 = AtomicU32::new(0);
    let user = (1 << 30 | std::process::id() << 8) + USERS.fetch_add(1, Ordering::Relaxed);
    in_child(command, move || {
        // SAFETY: these take numbers. Files are opened as root all the same.
        unsafe {
            libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) + libc::setresuid(user, 0, 0)
        }
    });
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("only root can have limits hold for somebody else");
    }
    root
}

fn start(variant: Variant, arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Device {
    let directory = variant.directory();
    std::fs::write(directory.path().join("image"), noise(1, IMAGE_SIZE)).unwrap();
    variant.start_in(directory, arguments, prepare)
}

/// Connects with memory for the drivers of all queues.
fn connect(device: &Device) -> FrontEnd {
    device.connect_with(Options {
        memory: vec![(0, 96 << 20)],
        ..Options::default()
    })
}

fn drivers(front_end: &FrontEnd) -> Vec<BlockDriver> {
    let driver = |index| {
        let queue = front_end.queue(index, 64).unwrap();
        BlockDriver::new(front_end.memory(), queue, 1 << 16)
    };
    (0..QUEUES).map(driver).collect()
}

/// Asserts that each queue writes, flushes, and reads what it has written.
fn assert_all_work(drivers: &mut [BlockDriver], seed: u64) {
    for (index, driver) in drivers.iter_mut().enumerate() {
        let (sector, data) = (index as u64 * 8, noise(seed + index as u64, 4096));
        ok(driver.write(sector, &data).unwrap());
        ok(driver.flush().unwrap());
        assert_eq!(ok(driver.read(sector, 4096).unwrap()), data);
    }
}

/// Sets a limit for the program, as another user.
fn with_limit(command: &mut Command, resource: Resource, most: u64) {
    as_somebody(command);
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    in_child(command, move || {
        setrlimit(resource, limit).map_or(-1, |()| 0)
    });
}

fn all_requests_are_carried_out_where_no_more_threads_can_start(variant: Variant) {
    if !is_root() {
        return;
    }
    // The threads of the front-end, the log, signals, and the queue.
    let device = start(variant, &["--num-queues=1"], |command| {
        with_limit(command, Resource::Nproc, 4);
    });
    let front_end = connect(&device);
    let mut driver = driver(&front_end);
    ok(driver.write(0, &noise(2, 4096)).unwrap());
    ok(driver.discard(0, 4).unwrap());
    ok(driver.write_zeroes(4, 4, 0).unwrap());
    set_writeback(&front_end, 0);
    ok(driver.write(8, &noise(3, 4096)).unwrap());
    ok(driver.flush().unwrap());
    assert_eq!(ok(driver.read(0, 4096).unwrap()), vec![0; 4096]);
    assert_eq!(ok(driver.read(8, 4096).unwrap()), noise(3, 4096));
}

crate::for_each_engine!(all_requests_are_carried_out_where_no_more_threads_can_start);

/// Returns how many io_uring rings a program has.
fn rings(program: &Program) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", program.id())).unwrap();
    let is_ring = |path: &Path| {
        std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("io_uring"))
    };
    let files = files.map(|file| -> PathBuf { file.unwrap().path() });
    files.filter(|path| is_ring(path)).count()
}

#[test]
fn queues_share_the_ring_of_one_processor() {
    let variant = Variant::IO_URING;
    if !variant.is_possible() {
        return skip("this host has no io_uring");
    }
    let device = start(variant, &[MANY], on_one_processor);
    for connection in 0..3 {
        let front_end = connect(&device);
        let mut drivers = drivers(&front_end);
        assert_all_work(&mut drivers, connection);
        assert_eq!(rings(&device.program), 1);
        // A queue that stops leaves the others running, and starts again.
        front_end.stop(3).unwrap();
        let mut stopped = drivers.remove(3);
        assert_all_work(&mut drivers, 100 + connection);
        stopped = {
            let queue = front_end.queue(3, 64).unwrap();
            drop(stopped);
            BlockDriver::new(front_end.memory(), queue, 1 << 16)
        };
        assert_all_work(std::slice::from_mut(&mut stopped), connection);
        drivers.truncate(3);
        assert_all_work(&mut drivers, 200 + connection);
    }
}

/// The queues of a thread share the capacity of its engine.
#[test]
fn a_queue_that_is_always_full_leaves_room_to_the_others_of_its_thread() {
    let variant = Variant::IO_URING;
    if !variant.is_possible() {
        return skip("this host has no io_uring");
    }
    let device = start(variant, &["--num-queues=2", "--direct"], on_one_processor);
    let front_end = connect(&device);
    let memory = front_end.memory();
    let mut full = front_end.queue(0, 1024).unwrap();
    let queue = front_end.queue(1, 64).unwrap();
    let mut driver = BlockDriver::new(memory, queue, 1 << 16);
    driver.set_timeout(PATIENCE);
    let (readable, writable) = (memory.allocate(16, 16), memory.allocate(4097, 16));
    memory.write(readable, &header(IN, 0));
    let chain = [
        Buffer::readable(readable, 16),
        Buffer::writable(writable, 4097),
    ];
    let is_done = AtomicBool::new(false);
    let slowest = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                while full.add(&chain).is_some() {}
                full.publish();
                full.kick();
                while full.take_used().is_some() {}
            }
        });
        let answers = (0..20).map(|_| {
            let before = Instant::now();
            driver.read(0, 512).map(|_| before.elapsed())
        });
        let slowest = answers.collect::<Result<Vec<_>, _>>();
        is_done.store(true, Ordering::Relaxed);
        slowest.unwrap().into_iter().max().unwrap()
    });
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

#[test]
fn limits_hold_for_the_queues_of_a_thread_when_one_of_them_stops() {
    let variant = Variant::IO_URING;
    if !variant.is_possible() {
        return skip("this host has no io_uring");
    }
    let device = start(
        variant,
        &[MANY, "--iops=50", "--iops-burst=1"],
        on_one_processor,
    );
    let front_end = connect(&device);
    let mut drivers = drivers(&front_end);
    front_end.stop(0).unwrap();
    let begin = Instant::now();
    (0..20).for_each(|_| drop(ok(drivers[1].read(0, 512).unwrap())));
    assert!(
        begin.elapsed() > Duration::from_millis(300),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn all_queues_work_where_little_memory_may_be_locked() {
    let variant = Variant::IO_URING;
    if !variant.is_possible() {
        return skip("this host has no io_uring");
    }
    if !is_root() || !counts_rings() {
        return;
    }
    let device = start(variant, &[MANY], |command| {
        with_limit(command, Resource::Memlock, 16 << 10)
    });
    let front_end = connect(&device);
    assert_all_work(&mut drivers(&front_end), 1);
    assert_eq!(rings(&device.program), 1);
    if std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1) {
        let stderr = device.program.stderr();
        assert!(stderr.contains("only 1 of"), "{stderr}");
    }
}

#[test]
fn threads_do_the_io_where_no_memory_may_be_locked() {
    let variant = Variant::AUTO;
    if !Variant::IO_URING.is_possible() {
        return skip("this host has no io_uring");
    }
    if !is_root() || !counts_rings() {
        return;
    }
    let device = start(variant, &[MANY], |command| {
        with_limit(command, Resource::Memlock, 4096)
    });
    let front_end = connect(&device);
    assert_all_work(&mut drivers(&front_end), 1);
    let stderr = device.program.stderr();
    assert!(
        stderr.contains("RLIMIT_MEMLOCK") && stderr.contains("threads do the I/O"),
        "{stderr}"
    );
}

#[test]
fn io_uring_without_locked_memory_is_refused_with_the_reason() {
    let variant = Variant::IO_URING;
    if !variant.is_possible() {
        return skip("this host has no io_uring");
    }
    if !is_root() || !counts_rings() {
        return;
    }
    let directory = variant.directory();
    let image = directory.path().join("image");
    std::fs::write(&image, noise(1, IMAGE_SIZE)).unwrap();
    let mut command = variant.command(&image, &directory.path().join("socket"), &[]);
    with_limit(&mut command, Resource::Memlock, 4096);
    let mut program = Program::spawn(&mut command).unwrap();
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
    let stderr = program.stderr();
    assert!(
        stderr.contains("RLIMIT_MEMLOCK") && stderr.lines().count() == 1,
        "{stderr}"
    );
}

/// As on Linux 5.10, which supports restrictions: IORING_ENTER_EXT_ARG is refused.
#[test]
fn threads_do_the_io_where_io_uring_cannot_wait_for_a_time() {
    const ENTER_EXT_ARG: u64 = 1 << 3;
    if !Variant::IO_URING.is_possible() {
        return skip("this host has no io_uring");
    }
    let with_time = SeccompCondition::new(
        3,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(ENTER_EXT_ARG),
        ENTER_EXT_ARG,
    );
    let rule = SeccompRule::new(vec![with_time.unwrap()]).unwrap();
    let filter = SeccompFilter::new(
        [(libc::SYS_io_uring_enter, vec![rule])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EINVAL as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    let device = start(Variant::AUTO, &[MANY], |command| {
        in_child(command, move || apply_filter(&program).map_or(-1, |()| 0));
    });
    assert_all_work(&mut drivers(&connect(&device)), 1);
    let stderr = device.program.stderr();
    assert!(
        stderr.contains("threads do the I/O") && !stderr.contains("block: error:"),
        "{stderr}"
    );
}

/// Returns whether the kernel counts rings as locked memory, which it did not from 5.12 to 6.13.
fn counts_rings() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let counts = !((5, 12)..(6, 14)).contains(&version);
    if !counts {
        skip("this kernel does not count rings as locked memory");
    }
    counts
}
