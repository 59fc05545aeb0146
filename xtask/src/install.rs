// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask install`: the programs, and what the rest of a host has to know of them.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use clap_complete::Shell;
use tempfile::NamedTempFile;
use vhost_user_discovery::schema::{VHostUserBackendType, VhostUserBackend};

use crate::manual;
use crate::programs::{PROGRAMS, Program};
use crate::progress::Progress;
use crate::workspace::{cargo, target_directory, workspace};

const SOCKET_UNIT: &str = include_str!("../../systemd/vhost-device@.socket");
const SERVICE_UNIT: &str = include_str!("../../systemd/vhost-device@.service");
/// What the service unit has for a program that SIGHUP does not end.
const RELOAD: &str = "ExecReload=kill -HUP $MAINPID\n";
/// What it has for one that makes no code while it runs.
const NO_NEW_CODE: &str = "MemoryDenyWriteExecute=yes\n";
const LICENCES: &[&str] = &["LICENSE-APACHE", "LICENSE-BSD-3-Clause"];

/// Where libvirt, which has these names built in, looks for descriptors.
const SEEN_BY_LIBVIRT: &[&str] = &["/usr/share/qemu/vhost-user", "/etc/qemu/vhost-user"];

#[derive(Args, Debug)]
pub struct Options {
    /// Directory below which all is installed
    #[arg(long, value_name = "DIR", default_value = "/usr/local", value_parser = absolute)]
    prefix: PathBuf,

    /// Write below DIR as if it were the root directory; what is written does not name it
    ///
    /// For packages and tests.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,

    /// Directory for the descriptors, by which management software finds the devices [default: PREFIX/share/qemu/vhost-user]
    ///
    /// libvirt looks in /usr/share/qemu/vhost-user and /etc/qemu/vhost-user only, whatever the prefix is.
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    descriptors: Option<PathBuf>,

    /// Put the devices into DIR/vhost-device instead of PREFIX/bin
    ///
    /// Where AppArmor is on, libvirt may start those in /usr/bin only, until its profile names others.
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    libexecdir: Option<PathBuf>,
}

/// A directory whose name needs no quoting, wherever it is written.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let has_parent = path.components().any(|part| part.as_os_str() == "..");
    let is_special = |c: char| c.is_whitespace() || c.is_control() || "\"'\\$%".contains(c);
    if !path.is_absolute() || has_parent || text.contains(is_special) {
        return Err(
            "must be an absolute path, without `..`, spaces, quotes, `\\`, `$` and `%`".to_owned(),
        );
    }
    // As the components are: without doubled or trailing slashes.
    Ok(path.components().collect())
}

/// Where files of each kind go.
#[derive(Clone, Debug)]
pub struct Directories {
    pub tools: PathBuf,
    pub devices: PathBuf,
    pub descriptors: PathBuf,
    pub manual: PathBuf,
    pub bash: PathBuf,
    pub zsh: PathBuf,
    pub fish: PathBuf,
    pub units: PathBuf,
    pub documents: PathBuf,
}

impl Directories {
    /// The conventional ones.
    pub fn below(prefix: &Path) -> Self {
        Self {
            tools: prefix.join("bin"),
            // As libvirt's AppArmor profile wants it, with the prefix /usr.
            devices: prefix.join("bin"),
            descriptors: prefix.join("share/qemu/vhost-user"),
            manual: prefix.join("share/man/man1"),
            bash: prefix.join("share/bash-completion/completions"),
            zsh: prefix.join("share/zsh/site-functions"),
            fish: prefix.join("share/fish/vendor_completions.d"),
            units: prefix.join("lib/systemd/system"),
            documents: prefix.join("share/doc/vhost-device"),
        }
    }
}

/// A file to install.
struct File {
    /// Where it will be used.
    path: PathBuf,
    content: Vec<u8>,
    mode: u32,
}

impl File {
    fn text(path: PathBuf, content: impl Into<Vec<u8>>) -> Self {
        Self {
            path,
            content: content.into(),
            mode: 0o644,
        }
    }

    /// Writes it below `root`. What is at its place is replaced at once, or not at all.
    fn write(&self, root: &Path) -> Result<(), String> {
        let path = below(root, &self.path);
        let write = || -> std::io::Result<()> {
            let directory = path.parent().unwrap_or(root);
            make_directory(directory)?;
            let mut file = NamedTempFile::new_in(directory)?;
            file.write_all(&self.content)?;
            file.as_file()
                .set_permissions(Permissions::from_mode(self.mode))?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|error| format!("cannot install {}: {error}", path.display()))
    }
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Makes a directory that all may read, and those that it is in.
fn make_directory(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    fs::create_dir(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o755))
}

