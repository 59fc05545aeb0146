// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the control socket: those of every device, and those that a device adds.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use log::LevelFilter;
use serde_json::{Map, Value, json};

use crate::device::Device;
use crate::statistics::{QueueNumbers, QueueStatus, Statistics};
use crate::stderr;
use crate::verb::{Argument, ArgumentType, Arguments, CommandError, Verb};

const QUERY: &str = "query";
const QUERY_COMMANDS: &str = "query-commands";
const CAPABILITIES: &str = "qmp_capabilities";
const LOG_LEVEL: &str = "log-level";
const RELOAD: &str = "reload";
const QUIT: &str = "quit";

/// The commands of every device.
const COMMON: &[Verb] = &[
    verb(
        QUERY,
        "Show the program, its front-end, its queues and its counters",
    ),
    verb(
        QUERY_COMMANDS,
        "List the commands of this device, with their arguments",
    ),
    Verb {
        arguments: &[Argument {
            name: "level",
            help: "error, warn, info, debug, trace or off; without it, only show the level",
            r#type: ArgumentType::String,
            optional: true,
        }],
        ..verb(LOG_LEVEL, "Set the log level until the program exits")
    },
    verb(
        QUIT,
        "Finish the requests in flight and exit, as SIGTERM does",
    ),
];

/// The command of devices that reload.
const RELOAD_VERB: Verb = verb(
    RELOAD,
    "Examine the files named by the options again, as SIGHUP does",
);

/// The negotiation of QMP, which other clients can omit. It is not listed, because people do not need it.
const CAPABILITIES_VERB: Verb = verb(CAPABILITIES, "Negotiate capabilities, and receive events");

const fn verb(name: &'static str, help: &'static str) -> Verb {
    Verb {
        name,
        help,
        arguments: &[],
        files: 0,
    }
}

/// Executes commands on the control thread. No command waits for a queue or a front-end.
pub struct Commands<D> {
    device: Weak<D>,
    statistics: Arc<Statistics>,
    /// The command `quit` was executed.
    pub quits: bool,
}

impl<D: Device> Commands<D> {
    pub fn new(device: Weak<D>, statistics: Arc<Statistics>) -> Self {
        Self {
            device,
            statistics,
            quits: false,
        }
    }

    /// Executes a command of a client.
    ///
    /// # Errors
    /// The command does not exist, its arguments are wrong, or it failed.
    pub fn execute(
        &mut self,
        name: &str,
        arguments: &Arguments,
        files: Vec<OwnedFd>,
    ) -> Result<Value, CommandError> {
        if name == CAPABILITIES {
            return negotiate(arguments);
        }
        let verb = verbs::<D>().find(|verb| verb.name == name);
        let verb = verb.ok_or_else(|| CommandError::NotFound(name.to_owned()))?;
        verb.check(arguments, &files)?;
        match name {
            QUERY => self.query(),
            QUERY_COMMANDS => to_value(&verbs::<D>().collect::<Vec<_>>()),
            LOG_LEVEL => log_level(arguments),
            RELOAD if D::RELOADS => {
                self.device()?.reload();
                Ok(json!({}))
            }
            QUIT => {
                self.quits = true;
                Ok(json!({}))
            }
            _ => self.device()?.command(name, arguments, files),
        }
    }

    fn device(&self) -> Result<Arc<D>, CommandError> {
        let ends = || CommandError::Failed("the program is about to exit".to_owned());
        self.device.upgrade().ok_or_else(ends)
    }

    fn query(&self) -> Result<Value, CommandError> {
        let front_end = self.statistics.front_end();
        let states = front_end.iter().flat_map(|front_end| &front_end.queues);
        let numbers = self.statistics.queue_numbers();
        let queues = queues(&states.copied().collect::<Vec<_>>(), &numbers)?;
        Ok(json!({
            "program": D::PROGRAM,
            "version": D::VERSION,
            "type": D::TYPE,
            "pid": std::process::id(),
            "log-level": level_name(stderr::level()),
            "num-queues": self.device()?.num_queues(),
            "front-ends-so-far": self.statistics.front_ends(),
            "front-end": front_end.map(|front_end| json!({
                "features": front_end.features,
                "protocol-features": front_end.protocol_features,
            })),
            "queues": queues,
            "requests": to_value(&self.statistics.request_numbers())?,
        }))
    }
}

fn verbs<D: Device>() -> impl Iterator<Item = &'static Verb> {
    let reload = D::RELOADS.then_some(&RELOAD_VERB);
    COMMON.iter().chain(reload).chain(D::VERBS)
}

/// Returns the state and the counters of each queue that is set up or was started before.
fn queues(states: &[QueueStatus], numbers: &[QueueNumbers]) -> Result<Vec<Value>, CommandError> {
    let last = numbers.last().map_or(0, |last| usize::from(last.queue) + 1);
    let mut queues = Vec::new();
    for index in 0..states.len().max(last) {
        let state = states.get(index).filter(|state| state.size > 0);
        let numbers = numbers
            .iter()
            .find(|numbers| usize::from(numbers.queue) == index);
        if state.is_none() && numbers.is_none() {
            continue;
        }
        let mut queue = Map::new();
        queue.insert("queue".to_owned(), index.into());
        for part in [to_value(&state)?, to_value(&numbers)?] {
            if let Value::Object(members) = part {
                queue.extend(members);
            }
        }
        queues.push(queue.into());
    }
    Ok(queues)
}

/// Negotiates capabilities: none is supported.
fn negotiate(arguments: &Arguments) -> Result<Value, CommandError> {
    let mut arguments = arguments.clone();
    let enabled = arguments.remove("enable");
    CAPABILITIES_VERB.check(&arguments, &[])?;
    match enabled {
        None => Ok(json!({})),
        Some(Value::Array(names)) if names.is_empty() => Ok(json!({})),
        Some(_) => Err(CommandError::Failed(
            "no capability is supported".to_owned(),
        )),
    }
}

fn log_level(arguments: &Arguments) -> Result<Value, CommandError> {
    if let Some(wanted) = arguments.get("level").and_then(Value::as_str) {
        let level = wanted.parse::<LevelFilter>().map_err(|_| {
            CommandError::Failed(format!(
                "{wanted:?} is not a log level; use error, warn, info, debug, trace or off"
            ))
        })?;
        stderr::set_level(level);
        log::info!("the log level is {}", level_name(level));
    }
    Ok(json!({"level": level_name(stderr::level())}))
}

fn level_name(level: LevelFilter) -> String {
    level.as_str().to_ascii_lowercase()
}

fn to_value(value: &impl serde::Serialize) -> Result<Value, CommandError> {
    serde_json::to_value(value).map_err(|error| CommandError::Failed(error.to_string()))
}
