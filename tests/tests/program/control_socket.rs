// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control socket: commands in the shape of QMP. What it has in common with the socket for statistics is tested in
//! `client_sockets`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::guest::Qmp;
use vhost_device_tests::process::{PATIENCE, Program, Signal, option};

use crate::{
    BLOCK, Binary, END, RNG, Setup, assert_serves, exists, for_each_program, read_request,
};

/// Where the commands of `setup`'s program are accepted.
pub fn control_socket(setup: &Setup) -> PathBuf {
    setup.path("control")
}

/// The command, with a control socket.
pub fn controlled(setup: &Setup) -> Command {
    let mut command = setup.listening();
    command.arg(option("control-socket", control_socket(setup)));
    command
}

fn serve(setup: &Setup) -> Program {
    serve_with(setup, &[])
}

fn serve_with(setup: &Setup, arguments: &[&str]) -> Program {
    let mut program = Program::spawn(controlled(setup).args(arguments)).unwrap();
    program.wait_for_listener(&setup.socket()).unwrap();
    program
}

/// A client that looks at each byte of the answers.
struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects, and reads the greeting.
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self(BufReader::new(stream));
        let greeting = client.line();
        let version = &greeting["QMP"]["version"];
        assert!(version["qemu"]["major"].is_u64(), "{greeting}");
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
        client
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.line()
    }

    /// Executes a command that must succeed.
    fn execute(&mut self, name: &str, arguments: Value) -> Value {
        let request = json!({"execute": name, "arguments": arguments});
        let mut answer = self.ask(&format!("{request}\n"));
        assert!(answer.get("error").is_none(), "{request}: {answer}");
        answer["return"].take()
    }

    fn query(&mut self) -> Value {
        self.execute("query", json!({}))
    }

    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).is_ok()
    }
}

/// Commands are executed at `path`.
pub fn assert_executes(path: &Path) {
    assert!(Client::connect(path).query()["program"].is_string());
}

fn query_shows_the_program_and_its_front_end(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut program = serve(&setup);
    let mut client = Client::connect(&control_socket(&setup));
    let query = client.query();
    assert_eq!(query["program"], binary.name);
    assert_eq!(query["type"], binary.kind);
    assert_eq!(query["pid"], program.id());
    assert_eq!(query["log-level"], "info");
    assert_eq!(query["front-end"], Value::Null);
    assert_eq!(query["front-ends-so-far"], 0);
    assert_eq!(query["queues"], json!([]));
    let front_end = UnixStream::connect(setup.socket()).unwrap();
    assert_serves(&front_end);
    let query = client.query();
    assert_eq!(query["front-end"]["features"], 0);
    assert_eq!(query["front-ends-so-far"], 1);
    drop(front_end);
    let start = Instant::now();
    while client.query()["front-end"] != Value::Null {
        assert!(start.elapsed() < PATIENCE);
    }
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert!(!exists(&control_socket(&setup)), "the socket is left");
}

fn quit_is_answered_and_ends_the_program(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut program = serve(&setup);
    let front_end = UnixStream::connect(setup.socket()).unwrap();
    assert_serves(&front_end);
    let mut client = Client::connect(&control_socket(&setup));
    assert_eq!(client.execute("quit", json!({})), json!({}));
    assert_eq!(program.wait(END).unwrap().code(), Some(0));
    assert!(!exists(&control_socket(&setup)), "the socket is left");
    assert!(!exists(&setup.socket()));
}

for_each_program!(
    query_shows_the_program_and_its_front_end,
    quit_is_answered_and_ends_the_program,
);

#[test]
fn query_shows_queues_and_what_they_count() {
    let setup = Setup::new(&BLOCK);
    let _program = serve(&setup);
    let mut client = Client::connect(&control_socket(&setup));
    let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
    let mut queue = front_end.queue(2, 16).unwrap();
    queue.submit(&read_request(&front_end, 4096));
    assert!(queue.wait_used(PATIENCE));
    queue.take_used().unwrap();
    let start = Instant::now();
    // Counters are written once the batch is over.
    let query = loop {
        let query = client.query();
        if query["requests"][0]["requests"] == 1 {
            break query;
        }
        assert!(start.elapsed() < PATIENCE, "{query}");
    };
    let queues = query["queues"].as_array().unwrap();
    assert_eq!(queues.len(), 1, "{query}");
    let shown = &queues[0];
    assert_eq!(shown["queue"], 2);
    assert_eq!(shown["size"], 16);
    assert_eq!(shown["running"], true);
    assert_eq!(shown["enabled"], true);
    assert!(["split", "packed"].contains(&shown["format"].as_str().unwrap()));
    assert_eq!(shown["requests"], 1);
    let request = &query["requests"][0];
    assert_eq!(
        (&request["queue"], &request["type"]),
        (&json!(2), &json!("read"))
    );
    assert_eq!(
        (&request["bytes"], &request["errors"]),
        (&json!(4096), &json!(0))
    );
    assert_ne!(query["front-end"]["features"], 0);
    assert_ne!(query["front-end"]["protocol-features"], 0);
    drop(queue);
    drop(front_end);
    let start = Instant::now();
    while client.query()["front-end"] != Value::Null {
        assert!(start.elapsed() < PATIENCE);
    }
    let queues = client.query()["queues"].clone();
    assert_eq!(queues[0]["requests"], 1, "counters remain: {queues}");
    assert!(queues[0].get("running").is_none(), "{queues}");
}

