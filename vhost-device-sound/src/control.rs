// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests on the control queue (VIRTIO 1.3, 5.14.6). All are answered from the state of the device: none waits for a
//! sound server. But the thread that answers them also reads and writes files, which a slow disk delays.

use std::time::Instant;

use vhost_device_common::chain::Chain;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::card::Card;
use crate::elements;
use crate::lifecycle::Command;
use crate::protocol::{
    CHMAP_POSITIONS, ChmapInfo, ELEMENT_INFO_SIZE, ELEMENT_VALUE_SIZE, JackInfo, PcmInfo,
    QueryInfo, SetParams, Status, request,
};
use crate::stream::Finished;

const _: () = assert!(size_of::<ChmapInfo>() == 6 + CHMAP_POSITIONS);

/// Largest structure for an item of a query, in bytes. Structures grow with versions of the specification.
const MAX_ITEM: usize = 1024;

/// How a request is answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// At once: the response is written.
    Written {
        /// Bytes that the device wrote.
        written: u32,
        /// Whether the status is not OK.
        failed: bool,
    },
    /// With OK, once all buffers of this stream are completed.
    Released(usize),
}

/// Carries out a request. Buffers that it discards are added to `finished`, with the index of their queue.
pub fn execute(
    card: &mut Card,
    chain: &mut Chain,
    now: Instant,
    finished: &mut Vec<(u16, Finished)>,
) -> Answer {
    let outcome = match carry_out(card, chain, now, finished) {
        Ok(Outcome::Released(stream)) => return Answer::Released(stream),
        Ok(Outcome::Response(payload)) => Ok(payload),
        Err(status) => Err(status),
    };
    let (status, payload) = match outcome {
        Ok(payload) => (Status::Ok, payload),
        Err(status) => (status, Vec::new()),
    };
    let mut written = respond(chain, status);
    if written > 0 && chain.write(&payload).is_ok() {
        written += payload.len() as u32;
    }
    Answer::Written {
        written,
        failed: status != Status::Ok,
    }
}

/// Writes a response that is only a status. Returns the number of bytes written.
pub fn respond(chain: &mut Chain, status: Status) -> u32 {
    let bytes = status.number().to_le_bytes();
    match chain.write(&bytes) {
        Ok(()) => bytes.len() as u32,
        Err(_) => 0,
    }
}

/// The result of a request that succeeded.
enum Outcome {
    /// The payload of the response.
    Response(Vec<u8>),
    /// The stream was released.
    Released(usize),
}

fn carry_out(
    card: &mut Card,
    chain: &mut Chain,
    now: Instant,
    finished: &mut Vec<(u16, Finished)>,
) -> Result<Outcome, Status> {
    chain.check().map_err(|_| Status::BadMessage)?;
    let code = number(chain)?;
    let command = match code {
        request::PCM_SET_PARAMS => Command::SetParams,
        request::PCM_PREPARE => Command::Prepare,
        request::PCM_RELEASE => Command::Release,
        request::PCM_START => Command::Start,
        request::PCM_STOP => Command::Stop,
        _ => return query(card, code, chain).map(Outcome::Response),
    };
    let index = number(chain)? as usize;
    let params: Option<SetParams> = match command {
        Command::SetParams => Some(structure(chain)?),
        _ => None,
    };
    let stream = card.streams.get_mut(index).ok_or(Status::BadMessage)?;
    let queue = stream.direction().queue();
    let mut done = Vec::new();
    let outcome = stream.command(command, params.as_ref(), now, &mut done);
    finished.extend(done.into_iter().map(|done| (queue, done)));
    outcome?;
    if let Command::Prepare = command {
        card.drop_xrun(index);
    }
    Ok(match command {
        Command::Release => Outcome::Released(index),
        _ => Outcome::Response(Vec::new()),
    })
}

