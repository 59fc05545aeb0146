// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! In User-Mode Linux.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use vhost_device_tests::ended::run;
use vhost_device_tests::guest;
use vhost_device_tests::process;
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{Device, Guest};

use crate::client::Client;
use crate::{Console, FUNCTIONS, LAST_LINE, LINES, PATIENCE, agent, assert_complete, text};

/// VIRTIO's number of the device type.
const CONSOLE: u32 = 3;

/// The console of the kernel, with all messages. The standard error of the process does not show them too.
const KERNEL_CONSOLE: &[&str] = &[
    "console=hvc0",
    "loglevel=8",
    "printk.devkmsg=on",
    "stderr=0",
];

/// Starts the back-end with these ports.
fn console(ports: &[&str], options: &[&str]) -> Console {
    // The kernel is built before a client waits.
    uml::kernel::prepare().unwrap();
    Console::start(uml::work().unwrap(), ports, options)
}

/// Boots a guest.
fn boot(console: &Console, kernel_arguments: &[&str], script: &str) -> Guest {
    let device = Device {
        socket: &console.path("socket"),
        id: CONSOLE,
    };
    let script = format!("{FUNCTIONS}\n{script}");
    Guest::start(
        &[device],
        kernel_arguments,
        script,
        console.directory.path(),
    )
    .unwrap()
}

/// Waits until the guest has ended, with status 0.
#[track_caller]
fn finish(console: &mut Console, guest: Guest) {
    assert_eq!(guest.wait(PATIENCE).unwrap(), 0, "status of the script");
    assert_eq!(console.program.status().unwrap(), None);
}

/// The script that logs many lines, of which the last one is known, and then does `more`.
fn logs(more: &str) -> String {
    format!(
        r#"
        await 'grep -q hvc0 /sys/class/tty/console/active'
        for line in $(seq {LINES}); do echo "line $line of the log" > /dev/kmsg; done
        echo '{LAST_LINE}' > /dev/kmsg
        dmesg > $work/dmesg
        {more}
        "#
    )
}

/// Waits for a line on the console.
const WAIT: &str = "read line < /dev/hvc0";

