// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Command, CommandFactory, Parser, Subcommand};

/// Name of the program.
pub const NAME: &str = "vhost-user-discover";

/// What follows the options in the help text.
const AFTER_HELP: &str = "\
Where it looks, from general to specific:
  /usr/share/qemu/vhost-user
  qemu/vhost-user in each directory of $XDG_DATA_DIRS, or in /usr/local/share, and
  in $XDG_DATA_HOME, or $HOME/.local/share (libvirt does not look there)
  /etc/qemu/vhost-user
  $XDG_CONFIG_HOME/qemu/vhost-user, or $HOME/.config/qemu/vhost-user
A file replaces those of the same name in more general directories, and an empty file hides them. \
The files are taken in the byte order of their names, and the first that fits is the one to use: hence \
names like 50-qemu-gpu.json. To prefer a program to others, copy its file to a name with a lower number.

Exit status: 0 if all is well; 1 if something failed, or check found something; 2 if the command line \
is wrong; 3 if find found nothing.

Examples:
  vhost-user-discover list
  vhost-user-discover find --type gpu --feature virgl
  vhost-user-discover check --root /var/lib/machines/debian";

/// Find the vhost-user back-ends that are installed on this host, and check them.
///
/// A back-end is a program that gives a virtual machine a device. It is installed together with a
/// descriptor, a JSON file that names the program and the type of the device, which libvirt and other
/// management software look for. This program looks for them in the same way.
#[derive(Debug, Parser)]
#[command(name = NAME, version, max_term_width = 100, after_long_help = AFTER_HELP)]
pub struct Arguments {
    #[command(subcommand)]
    pub task: Task,

    /// Take DIR as /, for descriptors, programs, and what the variables name
    ///
    /// All paths mean what they mean for a process whose root directory is DIR, links and the
    /// environment variables among them: with HOME=/home/me, DIR/home/me/.config is a home directory's.
    /// The programs in DIR run on this host all the same, outside of DIR, as the user that you are:
    /// only name a DIR whose programs you trust, or use --no-run.
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,

    /// How long a program may take to say what it can do; then it is killed
    #[arg(long, global = true, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub time_limit: Duration,
}

#[derive(Debug, Subcommand)]
pub enum Task {
    /// List the back-ends in the order in which they are preferred
    ///
    /// Each program is run with --print-capabilities to learn its features. A descriptor that cannot
    /// be read, or whose program does not answer, is a warning.
    List(List),
    /// Print the program to use for a device
    ///
    /// It is the first whose descriptor has the type, and that has the features on this host.
    /// Without --feature no program is run. If none fits, each candidate is named with the reason.
    Find(Find),
    /// Check the descriptors and programs for what libvirt would choke on
    ///
    /// Prints nothing if all is well, else each finding with the file and the remedy. One bad
    /// descriptor is enough, and libvirt finds no back-end of any type.
    Check(Check),
}

#[derive(Args, Debug)]
pub struct List {
    /// Only those for this type of device, like block, gpu, input or rng
    #[arg(long, value_name = "TYPE")]
    pub r#type: Option<String>,

    /// Only those with this feature, like virgl or read-only; may be given several times
    #[arg(long, value_name = "FEATURE", conflicts_with = "no_run")]
    pub feature: Vec<String>,

    /// Print a JSON array of objects
    ///
    /// An object has the keys of the descriptor, and: `file`, the descriptor's path; `capabilities`,
    /// what the program printed; or `error`, why there are none.
    #[arg(long)]
    pub json: bool,

    /// Do not run the programs; no features are listed
    #[arg(long)]
    pub no_run: bool,
}

#[derive(Args, Debug)]
pub struct Find {
    /// The type of the device, like block, gpu, input or rng
    #[arg(long, value_name = "TYPE")]
    pub r#type: String,

    /// A feature that it must have, like virgl or read-only; may be given several times
    #[arg(long, value_name = "FEATURE")]
    pub feature: Vec<String>,
}

#[derive(Args, Debug)]
pub struct Check {
    /// Do not run the programs; only see whether they are there
    #[arg(long)]
    pub no_run: bool,
}

/// The command line, for manual pages and shell completions.
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
