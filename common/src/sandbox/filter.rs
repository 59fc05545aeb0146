// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Filters of system calls (seccomp), one for each kind of thread.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter, apply_filter_all_threads,
};

use super::Needs;
use super::call::{self, Call};

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Serves the front-end, and starts the other threads. It may make the calls of all of them.
    Session,
    /// Serves queues.
    Queue,
    /// Is started by a queue thread.
    Helper,
    /// Handles signals and the clients of sockets.
    Control,
    /// Writes log lines.
    Log,
}

/// Returns the calls that threads of `role` may make.
pub(super) fn allowed(role: Role, needs: &Needs) -> Vec<Call> {
    let mut calls = call::everywhere();
    match role {
        Role::Session => {
            calls.extend(call::session());
            calls.extend(call::queue());
            calls.extend(&needs.session);
            calls.extend(&needs.control);
            calls.extend(&needs.queue);
            calls.extend(needs.helper.iter().flatten());
        }
        Role::Queue => {
            calls.extend(call::queue());
            calls.extend(&needs.queue);
            if let Some(helper) = &needs.helper {
                calls.extend(helper);
                calls.extend(Call::threads());
            }
        }
        Role::Helper => calls.extend(needs.helper.iter().flatten()),
        Role::Control => calls.extend(&needs.control),
        Role::Log => {}
    }
    if needs.removes_files() && matches!(role, Role::Session | Role::Control) {
        calls.extend(call::removal());
    }
    calls
}

/// Compiles a filter with the action `listed` for `calls`, and `other` for all other calls.
pub(super) fn compile(
    calls: &[Call],
    listed: SeccompAction,
    other: SeccompAction,
) -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let is_plain = |call: &&Call| call.conditions().next().is_none();
    for call in calls.iter().filter(is_plain) {
        // No rule: all arguments are allowed.
        rules.insert(call.number(), Vec::new());
    }
    for call in calls.iter().filter(|call| !is_plain(call)) {
        let conditions = call.conditions().map(|condition| {
            SeccompCondition::new(
                condition.argument,
                SeccompCmpArgLen::Qword,
                SeccompCmpOp::MaskedEq(condition.mask),
                condition.value,
            )
        });
        let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
        match rules.get_mut(&call.number()) {
            Some(others) if others.is_empty() || others.contains(&rule) => {}
            Some(others) => others.push(rule),
            None => {
                rules.insert(call.number(), vec![rule]);
            }
        }
    }
    let architecture = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, other, listed, architecture)?.try_into()?)
}

/// Returns the calls that fail with an error: C libraries sometimes try to read a file, and can work without it.
fn refused(allowed: &[Call]) -> Vec<Call> {
    const NO_READING: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
    let mut reading = vec![Call::new(libc::SYS_openat).with_bits(2, NO_READING, 0)];
    #[cfg(target_arch = "x86_64")]
    reading.push(Call::new(libc::SYS_open).with_bits(1, NO_READING, 0));
    let is_allowed = |call: &Call| allowed.iter().any(|other| other.number() == call.number());
    reading.retain(|call| !is_allowed(call));
    reading
}

/// The filters of a thread. A call must pass all of them.
type Filters = Vec<BpfProgram>;

fn filters(role: Role, needs: &Needs) -> Result<Filters, seccompiler::Error> {
    let mut calls = allowed(role, needs);
    let mut filters = Vec::new();
    let refused = refused(&calls);
    if !refused.is_empty() {
        let error = SeccompAction::Errno(libc::EACCES as u32);
        filters.push(compile(&refused, error, SeccompAction::Allow)?);
        calls.extend(refused);
    }
    filters.push(compile(&calls, SeccompAction::Allow, SeccompAction::Trap)?);
    Ok(filters)
}

/// Filters of threads that start later.
#[derive(Debug)]
struct Later {
    queue: Filters,
    helper: Filters,
    control: Filters,
    log: Filters,
}

static LATER: OnceLock<Later> = OnceLock::new();

/// Installs the filter of this thread, which the threads that it starts inherit, and prepares their own filters.
pub(super) fn install(needs: &Needs) -> Result<(), seccompiler::Error> {
    let later = Later {
        queue: filters(Role::Queue, needs)?,
        helper: filters(Role::Helper, needs)?,
        control: filters(Role::Control, needs)?,
        log: filters(Role::Log, needs)?,
    };
    // These take precedence over the filter of the thread.
    let handler = Call::new(libc::SYS_rt_sigaction).with(0, libc::SIGSYS as u32);
    let fatal = compile(&[handler], SeccompAction::KillProcess, SeccompAction::Allow)?;
    let unknown = compile(
        &[Call::new(libc::SYS_clone3)],
        SeccompAction::Errno(libc::ENOSYS as u32),
        SeccompAction::Allow,
    )?;
    let session = filters(Role::Session, needs)?;
    for filter in [fatal, unknown].iter().chain(&session) {
        apply_filter_all_threads(filter)?;
    }
    let _ = LATER.set(later);
    Ok(())
}

/// Restricts this process, which does only one thing, to `calls` and the calls of all threads.
pub(super) fn confine_process(calls: &[Call]) -> Result<(), seccompiler::Error> {
    let mut calls = calls.to_vec();
    calls.extend(call::everywhere());
    apply_filter(&compile(&calls, SeccompAction::Allow, SeccompAction::Trap)?)
}

/// Leaves this thread only the calls of its kind, if there is a sandbox.
pub(crate) fn confine_thread(role: Role) {
    let Some(later) = LATER.get() else {
        return;
    };
    let filters = match role {
        Role::Session => return,
        Role::Queue => &later.queue,
        Role::Helper => &later.helper,
        Role::Control => &later.control,
        Role::Log => &later.log,
    };
    if let Err(error) = filters.iter().try_for_each(|filter| apply_filter(filter)) {
        // The thread keeps the filter of the thread that started it.
        log::warn!("cannot confine a thread any further: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring bypasses all filters. A device that needs one creates it before.
    #[test]
    fn the_core_lets_no_thread_use_io_uring() {
        let io_uring = [
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
        ];
        for role in [
            Role::Session,
            Role::Queue,
            Role::Helper,
            Role::Control,
            Role::Log,
        ] {
            let calls = allowed(role, &Needs::default());
            let found = calls.iter().find(|call| io_uring.contains(&call.number()));
            assert_eq!(found, None, "{role:?}");
        }
    }
    /// The kernel limits the length of filters, and each disk of a device may name the same calls.
    #[test]
    fn a_call_that_is_named_twice_takes_no_more_room_in_the_filter() {
        let call = |command| Call::new(libc::SYS_fcntl).with(1, command);
        let length = |calls: &[Call]| {
            let filter = compile(calls, SeccompAction::Allow, SeccompAction::Trap);
            filter.unwrap().len()
        };
        let once = length(&[call(1), call(2)]);
        assert_eq!(length(&[call(1), call(2), call(1), call(2)]), once);
        assert!(length(&[call(1), call(2), call(3)]) > once);
    }
}
