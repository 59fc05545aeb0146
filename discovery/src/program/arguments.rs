// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Command, CommandFactory, Parser, Subcommand};

/// Name of the program.
pub const NAME: &str = "vhost-user-discover";

/// The text after the options in the help.
const AFTER_HELP: &str = "\
Directories that are searched, from general to specific:
  /usr/share/qemu/vhost-user
  qemu/vhost-user in each directory of $XDG_DATA_DIRS (default: /usr/local/share and
  /usr/share), and in $XDG_DATA_HOME (default: $HOME/.local/share); libvirt does not
  search these
  /etc/qemu/vhost-user
  $XDG_CONFIG_HOME/qemu/vhost-user (default: $HOME/.config/qemu/vhost-user)
A file replaces the files of the same name in more general directories, and an empty file hides them. \
The files are sorted by the bytes of their names, and the first one that matches is used. This is why they \
have names like 50-qemu-gpu.json. To prefer a program, copy its descriptor to a name with a lower number.

Exit status: 0 on success; 1 on failure, or if check found a problem; 2 on a usage error; 3 if find found \
no back-end.

Examples:
  vhost-user-discover list
  vhost-user-discover find --type gpu --feature virgl
  vhost-user-discover check --root /var/lib/machines/debian";

/// Find and check the vhost-user back-ends that are installed on this host
///
/// A vhost-user back-end is a program that provides a device to a virtual machine. It is installed with a
/// descriptor: a JSON file that contains the type of the device and the path of the program. libvirt and
/// other management software search for descriptors. This program searches by the same rules.
#[derive(Debug, Parser)]
#[command(name = NAME, version, max_term_width = 100, after_long_help = AFTER_HELP)]
pub struct Arguments {
    #[command(subcommand)]
    pub task: Task,

    /// Use DIR as / for descriptors, programs and environment variables
    ///
    /// All paths, links and environment variables have the meaning that they have for a process whose root
    /// directory is DIR: with HOME=/home/me, DIR/home/me/.config is searched. The programs in DIR still run
    /// on this host, with your privileges and not confined to DIR: use --no-run unless you trust them.
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,

    /// How long a program may take to print its capabilities before it is killed
    #[arg(long, global = true, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub time_limit: Duration,
}

#[derive(Debug, Subcommand)]
pub enum Task {
    /// List the back-ends in the order in which they are preferred
    ///
    /// Runs each program with --print-capabilities to list its features. Prints a warning for a descriptor
    /// that cannot be read, or whose program does not answer.
    List(List),
    /// Print the program to use for a device
    ///
    /// It is the first program whose descriptor has the type and that has the features on this host. Runs no
    /// program without --feature. If no program matches, prints the reason for each candidate.
    Find(Find),
    /// Check the descriptors and programs for problems with libvirt
    ///
    /// Prints each problem with the file and the remedy, and nothing if there is none. A single bad
    /// descriptor can prevent libvirt from finding any back-end.
    Check(Check),
}

#[derive(Args, Debug)]
pub struct List {
    /// List only back-ends of this type, such as block, gpu, input or rng
    #[arg(long, value_name = "TYPE")]
    pub r#type: Option<String>,

    /// List only back-ends with this feature, such as virgl or read-only; can be given several times
    #[arg(long, value_name = "FEATURE", conflicts_with = "no_run")]
    pub feature: Vec<String>,

    /// Print a JSON array of objects
    ///
    /// Each object has the keys of the descriptor, the key `file` (the path of the descriptor), and either
    /// `capabilities` (what the program printed) or `error` (why there are none).
    #[arg(long)]
    pub json: bool,

    /// Do not run the programs, and list no features
    #[arg(long)]
    pub no_run: bool,
}

#[derive(Args, Debug)]
pub struct Find {
    /// The type of the device, such as block, gpu, input or rng
    #[arg(long, value_name = "TYPE")]
    pub r#type: String,

    /// A feature that the program must have, such as virgl or read-only; can be given several times
    #[arg(long, value_name = "FEATURE")]
    pub feature: Vec<String>,
}

#[derive(Args, Debug)]
pub struct Check {
    /// Do not run the programs, only check that they exist
    #[arg(long)]
    pub no_run: bool,
}

/// Returns the command line, for manual pages and shell completions.
pub fn command() -> Command {
    Arguments::command()
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|limit| (Duration::from_millis(1)..=Duration::from_secs(3600)).contains(limit))
        .ok_or_else(|| "must be a number of seconds, 0.001 to 3600".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn time_limits_are_in_seconds() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("5"), Ok(Duration::from_secs(5)));
        for text in ["", "0", "-1", "NaN", "inf", "1e300", "5s"] {
            seconds(text).unwrap_err();
        }
    }
}