#[test]
fn commands_are_executed_while_a_queue_waits() {
    let setup = Setup::new(&BLOCK);
    let _program = serve_with(&setup, &["--iops=1"]);
    let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
    let mut queue = front_end.queue(0, 16).unwrap();
    for _ in 0..4 {
        queue.submit(&read_request(&front_end, 512));
    }
    let mut client = Client::connect(&control_socket(&setup));
    let start = Instant::now();
    for _ in 0..10 {
        client.query();
    }
    assert!(start.elapsed() < Duration::from_secs(1));
    for _ in 0..4 {
        assert!(queue.wait_used(PATIENCE));
        queue.take_used().unwrap();
    }
}

#[test]
fn a_qmp_client_can_use_it() {
    let setup = Setup::new(&RNG);
    let mut program = serve(&setup);
    let mut qmp = Qmp::connect(&control_socket(&setup)).unwrap();
    let commands = qmp.execute("query-commands", json!({})).unwrap();
    let names: Vec<_> = commands.as_array().unwrap().iter().collect();
    let names: Vec<_> = names.iter().map(|command| &command["name"]).collect();
    assert_eq!(names, ["query", "query-commands", "log-level", "quit"]);
    assert!(qmp.execute("unknown", json!({})).is_err());
    let file = std::fs::File::open("/dev/null").unwrap();
    let refused = qmp.execute_with_file("query", json!({}), std::os::fd::AsFd::as_fd(&file));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("file descriptors"), "{refused}");
    qmp.execute("quit", json!({})).unwrap();
    assert_eq!(program.wait(END).unwrap().code(), Some(0));
}

#[test]
fn clients_that_negotiated_get_events_and_others_do_not() {
    let setup = Setup::new(&BLOCK);
    let mut program = serve(&setup);
    let mut listening = Client::connect(&control_socket(&setup));
    let enable = json!({"enable": []});
    assert_eq!(listening.execute("qmp_capabilities", enable), json!({}));
    let mut other = Client::connect(&control_socket(&setup));
    let front_end = UnixStream::connect(setup.socket()).unwrap();
    let mut event = |name: &str| {
        let event = listening.line();
        assert_eq!(event["event"], name);
        assert!(event["timestamp"]["seconds"].as_u64() > Some(0), "{event}");
        assert!(event["timestamp"]["microseconds"].is_u64(), "{event}");
    };
    event("FRONT_END_CONNECTED");
    drop(front_end);
    event("FRONT_END_DISCONNECTED");
    assert_eq!(other.query()["front-ends-so-far"], 1);
    other.execute("quit", json!({}));
    event("SHUTDOWN");
    assert!(other.is_closed());
    program.wait(END).unwrap();
}

