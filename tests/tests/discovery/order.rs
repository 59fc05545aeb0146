// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which files are used, and in which order.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{CONFIG, DATA, HOME, PLAIN, Tree, run};

#[test]
fn nothing_is_found_where_nothing_is_installed() {
    let tree = Tree::new();
    assert!(tree.list().names().is_empty());
    tree.find().assert_none_found();
    tree.check().assert_silent();
}

#[test]
fn files_of_all_directories_are_in_the_byte_order_of_their_names() {
    let tree = Tree::new();
    for (directory, name) in [
        (DATA, "9-a"),
        (DATA, "50-b"),
        (CONFIG, "50-Z"),
        (CONFIG, "10-z"),
        (HOME, "50-a"),
        (HOME, "zz"),
        (HOME, "AA"),
    ] {
        tree.back_end(directory, name, PLAIN);
    }
    let names = ["10-z", "50-Z", "50-a", "50-b", "9-a", "AA", "zz"];
    assert_eq!(tree.list().names(), names);
    tree.find().assert_found("10-z");
    tree.check().assert_silent();
}

#[test]
fn a_file_replaces_those_of_its_name_in_more_general_directories() {
    let tree = Tree::new();
    tree.program("/bin/program", PLAIN);
    let find = || {
        let files = run(tree.discover("list").arg("--no-run")).stdout;
        assert_eq!(files.lines().count(), 2, "a heading and one line: {files}");
        files
    };
    for directory in [DATA, CONFIG, HOME] {
        let file = tree.descriptor(&format!("{directory}/50.json"), "gpu", "/bin/program");
        assert!(find().contains(file.to_str().unwrap()));
    }
    // One of another type replaces it all the same.
    tree.descriptor(&format!("{HOME}/50.json"), "rng", "/bin/program");
    tree.find().assert_none_found();
}

#[test]
fn an_empty_file_hides_those_of_its_name_in_more_general_directories() {
    let tree = Tree::new();
    tree.back_end(DATA, "50-a", PLAIN);
    tree.back_end(DATA, "50-b", PLAIN);
    tree.find().assert_found("50-a");
    tree.file(format!("{CONFIG}/50-a.json"), "");
    tree.find().assert_found("50-b");
    assert_eq!(tree.list().names(), ["50-b"]);
    tree.check().assert_silent();

    // A more specific directory brings the name back.
    tree.back_end(HOME, "50-a", PLAIN);
    assert_eq!(tree.list().names(), ["50-a", "50-b"]);
}

#[test]
fn an_empty_file_hides_nothing_in_more_specific_directories() {
    let tree = Tree::new();
    tree.file(format!("{DATA}/50-a.json"), "");
    tree.back_end(CONFIG, "50-a", PLAIN);
    tree.find().assert_found("50-a");
}

#[test]
fn a_bad_file_is_left_out_with_a_warning() {
    let tree = Tree::new();
    tree.back_end(DATA, "50-a", PLAIN);
    tree.back_end(DATA, "60-b", PLAIN);
    let bad = tree.file(format!("{CONFIG}/50-a.json"), "{");
    let found = tree.find();
    found.assert_found("60-b");
    found.assert_warns(&bad, "is not a descriptor");
    let listed = tree.list();
    assert_eq!(listed.names(), ["60-b"]);
    listed.assert_warns(&bad, "is not a descriptor");
}

#[test]
fn a_dangling_link_is_left_out_with_a_warning() {
    let tree = Tree::new();
    tree.back_end(DATA, "50-a", PLAIN);
    let link = tree.link(&format!("{CONFIG}/40-b.json"), "/nowhere");
    let found = tree.find();
    found.assert_found("50-a");
    found.assert_warns(&link, "broken symbolic link");
}

#[test]
fn a_dangling_link_replaces_files_of_its_name_too() {
    let tree = Tree::new();
    tree.back_end(DATA, "50-a", PLAIN);
    tree.back_end(DATA, "60-b", PLAIN);
    tree.link(&format!("{CONFIG}/50-a.json"), "/nowhere");
    tree.find().assert_found("60-b");
}

#[test]
fn hidden_files_do_not_count() {
    let tree = Tree::new();
    tree.file(format!("{DATA}/.50.json.swp"), "{");
    tree.descriptor(&format!("{DATA}/.40.json"), "gpu", "/none");
    assert!(tree.list().names().is_empty());
    tree.check().assert_silent();
}

