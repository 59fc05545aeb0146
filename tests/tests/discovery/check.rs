// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Findings of `check`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::{BINARY, CONFIG, DATA, Ended, HOME, PLAIN, Tree, run};

/// Asserts that there is one finding, about `file`, which contains `problem`, and a `remedy`.
#[track_caller]
pub fn assert_finding(ended: &Ended, file: &Path, problem: &str, remedy: &str) {
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.stderr, "");
    let lines: Vec<_> = ended.stdout.lines().collect();
    let [found, advice] = lines.as_slice() else {
        panic!("there should be one finding:\n{}", ended.stdout);
    };
    let rest = found.strip_prefix(&format!("{}: ", file.display()));
    assert!(rest.is_some_and(|rest| rest.contains(problem)), "{found}");
    assert!(
        advice.starts_with("    ") && advice.contains(remedy),
        "{advice}"
    );
}

#[test]
fn all_is_well() {
    let tree = Tree::new();
    for directory in [DATA, CONFIG, HOME] {
        tree.back_end(directory, "50-same", PLAIN);
    }
    tree.back_end(HOME, "60", r#"echo '{"type":"gpu","features":["venus"]}'"#);
    tree.program("/bin/fs", r#"echo '{"type":"fs"}'"#);
    tree.descriptor(&format!("{DATA}/70.json"), "fs", "/bin/fs");
    tree.file(format!("{DATA}/80.json"), "");
    tree.check().assert_silent();
}

#[test]
fn files_that_are_no_descriptors() {
    let whole = json!({"description": "d", "type": "gpu", "binary": "/b"}).to_string();
    let correct = "--print-descriptor";
    for (content, problem, remedy) in [
        ("{", "is not a descriptor: EOF", correct),
        ("\0", "is not a descriptor", correct),
        ("\u{feff}{}", "is not a descriptor", correct),
        (r#"["d","gpu","/b"]"#, "an array instead", correct),
        ("{}", "missing field `type`", correct),
        (r#"{"type":"gpu"}"#, "missing field `binary`", correct),
        (r#"{"type":1,"binary":"/b"}"#, "invalid type", correct),
        (r#"{"type":"gpu","binary":["/b"]}"#, "invalid type", correct),
        (&format!("{whole}{whole}"), "trailing characters", correct),
        (
            &r#"{"a":"#.repeat(100_000),
            "is not a descriptor: EOF",
            correct,
        ),
        (
            r#"{"description":"d","type":"gpu","binary":"/b","x":1,"x":1}"#,
            "the member \"x\" twice",
            correct,
        ),
        (
            r#"{"description":"d","type":"gpu","binary":"/b","x":[{"y":{},"y":null}]}"#,
            "the member \"y\" twice",
            correct,
        ),
        (
            r#"{"description":"d","type":"gpu","binary":"/b","x":1,"\u0078":1}"#,
            "the member \"x\" twice",
            correct,
        ),
        (" ", "white space", "make the file empty"),
        ("\n\t\r\n", "white space", "make the file empty"),
        (
            &format!("{whole}{}", " ".repeat(1 << 20)),
            "larger than 1 MiB",
            "remove",
        ),
    ] {
        let tree = Tree::new();
        let file = tree.file(format!("{DATA}/50.json"), content);
        assert_finding(&tree.check(), &file, problem, remedy);
    }
}

#[test]
fn text_that_is_not_utf_8_is_a_finding() {
    for (before, after) in [
        (
            r#"{"description":"d","type":"gpu","binary":"/b","x":""#,
            r#""}"#,
        ),
        (
            r#"{"description":"d","type":"gpu","binary":"/b",""#,
            r#"":1}"#,
        ),
        (r#"{"description":""#, r#"","type":"gpu","binary":"/b"}"#),
    ] {
        for bytes in [&b"\xff"[..], b"\xc0\x80", b"\xed\xa0\x80", b"caf\xe9"] {
            let tree = Tree::new();
            let content = [before.as_bytes(), bytes, after.as_bytes()].concat();
            let file = tree.file(format!("{DATA}/50.json"), content);
            assert_finding(
                &tree.check(),
                &file,
                "is not a descriptor",
                "--print-descriptor",
            );
        }
    }
}

#[test]
fn members_that_the_schema_does_not_know_may_have_any_value() {
    let tree = Tree::new();
    tree.program("/bin/gpu", PLAIN);
    let unknown = r#"{"a":{"b":[{"a":1},{"a":1}]},"c":-1.5e300,"d":"\u00e4","e":null,"f":true}"#;
    let content =
        format!(r#"{{"description":"d","type":"gpu","binary":"/bin/gpu","x":{unknown}}}"#);
    tree.file(format!("{DATA}/50.json"), content);
    tree.check().assert_silent();
}

#[test]
fn a_descriptor_of_the_largest_size_is_one() {
    let tree = Tree::new();
    let file = tree.back_end(DATA, "50", PLAIN);
    let mut text = fs::read_to_string(&file).unwrap();
    text += &" ".repeat((1 << 20) - text.len());
    fs::write(&file, text).unwrap();
    tree.check().assert_silent();
}

#[test]
fn a_type_that_libvirt_does_not_know() {
    let tree = Tree::new();
    tree.program("/bin/gpio", r#"echo '{"type":"gpio","features":[]}'"#);
    let file = tree.descriptor(&format!("{DATA}/50.json"), "gpio", "/bin/gpio");
    let ended = tree.check();
    assert_finding(
        &ended,
        &file,
        "has the type \"gpio\"",
        "start the program without libvirt",
    );
}

#[test]
fn a_missing_description() {
    let tree = Tree::new();
    tree.program("/bin/gpu", PLAIN);
    let content = r#"{"type":"gpu","binary":"/bin/gpu"}"#;
    let file = tree.file(format!("{DATA}/50.json"), content);
    assert_finding(&tree.check(), &file, "has no description", "add one");
}

#[test]
fn links_that_lead_nowhere() {
    let tree = Tree::new();
    let gone = tree.link(&format!("{DATA}/50.json"), "/opt/gone.json");
    assert_finding(
        &tree.check(),
        &gone,
        "broken symbolic link",
        "install what it links to",
    );

    // libvirt fails even if another file replaces it, and whatever its name is.
    tree.back_end(CONFIG, "50", PLAIN);
    assert_finding(
        &tree.check(),
        &gone,
        "broken symbolic link",
        "install what it links to",
    );
    fs::remove_file(&gone).unwrap();
    tree.check().assert_silent();
    let circle = tree.link(&format!("{DATA}/README"), "README");
    assert_finding(&tree.check(), &circle, "broken symbolic link", "remove it");
}

#[test]
fn a_directory_hides_no_descriptor() {
    let tree = Tree::new();
    tree.back_end(DATA, "50", PLAIN);
    let path = tree.place(format!("{CONFIG}/50.json"));
    // Like a link to /dev/null, which would need a device in the tree.
    fs::create_dir(&path).unwrap();
    assert_finding(
        &tree.check(),
        &path,
        "not a regular file",
        "create an empty file",
    );
    tree.find().assert_found("50");
}

#[test]
fn a_pipe_is_not_opened() {
    let tree = Tree::new();
    let path = tree.place(format!("{CONFIG}/50.json"));
    assert_eq!(run(Command::new("mkfifo").arg(&path)).code, Some(0));
    assert_finding(&tree.check(), &path, "not a regular file", "remove it");
}

#[test]
fn files_that_count_whatever_their_suffix() {
    for name in [
        "50.json~",
        "50.json.rpmsave",
        "50.json.dpkg-old",
        "50.JSON",
        "50",
    ] {
        let tree = Tree::new();
        tree.back_end(DATA, "50", PLAIN);
        let file = tree.descriptor(&format!("{DATA}/{name}"), "gpu", "/usr/libexec/50");
        assert_finding(&tree.check(), &file, "does not end in .json", "move it");
    }
    let tree = Tree::new();
    let file = tree.file(format!("{DATA}/README"), "Put descriptors here.\n");
    assert_finding(
        &tree.check(),
        &file,
        "is not a descriptor",
        "move it elsewhere",
    );
    // This one hides an unused name.
    tree.file(format!("{CONFIG}/README"), "");
    tree.check().assert_silent();
}

#[test]
fn a_directory_that_cannot_be_read() {
    let tree = Tree::new();
    let file = tree.file(CONFIG, "");
    assert_finding(&tree.check(), &file, "cannot be read", "make it readable");
}

#[test]
fn programs_that_cannot_be_run() {
    let tree = Tree::new();
    tree.file("/bin/data", "data");
    tree.link("/bin/dangling", "/bin/gone");
    let absolute = "write the absolute path";
    for (binary, problem, remedy) in [
        ("", "relative path \"\"", absolute),
        ("gpu", "relative path \"gpu\"", absolute),
        ("./bin/gpu", "relative path \"./bin/gpu\"", absolute),
        (
            "/bin/gone",
            "/bin/gone, which cannot be found",
            "install the program",
        ),
        ("/bin/dangling", "cannot be found", "install the program"),
        ("/bin/data/gpu", "cannot be found", "install the program"),
        ("/b\0", "cannot be found", "install the program"),
        (
            "/bin/data",
            "/bin/data, which is not an executable file",
            "chmod 755",
        ),
        ("/bin", "/bin, which is not an executable file", "chmod 755"),
    ] {
        let file = tree.descriptor(&format!("{DATA}/50.json"), "gpu", binary);
        assert_finding(&tree.check(), &file, problem, remedy);
        let unasked = run(tree.discover("check").arg("--no-run"));
        assert_finding(&unasked, &file, problem, remedy);
    }
}

#[test]
fn programs_that_do_not_answer_as_they_should() {
    for (script, problem, remedy) in [
        (
            "exit 1",
            "fails with --print-capabilities",
            "update the program",
        ),
        ("echo", "prints something other", "update the program"),
        (
            "echo '{}{}'",
            "prints something other",
            "update the program",
        ),
        ("exec yes", "prints more than 1 MiB", "update the program"),
        (
            "echo '{\"type\":\"gpu\"}'",
            "without a list of features",
            "libvirt does not use a GPU back-end without",
        ),
        (
            "echo '{\"type\":\"rng\",\"features\":[]}'",
            "has the type \"gpu\", but its program reports \"rng\"",
            "correct the type",
        ),
    ] {
        let tree = Tree::new();
        let file = tree.back_end(DATA, "50", script);
        assert_finding(&tree.check(), &file, problem, remedy);
    }
}

#[test]
fn a_slow_program() {
    let tree = Tree::new();
    let file = tree.back_end(DATA, "50", "exec sleep 60");
    let ended = run(&mut tree.discover_within("check", 0.2));
    assert_finding(&ended, &file, "within 0.2 s", "libvirt would wait");
}

#[test]
fn files_that_any_version_of_libvirt_reads_are_checked() {
    // libvirt for the system does not read the home directory, so what replaces a file there does not help it.
    let tree = Tree::new();
    let bad = tree.file(format!("{CONFIG}/50.json"), "bad");
    tree.back_end(HOME, "50", PLAIN);
    assert_finding(&tree.check(), &bad, "is not a descriptor", "correct it");

    // Nobody reads this one.
    fs::remove_file(bad).unwrap();
    tree.file(format!("{DATA}/50.json"), "bad");
    tree.back_end(CONFIG, "50", PLAIN);
    tree.check().assert_silent();

    // libvirt reads no $XDG_DATA_DIRS, but others do.
    let check = || {
        let mut command = tree.discover("check");
        run(command.env("XDG_DATA_DIRS", "/opt/share:/usr/share"))
    };
    let bad = tree.file(format!("{DATA}/60.json"), "bad");
    let good = tree.back_end("/opt/share/qemu/vhost-user", "60", PLAIN);
    assert_finding(&check(), &bad, "is not a descriptor", "correct it");
    fs::remove_file(bad).unwrap();
    check().assert_silent();
    fs::write(&good, "bad").unwrap();
    assert_finding(&check(), &good, "is not a descriptor", "correct it");
    tree.check().assert_silent();
}

#[test]
fn each_finding_is_reported_once_in_the_order_of_the_files() {
    let tree = Tree::new();
    let home = tree.file(format!("{HOME}/10.json"), "bad");
    let data = tree.file(format!("{DATA}/60.json"), "bad");
    let config = tree.descriptor(&format!("{CONFIG}/50"), "gpio", "relative");
    let ended = tree.check();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(!ended.stdout.contains(BINARY), "{}", ended.stdout);
    let findings = ended.stdout.lines().step_by(2);
    let files: Vec<_> = findings
        .map(|line| Path::new(line.split_once(": ").unwrap().0))
        .collect();
    assert_eq!(files, [&config, &config, &config, &home, &data]);
}
