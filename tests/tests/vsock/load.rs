// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many connections, one after the other and at once.

use std::io::Write;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vhost_device_tests::front_end::vsock::{STREAM, op};

use super::*;

/// Environment variable with the number of connections that are opened one after the other.
const CONNECTS: &str = "VHOST_DEVICE_CONNECTS";

/// Open connections.
const MANY: usize = 10_000;

#[test]
fn connections_that_end_leave_nothing_behind() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let connects = std::env::var(CONNECTS).ok();
    let connects = connects.map_or(20_000, |count| count.parse().unwrap());
    let mut before = 0;
    for round in 0..connects {
        if round == connects / 10 {
            before = device.program.anonymous_bytes().unwrap();
        }
        let mut link = Link::to_host(1024 + (round % 60_000) as u32, 5000);
        if round % 4 == 0 {
            let mut host = device.call(link.guest_port);
            link = guest.accept(link.guest_port, STREAM);
            read_ok(&mut host);
            drop(host);
            guest.expect(&link, op::SHUTDOWN);
            guest.send(&link.packet(op::RST));
            continue;
        }
        guest.open_link(link);
        let mut host = accept_stream(&listener);
        guest.send(&link.data(b"data"));
        assert_eq!(read(&mut host, 4), b"data");
        match round % 4 {
            1 => guest.send(&link.packet(op::RST)),
            2 => {
                guest.send(&link.shutdown(3));
                guest.expect(&link, op::RST);
            }
            _ => {
                drop(host);
                guest.expect(&link, op::SHUTDOWN);
                guest.send(&link.shutdown(3));
                guest.expect(&link, op::RST);
            }
        }
    }
    let after = device.program.anonymous_bytes().unwrap();
    assert!(after <= before + (1 << 20), "{before} bytes, then {after}");
    wait_until("no connection is left", || device.connections("open") == 0);
}

#[test]
fn ten_thousand_connections_are_open_at_once() {
    let files = MANY as u64 + 1000;
    let limit = getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|maximum| maximum < files) {
        panic!("this test needs {files} open files: raise the hard limit (ulimit -Hn)");
    }
    let current = Some(limit.current.map_or(files, |current| current.max(files)));
    setrlimit(Resource::Nofile, Rlimit { current, ..limit }).unwrap();
    let device = device_with_control(&[&format!("--max-connections={MANY}")]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let before = device.program.anonymous_bytes().unwrap();
    let mut open = Vec::new();
    for at in 0..MANY {
        let guest_port = 1024 + at as u32;
        let (link, host) = if at % 2 == 0 {
            let link = guest.open(guest_port, 5000);
            (link, accept_stream(&listener))
        } else {
            let mut host = device.call(guest_port);
            let link = guest.accept(guest_port, STREAM);
            read_ok(&mut host);
            (link, host)
        };
        open.push((link, host));
    }
    assert_eq!(device.connections("open"), MANY as u64);
    guest.assert_refused(Link::to_host(1023, 5000));
    let grown = device.program.anonymous_bytes().unwrap() - before;
    assert!(grown < 32 << 20, "{grown} bytes for idle connections");
    for (link, host) in open.iter_mut().step_by(7) {
        guest.send(&link.data(&link.guest_port.to_le_bytes()));
        assert_eq!(read(host, 4), link.guest_port.to_le_bytes());
        host.write_all(&link.peer_port.to_le_bytes()).unwrap();
        assert_eq!(guest.read(link, 4), link.peer_port.to_le_bytes());
    }
    // All programs of the host end at once.
    let links: Vec<Link> = open.into_iter().map(|(link, _)| link).collect();
    for _ in &links {
        let end = guest.0.receive();
        assert_eq!(end.op, op::SHUTDOWN);
        let link = Link {
            guest_port: end.dst_port,
            peer_port: end.src_port,
            ..links[0]
        };
        guest.send(&link.packet(op::RST));
    }
    wait_until("no connection is left", || device.connections("open") == 0);
}

