// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask deb`: what `cargo xtask install` installs, as a Debian package. What the package says of itself is in the `Cargo.toml`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::install::{self, Directories};
use crate::packages::{self, PACKAGING};
use crate::progress::Progress;
use crate::{target_directory, tool, workspace};

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
    let mut pack = Command::new(tool(progress, "cargo-deb", "3.8")?);
    pack.args(["--package", "xtask", "--no-build", "--output"])
        .arg(&output)
        .env("CARGO_TARGET_DIR", target_directory())
        .current_dir(workspace());
    progress.run("Packing", &mut pack)?;
    progress.step(&format!("The package is in {}", output.display()));
    Ok(())
}
