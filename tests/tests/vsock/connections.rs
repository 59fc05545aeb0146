// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections in both directions, and how they end.

use std::io::Write;
use std::net::Shutdown;

use vhost_device_tests::front_end::vsock::{NO_RECEIVE, NO_SEND, STREAM, op};

use super::*;

#[test]
fn the_config_space_has_the_cid() {
    let device = Device::start();
    let guest = device.connect();
    assert_eq!(guest.0.cid, CID);
    assert_eq!(guest.0.front_end.queue_count(), 3);
}

#[test]
fn a_guest_connects_to_a_program_of_the_host() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    guest.send(&link.data(b"from the guest"));
    assert_eq!(read(&mut host, 14), b"from the guest");
    host.write_all(b"from the host").unwrap();
    assert_eq!(guest.read(&mut link, 13), b"from the host");
}

#[test]
fn a_program_of_the_host_connects_to_the_guest() {
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = device.call(7000);
    let mut link = guest.accept(7000, STREAM);
    assert_eq!(read_ok(&mut host), link.peer_port);
    host.write_all(b"from the host").unwrap();
    assert_eq!(guest.read(&mut link, 13), b"from the host");
    guest.send(&link.data(b"from the guest"));
    assert_eq!(read(&mut host, 14), b"from the guest");
    // The next one has another port.
    let _other = device.call(7000);
    assert_ne!(guest.accept(7000, STREAM).peer_port, link.peer_port);
}

#[test]
fn data_behind_the_first_line_is_not_lost() {
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = UnixStream::connect(device.path("guest")).unwrap();
    host.write_all(b"connect 7000\nhello").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut link = guest.accept(7000, STREAM);
    assert_eq!(guest.read(&mut link, 5), b"hello");
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_SEND);
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(read_ok(&mut host), link.peer_port);
}

#[test]
fn data_of_a_program_that_leaves_at_once_is_not_lost() {
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = UnixStream::connect(device.path("guest")).unwrap();
    host.write_all(b"CONNECT 7000\nhello").unwrap();
    drop(host);
    let mut link = guest.accept(7000, STREAM);
    assert_eq!(guest.read(&mut link, 5), b"hello");
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
}

#[test]
fn a_first_line_may_arrive_byte_by_byte() {
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = UnixStream::connect(device.path("guest")).unwrap();
    for byte in b"CONNECT 4294967294\n" {
        host.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    guest.accept(4_294_967_294, STREAM);
}

#[test]
fn a_refused_connection_of_the_host_is_closed() {
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = device.call(7000);
    let request = guest.0.receive();
    let link = Link {
        peer_port: request.src_port,
        ..Link::to_host(7000, 0)
    };
    guest.send(&link.packet(op::RST));
    assert_eq!(read_to_end(&mut host), b"");
}

#[test]
fn a_connection_of_the_guest_is_refused_at_once() {
    let device = Device::start_with(&["--allow-ports=5000,6000-6010"]);
    let mut guest = device.connect();
    let begin = Instant::now();
    let nobody = Link::to_host(1024, 5000);
    guest.assert_refused(nobody);
    // A socket that is stale, of another type, or no socket.
    drop(device.listen(6000));
    guest.assert_refused(Link::to_host(1024, 6000));
    let _messages = listen_seqpacket(&device.path("guest_6001"));
    guest.assert_refused(Link::to_host(1024, 6001));
    std::fs::write(device.path("guest_6002"), b"").unwrap();
    guest.assert_refused(Link::to_host(1024, 6002));
    let _not_allowed = device.listen(6011);
    guest.assert_refused(Link::to_host(1024, 6011));
    for cid in [0, 1, 4, CID, u32::MAX.into(), 1 << 32 | 2] {
        let peer_cid = cid;
        guest.assert_refused(Link { peer_cid, ..nobody });
    }
    for kind in [0, 3, u16::MAX] {
        guest.assert_refused(Link { kind, ..nobody });
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "not at once");
    let _listener = device.listen(5000);
    guest.open_link(nobody);
}

#[test]
fn a_socket_without_permission_is_refused_with_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let device = Device::start();
    let _listener = device.listen(5000);
    let nobody = std::fs::Permissions::from_mode(0o000);
    std::fs::set_permissions(device.path("guest_5000"), nobody).unwrap();
    let mut guest = device.connect();
    guest.assert_refused(Link::to_host(1024, 5000));
    wait_until("a warning is logged", || {
        let stderr = device.program.stderr();
        stderr.contains("cannot connect the guest to port 5000 of CID 2: Permission denied")
    });
}

#[test]
fn a_listener_whose_queue_is_full_refuses() {
    let device = Device::start();
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let socket = socket.unwrap();
    let path = device.path("guest_5000");
    bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&socket, 1).unwrap();
    let mut guest = device.connect();
    let mut opened = 0;
    for guest_port in 1024..1040 {
        let link = Link::to_host(guest_port, 5000);
        guest.send(&link.packet(op::REQUEST));
        let answer = guest.0.receive();
        link.assert_is_from(&answer);
        match answer.op {
            op::RESPONSE => opened += 1,
            op::RST => break,
            _ => panic!("{answer:?}"),
        }
    }
    assert!((1..5).contains(&opened), "{opened} connections");
    guest.assert_works(&device);
}