/// Returns the log of a guest that has ended.
fn log(console: &Console) -> String {
    fs::read_to_string(console.path("dmesg")).unwrap()
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn each_client_of_a_socket_gets_the_whole_boot_log() {
    let mut console = console(&["unix=DIR/port"], &[]);
    let mut early = console.connect("port");
    let guest = boot(&console, KERNEL_CONSOLE, &logs(WAIT));
    let shown = early.wait_for(LAST_LINE);
    let late = console.connect("port").wait_for(LAST_LINE);
    early.send("end\n");
    finish(&mut console, guest);
    let log = log(&console);
    assert_complete(&shown, &log);
    assert_complete(&late, &log);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_terminal_shows_the_whole_boot_log() {
    let mut console = console(&["pty=DIR/port"], &[]);
    let mut client = console.open("port");
    let guest = boot(&console, KERNEL_CONSOLE, &logs(WAIT));
    let shown = client.wait_for(LAST_LINE);
    client.send("end\n");
    finish(&mut console, guest);
    assert_complete(&shown, &log(&console));
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn files_have_the_whole_boot_log() {
    let mut console = console(&["file=DIR/port"], &["--log=DIR/log"]);
    let guest = boot(&console, KERNEL_CONSOLE, &logs(""));
    finish(&mut console, guest);
    let log = log(&console);
    for file in ["port", "log"] {
        let file = fs::read(console.path(file)).unwrap();
        assert_complete(&String::from_utf8_lossy(&file), &log);
    }
}

/// The script that lets root log in once.
const LOGIN: &str = r#"
    printf 'root:%s:0:0:root:/tmp:/bin/sh\n' "$(busybox mkpasswd -m md5 secret)" > /tmp/passwd
    busybox mount --bind /tmp/passwd /etc/passwd
    printf '#!/bin/sh\nexec busybox login "$@"\n' > /tmp/login
    chmod +x /tmp/login
    await '[ -e /dev/hvc0 ]'
    busybox getty -L -l /tmp/login 115200 hvc0 vt100
"#;

/// Logs in.
#[track_caller]
fn log_in(client: &mut Client) {
    client.wait_for("login: ");
    client.send("root\r");
    client.wait_for("Password: ");
    client.send("secret\r");
    client.wait_for("# ");
}

/// Runs a command in the shell of a guest, and returns the line that it writes.
#[track_caller]
fn shell(client: &mut Client, command: &str) -> String {
    client.send(format!("echo \"<$({command})>\"\r"));
    // The quotation mark behind it distinguishes the echo of the command.
    let output = client.wait_for(">\r\n");
    let (_, line) = output.rsplit_once('<').unwrap();
    line.trim_end_matches(">\r\n").to_owned()
}

/// Waits until the terminal in the guest has this size.
#[track_caller]
fn wait_for_size(client: &mut Client, expected: &str) {
    wait_until(expected, || shell(client, "stty size") == expected);
}

/// Waits until a condition holds.
#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_user_logs_in_through_a_terminal_and_resizes_it() {
    let mut console = console(&["pty=DIR/port"], &[]);
    let mut client = console.open("port");
    client.resize(40, 100);
    let guest = boot(&console, &[], LOGIN);
    log_in(&mut client);
    assert_eq!(shell(&mut client, "tty"), "/dev/hvc0");
    wait_for_size(&mut client, "40 100");
    for (rows, columns) in [(24, 80), (50, 132)] {
        client.resize(rows, columns);
        wait_for_size(&mut client, &format!("{rows} {columns}"));
    }
    // A program in the foreground gets a signal. It is not this shell, which puts each of its own programs there.
    let script =
        r#"trap "echo now \$(stty size)" WINCH; echo started; while :; do sleep 0.05; done"#;
    client.send(format!("sh -c '{script}'\r"));
    client.wait_for("started\r\n");
    client.resize(30, 90);
    client.wait_for("now 30 90\r\n");
    // The interrupt character ends it.
    client.send("\x03");
    client.wait_for("# ");
    client.send("exit\r");
    finish(&mut console, guest);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_command_resizes_the_terminal_of_the_guest() {
    let mut console = console(&["unix=DIR/port"], &["--control-socket=DIR/control"]);
    let mut client = console.connect("port");
    let guest = boot(&console, &[], LOGIN);
    log_in(&mut client);
    for (rows, columns) in [(24, 80), (50, 132)] {
        let mut resize = process::command("vhost-device-ctl").unwrap();
        resize.arg(console.path("control")).arg("resize");
        resize.args([columns, rows].map(|number: u16| number.to_string()));
        let ended = run(&mut resize);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        wait_for_size(&mut client, &format!("{rows} {columns}"));
    }
    client.send("exit\r");
    finish(&mut console, guest);
}

/// The script that copies from and to a port with a name, and ends when the console gets a line.
fn copies(name: &str, copy: &str) -> String {
    format!(
        r#"
        named {name}
        port=/dev/virtio-ports/{name}
        {copy}
        {WAIT}
        "#
    )
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_guest_agent_answers_each_client_of_its_port() {
    let program = guest::agent::prepare().unwrap();
    let named = format!("name={},unix=DIR/agent", agent::NAME);
    let mut console = console(&["unix=DIR/port", &named], &[]);
    let command = agent::command(program.to_str().unwrap());
    let script = copies(agent::NAME, &format!("{command} &"));
    let guest = boot(&console, &[], &script);
    for id in 1..=5 {
        let mut client = console.connect("agent");
        let release = agent::assert_answers(&mut client, id);
        assert!(release.starts_with("6."), "{release}");
    }
    console.connect("port").send("end\n");
    finish(&mut console, guest);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_paste_of_a_mebibyte_arrives_in_a_terminal_of_the_guest() {
    let mut console = console(&["unix=DIR/port"], &[]);
    let mut client = console.connect("port");
    let pasted = text(1 << 20);
    let guest = boot(
        &console,
        &[],
        r#"
        await '[ -e /dev/hvc0 ]'
        # The last one to close the terminal resets it.
        exec 3<> /dev/hvc0
        stty raw -echo <&3
        echo ready >&3
        dd bs=4k count=256 iflag=fullblock of=$work/pasted <&3
        "#,
    );
    client.wait_for("ready");
    client.send(&pasted);
    finish(&mut console, guest);
    let arrived = fs::read(console.path("pasted")).unwrap();
    assert!(arrived == pasted, "the guest got other bytes");
}

/// Bytes that go through a port.
const AMOUNT: usize = 1 << 20;

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_port_loses_no_byte_from_clients_that_come_and_go() {
    let mut console = console(&["unix=DIR/port", "name=bytes,unix=DIR/bytes"], &[]);
    // A read returns 0 bytes when no client is connected.
    let copy = format!(
        r#"
        exec 3< $port
        while [ $(wc -c < $work/arrived) -lt {AMOUNT} ]; do cat <&3 >> $work/arrived; sleep 0.01; done
        "#
    );
    fs::write(console.path("arrived"), "").unwrap();
    let guest = boot(&console, &[], &copies("bytes", &copy));
    let sent = text(AMOUNT);
    let mut random = fastrand::Rng::with_seed(7);
    let mut left = sent.as_slice();
    while !left.is_empty() {
        let (part, rest) = left.split_at(random.usize(1..=100_000).min(left.len()));
        console.connect("bytes").send(part);
        left = rest;
        // Some are gone before the guest has read what they sent. More than 16 would be refused.
        let unread = || {
            let arrived = fs::metadata(console.path("arrived")).unwrap().len();
            sent.len() - left.len() - arrived as usize
        };
        wait_until("the guest reads", || unread() < 300_000);
    }
    console.connect("port").send("end\n");
    finish(&mut console, guest);
    let arrived = fs::read(console.path("arrived")).unwrap();
    assert!(arrived == sent, "{} of {} bytes", arrived.len(), sent.len());
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_port_loses_no_byte_to_clients_that_come_and_go() {
    let mut console = console(&["unix=DIR/port", "name=bytes,unix=DIR/bytes"], &[]);
    let sent = text(AMOUNT);
    fs::write(console.path("sent"), &sent).unwrap();
    let guest = boot(&console, &[], &copies("bytes", "cat $work/sent > $port"));
    let mut random = fastrand::Rng::with_seed(9);
    let mut arrived = Vec::new();
    while arrived.len() < sent.len() {
        let mut client = console.connect("bytes");
        let count = random.usize(1..=100_000).min(sent.len() - arrived.len());
        arrived.extend(client.receive(count));
        arrived.extend(client.stop_reading());
        let same = sent
            .iter()
            .zip(&arrived)
            .position(|(sent, arrived)| sent != arrived);
        assert_eq!(same, None, "the first difference");
    }
    assert_eq!(arrived.len(), sent.len());
    console.connect("port").send("end\n");
    finish(&mut console, guest);
}
