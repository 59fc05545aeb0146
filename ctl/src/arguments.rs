// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{CommandFactory, Parser, ValueHint};

/// Name of the program.
pub const NAME: &str = "vhost-device-ctl";
/// Lists the commands of the device.
pub const HELP: &str = "help";
/// Prints events until the back-end exits.
pub const EVENTS: &str = "events";

/// The commands of every device, and those of this program: shells complete them.
const KNOWN: &[(&str, &str)] = &[
    (
        HELP,
        "List the commands of the device, with their arguments",
    ),
    (EVENTS, "Print events until the back-end exits"),
    (
        "query",
        "Show the program, its front-end, its queues and its counters",
    ),
    ("query-commands", "The list of commands, for programs"),
    (
        "log-level",
        "Set the log level: error, warn, info, debug, trace or off",
    ),
    (
        "reload",
        "Examine the files named by the options again (block, scsi)",
    ),
    ("quit", "Finish the requests in flight and exit"),
];

/// Send a command to a vhost-device back-end that was started with --control-socket.
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version,
    after_help = "`vhost-device-ctl SOCKET help` lists the commands of the device at SOCKET. Exit status: 0 if the command succeeded, \
        1 if it failed or the back-end cannot be reached, 2 for a usage error."
)]
pub struct Options {
    /// Print the answer as the back-end sends it: one line of JSON.
    #[arg(long)]
    pub json: bool,

    /// Pass PATH to the back-end as an open file. Can be repeated; few commands take files.
    ///
    /// The file is opened for reading and writing, or only for reading where writing is not permitted.
    #[arg(long = "file", value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub files: Vec<PathBuf>,

    /// The path that was given to the back-end as --control-socket.
    #[arg(value_name = "SOCKET", value_hint = ValueHint::AnyPath)]
    pub socket: PathBuf,

    /// What to do. A device can have more commands than these. Without a command, list them.
    #[arg(value_name = "COMMAND", value_parser = CommandName)]
    pub command: Option<String>,

    /// Arguments of the command, as NAME=VALUE, or as VALUE in the order in which help lists them.
    #[arg(value_name = "ARGUMENT")]
    pub arguments: Vec<String>,
}

/// The command line, for help, manual pages and shell completions.
pub fn command() -> clap::Command {
    Options::command()
}

/// Accepts the name of any command, and lists the known ones.
#[derive(Clone, Debug)]
struct CommandName;

impl TypedValueParser for CommandName {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let values = KNOWN.iter();
        Some(Box::new(
            values.map(|(name, help)| PossibleValue::new(*name).help(*help)),
        ))
    }
}
