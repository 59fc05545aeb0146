// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the commands in the documents, as they are written.
//!
//! The commands of one document run one after the other in an empty directory with an image, `disk.img`, a sound, `voice.wav`, and the
//! built programs in
//! `PATH`. Absolute paths that a command would write to are below that directory ([`MOVED`]), and an ellipsis stands for nothing.
//!
//! A device runs in the background until the next command that starts the same program, or to the end of the document; it must listen on
//! its socket, and SIGTERM must end it with status 0. QEMU starts with the devices that it connects to, and is told to quit.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_tests::guest::find_program;
use vhost_device_tests::process::{self, PATIENCE, Program, Signal};

use super::{Document, documents, manuals};
use crate::programs::PROGRAMS;

/// The commands that are not run: a part of the command, or of the heading above it, and the reason.
const NOT_RUN: &[(&str, &str)] = &[
    (
        "cargo ",
        "it builds, tests or installs, which the stages of cargo xtask test do",
    ),
    (
        "systemctl ",
        "it needs systemd; the suites program and install check the units",
    ),
    (
        "inside a guest",
        "it runs in a guest; the guest suites do the like",
    ),
    (
        "(qemu) ",
        "it is typed into QEMU's monitor; the suite guest_migration does the like",
    ),
    (
        "linux mem=",
        "it needs a kernel for User-Mode Linux; the suite guest_uml boots one",
    ),
    ("cloud-hypervisor ", "it needs KVM"),
    ("crosvm ", "it needs KVM"),
    (
        "keyboard.sock",
        "it needs an input device; the suite uml_input makes some",
    ),
    (
        "/dev/input/event",
        "it needs an input device; the suite uml_input makes some",
    ),
    ("/dev/dri/renderD128", "it needs a GPU"),
    (
        "--virgl",
        "it needs virglrenderer; the suite guest_gpu_virgl has it",
    ),
    ("/dev/vg0/disk", "it needs a logical volume"),
    (
        "--passthrough",
        "it needs a SCSI device; the suite guest_scsi has one",
    ),
    (
        "vhost-device-ctl /tmp/disk.control events",
        "it runs until the back-end exits; the suite program does the like",
    ),
    (
        "socat ",
        "it waits for a connection; the suite vsock opens some",
    ),
    ("PUx,", "it is a rule of AppArmor"),
    ("SocketGroup=", "it is a line of a unit"),
];

/// The reason not to run a part of a command, or of a file that is not a script.
const FRAGMENT: &str = "it is a part of a file or of a command line";

/// Programs that the host need not have.
const OPTIONAL: &[&str] = &["curl", "qemu-system-x86_64"];

/// Paths in commands, and where they are in the directory.
const MOVED: &[(&str, &str)] = &[
    ("/tmp/", "tmp/"),
    ("/etc/", "etc/"),
    ("/dev/hwrng", "hwrng"),
    ("/var/lib/machines/debian", "machine"),
];

/// The log message of a device that is ready.
const READY: &str = "waiting for a front-end";

/// The sockets that QEMU connects to, and the commands that start their devices.
const SOCKETS: &[(&str, &str)] = &[
    ("disk.sock", "vhost-device-block --blk-file=disk.img"),
    (
        "there.sock",
        "vhost-device-block --blk-file=disk.img --incoming",
    ),
    ("rng.sock", "vhost-device-rng"),
    ("gpu.sock", "vhost-device-gpu"),
];

/// Exit statuses of `vhost-user-discover` that depend on what the host has.
const DISCOVER: [i32; 3] = [0, 1, 3];

/// A command of a document.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    heading: String,
    command: String,
}

/// The commands in the code blocks of a Markdown text. Blocks with the name of another language than the shell's have none.
fn lines(text: &str) -> Vec<Line> {
    let joined = text.replace("\\\n", "");
    let mut found = Vec::new();
    let mut heading = String::new();
    let (mut fence, mut session) = (None, false);
    for line in joined.lines() {
        let trimmed = line.trim();
        if let Some(language) = trimmed.strip_prefix("```") {
            let is_shell = ["sh", "console"].contains(&language);
            fence = fence.is_none().then_some(is_shell);
            continue;
        }
        let is_code = fence.unwrap_or_else(|| line.starts_with("    "));
        if fence.is_none() && line.starts_with('#') {
            heading = line.to_owned();
        }
        // In a block with prompts, lines without one are output.
        let prompted = trimmed.strip_prefix("$ ");
        session = is_code && (session || prompted.is_some()) || line.is_empty() && session;
        let is_comment = trimmed.is_empty() || trimmed.starts_with('#');
        if is_code && !is_comment && (prompted.is_some() || !session) {
            found.push(Line {
                heading: heading.clone(),
                command: prompted.unwrap_or(trimmed).to_owned(),
            });
        }
    }
    found
}

/// A WAV file: two channels of 16 bits, 48 kHz, one frame.
const SILENCE: &[u8] = b"RIFF\x28\0\0\0WAVEfmt \x10\0\0\0\x01\0\x02\0\x80\xbb\0\0\0\xee\x02\0\x04\0\x10\0data\x04\0\0\0\0\0\0\0";

