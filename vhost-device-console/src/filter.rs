// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--filter`: takes control sequences that can harm an operator's terminal out of what a guest writes.
//!
//! A list says what passes: text, colours, movements of the cursor, erasing, and the modes that full-screen programs need. All else is
//! taken out: reports, by which a guest could have the terminal type for it; the title, the clipboard and the palette (OSC); device
//! control strings (DCS, APC, PM, SOS); mouse and keyboard modes; printing; control characters as one byte (C1), also encoded in
//! UTF-8. Sequences may be split over any number of calls.

use std::str;

/// Longest parameters of a sequence that passes, in bytes.
const MAX_PARAMETERS: usize = 48;
/// Largest number in the parameters of a sequence that passes. Larger ones keep terminals busy (REP, scrolling).
const MAX_NUMBER: u16 = 9999;
/// Private modes (DECSET, DECRST) that pass: keys of the cursor and the keypad, reverse video, origin, wrap, blinking and visible
/// cursor, the second screen, bracketed paste, synchronised output.
const PRIVATE_MODES: [u16; 13] = [1, 5, 6, 7, 12, 25, 45, 47, 66, 1047, 1048, 1049, 2004];
/// Modes (SM, RM) that pass: insert, new line.
const MODES: [u16; 2] = [4, 20];
/// Final bytes of sequences with numbers only that pass, without `h` and `l`.
const FINALS: &[u8] = b"@ABCDEFGHIJKLMPSTXZ`abdefgmrsu";

const ESC: u8 = 0x1b;
/// Ends a sequence that is not complete.
pub const CAN: u8 = 0x18;
const SUB: u8 = 0x1a;

/// What the next byte belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Text,
    /// A character of several bytes: those so far, and how many are missing.
    Character(Vec<u8>, u8),
    /// After ESC.
    Escape,
    /// After ESC and this byte, which selects a character set or a test.
    Designator(u8),
    /// After ESC and a byte that nothing passes with.
    OtherEscape,
    /// After `ESC [`: the parameters so far.
    Csi(Vec<u8>),
    /// In a sequence that is too long to pass.
    LongCsi,
    /// In a string, which ends with BEL, ST, or any other control character.
    Ignored,
}

/// A filter, with what it has seen of a sequence that is not complete.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    mode: Mode,
}

impl Filter {
    /// Appends what passes of `input` to `output`, and bytes that were held back before: fewer than 64.
    pub fn apply(&mut self, input: &[u8], output: &mut Vec<u8>) {
        let mut rest = input;
        while !rest.is_empty() {
            if self.mode == Mode::Text {
                let plain = rest.iter().position(|byte| !is_plain(*byte));
                let (now, later) = rest.split_at(plain.unwrap_or(rest.len()));
                output.extend_from_slice(now);
                rest = later;
            }
            let Some((byte, later)) = rest.split_first() else {
                return;
            };
            rest = later;
            if !self.step(*byte, output) {
                // The sequence ended before this byte.
                self.mode = Mode::Text;
                self.step(*byte, output);
            }
        }
    }

    /// Handles a byte. Returns whether it belongs to the present sequence.
    fn step(&mut self, byte: u8, output: &mut Vec<u8>) -> bool {
        match std::mem::take(&mut self.mode) {
            Mode::Text => {
                self.text(byte, output);
            }
            Mode::Character(mut bytes, missing) => {
                if !(0x80..0xc0).contains(&byte) {
                    output.push(b'?');
                    return false;
                }
                bytes.push(byte);
                match missing {
                    2.. => self.mode = Mode::Character(bytes, missing - 1),
                    _ => push_character(&bytes, output),
                }
            }
            Mode::Escape => return self.escape(byte, output),
            Mode::Designator(kind) => match (kind, byte) {
                (b'#', b'8') | (b'('..=b'+', b'0' | b'A' | b'B') => {
                    output.extend([ESC, kind, byte]);
                }
                _ => return byte >= 0x20,
            },
            Mode::OtherEscape => match byte {
                0x20..0x30 => self.mode = Mode::OtherEscape,
                _ => return byte >= 0x30,
            },
            Mode::Csi(mut parameters) => match byte {
                0x20..0x40 if parameters.len() < MAX_PARAMETERS => {
                    parameters.push(byte);
                    self.mode = Mode::Csi(parameters);
                }
                0x20..0x40 => self.mode = Mode::LongCsi,
                0x40..0x7f => {
                    if passes(&parameters, byte) {
                        output.extend([ESC, b'[']);
                        output.extend(parameters);
                        output.push(byte);
                    }
                }
                _ => return is_end(byte),
            },
            Mode::LongCsi => match byte {
                0x20..0x40 => self.mode = Mode::LongCsi,
                0x40..0x7f => {}
                _ => return is_end(byte),
            },
            Mode::Ignored => match byte {
                0x20.. => self.mode = Mode::Ignored,
                0x07 | CAN | SUB => {}
                // ESC is the first byte of ST, or of another sequence.
                _ => return false,
            },
        }
        true
    }

