// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands of the control socket: disks are added, removed, resized and listed while a guest uses the device.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use vhost_device_common::device::{Argument, ArgumentType, Arguments, CommandError, Verb};
use vhost_device_storage::image::Source;

use crate::address::{Address, MAX_LUNS};
use crate::events::Event;
use crate::lun::Attention;
use crate::options::DiskArguments;
use crate::passthrough::PassThrough;
use crate::shared::Shared;
use crate::target::TargetView;
use crate::unit::{Settings, Unit, adopt_reservations};

const ADD: &str = "add-disk";
const REMOVE: &str = "remove-disk";
const RESIZE: &str = "resize-disk";
const QUERY: &str = "query-disks";

const TARGET: Argument = Argument {
    name: "target",
    help: "number of the target, 0 to 255",
    r#type: ArgumentType::Number,
    optional: false,
};
const LUN: Argument = Argument {
    name: "lun",
    help: "number of the logical unit, 0 to 16383; without it, 0",
    r#type: ArgumentType::Number,
    optional: true,
};

/// The commands of this device.
pub const VERBS: &[Verb] = &[
    Verb {
        name: ADD,
        help: "Add a disk; pass its image as an open file, and a second file for its reservations if it has one",
        arguments: &[Argument {
            name: "options",
            help: "what --disk takes, without file and reservations; without it, lun 0 of the first free target",
            r#type: ArgumentType::String,
            optional: true,
        }],
        files: 2,
    },
    Verb {
        name: REMOVE,
        help: "Remove a disk; its requests in flight are completed, and its image is closed after them",
        arguments: &[TARGET, LUN],
        files: 0,
    },
    Verb {
        name: RESIZE,
        help: "Show the guest the new size of a disk; with a size, make its image larger first",
        arguments: &[
            TARGET,
            LUN,
            Argument {
                name: "size",
                help: "bytes of the disk; without it, the image is only measured",
                r#type: ArgumentType::Number,
                optional: true,
            },
        ],
        files: 0,
    },
    Verb {
        name: QUERY,
        help: "List the disks",
        arguments: &[],
        files: 0,
    },
];

/// Executes a command, whose arguments are already checked against its description.
///
/// # Errors
/// It failed.
pub fn execute(
    shared: &Arc<Shared>,
    settings: Settings,
    name: &str,
    arguments: &Arguments,
    files: Vec<OwnedFd>,
) -> Result<Value, CommandError> {
    match name {
        ADD => add_disk(shared, settings, arguments, files),
        REMOVE => remove_disk(shared, address(arguments)?),
        RESIZE => {
            let size = arguments.get("size").and_then(Value::as_u64);
            resize_disk(shared, address(arguments)?, size)
        }
        QUERY => {
            let units = shared.table.units();
            let devices = shared.devices.iter().map(describe_device);
            Ok(units.iter().map(describe).chain(devices).collect())
        }
        _ => Err(CommandError::NotFound(name.to_owned())),
    }
}

fn failed(what: impl Into<String>) -> CommandError {
    CommandError::Failed(what.into())
}

fn address(arguments: &Arguments) -> Result<Address, CommandError> {
    let number = |name: &str| arguments.get(name).and_then(Value::as_u64).unwrap_or(0);
    let target = u8::try_from(number("target"));
    let lun = u16::try_from(number("lun")).ok();
    match (target, lun.filter(|lun| *lun < MAX_LUNS)) {
        (Ok(target), Some(lun)) => Ok(Address { target, lun }),
        _ => Err(failed(
            "give a target from 0 to 255 and a lun from 0 to 16383",
        )),
    }
}

fn find(shared: &Shared, address: Address) -> Result<Arc<Unit>, CommandError> {
    let unit = shared.table.get(address);
    unit.ok_or_else(|| {
        failed(format!(
            "{address}: there is no disk; query-disks lists them"
        ))
    })
}