impl Line {
    /// Why it is not run.
    fn obstacle(&self) -> Option<&'static str> {
        let is_in =
            |(part, _): &&(&str, _)| self.heading.contains(part) || self.command.contains(part);
        let listed = NOT_RUN.iter().find(is_in).map(|(_, reason)| *reason);
        let is_fragment = self.command.starts_with(['-', '<', '[', '…']);
        listed.or(is_fragment.then_some(FRAGMENT))
    }

    /// The name of the program.
    fn program(&self) -> &str {
        let mut words = self.command.split_whitespace();
        words.find(|word| !word.contains('=')).unwrap_or_default()
    }

    /// The value of an option.
    fn option(&self, name: &str) -> Option<&str> {
        let mut words = self.command.split_whitespace();
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// Runs the commands of one document.
struct Reader {
    directory: TempDir,
    devices: Vec<(String, Program)>,
}

impl Reader {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["bin", "pids", "tmp", "etc", "machine"] {
            fs::create_dir(path(name)).unwrap();
        }
        File::create(path("disk.img"))
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        fs::write(path("voice.wav"), SILENCE).unwrap();
        for program in PROGRAMS {
            let built = process::binary(program.name).unwrap();
            symlink(built, path("bin").join(program.name)).unwrap();
        }
        symlink("/dev/urandom", path("hwrng")).unwrap();
        // 48 kHz, 2 channels, 16 bits, no samples.
        let wav = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x02\0\x80\xbb\0\0\0\xee\x02\0\x04\0\x10\0data\0\0\0\0";
        fs::write(path("voice.wav"), wav).unwrap();
        // Finds only programs that this test started.
        let pidof = path("bin").join("pidof");
        fs::write(
            &pidof,
            format!("#!/bin/sh\ncat {}/$1\n", path("pids").display()),
        )
        .unwrap();
        fs::set_permissions(&pidof, fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            directory,
            devices: Vec::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The shell with a command.
    fn shell(&self, command: &str) -> Command {
        let mut command = command.replace(" …", "");
        for (from, to) in MOVED {
            command = command.replace(from, &self.path(to).display().to_string());
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &command])
            .current_dir(self.directory.path())
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .stdin(Stdio::null());
        shell
    }

    /// Runs a command. Returns an error if it does not behave as expected.
    fn run(&mut self, line: &Line) -> Result<(), String> {
        let is_device = |name: &str| {
            PROGRAMS
                .iter()
                .any(|program| program.device.is_some() && program.name == name)
        };
        match line.program() {
            name if is_device(name) => self.start(line),
            "qemu-system-x86_64" => self.run_qemu(line),
            "vhost-user-discover" => self.run_to_end(&line.command, &DISCOVER),
            _ => self.run_to_end(&line.command, &[0]),
        }
    }

    fn run_to_end(&mut self, command: &str, expected: &[i32]) -> Result<(), String> {
        let mut program = spawn(&mut self.shell(command))?;
        let status = program.wait(PATIENCE).map_err(|error| error.to_string())?;
        match status.code() {
            Some(code) if expected.contains(&code) => Ok(()),
            _ => Err(format!("{status}: {}", program.stderr().trim())),
        }
    }

    /// Starts a device, and waits until it listens.
    fn start(&mut self, line: &Line) -> Result<(), String> {
        let name = line.program().to_owned();
        // The destination of a migration is there beside the source.
        if !line.command.contains("--incoming") {
            self.stop(&name)?;
        }
        let mut command = self.shell(&format!("exec {}", line.command));
        self.inherit(&mut command, line).map_err(text)?;
        let mut program = spawn(&mut command)?;
        let deadline = Instant::now() + PATIENCE;
        while !program.stderr().contains(READY) {
            if Instant::now() > deadline || !matches!(program.status(), Ok(None)) {
                return Err(format!(
                    "it does not wait for a front-end: {}",
                    program.stderr()
                ));
            }
            thread::sleep(Duration::from_millis(2));
        }
        fs::write(self.path("pids").join(&name), program.id().to_string()).map_err(text)?;
        self.devices.push((name, program));
        Ok(())
    }

    /// Passes what `--fd` and `--blk-fd` name: a socket and the image.
    fn inherit(&self, command: &mut Command, line: &Line) -> io::Result<()> {
        let number = |option| line.option(option).and_then(|number| number.parse().ok());
        if let Some(number) = number("--fd") {
            let path = self.path("tmp/inherited.sock");
            let _ = fs::remove_file(&path);
            process::inherit(command, UnixListener::bind(path)?.into(), number);
        }
        if let Some(number) = number("--blk-fd") {
            let image = File::options()
                .read(true)
                .write(true)
                .open(self.path("disk.img"));
            process::inherit(command, image?.into(), number);
        }
        Ok(())
    }

    /// Starts the devices that QEMU connects to, and QEMU with the command to quit, which it executes after it has connected to all.
    fn run_qemu(&mut self, line: &Line) -> Result<(), String> {
        for (socket, device) in SOCKETS {
            let is_named = line.command.contains(&format!("/{socket}"));
            if is_named && !self.path("tmp").join(socket).exists() {
                let command = format!("{device} --socket-path=/tmp/{socket}");
                self.start(&Line {
                    heading: String::new(),
                    command,
                })?;
            }
        }
        let command = format!(
            "echo quit | {} -S -display none -monitor stdio",
            line.command
        );
        self.run_to_end(&command, &[0])
    }

    /// Ends the devices with this program, or all with "".
    fn stop(&mut self, name: &str) -> Result<(), String> {
        let is_it = |(other, _): &mut (String, Program)| name.is_empty() || other == name;
        for (name, mut program) in self.devices.extract_if(.., is_it) {
            let status = program.end(Signal::TERM, PATIENCE);
            let status = status.map_err(|error| error.to_string())?;
            if !status.success() {
                return Err(format!("{name} ended with {status}: {}", program.stderr()));
            }
        }
        Ok(())
    }
}

fn spawn(command: &mut Command) -> Result<Program, String> {
    Program::spawn(command).map_err(|error| error.to_string())
}

fn text(error: io::Error) -> String {
    error.to_string()
}

/// Runs the commands of a document. Returns how many ran, the reasons why others were not run, and the failures.
fn read(document: &Document) -> (usize, Vec<String>, Vec<String>) {
    let mut reader = Reader::new();
    let (mut ran, mut skipped, mut wrong) = (0, Vec::new(), Vec::new());
    for line in lines(&document.text) {
        if let Some(obstacle) = line.obstacle() {
            skipped.push(obstacle.to_owned());
        } else if OPTIONAL.contains(&line.program()) && find_program(line.program()).is_none() {
            let reason = format!("{} is not installed", line.program());
            // Counted: CI does not accept it.
            vhost_device_tests::skip::skip(&reason);
            skipped.push(reason);
        } else {
            ran += 1;
            if let Err(why) = reader.run(&line) {
                let name = document.path.display();
                wrong.push(format!("{name}: `{}`: {why}", line.command));
                // What follows may depend on it.
                break;
            }
        }
    }
    wrong.extend(reader.stop("").err());
    (ran, skipped, wrong)
}

#[test]
fn commands_do_what_they_should() {
    let (mut ran, mut reasons, mut wrong) = (0, BTreeMap::new(), Vec::new());
    for document in documents().into_iter().chain(manuals()) {
        let (run, skipped, failed) = read(&document);
        ran += run;
        wrong.extend(failed);
        for reason in skipped {
            *reasons.entry(reason).or_insert(0) += 1;
        }
    }
    let mut report = format!(
        "commands in documents: {ran} run, {} not run\n",
        reasons.values().sum::<usize>()
    );
    for (reason, count) in &reasons {
        report += &format!("{count:4} because {reason}\n");
    }
    // Bypasses the capture of the output of tests.
    let _ = io::stderr().write_all(report.as_bytes());
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(ran > 20, "{report}");
}

#[test]
fn each_reason_not_to_run_a_command_is_needed() {
    let documents = documents().into_iter().chain(manuals());
    let lines: Vec<Line> = documents
        .flat_map(|document| lines(&document.text))
        .collect();
    for (part, _) in NOT_RUN {
        let is_in = |line: &Line| line.heading.contains(part) || line.command.contains(part);
        assert!(lines.iter().any(is_in), "no document has {part:?}");
    }
}

fn document(text: &str) -> Document {
    Document {
        path: "made-up.md".into(),
        text: text.into(),
    }
}

#[test]
fn commands_that_fail_are_found() {
    for command in [
        "false",
        "no-such-program",
        "vhost-user-discover no-such-task",
        "vhost-device-rng --socket-path=/tmp/no-such-directory/rng.sock",
        "vhost-device-block --socket-path=/tmp/disk.sock --blk-file=no-such-image",
        "truncate -s 1G no-such-directory/disk.img",
    ] {
        let (_, _, wrong) = read(&document(&format!("Text:\n\n    {command}\n")));
        assert_eq!(wrong.len(), 1, "{command}: {wrong:?}");
    }
    // Other devices do not handle SIGHUP, which ends them.
    let ended = "    vhost-device-rng --socket-path=/tmp/rng.sock\n    kill -HUP $(pidof vhost-device-rng)\n";
    let (ran, _, wrong) = read(&document(ended));
    assert_eq!((ran, wrong.len()), (2, 1), "{wrong:?}");
}

#[test]
fn commands_are_those_in_blocks_of_the_shell() {
    let text = "# One\n    a \\\n      b\n    # comment\ntext `c`\n```sh\nd\n```\n## Two\n```text\ne\n```\n\n\
        \u{20}   $ f\n    output\n\n    $ g\n    output\n\ntext\n\n    h\n";
    let found = lines(text);
    let found: Vec<_> = found
        .iter()
        .map(|line| (&*line.heading, &*line.command))
        .collect();
    let expected = [
        ("# One", "a       b"),
        ("# One", "d"),
        ("## Two", "f"),
        ("## Two", "g"),
        ("## Two", "h"),
    ];
    assert_eq!(found, expected);
}
