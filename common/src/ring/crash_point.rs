// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Points at which tests crash the process, to check how the next process recovers.
//!
//! If [`KILL_AFTER`] is `STEP:N`, a debug build kills itself after it has done that step for the Nth time. Builds without debug
//! assertions, such as releases, contain no code for this.

/// The environment variable that names the step.
pub const KILL_AFTER: &str = "VHOST_DEVICE_KILL_AFTER";

/// Defines [`Step`] and the list of all of them.
macro_rules! steps {
    ($($(#[$doc:meta])+ $name:ident = $text:literal,)+) => {
        /// A step of taking or completing a request, or of recovering requests.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step {
            $($(#[$doc])+ $name,)+
        }

        impl Step {
            /// All steps.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Returns the name of this step in the environment variable.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

steps! {
    /// A request was read from the ring and is not recorded yet.
    Read = "read",
    /// The number of a request was recorded.
    CounterNoted = "counter-noted",
    /// A request was recorded as in flight.
    Taken = "taken",
    /// A request was carried out.
    CarriedOut = "carried-out",
    /// An entry of the used ring was written.
    UsedEntryWritten = "used-entry-written",
    /// A completed request was linked to the one before it.
    Linked = "linked",
    /// A completed request was recorded as the last one of its batch.
    Completed = "completed",
    /// The used index was stored.
    Published = "published",
    /// One request of a published batch was recorded as no longer in flight.
    OneNoted = "one-noted",
    /// The used index was recorded.
    IndexNoted = "index-noted",
    /// A new region was given its size and index, but not the version that makes it valid.
    Sized = "sized",
    /// A new region became valid.
    Initialized = "initialized",
    /// One request of the batch that a killed device published was recorded as no longer in flight.
    OneRecovered = "one-recovered",
    /// The used index that a killed device published was recorded.
    IndexRecovered = "index-recovered",
    /// A request of a killed device was taken again.
    TakenAgain = "taken-again",
}

/// Kills this process if `step` is the crash point and this is its Nth passage.
#[cfg(debug_assertions)]
pub(super) fn after(step: Step) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSAGES: AtomicU64 = AtomicU64::new(0);

    let read = || {
        let wanted = std::env::var(KILL_AFTER).ok()?;
        let (step, passage) = wanted.split_once(':')?;
        Some((step.to_owned(), passage.parse().ok()?))
    };
    if let Some((wanted, passage)) = WANTED.get_or_init(read)
        && wanted == step.name()
        && PASSAGES.fetch_add(1, Ordering::Relaxed) + 1 == *passage
    {
        // The process executes nothing after this.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// Does nothing in this build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(super) fn after(_step: Step) {}
