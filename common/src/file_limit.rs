// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limit of open files (`RLIMIT_NOFILE`), and what to do where it is too low.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit. The soft limit is low by default (1024), for programs that use `select(2)`.
pub(crate) fn raise() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        log::debug!("cannot raise RLIMIT_NOFILE: {errno}");
    }
}

/// Warns if fewer than `wanted` files can be open at a time, after [`raise`].
pub(crate) fn warn_if_below(wanted: u64) {
    if let Some(limit) = getrlimit(Resource::Nofile).current
        && limit < wanted
    {
        log::warn!(
            "only {limit} files can be open at a time, and the device may need {wanted}; raise the hard limit of RLIMIT_NOFILE (LimitNOFILE= in a unit)"
        );
    }
}

/// Describes an error of a system call that opens a file. If a limit is the reason, it is named with the remedy.
pub(crate) fn explained(error: &io::Error) -> impl fmt::Display {
    let remedy = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => "; raise RLIMIT_NOFILE (LimitNOFILE= in a unit)",
        Some(Errno::NFILE) => "; raise the sysctl fs.file-max",
        _ => "",
    };
    format!("{error}{remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_that_is_in_the_way_is_named() {
        let text = |errno: Errno| explained(&errno.into()).to_string();
        assert!(text(Errno::MFILE).contains("LimitNOFILE="));
        assert!(text(Errno::NFILE).contains("fs.file-max"));
        assert_eq!(
            text(Errno::NOMEM),
            io::Error::from(Errno::NOMEM).to_string()
        );
    }
}
