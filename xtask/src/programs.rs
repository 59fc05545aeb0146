// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The installed programs.

use vhost_device_common::device::Device;
use vhost_device_common::program;

/// A program of this workspace.
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// Its package.
    pub package: &'static str,
    /// Its command line.
    pub command: fn() -> clap::Command,
    /// The type of the device in QEMU's schema. None for a tool.
    pub device: Option<&'static str>,
    /// The sections of its manual page that are not generated from its command line, as roff source.
    pub manual: &'static str,
    /// What follows the generated completions for bash.
    pub bash: &'static str,
    /// It handles SIGHUP: it re-examines the files named by its options.
    pub reloads: bool,
    /// It, or a library that it loads, generates code at run time.
    pub makes_code: bool,
}

/// All installed programs.
pub const PROGRAMS: &[Program] = &[
    device::<vhost_device_block::Block>(include_str!("../../vhost-device-block/manual.roff")),
    device::<vhost_device_console::Console>(include_str!("../../vhost-device-console/manual.roff")),
    Program {
        makes_code: true,
        ..device::<vhost_device_gpu::Gpu>(include_str!("../../vhost-device-gpu/manual.roff"))
    },
    device::<vhost_device_input::Input>(include_str!("../../vhost-device-input/manual.roff")),
    device::<vhost_device_rng::Rng>(include_str!("../../vhost-device-rng/manual.roff")),
    device::<vhost_device_scsi::Scsi>(include_str!("../../vhost-device-scsi/manual.roff")),
    device::<vhost_device_vsock::Vsock>(include_str!("../../vhost-device-vsock/manual.roff")),
    device::<vhost_device_sound::Sound>(include_str!("../../vhost-device-sound/manual.roff")),
    Program {
        name: "vhost-device-ctl",
        package: "vhost-device-ctl",
        command: vhost_device_ctl::command,
        device: None,
        manual: include_str!("../../ctl/manual.roff"),
        bash: include_str!("../../ctl/completion.bash"),
        reloads: false,
        makes_code: false,
    },
    Program {
        name: "vhost-user-discover",
        package: "vhost-user-discovery",
        command: vhost_user_discovery::program::command,
        device: None,
        manual: include_str!("../../discovery/manual.roff"),
        bash: "",
        reloads: false,
        makes_code: false,
    },
];

/// Returns the entry of a device. The package has the name of the program.
const fn device<D: Device>(manual: &'static str) -> Program {
    Program {
        name: D::PROGRAM,
        package: D::PROGRAM,
        command: program::command::<D>,
        device: Some(D::TYPE),
        manual,
        bash: "",
        reloads: D::RELOADS,
        makes_code: false,
    }
}
