// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's guest agent, through a port with the name that it expects.

use serde_json::{Value, json};

use crate::client::Client;

/// The name of the port.
pub const NAME: &str = "org.qemu.guest_agent.0";

/// Returns the command that runs the agent in a guest until it is told to end.
pub fn command(program: &str) -> String {
    format!(
        "{program} --method=virtio-serial --path=/dev/virtio-ports/{NAME} --statedir=/tmp --pidfile=/tmp/agent.pid"
    )
}

/// Sends a command, and returns the answer.
#[track_caller]
fn execute(client: &mut Client, command: &str, arguments: Value) -> Value {
    let request = json!({ "execute": command, "arguments": arguments });
    client.send(format!("{request}\n"));
    let answer = client.wait_for("\n");
    let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{answer:?}"));
    answer["return"].clone()
}

/// Panics unless the agent answers. Returns the release of its kernel.
#[track_caller]
pub fn assert_answers(client: &mut Client, id: u64) -> String {
    let synchronized = execute(client, "guest-sync", json!({ "id": id }));
    assert_eq!(synchronized, json!(id));
    assert_eq!(execute(client, "guest-ping", json!({})), json!({}));
    let system = execute(client, "guest-get-osinfo", json!({}));
    system["kernel-release"].as_str().unwrap().to_owned()
}
