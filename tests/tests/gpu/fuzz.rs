// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random commands: whatever the guest does, the device continues, and the display receives only valid messages.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_device_tests::front_end::gpu::{Answers, Display, Shown, fenced_command, number, words};

use crate::{B8G8R8X8, Device, ManualDisplay, bytes, pattern};

/// Duration of the test.
const LIMIT: Duration = Duration::from_secs(3);

/// The scanouts according to the messages to the display.
#[derive(Default)]
struct Screen([(u32, u32); 16]);

impl Screen {
    /// Panics when the display received an invalid message.
    fn check(&mut self, display: &Display) {
        while let Some(shown) = display.next_within(Duration::ZERO) {
            match shown {
                Shown::Scanout(scanout, width, height) => {
                    assert_eq!(width == 0, height == 0);
                    self.0[scanout as usize] = (width, height);
                }
                Shown::Update(scanout, [x, y, w, h], pixels) => {
                    let (width, height) = self.0[scanout as usize];
                    assert!(w > 0 && h > 0);
                    assert!(x + w <= width && y + h <= height);
                    assert_eq!(pixels.len(), (w * h) as usize);
                }
                Shown::CursorImage(scanout, _, image) => {
                    assert!(scanout < 16);
                    assert_eq!(image.len(), 64 * 64);
                }
                Shown::CursorMove(scanout, ..) | Shown::CursorHide(scanout) => {
                    assert!(scanout < 16);
                }
                Shown::Features(_) => panic!("greeted twice"),
                Shown::Unknown(request) => panic!("request {request}"),
            }
        }
    }
}

/// Returns a valid number, most of the time.
fn any(random: &mut Rng, likely: u32) -> u32 {
    match random.u32(..20) {
        0 => random.u32(..),
        1 => *random.choice(&[0, 1, u32::MAX, 1 << 31, 1 << 16]).unwrap(),
        _ => random.u32(..=likely),
    }
}

/// Creates the body of a command of type `kind`.
fn body(random: &mut Rng, kind: u32) -> Vec<u8> {
    let resource = any(random, 8);
    let mut rectangle = || [4, 4, 60, 60].map(|likely| any(random, likely));
    match kind {
        number::CREATE_2D => {
            let formats = [1, 2, 3, 4, 67, 68, 121, 134, 5];
            let format = *random.choice(&formats).unwrap();
            let side = if random.bool() { 64 } else { any(random, 100) };
            words(&[resource, format, side, any(random, 64).max(side)])
        }
        number::SET_SCANOUT => {
            let rectangle = rectangle();
            words(&[&rectangle[..], &[any(random, 15), resource]].concat())
        }
        number::FLUSH => words(&[&rectangle()[..], &[resource, 0]].concat()),
        number::TRANSFER_TO_HOST_2D => {
            let rectangle = rectangle();
            let offset = [
                any(random, 4000),
                if random.u32(..9) == 0 {
                    random.u32(..)
                } else {
                    0
                },
            ];
            words(&[&rectangle[..], &offset, &[resource, 0]].concat())
        }
        number::ATTACH_BACKING => {
            let count = any(random, 5);
            let mut all = vec![resource, count];
            for _ in 0..count.min(8) {
                let high = if random.u32(..9) == 0 {
                    random.u32(..)
                } else {
                    0
                };
                all.extend([any(random, 1 << 25), high, any(random, 9000), 0]);
            }
            words(&all)
        }
        number::GET_EDID => words(&[any(random, 17), 0]),
        number::UPDATE_CURSOR | number::MOVE_CURSOR => {
            let position = [any(random, 15), any(random, 100), any(random, 100), 0];
            words(
                &[
                    &position[..],
                    &[resource, any(random, 64), any(random, 64), 0],
                ]
                .concat(),
            )
        }
        _ => words(&[resource, any(random, 9)]),
    }
}

