// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! LOG SENSE and LOG SELECT (SPC-4, 6.7, 6.8 and 7.3).

use super::call::{Call, Outcome, good, reply};
use super::sense::Sense;

/// Makes a page, without its header.
type Make = fn() -> Vec<u8>;

/// Log pages, in ascending order.
const PAGES: &[(u8, Make)] = &[
    (0x00, supported_pages),
    (0x0d, temperature),
    (0x2f, informational_exceptions),
];

/// Subpage of supported pages that lists subpages too.
const ALL_SUBPAGES: u8 = 0xff;

fn supported_pages() -> Vec<u8> {
    PAGES.iter().map(|(page, _)| *page).collect()
}

/// A parameter: its code, how it is kept (a binary list), and its value.
fn parameter(code: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = code.to_be_bytes().to_vec();
    bytes.extend([0x03, value.len() as u8]);
    bytes.extend(value);
    bytes
}

/// Temperature: not available.
fn temperature() -> Vec<u8> {
    [parameter(0, &[0, 0xff]), parameter(1, &[0, 0xff])].concat()
}

/// Informational exceptions: there are none, and no temperature.
fn informational_exceptions() -> Vec<u8> {
    parameter(0, &[0, 0, 0xff, 0])
}

pub fn sense(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    let (page, subpage) = (cdb.byte(2) & 0x3f, cdb.byte(3));
    let allocation = usize::from(cdb.u16(7));
    if cdb.bit(1, 0) {
        // SP: parameters cannot be saved.
        return Err(Sense::cdb_bit(1, 0).into());
    }
    let Some((_, make)) = PAGES.iter().find(|(known, _)| *known == page) else {
        return Err(Sense::cdb_bit(2, 5).into());
    };
    let body = match subpage {
        0 => make(),
        ALL_SUBPAGES if page == 0 => {
            let pages = PAGES.iter().map(|(page, _)| [*page, 0]).collect::<Vec<_>>();
            [
                &[[0, 0], [0, ALL_SUBPAGES]],
                pages.get(1..).unwrap_or_default(),
            ]
            .concat()
            .concat()
        }
        _ => return Err(Sense::cdb(3).into()),
    };
    if cdb.u16(5) > 0 {
        // PARAMETER POINTER: pages are short, and are returned whole.
        return Err(Sense::cdb(5).into());
    }
    let is_subpage = u8::from(subpage != 0) << 6;
    let mut data = vec![page | is_subpage, subpage];
    data.extend((body.len() as u16).to_be_bytes());
    data.extend(body);
    reply(data, allocation)
}

pub fn select(call: &mut Call<'_>) -> Outcome {
    if call.cdb.bit(1, 0) {
        return Err(Sense::cdb_bit(1, 0).into());
    }
    // No parameter can be changed. Without a list, LOG SELECT resets counters, of which there are none.
    match call.cdb.u16(7) {
        0 => good(),
        _ => Err(Sense::cdb(7).into()),
    }
}
