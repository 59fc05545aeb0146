// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of the control socket that this device adds.

use serde_json::{Value, json};
use vhost_device_common::device::{Argument, ArgumentType, Arguments, CommandError, Verb};

use crate::client::Client;
use crate::control::Size;
use crate::log_file::LogFile;
use crate::port::Port;
use crate::state::State;

/// The commands.
pub const VERBS: &[Verb] = &[
    Verb {
        name: "query-ports",
        help: "Show the ports: where they lead to, their clients, and how many bytes were moved and missed",
        arguments: &[],
        files: 0,
    },
    Verb {
        name: "resize",
        help: "Tell the guest the size of a console in characters",
        arguments: &[
            number("columns", "characters in a row: 1 to 65535", false),
            number("rows", "rows: 1 to 65535", false),
            number("port", "number of the port; 0 by default", true),
        ],
        files: 0,
    },
];

const fn number(name: &'static str, help: &'static str, optional: bool) -> Argument {
    Argument {
        name,
        help,
        r#type: ArgumentType::Number,
        optional,
    }
}

/// Returns the answer to `query-ports`.
pub fn query_ports(state: &State) -> Value {
    let port = |port: &Port| {
        let mut value = json!({
            "port": port.number,
            "name": port.name,
            "role": if port.is_console() { "console" } else { "channel" },
            "backend": port.endpoint.kind(),
            "path": port.endpoint.path().map(|path| path.to_string_lossy()),
            "open": port.is_open(),
            "open-in-guest": port.driver.is_open || port.is_served() && !state.multiport && port.number == 0,
            "clients": port.clients().iter().filter(|client| client.is_open).map(client).collect::<Vec<_>>(),
            "files": port.files().iter().map(|one| file(port, one)).collect::<Vec<_>>(),
            "bytes-from-guest": port.counters.transmitted,
            "bytes-to-guest": port.counters.received,
            "bytes-missed": port.missed(),
            "bytes-discarded": port.counters.discarded,
        });
        if let (Some(size), Some(value)) = (port.size, value.as_object_mut()) {
            value.insert("columns".to_owned(), size.columns.into());
            value.insert("rows".to_owned(), size.rows.into());
        }
        value
    };
    state.ports.iter().map(port).collect()
}

fn client(client: &Client) -> Value {
    json!({
        "number": client.number,
        "sends": client.sends,
        "bytes-missed": client.missed,
    })
}

fn file(port: &Port, file: &LogFile) -> Value {
    json!({
        "path": file.path().to_string_lossy(),
        "bytes-pending": port.pending(file),
        "bytes-lost": file.lost(),
    })
}

/// Carries out `resize`.
///
/// # Errors
/// A number is out of range, or the port is no console.
pub fn resize(state: &mut State, arguments: &Arguments) -> Result<Value, CommandError> {
    let failed = |text: String| Err(CommandError::Failed(text));
    let number = |name: &str| arguments.get(name).and_then(Value::as_u64);
    let characters = |name: &str| {
        let number = number(name).and_then(|number| u16::try_from(number).ok());
        match number.filter(|number| *number > 0) {
            Some(number) => Ok(number),
            None => Err(CommandError::Failed(format!("{name} must be 1 to 65535"))),
        }
    };
    let size = Size {
        columns: characters("columns")?,
        rows: characters("rows")?,
    };
    let index = number("port").unwrap_or(0);
    let port = usize::try_from(index)
        .ok()
        .and_then(|index| state.ports.get(index));
    match port {
        Some(port) if port.is_console() => {
            state.resize(index as usize, size);
            Ok(json!({}))
        }
        Some(_) => failed(format!("port {index} is no console and has no size")),
        None => failed(format!(
            "port {index} does not exist; the last port is {}",
            state.ports.len().saturating_sub(1)
        )),
    }
}