pub fn run(progress: &Progress, options: &Options) -> Result<(), String> {
    let mut directories = Directories::below(&options.prefix);
    if let Some(descriptors) = &options.descriptors {
        directories.descriptors.clone_from(descriptors);
    }
    if let Some(libexec) = &options.libexecdir {
        directories.devices = libexec.join("vhost-device");
    }
    let root = options.destdir.as_deref().unwrap_or(Path::new("/"));
    install(progress, &directories, root)?;
    let descriptors = &directories.descriptors;
    if !SEEN_BY_LIBVIRT
        .iter()
        .any(|seen| descriptors == Path::new(seen))
    {
        progress.step(&format!(
            "libvirt does not look into {}; use --descriptors={} if it is to find the devices",
            descriptors.display(),
            SEEN_BY_LIBVIRT.join(" or ")
        ));
    }
    Ok(())
}

/// Builds all, and writes it below `root`.
pub fn install(progress: &Progress, directories: &Directories, root: &Path) -> Result<(), String> {
    let mut build = cargo(["build", "--release", "--bins"]);
    for program in PROGRAMS {
        build.args(["--package", program.package]);
    }
    progress.run("Building the release binaries", &mut build)?;
    let mut files = Vec::new();
    for program in PROGRAMS {
        add(program, directories, &mut files)?;
    }
    for name in LICENCES {
        let path = directories.documents.join(name);
        files.push(File::text(path, read(&workspace().join(name))?));
    }
    for file in files {
        progress.step(&format!("Installing {}", below(root, &file.path).display()));
        file.write(root)?;
    }
    Ok(())
}

/// Adds what belongs to one program.
fn add(program: &Program, directories: &Directories, files: &mut Vec<File>) -> Result<(), String> {
    let built = target_directory().join("release").join(program.name);
    let home = match program.device {
        Some(_) => &directories.devices,
        None => &directories.tools,
    };
    let binary = home.join(program.name);
    files.push(File {
        path: binary.clone(),
        content: read(&built)?,
        mode: 0o755,
    });
    if let Some(device) = program.device {
        // One descriptor of a type that it does not know makes libvirt refuse all back-ends.
        if VHostUserBackendType::from_name(device).is_some() {
            let path = directories
                .descriptors
                .join(format!("50-{}.json", program.name));
            files.push(File::text(path, descriptor(&built, &binary)?));
        }
        for (template, kind) in [(SOCKET_UNIT, "socket"), (SERVICE_UNIT, "service")] {
            let unit = unit(template, program, device, &binary);
            let path = directories.units.join(format!("{}@.{kind}", program.name));
            files.push(File::text(path, unit));
        }
    }
    let mut command = (program.command)().disable_help_subcommand(true);
    command.build();
    for (name, text) in manual::pages(program)? {
        files.push(File::text(directories.manual.join(name), text));
    }
    for (shell, path) in [
        (Shell::Bash, directories.bash.join(program.name)),
        (
            Shell::Zsh,
            directories.zsh.join(format!("_{}", program.name)),
        ),
        (
            Shell::Fish,
            directories.fish.join(format!("{}.fish", program.name)),
        ),
    ] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, program.name, &mut script);
        files.push(File::text(path, script));
    }
    Ok(())
}

/// A unit of a device's program.
fn unit(template: &str, program: &Program, device: &str, binary: &Path) -> String {
    let reload = if program.reloads { RELOAD } else { "" };
    let no_new_code = if program.makes_code { "" } else { NO_NEW_CODE };
    template
        .replace("@RELOAD@\n", reload)
        .replace("@NO_NEW_CODE@\n", no_new_code)
        .replace("@PROGRAM@", program.name)
        .replace("@TYPE@", device)
        .replace("@BINARY@", &binary.to_string_lossy())
}

/// What the program `built` says of itself, with the place where it is going to be.
fn descriptor(built: &Path, place: &Path) -> Result<String, String> {
    let failed = |why: String| format!("{} --print-descriptor: {why}", built.display());
    let output = Command::new(built)
        .arg("--print-descriptor")
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let mut descriptor: VhostUserBackend =
        serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))?;
    descriptor.binary = place.to_string_lossy().into_owned();
    let text =
        serde_json::to_string_pretty(&descriptor).map_err(|error| failed(error.to_string()))?;
    Ok(text + "\n")
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mesa compiles shaders, which a unit must let it do.
    #[test]
    fn only_the_gpu_may_make_code() {
        for program in PROGRAMS {
            let Some(device) = program.device else {
                continue;
            };
            let unit = unit(SERVICE_UNIT, program, device, Path::new("/usr/bin/program"));
            let denies = unit.contains("\nMemoryDenyWriteExecute=yes\n");
            assert_eq!(denies, device != "gpu", "{unit}");
            assert!(!unit.contains("@NO"), "{unit}");
        }
    }
}
