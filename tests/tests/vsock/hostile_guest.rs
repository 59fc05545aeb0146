// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver that means harm.

use std::io::Write;

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::vsock::{HEADER_SIZE, op};

use super::*;

#[test]
fn packets_that_are_too_short_are_discarded() {
    let device = Device::start();
    let mut guest = device.connect();
    let bytes = Link::to_host(1024, 5000).packet(op::REQUEST).to_bytes(None);
    for length in [1, 20, HEADER_SIZE - 1] {
        guest.0.send_bytes(&bytes[..length], &[]);
    }
    let driver = &mut guest.0;
    for chain in [
        vec![Buffer::readable(1 << 60, 44)],
        vec![Buffer::writable(0x1000, 44)],
        vec![Buffer::readable(0x1000, 20), Buffer::readable(1 << 60, 24)],
    ] {
        driver.tx.submit(&chain);
        assert!(driver.wait_sent(PATIENCE));
    }
    guest.expect_nothing();
    guest.assert_works(&device);
}

#[test]
fn data_shorter_than_its_header_says_resets_the_connection() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    for length in [5, 65_536, 65_537, 1 << 20, u32::MAX] {
        let link = guest.open(1024, 5000);
        let mut host = accept_stream(&listener);
        guest
            .0
            .send_bytes(&link.data(b"data").to_bytes(Some(length)), &[]);
        guest.expect(&link, op::RST);
        assert_eq!(read_to_end(&mut host), b"", "{length}");
    }
    guest.assert_works(&device);
}

#[test]
fn data_outside_guest_memory_resets_the_connection() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let driver = &mut guest.0;
    let memory = driver.front_end.memory();
    let area = memory.allocate(64, 64);
    memory.write(area, &link.data(b"data").to_bytes(None)[..HEADER_SIZE]);
    driver
        .tx
        .submit(&[Buffer::readable(area, 44), Buffer::readable(1 << 60, 4)]);
    assert!(driver.wait_sent(PATIENCE));
    guest.expect(&link, op::RST);
    assert_eq!(read_to_end(&mut host), b"");
}

#[test]
fn empty_data_changes_nothing() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    guest.send(&link.data(b""));
    guest.send(&link.data(b"data"));
    assert_eq!(read(&mut host, 4), b"data");
    guest.expect_nothing();
}

#[test]
fn further_connections_than_allowed_are_refused() {
    let device = Device::start_with(&["--max-connections=3"]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let links: Vec<_> = (0..3).map(|at| guest.open(1024 + at, 5000)).collect();
    for round in 0..100 {
        guest.assert_refused(Link::to_host(2000 + round, 5000));
    }
    // Nor can the host connect.
    assert_closed(&mut device.call(7000));
    guest.send(&links[0].packet(op::RST));
    guest.open(3000, 5000);
    guest.expect_nothing();
    drop(listener);
}

/// Answers need buffers of the guest. Without them, the device takes no more packets.
#[test]
fn a_guest_without_buffers_cannot_fill_the_memory_of_the_device() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let driver = VsockDriver::without_buffers(device.front_end(), 64, 4096).unwrap();
    let mut guest = Guest(driver);
    let unknown = Link::to_host(1, 2).data(b"data").to_bytes(None);
    let mut taken = 0;
    while guest.0.try_send_bytes(&unknown, &[], QUIET) {
        taken += 1;
        assert!(taken < 5000, "nothing holds the guest back");
    }
    assert!(taken >= 100, "{taken} packets");
    guest.assert_alive();
    // Buffers set it going again; each packet is answered.
    guest.0.supply(64);
    for _ in 0..taken {
        assert_eq!(guest.0.receive().op, op::RST);
    }
    assert!(guest.0.wait_sent(PATIENCE));
    assert_eq!(guest.0.receive().op, op::RST);
    guest.assert_works(&device);
    drop(listener);
}

/// Each connection that the guest forgets leaves something to send behind, which must not pile up.
#[test]
fn connections_that_are_opened_and_reset_without_buffers_leave_nothing_behind() {
    let device = Device::start();
    let listener = device.listen(5000);
    let driver = VsockDriver::without_buffers(device.front_end(), 64, 4096).unwrap();
    let mut guest = Guest(driver);
    let link = Link::to_host(1024, 5000);
    let before = device.program.anonymous_bytes().unwrap();
    for _ in 0..20_000 {
        guest.send(&link.packet(op::REQUEST));
        guest.send(&link.packet(op::RST));
        drop(accept_stream(&listener));
    }
    let after = device.program.anonymous_bytes().unwrap();
    assert!(after < before + (1 << 20), "{before} {after}");
    guest.0.supply(64);
    guest.assert_works(&device);
}

