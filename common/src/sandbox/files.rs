// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which files the process can use by their names from now on (landlock). Files that are already open are not affected.

use std::fmt;
use std::ops::BitOr;
use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags, path_beneath_rules,
};

/// The newest interface of the kernel whose rights are restricted. Older kernels restrict fewer of them.
const NEWEST: ABI = ABI::V9;

/// What a device does with a file, or with all files below a directory, after its start: landlock's access rights, which can be
/// combined by `|`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Access(BitFlags<AccessFs>);

impl Access {
    /// Reads files, and lists directories.
    pub const READ: Self = Self(make_bitflags!(AccessFs::{ReadFile | ReadDir}));
    /// Writes to files that exist, without truncating them.
    pub const WRITE: Self = Self(make_bitflags!(AccessFs::{WriteFile}));
    /// Reads, writes and controls files that exist.
    pub const READ_WRITE: Self =
        Self(make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | IoctlDev}));
    /// Sets the length of files (kernel 6.2 or later; always allowed before).
    pub const TRUNCATE: Self = Self(make_bitflags!(AccessFs::{Truncate}));
    /// Creates files, directories, symbolic links and FIFOs.
    pub const MAKE: Self = Self(make_bitflags!(AccessFs::{MakeReg | MakeDir | MakeSym | MakeFifo}));
    /// Creates device nodes. That also takes a capability.
    pub const MAKE_DEVICES: Self = Self(make_bitflags!(AccessFs::{MakeChar | MakeBlock}));
    /// Creates unix sockets (`bind(2)`).
    pub const MAKE_SOCKETS: Self = Self(make_bitflags!(AccessFs::{MakeSock}));
    /// Removes files that are not directories.
    pub const REMOVE: Self = Self(make_bitflags!(AccessFs::{RemoveFile}));
    /// Removes directories.
    pub const REMOVE_DIRECTORIES: Self = Self(make_bitflags!(AccessFs::{RemoveDir}));
    /// Renames and links files from one directory to another, beside the rights to create them there and to remove them here
    /// (kernel 5.19 or later; never allowed before). Within one directory, those rights are enough.
    pub const RENAME: Self = Self(make_bitflags!(AccessFs::{Refer}));
    /// Connects to unix sockets that other processes have bound (kernels that restrict it; others always allow it). All devices but
    /// those whose system calls include `connect(2)` are kept from it anyway.
    pub const CONNECT: Self = Self(make_bitflags!(AccessFs::{ResolveUnix}));

    /// Whether all of `other` is part of this.
    pub(super) fn contains(self, other: Self) -> bool {
        self.0.contains(other.0)
    }
}

impl BitOr for Access {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Restricts this thread, and all that it starts, to `files`; denies TCP, signals to other processes, and, without `abstract_sockets`,
/// connections to the abstract unix sockets of other processes. A path that does not exist is ignored.
///
/// Returns whether the kernel supports it.
///
/// # Errors
/// The kernel refuses.
pub(super) fn restrict(
    files: &[(PathBuf, Access)],
    abstract_sockets: bool,
) -> Result<bool, RulesetError> {
    let mut scopes = Scope::from_all(NEWEST);
    if abstract_sockets {
        scopes.remove(Scope::AbstractUnixSocket);
    }
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(scopes)?
        .create()?;
    for (path, access) in files {
        rules = rules.add_rules(path_beneath_rules([path], access.0))?;
    }
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}
