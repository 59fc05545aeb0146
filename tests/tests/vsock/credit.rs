// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Credit in both directions (VIRTIO 1.3, 5.10.6.3).

use std::io::Write;

use vhost_device_tests::front_end::vsock::op;

use super::*;

/// Sends data until the device has no more room for it. Returns it.
fn fill(guest: &mut Guest, link: &Link, size: u32) -> Vec<u8> {
    let mut all = Vec::new();
    let mut sent = 0;
    let mut taken = 0;
    loop {
        while let Some(packet) = guest.0.receive_within(QUIET) {
            link.assert_is_from(&packet);
            assert_eq!(packet.op, op::CREDIT_UPDATE);
            taken = packet.fwd_cnt;
        }
        let mut free = size - (sent - taken);
        if free == 0 {
            guest.send(&link.packet(op::CREDIT_REQUEST));
            taken = guest.expect(link, op::CREDIT_UPDATE).fwd_cnt;
            free = size - (sent - taken);
        }
        if free == 0 {
            return all;
        }
        let data = pattern(free.min(32 << 10) as usize);
        sent += data.len() as u32;
        guest.send(&link.data(&data));
        all.extend(data);
    }
}

#[test]
fn the_guest_learns_of_free_space_before_it_runs_out() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    guest.send(&link.packet(op::REQUEST));
    let response = guest.expect(&link, op::RESPONSE);
    let size = response.buf_alloc;
    assert!(size >= 64 << 10, "{size}");
    let mut host = accept_stream(&listener);
    let (mut sent, mut taken) = (0_u32, response.fwd_cnt);
    for _ in 0..400 {
        let data = pattern(16 << 10);
        while size - sent.wrapping_sub(taken) < data.len() as u32 {
            let update = guest.expect(&link, op::CREDIT_UPDATE);
            taken = update.fwd_cnt;
        }
        guest.send(&link.data(&data));
        sent = sent.wrapping_add(data.len() as u32);
        assert!(read(&mut host, data.len()) == data);
    }
}

#[test]
fn credit_is_told_on_request() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    guest.send(&link.data(b"data"));
    assert_eq!(read(&mut host, 4), b"data");
    for _ in 0..3 {
        guest.send(&link.packet(op::CREDIT_REQUEST));
        let update = guest.expect(&link, op::CREDIT_UPDATE);
        assert_eq!(update.fwd_cnt, 4);
    }
}

#[test]
fn a_host_that_does_not_read_gets_everything_later() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    guest.send(&link.packet(op::REQUEST));
    let size = guest.expect(&link, op::RESPONSE).buf_alloc;
    let mut host = accept_stream(&listener);
    let sent = fill(&mut guest, &link, size);
    assert!(
        sent.len() > size as usize,
        "the socket of the host takes some"
    );
    // Other connections work.
    guest.assert_works(&device);
    guest.send(&link.shutdown(3));
    assert!(read(&mut host, sent.len()) == sent);
    guest.expect(&link, op::RST);
    assert_eq!(read_to_end(&mut host), b"");
}

#[test]
fn the_host_gets_the_rest_after_the_guest_has_forgotten_the_connection() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    guest.send(&link.packet(op::REQUEST));
    let size = guest.expect(&link, op::RESPONSE).buf_alloc;
    let mut host = accept_stream(&listener);
    let sent = fill(&mut guest, &link, size);
    guest.send(&link.shutdown(3));
    // Linux gives up after 8 seconds.
    guest.send(&link.packet(op::RST));
    guest.expect_nothing();
    // The ports are free for another connection.
    guest.open(1024, 5000);
    let _other = accept_stream(&listener);
    assert!(read_to_end(&mut host) == sent);
    wait_until("the connection ends", || device.connections("open") == 1);
    guest.expect_nothing();
}

#[test]
fn data_beyond_the_credit_resets_the_connection() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    guest.send(&link.packet(op::REQUEST));
    let size = guest.expect(&link, op::RESPONSE).buf_alloc;
    let _host = accept_stream(&listener);
    fill(&mut guest, &link, size);
    guest.send(&link.data(b"1"));
    guest.expect(&link, op::RST);
    guest.assert_works(&device);
    // More at once than the buffer holds, though the host would take it.
    let link = guest.open(1024, 5000);
    guest.send(&link.data(&pattern(size as usize + 1)));
    guest.expect(&link, op::RST);
}

#[test]
fn the_device_sends_no_more_than_the_guest_has_room_for() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    let with = |op, buf_alloc, fwd_cnt| Packet {
        buf_alloc,
        fwd_cnt,
        ..link.packet(op)
    };
    guest.send(&with(op::REQUEST, 100, 0));
    guest.expect(&link, op::RESPONSE);
    let mut host = accept_stream(&listener);
    let data = pattern(1000);
    host.write_all(&data).unwrap();
    let first = guest.expect(&link, op::RW);
    assert_eq!(first.data, data[..100]);
    // The device asks once.
    guest.expect(&link, op::CREDIT_REQUEST);
    guest.send(&with(op::CREDIT_UPDATE, 100, 0));
    // The guest shrinks its buffer, claims to have taken more than it got, or takes everything back: nothing is sent.
    for (buf_alloc, fwd_cnt) in [(50, 0), (0, 0), (100, 101)] {
        guest.send(&with(op::CREDIT_UPDATE, buf_alloc, fwd_cnt));
        guest.expect_nothing();
    }
    guest.send(&with(op::CREDIT_UPDATE, 130, 0));
    assert_eq!(guest.expect(&link, op::RW).data, data[100..130]);
    guest.expect(&link, op::CREDIT_REQUEST);
    guest.send(&with(op::CREDIT_UPDATE, u32::MAX, 130));
    assert_eq!(guest.expect(&link, op::RW).data, data[130..]);
}

#[test]
fn a_guest_without_room_delays_nobody_else() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    guest.send(&Packet {
        buf_alloc: 0,
        ..link.packet(op::REQUEST)
    });
    guest.expect(&link, op::RESPONSE);
    let mut host = accept_stream(&listener);
    host.write_all(b"waits").unwrap();
    guest.expect(&link, op::CREDIT_REQUEST);
    guest.assert_works(&device);
}
