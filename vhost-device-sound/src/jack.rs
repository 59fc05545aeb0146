// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Jacks: one for each stream, a line output or a microphone (VIRTIO 1.3, 5.14.6.4).

use zerocopy::little_endian::U32;

use crate::protocol::{Direction, JackInfo};

/// Pin configurations (HDA 7.3.3.31): a green line output and a pink microphone input, both 3.5 mm jacks at the rear.
const LINE_OUT: u32 = 0x0101_4010;
const MICROPHONE: u32 = 0x01a1_9020;
/// Pin capabilities (HDA 7.3.4.9): presence detection, output, input.
const DETECTS: u32 = 1 << 2;
const OUTPUT: u32 = 1 << 4;
const INPUT: u32 = 1 << 5;

/// Returns the information about the jack of a stream. `group` is the number of the stream's PCM device.
pub fn info(direction: Direction, group: u32, connected: bool) -> JackInfo {
    let (configuration, capability) = match direction {
        Direction::Output => (LINE_OUT, OUTPUT),
        Direction::Input => (MICROPHONE, INPUT),
    };
    JackInfo {
        group: U32::new(group),
        features: U32::new(0),
        configuration: U32::new(configuration),
        capabilities: U32::new(capability | DETECTS),
        connected: connected.into(),
        padding: [0; 7],
    }
}
