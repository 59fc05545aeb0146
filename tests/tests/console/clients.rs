// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The clients of a console: they come, go, read slowly, and several at a time.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[test]
fn what_the_guest_writes_reaches_the_client_and_the_other_way_round() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let client = device.client("port");
    let mut driver = device.connect();
    driver.write(0, b"login: ", PATIENCE);
    assert_eq!(receive(&client, 7), b"login: ");
    { &client }.write_all(b"root\r").unwrap();
    assert_eq!(driver.read(0, 5, PATIENCE), b"root\r");
}

#[test]
fn bytes_and_messages_are_counted_separately() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let client = device.client("port");
    let mut driver = device.connect();
    driver.write(0, b"login: ", PATIENCE);
    { &client }.write_all(b"root\r").unwrap();
    assert_eq!(driver.read(0, 5, PATIENCE), b"root\r");
    // Statistics of a batch follow after it.
    device.wait_for(0, |_| {
        let answer = device.command("query", json!({})).unwrap();
        let bytes = |kind: &str| -> u64 {
            let requests = answer["requests"].as_array().unwrap().iter();
            let requests = requests.filter(|request| request["type"] == kind);
            requests
                .map(|request| request["bytes"].as_u64().unwrap())
                .sum::<u64>()
        };
        ["transmit", "receive", "control"].map(bytes) == [7u64, 5, 48]
    });
    let port = device.port(0);
    assert_eq!(port["bytes-from-guest"], 7);
    assert_eq!(port["bytes-to-guest"], 5);
}

#[test]
fn a_guest_without_multiport_uses_the_first_port() {
    let device = Device::start(&["unix=DIR/port", "unix=DIR/other"], &[]);
    let mut options = Options::default();
    options.features &= !(1 << 1);
    let mut driver = device.connect_with(&options);
    driver.start(PATIENCE);
    let client = device.client("port");
    driver.write(0, b"hello", PATIENCE);
    assert_eq!(receive(&client, 5), b"hello");
    { &client }.write_all(b"world").unwrap();
    assert_eq!(driver.read(0, 5, PATIENCE), b"world");
}

/// rust-vmm's device corrupts its ring with the tenth byte.
#[test]
fn a_paste_of_1_mib_arrives_intact() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let client = device.client("port");
    let mut driver = device.connect();
    let paste = text(1 << 20);
    let sent = paste.clone();
    let sender = std::thread::spawn(move || { &client }.write_all(&sent).unwrap());
    assert_same(&driver.read(0, paste.len(), PATIENCE), &paste);
    sender.join().unwrap();
}

/// Writes `stream` to the console, as fast as `client` reads, and compares what it receives.
fn write_and_compare(driver: &mut ConsoleDriver, client: &UnixStream, stream: &[u8]) {
    let received = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for chunk in stream.chunks(64 << 10) {
                assert_same(&receive(client, chunk.len()), chunk);
                received.fetch_add(chunk.len(), Ordering::Relaxed);
            }
        });
        let mut sent = 0;
        for chunk in stream.chunks(64 << 10) {
            driver.write(0, chunk, PATIENCE);
            sent += chunk.len();
            // The guest does not wait for a client that is much slower.
            let deadline = Instant::now() + PATIENCE;
            while received.load(Ordering::Relaxed) + HISTORY / 2 < sent {
                assert!(Instant::now() < deadline);
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    });
}

#[test]
fn all_that_the_guest_writes_arrives_at_a_client_that_reads() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let client = device.client("port");
    let mut driver = device.connect();
    write_and_compare(&mut driver, &client, &text(8 << 20));
    assert_eq!(device.port(0)["bytes-missed"], 0);
}

#[test]
fn a_client_that_does_not_read_never_makes_the_guest_wait_and_misses_the_oldest_bytes() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let stuck = device.client("port");
    let mut driver = device.connect();
    device.wait_for_clients(0, 1);
    let stream = text(8 << 20);
    driver.write(0, &stream, PATIENCE);
    // What it reads begins at the beginning, has one gap, and ends with the end.
    stuck
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut seen = Vec::new();
    let _ = { &stuck }.read_to_end(&mut seen);
    let missed = device.port(0)["bytes-missed"].as_u64().unwrap() as usize;
    assert!(missed > 4 << 20, "{missed}");
    assert_eq!(seen.len() + missed, stream.len());
    let begin = seen.iter().zip(&stream).take_while(|(a, b)| a == b).count();
    let (first, second) = seen.split_at(begin);
    assert_same(first, &stream[..begin]);
    assert!(second.len() >= HISTORY - SCROLLBACK, "{}", second.len());
    assert_same(second, &stream[stream.len() - second.len()..]);
}