#[test]
fn a_flood_of_resets_has_no_answer() {
    let device = Device::start();
    let mut guest = device.connect();
    let reset = Link::to_host(1, 2).packet(op::RST);
    for _ in 0..10_000 {
        guest.send(&reset);
    }
    guest.expect_nothing();
    guest.assert_works(&device);
}

#[test]
fn a_request_for_a_connection_that_exists_resets_it() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    guest.send(&link.packet(op::REQUEST));
    guest.expect(&link, op::RST);
    assert_eq!(read_to_end(&mut host), b"");
    guest.open(1024, 5000);
}

/// Random packets of a few ports, while programs of the host come and go.
#[test]
fn random_packets_do_no_harm() {
    let device = device_with_control(&[]);
    let listener = device.listen(1);
    listener.set_nonblocking(true).unwrap();
    let messages = listen_seqpacket(&device.path("guest_2"));
    rustix::io::ioctl_fionbio(&messages, true).unwrap();
    let mut guest = device.connect();
    let mut random = fastrand::Rng::with_seed(11);
    let mut hosts: Vec<OwnedFd> = Vec::new();
    let mut requests = Vec::new();
    for _ in 0..20_000 {
        let mut link = Link {
            guest_port: random.u32(0..4),
            peer_cid: [HOST, HOST, HOST, HOST, 9][random.usize(0..5)],
            peer_port: random.u32(0..4),
            kind: [1, 1, 2, 2, 0][random.usize(0..5)],
            taken: 0,
        };
        if random.u8(0..8) == 0 && !requests.is_empty() {
            link = requests[random.usize(0..requests.len())];
        }
        let packet = Packet {
            op: random.u32(0..9),
            flags: random.u32(0..4),
            buf_alloc: [0, 100, BUFFER, u32::MAX][random.usize(0..4)],
            fwd_cnt: [0, 0, 50, random.u32(..)][random.usize(0..4)],
            data: vec![7; [0, 1, 1000, 70_000][random.usize(0..4)]],
            ..link.packet(0)
        };
        let length = (random.u8(0..10) == 0).then(|| random.u32(0..100_000));
        guest.0.send_bytes(&packet.to_bytes(length), &[]);
        while let Some(packet) = guest.0.receive_within(Duration::ZERO) {
            if packet.op == op::REQUEST {
                requests.push(Link {
                    guest_port: packet.dst_port,
                    peer_cid: packet.src_cid,
                    peer_port: packet.src_port,
                    kind: packet.kind,
                    taken: 0,
                });
                requests.truncate(50);
            }
        }
        match random.u8(0..16) {
            0 => hosts.extend(accept(&listener).ok()),
            1 => hosts.extend(accept(&messages).ok()),
            2 => hosts.push(device.call(random.u32(0..3)).into()),
            3 if !hosts.is_empty() => drop(hosts.swap_remove(random.usize(0..hosts.len()))),
            4 if !hosts.is_empty() => {
                let host = &hosts[random.usize(0..hosts.len())];
                let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                let _ = rustix::net::send(host, &[8; 5000], flags);
            }
            5 if !hosts.is_empty() => {
                let host = &hosts[random.usize(0..hosts.len())];
                let flags = rustix::net::RecvFlags::DONTWAIT;
                let _ = rustix::net::recv(host, &mut [0; 50_000], flags);
            }
            _ => {}
        }
        if hosts.len() > 100 {
            hosts.remove(0);
        }
    }
    drop(hosts);
    drop(listener);
    guest.assert_alive();
    // All that the guest has left open ends with it.
    guest.0.front_end.disconnect();
    wait_until("all connections end", || device.connections("open") == 0);
    device.connect().assert_works(&device);
}

#[test]
fn writes_of_a_slow_host_do_not_mix_up_connections_that_reuse_its_number() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    for round in 0..300 {
        let mut link = guest.open(1024 + round, 5000);
        let mut host = accept_stream(&listener);
        let text = format!("round {round}");
        host.write_all(text.as_bytes()).unwrap();
        if round % 3 == 0 {
            // The event of this data is on its way when its socket is closed and the number used again.
            guest.send(&link.packet(op::RST));
            while guest.0.receive_within(Duration::ZERO).is_some() {}
            continue;
        }
        assert_eq!(guest.read(&mut link, text.len()), text.as_bytes());
        guest.send(&link.packet(op::RST));
        assert_eq!(read_to_end(&mut host), b"");
    }
}
