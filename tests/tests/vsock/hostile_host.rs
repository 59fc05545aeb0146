// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs of the host that mean harm, or are broken.

use std::io::Write;

use vhost_device_tests::front_end::vsock::{STREAM, op};

use super::*;

#[test]
fn an_invalid_first_line_closes_the_connection() {
    let device = Device::start();
    let mut guest = device.connect();
    for line in [
        &b"\n"[..],
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT 4294967296\n",
        b"CONNECT -1\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT 00000000000000000000000000000000000\n",
        b"0123456789012345678901234567890123456789",
        b"\xff\xfe\n",
    ] {
        let mut host = UnixStream::connect(device.path("guest")).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may be closed before all is written.
        let _ = host.write_all(line);
        assert_closed(&mut host);
    }
    guest.expect_nothing();
    guest.assert_works(&device);
}

#[test]
fn a_host_that_does_not_finish_its_first_line_is_disconnected_after_two_seconds() {
    let device = device_with_control(&[]);
    let mut guest = device.connect();
    let begin = Instant::now();
    let hosts = [&b""[..], b"CONNECT 7000"].map(|text| {
        let mut host = UnixStream::connect(device.path("guest")).unwrap();
        host.write_all(text).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        host
    });
    wait_until("both are accepted", || device.connections("open") == 2);
    guest.assert_works(&device);
    for mut host in hosts {
        assert_closed(&mut host);
    }
    assert!(begin.elapsed() >= Duration::from_millis(1900));
    assert_eq!(device.connections("open"), 0);
    guest.expect_nothing();
}

#[test]
fn a_host_that_the_guest_does_not_answer_is_disconnected_after_two_seconds() {
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = device.call(7000);
    let request = guest.0.receive();
    let link = Link::to_host(7000, request.src_port);
    let begin = Instant::now();
    guest.expect(&link, op::RST);
    assert!(begin.elapsed() >= Duration::from_millis(1900));
    assert_eq!(read_to_end(&mut host), b"");
    // The guest answers too late.
    guest.send(&link.packet(op::RESPONSE));
    guest.expect(&link, op::RST);
}

#[test]
fn hosts_that_connect_and_leave_do_no_harm() {
    let device = device_with_control(&[]);
    let mut guest = device.connect();
    for round in 0..500 {
        let mut host = UnixStream::connect(device.path("guest")).unwrap();
        if round % 2 == 0 {
            host.write_all(b"CONNECT 7000\nand data").unwrap();
        }
    }
    // Those that left before the guest answers are reset.
    let deadline = Instant::now() + PATIENCE;
    while device.connections("open") > 0 || guest.0.rx.has_used() {
        assert!(Instant::now() < deadline);
        if let Some(request) = guest.0.receive_within(QUIET)
            && request.op == op::REQUEST
        {
            let link = Link::to_host(7000, request.src_port);
            guest.send(&link.packet(op::RESPONSE));
        }
    }
    guest.assert_works(&device);
}

#[test]
fn a_guest_without_buffers_does_not_make_hosts_pile_up() {
    let device = device_with_control(&["--max-connections=10"]);
    let driver = VsockDriver::without_buffers(device.front_end(), 64, 4096).unwrap();
    let mut guest = Guest(driver);
    let hosts: Vec<_> = (0..50).map(|_| device.call(7000)).collect();
    wait_until("some are refused", || device.connections("refused") == 40);
    assert!(device.connections("open") <= 10);
    wait_until("all time out", || device.connections("open") == 0);
    guest.0.supply(64);
    guest.expect_nothing();
    drop(hosts);
    guest.assert_works(&device);
}

#[test]
fn empty_messages_without_end_delay_nobody() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    guest.open_link(Link {
        kind: 2,
        ..Link::to_host(1024, 5000)
    });
    let host = accept_seqpacket(&listener);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                let _ = rustix::net::send(&host, &[], flags);
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..20 {
                guest.assert_works(&device);
            }
            guest.assert_alive();
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        outcome.unwrap();
    });
}

#[test]
fn a_process_without_free_files_refuses_and_recovers() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let open = device.program.resources().unwrap().files as u64;
    let pid = Pid::from_raw(device.program.id() as i32);
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |current| Rlimit {
        current: Some(current),
        maximum,
    };
    // A control client needs a file too.
    let before = prlimit(pid, Resource::Nofile, limit(open + 2)).unwrap();
    let mut links = Vec::new();
    let refused = loop {
        let link = Link::to_host(1024 + links.len() as u32, 5000);
        guest.send(&link.packet(op::REQUEST));
        let answer = guest.0.receive();
        match answer.op {
            op::RESPONSE => links.push(link),
            op::RST => break link,
            _ => panic!("{answer:?}"),
        }
        assert!(links.len() < 10);
    };
    // A program of the host waits until there is a file for it.
    let mut host = device.call(7000);
    guest.expect_nothing();
    prlimit(pid, Resource::Nofile, before).unwrap();
    guest.accept(7000, STREAM);
    read_ok(&mut host);
    guest.open_link(refused);
    drop(listener);
}
