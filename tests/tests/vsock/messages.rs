// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections of messages (SEQPACKET).

use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use vhost_device_tests::front_end::vsock::{END_OF_MESSAGE, NO_SEND, SEQPACKET, op};

use super::*;

fn link(guest_port: u32, peer_port: u32) -> Link {
    Link {
        kind: SEQPACKET,
        ..Link::to_host(guest_port, peer_port)
    }
}

fn fragment(link: &Link, data: &[u8], flags: u32) -> Packet {
    Packet {
        flags,
        ..link.data(data)
    }
}

fn send_message(socket: &OwnedFd, message: &[u8]) {
    assert_eq!(send(socket, message, SendFlags::empty()), Ok(message.len()));
}

fn receive_message(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 512 << 10];
    let (_, count) = recv(socket, &mut bytes[..], RecvFlags::empty()).unwrap();
    bytes.truncate(count);
    bytes
}

/// Receives a message of the host. Returns it, and the number of its packets.
#[track_caller]
fn read_message(guest: &mut Guest, link: &mut Link) -> (Vec<u8>, usize) {
    let mut message = Vec::new();
    let mut packets = 0;
    loop {
        packets += 1;
        let packet = guest.0.receive();
        link.assert_is_from(&packet);
        if packet.op == op::CREDIT_UPDATE {
            return read_message(guest, link);
        }
        assert_eq!(packet.op, op::RW, "{packet:?}");
        message.extend_from_slice(&packet.data);
        if packet.flags & END_OF_MESSAGE != 0 {
            link.taken += message.len() as u32;
            guest.send(&link.packet(op::CREDIT_UPDATE));
            return (message, packets);
        }
    }
}

#[test]
fn messages_keep_their_boundaries_in_both_directions() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let mut link = guest.open_link(link(1024, 5000));
    let host = accept_seqpacket(&listener);
    for length in [1, 2, 4052, 4053, 60_000] {
        guest.send(&fragment(&link, &pattern(length), END_OF_MESSAGE));
        assert!(receive_message(&host) == pattern(length), "{length}");
    }
    for length in [1, 2, 4052, 4053, 9000, 100_000] {
        send_message(&host, &pattern(length));
        send_message(&host, b"next");
        let (message, packets) = read_message(&mut guest, &mut link);
        assert!(message == pattern(length), "{length}");
        assert_eq!(packets, length.div_ceil(4096 - 44));
        assert_eq!(read_message(&mut guest, &mut link), (b"next".to_vec(), 1));
    }
}

#[test]
fn a_message_of_the_guest_may_come_in_fragments() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let link = guest.open_link(link(1024, 5000));
    let host = accept_seqpacket(&listener);
    for last in [&b"end"[..], b""] {
        guest.send(&fragment(&link, b"begin ", 0));
        guest.send(&fragment(&link, b"and ", 0));
        guest.send(&fragment(&link, last, END_OF_MESSAGE));
        // The other flag means nothing here.
        guest.send(&fragment(&link, b"second", END_OF_MESSAGE | 2));
        assert_eq!(receive_message(&host), [b"begin and ", last].concat());
        assert_eq!(receive_message(&host), b"second");
    }
}

#[test]
fn empty_messages_are_not_passed_on() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let mut link = guest.open_link(link(1024, 5000));
    let host = accept_seqpacket(&listener);
    guest.send(&fragment(&link, b"", END_OF_MESSAGE));
    guest.send(&fragment(&link, b"full", END_OF_MESSAGE));
    assert_eq!(receive_message(&host), b"full");
    for message in [&b""[..], b"", b"full", b"", b"more", b""] {
        send_message(&host, message);
    }
    drop(host);
    assert_eq!(read_message(&mut guest, &mut link).0, b"full");
    assert_eq!(read_message(&mut guest, &mut link).0, b"more");
    guest.expect(&link, op::SHUTDOWN);
}

#[test]
fn a_host_that_does_not_read_gets_whole_messages_later() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let link = link(1024, 5000);
    guest.send(&link.packet(op::REQUEST));
    let size = guest.expect(&link, op::RESPONSE).buf_alloc;
    let host = accept_seqpacket(&listener);
    let mut sent = Vec::new();
    let (mut bytes, mut taken) = (0, 0);
    for length in (1..4000).cycle().step_by(37) {
        while let Some(update) = guest.0.receive_within(Duration::from_millis(5)) {
            taken = update.fwd_cnt;
        }
        if size - (bytes - taken) < length {
            break;
        }
        guest.send(&fragment(&link, &pattern(length as usize), END_OF_MESSAGE));
        bytes += length;
        sent.push(length);
    }
    guest.send(&link.shutdown(NO_SEND));
    for length in sent {
        assert!(
            receive_message(&host) == pattern(length as usize),
            "{length}"
        );
    }
    assert_eq!(receive_message(&host), b"");
}

#[test]
fn a_message_that_the_guest_has_no_room_for_resets_the_connection() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let link = link(1024, 5000);
    guest.send(&Packet {
        buf_alloc: 1000,
        ..link.packet(op::REQUEST)
    });
    guest.expect(&link, op::RESPONSE);
    let host = accept_seqpacket(&listener);
    send_message(&host, &pattern(1000));
    assert_eq!(guest.expect(&link, op::RW).data.len(), 1000);
    guest.expect(&link, op::CREDIT_REQUEST);
    guest.send(&Packet {
        buf_alloc: 1000,
        fwd_cnt: 1000,
        ..link.packet(op::CREDIT_UPDATE)
    });
    send_message(&host, &pattern(1001));
    guest.expect(&link, op::RST);
    let outcome = recv(&host, &mut [0; 8], RecvFlags::empty());
    assert_eq!(outcome.unwrap_err(), rustix::io::Errno::CONNRESET);
}

