// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the program writes to stderr: log lines, panics, and the reason why it exits.
//!
//! stderr can be a pipe without a reader, and other processes share it, so it cannot always be made non-blocking. Therefore lines go to
//! a queue in memory, and a separate thread writes them. No other thread waits for stderr: lines that do not fit into the queue are
//! dropped and counted, and the count is written in their place.

mod logger;

use std::mem::take;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::{Errno, retry_on_intr};

use crate::error::StartError;
pub use logger::{level, set_level};

/// Most bytes of lines that wait to be written. All statistics fit.
const MOST_BYTES: usize = 256 << 10;
/// Bytes that a pipe accepts without blocking once it is writable (PIPE_BUF).
const PIECE: usize = 4096;
/// How long the program waits at exit for a stderr that accepts nothing.
const PATIENCE: Duration = Duration::from_millis(100);
/// The same while stderr is writable, and the thread only waits for a processor.
const MOST_PATIENCE: Duration = Duration::from_secs(1);

/// What writes the lines.
#[derive(PartialEq, Eq)]
enum Writer {
    /// Nothing yet.
    None,
    /// The log thread, which waits for lines.
    Idle,
    /// The log thread, which is writing.
    Busy,
    /// The thread that has a line: this process has no log thread.
    Caller,
}

struct Queue {
    lines: Vec<u8>,
    /// A line was dropped since the lines were last taken. Later lines that would fit are dropped too, to keep the order.
    full: bool,
    dropped: u64,
    writer: Writer,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    lines: Vec::new(),
    full: false,
    dropped: 0,
    writer: Writer::None,
});
/// Signals that there are lines.
static FILLED: Condvar = Condvar::new();
/// Signals that all lines are written.
static WRITTEN: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts to send log lines and panics to stderr.
pub fn log(program: &'static str) {
    logger::install(program);
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.to_string().replace('\n', " ");
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?");
        print(&format!("{program}: error: thread {name} {text}"));
    }));
    if let Err(errno) = unshare() {
        log::debug!("libraries may wait for stderr: {errno}");
    }
}

/// Makes stderr non-blocking, for libraries that write to it directly. It is opened again for this process, because other processes share
/// the inherited one. Regular files do not block, and must share their position.
fn unshare() -> rustix::io::Result<()> {
    let stat = fstat(rustix::stdio::stderr())?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let own = open("/proc/self/fd/2", flags, Mode::empty())?;
        rustix::stdio::dup2_stderr(own)?;
    }
    Ok(())
}

/// Writes a line without waiting for stderr.
pub fn print(line: &str) {
    push(format!("{line}\n").as_bytes());
}

fn push(line: &[u8]) {
    let mut queue = queue();
    if queue.writer == Writer::Caller {
        drop(queue);
        write_out(line, Some(PATIENCE));
        return;
    }
    queue.full |= queue.lines.len().saturating_add(line.len()) > MOST_BYTES;
    if queue.full {
        queue.dropped = queue.dropped.saturating_add(1);
    } else {
        queue.lines.extend_from_slice(line);
    }
    drop(queue);
    FILLED.notify_one();
}

/// Starts the thread that writes the lines; it calls `confine` first. It also writes the lines that were logged before.
///
/// # Errors
/// The thread cannot be started.
pub fn start(program: &'static str, confine: fn()) -> Result<(), StartError> {
    queue().writer = Writer::Busy;
    let started = std::thread::Builder::new()
        .name("log".to_owned())
        .stack_size(128 << 10)
        .spawn(move || {
            confine();
            write_lines(program);
        });
    match started {
        Ok(_) => Ok(()),
        Err(error) => {
            queue().writer = Writer::None;
            Err(StartError(format!("cannot start a thread: {error}")))
        }
    }
}

/// Makes this process, which was forked before the log thread started, write its lines directly.
pub fn write_directly() {
    let mut queue = queue();
    queue.writer = Writer::Caller;
    queue.lines = Vec::new();
}

/// Writes lines in the log thread.
fn write_lines(program: &str) {
    loop {
        let (lines, dropped) = wait();
        let mut lost = write_out(&lines, None);
        if dropped > 0 {
            let note = format!(
                "{program}: warn: {dropped} log lines were dropped, as stderr did not take them in time\n"
            );
            let is_lost = write_out(note.as_bytes(), None) > 0;
            lost = lost.saturating_add(if is_lost { dropped } else { 0 });
        }
        let mut queue = queue();
        queue.dropped = queue.dropped.saturating_add(lost);
    }
}

/// Waits for lines. Returns them, and how many were dropped after them.
fn wait() -> (Vec<u8>, u64) {
    let mut queue = queue();
    // A line that is too long for an empty queue is reported too.
    while queue.lines.is_empty() && !queue.full {
        queue.writer = Writer::Idle;
        WRITTEN.notify_all();
        queue = FILLED.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
    queue.writer = Writer::Busy;
    queue.full = false;
    (take(&mut queue.lines), take(&mut queue.dropped))
}

/// Writes lines to stderr, and waits up to `patience` each time until it is writable. Returns how many lines were not written.
fn write_out(mut lines: &[u8], patience: Option<Duration>) -> u64 {
    while !lines.is_empty() && is_writable(patience) {
        let piece = lines.get(..PIECE).unwrap_or(lines);
        match rustix::io::write(rustix::stdio::stderr(), piece) {
            Ok(count) => lines = lines.get(count..).unwrap_or_default(),
            // stderr is non-blocking, and another process was faster.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => break,
        }
    }
    lines.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// Returns whether stderr becomes writable, or fails, within this time.
fn is_writable(patience: Option<Duration>) -> bool {
    let timeout = patience.and_then(|time| Timespec::try_from(time).ok());
    let stderr = rustix::stdio::stderr();
    let mut fds = [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)];
    retry_on_intr(|| poll(&mut fds, timeout.as_ref())) != Ok(0)
}

/// Calls [`flush`] when it is dropped, at the exit of the program.
pub struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        flush();
    }
}

/// Waits until all lines are written, or stderr accepts nothing.
pub fn flush() {
    let until = Instant::now() + MOST_PATIENCE;
    let mut queue = queue();
    loop {
        match queue.writer {
            Writer::Caller => return,
            // The thread may not have woken up yet.
            Writer::None | Writer::Idle => {
                let lines = take(&mut queue.lines);
                drop(queue);
                write_out(&lines, Some(PATIENCE));
                return;
            }
            Writer::Busy => {}
        }
        let waited = WRITTEN.wait_timeout(queue, PATIENCE);
        let timeout;
        (queue, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        let is_over = || Instant::now() >= until || !is_writable(Some(Duration::ZERO));
        if timeout.timed_out() && is_over() {
            return;
        }
    }
}