    fn text(&mut self, byte: u8, output: &mut Vec<u8>) {
        match byte {
            // BEL, BS, VT, FF, SO, SI.
            0x07 | 0x08 | 0x0b | 0x0c | 0x0e | 0x0f => output.push(byte),
            ESC => self.mode = Mode::Escape,
            0xc2..0xe0 => self.mode = Mode::Character(vec![byte], 1),
            0xe0..0xf0 => self.mode = Mode::Character(vec![byte], 2),
            0xf0..0xf5 => self.mode = Mode::Character(vec![byte], 3),
            // Not UTF-8: some terminals take 80 to 9f for control characters.
            0x80.. => output.push(b'?'),
            _ if is_plain(byte) => output.push(byte),
            _ => {}
        }
    }

    fn escape(&mut self, byte: u8, output: &mut Vec<u8>) -> bool {
        match byte {
            b'[' => self.mode = Mode::Csi(Vec::new()),
            b']' | b'P' | b'_' | b'^' | b'X' => self.mode = Mode::Ignored,
            b'#' | b'('..=b'+' => self.mode = Mode::Designator(byte),
            // Cursor and keypad; index, new line, tab stop, reverse index; reset.
            b'7' | b'8' | b'=' | b'>' | b'D' | b'E' | b'H' | b'M' | b'c' => {
                output.extend([ESC, byte]);
            }
            0x20..0x30 => self.mode = Mode::OtherEscape,
            0x30..0x7f | CAN | SUB => {}
            _ => return false,
        }
        true
    }
}

/// Returns whether a byte passes wherever no sequence has begun.
fn is_plain(byte: u8) -> bool {
    matches!(byte, 0x20..0x7f | b'\n' | b'\r' | b'\t')
}

/// Returns whether a byte ends a sequence and is a part of it.
fn is_end(byte: u8) -> bool {
    matches!(byte, CAN | SUB)
}

fn push_character(bytes: &[u8], output: &mut Vec<u8>) {
    match str::from_utf8(bytes).map(|text| text.chars().all(char::is_control)) {
        Ok(false) => output.extend_from_slice(bytes),
        // U+0080 to U+009f.
        Ok(true) => {}
        Err(_) => output.push(b'?'),
    }
}

/// Returns whether a control sequence with these parameters and this final byte passes.
fn passes(parameters: &[u8], last: u8) -> bool {
    let (is_private, numbers) = match parameters {
        [b'?', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    if let Some((b' ', rest)) = numbers.split_last() {
        // The shape of the cursor.
        return last == b'q' && !is_private && rest.iter().all(u8::is_ascii_digit);
    }
    let Ok(numbers) = str::from_utf8(numbers) else {
        return false;
    };
    let mut numbers = numbers.split([';', ':']).map(|number| match number {
        "" => Some(0),
        // `parse` would accept a sign.
        number if number.starts_with(|first: char| first.is_ascii_digit()) => number.parse().ok(),
        _ => None,
    });
    match (is_private, last) {
        (true, b'h' | b'l') => {
            numbers.all(|number| number.is_some_and(|mode| PRIVATE_MODES.contains(&mode)))
        }
        (false, b'h' | b'l') => {
            numbers.all(|number| number.is_some_and(|mode| MODES.contains(&mode)))
        }
        // With more numbers it starts the tracking of the mouse.
        (false, b'T') if parameters.contains(&b';') => false,
        (true, b'J' | b'K') => numbers.all(|number| number.is_some_and(|what| what <= 3)),
        (false, _) => {
            FINALS.contains(&last)
                && numbers.all(|number| number.is_some_and(|number| number <= MAX_NUMBER))
        }
        (true, _) => false,
    }
}

#[cfg(test)]
mod tests;
