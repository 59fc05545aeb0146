// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Answers as human-readable text.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::commands::Command;

/// Columns that identify a row; they come first.
const FIRST: &[&str] = &["queue", "name", "type"];
/// Spaces per level of indentation.
const INDENT: usize = 2;

/// Formats an answer: one member per line, lists of objects as tables.
pub fn answer(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(members) => add_members(&mut text, members, 0),
        Value::Array(rows) if is_table(rows) => add_table(&mut text, rows, 0),
        other => text = scalar("", other) + "\n",
    }
    text
}

/// Formats an event: its time in seconds since 1970, its name, and its data.
pub fn event(event: &Value) -> String {
    let time = |unit| {
        let time = event.pointer(&format!("/timestamp/{unit}"));
        time.and_then(Value::as_u64).unwrap_or_default()
    };
    let (seconds, microseconds) = (time("seconds"), time("microseconds"));
    let name = event.get("event").and_then(Value::as_str).unwrap_or("?");
    let data = event.get("data").map(|data| format!(" {data}"));
    let data = data.unwrap_or_default();
    format!("{seconds}.{microseconds:06} {name}{data}")
}

/// Formats commands with their arguments.
pub fn help(commands: &[Command]) -> String {
    let mut text = String::new();
    for command in commands {
        let mut usage = command.name.clone();
        for argument in &command.arguments {
            let name = argument.name.to_uppercase();
            usage += &match argument.optional {
                true => format!(" [{name}]"),
                false => format!(" {name}"),
            };
        }
        // Writing to a string does not fail.
        let _ = writeln!(text, "{usage}\n    {}", command.help);
        for argument in &command.arguments {
            let _ = writeln!(text, "    {}: {}", argument.name, argument.help);
        }
        match command.files {
            0 => {}
            1 => text += "    takes a file (--file)\n",
            count => {
                let _ = writeln!(text, "    takes up to {count} files (--file)");
            }
        }
    }
    text
}

fn add_members(text: &mut String, members: &Map<String, Value>, indent: usize) {
    let space = " ".repeat(indent);
    for (name, value) in members {
        let _ = match value {
            Value::Object(members) if !members.is_empty() => {
                let _ = writeln!(text, "{space}{name}:");
                add_members(text, members, indent + INDENT);
                Ok(())
            }
            Value::Array(rows) if is_table(rows) => {
                let _ = writeln!(text, "{space}{name}:");
                add_table(text, rows, indent + INDENT);
                Ok(())
            }
            other => writeln!(text, "{space}{name}: {}", scalar(name, other)),
        };
    }
}

fn is_table(rows: &[Value]) -> bool {
    !rows.is_empty() && rows.iter().all(Value::is_object)
}

fn add_table(text: &mut String, rows: &[Value], indent: usize) {
    let mut columns: Vec<&str> = Vec::new();
    for row in rows.iter().filter_map(Value::as_object) {
        for name in row.keys() {
            if !columns.contains(&name.as_str()) {
                columns.push(name);
            }
        }
    }
    columns.sort_by_key(|name| {
        let place = FIRST.iter().position(|first| first == name);
        (place.unwrap_or(FIRST.len()), *name)
    });
    let cells = |row: &Value| -> Vec<String> {
        let cell = |name: &&str| {
            row.get(*name)
                .map_or("-".to_owned(), |value| scalar(name, value))
        };
        columns.iter().map(cell).collect()
    };
    let heading = columns.iter().map(|name| (*name).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(heading)
        .chain(rows.iter().map(cells))
        .collect();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    for line in &lines {
        let cells = line.iter().zip(&widths);
        let cells: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let _ = writeln!(
            text,
            "{}{}",
            " ".repeat(indent),
            cells.join("  ").trim_end()
        );
    }
}

/// Formats a value in one line. Feature bits are in hexadecimal.
fn scalar(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_u64() {
            Some(number) if name.ends_with("features") => format!("{number:#x}"),
            _ => number.to_string(),
        },
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Object(members) if members.is_empty() => "none".to_owned(),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| scalar(name, item)).collect();
            items.join(", ")
        }
        Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn members_are_lines_and_lists_of_objects_are_tables() {
        let value = json!({
            "front-end": {"features": 4096, "protocol-features": 9},
            "requests": [],
            "queues": [
                {"queue": 0, "running": true, "base": null, "format": "split"},
                {"queue": 10, "kicks": 12345},
            ],
        });
        let expected = "front-end:\n  features: 0x1000\n  protocol-features: 0x9\nqueues:\n  \
            queue  base  format  kicks  running\n  0      none  split   -      yes\n  \
            10     -     -       12345  -\nrequests: none\n";
        assert_eq!(answer(&value), expected);
        assert_eq!(answer(&json!([1, "a"])), "1, a\n");
    }

    #[test]
    fn events_have_their_time_in_front() {
        let time = json!({"seconds": 5, "microseconds": 42});
        let value = json!({"event": "SHUTDOWN", "timestamp": time});
        assert_eq!(event(&value), "5.000042 SHUTDOWN");
    }
}
