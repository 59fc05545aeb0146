// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest in QEMU, on both formats of rings.

use vhost_device_tests::guest::Machine;
use vhost_device_tests::process::binary;
use vhost_device_tests::transfer;

use super::{ANSWER, BackEnd, GUEST, HOST, PATIENCE, answer, question};

/// The formats of rings, and what QEMU needs for them.
const FORMATS: [(&str, &str); 2] = [("split", ",packed=off"), ("packed", ",packed=on")];

/// Bytes in each direction: guests are slow without KVM.
const AMOUNT: u64 = 8 << 20;
const CONNECTIONS: u32 = 8;
const MESSAGES: u32 = 50;

fn machine(name: &str, script: &str) -> Machine {
    let guest = binary("vsock-guest").unwrap();
    Machine::new(name, format!("guest=vsock-guest\n{script}"))
        .module("vmw_vsock_virtio_transport")
        .program("socat")
        .program(guest.to_str().unwrap())
        .deadline(PATIENCE)
}

fn works((format, properties): (&str, &str)) {
    let back_end = BackEnd::start(GUEST, &[]);
    let (streams, messages) = (back_end.listen(1000), back_end.listen_for_messages(1001));
    let socat = back_end.listen(1002);
    let count = AMOUNT / u64::from(CONNECTIONS);
    let script = format!(
        r#"
        $guest connect {HOST} 1000 --connections={CONNECTIONS} --count={count}
        $guest --messages connect {HOST} 1001 --count={MESSAGES}
        echo "@answer $(echo question of the guest | socat -t60 - VSOCK-CONNECT:2:1002)"
        $guest refused {HOST} 999
        socat -t60 VSOCK-LISTEN:1003 SYSTEM:'cat; echo answer of the guest'
        "#
    );
    let mut guest = machine(&format!("vsock_{format}"), &script)
        .vhost_user(
            &format!("vhost-user-vsock-pci{properties}"),
            &back_end.socket(),
        )
        .start()
        .unwrap();
    transfer::streams(back_end.accept_all(&streams, CONNECTIONS), count, PATIENCE).unwrap();
    transfer::messages(&back_end.accept(&messages), MESSAGES).unwrap();
    assert_eq!(answer(&back_end, &socat), "question of the guest\n");
    assert_eq!(question(&back_end, 1003), ANSWER);
    let output = guest.finish().unwrap();
    assert_eq!(output.value("answer").unwrap(), "answer of the host");
    let refused = output.value("refused").unwrap();
    assert!(refused.starts_with("ECONNRESET "), "{refused}");
    assert_eq!(guest.qemu_stderr(), "");
    let log = back_end.program.stderr();
    let started = log.lines().find(|line| line.contains("queue 0 started: "));
    assert!(
        started.is_some_and(|line| line.contains(&format!("{format} ring"))),
        "{log}"
    );
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_both_ways_on_split_rings() {
    works(FORMATS[0]);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_both_ways_on_packed_rings() {
    works(FORMATS[1]);
}
