// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest in User-Mode Linux, which boots in a second. Its rings are packed: it uses all that the device offers.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vhost_device_tests::transfer;

use super::{
    ANSWER, BackEnd, GUEST, HOST, PATIENCE, allow_many_files, amount, answer, question, read_all,
};

/// Moves data both ways at once, over connections that the guest makes.
fn exchange(connections: u32) {
    allow_many_files();
    let back_end = BackEnd::start(GUEST, &[]);
    let listener = back_end.listen(1000);
    let count = amount() / u64::from(connections);
    let script = format!("$guest connect {HOST} 1000 --connections={connections} --count={count}");
    back_end.run_with(&script, || {
        let sockets = back_end.accept_all(&listener, connections);
        transfer::streams(sockets, count, PATIENCE).unwrap();
    });
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_both_ways_over_one_connection() {
    exchange(1);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_both_ways_over_64_connections() {
    exchange(64);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_both_ways_over_1000_connections() {
    exchange(1000);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_both_ways_over_connections_of_the_host() {
    const CONNECTIONS: u32 = 64;
    let back_end = BackEnd::start(GUEST, &[]);
    let count = amount() / u64::from(CONNECTIONS);
    let script =
        format!("$guest listen 1000 --connections={CONNECTIONS} --count={count} > $work/log");
    back_end.run_with(&script, || {
        let sockets = (0..CONNECTIONS).map(|_| back_end.connect(1000).into());
        transfer::streams(sockets.collect(), count, PATIENCE).unwrap();
    });
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn messages_keep_their_bounds() {
    const MESSAGES: u32 = 300;
    let back_end = BackEnd::start(GUEST, &[]);
    let listener = back_end.listen_for_messages(1000);
    let script = format!(
        r#"
        $guest --messages connect {HOST} 1000 --count={MESSAGES} || exit 2
        $guest --messages listen 1001 --count={MESSAGES} > $work/log || exit 3
        "#
    );
    back_end.run_with(&script, || {
        transfer::messages(&back_end.accept(&listener), MESSAGES).unwrap();
        let socket = back_end.connect_for_messages(1001);
        transfer::messages(&socket, MESSAGES).unwrap();
    });
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn socat_talks_to_the_host_both_ways() {
    let back_end = BackEnd::start(GUEST, &[]);
    let listener = back_end.listen(1000);
    let script = r#"
        echo question of the guest | socat -t60 - VSOCK-CONNECT:2:1000 > $work/answer || exit 2
        socat -t60 VSOCK-LISTEN:1001 SYSTEM:'cat; echo answer of the guest' || exit 3
    "#;
    back_end.run_with(script, || {
        assert_eq!(answer(&back_end, &listener), "question of the guest\n");
        assert_eq!(question(&back_end, 1001), ANSWER);
    });
    assert_eq!(back_end.read("answer"), "answer of the host\n");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_refused_connection_fails_at_once() {
    let back_end = BackEnd::start(GUEST, &[]);
    back_end.run(
        r#"
        $guest refused 2 1000 > $work/port || exit 2
        $guest refused 9 1000 > $work/cid || exit 3
        $guest --messages refused 2 1000 > $work/messages || exit 4
        "#,
    );
    for name in ["port", "cid", "messages"] {
        let text = back_end.read(name);
        let milliseconds = text
            .trim()
            .strip_prefix("@refused ECONNRESET ")
            .unwrap_or_else(|| panic!("{name}: {text}"));
        // Without an answer, Linux gives up after two seconds.
        let milliseconds: u64 = milliseconds.parse().unwrap();
        assert!(milliseconds < 1000, "{name}: {milliseconds}");
    }
}

/// systemd in a guest reports that it is ready to the address in its credential `vmm.notify_socket`: it sends, ends its direction, and waits
/// for the end of the other one.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_host_is_notified_as_by_systemd() {
    let back_end = BackEnd::start(GUEST, &[]);
    let streams = back_end.listen(1000);
    let messages = back_end.listen_for_messages(1001);
    let script = r#"
        $guest notify 2 1000 || exit 2
        $guest --messages notify 2 1001 || exit 3
    "#;
    back_end.run_with(script, || {
        for listener in [streams.as_fd(), messages.as_fd()] {
            let mut stream = UnixStream::from(back_end.accept(listener));
            assert_eq!(read_all(&mut stream), "READY=1\n");
        }
    });
}
