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
    /// Sections of its manual page that its command line does not tell, in the language of roff.
    pub manual: &'static str,
    /// SIGHUP has it look again at what its options name.
    pub reloads: bool,
    /// It, or a library of it, compiles code while it runs.
    pub makes_code: bool,
}

/// All programs that are installed.
pub const PROGRAMS: &[Program] = &[
    device::<vhost_device_block::Block>(include_str!("../../vhost-device-block/manual.roff")),
    Program {
        makes_code: true,
        ..device::<vhost_device_gpu::Gpu>(include_str!("../../vhost-device-gpu/manual.roff"))
    },
    device::<vhost_device_input::Input>(include_str!("../../vhost-device-input/manual.roff")),
    device::<vhost_device_rng::Rng>(include_str!("../../vhost-device-rng/manual.roff")),
    Program {
        name: "vhost-user-discover",
        package: "vhost-user-discovery",
        command: vhost_user_discovery::program::command,
        device: None,
        manual: include_str!("../../discovery/manual.roff"),
        reloads: false,
        makes_code: false,
    },
];

/// A device is built from the package of its name.
const fn device<D: Device>(manual: &'static str) -> Program {
    Program {
        name: D::PROGRAM,
        package: D::PROGRAM,
        command: program::command::<D>,
        device: Some(D::TYPE),
        manual,
        reloads: D::RELOADS,
        makes_code: false,
    }
}
