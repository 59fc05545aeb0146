// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that is killed and started again under a guest, which is not told. A relay reconnects: neither QEMU, for this device, nor
//! User-Mode Linux does.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use vhost_device_tests::{process, transfer};

use super::{BackEnd, GUEST, HOST, PATIENCE};

/// Sends back what each connection sends, until the test ends.
fn serve_echo(back_end: &BackEnd) {
    let listener = back_end.listen(1000);
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || echo(&mut stream));
        }
    });
}

fn echo(stream: &mut UnixStream) {
    let mut byte = [0];
    while let Ok(1) = stream.read(&mut byte) {
        if stream.write_all(&byte).is_err() {
            return;
        }
    }
}

/// Returns the value of a marker that the guest has written to its log, once it is there.
fn wait_for(back_end: &BackEnd, name: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = std::fs::read_to_string(back_end.file("log")).unwrap_or_default();
        let line = log
            .lines()
            .find_map(|line| line.strip_prefix(&format!("@{name} ")));
        if let Some(value) = line {
            return value.to_owned();
        }
        back_end.wait(deadline, &format!("no {name}: {log}"));
    }
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn after_a_restart_old_connections_break_and_new_ones_work() {
    let mut back_end = BackEnd::start(GUEST, &[]);
    let relay = back_end.put_relay_in_front();
    serve_echo(&back_end);
    let transfers = back_end.listen(1001);
    let script = format!(
        r#"
        $guest reconnect {HOST} 1000 > $work/log || exit 2
        $guest connect {HOST} 1001 --connections=8 --count=1000000 || exit 3
        "#
    );
    let run = back_end.runner(&script);
    let guest = thread::spawn(run);
    wait_for(&back_end, "connected");
    back_end.restart();
    relay.replace().unwrap();
    println!("the connection broke: {}", wait_for(&back_end, "broken"));
    let milliseconds: u64 = wait_for(&back_end, "again").trim().parse().unwrap();
    assert!(milliseconds < 1000, "{milliseconds} ms");
    transfer::streams(
        back_end.accept_all(&transfers, 8),
        1_000_000,
        process::PATIENCE,
    )
    .unwrap();
    assert_eq!(guest.join().unwrap(), 0, "status of the script");
    assert!(back_end.program.stderr().contains("split ring"));
}
