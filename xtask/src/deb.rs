// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask deb`: what `cargo xtask install` installs, as a Debian package.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::install::{self, Directories};
use crate::packages::{self, PACKAGING};
use crate::progress::Progress;
use crate::workspace::target_directory;

/// Where, in the directory of the release binaries, the package's files are put together.
const TREE: &str = "deb";

/// Where the programs are in it.
const PROGRAMS: &str = "usr/bin";

const NAME: &str = "vhost-device";
/// The second number is the package's own.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-1");

/// What the package says of itself, after its version, architecture and dependencies.
const DESCRIPTION: &str = concat!(
    "Maintainer: vhost-device developers <vhost-device@example.org>\n",
    "Section: admin\n",
    "Priority: optional\n",
    "Description: ",
    env!("CARGO_PKG_DESCRIPTION"),
    "\n",
    " Devices for virtual machines, each a program of its own that QEMU, libvirt\n",
    " or another VMM connects to by the vhost-user protocol. The guest sees a\n",
    " VIRTIO device.\n",
    " .\n",
    " The package has the programs, their descriptors for management software,\n",
    " manual pages, shell completions and templates of systemd units.\n",
);

const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: vhost-device

Files: *
Copyright: the vhost-device developers
License: Apache-2.0 or BSD-3-Clause
 The texts of both licences are in the directory of this file.
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
        // Debian's own; there, site-functions are below /usr/local.
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
        say(Command::new("strip").arg("--strip-unneeded").arg(program))?;
    }
    let control = format!(
        "Package: {NAME}\nVersion: {VERSION}\nArchitecture: {}\nDepends: {}\n{DESCRIPTION}",
        say(Command::new("dpkg").arg("--print-architecture"))?.trim(),
        dependencies(&programs)?
    );
    let directory = tree.join("DEBIAN");
    create(&directory)?;
    write(&directory.join("control"), &control)?;

    // dpkg-deb names the file itself where it is given a directory.
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

/// The programs in the tree.
fn programs(tree: &Path) -> Result<Vec<PathBuf>, String> {
    let directory = tree.join(PROGRAMS);
    let entries = fs::read_dir(&directory)
        .map_err(|error| format!("cannot read {}: {error}", directory.display()))?;
    Ok(entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect())
}

/// What the programs need at run time, in the form of the field `Depends`.
fn dependencies(programs: &[PathBuf]) -> Result<String, String> {
    // dpkg-shlibdeps wants to be in the source of a package.
    let source = tempfile::tempdir().map_err(|error| format!("no temporary directory: {error}"))?;
    create(&source.path().join("debian"))?;
    let control = format!("Source: {NAME}\n\nPackage: {NAME}\nArchitecture: any\n");
    write(&source.path().join("debian/control"), &control)?;
    let mut command = Command::new("dpkg-shlibdeps");
    command.arg("-O").args(programs).current_dir(&source);
    let said = say(&mut command)?;
    let fields = said
        .lines()
        .find_map(|line| line.strip_prefix("shlibs:Depends="));
    let fields = fields.ok_or_else(|| format!("dpkg-shlibdeps names no dependencies: {said}"))?;
    Ok(fields.to_owned())
}

/// Creates a directory that all can read, whatever the umask.
fn create(directory: &Path) -> Result<(), String> {
    fs::create_dir_all(directory)
        .and_then(|()| fs::set_permissions(directory, Permissions::from_mode(0o755)))
        .map_err(|error| format!("cannot create {}: {error}", directory.display()))
}

/// Writes a file that all can read, whatever the umask.
fn write(path: &Path, content: &str) -> Result<(), String> {
    fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o644)))
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// What a program of the host prints.
fn say(command: &mut Command) -> Result<String, String> {
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