#[test]
fn the_end_of_the_guests_data_follows_all_of_it() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let data = pattern(40_000);
    guest.send(&link.data(&data));
    guest.send(&link.shutdown(NO_SEND));
    assert!(read_to_end(&mut host) == data);
    // The other direction still works.
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.read(&mut link, 6), b"answer");
    drop(host);
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    guest.send(&link.shutdown(NO_SEND | NO_RECEIVE));
    guest.expect(&link, op::RST);
}

#[test]
fn the_end_of_the_hosts_data_follows_all_of_it() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let data = pattern(40_000);
    host.write_all(&data).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert!(guest.read(&mut link, data.len()) == data);
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_SEND);
    guest.send(&link.data(b"still here"));
    assert_eq!(read(&mut host, 10), b"still here");
    guest.send(&link.shutdown(NO_SEND | NO_RECEIVE));
    assert_eq!(read_to_end(&mut host), b"");
    guest.expect(&link, op::RST);
}

#[test]
fn two_halves_of_a_shutdown_make_a_whole_one() {
    for (first, second) in [(NO_SEND, NO_RECEIVE), (NO_RECEIVE, NO_SEND)] {
        let device = Device::start();
        let listener = device.listen(5000);
        let mut guest = device.connect();
        let link = guest.open(1024, 5000);
        let mut host = accept_stream(&listener);
        guest.send(&link.shutdown(first));
        guest.expect_nothing();
        guest.send(&link.shutdown(second));
        guest.expect(&link, op::RST);
        assert_eq!(read_to_end(&mut host), b"");
        // The ports are free again.
        guest.open(1024, 5000);
    }
}

#[test]
fn a_guest_that_receives_nothing_more_fails_the_hosts_writes() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    guest.send(&link.shutdown(NO_RECEIVE));
    guest.send(&link.data(b"still sending"));
    assert_eq!(read(&mut host, 13), b"still sending");
    let error = host.write_all(&pattern(10)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    // The end of the host is noticed though nothing is read from it.
    drop(host);
    guest.expect(&link, op::SHUTDOWN);
    guest.send(&link.shutdown(NO_SEND));
    guest.expect(&link, op::RST);
}

#[test]
fn a_host_that_receives_nothing_more_is_reported() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(&link.data(b"lost"));
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_RECEIVE);
    // More may be on its way.
    guest.send(&link.data(b"lost too"));
    host.write_all(b"found").unwrap();
    assert_eq!(guest.read(&mut link, 5), b"found");
}

#[test]
fn a_closed_host_socket_ends_the_connection_after_its_data() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    host.write_all(b"last words").unwrap();
    drop(host);
    assert_eq!(guest.read(&mut link, 10), b"last words");
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_SEND | NO_RECEIVE);
    // What the guest sends before it knows is discarded.
    guest.send(&link.data(b"lost"));
    guest.send(&link.packet(op::RST));
    guest.expect_nothing();
    guest.open(1024, 5000);
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    drop(accept_stream(&listener));
    guest.expect(&link, op::SHUTDOWN);
    assert_eq!(device.connections("open"), 1);
    guest.expect(&link, op::RST);
    assert_eq!(device.connections("open"), 0);
}

#[test]
fn a_host_that_closes_with_unread_data_resets_the_connection() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let host = accept_stream(&listener);
    guest.send(&link.data(b"unread"));
    drop(host);
    guest.expect(&link, op::RST);
}

#[test]
fn connections_are_counted() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let _host = accept_stream(&listener);
    let _caller = device.call(7000);
    guest.accept(7000, STREAM);
    guest.assert_refused(Link::to_host(1025, 5001));
    for (name, count) in [
        ("open", 2),
        ("opened-by-guest", 1),
        ("opened-by-host", 1),
        ("refused", 1),
        ("reset-by-guest", 0),
        ("reset-by-device", 0),
    ] {
        assert_eq!(device.connections(name), count, "{name}");
    }
    guest.send(&link.packet(op::RST));
    guest.send(&Link::to_host(1024, 5000).data(b"unknown"));
    guest.expect(&link, op::RST);
    assert_eq!(device.connections("open"), 1);
    assert_eq!(device.connections("reset-by-guest"), 1);
}

#[test]
fn packets_are_counted_by_their_operations() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    for _ in 0..3 {
        guest.send(&link.data(&pattern(1000)));
    }
    read(&mut host, 3000);
    guest.send(&link.packet(99));
    guest.expect(&link, op::RST);
    let answer = device.command("query");
    let types = answer["requests"].as_array().unwrap();
    let count = |name: &str, what: &str| {
        let of = types.iter().find(|of| of["type"] == name);
        of.unwrap_or_else(|| panic!("{answer}"))[what].as_u64()
    };
    assert_eq!(count("data", "requests"), Some(3));
    assert_eq!(count("data", "bytes"), Some(3000));
    assert_eq!(count("request", "requests"), Some(1));
    assert_eq!(count("invalid", "errors"), Some(1));
}
