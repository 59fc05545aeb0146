// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask install`: installs the programs, with descriptors, manual pages, completions and systemd units.

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
/// The line of the service unit of a program that handles SIGHUP.
const RELOAD: &str = "ExecReload=kill -HUP $MAINPID\n";
/// The line of the service unit of a program that generates no code at run time.
const NO_NEW_CODE: &str = "MemoryDenyWriteExecute=yes\n";
const LICENCES: &[&str] = &["LICENSE-APACHE", "LICENSE-BSD-3-Clause"];

/// The directories that libvirt searches for descriptors. They cannot be configured.
const SEEN_BY_LIBVIRT: &[&str] = &["/usr/share/qemu/vhost-user", "/etc/qemu/vhost-user"];

#[derive(Args, Debug)]
pub struct Options {
    /// Install below this directory
    #[arg(long, value_name = "DIR", default_value = "/usr/local", value_parser = absolute)]
    prefix: PathBuf,

    /// Write files below DIR instead of the root directory, for packages and tests
    ///
    /// The installed files do not contain the path DIR.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,

    /// Install the descriptors, with which management software finds the devices, in DIR [default: PREFIX/share/qemu/vhost-user]
    ///
    /// libvirt searches only /usr/share/qemu/vhost-user and /etc/qemu/vhost-user.
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    descriptors: Option<PathBuf>,

    /// Install the devices in DIR/vhost-device instead of PREFIX/bin
    ///
    /// If AppArmor is enabled, libvirt can start only programs in /usr/bin, unless you add a rule to its profile.
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    libexecdir: Option<PathBuf>,
}

/// Parses the path of a directory. It must not need quoting in any of the installed files.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let has_parent = path.components().any(|part| part.as_os_str() == "..");
    let is_special = |c: char| c.is_whitespace() || c.is_control() || "\"'\\$%".contains(c);
    if !path.is_absolute() || has_parent || text.contains(is_special) {
        return Err(
            "must be an absolute path without `..`, spaces, quotes, `\\`, `$` and `%`".to_owned(),
        );
    }
    // Removes double and trailing slashes.
    Ok(path.components().collect())
}

/// The directories for each kind of files.
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
    /// Returns the conventional directories.
    pub fn below(prefix: &Path) -> Self {
        Self {
            tools: prefix.join("bin"),
            // With the prefix /usr, libvirt's AppArmor profile allows this directory.
            devices: prefix.join("bin"),
            descriptors: prefix.join("share/qemu/vhost-user"),
            manual: prefix.join("share/man"),
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
    /// Its path on the host that uses it.
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

    /// Writes the file below `root`. Replaces an existing file atomically.
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

/// Creates a directory and its parents, readable for all users.
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
            "libvirt does not search {}; use --descriptors={} if libvirt must find the devices",
            descriptors.display(),
            SEEN_BY_LIBVIRT.join(" or ")
        ));
    }
    Ok(())
}

/// Builds everything and writes it below `root`.
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
    for (name, text) in manual::OTHERS {
        files.push(page(directories, name, *text));
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

/// Adds the files of one program.
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
        // If one descriptor has an unknown type, libvirt refuses all back-ends.
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
    for (name, text) in manual::pages(program)? {
        files.push(page(directories, &name, text));
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
        files.push(File::text(path, completions(program, shell)));
    }
    Ok(())
}

/// Returns the completions of a program for a shell.
fn completions(program: &Program, shell: Shell) -> Vec<u8> {
    let mut command = (program.command)().disable_help_subcommand(true);
    command.build();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, program.name, &mut script);
    if shell == Shell::Bash {
        script.extend(program.bash.as_bytes());
    }
    script
}

/// Returns a manual page, in the directory of its section.
fn page(directories: &Directories, name: &str, text: impl Into<Vec<u8>>) -> File {
    let section = name.rsplit('.').next().unwrap_or_default();
    let directory = directories.manual.join(format!("man{section}"));
    File::text(directory.join(name), text)
}

/// Returns a unit for the program of a device.
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

/// Returns the descriptor that the program `built` prints, with the path `place`.
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

    /// Mesa compiles shaders, which the unit must allow.
    #[test]
    fn only_the_unit_of_the_gpu_allows_generated_code() {
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

    /// The commands that the device at the socket lists, beside those that every device has.
    #[test]
    fn bash_completes_the_commands_of_the_device() {
        let program = PROGRAMS
            .iter()
            .find(|program| program.name == "vhost-device-ctl");
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        fs::write(&script, completions(program.unwrap(), Shell::Bash)).unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let complete = |word: &str| {
            let test = r#"
                source "$1"
                vhost-device-ctl() { [[ $* == "$socket help" ]] && printf 'query\n    Show\nresize SIZE\n    size: the size\n'; }
                socket=$2
                COMP_WORDS=(vhost-device-ctl --json "$socket" "$3")
                COMP_CWORD=3
                [[ $(complete -p vhost-device-ctl) =~ -F\ ([^ ]+) ]]
                "${BASH_REMATCH[1]}" vhost-device-ctl "$3" "$socket"
                echo "${COMPREPLY[@]}"
            "#;
            let mut bash = Command::new("bash");
            bash.args(["-c", test, "bash"])
                .args([&script, &socket])
                .arg(word);
            let output = bash.output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stderr), "");
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(complete("re"), "reload resize\n");
        assert_eq!(complete("qu"), "query query-commands quit\n");
        assert_eq!(complete("--fi"), "--file\n");
    }
}