#[test]
fn messages_wait_for_credit() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let link = link(1024, 5000);
    let with = |op, fwd_cnt| Packet {
        buf_alloc: 1000,
        fwd_cnt,
        ..link.packet(op)
    };
    guest.send(&with(op::REQUEST, 0));
    guest.expect(&link, op::RESPONSE);
    let host = accept_seqpacket(&listener);
    send_message(&host, &pattern(700));
    send_message(&host, &pattern(600));
    let first = guest.expect(&link, op::RW);
    assert_eq!((first.data.len(), first.flags), (700, END_OF_MESSAGE));
    let second = guest.expect(&link, op::RW);
    assert_eq!((second.data.len(), second.flags), (300, 0));
    guest.expect(&link, op::CREDIT_REQUEST);
    guest.send(&with(op::CREDIT_UPDATE, 700));
    let rest = guest.expect(&link, op::RW);
    assert_eq!((rest.data.len(), rest.flags), (300, END_OF_MESSAGE));
    assert!([second.data, rest.data].concat() == pattern(600));
}

#[test]
fn a_program_of_the_host_connects_for_messages() {
    let device = Device::start();
    let mut guest = device.connect();
    let host = connect_seqpacket(&device.path("guest_seqpacket"));
    send_message(&host, b"CONNECT 7000\n");
    send_message(&host, b"hello");
    let mut link = guest.accept(7000, SEQPACKET);
    assert_eq!(
        receive_message(&host),
        format!("OK {}\n", link.peer_port).as_bytes()
    );
    assert_eq!(read_message(&mut guest, &mut link).0, b"hello");
    shutdown(&host, Shutdown::Write).unwrap();
    let end = guest.expect(&link, op::SHUTDOWN);
    assert_eq!(end.flags, NO_SEND);
    guest.send(&fragment(&link, b"answer", END_OF_MESSAGE));
    assert_eq!(receive_message(&host), b"answer");
}

#[test]
fn a_guest_without_the_feature_has_no_messages() {
    let device = Device::start();
    let _listener = listen_seqpacket(&device.path("guest_5000"));
    let options = Options {
        features: Options::default().features & !2,
        ..Options::default()
    };
    let front_end = FrontEnd::connect(&device.path("socket"), &options).unwrap();
    let mut guest = Guest(VsockDriver::new(front_end).unwrap());
    guest.assert_refused(link(1024, 5000));
    let host = connect_seqpacket(&device.path("guest_seqpacket"));
    send_message(&host, b"CONNECT 7000\n");
    assert_eq!(receive_message(&host), b"");
    guest.assert_works(&device);
}

/// The guest may use up its credit with a part of a message, while the device has reported only a part of what the host took.
#[test]
fn an_incomplete_message_that_uses_up_the_credit_gets_more() {
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let mut guest = device.connect();
    let link = link(1024, 5000);
    guest.send(&link.packet(op::REQUEST));
    let size = guest.expect(&link, op::RESPONSE).buf_alloc as usize;
    let host = accept_seqpacket(&listener);
    // Less than half of the buffer, so that it need not be reported yet.
    let first = size / 2 - 1000;
    guest.send(&fragment(&link, &pattern(first), END_OF_MESSAGE));
    assert_eq!(receive_message(&host).len(), first);
    let second = pattern(size - 2000);
    let (begin, rest) = second.split_at(size - first);
    guest.send(&fragment(&link, begin, 0));
    let update = guest.expect(&link, op::CREDIT_UPDATE);
    assert_eq!(update.fwd_cnt as usize, first);
    guest.send(&fragment(&link, rest, END_OF_MESSAGE));
    assert!(receive_message(&host) == second);
}

/// The credit is smaller than the buffer, which has many parts.
#[test]
fn a_message_into_many_small_parts_is_not_cut() {
    use vhost_device_tests::front_end::Buffer;
    let device = Device::start();
    let listener = listen_seqpacket(&device.path("guest_5000"));
    let driver = VsockDriver::without_buffers(device.front_end(), 1, 4096).unwrap();
    let mut guest = Guest(driver);
    let link = link(1024, 5000);
    guest.0.supply(1);
    guest.0.refills = false;
    guest.send(&Packet {
        buf_alloc: 1000,
        ..link.packet(op::REQUEST)
    });
    guest.expect(&link, op::RESPONSE);
    let host = accept_seqpacket(&listener);
    send_message(&host, &pattern(900));
    let memory = guest.0.front_end.memory().clone();
    let area = memory.allocate(4096, 64);
    let lengths = [&[44][..], &[10; 110]].concat();
    let parts = Buffer::writable(area, 44 + 1100).split(&lengths);
    guest.0.rx.submit(&parts);
    let used = guest.0.rx.take_used_within(PATIENCE);
    let packet = Packet::from_bytes(&memory.read_vec(area, used.length as usize));
    assert!(packet.data == pattern(900), "{packet:?}");
    assert_eq!(packet.flags, END_OF_MESSAGE);
}
