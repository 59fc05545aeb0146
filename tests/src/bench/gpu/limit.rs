// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The upper limit for back-ends of this kind: each frame is copied once, and written to the display's socket.

use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::display::{Display, UPDATE, UPDATE_SIZE};
use super::load::{Load, Measured};
use super::{Cpus, pin};
use crate::front_end::GuestMemory;

/// Measures it. This thread acts as the back-end.
pub fn run(load: &Load, cpus: Cpus, warm_up: Duration, window: Duration) -> io::Result<Measured> {
    let (display, mut socket) = Display::new(cpus.others)?;
    pin(cpus.back_end)?;
    let size = load.item_bytes() as usize;
    let memory = GuestMemory::new(&[(0, size)]);
    memory.fill(0, size, 0xa5);
    let mut frame = vec![0; size];
    let words = [UPDATE, 0, UPDATE_SIZE + size as u32, 0, 0, 0, 0, 0];
    let head = words.map(u32::to_ne_bytes).concat();
    let mut frames = 0;
    let mut show_for = |time: Duration| -> io::Result<Measured> {
        let (before, start, cpu) = (frames, Instant::now(), cpu_time());
        while start.elapsed() < time {
            memory.read(0, &mut frame);
            write_all(&mut socket, &head, &frame)?;
            frames += 1;
        }
        Ok(Measured {
            items: frames - before,
            time: start.elapsed(),
            cpu: cpu_time().saturating_sub(cpu),
        })
    };
    show_for(warm_up)?;
    let measured = show_for(window)?;
    display.wait_shown(frames * size as u64)?;
    Ok(measured)
}

fn write_all(socket: &mut UnixStream, head: &[u8], frame: &[u8]) -> io::Result<()> {
    let sent = socket.write_vectored(&[IoSlice::new(head), IoSlice::new(frame)])?;
    match sent.checked_sub(head.len()) {
        Some(sent) => socket.write_all(&frame[sent..]),
        None => {
            socket.write_all(&head[sent..])?;
            socket.write_all(frame)
        }
    }
}

/// Returns CPU time of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
