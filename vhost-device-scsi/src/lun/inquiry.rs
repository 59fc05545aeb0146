// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INQUIRY: standard data and vital product data (SPC-4, 6.6 and 7.8; SBC-3, 6.6).

use super::call::{Call, Outcome, reply};
use super::medium::{Facts, Identity, Provisioning};
use super::sense::Sense;
use super::{compare, copy, provision, transfer};

/// Makes a page, without its header.
type Make = fn(&Facts) -> Vec<u8>;

/// Vital product data pages, in ascending order.
const PAGES: &[(u8, Make)] = &[
    (0x00, supported_pages),
    (0x80, serial_number),
    (0x83, identification),
    (0x86, extended_inquiry),
    (0x8f, third_party_copy),
    (0xb0, block_limits),
    (0xb1, characteristics),
    (0xb2, provisioning),
    (0xb7, block_limits_extension),
];

/// The most characters of a serial number.
const MAX_SERIAL: usize = 36;

/// The number of the only target port, and of its group.
pub const TARGET_PORT: u16 = 1;

pub fn inquiry(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    let (page, allocation) = (cdb.byte(2), usize::from(cdb.u16(3)));
    if cdb.bit(1, 1) {
        // CMDDT, which is obsolete.
        return Err(Sense::cdb_bit(1, 1).into());
    }
    let data = if cdb.bit(1, 0) {
        vital_product_data(page, call.facts()).ok_or(Sense::cdb(2))?
    } else if page == 0 {
        standard(0x00, Some(call.facts()))
    } else {
        return Err(Sense::cdb(2).into());
    };
    reply(data, allocation)
}

/// Returns standard INQUIRY data that begins with this byte: qualifier and device type.
pub fn standard(first: u8, facts: Option<&Facts>) -> Vec<u8> {
    let mut data = vec![first];
    let is_removable = facts.is_some_and(|facts| facts.removable);
    data.push(u8::from(is_removable) << 7);
    data.push(0x06); // VERSION: SPC-4
    data.push(0x12); // HISUP, RESPONSE DATA FORMAT
    data.push(91); // ADDITIONAL LENGTH
    data.push(0x18); // TPGS: implicit; 3PC
    data.push(0);
    data.push(0x02); // CMDQUE
    match facts.map(|facts| &facts.identity) {
        Some(identity) => {
            data.extend(identity.vendor);
            data.extend(identity.product);
            data.extend(identity.revision);
        }
        None => data.extend([b' '; 28]),
    }
    data.resize(58, 0);
    // VERSION DESCRIPTORS: SAM-5, SPC-4, SBC-3.
    for version in [0x00a0_u16, 0x0460, 0x04c0] {
        data.extend(version.to_be_bytes());
    }
    data.resize(96, 0);
    data
}

/// Returns a page with its header; `None` if there is no such page.
fn vital_product_data(page: u8, facts: &Facts) -> Option<Vec<u8>> {
    let (_, make) = PAGES.iter().find(|(code, _)| *code == page)?;
    let body = make(facts);
    let mut data = vec![0, page];
    data.extend((body.len() as u16).to_be_bytes());
    data.extend(body);
    Some(data)
}

fn supported_pages(_: &Facts) -> Vec<u8> {
    PAGES.iter().map(|(code, _)| *code).collect()
}

/// Returns the serial number as pages show it: printable, and not too long.
fn serial(identity: &Identity) -> Vec<u8> {
    let printable = |byte: u8| {
        if (0x20..0x7f).contains(&byte) {
            byte
        } else {
            b'_'
        }
    };
    let bytes = identity.serial.bytes().take(MAX_SERIAL);
    bytes.map(printable).collect()
}

fn serial_number(facts: &Facts) -> Vec<u8> {
    serial(&facts.identity)
}

/// Whom a designator describes.
const UNIT: u8 = 0x00;
const PORT: u8 = 0x10;
const TARGET: u8 = 0x20;

