// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many files may be open, and what to do where that is not enough.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one. The soft one is low by default (1024) for programs that use select(2).
pub(crate) fn raise() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        log::debug!("cannot raise RLIMIT_NOFILE: {errno}");
    }
}

/// An error of a system call that opens a file. Where a limit is in the way it is named, with the remedy.
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
