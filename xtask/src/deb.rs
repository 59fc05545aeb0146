// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask deb`: builds a Debian package of what `cargo xtask install` installs.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::install::{self, Directories};
use crate::packages::{self, PACKAGING};
use crate::progress::Progress;
use crate::workspace::target_directory;

/// The directory of the package's files, below the release binaries.
const TREE: &str = "deb";

/// The directory of the programs in the package.
const PROGRAMS: &str = "usr/bin";

const NAME: &str = "vhost-device";
/// The second number is the version of the packaging.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-1");

/// The fields of the package after its version, architecture and dependencies.
const DESCRIPTION: &str = concat!(
    "Maintainer: vhost-device developers <vhost-device@example.org>\n",
    "Section: admin\n",
    "Priority: optional\n",
    "Description: ",
    env!("CARGO_PKG_DESCRIPTION"),
    "\n",
    " Devices for virtual machines. Each device is a program that QEMU, libvirt or\n",
    " another VMM connects to by the vhost-user protocol. The guest sees a VIRTIO\n",
    " device.\n",
    " .\n",
    " The package contains the programs, their descriptors for management\n",
    " software, manual pages, shell completions and systemd unit templates.\n",
);

const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: vhost-device

Files: *
Copyright: the vhost-device developers
License: Apache-2.0 or BSD-3-Clause
 The texts of both licences are in the same directory as this file.
";

pub fn run(progress: &Progress, output: Option<PathBuf>) -> Result<(), String> {
    packages::install(progress, PACKAGING)?;
    let tree = target_directory().join("release").join(TREE);
    match fs::remove_dir_all(&tree) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(format!("cannot empty {}: {error}", tree.display()));
        }
        _ => (),
    }
    let directories = Directories {
        // Debian's zsh searches site-functions only below /usr/local.
        zsh: "/usr/share/zsh/vendor-completions".into(),
        ..Directories::below(Path::new("/usr"))
    };
    install::install(progress, &directories, &tree)?;
    write(
        &tree.join("usr/share/doc/vhost-device/copyright"),
        COPYRIGHT,
    )?;
    let programs = programs(&tree)?;
    for program in &programs {
        stdout_of(Command::new("strip").arg("--strip-unneeded").arg(program))?;
    }
    let control = format!(
        "Package: {NAME}\nVersion: {VERSION}\nArchitecture: {}\nDepends: {}\n{DESCRIPTION}",
        stdout_of(Command::new("dpkg").arg("--print-architecture"))?.trim(),
        dependencies(&programs)?
    );
    let directory = tree.join("DEBIAN");
    create(&directory)?;
    write(&directory.join("control"), &control)?;

    // dpkg-deb chooses the name of the file if the output is a directory.
    let output = match output {
        Some(output) => output,
        None => target_directory().join("debian"),
    };
    if !output.is_dir()
        && output
            .extension()
            .is_none_or(|extension| extension != "deb")
    {
        create(&output)?;
    }
    let mut pack = Command::new("dpkg-deb");
    pack.arg("--root-owner-group")
        .arg("--build")
        .args([&tree, &output]);
    progress.run("Packing", &mut pack)?;
    progress.step(&format!("The package is in {}", output.display()));
    Ok(())
}

/// Returns the programs in the tree.
fn programs(tree: &Path) -> Result<Vec<PathBuf>, String> {
    let directory = tree.join(PROGRAMS);
    let entries = fs::read_dir(&directory)
        .map_err(|error| format!("cannot read {}: {error}", directory.display()))?;
    Ok(entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect())
}

/// Returns the dependencies of the programs, in the syntax of the field `Depends`.
fn dependencies(programs: &[PathBuf]) -> Result<String, String> {
    // dpkg-shlibdeps must run in the source directory of a package.
    let source = tempfile::tempdir()
        .map_err(|error| format!("cannot create a temporary directory: {error}"))?;
    create(&source.path().join("debian"))?;
    let control = format!("Source: {NAME}\n\nPackage: {NAME}\nArchitecture: any\n");
    write(&source.path().join("debian/control"), &control)?;
    let mut command = Command::new("dpkg-shlibdeps");
    command.arg("-O").args(programs).current_dir(&source);
    let printed = stdout_of(&mut command)?;
    let fields = printed
        .lines()
        .find_map(|line| line.strip_prefix("shlibs:Depends="));
    let fields =
        fields.ok_or_else(|| format!("dpkg-shlibdeps printed no dependencies: {printed}"))?;
    Ok(fields.to_owned())
}

/// Creates a directory that is readable for all users, regardless of the umask.
fn create(directory: &Path) -> Result<(), String> {
    fs::create_dir_all(directory)
        .and_then(|()| fs::set_permissions(directory, Permissions::from_mode(0o755)))
        .map_err(|error| format!("cannot create {}: {error}", directory.display()))
}

/// Writes a file that is readable for all users, regardless of the umask.
fn write(path: &Path, content: &str) -> Result<(), String> {
    fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o644)))
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Runs a program of the host. Returns its output.
fn stdout_of(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("cannot run {name}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!(
            "{name} failed ({})\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}