fn designator(list: &mut Vec<u8>, code_set: u8, association: u8, kind: u8, bytes: &[u8]) {
    list.extend([code_set, association | kind, 0, bytes.len() as u8]);
    list.extend(bytes);
}

/// Device identification. The NAA designator is the last one: initiators that look for the best one take it.
fn identification(facts: &Facts) -> Vec<u8> {
    let identity = &facts.identity;
    let mut list = Vec::new();
    let vendor = [identity.vendor.to_vec(), serial(identity)].concat();
    designator(&mut list, 2, UNIT, 1, &vendor);
    let [high, low] = TARGET_PORT.to_be_bytes();
    designator(&mut list, 1, PORT, 4, &[0, 0, high, low]);
    designator(&mut list, 1, PORT, 5, &[0, 0, high, low]);
    let mut name = format!("naa.{:016X}", identity.target).into_bytes();
    name.resize(name.len().next_multiple_of(4), 0);
    designator(&mut list, 3, TARGET, 8, &name);
    designator(&mut list, 1, UNIT, 3, &identity.naa.to_be_bytes());
    list
}

/// Extended INQUIRY data.
fn extended_inquiry(_: &Facts) -> Vec<u8> {
    let mut data = vec![0; 60];
    // UASK_SUP, HEADSUP, ORDSUP, SIMPSUP; V_SUP; LUICLR.
    for (at, byte) in data.iter_mut().zip([0x00, 0x27, 0x01, 0x01]) {
        *at = byte;
    }
    data
}

fn third_party_copy(_: &Facts) -> Vec<u8> {
    copy::vital_product_data()
}

/// Returns how many logical blocks `bytes` are, as a field of four bytes shows it.
fn blocks(facts: &Facts, bytes: u64) -> u32 {
    let blocks = bytes / u64::from(facts.block_size.max(1));
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

fn block_limits(facts: &Facts) -> Vec<u8> {
    let physical = blocks(facts, facts.physical_block_size.into());
    let unmap = facts.provisioning;
    let granularity = unmap.map_or(0, |unmap| blocks(facts, unmap.granularity.into()));
    let mut data = Vec::with_capacity(60);
    data.push(1); // WSNZ: 0 blocks of WRITE SAME are refused
    data.push(compare::MAX_BLOCKS);
    data.extend((physical as u16).to_be_bytes()); // OPTIMAL TRANSFER LENGTH GRANULARITY
    data.extend(blocks(facts, transfer::MAX_BYTES).to_be_bytes());
    data.extend(blocks(facts, facts.optimal_io_size.into()).to_be_bytes());
    data.extend(0u32.to_be_bytes()); // MAXIMUM PREFETCH LENGTH: no limit
    data.extend(provision::max_unmap_blocks(facts).to_be_bytes());
    let descriptors = unmap.map_or(0, |_| provision::MAX_DESCRIPTORS as u32);
    data.extend(descriptors.to_be_bytes());
    data.extend(granularity.to_be_bytes());
    let is_aligned = u32::from(granularity > 0) << 31; // UGAVALID: aligned to block 0
    data.extend(is_aligned.to_be_bytes());
    data.extend(provision::max_same_blocks(facts).to_be_bytes());
    // The fields of WRITE ATOMIC, which is not supported.
    data.extend([0; 20]);
    data
}

fn characteristics(facts: &Facts) -> Vec<u8> {
    let mut data = facts.rotation.to_be_bytes().to_vec();
    data.resize(60, 0);
    data
}

fn provisioning(facts: &Facts) -> Vec<u8> {
    let Some(Provisioning { reads_zeroes, .. }) = facts.provisioning else {
        return vec![0; 4];
    };
    // LBPU, LBPWS, LBPWS10; LBPRZ; thin provisioning.
    vec![0, 0xe0 | u8::from(reads_zeroes) << 2, 2, 0]
}

fn block_limits_extension(_: &Facts) -> Vec<u8> {
    vec![0; 60]
}
