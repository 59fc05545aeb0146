// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A running back-end, and its consumption.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::{PATIENCE, ProcessError, Program, Signal};

/// A running back-end.
#[derive(Debug)]
pub struct Running {
    /// Time from the start of the program to the connection.
    pub ready: Duration,
    program: Program,
    stream: Option<UnixStream>,
}

impl Running {
    /// Starts `command` and waits until `socket` takes a connection, without making more than one.
    pub fn start(command: &mut Command, socket: &Path) -> Result<Self, ProcessError> {
        let started = Instant::now();
        let mut program = Program::spawn(command)?;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < PATIENCE && program.status()?.is_none() => {
                    std::thread::sleep(Duration::from_micros(20));
                }
                // Does not wait any longer: this creates the error that names the program and includes its stderr.
                Err(_) => {
                    program.wait_until("listen on its socket", Duration::ZERO, || Ok(false))?;
                    unreachable!("the condition never holds");
                }
            }
        };
        Ok(Running {
            ready: started.elapsed(),
            program,
            stream: Some(stream),
        })
    }

    /// Returns the connection that was made at the start. It can be taken once.
    pub fn take_stream(&mut self) -> UnixStream {
        self.stream.take().expect("taken once")
    }

    /// Returns CPU time that all threads of the process, ended ones too, have used so far.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        let mut clock = 0;
        // SAFETY: the call writes the clock id to a live variable.
        let result = unsafe { libc::clock_getcpuclockid(self.program.id() as i32, &mut clock) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes the time to a live variable.
        if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    /// Most memory that was resident at any time (guest memory that it mapped and touched included), in bytes.
    pub fn peak_resident(&self) -> Result<u64, ProcessError> {
        self.program.peak_resident_bytes()
    }

    /// Returns the anonymous memory that is resident now: the pages that the process itself needs, in bytes.
    pub fn own_resident(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program.id()))?;
        status
            .lines()
            .find_map(|line| {
                line.strip_prefix("RssAnon:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .map(|kibibytes: u64| kibibytes * 1024)
            .ok_or_else(|| io::Error::other("no RssAnon in the status of the process"))
    }

    /// Returns its stderr, to be shown with an error.
    pub fn stderr(&self) -> String {
        self.program.stderr()
    }

    /// Ends it.
    pub fn end(mut self) -> Result<(), ProcessError> {
        drop(self.stream.take());
        self.program.end(Signal::TERM, PATIENCE)?;
        Ok(())
    }
}
