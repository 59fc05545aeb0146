// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs that are installed: one line each.

use vhost_device_common::device::Device;
use vhost_device_common::program;

/// A program of this workspace.
pub struct Program {
    /// What it is called.
    pub name: &'static str,
    /// The package that has it.
    pub package: &'static str,
    /// Its command line.
    pub command: fn() -> clap::Command,
    /// What device it is, in the schema's terms. None for a tool.
    pub device: Option<&'static str>,
    /// SIGHUP has it look again at what its options name.
    pub reloads: bool,
    /// It, or a library of it, compiles code while it runs.
    pub makes_code: bool,
}

/// All programs that are installed.
pub const PROGRAMS: &[Program] = &[
    device::<vhost_device_block::Block>(),
    Program {
        makes_code: true,
        ..device::<vhost_device_gpu::Gpu>()
    },
    device::<vhost_device_input::Input>(),
    device::<vhost_device_rng::Rng>(),
    Program {
        name: "vhost-user-discover",
        package: "vhost-user-discovery",
        command: vhost_user_discovery::program::command,
        device: None,
        reloads: false,
        makes_code: false,
    },
];

/// A device is built from the package of its name.
const fn device<D: Device>() -> Program {
    Program {
        name: D::PROGRAM,
        package: D::PROGRAM,
        command: program::command::<D>,
        device: Some(D::TYPE),
        reloads: D::RELOADS,
        makes_code: false,
    }
}
