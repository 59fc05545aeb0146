// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands that a device lists, and the arguments that a user types for them.

use serde_json::{Map, Value};

use crate::failure::Failure;

/// The command that lists commands.
pub const QUERY_COMMANDS: &str = "query-commands";

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub name: String,
    pub help: String,
    pub arguments: Vec<Argument>,
    /// Most files that can be passed.
    pub files: u64,
}

/// An argument of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    pub name: String,
    pub help: String,
    /// `string`, `number` or `boolean`.
    pub kind: String,
    pub optional: bool,
}

fn text(value: &Value, name: &str) -> String {
    let text = value.get(name).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn items(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

impl Command {
    /// Reads the commands from the answer to [`QUERY_COMMANDS`].
    pub fn all(list: &Value) -> Vec<Self> {
        let argument = |value: &Value| Argument {
            name: text(value, "name"),
            help: text(value, "help"),
            kind: text(value, "type"),
            optional: value.get("optional") == Some(&Value::Bool(true)),
        };
        let command = |value: &Value| Self {
            name: text(value, "name"),
            help: text(value, "help"),
            arguments: items(value.get("arguments")).map(argument).collect(),
            files: value.get("files").and_then(Value::as_u64).unwrap_or(0),
        };
        items(Some(list)).map(command).collect()
    }

    /// Returns the arguments for the device. Each typed word is NAME=VALUE, or the value of the next argument without one.
    pub fn arguments(&self, typed: &[String]) -> Result<Value, Failure> {
        let mut given = Map::new();
        for word in typed {
            let named = word.split_once('=').and_then(|(name, value)| {
                let known = self.arguments.iter().find(|argument| argument.name == name);
                known.map(|argument| (argument, value))
            });
            let next = || {
                self.arguments
                    .iter()
                    .find(|argument| !given.contains_key(&argument.name))
            };
            let (argument, value) = match named {
                Some(named) => named,
                None => (next().ok_or_else(|| self.too_many(word))?, word.as_str()),
            };
            let value = argument.value(value)?;
            if given.insert(argument.name.clone(), value).is_some() {
                let name = &argument.name;
                return Err(Failure::Usage(format!("{name} is given twice")));
            }
        }
        Ok(Value::Object(given))
    }

    fn too_many(&self, word: &str) -> Failure {
        let names: Vec<_> = self
            .arguments
            .iter()
            .map(|argument| argument.name.as_str())
            .collect();
        let takes = match names.as_slice() {
            [] => "no arguments".to_owned(),
            names => names.join(", "),
        };
        Failure::Usage(format!("{} takes {takes}; {word:?} is too many", self.name))
    }
}

impl Argument {
    fn value(&self, text: &str) -> Result<Value, Failure> {
        let value = match self.kind.as_str() {
            "number" => text.parse::<u64>().ok().map(Value::from),
            "boolean" => match text {
                "true" | "on" | "yes" => Some(true.into()),
                "false" | "off" | "no" => Some(false.into()),
                _ => None,
            },
            _ => Some(text.into()),
        };
        value.ok_or_else(|| {
            let (name, kind) = (&self.name, &self.kind);
            Failure::Usage(format!("{name} must be a {kind}, not {text:?}"))
        })
    }
}

/// Returns the command with this name.
pub fn find<'a>(commands: &'a [Command], name: &str) -> Result<&'a Command, Failure> {
    let found = commands.iter().find(|command| command.name == name);
    found.ok_or_else(|| {
        let names: Vec<_> = commands
            .iter()
            .map(|command| command.name.as_str())
            .collect();
        let names = names.join(", ");
        Failure::Usage(format!(
            "the device has no command {name:?}; use one of {names}"
        ))
    })
}

/// Returns the answer to [`QUERY_COMMANDS`], or only its part about the command with this name.
pub fn chosen(mut list: Value, name: Option<&str>) -> Result<Value, Failure> {
    if let Some(name) = name {
        find(&Command::all(&list), name)?;
        if let Some(commands) = list.as_array_mut() {
            commands.retain(|command| text(command, "name") == name);
        }
    }
    Ok(list)
}

/// Checks that a command of this program has at most `limit` arguments.
pub fn check_count(name: &str, typed: &[String], limit: usize) -> Result<(), Failure> {
    match typed.get(limit) {
        None => Ok(()),
        Some(word) => Err(Failure::Usage(format!(
            "{name} takes {}; {word:?} is too many",
            match limit {
                0 => "no arguments",
                _ => "the name of one command",
            }
        ))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn command() -> Command {
        let list = json!([{
            "name": "set", "help": "Set it", "files": 1,
            "arguments": [
                {"name": "size", "type": "number", "help": "", "optional": false},
                {"name": "force", "type": "boolean", "help": "", "optional": true},
                {"name": "label", "type": "string", "help": "", "optional": true},
            ],
        }]);
        Command::all(&list).remove(0)
    }

    fn arguments(typed: &[&str]) -> Result<Value, Failure> {
        let typed: Vec<_> = typed.iter().map(|word| (*word).to_owned()).collect();
        command().arguments(&typed)
    }

    #[test]
    fn arguments_are_named_or_in_order() {
        assert_eq!(arguments(&[]), Ok(json!({})));
        let all = json!({"size": 5, "force": true, "label": "a=b"});
        assert_eq!(arguments(&["5", "on", "a=b"]), Ok(all.clone()));
        assert_eq!(arguments(&["label=a=b", "5", "force=true"]), Ok(all));
    }

    #[test]
    fn what_does_not_fit_is_a_usage_error_that_names_it() {
        for (typed, word) in [
            (&["big"][..], "size must be a number"),
            (&["-1"], "size"),
            (&["1", "maybe"], "force must be a boolean"),
            (&["1", "size=2"], "size is given twice"),
            (&["1", "on", "x", "y"], "\"y\" is too many"),
        ] {
            match arguments(typed) {
                Err(Failure::Usage(line)) => assert!(line.contains(word), "{line}"),
                other => panic!("{typed:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_unknown_command_is_answered_with_those_that_there_are() {
        let Err(Failure::Usage(line)) = find(&[command()], "get") else {
            panic!("found");
        };
        assert!(line.contains("\"get\"") && line.contains("set"), "{line}");
    }
}
