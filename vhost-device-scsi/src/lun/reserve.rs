// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RESERVE and RELEASE (SPC-2, 7.21 and 7.23), PERSISTENT RESERVE IN and OUT (SPC-4, 6.14 and 6.15).

use std::sync::{Arc, PoisonError};

use vhost_device_common::state::{self, StateError};

use super::answer::{Answer, Failure};
use super::call::{Call, Outcome, good, procedure, reply};
use super::cdb::Fields;
use super::inquiry::TARGET_PORT;
use super::medium::{Procedure, Target};
use super::registry::{Change, Registry, Type};
use super::sense::{Key, Sense, code};
use super::{LogicalUnit, Nexus};

/// The version of stored reservations.
const VERSION: u8 = 1;

/// Bytes of the parameter list of PERSISTENT RESERVE OUT.
const LIST: u32 = 24;

/// TYPE MASK of REPORT CAPABILITIES: all types.
const ALL_TYPES: [u8; 2] = [0xea, 0x01];

/// RESERVE(6) and RESERVE(10): of the whole unit.
pub fn reserve(call: &mut Call<'_>) -> Outcome {
    check_legacy(call)?;
    let nexus = call.command.nexus;
    call.unit.state.with(|saved| {
        // A reservation of another initiator was found before.
        if !saved.registry.is_empty() {
            return Err(Failure::Conflict);
        }
        saved.reserved = Some(nexus);
        Ok(())
    })?;
    good()
}

/// RELEASE(6) and RELEASE(10). It does nothing for those who hold nothing.
pub fn release(call: &mut Call<'_>) -> Outcome {
    check_legacy(call)?;
    let nexus = call.command.nexus;
    call.unit.state.with(|saved| {
        if !saved.registry.is_empty() {
            return Err(Failure::Conflict);
        }
        saved.reserved = saved.reserved.filter(|holder| *holder != nexus);
        Ok(())
    })?;
    good()
}

/// Checks that neither a part of the unit nor a third party is named, which are obsolete.
fn check_legacy(call: &Call<'_>) -> Result<(), Failure> {
    match call.cdb.byte(1) & 0x1f {
        0 => Ok(()),
        _ => Err(Sense::cdb_bit(1, 4).into()),
    }
}

/// Answers PERSISTENT RESERVE IN with what `make` makes of the registrations: PRGENERATION and a length come before it.
fn read(call: &Call<'_>, make: impl FnOnce(&Registry) -> Vec<u8>) -> Outcome {
    let (generation, body) = call.unit.state.with(|saved| {
        let body = make(&saved.registry);
        (saved.registry.generation, body)
    });
    let mut data = generation.to_be_bytes().to_vec();
    data.extend((body.len() as u32).to_be_bytes());
    data.extend(body);
    reply(data, call.cdb.u16(7).into())
}

pub fn read_keys(call: &mut Call<'_>) -> Outcome {
    read(call, |registry| {
        let keys = registry.registrations().iter();
        keys.flat_map(|registration| registration.key.to_be_bytes())
            .collect()
    })
}

pub fn read_reservation(call: &mut Call<'_>) -> Outcome {
    read(call, |registry| {
        let Some(reservation) = registry.reservation() else {
            return Vec::new();
        };
        let mut body = registry.reservation_key().to_be_bytes().to_vec();
        body.extend([0, 0, 0, 0, 0, reservation.kind as u8, 0, 0]);
        body
    })
}

pub fn report_capabilities(call: &mut Call<'_>) -> Outcome {
    let can_persist = u8::from(call.facts().persists);
    let persists = call.unit.state.with(|saved| saved.registry.persists);
    let [low, high] = ALL_TYPES;
    // PTPL_C; TMV, ALLOW COMMANDS (TEST UNIT READY), PTPL_A.
    let flags = [can_persist, 0x90 | u8::from(persists)];
    let data = [&[0, 8], &flags[..], &[low, high, 0, 0]].concat();
    reply(data, call.cdb.u16(7).into())
}

pub fn read_full_status(call: &mut Call<'_>) -> Outcome {
    read(call, |registry| {
        let mut body = Vec::new();
        for registration in registry.registrations() {
            let is_holder = registry.is_holder(registration.nexus);
            let kind = registry.reservation().filter(|_| is_holder);
            let kind = kind.map_or(0, |reservation| reservation.kind as u8);
            let id = transport_id(registration.nexus);
            body.extend(registration.key.to_be_bytes());
            body.extend([0, 0, 0, 0, u8::from(is_holder), kind, 0, 0, 0, 0]);
            body.extend(TARGET_PORT.to_be_bytes());
            body.extend((id.len() as u32).to_be_bytes());
            body.extend(id);
        }
        body
    })
}

/// Returns a TransportID. VIRTIO has none of its own, so initiators look like ports of SAS (SPC-4, 7.6.4.7).
fn transport_id(nexus: Nexus) -> Vec<u8> {
    let mut id = vec![0x06, 0, 0, 0];
    id.extend(nexus.0.to_be_bytes());
    id.resize(24, 0);
    id
}

/// Service actions of PERSISTENT RESERVE OUT.
#[derive(Clone, Copy)]
enum Action {
    Register,
    Reserve,
    Release,
    Clear,
    Preempt,
    RegisterAnyway,
}

