// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that are queried for their capabilities, and misbehave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, kill_process};
use serde_json::Value;
use vhost_device_tests::process::{self, PATIENCE, Program, Signal};

use crate::{DATA, PLAIN, Tree, run};

/// A number of seconds that no other process sleeps.
const SLEEP: &str = "86.413";

/// The processes that a script of [`Sleepers::script`] became and started.
struct Sleepers {
    list: PathBuf,
}

impl Sleepers {
    fn new(tree: &Tree) -> Self {
        let list = tree.path("/sleepers");
        Self { list }
    }

    /// Returns a script that answers at once, records its process id and that of a child, and lets both sleep.
    fn script(&self) -> String {
        let list = self.list.display();
        format!(
            "sleep {SLEEP} &\n{PLAIN}\necho $! $$ > {list}.new\nmv {list}.new {list}\nexec sleep {SLEEP}"
        )
    }

    /// Returns those that still run; `None` if the script did not come that far.
    fn running(&self) -> Option<Vec<i32>> {
        let list = fs::read_to_string(&self.list).ok()?;
        let ids = list.split_whitespace().map(|id| id.parse().unwrap());
        let sleeps = |id: &i32| {
            // Ended processes have no command line, even when nobody reaps them.
            let command = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            command == format!("sleep\0{SLEEP}\0").as_bytes()
        };
        Some(ids.filter(sleeps).collect())
    }

