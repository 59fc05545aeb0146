// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is printed, and the exit status.

use serde_json::{Value, json};
use vhost_device_tests::process;

use crate::{BINARY, CONFIG, DATA, PLAIN, Tree, run};

const VIRGL: &str = r#"echo '{"type":"gpu","features":["render-node","virgl"]}'"#;

#[test]
fn list_prints_a_line_for_each_back_end() {
    let tree = Tree::new();
    let virgl = tree.back_end(DATA, "50-virgl", VIRGL);
    let plain = tree.back_end(CONFIG, "60-plain", PLAIN);
    let failing = tree.back_end(CONFIG, "70-failing", "exit 1");
    let ended = run(&mut tree.discover("list"));
    assert_eq!(ended.code, Some(0));
    let rows: Vec<Vec<_>> = ended
        .stdout
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows,
        [
            ["TYPE", "FEATURES", "PROGRAM", "DESCRIPTOR"],
            [
                "gpu",
                "render-node,virgl",
                "/usr/libexec/50-virgl",
                virgl.to_str().unwrap()
            ],
            ["gpu", "-", "/usr/libexec/60-plain", plain.to_str().unwrap()],
            [
                "gpu",
                "?",
                "/usr/libexec/70-failing",
                failing.to_str().unwrap()
            ],
        ]
    );
    ended.assert_warns(&failing, "exit status: 1");
}

#[test]
fn list_says_where_it_looked_when_there_is_nothing() {
    let ended = run(&mut Tree::new().discover("list"));
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""));
    for directory in [DATA, CONFIG] {
        assert!(ended.stderr.contains(directory), "{}", ended.stderr);
    }
}

#[test]
fn json_has_the_descriptor_and_the_capabilities() {
    let tree = Tree::new();
    tree.program("/bin/virgl", VIRGL);
    let file = tree.file(
        format!("{DATA}/50.json"),
        r#"{"type":"gpu","binary":"/bin/virgl","description":"d","tags":["t"],"other":1}"#,
    );
    let missing = tree.descriptor(&format!("{DATA}/60.json"), "gpio", "/bin/none");
    let ended = tree.list();
    let items: Value = serde_json::from_str(&ended.stdout).unwrap();
    let error = items[1]["error"].as_str().unwrap();
    assert!(error.contains("/bin/none"), "{error}");
    assert_eq!(
        items,
        json!([
            {
                "file": file, "description": "d", "type": "gpu", "binary": "/bin/virgl", "tags": ["t"],
                "capabilities": {"type": "gpu", "features": ["render-node", "virgl"]}
            },
            {
                "file": missing, "description": "for a test", "type": "gpio", "binary": "/bin/none",
                "error": error
            }
        ])
    );
}

#[test]
fn list_filters_by_type_and_features() {
    let tree = Tree::new();
    tree.back_end(DATA, "50-virgl", VIRGL);
    tree.back_end(DATA, "60-plain", PLAIN);
    tree.back_end(DATA, "70-failing", "exit 1");
    tree.descriptor(
        &format!("{DATA}/80-rng.json"),
        "rng",
        "/usr/libexec/60-plain",
    );
    let names = |options: &[&str]| run(tree.discover("list").arg("--json").args(options)).names();
    assert_eq!(names(&["--type=rng"]), ["80-rng"]);
    assert_eq!(
        names(&["--type=gpu"]),
        ["50-virgl", "60-plain", "70-failing"]
    );
    assert_eq!(names(&["--feature=virgl"]), ["50-virgl"]);
    assert_eq!(
        names(&["--feature=virgl", "--feature=render-node"]),
        ["50-virgl"]
    );
    assert!(names(&["--feature=virgl", "--feature=no"]).is_empty());
    assert!(names(&["--type=rng", "--feature=virgl"]).is_empty());
}

#[test]
fn find_takes_the_first_that_has_all_features() {
    let tree = Tree::new();
    let none = tree.back_end(DATA, "40-plain", PLAIN);
    tree.back_end(DATA, "50-virgl", VIRGL);
    tree.back_end(DATA, "60-virgl", VIRGL);
    tree.find().assert_found("40-plain");
    let find = |features: &[&str]| run(tree.discover("find").arg("--type=gpu").args(features));
    let found = find(&["--feature=virgl", "--feature=render-node"]);
    found.assert_found("50-virgl");
    found.assert_warns(&none, "has no virgl and no render-node");
    let found = find(&["--feature=venus"]);
    found.assert_none_found();
    assert_eq!(found.stderr.matches("has no venus").count(), 3);
    assert!(found.stderr.contains("no back-end of type gpu with venus"));
}