#[test]
fn a_directory_among_the_files_does_not_count() {
    let tree = Tree::new();
    tree.file(format!("{DATA}/old/50.json"), "{");
    assert!(tree.list().names().is_empty());
    tree.check().assert_silent();
}

#[test]
fn names_need_not_be_utf_8() {
    let tree = Tree::new();
    tree.program("/usr/libexec/a", PLAIN);
    let name = OsStr::from_bytes(b"50-\xff\n.json");
    tree.file(
        Path::new(DATA).join(name),
        r#"{"description":"d","type":"gpu","binary":"/usr/libexec/a"}"#,
    );
    tree.find().assert_found("a");
    let table = run(&mut tree.discover("list")).stdout;
    assert!(table.ends_with("/50-\\xff\\n.json\n"), "{table:?}");
    assert_eq!(tree.list().names(), ["50-\u{fffd}\n"]);
    tree.check().assert_silent();
}

#[test]
fn xdg_config_home_is_read_instead_of_the_one_in_home() {
    let tree = Tree::new();
    tree.back_end(HOME, "50-home", PLAIN);
    tree.back_end("/my/config/qemu/vhost-user", "50-config", PLAIN);
    let find = |config: &str| {
        let mut command = tree.discover("find");
        run(command.arg("--type=gpu").env("XDG_CONFIG_HOME", config))
    };
    find("/my/config").assert_found("50-config");
    find("").assert_found("50-home");
    find("my/config").assert_found("50-home");
}

#[test]
fn without_a_home_the_other_directories_are_read() {
    let tree = Tree::new();
    tree.back_end(HOME, "40-home", PLAIN);
    tree.back_end(CONFIG, "50-config", PLAIN);
    let mut command = tree.discover("find");
    run(command.arg("--type=gpu").env_remove("HOME")).assert_found("50-config");
}

#[test]
fn xdg_data_directories_are_more_specific_than_usr_share_and_less_than_etc() {
    let tree = Tree::new();
    let local = "/usr/local/share/qemu/vhost-user";
    tree.program("/bin/program", PLAIN);
    let listed = |expected: &str| {
        let mut command = tree.discover("list");
        let listed = run(command
            .arg("--no-run")
            .env("XDG_DATA_DIRS", "/usr/local/share:/opt/share")
            .env("XDG_DATA_HOME", "/home/me/data"));
        let expected = tree.path(expected).join("50.json");
        assert!(
            listed.stdout.contains(expected.to_str().unwrap()),
            "{expected:?}: {listed:?}"
        );
    };
    let opt = "/opt/share/qemu/vhost-user";
    let home = "/home/me/data/qemu/vhost-user";
    for directory in [DATA, opt, local, home, CONFIG] {
        tree.descriptor(&format!("{directory}/50.json"), "gpu", "/bin/program");
        listed(directory);
    }
    // Without the variables only the default one is read.
    for (directory, name) in [(opt, "10-opt"), (home, "20-home"), (local, "30-local")] {
        tree.back_end(directory, name, PLAIN);
    }
    assert_eq!(tree.list().names(), ["30-local", "50"]);
}

#[test]
fn data_of_the_user_is_read_and_hidden_by_what_is_configured() {
    let tree = Tree::new();
    let local = "/usr/local/share/qemu/vhost-user";
    let home = "/home/me/.local/share/qemu/vhost-user";
    tree.back_end(local, "40-local", PLAIN);
    tree.back_end(home, "50-home", PLAIN);
    tree.back_end(home, "60-hidden", PLAIN);
    tree.file(format!("{home}/40-local.json"), "");
    tree.file(format!("{CONFIG}/60-hidden.json"), "");
    assert_eq!(tree.list().names(), ["50-home"]);
    tree.find().assert_found("50-home");
}

#[test]
fn links_in_the_root_lead_to_files_in_the_root() {
    let tree = Tree::new();
    tree.program("/opt/gpu/bin/run", PLAIN);
    tree.link("/usr/libexec/gpu", "/opt/gpu/bin/run");
    tree.descriptor("/opt/gpu/share/gpu.json", "gpu", "/usr/libexec/gpu");
    tree.link(
        "/usr/local/descriptors/50-gpu.json",
        "../../../../../../../../../../opt/gpu/share/gpu.json",
    );
    tree.link(DATA, "/usr/local/descriptors");
    tree.find().assert_found("gpu");
    tree.check().assert_silent();
}
