// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask deb`: what `cargo xtask install` installs, as a Debian package. What the package says of itself is in the `Cargo.toml`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhost_device_tests::guest::find_program;

use crate::install::{self, Directories};
use crate::packages::{self, PACKAGING};
use crate::progress::Progress;
use crate::{cargo, target_directory, workspace};

/// Where, in the directory of the release binaries, cargo-deb finds the files.
const TREE: &str = "deb";

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
    let output = match output {
        Some(output) => std::path::absolute(output).map_err(|error| error.to_string())?,
        None => target_directory().join("debian"),
    };
    let mut pack = Command::new(cargo_deb(progress)?);
    pack.args(["--package", "xtask", "--no-build", "--output"])
        .arg(&output)
        .env("CARGO_TARGET_DIR", target_directory())
        .current_dir(workspace());
    progress.run("Packing", &mut pack)?;
    progress.step(&format!("The package is in {}", output.display()));
    Ok(())
}

/// Finds cargo-deb, or builds it. It is kept in the target directory.
fn cargo_deb(progress: &Progress) -> Result<PathBuf, String> {
    let tools = target_directory().join("tools");
    let program = find_program("cargo-deb").unwrap_or_else(|| tools.join("bin/cargo-deb"));
    if !program.is_file() {
        let mut install = cargo([
            "install",
            "cargo-deb",
            "--version=^3.8",
            "--locked",
            "--debug",
        ]);
        progress.run("Installing cargo-deb", install.arg("--root").arg(&tools))?;
    }
    Ok(program)
}
