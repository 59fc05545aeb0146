// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rights of the process that it has no more use for.

use rustix::io::Result;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Gives up all capabilities, for good, and keeps the memory of the process out of core dumps.
///
/// # Errors
/// The kernel refuses; nobody needs a right to do this.
pub(super) fn drop_all() -> Result<()> {
    set_no_new_privs(true)?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // Stops where there are no more, or where the bounding set is not this process's to change. No program that it could start
        // gets a capability by that set any more.
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    // Kernels before 4.3 have none.
    let _ = clear_ambient_capability_set();
    drop_capabilities()?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let nothing = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, nothing)
}

/// Gives up the capabilities of this thread.
fn drop_capabilities() -> Result<()> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)
}
