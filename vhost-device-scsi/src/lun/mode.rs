// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MODE SENSE and MODE SELECT (SPC-4, 6.9 to 6.12 and 7.5; SBC-3, 6.5).

use super::answer::Failure;
use super::attention::Attention;
use super::call::{Call, Outcome, action, good, reply};
use super::cdb::Fields;
use super::medium::Action;
use super::sense::{Sense, code};
use super::state::Modes;

/// Which values MODE SENSE returns (PAGE CONTROL).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    Current,
    /// A mask of what MODE SELECT can change.
    Changeable,
    Default,
}

/// A mode page.
struct Page {
    code: u8,
    subpage: u8,
    /// The page after its header, with these values of what can be changed.
    make: fn(Modes) -> Vec<u8>,
}

/// All pages, in ascending order.
const PAGES: &[Page] = &[
    page(0x01, 0x00, error_recovery),
    page(0x08, 0x00, caching),
    page(0x0a, 0x00, control),
    page(0x0a, 0x01, control_extension),
    page(0x1c, 0x00, informational_exceptions),
];

/// All pages, or all pages and subpages.
const ALL: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// The most bytes of the parameter list of MODE SELECT: all pages and a block descriptor, with room to spare.
const MAX_LIST: usize = 512;

const fn page(code: u8, subpage: u8, make: fn(Modes) -> Vec<u8>) -> Page {
    Page {
        code,
        subpage,
        make,
    }
}

/// Read-write error recovery: AWRE and ARRE, because the host does it.
fn error_recovery(_: Modes) -> Vec<u8> {
    let mut page = vec![0; 10];
    page.splice(..1, [0xc0]);
    page
}

fn caching(modes: Modes) -> Vec<u8> {
    let mut page = vec![0; 18];
    page.splice(..1, [u8::from(modes.write_cache) << 2]);
    page
}

/// Control: D_SENSE; QUEUE ALGORITHM MODIFIER (commands may be reordered); SWP.
fn control(modes: Modes) -> Vec<u8> {
    let mut page = vec![0; 10];
    let descriptors = u8::from(modes.descriptors) << 2;
    let protect = u8::from(modes.write_protect) << 3;
    page.splice(..3, [descriptors, 0x10, protect]);
    page
}

fn control_extension(_: Modes) -> Vec<u8> {
    vec![0; 28]
}

/// Informational exceptions: DEXCPT, there are none.
fn informational_exceptions(_: Modes) -> Vec<u8> {
    let mut page = vec![0; 10];
    page.splice(..1, [0x08]);
    page
}

impl Page {
    fn is_wanted(&self, code: u8, subpage: u8) -> bool {
        (code == ALL || code == self.code) && (subpage == ALL_SUBPAGES || subpage == self.subpage)
    }

    /// Returns the page with its header.
    fn bytes(&self, modes: Modes, values: Values) -> Vec<u8> {
        let body = match values {
            Values::Current => (self.make)(modes),
            Values::Default => (self.make)(Modes::default()),
            Values::Changeable => self.mask(),
        };
        let mut bytes = match self.subpage {
            0 => vec![self.code, body.len() as u8],
            subpage => vec![self.code | 0x40, subpage, 0, body.len() as u8],
        };
        bytes.extend(body);
        bytes
    }

    /// Returns the bits that MODE SELECT can change: those that differ if the values do.
    fn mask(&self) -> Vec<u8> {
        let [low, high] = [false, true].map(|value| {
            (self.make)(Modes {
                write_cache: value,
                descriptors: value,
                write_protect: value,
            })
        });
        low.iter()
            .zip(&high)
            .map(|(low, high)| low ^ high)
            .collect()
    }
}

/// DEVICE-SPECIFIC PARAMETER: WP and DPOFUA.
fn device_parameter(call: &Call<'_>) -> u8 {
    let is_protected = call.unit.check_writable().is_err();
    u8::from(is_protected) << 7 | 0x10
}

