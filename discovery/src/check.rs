// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What libvirt, or another program that follows the schema, would choke on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::capabilities::{self, Query};
use crate::descriptor::{self, Descriptor};
use crate::directories::Directories;
use crate::problem::{Finding, Problem};
use crate::root::Root;
use crate::schema::{VHostUserBackendCapabilities, VHostUserBackendType};

/// Checks what is in `directories`, in the order of the files' paths; asks the programs too, if there
/// is a `query`.
///
/// A file that is overridden or hidden for everybody is not looked at. What counts differs between
/// libvirt for the system, libvirt for a user, and one who reads all directories; a file is checked if
/// it counts for one of them.
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
    for directories in [
        directories.libvirt_system(),
        directories.libvirt_session(),
        directories.all(),
    ] {
        let listing = descriptor::read(root, &directories);
        for Finding { file, problem } in listing.findings {
            add(&file, problem);
        }
        for descriptor in listing.descriptors {
            descriptors.insert(descriptor.file.clone(), descriptor);
        }
    }
    let descriptors: Vec<_> = descriptors.into_values().collect();
    for descriptor in &descriptors {
        for problem in problems(descriptor) {
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

/// What can be seen from the descriptor alone.
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

/// Where the program does not keep what the descriptor promises.
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