#[test]
fn a_client_that_does_not_read_does_not_disturb_another_one() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let _stuck = device.client("port");
    let mut driver = device.connect();
    device.wait_for_clients(0, 1);
    let client = device.client("port");
    device.wait_for_clients(0, 2);
    write_and_compare(&mut driver, &client, &text(4 << 20));
}

#[test]
fn a_late_client_receives_the_last_64_kib() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect();
    let stream = text(200_000);
    driver.write(0, &stream, PATIENCE);
    for _ in 0..2 {
        let client = device.client("port");
        assert_same(
            &receive(&client, SCROLLBACK),
            &stream[stream.len() - SCROLLBACK..],
        );
        assert_quiet(&client);
    }
    let client = device.client("port");
    receive(&client, SCROLLBACK);
    driver.write(0, b"more", PATIENCE);
    assert_eq!(receive(&client, 4), b"more");
}

#[test]
fn output_before_the_first_client_is_kept() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect();
    driver.write(0, b"early", PATIENCE);
    assert_eq!(receive(&device.client("port"), 5), b"early");
}

#[test]
fn all_clients_read_and_only_the_first_one_writes() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect();
    let first = device.client("port");
    device.wait_for_clients(0, 1);
    let second = device.client("port");
    device.wait_for_clients(0, 2);
    driver.write(0, b"both", PATIENCE);
    assert_eq!(receive(&first, 4), b"both");
    assert_eq!(receive(&second, 4), b"both");
    { &second }.write_all(b"lost").unwrap();
    device.wait_for(0, |port| port["bytes-discarded"] == 4);
    { &first }.write_all(b"kept").unwrap();
    assert_eq!(driver.read(0, 4, PATIENCE), b"kept");
    drop(first);
    device.wait_for_clients(0, 1);
    { &second }.write_all(b"next").unwrap();
    assert_eq!(driver.read(0, 4, PATIENCE), b"next");
}

#[test]
fn no_byte_is_lost_while_clients_come_and_go() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect();
    let stream = text(400 << 10);
    let path = device.path("port");
    let sent = stream.clone();
    let sender = std::thread::spawn(move || {
        for chunk in sent.chunks(3000) {
            UnixStream::connect(&path)
                .unwrap()
                .write_all(chunk)
                .unwrap();
        }
    });
    assert_same(&driver.read(0, stream.len(), PATIENCE), &stream);
    sender.join().unwrap();
    assert_eq!(device.port(0)["bytes-discarded"], 0);
    device.wait_for_clients(0, 0);
}

#[test]
fn a_client_that_has_ended_its_input_still_reads() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect();
    let client = device.client("port");
    { &client }.write_all(b"command").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(driver.read(0, 7, PATIENCE), b"command");
    driver.write(0, b"answer", PATIENCE);
    assert_eq!(receive(&client, 6), b"answer");
    // The next one is the first that can send.
    let next = device.client("port");
    device.wait_for_clients(0, 2);
    { &next }.write_all(b"next").unwrap();
    assert_eq!(driver.read(0, 4, PATIENCE), b"next");
}

#[test]
fn the_number_of_clients_is_limited() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect();
    let clients: Vec<UnixStream> = (0..16).map(|_| device.client("port")).collect();
    device.wait_for_clients(0, 16);
    let waiting = device.client("port");
    driver.write(0, b"line", PATIENCE);
    assert_quiet(&waiting);
    drop(clients);
    device.wait_for_clients(0, 1);
    assert_eq!(receive(&waiting, 4), b"line");
    { &waiting }.write_all(b"key").unwrap();
    assert_eq!(driver.read(0, 3, PATIENCE), b"key");
}

/// An operator can see why.
#[test]
fn clients_that_are_gone_do_not_keep_others_out_if_the_guest_does_not_read() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let mut driver = device.connect_with(&Options::default());
    driver.write(0, b"panic", PATIENCE);
    for _ in 0..20 {
        device.client("port").write_all(b"unread").unwrap();
    }
    let client = device.client("port");
    assert_eq!(receive(&client, 5), b"panic");
    assert_eq!(device.port(0)["bytes-discarded"], 5 * 6);
}

#[test]
fn clients_stay_when_the_front_end_connects_again() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let client = device.client("port");
    for round in 0..3 {
        let mut driver = device.connect();
        let line = format!("boot {round}");
        driver.write(0, line.as_bytes(), PATIENCE);
        assert_eq!(receive(&client, line.len()), line.as_bytes());
        { &client }.write_all(b"key").unwrap();
        assert_eq!(driver.read(0, 3, PATIENCE), b"key");
    }
}