#[test]
fn errors_have_a_class_a_description_and_the_id() {
    let setup = Setup::new(&BLOCK);
    let mut program = serve(&setup);
    program.expect_no_leak().unwrap();
    let mut client = Client::connect(&control_socket(&setup));
    for (request, class, word) in [
        (r#"{"execute":"stop","id":[7]}"#, "CommandNotFound", "stop"),
        (r#"{"id":[7]}"#, "GenericError", "execute"),
        (r#"{"execute":1,"id":[7]}"#, "GenericError", "execute"),
        (
            r#"{"execute":"query","arguments":[],"id":[7]}"#,
            "GenericError",
            "arguments",
        ),
        (
            r#"{"execute":"query","arguments":{"a":1},"id":[7]}"#,
            "GenericError",
            "a",
        ),
        (
            r#"{"execute":"query","extra":1,"id":[7]}"#,
            "GenericError",
            "extra",
        ),
        (
            r#"{"execute":"log-level","arguments":{"level":"loud"},"id":[7]}"#,
            "GenericError",
            "loud",
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":[7]}"#,
            "GenericError",
            "capability",
        ),
    ] {
        let answer = client.ask(request);
        assert_eq!(answer["error"]["class"], class, "{request}");
        let description = answer["error"]["desc"].as_str().unwrap();
        assert!(description.contains(word), "{request}: {description}");
        assert_eq!(answer["id"], json!([7]), "{request}");
    }
    // What is no command at all: the next line is one again.
    for line in ["query", "[]", "{\"execute\":", "{\"execute\" 1}", "\u{1}\0"] {
        let answer = client.ask(&format!("{line}\n"));
        assert_eq!(answer["error"]["class"], "GenericError", "{line}: {answer}");
        assert!(client.query().is_object());
    }
    // Too long: there is no next line.
    let long = format!("{{\"execute\":\"{}\"", "a".repeat(65 << 10));
    assert_eq!(client.ask(&long)["error"]["class"], "GenericError");
    assert!(client.is_closed());
}

#[test]
fn many_commands_in_one_piece_are_answered_in_order() {
    let setup = Setup::new(&RNG);
    let _program = serve(&setup);
    let mut client = Client::connect(&control_socket(&setup));
    let request = |id: u64| json!({"execute": "log-level", "id": id}).to_string();
    let all: String = (0..100).map(request).collect();
    client.send(&all);
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    for id in 0..100 {
        assert_eq!(client.line()["id"], id);
    }
    assert!(client.is_closed());
}

#[test]
fn the_log_level_can_be_changed_and_wins_over_rust_log() {
    for variable in [None, Some("error"), Some("vhost_device_common=warn")] {
        let setup = Setup::new(&BLOCK);
        let mut command = controlled(&setup);
        command.envs(variable.map(|value| ("RUST_LOG", value)));
        let mut program = Program::spawn(&mut command).unwrap();
        program.wait_for_listener(&setup.socket()).unwrap();
        let mut client = Client::connect(&control_socket(&setup));
        let mut set = |level: &str| {
            let answer = client.execute("log-level", json!({"level": level}));
            assert_eq!(answer["level"], level);
            assert_eq!(client.query()["log-level"], level);
            assert_eq!(client.execute("log-level", json!({}))["level"], level);
        };
        let messages = |program: &Program| program.stderr().matches("trace: request").count();
        let front_end = UnixStream::connect(setup.socket()).unwrap();
        assert_serves(&front_end);
        assert_eq!(messages(&program), 0);
        set("trace");
        assert_serves(&front_end);
        let start = Instant::now();
        while messages(&program) != 1 {
            assert!(start.elapsed() < PATIENCE, "{}", program.stderr());
        }
        set("off");
        assert_serves(&front_end);
        assert_eq!(messages(&program), 1);
    }
}

#[test]
fn reload_examines_the_image_again() {
    let setup = Setup::new(&BLOCK);
    let program = serve(&setup);
    let mut client = Client::connect(&control_socket(&setup));
    let image = std::fs::OpenOptions::new().write(true).open(setup.image());
    image.unwrap().set_len(2 * crate::IMAGE_SIZE).unwrap();
    assert_eq!(client.execute("reload", json!({})), json!({}));
    let grown = (2 * crate::IMAGE_SIZE).to_string();
    let start = Instant::now();
    while !program.stderr().contains(&grown) {
        assert!(start.elapsed() < PATIENCE, "{}", program.stderr());
    }
}

#[test]
fn idle_clients_make_room_for_newcomers() {
    let setup = Setup::new(&BLOCK);
    let _program = serve(&setup);
    let mut clients: Vec<_> = (0..8)
        .map(|_| Client::connect(&control_socket(&setup)))
        .collect();
    // The first one is used again, so the second one is idle for longest.
    clients[0].query();
    let start = Instant::now();
    Client::connect(&control_socket(&setup)).query();
    assert!(start.elapsed() < Duration::from_secs(4));
    clients[0].query();
    assert!(clients[1].is_closed());
}

#[test]
fn a_client_that_reads_no_events_is_disconnected() {
    let setup = Setup::new(&RNG);
    let _program = serve(&setup);
    let mut deaf = Client::connect(&control_socket(&setup));
    deaf.execute("qmp_capabilities", json!({}));
    let mut other = Client::connect(&control_socket(&setup));
    let before = other.query()["front-ends-so-far"].as_u64().unwrap();
    // More events than a socket and the program keep for a client.
    const FRONT_ENDS: u64 = 4000;
    for _ in 0..FRONT_ENDS {
        assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    }
    assert_eq!(
        other.query()["front-ends-so-far"],
        before + FRONT_ENDS,
        "others are served"
    );
    assert!(deaf.is_closed());
}
