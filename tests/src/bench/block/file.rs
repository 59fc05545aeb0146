// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The load on the image itself, through io_uring and without a back-end: the limit of the file system and the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::time::{ClockId, clock_gettime};

use super::image::Image;
use super::load::{Load, Measured, Places, Window};
use crate::front_end::GuestMemory;
use crate::front_end::block::SECTOR_SIZE;

/// Runs `load` on `image`. Returns the CPU time that this process took in the window, too.
pub fn run(image: &Image, load: Load, window: Window) -> io::Result<(Measured, Duration)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if image.is_direct() { libc::O_DIRECT } else { 0 })
        .open(&image.path)?;
    let block = load.block_size as usize;
    let memory = GuestMemory::new(&[(0, block * usize::from(load.depth))]);
    let mut driver = Driver {
        ring: IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(load.depth.into())?,
        places: Places::new(&load, (image.place.size() / block) as u64, 1),
        started: vec![Instant::now(); load.depth.into()],
        file,
        memory,
        load,
    };
    let measured = driver.run(window);
    if measured.is_err() {
        // What is still in flight may write to it.
        std::mem::forget(driver.memory);
    }
    measured
}

struct Driver {
    ring: IoUring,
    file: File,
    /// A buffer for each request.
    memory: GuestMemory,
    places: Places,
    load: Load,
    /// When each request began.
    started: Vec<Instant>,
}

impl Driver {
    fn run(&mut self, window: Window) -> io::Result<(Measured, Duration)> {
        let mut measured = Measured::default();
        let mut cpu = [None; 2];
        (0..self.load.depth).try_for_each(|slot| self.add(slot))?;
        let mut in_flight = self.load.depth;
        let mut ended: Vec<cqueue::Entry> = Vec::new();
        while in_flight > 0 {
            self.ring.submit_and_wait(1)?;
            let now = Instant::now();
            for (edge, cpu) in [window.start, window.end].into_iter().zip(&mut cpu) {
                if now >= edge {
                    cpu.get_or_insert_with(cpu_time);
                }
            }
            ended.extend(self.ring.completion());
            for entry in ended.drain(..) {
                if entry.result() != self.load.block_size as i32 {
                    let what = format!("a request ended with {}", entry.result());
                    return Err(io::Error::other(what));
                }
                measured.requests += 1;
                let slot = entry.user_data() as u16;
                let start = &mut self.started[usize::from(slot)];
                if window.start <= now && now < window.end {
                    measured.latency.record((now - *start).as_nanos() as u64);
                }
                if now >= window.end {
                    in_flight -= 1;
                    continue;
                }
                *start = now;
                self.add(slot)?;
            }
        }
        let [begin, end] = cpu.map(Option::unwrap_or_default);
        Ok((measured, end.saturating_sub(begin)))
    }

    fn add(&mut self, slot: u16) -> io::Result<()> {
        let length = self.load.block_size;
        let address = u64::from(slot) * u64::from(length);
        let buffer = self.memory.host_address(address, length.into());
        let offset = self.places.next_sector() * SECTOR_SIZE as u64;
        let file = types::Fd(self.file.as_raw_fd());
        let entry = match self.load.write {
            true => opcode::Write::new(file, buffer, length)
                .offset(offset)
                .build(),
            false => opcode::Read::new(file, buffer, length)
                .offset(offset)
                .build(),
        };
        self.push(&entry.user_data(slot.into()))
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the buffer is the request's own, in memory that stays mapped until all have ended: forever after an error.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)
    }
}

/// Returns CPU time of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