/// What PERSISTENT RESERVE OUT asks for.
#[derive(Clone, Copy)]
struct Request {
    action: Action,
    nexus: Nexus,
    key: u64,
    /// SERVICE ACTION RESERVATION KEY.
    other: u64,
    kind: Option<Type>,
    /// APTPL.
    persists: bool,
}

pub fn persistent_reserve_out(call: &mut Call<'_>) -> Outcome {
    let action = match call.cdb.byte(1) & 0x1f {
        0 => Action::Register,
        1 => Action::Reserve,
        2 => Action::Release,
        3 => Action::Clear,
        // Commands of a preempted initiator end before their answers could be missed: nothing to abort.
        4 | 5 => Action::Preempt,
        _ => Action::RegisterAnyway,
    };
    let length = call.cdb.u32(5);
    if length != LIST {
        return Err(Sense::illegal(code::PARAMETER_LIST_LENGTH).into());
    }
    let list = call.parameters(LIST as usize, LIST as usize)?;
    let list = Fields(&list);
    let has_kind = matches!(action, Action::Reserve | Action::Release | Action::Preempt);
    if has_kind && call.cdb.byte(2) >> 4 != 0 {
        // SCOPE: only the whole unit can be reserved.
        return Err(Sense::cdb_bit(2, 7).into());
    }
    let kind = Type::of(call.cdb.byte(2) & 0x0f);
    if has_kind && kind.is_none() {
        return Err(Sense::cdb_bit(2, 3).into());
    }
    let registers = matches!(action, Action::Register | Action::RegisterAnyway);
    if list.bit(20, 3) {
        // SPEC_I_PT: other initiators cannot be registered.
        return Err(Sense::parameter(20).into());
    }
    if registers && list.bit(20, 2) {
        // ALL_TG_PT: there is one target port.
        return Err(Sense::parameter(20).into());
    }
    if registers && list.bit(20, 0) && !call.facts().persists {
        // APTPL: there is no file for reservations.
        return Err(Sense::parameter(20).into());
    }
    let request = Request {
        action,
        nexus: call.command.nexus,
        key: list.u64(0),
        other: list.u64(8),
        kind,
        persists: list.bit(20, 0),
    };
    let (unit, target) = (Arc::clone(call.unit), Arc::clone(call.target));
    // Storing the state may block.
    procedure(Procedure::new(call.unit, move |_, _| {
        carry_out(&unit, &*target, request).map(|()| Answer::good())
    }))
}

fn carry_out(unit: &LogicalUnit, target: &dyn Target, request: Request) -> Result<(), Failure> {
    // One after the other. Other commands do not wait while the state is stored.
    let _order = (unit.registering.lock()).unwrap_or_else(PoisonError::into_inner);
    let mut registry = unit.state.with(|saved| saved.registry.clone());
    let persisted = registry.persists;
    let attentions = change(&mut registry, request)?;
    if persisted || registry.persists {
        store(unit, target, &registry)?;
    }
    unit.state.with(|saved| {
        saved.registry = registry;
        for (nexus, attention) in attentions {
            saved.attend(nexus, attention);
        }
    });
    Ok(())
}

fn change(registry: &mut Registry, request: Request) -> Change {
    let Request {
        nexus, key, other, ..
    } = request;
    match (request.action, request.kind) {
        (Action::Register, _) => registry.register(nexus, key, other, request.persists),
        (Action::RegisterAnyway, _) => registry.register_anyway(nexus, other, request.persists),
        (Action::Clear, _) => registry.clear(nexus, key),
        (Action::Reserve, Some(kind)) => registry.reserve(nexus, key, kind),
        (Action::Release, Some(kind)) => registry.release(nexus, key, kind),
        (Action::Preempt, Some(kind)) => registry.preempt(nexus, key, other, kind),
        // Types were checked before.
        (Action::Reserve | Action::Release | Action::Preempt, None) => {
            Err(Sense::cdb_bit(2, 3).into())
        }
    }
}

/// Stores what must survive a loss of power.
fn store(unit: &LogicalUnit, target: &dyn Target, registry: &Registry) -> Result<(), Failure> {
    let failed = || Failure::from(Sense::new(Key::HardwareError, code::INTERNAL_FAILURE));
    let bytes = match registry.persists && !registry.is_empty() {
        true => state::encode_next(registry, vec![VERSION]).map_err(|_| failed())?,
        false => Vec::new(),
    };
    let naa = unit.facts.identity.naa;
    target.store(naa, &bytes).map_err(|_| failed())
}

/// Takes over reservations that were stored.
pub fn load(unit: &LogicalUnit, stored: &[u8]) -> Result<(), StateError> {
    let Some((version, bytes)) = stored.split_first() else {
        return Ok(());
    };
    if *version != VERSION {
        let (found, known) = (u32::from(*version), u32::from(VERSION));
        return Err(StateError::Version { found, known });
    }
    let registry: Registry = state::decode(bytes)?;
    if !registry.is_valid() {
        return Err(StateError::Contents("invalid persistent reservations"));
    }
    unit.state.with(|saved| saved.registry = registry);
    Ok(())
}
