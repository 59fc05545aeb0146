// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two guests that talk to each other: their back-ends connect to each other's sockets.

use std::path::Path;
use std::thread;
use std::time::Instant;

use super::{BackEnd, Format, GUEST, INTERVAL, PATIENCE, SIBLING, amount};
use vhost_device_tests::uml::{self, kernel};

/// Two back-ends, each of which forwards to the other.
pub struct Siblings {
    pub one: BackEnd,
    pub other: BackEnd,
    format: Format,
}

impl Siblings {
    pub fn start(format: Format) -> Self {
        let works = [uml::work().unwrap(), uml::work().unwrap()];
        let forward = |cid: u32, work: &Path| {
            format!(
                "--forward=cid={cid},uds-path={}",
                work.join("guest").display()
            )
        };
        let forwards = [
            forward(SIBLING, works[1].path()),
            forward(GUEST, works[0].path()),
        ];
        let [one, other] = works;
        let mut siblings = Self {
            one: BackEnd::start_in(one, GUEST, &[&forwards[0]]),
            other: BackEnd::start_in(other, SIBLING, &[&forwards[1]]),
            format,
        };
        if format == Format::Split {
            siblings.one.put_relay_in_front();
            siblings.other.put_relay_in_front();
        }
        siblings
    }

    /// Runs a script in each guest: that of `one` once the other has written the file `ready` to its `$work`, with `text` in it.
    pub fn run(&self, client: &str, server: &str, ready: &str, text: &str) {
        kernel::prepare().unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(|| self.other.run_script(server));
            let deadline = Instant::now() + PATIENCE;
            let path = self.other.file(ready);
            while !std::fs::read_to_string(&path).is_ok_and(|found| found.contains(text)) {
                assert!(!server.is_finished(), "the server has ended");
                assert!(Instant::now() < deadline, "the server is not ready");
                thread::sleep(INTERVAL);
            }
            let status = self.one.run_script(client);
            assert_eq!((status, server.join().unwrap()), (0, 0), "client, server");
        });
        let ring = match self.format {
            Format::Split => "split ring",
            Format::Packed => "packed ring",
        };
        for device in [&self.one, &self.other] {
            let log = device.program.stderr();
            assert!(log.contains(ring), "{log}");
        }
    }
}

fn exchange(format: Format) {
    const CONNECTIONS: u32 = 64;
    let siblings = Siblings::start(format);
    let amount = amount() / u64::from(CONNECTIONS);
    let amount = format!("--connections={CONNECTIONS} --count={amount}");
    siblings.run(
        &format!("$guest connect {SIBLING} 1000 {amount}"),
        &format!("$guest listen 1000 {amount} --ready=$work/ready"),
        "ready",
        "",
    );
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_between_two_guests_on_split_rings() {
    exchange(Format::Split);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn data_arrives_intact_between_two_guests_on_packed_rings() {
    exchange(Format::Packed);
}