    #[track_caller]
    fn assert_end(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.running() != Some(vec![]) {
            assert!(Instant::now() < deadline, "{:?}", self.running());
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Sleepers {
    fn drop(&mut self) {
        for id in self.running().unwrap_or_default() {
            let _ = kill_process(Pid::from_raw(id).unwrap(), Signal::KILL);
        }
    }
}

/// Lists a tree in which one program is `script`; returns the warning about it.
fn warning(tree: &Tree, script: &str) -> String {
    let file = tree.back_end(DATA, "50", script);
    let ended = tree.list();
    assert_eq!(ended.names(), ["50"]);
    ended.assert_warns(&file, "names the program /usr/libexec/50, which ");
    let items: Value = serde_json::from_str(&ended.stdout).unwrap();
    let error = items[0]["error"].as_str().unwrap();
    assert!(ended.stderr.contains(error), "{error}: {}", ended.stderr);
    error.to_owned()
}

#[test]
fn a_slow_program_is_ended_with_its_children() {
    for seconds in [1.0, 4.0, 16.0] {
        let tree = Tree::new();
        let sleepers = Sleepers::new(&tree);
        let slow = tree.back_end(DATA, "40-slow", &sleepers.script());
        tree.back_end(DATA, "50-plain", PLAIN);
        let ended = run(tree.discover_within("list", seconds).arg("--json"));
        assert_eq!(ended.names(), ["40-slow", "50-plain"]);
        if sleepers.running().is_none() {
            // On a busy machine the script may not have come that far.
            continue;
        }
        sleepers.assert_end();
        let warning = format!("{}: names the program", slow.display());
        let reason = format!("did not answer --print-capabilities within {seconds} s");
        let line = ended.stderr.lines().find(|line| line.contains(&warning));
        assert!(line.unwrap().contains(&reason), "{}", ended.stderr);
        return;
    }
    panic!("the script did not start within 16 s");
}

#[test]
fn children_of_a_program_are_ended() {
    let tree = Tree::new();
    let list = tree.path("/sleepers");
    let sleepers = Sleepers::new(&tree);
    // The child does not keep stdout open, so the answer is complete when the program ends.
    let script = format!(
        "sleep {SLEEP} >/dev/null 2>&1 &\necho $! > {}\n{PLAIN}",
        list.display()
    );
    tree.back_end(DATA, "50", &script);
    let ended = tree.list();
    assert_eq!(
        (ended.names(), ended.stderr.as_str()),
        (vec!["50".to_owned()], "")
    );
    sleepers.assert_end();
}

#[test]
fn a_program_whose_child_keeps_stdout_open_is_slow() {
    for seconds in [1.0, 4.0, 16.0] {
        let tree = Tree::new();
        let sleepers = Sleepers::new(&tree);
        let list = sleepers.list.display();
        let script = format!("sleep {SLEEP} &\n{PLAIN}\necho $! > {list}");
        tree.back_end(DATA, "50", &script);
        let ended = run(&mut tree.discover_within("list", seconds));
        assert!(ended.stderr.contains("did not answer"), "{ended:?}");
        if sleepers.running().is_some() {
            sleepers.assert_end();
            return;
        }
    }
    panic!("the script did not start within 16 s");
}

#[test]
fn a_signal_ends_the_running_programs() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let tree = Tree::new();
        let sleepers = Sleepers::new(&tree);
        tree.back_end(DATA, "50", &sleepers.script());
        let mut program = Program::spawn(&mut tree.discover("list")).unwrap();
        program
            .wait_until("run the script", PATIENCE, || {
                Ok(sleepers.running().is_some())
            })
            .unwrap();
        let status = program.end(signal, PATIENCE).unwrap();
        assert_eq!(status.code(), Some(1), "{signal:?}: {status}");
        assert_eq!(program.stdout(), "");
        let stderr = program.stderr();
        assert!(stderr.ends_with(": interrupted\n"), "{stderr}");
        sleepers.assert_end();
    }
}

#[test]
fn a_wait_for_a_slow_program_is_reported() {
    let tree = Tree::new();
    tree.back_end(DATA, "50", &format!("exec sleep {SLEEP}"));
    tree.back_end(DATA, "60", PLAIN);
    let ended = run(&mut tree.discover_within("list", 3.0));
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{ended:?}");
    assert!(lines[0].contains("waiting for "), "{ended:?}");
}

#[test]
fn programs_are_asked_at_the_same_time() {
    let tree = Tree::new();
    let directory = tree.path("/met");
    fs::create_dir(&directory).unwrap();
    // Each waits until all four are there.
    let script = format!(
        "cd {}\n: > $$\nwhile [ $(ls | wc -l) -lt 4 ]; do sleep 0.01; done\n{PLAIN}",
        directory.display()
    );
    for name in ["10", "20", "30", "40"] {
        tree.back_end(DATA, name, &script);
    }
    let ended = tree.list();
    assert_eq!(ended.names().len(), 4);
    assert!(!ended.stdout.contains("error"), "{ended:?}");
}

#[test]
fn more_programs_than_run_at_a_time_are_asked() {
    let tree = Tree::new();
    for number in 10..40 {
        let answer = format!(r#"echo '{{"type":"gpu","features":["{number}"]}}'"#);
        tree.back_end(DATA, &number.to_string(), &answer);
    }
    let ended = tree.list();
    let items: Vec<Value> = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(items.len(), 30);
    for item in items {
        // Each has the answer of its own program.
        let feature = item["capabilities"]["features"][0].as_str().unwrap();
        assert_eq!(item["binary"], format!("/usr/libexec/{feature}"));
    }
}

#[test]
fn a_failing_program_is_reported_with_its_first_line() {
    let tree = Tree::new();
    let error = warning(
        &tree,
        "printf '\\n  no such option  \\nusage\\n' >&2; exit 3",
    );
    assert!(
        error.ends_with("(exit status: 3): no such option"),
        "{error}"
    );
    let error = warning(&tree, &format!("{PLAIN}; exit 1"));
    assert!(error.ends_with("(exit status: 1)"), "{error}");
    let error = warning(&tree, "kill -KILL $$");
    assert!(error.contains("signal: 9"), "{error}");
}

#[test]
fn a_program_that_prints_something_else_is_named() {
    for output in [
        "",
        "printf '\\000'",
        "printf '\\377\\376'",
        "echo Options: --help",
        "echo '[\"gpu\",[]]'",
        "echo '{}'",
        "echo '{\"type\":\"gpu\",\"features\":{}}'",
        "echo '{\"type\":\"gpu\",\"features\":[1]}'",
        "echo '{\"type\":\"gpu\"} {\"type\":\"gpu\"}'",
        "echo '{\"type\":\"gpu\"'",
        "head -c 100000 /dev/zero | tr '\\0' '['",
    ] {
        let error = warning(&Tree::new(), output);
        assert!(
            error.contains("prints something other than its capabilities"),
            "{output}: {error}"
        );
    }
}

#[test]
fn a_program_that_prints_without_end_is_ended() {
    let tree = Tree::new();
    let error = warning(&tree, "exec yes");
    assert!(error.contains("prints more than 1 MiB"), "{error}");
}

#[test]
fn a_long_error_of_a_program_is_shortened() {
    let tree = Tree::new();
    let script = "head -c 3000000 /dev/zero | tr '\\0' x >&2; exit 1";
    let error = warning(&tree, script);
    assert!(error.len() < 400, "{}", error.len());
}

#[test]
fn a_program_has_an_empty_stdin_and_one_argument() {
    let tree = Tree::new();
    tree.back_end(
        DATA,
        "50",
        r#"[ "$*" = --print-capabilities ] && [ -z "$(cat)" ] && echo '{"type":"gpu","features":["ok"]}'"#,
    );
    let mut command = tree.discover("find");
    run(command.args(["--type=gpu", "--feature=ok"])).assert_found("50");
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let tree = Tree::new();
    tree.program("/usr/libexec/50", "");
    // The kernel cannot run this format.
    fs::write(tree.path("/usr/libexec/50"), [0x7f; 100]).unwrap();
    tree.descriptor(&format!("{DATA}/50.json"), "gpu", "/usr/libexec/50");
    let ended = tree.list();
    assert!(ended.stderr.contains("cannot be started"), "{ended:?}");
}

#[test]
fn programs_are_run_only_where_it_matters() {
    let tree = Tree::new();
    let mark = tree.path("/mark");
    tree.back_end(DATA, "50", &format!(": > {}; {PLAIN}", mark.display()));
    tree.find().assert_found("50");
    assert_eq!(run(tree.discover("list").arg("--no-run")).code, Some(0));
    run(tree.discover("check").arg("--no-run")).assert_silent();
    run(tree.discover("list").arg("--type=rng"));
    assert!(!mark.exists());
    run(&mut tree.discover("list"));
    assert!(mark.exists());
}

#[test]
fn our_back_end_is_found_by_what_it_prints() {
    let tree = Tree::new();
    let binary = process::binary("vhost-device-block").unwrap();
    let place = tree.place(&binary);
    // By another process, as in `Tree::program`.
    assert_eq!(
        run(Command::new("cp").arg(&binary).arg(place)).code,
        Some(0)
    );
    let printed = run(Command::new(&binary).arg("--print-descriptor")).stdout;
    tree.file(format!("{DATA}/50-vhost-device-block.json"), printed);
    tree.check().assert_silent();
    let mut command = tree.discover("find");
    let found = run(command.args(["--type=block", "--feature=blk-file", "--feature=read-only"]));
    assert_eq!(found.code, Some(0), "{found:?}");
    assert_eq!(Path::new(found.stdout.trim_end()), binary);
}