#[test]
fn random_commands_do_no_harm() {
    const KINDS: [u32; 18] = [
        number::GET_DISPLAY_INFO,
        number::GET_EDID,
        number::CREATE_2D,
        number::CREATE_2D,
        number::UNREF,
        number::SET_SCANOUT,
        number::SET_SCANOUT,
        number::FLUSH,
        number::FLUSH,
        number::TRANSFER_TO_HOST_2D,
        number::TRANSFER_TO_HOST_2D,
        number::ATTACH_BACKING,
        number::ATTACH_BACKING,
        number::DETACH_BACKING,
        number::ASSIGN_UUID,
        number::UPDATE_CURSOR,
        number::MOVE_CURSOR,
        0,
    ];
    let mut device = Device::start(&["--max-hostmem=4M"]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let mut screen = Screen::default();
    let mut random = Rng::with_seed(4);
    let (start, mut succeeded, mut count) = (Instant::now(), 0, 0);
    let mut resources = BTreeSet::new();
    while start.elapsed() < LIMIT {
        let kind = match *random.choice(&KINDS).unwrap() {
            0 => any(&mut random, 0x400),
            kind => kind,
        };
        let fence = random.bool().into();
        let mut command = fenced_command(kind, fence, random.u64(..), &body(&mut random, kind));
        if random.u32(..30) == 0 {
            command.truncate(random.usize(1..=command.len()));
        }
        if random.u32(..30) == 0 {
            let at = random.usize(..command.len());
            command[at] ^= 1 << random.u32(..8);
        }
        count += 1;
        if kind & 0xf00 == 0x300 && random.u32(..9) != 0 {
            driver.run_cursor(&command);
        } else {
            let room = if random.u32(..30) == 0 {
                random.u32(..1100)
            } else {
                2000
            };
            driver.send(&command, room);
            let response = driver.receive();
            if response.bytes.len() >= 24 {
                let kind = response.kind();
                assert!(matches!(kind, 0x1100..0x1107 | 0x1200..0x1206), "{kind:#x}");
                succeeded += u32::from(kind < 0x1200);
                let word = |at: usize| Some(u32::from_le_bytes(*command.get(at..)?.first_chunk()?));
                if kind < 0x1200 && word(0) == Some(number::CREATE_2D) {
                    resources.extend(word(24));
                }
            }
        }
        screen.check(&display);
    }
    println!("{succeeded} of {count} commands succeeded");
    assert!(succeeded > count / 10, "{succeeded} of {count} succeeded");
    assert!(device.program.status().unwrap().is_none());

    for resource in resources {
        driver.run(&fenced_command(number::UNREF, 0, 0, &words(&[resource, 0])));
    }
    let picture = pattern(64 * 64);
    driver.create_drawn(1, B8G8R8X8, [64, 64], &bytes(&picture));
    driver.set_scanout(0, 1, [0, 0, 64, 64]);
    screen.check(&display);
    driver.flush(1, [0, 0, 64, 64]);
    let mut told = std::iter::from_fn(|| Some(display.next()));
    let expected = Shown::Update(0, [0, 0, 64, 64], picture);
    assert!(told.any(|shown| shown == expected));
}

/// Creates what a display may send: answers, expected or not, correct or wrong, complete or not.
fn answers(random: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.u32(1..4) {
        let (request, right) = *random
            .choice(&[(1, 8), (3, 408), (11, 1056), (10, 0)])
            .unwrap();
        let flags = if random.u32(..5) == 0 {
            random.u32(..)
        } else {
            4
        };
        let size = if random.u32(..5) == 0 {
            any(random, 2000)
        } else {
            right
        };
        bytes.extend(words(&[request, flags, size]));
        bytes.extend((0..size.min(3000)).map(|_| random.u8(..)));
    }
    if random.bool() {
        bytes.truncate(random.usize(..bytes.len()));
    }
    bytes
}

#[test]
fn displays_that_answer_at_random_do_no_harm() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut random = Rng::with_seed(5);
    driver.create(1, B8G8R8X8, 300, 300);
    for round in 0..300 {
        let mut display = ManualDisplay::connect(&driver);
        if random.bool() {
            display.greet(random.u64(..4));
        }
        driver.set_scanout(round % 16, 1, [0, 0, 300, 300]);
        let kind = *random
            .choice(&[number::GET_DISPLAY_INFO, number::GET_EDID, number::FLUSH])
            .unwrap();
        let body = match kind {
            number::FLUSH => words(&[0, 0, 300, 300, 1, 0]),
            _ => words(&[round % 16, 0]),
        };
        driver.send(&fenced_command(kind, 0, 0, &body), 2000);
        // It may have been dropped because of earlier messages.
        let _ = display.0.write_all(&answers(&mut random));
        let _ = display.0.write_all(&answers(&mut random));
        drop(display);
        driver.receive();
    }
    let display = driver.connect_display(Answers::default());
    for scanout in 0..16 {
        assert_eq!(display.next(), Shown::Scanout(scanout, 300, 300));
    }
    assert!(matches!(display.next(), Shown::Update(0, ..)));
}