#[test]
fn what_clients_send_waits_for_buffers_of_the_guest() {
    let device = Device::start(&["unix=DIR/port"], &[]);
    let client = device.client("port");
    { &client }.write_all(b"typed before the start").unwrap();
    let mut driver = device.connect();
    assert_eq!(driver.read(0, 22, PATIENCE), b"typed before the start");
}

#[test]
fn the_program_connects_to_a_socket_and_connects_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server");
    let listen = || std::os::unix::net::UnixListener::bind(&path).unwrap();
    let listener = listen();
    let device = Device::start_in(directory, &["unix-connect=DIR/server"], &[], |_| {});
    let path = device.path("server");
    let mut driver = device.connect();
    let (client, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    driver.write(0, b"one", PATIENCE);
    assert_eq!(receive(&client, 3), b"one");
    drop((client, listener));
    device.wait_for_clients(0, 0);
    std::fs::remove_file(&path).unwrap();
    driver.write(0, b"two", PATIENCE);
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (client, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(receive(&client, 6), b"onetwo");
    { &client }.write_all(b"three").unwrap();
    assert_eq!(driver.read(0, 5, PATIENCE), b"three");
}

#[test]
fn the_program_connects_again_when_the_last_bytes_arrive_with_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let device = Device::start_in(directory, &["unix-connect=DIR/server"], &[], |_| {});
    let mut driver = device.connect();
    let (client, _) = listener.accept().unwrap();
    device.wait_for_clients(0, 1);
    { &client }.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(driver.read(0, 3, PATIENCE), b"bye");
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while listener.accept().is_err() {
        assert!(Instant::now() < deadline, "no second connection");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes that a filter passes, and that do harm to some terminals without the first one.
const HARMFUL_IN_PARTS: &[u8] = "\u{1f49b}6n\x1b[31m".as_bytes();

#[test]
fn a_late_client_of_a_filtered_console_begins_with_a_line() {
    let device = Device::start(&["unix=DIR/port"], &["--filter"]);
    let mut driver = device.connect();
    let line = [HARMFUL_IN_PARTS.repeat(3).as_slice(), b"\n"].concat();
    driver.write(0, &line.repeat(SCROLLBACK / line.len() + 50), PATIENCE);
    let count = SCROLLBACK / line.len();
    let client = device.client("port");
    assert_same(&receive(&client, count * line.len()), &line.repeat(count));
    assert_quiet(&client);
    // Without a line there is no good place.
    driver.write(0, &HARMFUL_IN_PARTS.repeat(10_000), PATIENCE);
    let client = device.client("port");
    device.wait_for_clients(0, 2);
    assert_quiet(&client);
    driver.write(0, b"more", PATIENCE);
    assert_eq!(receive(&client, 4), b"more");
}

#[test]
fn a_client_of_a_filtered_console_that_misses_bytes_continues_with_a_line() {
    let device = Device::start(&["unix=DIR/port"], &["--filter"]);
    let stuck = device.client("port");
    let mut driver = device.connect();
    device.wait_for_clients(0, 1);
    let line = [HARMFUL_IN_PARTS.repeat(3).as_slice(), b"\n"].concat();
    driver.write(0, &line.repeat((4 << 20) / line.len()), PATIENCE);
    stuck
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut seen = Vec::new();
    let _ = { &stuck }.read_to_end(&mut seen);
    let mut parts = seen.split(|byte| *byte == 0x18);
    let (Some(_), Some(after), None) = (parts.next(), parts.next(), parts.next()) else {
        panic!("one CAN");
    };
    assert_same(after, &line.repeat(after.len() / line.len()));
}

#[test]
fn the_filter_takes_out_what_could_harm_a_terminal() {
    let device = Device::start(
        &["unix=DIR/port", "name=raw,unix=DIR/raw"],
        &["--filter", "--log=DIR/log"],
    );
    let client = device.client("port");
    let channel = device.client("raw");
    let mut driver = device.connect();
    let line = b"\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[6n ok\n";
    // In pieces, as a driver may send it.
    for piece in line.chunks(3) {
        driver.write(0, piece, PATIENCE);
    }
    let passed = b"\x1b[31mred\x1b[0m ok\n";
    assert_eq!(receive(&client, passed.len()), passed);
    assert_eq!(written(&device.path("log"), passed.len()), passed);
    driver.write(1, line, PATIENCE);
    assert_eq!(receive(&channel, line.len()), line);
}