fn add_disk(
    shared: &Arc<Shared>,
    settings: Settings,
    arguments: &Arguments,
    files: Vec<OwnedFd>,
) -> Result<Value, CommandError> {
    let text = arguments.get("options").and_then(Value::as_str);
    let disk = DiskArguments::parse_text(text.unwrap_or_default()).map_err(failed)?;
    if disk.file.is_some() || disk.reservations.is_some() {
        return Err(failed(
            "files cannot be opened by name here; pass them as open files (vhost-device-ctl --file=PATH)",
        ));
    }
    let mut files = files.into_iter().map(File::from);
    let image = files.next();
    let image = image
        .ok_or_else(|| failed("pass the image as an open file (vhost-device-ctl --file=PATH)"))?;
    let free = free(shared);
    let address = Address {
        target: disk.target.unwrap_or(free.target),
        lun: disk.lun,
    };
    // Before the image is locked.
    check_free(shared, address).map_err(failed)?;
    let reservations = files.next().map(adopt_reservations).transpose();
    let reservations = reservations.map_err(failed)?;
    let reservations = reservations.map(|(file, state)| (Arc::new(file), state));
    let file = reservations.as_ref().map(|(file, _)| Arc::clone(file));
    let target = TargetView::new(shared, address.target).with_reservations(file);
    let source = Source::Passed(Arc::new(image), format!("the disk of {address}"));
    let settings = Settings {
        // The client has the image, so nobody hands it over.
        incoming: false,
        ..settings
    };
    let unit = Unit::open(
        address,
        target.identity(),
        Arc::new(target),
        source,
        reservations,
        &disk,
        settings,
    );
    let unit = unit.map_err(|error| failed(error.0))?;
    add(shared, unit).map_err(failed)?;
    let unit = find(shared, address)?;
    log::info!("{address}: disk of {} bytes added", unit.disk.size());
    tell_others(shared, address);
    shared.tell(Event::Added(address));
    Ok(describe(&unit))
}

/// Returns lun 0 of the first free target.
pub fn free(shared: &Shared) -> Address {
    shared.table.free(|target| shared.has_devices(target))
}

/// Adds a unit.
///
/// # Errors
/// Its address or its designator is in use.
pub fn add(shared: &Shared, unit: Unit) -> Result<(), String> {
    check_free(shared, unit.address)?;
    let naa = |unit: &Unit| unit.logical.facts().identity.naa;
    let own = naa(&unit);
    if let Some(other) = shared.table.units().iter().find(|other| naa(other) == own) {
        return Err(format!(
            "has the same serial number or wwn as {}; give it another one (serial=, wwn=)",
            other.address
        ));
    }
    unit.disk
        .expect_suspend(shared.expects_suspend.load(Ordering::Relaxed));
    match shared.table.add(Arc::new(unit)) {
        true => Ok(()),
        false => Err("the address is in use".to_owned()),
    }
}

/// Checks that an address is free.
///
/// # Errors
/// It is not.
pub fn check_free(shared: &Shared, address: Address) -> Result<(), String> {
    match shared.table.get(address).is_some() || shared.device(address).is_some() {
        false => Ok(()),
        true => Err(format!(
            "{address} has a disk already; give it another target= or lun="
        )),
    }
}

fn remove_disk(shared: &Shared, address: Address) -> Result<Value, CommandError> {
    find(shared, address)?;
    shared.table.remove(address);
    log::info!("{address}: disk removed");
    tell_others(shared, address);
    shared.tell(Event::Removed(address));
    Ok(json!({}))
}

/// Leaves a unit attention with the other units of a target, whose list of units has changed.
fn tell_others(shared: &Shared, address: Address) {
    for unit in shared.table.target(address.target) {
        if unit.address != address {
            unit.logical.attend(Attention::LunsChanged);
        }
    }
}

fn resize_disk(
    shared: &Shared,
    address: Address,
    size: Option<u64>,
) -> Result<Value, CommandError> {
    let unit = find(shared, address)?;
    if let Some(size) = size {
        unit.disk.grow(size).map_err(failed)?;
    }
    unit.disk.measure(false);
    shared.update_size(&unit);
    Ok(describe(&unit))
}

fn describe_device(device: &Arc<PassThrough>) -> Value {
    json!({
        "target": device.address.target,
        "lun": device.address.lun,
        "passthrough": device.path,
    })
}

fn describe(unit: &Arc<Unit>) -> Value {
    let facts = unit.logical.facts();
    json!({
        "target": unit.address.target,
        "lun": unit.address.lun,
        "image": unit.disk.source().to_string(),
        "size": unit.disk.size(),
        "block-size": facts.block_size,
        "read-only": facts.read_only,
        "serial": facts.identity.serial,
        "wwn": format!("{:#018x}", facts.identity.naa),
    })
}
