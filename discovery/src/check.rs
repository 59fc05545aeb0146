// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds descriptors that libvirt, or another program that follows the schema, cannot handle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::apparmor::Profiles;
use crate::capabilities::{self, Query};
use crate::descriptor::{self, Descriptor};
use crate::directories::Directories;
use crate::problem::{Finding, Problem};
use crate::root::Root;
use crate::schema::{VHostUserBackendCapabilities, VHostUserBackendType};

/// Checks the files in `directories`. Queries the programs too if there is a `query`. Returns the findings in the order of the paths.
///
/// libvirt's system daemon, libvirt's daemon of a user, and programs that read all directories differ in which files count. A file is
/// checked if it counts for at least one of them.
pub fn check(
    root: &Root,
    directories: &Directories,
    query: Option<Query>,
    waiting: impl FnMut(usize),
) -> Vec<Finding> {
    let mut found: BTreeMap<(PathBuf, String), Problem> = BTreeMap::new();
    let mut descriptors: BTreeMap<PathBuf, Descriptor> = BTreeMap::new();
    let mut add = |file: &PathBuf, problem: Problem| {
        found.insert((file.clone(), problem.to_string()), problem);
    };
    let mut of_libvirt = BTreeSet::new();
    for (directories, is_of_libvirt) in [
        (directories.libvirt_system(), true),
        (directories.libvirt_session(), true),
        (directories.all(), false),
    ] {
        let listing = descriptor::read(root, &directories);
        for Finding { file, problem } in listing.findings {
            add(&file, problem);
        }
        for descriptor in listing.descriptors {
            if is_of_libvirt {
                of_libvirt.insert(descriptor.file.clone());
            }
            descriptors.insert(descriptor.file.clone(), descriptor);
        }
    }
    let descriptors: Vec<_> = descriptors.into_values().collect();
    for descriptor in &descriptors {
        for problem in problems(descriptor) {
            add(&descriptor.file, problem);
        }
    }
    let profiles = Profiles::read(root);
    let started = descriptors
        .iter()
        .filter(|descriptor| of_libvirt.contains(&descriptor.file) && is_started(descriptor));
    for descriptor in started {
        let binary = &descriptor.backend.binary;
        for profile in profiles.refusing(root, Path::new(binary)) {
            let profile = profile.display().to_string();
            let problem = Problem::AppArmor(binary.clone(), profile);
            add(&descriptor.file, problem);
        }
    }
    match query {
        Some(query) => {
            let answers = capabilities::query(root, &descriptors, query, waiting);
            for (descriptor, answer) in descriptors.iter().zip(answers) {
                match answer {
                    Ok(answer) => {
                        for problem in contradictions(descriptor, &answer) {
                            add(&descriptor.file, problem);
                        }
                    }
                    Err(problem) => add(&descriptor.file, problem),
                }
            }
        }
        None => {
            for descriptor in &descriptors {
                if let Err(problem) = descriptor.program(root) {
                    add(&descriptor.file, problem);
                }
            }
        }
    }
    let findings = found.into_iter();
    findings
        .map(|((file, _), problem)| Finding { file, problem })
        .collect()
}

/// Returns whether libvirt starts programs of this type. It connects to the others.
fn is_started(descriptor: &Descriptor) -> bool {
    let started = [VHostUserBackendType::Gpu, VHostUserBackendType::Fs];
    let kind = VHostUserBackendType::from_name(&descriptor.backend.r#type);
    kind.is_some_and(|kind| started.contains(&kind))
}

/// Returns the problems that the descriptor alone shows.
fn problems(descriptor: &Descriptor) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !descriptor::is_json(&descriptor.file) {
        problems.push(Problem::Suffix);
    }
    let kind = &descriptor.backend.r#type;
    if VHostUserBackendType::from_name(kind).is_none() {
        problems.push(Problem::UnknownType(kind.clone()));
    }
    if descriptor.backend.description.is_empty() {
        problems.push(Problem::NoDescription);
    }
    problems
}

/// Returns the contradictions between a descriptor and the capabilities of its program.
fn contradictions(
    descriptor: &Descriptor,
    capabilities: &VHostUserBackendCapabilities,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let kind = &descriptor.backend.r#type;
    if capabilities.r#type != *kind {
        problems.push(Problem::OtherType {
            descriptor: kind.clone(),
            program: capabilities.r#type.clone(),
        });
    }
    if kind == VHostUserBackendType::Gpu.name() && capabilities.features.is_none() {
        problems.push(Problem::NoFeatures(descriptor.backend.binary.clone()));
    }
    problems
}
