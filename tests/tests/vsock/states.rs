// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each operation in each state of a connection: what the guest gets, and whether the connection lives.

use vhost_device_tests::front_end::vsock::{NO_RECEIVE, NO_SEND, op};

use super::*;

/// States of a connection, as the guest can bring them about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There is none.
    Unknown,
    /// The host has asked for it.
    Requested,
    /// The guest has asked a sibling for it, which has not answered.
    Asking,
    Open,
    /// The guest sends nothing more.
    HalfClosed,
    /// The host has closed it.
    Closing,
}

/// What the guest gets for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Nothing,
    /// A reset; the connection is gone.
    Reset,
    /// A response.
    Response,
    /// The credit.
    Credit,
    /// Nothing, and the connection is gone.
    Gone,
}

use Answer::*;
use State::*;

/// An operation that does not exist.
const OTHER: u32 = 8;

const TABLE: &[(u32, [(State, Answer); 6])] = &[
    (
        op::REQUEST,
        [
            (Unknown, Response),
            (Requested, Reset),
            (Asking, Reset),
            (Open, Reset),
            (HalfClosed, Reset),
            (Closing, Reset),
        ],
    ),
    (
        op::RESPONSE,
        [
            (Unknown, Reset),
            (Requested, Nothing),
            (Asking, Reset),
            (Open, Reset),
            (HalfClosed, Reset),
            (Closing, Reset),
        ],
    ),
    (
        op::RST,
        [
            (Unknown, Gone),
            (Requested, Gone),
            (Asking, Gone),
            (Open, Gone),
            (HalfClosed, Gone),
            (Closing, Gone),
        ],
    ),
    (
        op::SHUTDOWN,
        [
            (Unknown, Reset),
            (Requested, Reset),
            (Asking, Reset),
            (Open, Reset),
            (HalfClosed, Reset),
            (Closing, Reset),
        ],
    ),
    (
        op::RW,
        [
            (Unknown, Reset),
            (Requested, Reset),
            (Asking, Reset),
            (Open, Nothing),
            (HalfClosed, Reset),
            (Closing, Nothing),
        ],
    ),
    (
        op::CREDIT_UPDATE,
        [
            (Unknown, Reset),
            (Requested, Reset),
            (Asking, Reset),
            (Open, Nothing),
            (HalfClosed, Nothing),
            (Closing, Nothing),
        ],
    ),
    (
        op::CREDIT_REQUEST,
        [
            (Unknown, Reset),
            (Requested, Reset),
            (Asking, Reset),
            (Open, Credit),
            (HalfClosed, Credit),
            (Closing, Credit),
        ],
    ),
    (
        OTHER,
        [
            (Unknown, Reset),
            (Requested, Reset),
            (Asking, Reset),
            (Open, Reset),
            (HalfClosed, Reset),
            (Closing, Reset),
        ],
    ),
];

#[test]
fn each_operation_has_its_answer_in_each_state() {
    let directory = tempfile::tempdir().unwrap();
    // A sibling whose device answers nothing.
    let sibling = UnixListener::bind(directory.path().join("sibling")).unwrap();
    let device = device_with_control(&[&format!(
        "--forward=cid=4,uds-path={}",
        directory.path().join("sibling").display()
    )]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut port = 1024;
    for (op, row) in TABLE {
        for (state, answer) in row {
            port += 1;
            let mut ends = Vec::new();
            let link = bring_about(&device, &mut guest, *state, port, &listener, &mut ends);
            if *state == Asking {
                ends.push(accept_stream(&sibling));
            }
            let flags = if *op == op::SHUTDOWN {
                NO_SEND | NO_RECEIVE
            } else {
                0
            };
            let data = if *op == op::RW {
                b"data".to_vec()
            } else {
                Vec::new()
            };
            let packet = Packet {
                flags,
                data,
                ..link.packet(*op)
            };
            guest.send(&packet);
            let context = format!("{op} when {state:?}");
            let got = guest.0.receive_within(match answer {
                Nothing | Gone => Duration::from_millis(10),
                _ => PATIENCE,
            });
            let expected = match answer {
                Nothing | Gone => None,
                Reset => Some(op::RST),
                Response => Some(op::RESPONSE),
                Credit => Some(op::CREDIT_UPDATE),
            };
            assert_eq!(got.as_ref().map(|packet| packet.op), expected, "{context}");
            got.iter().for_each(|packet| link.assert_is_from(packet));
            if *answer == Response {
                ends.push(accept_stream(&listener));
            }
            // The control thread reads a counter that the queue thread has written before it answered.
            let lives = u64::from(!matches!(answer, Reset | Gone));
            wait_until(&context, || device.connections("open") == lives);
            if lives == 1 {
                guest.send(&link.packet(op::RST));
            }
            wait_until(&context, || device.connections("open") == 0);
        }
    }
    guest.assert_works(&device);
}

/// Opens a connection and brings it into a state.
fn bring_about(
    device: &Device,
    guest: &mut Guest,
    state: State,
    port: u32,
    listener: &UnixListener,
    ends: &mut Vec<UnixStream>,
) -> Link {
    match state {
        Unknown => Link::to_host(port, 5000),
        Requested => {
            ends.push(device.call(port));
            let request = guest.0.receive();
            assert_eq!(request.op, op::REQUEST);
            Link::to_host(port, request.src_port)
        }
        Asking => {
            let peer_cid = 4;
            let link = Link {
                peer_cid,
                ..Link::to_host(port, 5000)
            };
            guest.send(&link.packet(op::REQUEST));
            link
        }
        Open | HalfClosed | Closing => {
            let link = guest.open(port, 5000);
            let host = accept_stream(listener);
            if state == HalfClosed {
                guest.send(&link.shutdown(NO_SEND));
            }
            if state == Closing {
                drop(host);
                guest.expect(&link, op::SHUTDOWN);
            } else {
                ends.push(host);
            }
            link
        }
    }
}

#[test]
fn a_packet_of_another_type_resets_the_connection() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    for kind in [0, 2, 3] {
        let link = guest.open(1024, 5000);
        let mut host = accept_stream(&listener);
        let other = Link { kind, ..link };
        guest.send(&other.data(b"data"));
        guest.expect(&other, op::RST);
        assert_eq!(read_to_end(&mut host), b"");
    }
}

#[test]
fn a_reset_is_never_answered() {
    let device = Device::start();
    let mut guest = device.connect();
    let link = Link::to_host(1, 2);
    for link in [
        link,
        Link { kind: 9, ..link },
        Link {
            peer_cid: 77,
            ..link
        },
    ] {
        guest.send(&link.packet(op::RST));
    }
    let src_cid = 99;
    guest.send(&Packet {
        src_cid,
        ..link.packet(op::RST)
    });
    guest.expect_nothing();
}

#[test]
fn a_packet_that_claims_another_source_is_refused() {
    let device = Device::start();
    let _listener = device.listen(5000);
    let mut guest = device.connect();
    let link = Link::to_host(1024, 5000);
    for src_cid in [0, 2, 4, CID | 1 << 32] {
        guest.send(&Packet {
            src_cid,
            ..link.packet(op::REQUEST)
        });
        guest.expect(&link, op::RST);
    }
}
