// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with an installed back-end, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

/// Something wrong with a file.
#[derive(Debug)]
pub struct Finding {
    /// The descriptor, or the directory, as the host sees it.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a descriptor; the sentence begins with the name of its file.
#[derive(Debug, Error)]
pub enum Problem {
    /// The file or directory cannot be read.
    #[error("can not be read: {0}")]
    Unreadable(#[source] io::Error),
    /// A symbolic link leads nowhere.
    #[error("is a link that leads nowhere ({0})")]
    Dangling(#[source] io::Error),
    /// A directory, a device, a pipe.
    #[error("is not a regular file: it is ignored, and hides no other of its name")]
    NotAFile,
    /// Larger than [`MAX_SIZE`](crate::descriptor::MAX_SIZE).
    #[error("is larger than 1 MiB, the most that a descriptor may have")]
    TooLarge,
    /// Nothing but white space.
    #[error(
        "has nothing in it but white space: it describes nothing, and hides no other of its name"
    )]
    Blank,
    /// Not JSON, or not the keys that a descriptor has.
    #[error("is no descriptor: {0}")]
    NotADescriptor(#[source] serde_json::Error),
    /// The name of the file.
    #[error("counts as a descriptor, though its name does not end in .json")]
    Suffix,
    /// The schema has no such type of device.
    #[error(
        "has the type {0:?}, which the schema does not know; libvirt then finds no back-end of any type"
    )]
    UnknownType(String),
    /// There is no description in it.
    #[error("has no description")]
    NoDescription,
    /// The program has no absolute path.
    #[error("names its program by the relative path {0:?}")]
    RelativeProgram(String),
    /// The program is not there.
    #[error("names the program {0}, which can not be found: {1}")]
    NoProgram(String, #[source] io::Error),
    /// The program is not a file that anybody may execute.
    #[error("names the program {0}, which is no executable file")]
    NotExecutable(String),
    /// The program does not say what it can do.
    #[error("names the program {0}, which {1}")]
    Query(String, #[source] QueryError),
    /// The program is for another type of device.
    #[error("has the type {descriptor:?}, but its program says {program:?}")]
    OtherType {
        /// What the descriptor says.
        descriptor: String,
        /// What the program says.
        program: String,
    },
    /// AppArmor is on, and keeps libvirt from starting the program.
    #[error(
        "names the program {0}, which AppArmor does not let libvirt start: no rule for it, such as `{0} PUx,`, is in {1}"
    )]
    AppArmor(String, String),
    /// The program of a GPU does not print a list of features.
    #[error("names the program {0}, which prints capabilities without a list of features")]
    NoFeatures(String),
}

impl Problem {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "make it readable for everybody, or remove it",
            Self::Dangling(_) => "install what it links to, or remove it",
            Self::NotAFile => "remove it; to hide a descriptor, put an empty file of its name here",
            Self::TooLarge => "put the descriptor that belongs here in its place, or remove it",
            Self::Blank => {
                "to hide a descriptor of that name, make it empty to the last byte; else remove it"
            }
            Self::NotADescriptor(_) => {
                "correct it (--print-descriptor of our programs shows one), or move it elsewhere"
            }
            Self::Suffix => "move it to a directory where nobody looks for descriptors",
            Self::UnknownType(_) => {
                "move it elsewhere, and start the program without the help of libvirt"
            }
            Self::NoDescription => "add one; the schema requires it",
            Self::RelativeProgram(_) => "write the absolute path",
            Self::NoProgram(..) => "install the program, or remove the descriptor",
            Self::NotExecutable(_) => "name the program itself, and make it executable (chmod 755)",
            Self::Query(_, QueryError::Slow(_)) => {
                "find out what it waits for: libvirt would wait for as long as it does"
            }
            Self::Query(..) => {
                "run it with --print-capabilities to see more; update the program, or remove the descriptor"
            }
            Self::OtherType { .. } => "correct the type, or the path of the program",
            Self::AppArmor(..) => {
                "install the program in /usr/bin, or put the rule into the file of the same name in /etc/apparmor.d/local and \
                 reload the profile (systemctl reload apparmor)"
            }
            Self::NoFeatures(_) => {
                "update the program; libvirt uses no GPU back-end without that list"
            }
        }
    }
}

/// Why a program did not say what it can do; the sentence begins with its path.
#[derive(Debug, Error)]
pub enum QueryError {
    /// The operating system does not run it.
    #[error("can not be started: {0}")]
    Start(#[source] io::Error),
    /// It did not end in time.
    #[error("did not answer to --print-capabilities within {} s", .0.as_secs_f64())]
    Slow(Duration),
    /// It ended with a failure.
    #[error("fails with --print-capabilities ({0}){1}")]
    Failed(ExitStatus, String),
    /// It prints more than [`MAX_OUTPUT`](crate::capabilities::MAX_OUTPUT).
    #[error("prints more than 1 MiB for --print-capabilities")]
    TooMuch,
    /// What it prints is not one JSON document, or not the keys that capabilities have.
    #[error("prints something else than its capabilities: {0}")]
    NotCapabilities(#[source] serde_json::Error),
    /// The operating system refused something else.
    #[error("could not be asked: {0}")]
    System(#[source] io::Error),
    /// It was told to stop.
    #[error("was not asked to the end")]
    Stopped,
}