/// Returns a block descriptor (SBC-3, 6.5.2): of eight bytes, or of sixteen.
fn block_descriptor(call: &Call<'_>, is_long: bool) -> Vec<u8> {
    let blocks = call.unit.blocks();
    let size = call.facts().block_size;
    if is_long {
        let parts = [blocks.to_be_bytes(), u64::from(size).to_be_bytes()];
        return parts.concat();
    }
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
    [blocks.to_be_bytes(), size.to_be_bytes()].concat()
}

pub fn sense_6(call: &mut Call<'_>) -> Outcome {
    let allocation = usize::from(call.cdb.byte(4));
    let (descriptor, pages) = sense(call, false)?;
    let length = 3 + descriptor.len() + pages.len();
    let mut data = vec![
        u8::try_from(length).unwrap_or(u8::MAX),
        0,
        device_parameter(call),
        descriptor.len() as u8,
    ];
    data.extend(descriptor);
    data.extend(pages);
    reply(data, allocation)
}

pub fn sense_10(call: &mut Call<'_>) -> Outcome {
    let allocation = usize::from(call.cdb.u16(7));
    let is_long = call.cdb.bit(1, 4);
    let (descriptor, pages) = sense(call, is_long)?;
    let length = 6 + descriptor.len() + pages.len();
    let mut data = (length as u16).to_be_bytes().to_vec();
    let is_long = is_long && !descriptor.is_empty();
    data.extend([0, device_parameter(call), u8::from(is_long), 0]);
    data.extend((descriptor.len() as u16).to_be_bytes());
    data.extend(descriptor);
    data.extend(pages);
    reply(data, allocation)
}

/// Returns the block descriptor and the pages that MODE SENSE asks for.
fn sense(call: &Call<'_>, is_long: bool) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let values = match call.cdb.byte(2) >> 6 {
        0 => Values::Current,
        1 => Values::Changeable,
        2 => Values::Default,
        _ => return Err(Sense::illegal(code::SAVING_NOT_SUPPORTED).into()),
    };
    let (code, subpage) = (call.cdb.byte(2) & 0x3f, call.cdb.byte(3));
    let wanted = PAGES.iter().filter(|page| page.is_wanted(code, subpage));
    let modes = call.unit.state.with(|saved| saved.modes);
    let pages: Vec<u8> = wanted.flat_map(|page| page.bytes(modes, values)).collect();
    if pages.is_empty() {
        // The page is not there, or the subpage.
        let is_known = code == ALL || PAGES.iter().any(|page| page.code == code);
        return Err(match is_known {
            true => Sense::cdb(3),
            false => Sense::cdb_bit(2, 5),
        }
        .into());
    }
    let omits_descriptor = call.cdb.bit(1, 3);
    let descriptor = match omits_descriptor {
        true => Vec::new(),
        false => block_descriptor(call, is_long),
    };
    Ok((descriptor, pages))
}

pub fn select_6(call: &mut Call<'_>) -> Outcome {
    let length = usize::from(call.cdb.byte(4));
    select(call, length, 4)
}

pub fn select_10(call: &mut Call<'_>) -> Outcome {
    let length = usize::from(call.cdb.u16(7));
    select(call, length, 8)
}

fn select(call: &mut Call<'_>, length: usize, header: usize) -> Outcome {
    if call.cdb.bit(1, 0) {
        // SP: pages cannot be saved.
        return Err(Sense::cdb_bit(1, 0).into());
    }
    if length == 0 {
        return good();
    }
    let list = call.parameters(length, MAX_LIST)?;
    let before = call.unit.state.with(|saved| saved.modes);
    let modes = parse(call, &list, header, before)?;
    if !call.cdb.bit(1, 4) && list.len() > header + descriptor_length(&list, header) {
        // PF: pages in another format than that of the standard.
        return Err(Sense::cdb_bit(1, 4).into());
    }
    if modes == before {
        return good();
    }
    let nexus = call.command.nexus;
    call.unit.state.with(|saved| {
        saved.modes = modes;
        saved.attend_others(Some(nexus), Attention::ModeChanged);
    });
    if before.write_cache && !modes.write_cache {
        // What was written before must be as safe as what is written from now on.
        return action(Action::Flush);
    }
    good()
}