/// All connections together are promised no more than a bound, so memory has one too.
#[test]
fn hosts_that_never_read_cost_a_bounded_amount_of_memory() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut promised = 0_u64;
    let mut hosts = Vec::new();
    for at in 0..1000 {
        let link = Link::to_host(1024 + at, 5000);
        guest.send(&link.packet(op::REQUEST));
        promised += u64::from(guest.expect(&link, op::RESPONSE).buf_alloc);
        hosts.push(accept_stream(&listener));
    }
    assert!(promised < 90 << 20, "{promised} bytes are promised");
    guest.assert_works(&device);
}

/// A stream in each direction, several at once.
#[test]
fn all_bytes_arrive_in_order_over_many_connections() {
    const LINKS: usize = 16;
    const BYTES: usize = 1 << 20;
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let data = pattern(BYTES);
    let mut threads = Vec::new();
    let open: Vec<_> = (0..LINKS)
        .map(|at| (guest.open(1024 + at as u32, 5000), accept_stream(&listener)))
        .collect();
    let mut links = Vec::new();
    for (link, host) in open {
        let (mut reader, mut writer) = (host.try_clone().unwrap(), host);
        let expected = data.clone();
        threads.push(std::thread::spawn(move || {
            assert!(read(&mut reader, BYTES) == expected, "to the host");
        }));
        let sent = data.clone();
        threads.push(std::thread::spawn(move || writer.write_all(&sent).unwrap()));
        // Bytes sent, bytes that the device has taken, bytes received.
        links.push((link, 0_usize, 0_u32, Vec::with_capacity(BYTES)));
    }
    let deadline = Instant::now() + 3 * PATIENCE;
    while links
        .iter()
        .any(|(_, sent, _, got)| *sent < BYTES || got.len() < BYTES)
    {
        assert!(Instant::now() < deadline, "data does not arrive");
        for (link, sent, taken, _) in &mut links {
            let free = BUFFER as usize - (*sent - *taken as usize);
            let count = free.min(BYTES - *sent).min(16 << 10);
            if count > 0 {
                guest.0.send(&link.data(&data[*sent..*sent + count]));
                *sent += count;
            }
        }
        while let Some(packet) = guest.0.receive_within(Duration::from_millis(1)) {
            let at = (packet.dst_port - 1024) as usize;
            let (link, _, taken, got) = &mut links[at];
            *taken = packet.fwd_cnt;
            match packet.op {
                op::RW => {
                    got.extend(packet.data);
                    link.taken = got.len() as u32;
                    guest.0.send(&link.packet(op::CREDIT_REQUEST));
                }
                op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
                // The program of the host has all, and has sent all.
                op::SHUTDOWN if got.len() == BYTES => {}
                _ => panic!("{packet:?}"),
            }
            if !guest.0.rx.has_used() {
                break;
            }
        }
    }
    for (link, .., got) in &links {
        assert!(*got == data, "to port {}", link.guest_port);
    }
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

/// The device waits for a host that does not read, for credit, for buffers, and for a program's first line.
#[test]
fn waiting_takes_no_processor_time() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let blocked = guest.open(1024, 5000);
    let _never_reads = accept_stream(&listener);
    for _ in 0..14 {
        guest.send(&blocked.data(&pattern(32 << 10)));
    }
    let starved = Link::to_host(1025, 5000);
    guest.send(&Packet {
        buf_alloc: 0,
        ..starved.packet(op::REQUEST)
    });
    let mut waits = accept_stream(&listener);
    waits.write_all(b"waits for credit").unwrap();
    let _silent = UnixStream::connect(device.path("guest")).unwrap();
    guest.0.refills = false;
    while guest.0.receive_within(QUIET).is_some() {}
    let unknown = Link::to_host(1, 2).data(b"data").to_bytes(None);
    while guest.0.try_send_bytes(&unknown, &[], QUIET) {}
    let before = device.program.processor_time().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let time = device.program.processor_time().unwrap() - before;
    assert!(time < Duration::from_millis(100), "{time:?}");
    wait_until("the program without a line is disconnected", || {
        device.connections("open") == 2
    });
}
