// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections between two guests (`--forward`).

use std::io::Write;

use vhost_device_tests::front_end::vsock::{SEQPACKET, STREAM, op};

use super::*;

/// A device of which the guest with CID 4 is in reach.
fn with_sibling(path: &std::path::Path) -> Device {
    Device::start_with(&[&format!("--forward=cid=4,uds-path={}", path.display())])
}

fn sibling_link(guest_port: u32, peer_port: u32) -> Link {
    Link {
        peer_cid: 4,
        ..Link::to_host(guest_port, peer_port)
    }
}

#[test]
fn two_guests_connect_through_the_sockets_of_their_devices() {
    let other_device = Device::start();
    let device = with_sibling(&other_device.path("guest"));
    let (mut guest, mut other) = (device.connect(), other_device.connect());
    for kind in [STREAM, SEQPACKET] {
        let mut link = Link {
            kind,
            ..sibling_link(1024, 7000)
        };
        guest.send(&link.packet(op::REQUEST));
        let mut other_link = other.accept(7000, kind);
        guest.expect(&link, op::RESPONSE);
        let flags = if kind == SEQPACKET { 1 } else { 0 };
        guest.send(&Packet {
            flags,
            ..link.data(b"question")
        });
        assert_eq!(other.read(&mut other_link, 8), b"question");
        other.send(&Packet {
            flags,
            ..other_link.data(b"answer")
        });
        assert_eq!(guest.read(&mut link, 6), b"answer");
        guest.send(&link.shutdown(3));
        guest.expect(&link, op::RST);
        let end = other.expect(&other_link, op::SHUTDOWN);
        assert_eq!(end.flags, 3);
        other.send(&other_link.packet(op::RST));
    }
}

#[test]
fn a_port_that_the_other_guest_refuses_is_refused() {
    let other_device = Device::start();
    let device = with_sibling(&other_device.path("guest"));
    let (mut guest, mut other) = (device.connect(), other_device.connect());
    let link = sibling_link(1024, 7000);
    guest.send(&link.packet(op::REQUEST));
    let request = other.0.receive();
    let other_link = Link::to_host(7000, request.src_port);
    other.send(&other_link.packet(op::RST));
    guest.expect(&link, op::RST);
}

#[test]
fn a_guest_that_is_not_there_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let device = with_sibling(&directory.path().join("guest4"));
    let mut guest = device.connect();
    let begin = Instant::now();
    guest.assert_refused(sibling_link(1024, 7000));
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[test]
fn the_device_of_another_guest_may_answer_anything() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest4");
    let listener = UnixListener::bind(&path).unwrap();
    let device = with_sibling(&path);
    let mut guest = device.connect();
    for answer in [
        &b"OK\n"[..],
        b"OK x\n",
        b"NO 5\n",
        b"\n",
        &[b'O'; 40],
        b"\xff\xff\n",
        b"",
    ] {
        let link = sibling_link(1024, 7000);
        guest.send(&link.packet(op::REQUEST));
        let mut stream = accept_stream(&listener);
        assert_eq!(read(&mut stream, 13), b"CONNECT 7000\n");
        stream.write_all(answer).unwrap();
        if answer.is_empty() {
            drop(stream);
        }
        guest.expect(&link, op::RST);
    }
    // Data behind a valid answer is not lost.
    let mut link = sibling_link(1024, 7000);
    guest.send(&link.packet(op::REQUEST));
    let mut stream = accept_stream(&listener);
    for part in [&b"O"[..], b"K 99\nhel", b"lo"] {
        stream.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.expect(&link, op::RESPONSE);
    assert_eq!(guest.read(&mut link, 5), b"hello");
    // One that does not answer is refused after two seconds.
    let link = sibling_link(1025, 7000);
    let begin = Instant::now();
    guest.send(&link.packet(op::REQUEST));
    let _silent = accept_stream(&listener);
    guest.expect(&link, op::RST);
    assert!(begin.elapsed() >= Duration::from_secs(2));
}