fn descriptor_length(list: &[u8], header: usize) -> usize {
    let list = Fields(list);
    match header {
        4 => list.byte(3).into(),
        _ => list.u16(6).into(),
    }
}

/// Parses the parameter list of MODE SELECT. Returns the new values.
fn parse(call: &Call<'_>, list: &[u8], header: usize, modes: Modes) -> Result<Modes, Failure> {
    let too_short = || Failure::from(Sense::illegal(code::PARAMETER_LIST_LENGTH));
    if list.len() < header {
        return Err(too_short());
    }
    let is_long = header == 8 && Fields(list).bit(4, 0);
    let length = descriptor_length(list, header);
    let end = header + length;
    if length > 0 {
        let own = block_descriptor(call, is_long);
        let given = list.get(header..end).ok_or_else(too_short)?;
        check_descriptor(given, &own, is_long)
            .map_err(|at| Sense::parameter((header + at) as u16))?;
    }
    let mut modes = modes;
    let mut rest = list.get(end..).ok_or_else(too_short)?;
    while !rest.is_empty() {
        let at = list.len() - rest.len();
        let fields = Fields(rest);
        let has_subpage = fields.bit(0, 6);
        let (code, subpage, start, length) = match has_subpage {
            true => (
                fields.byte(0) & 0x3f,
                fields.byte(1),
                4,
                fields.u16(2).into(),
            ),
            false => (fields.byte(0) & 0x3f, 0, 2, usize::from(fields.byte(1))),
        };
        if rest.len() < start {
            return Err(too_short());
        }
        let mut pages = PAGES.iter();
        let page = pages.find(|page| page.code == code && page.subpage == subpage);
        let Some(page) = page.filter(|page| has_subpage == (page.subpage != 0)) else {
            return Err(Sense::parameter(at as u16).into());
        };
        let current = (page.make)(modes);
        if length != current.len() {
            return Err(Sense::parameter((at + start - 1) as u16).into());
        }
        let given = rest.get(start..start + length).ok_or_else(too_short)?;
        let fixed = given.iter().zip(&current).zip(page.mask());
        let wrong = fixed
            .map(|((given, current), mask)| (given ^ current) & !mask)
            .position(|difference| difference != 0);
        if let Some(wrong) = wrong {
            return Err(Sense::parameter((at + start + wrong) as u16).into());
        }
        modes = change(page, Fields(given), modes);
        rest = rest.get(start + length..).unwrap_or_default();
    }
    Ok(modes)
}

/// Checks a block descriptor: it must not change anything. Returns where it does.
fn check_descriptor(given: &[u8], own: &[u8], is_long: bool) -> Result<(), usize> {
    if given.len() != own.len() {
        return Err(0);
    }
    let blocks = if is_long { 8 } else { 4 };
    let (count, size) = given.split_at(blocks);
    let (own_count, own_size) = own.split_at(blocks);
    // 0 keeps the number of blocks, and all ones ask for as many as there are.
    let keeps = |byte: u8| count.iter().all(|one| *one == byte);
    if count != own_count && !keeps(0) && !keeps(0xff) {
        return Err(0);
    }
    if size != own_size {
        return Err(blocks);
    }
    Ok(())
}

/// Returns the values after a page was selected.
fn change(page: &Page, body: Fields<'_>, modes: Modes) -> Modes {
    match (page.code, page.subpage) {
        (0x08, 0) => Modes {
            write_cache: body.bit(0, 2),
            ..modes
        },
        (0x0a, 0) => Modes {
            descriptors: body.bit(0, 2),
            write_protect: body.bit(2, 3),
            ..modes
        },
        _ => modes,
    }
}
