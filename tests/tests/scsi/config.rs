// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space, and the sizes that the driver sets in it.

use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost_device_tests::front_end::scsi::{GOOD, OK, QUERY_TASK, ScsiDriver};

use crate::{Device, FIRST, Host, LARGEST, SIZE, noise};

const SENSE_SIZE: u32 = 20;
const CDB_SIZE: u32 = 24;

#[test]
fn the_config_space_describes_the_host() {
    let device = Device::with_one(&["--num-queues=3"]);
    let front_end = device.connect();
    let config = front_end.config(0, 36).unwrap();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 3, "num_queues");
    assert_eq!(word(4), 126, "seg_max");
    assert!(word(8) >= 0xffff, "max_sectors");
    assert_eq!((word(16), word(20), word(24)), (16, 96, 32));
    assert_eq!(config[28..], [0, 0, 255, 0, 0xff, 0x3f, 0, 0]);
    assert_eq!(front_end.queue_count(), 5);
    assert_eq!(front_end.offered() & 0xff, 0b110, "HOTPLUG and CHANGE");
}

#[test]
fn statistics_count_commands_by_their_kind() {
    let mut host = Host::with_one(&[]);
    host.driver.read(FIRST, 0, 8);
    host.driver.write(FIRST, 0, &[1; 1024]);
    host.driver.read(FIRST, u64::MAX, 1);
    host.control.function(QUERY_TASK, FIRST, 0);
    let answer = host.device.execute("query", json!({})).unwrap();
    let requests = answer["requests"].as_array().unwrap();
    let of = |kind: &str| {
        let mut found = requests.iter().filter(|entry| entry["type"] == kind);
        let entry = found.next().unwrap_or_else(|| panic!("{kind}: {answer:#}"));
        ["requests", "errors", "bytes"].map(|name| entry[name].as_u64().unwrap())
    };
    assert_eq!(of("read"), [2, 1, 4096]);
    assert_eq!(of("write"), [1, 0, 1024]);
    assert_eq!(of("task_management"), [1, 0, 1]);
}

#[test]
fn the_driver_chooses_the_sizes_of_the_cdb_and_of_sense_data() {
    let contents = noise(1, SIZE);
    let mut host = Host::new(Device::start(&[(&contents, "")], &[]));
    host.driver.clear_attentions(FIRST);
    for (sense, cdb) in [(18, 16), (252, 260), (96, 32)] {
        host.front_end
            .set_config(SENSE_SIZE, &u32::to_le_bytes(sense))
            .unwrap();
        host.front_end
            .set_config(CDB_SIZE, &u32::to_le_bytes(cdb))
            .unwrap();
        (host.driver.area.sense_size, host.driver.area.cdb_size) = (sense, cdb);
        let completion = host.driver.read(FIRST, 1, 1);
        assert_eq!((completion.response, completion.status), (OK, GOOD));
        assert_eq!(completion.used, 12 + sense + 512);
        assert!(completion.data == contents[512..1024]);
        // An unknown command has sense data.
        let completion = host.driver.command(FIRST, &[0xff; 6], 0);
        assert_eq!(completion.sense_codes(), (5, 0x20, 0));
    }
}

#[test]
fn other_sizes_are_refused_and_a_reset_restores_the_first_ones() {
    let mut host = Host::with_one(&[]);
    let sizes = |host: &Host| host.front_end.config(SENSE_SIZE, 8).unwrap();
    let before = sizes(&host);
    for (offset, value) in [
        (SENSE_SIZE, 17),
        (SENSE_SIZE, 253),
        (CDB_SIZE, 15),
        (CDB_SIZE, 261),
        (0, 9),
    ] {
        let refused = host.front_end.set_config(offset, &u32::to_le_bytes(value));
        assert!(refused.is_err(), "{offset} {value}");
        assert_eq!(sizes(&host), before);
    }
    host.front_end
        .set_config(CDB_SIZE, &u32::to_le_bytes(64))
        .unwrap();
    assert_ne!(sizes(&host), before);
    host.front_end.call().reset_device().unwrap();
    assert_eq!(sizes(&host), before);
    let queue = host.front_end.queue(2, 256).unwrap();
    host.driver = ScsiDriver::new(host.front_end.memory(), queue, LARGEST);
    host.driver.clear_attentions(FIRST);
}
