// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands about the logical unit itself: readiness, sense data, start and stop, diagnostics, the echo buffer.

use std::sync::{Mutex, PoisonError};

use super::Nexus;
use super::attention::Attention;
use super::call::{Call, Outcome, action, good, reply};
use super::medium::Action;
use super::registry::Class;
use super::sense::{Key, Sense, code};

/// Bytes of the echo buffer.
const ECHO: usize = 4096;

/// What an initiator has stored in the echo buffer.
pub type Echo = Mutex<Option<(Nexus, Vec<u8>)>>;

/// All that keeps a unit from being ready is checked for every command.
pub fn test_unit_ready(_: &mut Call<'_>) -> Outcome {
    good()
}

/// REQUEST SENSE (SPC-4, 6.39): delivers a unit attention. Other sense data came with the answer that it belongs to.
pub fn request_sense(call: &mut Call<'_>) -> Outcome {
    let nexus = call.command.nexus;
    let sense = call.unit.state.with_nexus(nexus, |saved| {
        let attention = saved.take_attention(nexus);
        attention.map_or_else(
            || match saved.ejected {
                true => Sense::new(Key::NotReady, code::MEDIUM_NOT_PRESENT),
                false => Sense::new(Key::NoSense, code::NONE),
            },
            Attention::sense,
        )
    });
    reply(sense.to_bytes(call.cdb.bit(1, 0)), call.cdb.byte(4).into())
}

/// START STOP UNIT (SBC-3, 5.25): loads and ejects the medium. A unit without motor has nothing to start or to stop, so that a guest that
/// stops it and reboots finds it ready.
pub fn start_stop_unit(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    let (unit, nexus) = (call.unit, call.command.nexus);
    let (start, load_eject) = (cdb.bit(4, 0), cdb.bit(4, 1));
    let power_condition = cdb.byte(4) >> 4;
    if !start || power_condition != 0 {
        unit.check_class(nexus, Class::Write)?;
    }
    if power_condition != 0 {
        // There are no power conditions to enter.
        return good();
    }
    if load_eject && !call.facts().removable {
        return Err(Sense::cdb_bit(4, 1).into());
    }
    unit.state.with(|saved| {
        if !load_eject {
            return Ok(());
        }
        if !saved.preventing.is_empty() {
            return Err(Sense::illegal(code::MEDIUM_REMOVAL_PREVENTED));
        }
        if saved.ejected && start {
            saved.attend_others(Some(nexus), Attention::MediumChanged);
        }
        saved.ejected = !start;
        Ok(())
    })?;
    let keeps_cache = cdb.bit(4, 2);
    match start || keeps_cache {
        true => good(),
        false => action(Action::Flush),
    }
}

/// PREVENT ALLOW MEDIUM REMOVAL (SBC-3, 5.15).
pub fn prevent_removal(call: &mut Call<'_>) -> Outcome {
    let (nexus, prevent) = (call.command.nexus, call.cdb.byte(4) & 3);
    if prevent > 1 {
        return Err(Sense::cdb_bit(4, 1).into());
    }
    if prevent == 1 {
        call.unit.check_class(nexus, Class::Write)?;
    }
    let state = &call.unit.state;
    state.with(|saved| saved.prevent(nexus, prevent == 1));
    good()
}

/// SEND DIAGNOSTIC (SPC-4, 6.42): the default self-test, which always passes.
pub fn send_diagnostic(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    if cdb.byte(1) >> 5 != 0 {
        return Err(Sense::cdb_bit(1, 7).into());
    }
    match cdb.u16(3) {
        0 => good(),
        _ => Err(Sense::cdb(3).into()),
    }
}

/// Modes of READ BUFFER and WRITE BUFFER.
const DESCRIPTOR: u8 = 0x03;
const ECHO_BUFFER: u8 = 0x0a;
const ECHO_DESCRIPTOR: u8 = 0x0b;

fn u24(high: u8, low: u16) -> usize {
    usize::from(high) << 16 | usize::from(low)
}

/// WRITE BUFFER (SPC-4, 6.49): the echo buffer only; there is no firmware to replace.
pub fn write_buffer(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    if cdb.byte(1) & 0x1f != ECHO_BUFFER {
        return Err(Sense::cdb_bit(1, 4).into());
    }
    let length = u24(cdb.byte(6), cdb.u16(7));
    let bytes = call.parameters(length, ECHO)?;
    let mut echo = call
        .unit
        .echo
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    *echo = Some((call.command.nexus, bytes));
    good()
}

/// READ BUFFER (SPC-4, 6.17).
pub fn read_buffer(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    let allocation = u24(cdb.byte(6), cdb.u16(7));
    let data = match cdb.byte(1) & 0x1f {
        // There is a buffer of no bytes.
        DESCRIPTOR => vec![0; 4],
        ECHO_DESCRIPTOR => {
            let [high, low] = (ECHO as u16).to_be_bytes();
            vec![0, 0, high, low]
        }
        ECHO_BUFFER => {
            let echo = call
                .unit
                .echo
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match &*echo {
                Some((nexus, bytes)) if *nexus == call.command.nexus => bytes.clone(),
                _ => return Err(Sense::illegal(code::SEQUENCE_ERROR).into()),
            }
        }
        _ => return Err(Sense::cdb_bit(1, 4).into()),
    };
    reply(data, allocation)
}
