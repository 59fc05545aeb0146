// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands of the control socket: their description, and the check of what a client sends with them.

use std::os::fd::OwnedFd;

use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

/// Arguments of a command, by their names.
pub type Arguments = Map<String, Value>;

/// A command of the control socket (`--control-socket`).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Verb {
    /// Name, in lower case with hyphens.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub help: &'static str,
    /// Arguments that it takes.
    pub arguments: &'static [Argument],
    /// Most file descriptors that a client may pass with it.
    pub files: usize,
}

/// An argument of a [`Verb`].
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Argument {
    /// Name, in lower case with hyphens.
    pub name: &'static str,
    /// What it means, in which unit, and what happens without it.
    pub help: &'static str,
    /// Type of its value.
    pub r#type: ArgumentType,
    /// The command can be used without it.
    pub optional: bool,
}

/// Type of the value of an [`Argument`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ArgumentType {
    /// Text.
    String,
    /// An integer from 0 to 2^64 - 1.
    Number,
    /// `true` or `false`.
    Boolean,
}

/// Why a command failed.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The command does not exist.
    #[error("there is no command {0:?}; query-commands lists those of this device")]
    NotFound(String),
    /// The command failed, for this reason (one line).
    #[error("{0}")]
    Failed(String),
}

impl CommandError {
    /// Returns the class of the error in QMP.
    pub(crate) fn class(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "CommandNotFound",
            Self::Failed(_) => "GenericError",
        }
    }
}

impl Verb {
    /// Checks the arguments and files that a client sent with this command.
    ///
    /// # Errors
    /// An argument is unknown, missing or of another type, or there are too many files.
    pub(crate) fn check(
        &self,
        arguments: &Arguments,
        files: &[OwnedFd],
    ) -> Result<(), CommandError> {
        let Self { name, .. } = self;
        let failed = |text| Err(CommandError::Failed(text));
        if files.len() > self.files {
            let (most, count) = (self.files, files.len());
            return failed(format!(
                "{name} takes {most} file descriptors at most, not {count}"
            ));
        }
        let known = |key: &str| self.arguments.iter().any(|argument| argument.name == key);
        if let Some(key) = arguments.keys().find(|key| !known(key)) {
            return failed(format!("{name} has no argument {key:?}"));
        }
        for argument in self.arguments {
            match arguments.get(argument.name) {
                None if argument.optional => {}
                None => return failed(format!("{name} needs the argument {:?}", argument.name)),
                Some(value) if argument.r#type.fits(value) => {}
                Some(_) => {
                    return failed(format!(
                        "the argument {:?} of {name} must be {}",
                        argument.name,
                        argument.r#type.description()
                    ));
                }
            }
        }
        Ok(())
    }
}

impl ArgumentType {
    fn fits(self, value: &Value) -> bool {
        match self {
            Self::String => value.is_string(),
            Self::Number => value.is_u64(),
            Self::Boolean => value.is_boolean(),
        }
    }

    fn description(self) -> &'static str {
        match self {
            Self::String => "a string",
            Self::Number => "an integer from 0 to 2^64 - 1",
            Self::Boolean => "true or false",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const VERB: Verb = Verb {
        name: "set",
        help: "",
        arguments: &[
            Argument {
                name: "size",
                help: "",
                r#type: ArgumentType::Number,
                optional: false,
            },
            Argument {
                name: "force",
                help: "",
                r#type: ArgumentType::Boolean,
                optional: true,
            },
        ],
        files: 0,
    };

    #[test]
    fn arguments_are_checked_by_name_type_and_presence() {
        let check = |value: Value| {
            let checked = VERB.check(value.as_object().unwrap(), &[]);
            checked.map_err(|error| error.to_string())
        };
        assert_eq!(check(json!({"size": 1})), Ok(()));
        assert_eq!(check(json!({"size": u64::MAX, "force": true})), Ok(()));
        for (arguments, word) in [
            (json!({}), "needs the argument \"size\""),
            (json!({"size": -1}), "integer"),
            (json!({"size": "1"}), "integer"),
            (json!({"size": 1, "force": 1}), "true or false"),
            (json!({"size": 1, "colour": 1}), "no argument \"colour\""),
        ] {
            let error = check(arguments.clone()).unwrap_err();
            assert!(error.contains(word), "{arguments}: {error}");
        }
    }
}
