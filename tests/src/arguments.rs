// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command lines of the programs here.

use std::process::ExitCode;

use clap::error::ErrorKind;

/// Prints the requested help, or one line that says what is wrong with the arguments. Returns the exit status.
pub fn refuse(error: &clap::Error) -> ExitCode {
    if error.exit_code() == 0 || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        error.exit();
    }
    let text = error.render().to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = message.split_whitespace().collect();
    eprintln!("{}; see --help", words.join(" "));
    ExitCode::from(2)
}