#[test]
fn find_passes_over_programs_that_are_not_there() {
    let tree = Tree::new();
    let gone = tree.descriptor(&format!("{DATA}/40.json"), "gpu", "/usr/libexec/gone");
    tree.back_end(DATA, "50-plain", PLAIN);
    let found = tree.find();
    found.assert_found("50-plain");
    found.assert_warns(&gone, "cannot be found");
}

#[test]
fn control_characters_of_descriptors_and_programs_are_escaped() {
    let tree = Tree::new();
    let hostile = "\u{1b}[2J\u{9b}31m\u{202e}\n";
    let write = |name: &str, kind: &str, binary: &str| {
        let content = json!({"description": hostile, "type": kind, "binary": binary});
        tree.file(format!("{DATA}/{name}"), content.to_string());
    };
    write("10.json", hostile, "/nowhere");
    write("20.json", "gpu", hostile);
    write("30.json", "gpu", &format!("/{hostile}"));
    write(&format!("40{hostile}.json"), "gpu", "/nowhere");
    write(&format!("50{hostile}"), "gpu", "/nowhere");
    tree.file(format!("{DATA}/60.json"), json!([hostile]).to_string());
    tree.back_end(
        DATA,
        "70",
        r#"printf '{"type":"\\u001b[2J","features":["\\u009b31m"]}'"#,
    );
    tree.back_end(DATA, "80", r"printf '\033[2J\302\233' >&2; exit 1");
    tree.back_end(DATA, "90", r"printf '\033[2J'");
    for arguments in [
        &["list"][..],
        &["list", "--no-run"],
        &["list", "--json"],
        &["find", "--type=gpu", "--feature=virgl"],
        &["check"],
    ] {
        let ended = run(tree.discover(arguments[0]).args(&arguments[1..]));
        for output in [&ended.stdout, &ended.stderr] {
            let commands = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
            assert!(!output.contains(commands), "{arguments:?}: {output:?}");
        }
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
    assert_eq!(tree.list().names().len(), 8);
}

#[test]
fn a_wrong_command_line_has_exit_status_2() {
    for arguments in [
        &[][..],
        &["find"],
        &["list", "--feature=x", "--no-run"],
        &["check", "--time-limit=0"],
        &["check", "--time-limit=never"],
        &["check", "stray"],
        &["frobnicate"],
    ] {
        let mut command = process::command(BINARY).unwrap();
        let ended = run(command.args(arguments));
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended:?}");
        assert_eq!(ended.stdout, "");
    }
}

#[test]
fn a_root_that_does_not_exist_has_exit_status_1() {
    let mut command = process::command(BINARY).unwrap();
    let ended = run(command.args(["list", "--root=/nonexistent"]));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("--root=/nonexistent"), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1);
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let tree = Tree::new();
    tree.back_end(DATA, "50", PLAIN);
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "exec \"$0\" list --root=\"$1\" > /dev/full"])
        .arg(process::binary(BINARY).unwrap())
        .arg(tree.path("/"));
    let ended = run(&mut command);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("cannot print"), "{}", ended.stderr);
}

#[test]
fn help_says_where_it_looks() {
    let mut command = process::command(BINARY).unwrap();
    let ended = run(command.arg("--help"));
    assert_eq!(ended.code, Some(0));
    for word in [
        DATA,
        CONFIG,
        "XDG_CONFIG_HOME",
        "XDG_DATA_DIRS",
        "XDG_DATA_HOME",
        "/usr/local/share",
        "Exit status",
    ] {
        assert!(ended.stdout.contains(word), "{word}");
    }
}

#[test]
fn help_that_cannot_be_printed_is_a_failure() {
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["--version"],
        &["list", "--help"],
    ] {
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let mut command = process::command(BINARY).unwrap();
        process::inherit(&mut command, full.into(), 1);
        let ended = run(command.args(arguments));
        assert_eq!(ended.code, Some(1), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains("cannot print"), "{}", ended.stderr);
    }
}

#[test]
fn a_stderr_that_takes_nothing_changes_no_exit_status() {
    let tree = Tree::new();
    let full = || {
        std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let mut command = tree.discover("find");
    process::inherit(&mut command, full().into(), 2);
    assert_eq!(run(command.arg("--type=gpu")).code, Some(3));
    let mut command = process::command(BINARY).unwrap();
    process::inherit(&mut command, full().into(), 2);
    assert_eq!(run(command.arg("--no-such-option")).code, Some(2));
}
