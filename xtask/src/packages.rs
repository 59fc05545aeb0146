// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs of the host that the tasks need, and the Debian packages that contain them.

use std::fs;
use std::process::Command;

use vhost_device_tests::bench;
use vhost_device_tests::guest::kernel::{Flavour, Kernel};
use vhost_device_tests::guest::{GuestError, QEMU, agent, dbus, find_program};
use vhost_device_tests::uml;

use crate::progress::Progress;

/// The oldest QEMU that the tests and the demo support. Debian 12 has it in its backports.
const QEMU_MAJOR: u32 = 10;

/// A program, and the package that contains it.
pub type Need = (&'static str, &'static str);

/// For guests.
pub const GUEST: &[Need] = &[
    (QEMU, "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("modprobe", "kmod"),
    ("xz", "xz-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("fio", "fio"),
    ("socat", "socat"),
];

/// For guests with a display: a program for the guest, and QEMU's D-Bus display for the tests.
pub const DISPLAY: &[Need] = &[
    ("modetest", "libdrm-tests"),
    (dbus::MODULE, "qemu-system-modules-opengl"),
];

/// For 3D: a program for the guest, the renderer for virgl, and Mesa.
pub const THREE_D: &[Need] = &[
    ("kmscube", "kmscube"),
    ("virgl_test_server", "virgl-server"),
    ("eglinfo", "mesa-utils"),
];

/// QEMU's programs for images, for comparison and for tests of locks.
pub const IMAGES: &[Need] = &[("qemu-storage-daemon", "qemu-utils")];

/// QEMU's own GPU back-end, for comparison.
pub const GPU_PEER: &[Need] = &[(bench::gpu::QEMU, "qemu-system-gui")];

/// For building a Debian package.
pub const PACKAGING: &[Need] = &[("dpkg-shlibdeps", "dpkg-dev")];

/// For checking installed files.
pub const INSTALLED: &[Need] = &[
    ("curl", "curl"),
    ("man", "man-db"),
    ("systemd-analyze", "systemd"),
];

/// For building User-Mode Linux, and for the tests in it.
pub const USER_MODE_LINUX: &[Need] = &[
    ("gcc", "gcc"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("evtest", "evtest"),
    ("iscsi-test-cu", "libiscsi-bin"),
    ("sg_inq", "sg3-utils"),
];

/// For sound: programs for the guest, and a sound server.
pub const SOUND: &[Need] = &[
    ("aplay", "alsa-utils"),
    ("pipewire", "pipewire"),
    ("pipewire-pulse", "pipewire-pulse"),
    ("pw-record", "pipewire-bin"),
    ("wireplumber", "wireplumber"),
];

/// For building libFuzzer.
pub const FUZZING: &[Need] = &[("c++", "g++")];

/// For domains of libvirt.
pub const LIBVIRT: &[Need] = &[
    ("libvirtd", "libvirt-daemon-system"),
    ("virsh", "libvirt-clients"),
];

/// Downloads a kernel for guests if it is not in the cache.
pub fn kernel(progress: &Progress, flavour: Flavour) -> Result<Kernel, String> {
    if !Kernel::is_kept(flavour) {
        progress.step("Downloading a kernel for the guest");
    }
    with_lists(progress, || Kernel::prepare(flavour))
}

/// Downloads the source of User-Mode Linux if neither it nor the kernel is in the cache.
pub fn user_mode_linux(progress: &Progress) -> Result<(), String> {
    if uml::kernel::is_kept() {
        return Ok(());
    }
    progress.step("Downloading the source of User-Mode Linux");
    with_lists(progress, uml::kernel::source).map(drop)
}

/// Downloads QEMU's guest agent if it is neither installed nor in the cache.
pub fn guest_agent(progress: &Progress) -> Result<(), String> {
    with_lists(progress, agent::prepare).map(drop)
}

/// Makes an attempt to download something. If it fails, updates the package lists, which may be missing or outdated, and makes another.
fn with_lists<T>(
    progress: &Progress,
    attempt: impl Fn() -> Result<T, GuestError>,
) -> Result<T, String> {
    match attempt() {
        Err(_) if is_root() => {
            progress.run("Updating the package lists", &mut apt(&["update"]))?;
            attempt()
        }
        result => result,
    }
    .map_err(|error| error.to_string())
}

/// Installs the packages of missing programs. Without root privileges, fails with the command that installs them.
pub fn install(progress: &Progress, needs: &[Need]) -> Result<(), String> {
    let missing: Vec<&str> = needs
        .iter()
        .filter(|(program, _)| !is_usable(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let release = debian_release();
    // Packages that depend on the backports of QEMU and libdrm must come from the backports too. QEMU brings PipeWire's library.
    let from_backports = |name: &&str| {
        let of_backports = ["qemu", "libdrm", "pipewire"];
        of_backports.iter().any(|start| name.starts_with(start))
    };
    let backports = release == "bookworm" && missing.iter().any(from_backports);
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    let suite = format!("{release}-backports");
    let list = format!("/etc/apt/sources.list.d/{suite}.list");
    if backports {
        install.extend(["--target-release", suite.as_str()]);
    }
    install.extend(&missing);
    let update = || progress.run("Updating the package lists", &mut apt(&["update"]));
    if is_root() {
        update()?;
    }
    let source = match backports {
        true => source_to_add(&index_targets()?, &release, &suite)?,
        false => None,
    };
    if !is_root() {
        let add = source.map_or(String::new(), |source| {
            format!("echo '{source}' > {list} && ")
        });
        return Err(format!(
            "missing packages: {}; run this as root, then try again:\n\n    {add}apt-get update && apt-get {}\n",
            missing.join(", "),
            install.join(" ")
        ));
    }
    if let Some(source) = source {
        progress.step(&format!("Adding to apt's sources: {source}"));
        fs::write(&list, format!("{source}\n"))
            .map_err(|error| format!("cannot write {list}: {error}"))?;
        update()?;
    }
    progress.run(
        &format!("Installing {}", missing.join(", ")),
        &mut apt(&install),
    )
}

fn is_usable(program: &str) -> bool {
    let Some(path) = find_program(program) else {
        return false;
    };
    let output = |program: &mut Command| {
        let output = program
            .output()
            .ok()
            .filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    match program {
        "qemu-system-x86_64" | "qemu-storage-daemon" => {
            let version = output(Command::new(path).arg("--version"));
            version.as_deref().and_then(major) >= Some(QEMU_MAJOR)
        }
        // The guest has no libraries, so BusyBox must be linked statically. `ldd` fails if it is.
        "busybox" => output(Command::new("ldd").arg(path)).is_none(),
        _ => true,
    }
}

/// Returns the first number in the output of `--version`.
fn major(version: &str) -> Option<u32> {
    let number = version.split(|c: char| !c.is_ascii_digit());
    number.filter_map(|number| number.parse().ok()).next()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn apt(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Waits if another apt is running.
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(arguments);
    command
}

/// Returns the code name of Debian's release, such as `bookworm`.
fn debian_release() -> String {
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    system
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or_default()
        .into()
}

/// Returns the package lists of apt, one per line: `codename|origin|component|mirror`.
fn index_targets() -> Result<String, String> {
    let format = "$(CODENAME)|$(ORIGIN)|$(COMPONENT)|$(REPO_URI)";
    let mut command = apt(&["indextargets", "--format", format, "Created-By: Packages"]);
    let output = command.output();
    let output = output.map_err(|error| format!("cannot run apt-get: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns the source to add if apt does not have `suite`. It uses the mirror of Debian's `release` on this host.
fn source_to_add(targets: &str, release: &str, suite: &str) -> Result<Option<String>, String> {
    let is_suite = |line: &str| line.split('|').next() == Some(suite);
    if targets.lines().any(is_suite) {
        return Ok(None);
    }
    let before = format!("{release}|Debian|main|");
    let mut mirrors = targets
        .lines()
        .filter_map(|line| line.strip_prefix(&before));
    let mirror = mirrors.next().ok_or_else(|| {
        format!("apt does not have the package lists of Debian {release}: run `apt-get update`, or add {suite} to its sources")
    })?;
    Ok(Some(format!("deb {mirror} {suite} main")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_the_first_number() {
        let version = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)";
        assert_eq!(major(version), Some(10));
        assert_eq!(major("unknown"), None);
    }

    #[test]
    fn backports_use_the_mirror_of_the_host() {
        let targets = "nodistro|. nodistro|main|https://deb.nodesource.com/node_20.x/\n\
            bookworm|Docker|main|https://download.docker.com/linux/debian/\n\
            bookworm-security|Debian|main|http://security.mirror.example/\n\
            bookworm|Debian|contrib|http://other.example/debian/\n\
            bookworm|Debian|main|http://mirror.example/debian/\n";
        assert_eq!(
            source_to_add(targets, "bookworm", "bookworm-backports"),
            Ok(Some(
                "deb http://mirror.example/debian/ bookworm-backports main".into()
            ))
        );
    }

    #[test]
    fn existing_backports_are_not_added() {
        let targets = "bookworm|Debian|main|http://mirror.example/debian/\n\
            bookworm-backports|Debian Backports|main|http://mirror.example/debian/\n";
        assert_eq!(
            source_to_add(targets, "bookworm", "bookworm-backports"),
            Ok(None)
        );
    }

    #[test]
    fn missing_package_lists_are_an_error() {
        let refusal = source_to_add("", "bookworm", "bookworm-backports").unwrap_err();
        assert!(refusal.contains("apt-get update"), "{refusal}");
    }
}
