// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest can do after taking over a back-end: nearly nothing.
//!
//! The tests take over threads of the real program, and make the calls there. This needs root, and a processor whose registers
//! the tests know.

#![cfg(test)]
#![cfg(target_arch = "x86_64")]

mod attempts;
mod control_socket;
mod io_uring;
mod modes;
mod needs;
mod state;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use vhost_device_tests::front_end::{FrontEnd, Options, Queue};
use vhost_device_tests::intruder::{self, Intruder};
use vhost_device_tests::process::{self, PATIENCE, option};
use vhost_device_tests::skip::skip;
use vhost_device_tests::target::{Block, Console, Gpu, Request, Rng, Running, Scsi, Target};

/// The thread of the front-end, which has the name of the program.
const MAIN: &str = "";

/// A device, and its threads under load.
#[derive(Clone, Copy)]
struct Device {
    target: &'static dyn Target,
    options: &'static [&'static str],
    threads: &'static [&'static str],
    /// It opens files after its start, so landlock and not seccomp restricts file access.
    opens_files: bool,
    /// It creates executable memory.
    compiles: bool,
}

const BLOCK: Device = Device {
    target: &Block {
        io_engine: "io_uring",
    },
    // One thread serves all queues, on any host.
    options: &["--num-queues=1"],
    threads: &[MAIN, "control", "log", "queues"],
    opens_files: false,
    compiles: false,
};

const BLOCK_WITH_THREADS: Device = Device {
    target: &Block {
        io_engine: "threads",
    },
    threads: &[MAIN, "control", "log", "queues", "io"],
    ..BLOCK
};

const RNG: Device = Device {
    target: &Rng,
    options: &[],
    ..BLOCK
};

const CONSOLE: Device = Device {
    target: &Console,
    ..RNG
};

const GPU: Device = Device {
    target: &Gpu,
    ..RNG
};

const GPU_WITH_3D: Device = Device {
    options: &["--virgl"],
    opens_files: true,
    compiles: true,
    ..GPU
};

const SCSI: Device = Device {
    target: &Scsi,
    ..BLOCK
};

impl Device {
    /// Returns whether this host can run it and trace its threads. Skips the test if not.
    fn is_possible(&self) -> bool {
        let possible = rustix::process::geteuid().is_root()
            && self.target.is_possible()
            && (!self.compiles || has_3d());
        if !possible {
            let name = self.target.name();
            skip(&format!(
                "this host cannot run {name} as asked, or this is not root"
            ));
        }
        possible
    }

    fn start(&self) -> Scene {
        self.start_with(&|_, _| {})
    }

    /// Starts it and runs a request, so that it has all its threads.
    fn start_with(&self, configure: &dyn Fn(&Path, &mut Command)) -> Scene {
        let running = self.target.start_with(&|directory, command| {
            command.env_remove("RUST_LOG").args(self.options);
            configure(directory, command);
        });
        Scene::new(self.target, running)
    }
}

fn has_3d() -> bool {
    let mut command = process::command("vhost-device-gpu").unwrap();
    let output = command
        .arg("--print-capabilities")
        .stderr(Stdio::null())
        .output();
    String::from_utf8_lossy(&output.unwrap().stdout).contains("\"virgl\"")
}

/// A running device.
struct Scene {
    target: &'static dyn Target,
    running: Running,
    front_end: FrontEnd,
    queue: Queue,
}

impl Scene {
    fn new(target: &'static dyn Target, mut running: Running) -> Self {
        running.program.expect_anything();
        let front_end = FrontEnd::connect(&running.socket, &Options::default()).unwrap();
        let queue = front_end.queue(0, 16).unwrap();
        let mut scene = Self {
            target,
            running,
            front_end,
            queue,
        };
        scene.assert_serves();
        scene
    }

    /// Asserts that the device carries out a request.
    fn assert_serves(&mut self) {
        let mut request = Request::new(self.target, self.front_end.memory());
        self.queue.submit(&request.write(1));
        assert!(
            self.queue.wait_used(PATIENCE),
            "{}",
            self.running.program.stderr()
        );
        request.assert_done(self.queue.take_used().unwrap());
    }

    /// Returns the name of one of its threads.
    fn name(&self, thread: &str) -> String {
        match thread {
            MAIN => {
                let path = format!("/proc/{}/comm", self.running.program.id());
                fs::read_to_string(path).unwrap().trim_end().to_owned()
            }
            other => other.to_owned(),
        }
    }

    /// Takes over one of its threads.
    fn enter(&self, thread: &str) -> Intruder {
        let id = self.running.program.id();
        let thread = intruder::thread(id, &self.name(thread)).unwrap();
        Intruder::enter(id, thread).unwrap()
    }

    fn directory(&self) -> &Path {
        self.running.socket.parent().unwrap()
    }
}

/// Returns `--sandbox=MODE`.
fn mode(mode: &str) -> std::ffi::OsString {
    option("sandbox", mode)
}

/// Turns each function that takes a [`Device`] into a test for each device.
macro_rules! for_each_device {
    ($($test:ident),+ $(,)?) => {
        for_each_device!(@ block BLOCK [$($test)+]);
        for_each_device!(@ block_with_threads BLOCK_WITH_THREADS [$($test)+]);
        for_each_device!(@ console CONSOLE [$($test)+]);
        for_each_device!(@ rng RNG [$($test)+]);
        for_each_device!(@ gpu GPU [$($test)+]);
        for_each_device!(@ gpu_with_3d GPU_WITH_3D [$($test)+]);
        for_each_device!(@ scsi SCSI [$($test)+]);
    };
    (@ $module:ident $device:ident [$($test:ident)+]) => {
        mod $module {
            $(#[test] fn $test() {
                if crate::$device.is_possible() {
                    super::$test(&crate::$device);
                }
            })+
        }
    };
}
use for_each_device;