/// Carries out a request that is not a command of a stream. Returns the payload of the response.
fn query(card: &mut Card, code: u32, chain: &mut Chain) -> Result<Vec<u8>, Status> {
    let (jacks, streams, chmaps) = card.counts();
    match code {
        request::JACK_INFO => items(chain, jacks, size_of::<JackInfo>(), |index, _| {
            card.jack_info(index)
        }),
        // No jack has VIRTIO_SND_JACK_F_REMAP.
        request::JACK_REMAP => match (number(chain)? as usize) < jacks {
            true => Err(Status::NotSupported),
            false => Err(Status::BadMessage),
        },
        request::PCM_INFO => items(chain, streams, size_of::<PcmInfo>(), |index, _| {
            card.pcm_info(index)
        }),
        request::CHMAP_INFO => items(chain, chmaps, size_of::<ChmapInfo>(), |index, _| {
            card.chmap_info(index)
        }),
        request::CTL_INFO..=request::CTL_TLV_COMMAND => {
            if card.elements().is_none() {
                return Err(Status::NotSupported);
            }
            element(card, code, chain)
        }
        _ => Err(Status::NotSupported),
    }
}

/// Carries out a request about control elements.
fn element(card: &mut Card, code: u32, chain: &mut Chain) -> Result<Vec<u8>, Status> {
    if code == request::CTL_INFO {
        return items(chain, elements::COUNT, ELEMENT_INFO_SIZE, |index, size| {
            elements::info(index as u32, size)
        });
    }
    let index = number(chain)?;
    let values = card.elements().ok_or(Status::NotSupported)?;
    let value = values.value(index).ok_or(Status::BadMessage)?;
    match code {
        request::CTL_READ => {
            // The whole structure if there is room for it, but at least the value.
            let mut bytes = value.to_le_bytes().to_vec();
            let room = chain.writable_len().saturating_sub(4);
            if room < bytes.len() as u64 {
                return Err(Status::BadMessage);
            }
            bytes.resize(room.min(ELEMENT_VALUE_SIZE as u64) as usize, 0);
            Ok(bytes)
        }
        request::CTL_WRITE => {
            let value = number(chain)?;
            card.set_element(index, value).ok_or(Status::BadMessage)?;
            Ok(Vec::new())
        }
        request::CTL_TLV_READ => {
            let metadata = elements::metadata(index).ok_or(Status::NotSupported)?;
            // The device writes as much as there is room for.
            let room = chain.writable_len().saturating_sub(4);
            let length = room.min(metadata.len() as u64) as usize;
            Ok(metadata.get(..length).unwrap_or_default().to_vec())
        }
        // No element has items, or metadata that can be written.
        _ => Err(Status::NotSupported),
    }
}

/// Returns the structures of the items that the driver asks for, each in as many bytes as the driver wants.
fn items(
    chain: &mut Chain,
    available: usize,
    least: usize,
    item: impl Fn(usize, usize) -> Option<Vec<u8>>,
) -> Result<Vec<u8>, Status> {
    let QueryInfo { start, count, size } = structure(chain)?;
    let (start, count, size) = (
        start.get() as usize,
        count.get() as usize,
        size.get() as usize,
    );
    let end = start.checked_add(count).filter(|end| *end <= available);
    let length = count.checked_mul(size);
    let room = chain.writable_len().saturating_sub(4);
    let (Some(end), Some(length)) = (end, length) else {
        return Err(Status::BadMessage);
    };
    if !(least..=MAX_ITEM).contains(&size) || length as u64 > room {
        return Err(Status::BadMessage);
    }
    let mut bytes = Vec::with_capacity(length);
    for index in start..end {
        let mut item = item(index, size).ok_or(Status::BadMessage)?;
        item.resize(size, 0);
        bytes.extend(item);
    }
    Ok(bytes)
}

fn number(chain: &mut Chain) -> Result<u32, Status> {
    let mut bytes = [0; 4];
    chain.read(&mut bytes).map_err(|_| Status::BadMessage)?;
    Ok(u32::from_le_bytes(bytes))
}

fn structure<T: FromBytes + IntoBytes + FromZeros>(chain: &mut Chain) -> Result<T, Status> {
    let mut structure = T::new_zeroed();
    chain
        .read(structure.as_mut_bytes())
        .map_err(|_| Status::BadMessage)?;
    Ok(structure)
}
