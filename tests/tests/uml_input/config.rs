// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space (VIRTIO 1.3, 5.8.4), compared with what the kernel reports about the node.

use vhost_device_tests::evdev::{
    Description, Device, EV_ABS, EV_FF, EV_KEY, EV_LED, EV_MSC, EV_REL, EV_REP, EV_SND, EV_SW,
    Node, devices,
};
use vhost_device_tests::front_end::FrontEnd;

use super::{Input, start};

const SIZE: u32 = 136;

const ID_NAME: u8 = 0x01;
const ID_SERIAL: u8 = 0x02;
const ID_DEVIDS: u8 = 0x03;
const PROP_BITS: u8 = 0x10;
const EV_BITS: u8 = 0x11;
const ABS_INFO: u8 = 0x12;

/// The config space as QEMU uses it: it writes the whole space for each byte that the guest writes.
struct Config<'a> {
    front_end: &'a FrontEnd,
    bytes: Vec<u8>,
}

impl<'a> Config<'a> {
    fn new(front_end: &'a FrontEnd) -> Self {
        Config {
            front_end,
            bytes: front_end.config(0, SIZE).unwrap(),
        }
    }

    /// Writes one byte for the guest; QEMU then reads everything again.
    fn write(&mut self, offset: usize, byte: u8) {
        self.bytes[offset] = byte;
        self.front_end.set_config(0, &self.bytes).unwrap();
        self.bytes = self.front_end.config(0, SIZE).unwrap();
    }

    /// Returns the answer to the selection, and checks the rest.
    fn answer(&self, select: u8, subsel: u8) -> &[u8] {
        let (head, answer) = self.bytes.split_at(8);
        assert_eq!(head[..2], [select, subsel]);
        assert_eq!(
            head[3..],
            [0; 5],
            "reserved bytes for {select:#x}, {subsel:#x}"
        );
        let (answer, rest) = answer.split_at(head[2].into());
        assert!(
            rest.iter().all(|byte| *byte == 0),
            "{select:#x}, {subsel:#x}: not only zeroes after the answer: {rest:?}"
        );
        answer
    }
}

/// Returns a bitmap in VIRTIO's format: no longer than needed.
fn bitmap(codes: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &code in codes {
        let byte = usize::from(code / 8);
        bytes.resize(bytes.len().max(byte + 1), 0);
        bytes[byte] |= 1 << (code % 8);
    }
    bytes
}

/// Returns the answer according to the kernel.
fn expected(node: &Node, select: u8, subsel: u8) -> Vec<u8> {
    let kinds = node.codes(0).unwrap();
    let kind = u16::from(subsel);
    match (select, subsel) {
        (ID_NAME, 0) => node.name().unwrap().into_bytes(),
        // uinput sets none.
        (ID_SERIAL, 0) => Vec::new(),
        (ID_DEVIDS, 0) => node.ids().unwrap(),
        (PROP_BITS, 0) => bitmap(&node.properties().unwrap()),
        (EV_BITS, _) if !kinds.contains(&kind) => Vec::new(),
        (EV_BITS, _) => match kind {
            EV_KEY | EV_REL | EV_ABS | EV_MSC | EV_SW | EV_LED | EV_SND | EV_FF => {
                bitmap(&node.codes(kind).unwrap())
            }
            // Delay and period; the kernel has no bitmap of them.
            EV_REP => vec![0b11],
            _ => Vec::new(),
        },
        (ABS_INFO, _) if node.codes(EV_ABS).unwrap_or_default().contains(&kind) => {
            let range = node.axis(kind).unwrap().range;
            range.map(i32::to_le_bytes).concat()
        }
        _ => Vec::new(),
    }
}

fn check_answers(description: &Description) {
    let (_device, node, input) = start(description);
    let front_end = input.connect();
    let mut config = Config::new(&front_end);
    assert_eq!(config.answer(0, 0), b"", "before anything is selected");
    let mut subsel = 0;
    let mut ask = |select: u8, wanted: u8| {
        config.write(0, select);
        // Until the guest has written the other byte, that one keeps its value.
        let answer = config.answer(select, subsel);
        assert_eq!(
            answer,
            expected(&node, select, subsel),
            "{select:#x}, {subsel:#x}"
        );
        config.write(1, wanted);
        subsel = wanted;
        let answer = config.answer(select, subsel);
        assert_eq!(
            answer,
            expected(&node, select, subsel),
            "{select:#x}, {subsel:#x}"
        );
    };
    for select in [
        0, ID_NAME, ID_SERIAL, ID_DEVIDS, PROP_BITS, 4, 0x0f, 0x13, 0xff,
    ] {
        for subsel in [0, 1, 0xff, 0] {
            ask(select, subsel);
        }
    }
    for subsel in (0..=0x40).chain([0x7f, 0x80, 0xff]) {
        ask(EV_BITS, subsel);
        ask(ABS_INFO, subsel);
    }
}

#[test]
#[ignore = "needs uinput"]
fn answers_are_what_the_kernel_says() {
    for description in devices::ALL {
        println!("{}", description.name);
        check_answers(description);
    }
}

#[test]
#[ignore = "needs uinput"]
fn recorded_devices_have_what_their_kind_has() {
    // The other test compares the answers with the kernel's; this one checks the kernel's.
    let device = Device::create(&devices::TABLET).unwrap();
    let input = Input::start(&device);
    let front_end = input.connect();
    let mut config = Config::new(&front_end);
    let mut ask = |select: u8, subsel: u8| {
        config.write(0, select);
        config.write(1, subsel);
        config.answer(select, subsel).to_vec()
    };
    assert_eq!(ask(ID_NAME, 0), b"Wacom Intuos Pro M Pen");
    assert_eq!(
        ask(ID_DEVIDS, 0),
        [3, 0, 0x6a, 0x05, 0x57, 0x03, 0x10, 0x01]
    );
    assert_eq!(ask(PROP_BITS, 0), [1]);
    let pressure = [0, 8191, 0, 0, 0].map(i32::to_le_bytes).concat();
    assert_eq!(ask(ABS_INFO, 0x18), pressure);
    let tilt = [-64, 63, 1, 0, 57].map(i32::to_le_bytes).concat();
    assert_eq!(ask(ABS_INFO, 0x1a), tilt);
    assert_eq!(ask(ABS_INFO, 0x35), b"", "no touches");
    assert_eq!(ask(EV_BITS, EV_LED as u8), b"", "no lights");
}

#[test]
#[ignore = "needs uinput"]
fn one_byte_can_be_written_and_read_too() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let input = Input::start(&device);
    let front_end = input.connect();
    front_end.set_config(0, &[EV_BITS]).unwrap();
    front_end.set_config(1, &[EV_LED as u8]).unwrap();
    assert_eq!(front_end.config(0, 3).unwrap(), [EV_BITS, EV_LED as u8, 1]);
    assert_eq!(front_end.config(8, 2).unwrap(), [0b111, 0]);
}

#[test]
#[ignore = "needs uinput"]
fn a_guest_cannot_change_the_answer() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let input = Input::start(&device);
    let front_end = input.connect();
    let mut bytes = vec![0xa5; SIZE as usize];
    bytes[..2].copy_from_slice(&[EV_BITS, EV_LED as u8]);
    front_end.set_config(0, &bytes).unwrap();
    let config = front_end.config(0, SIZE).unwrap();
    assert_eq!(config[..3], [EV_BITS, EV_LED as u8, 1]);
    assert_eq!(config[3..8], [0; 5]);
    assert_eq!(config[8], 0b111);
    assert!(config[9..].iter().all(|byte| *byte == 0));
}
