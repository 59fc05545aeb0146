// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Simulates a slow disk, for tests with operations that are in flight for seconds.
//!
//! If the environment variable [`SLOW_DISK`] names a file, each operation of an engine begins as many milliseconds late as the file
//! contains at that moment. Only builds with debug assertions support this; releases ignore the variable.

use std::time::Duration;

/// The environment variable that names the file.
pub const SLOW_DISK: &str = "VHOST_DEVICE_SLOW_DISK";

#[cfg(debug_assertions)]
static FILE: std::sync::OnceLock<Option<std::fs::File>> = std::sync::OnceLock::new();

/// Opens the file, before the sandbox is entered.
#[cfg(debug_assertions)]
pub(super) fn open() {
    FILE.get_or_init(|| std::fs::File::open(std::env::var_os(SLOW_DISK)?).ok());
}

/// Returns the delay of an operation.
#[cfg(debug_assertions)]
pub(super) fn delay() -> Option<Duration> {
    use std::io::IoSliceMut;

    use rustix::io::{ReadWriteFlags, preadv2};

    let file = FILE.get()?.as_ref()?;
    let mut text = [0; 8];
    let length = preadv2(
        file,
        &mut [IoSliceMut::new(&mut text)],
        0,
        ReadWriteFlags::empty(),
    );
    let text = std::str::from_utf8(text.get(..length.ok()?)?).ok()?;
    let milliseconds = text.trim().parse().ok()?;
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}

/// Does nothing in this build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(super) fn open() {}

/// Returns no delay in this build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(super) fn delay() -> Option<Duration> {
    None
}
