// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files that can be opened later, and nothing else (landlock).

use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

/// The newest interface of the kernel that this was tested with. What an older kernel has not is left out.
const NEWEST: ABI = ABI::V7;

/// What a device does with a file after its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads it, or what is below it.
    Read,
    /// Reads, writes and controls it, or what is below it; makes nothing new there.
    ReadWrite,
    /// Removes what is in it, at the end of the program.
    Remove,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::ReadWrite => {
                AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile | AccessFs::IoctlDev
            }
            Self::Remove => AccessFs::RemoveFile.into(),
        }
    }
}

/// Leaves this thread, and all that it starts, no files but `files`, no TCP, and no signals to others. Returns whether the kernel can
/// do that. What does not exist is passed over.
pub(super) fn restrict(files: &[(PathBuf, Access)]) -> Result<bool, RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (path, access) in files {
        rules = rules.add_rules(path_beneath_rules([path], access.rights()))?;
    }
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}
