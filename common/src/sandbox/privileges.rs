// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Privileges that the process gives up irrevocably.

use rustix::io::Result;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Gives up all capabilities but `kept`, and keeps the memory of the process out of core dumps. Returns those of `kept` that the process
/// does not have.
///
/// # Errors
/// The kernel refuses; no privilege is needed for this.
pub(super) fn drop_all_but(kept: CapabilitySet) -> Result<CapabilitySet> {
    set_no_new_privs(true)?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        // Fails for the first capability that the kernel does not have, or for all where the process may not change its bounding set.
        // No program that it could start can gain a capability from that set, because of no_new_privs.
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    // Kernels before 4.3 have none.
    let _ = clear_ambient_capability_set();
    let had = capabilities(None)?.permitted;
    let left = had & kept;
    set_capabilities(
        None,
        CapabilitySets {
            effective: left,
            permitted: left,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let nothing = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, nothing)?;
    Ok(kept - had)
}
