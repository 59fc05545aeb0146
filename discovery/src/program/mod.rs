// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program `vhost-user-discover`.

mod arguments;
mod text;

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::capabilities::{self, Query};
use crate::check;
use crate::descriptor::{self, Descriptor};
use crate::directories::Directories;
use crate::problem::{Finding, Problem, QueryError};
use crate::root::Root;
use crate::schema::VHostUserBackendCapabilities;
pub use arguments::command;
use arguments::{Arguments, Check, Find, List, NAME, Task};

/// Exit status of `find` if no back-end matches.
const NONE_FOUND: u8 = 3;

/// The reason why the program failed, in one line.
struct Failure(String);

/// A descriptor, and the answer of its program if that was queried.
struct BackEnd {
    descriptor: Descriptor,
    answer: Option<Result<VHostUserBackendCapabilities, Problem>>,
}

/// Runs the program. Returns its exit status.
pub fn run() -> ExitCode {
    let outcome = match Arguments::try_parse() {
        Ok(arguments) => carry_out(&arguments),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                print(&error.to_string()).map(|()| ExitCode::SUCCESS)
            }
            _ => error.exit(),
        },
    };
    outcome.unwrap_or_else(|Failure(line)| {
        message(line);
        ExitCode::FAILURE
    })
}

fn carry_out(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let discovery = Discovery::new(arguments)?;
    match &arguments.task {
        Task::List(task) => discovery.list(task),
        Task::Find(task) => discovery.find(task),
        Task::Check(task) => discovery.check(task),
    }
}

/// The parameters of all tasks.
struct Discovery {
    root: Root,
    directories: Directories,
    time_limit: Duration,
    /// Becomes readable on SIGHUP, SIGINT and SIGTERM.
    stop: UnixStream,
}

impl Discovery {
    fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let Arguments {
            root, time_limit, ..
        } = arguments;
        let unusable = |error| Failure(format!("cannot use --root={}: {error}", root.display()));
        let failed = |error| Failure(format!("cannot handle signals: {error}"));
        let (stop, write) = UnixStream::pair().map_err(failed)?;
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            let write = write.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, write).map_err(failed)?;
        }
        Ok(Self {
            root: Root::new(root).map_err(unusable)?,
            directories: Directories::from_environment(),
            time_limit: *time_limit,
            stop,
        })
    }

    fn list(&self, task: &List) -> Result<ExitCode, Failure> {
        let descriptors = self.descriptors(task.r#type.as_deref());
        let mut back_ends: Vec<BackEnd> = if task.no_run {
            let unasked = |descriptor| BackEnd {
                descriptor,
                answer: None,
            };
            descriptors.into_iter().map(unasked).collect()
        } else {
            self.ask(descriptors)?
        };
        for BackEnd { descriptor, answer } in &back_ends {
            if let Some(Err(problem)) = answer {
                warn(&descriptor.file, problem);
            }
        }
        if !task.feature.is_empty() {
            back_ends.retain(|back_end| match &back_end.answer {
                Some(Ok(capabilities)) => lacking(capabilities, &task.feature).is_empty(),
                _ => false,
            });
        }
        if task.json {
            print(&text::json(&back_ends).map_err(cannot_print)?)?;
        } else if back_ends.is_empty() {
            message(format!("no back-ends found in {}", self.searched()));
        } else {
            print(&text::table(&back_ends))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn find(&self, task: &Find) -> Result<ExitCode, Failure> {
        for (descriptor, obstacle) in self.candidates(task)? {
            match obstacle {
                Some(obstacle) => warn(&descriptor.file, obstacle),
                None => {
                    print(&(text::escaped(&descriptor.backend.binary) + "\n"))?;
                    return Ok(ExitCode::SUCCESS);
                }
            }
        }
        let mut wanted = task.r#type.clone();
        if !task.feature.is_empty() {
            wanted += &format!(" with {}", task.feature.join(" and "));
        }
        let searched = self.searched();
        message(format!("no back-end of type {wanted} in {searched}"));
        Ok(ExitCode::from(NONE_FOUND))
    }

    /// Returns the back-ends of the requested type, each with the reason not to use it.
    fn candidates(&self, task: &Find) -> Result<Vec<(Descriptor, Option<String>)>, Failure> {
        let descriptors = self.descriptors(Some(&task.r#type));
        if task.feature.is_empty() {
            // The result does not depend on the capabilities, so no program is run.
            let candidates = descriptors.into_iter().map(|descriptor| {
                let program = descriptor.program(&self.root);
                (descriptor, program.err().map(|problem| problem.to_string()))
            });
            return Ok(candidates.collect());
        }
        let back_ends = self.ask(descriptors)?.into_iter();
        let candidates = back_ends.map(|BackEnd { descriptor, answer }| {
            let obstacle = match answer {
                Some(Ok(capabilities)) => {
                    let lacking = lacking(&capabilities, &task.feature);
                    let lacks = || format!("has no {}", lacking.join(" and no "));
                    (!lacking.is_empty()).then(lacks)
                }
                Some(Err(problem)) => Some(problem.to_string()),
                None => None,
            };
            (descriptor, obstacle)
        });
        Ok(candidates.collect())
    }

    fn check(&self, task: &Check) -> Result<ExitCode, Failure> {
        let query = Some(self.query()).filter(|_| !task.no_run);
        let findings = check::check(&self.root, &self.directories, query, waiting);
        if findings.iter().any(|finding| is_stopped(&finding.problem)) {
            return Err(interrupted());
        }
        print(&text::findings(&findings))?;
        Ok(if findings.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    /// Returns all descriptors, or those of one type. Prints a warning for each invalid file.
    fn descriptors(&self, kind: Option<&str>) -> Vec<Descriptor> {
        let mut listing = descriptor::read(&self.root, &self.directories.all());
        for Finding { file, problem } in &listing.findings {
            warn(file, problem);
        }
        if let Some(kind) = kind {
            let descriptors = &mut listing.descriptors;
            descriptors.retain(|descriptor| descriptor.backend.r#type == kind);
        }
        listing.descriptors
    }

    /// Queries the programs for their capabilities.
    fn ask(&self, descriptors: Vec<Descriptor>) -> Result<Vec<BackEnd>, Failure> {
        let answers = capabilities::query(&self.root, &descriptors, self.query(), waiting);
        let stopped = |answer: &Result<_, Problem>| answer.as_ref().is_err_and(is_stopped);
        if answers.iter().any(stopped) {
            return Err(interrupted());
        }
        let back_ends = descriptors.into_iter().zip(answers);
        let back_ends = back_ends.map(|(descriptor, answer)| BackEnd {
            descriptor,
            answer: Some(answer),
        });
        Ok(back_ends.collect())
    }

    fn query(&self) -> Query<'_> {
        Query {
            time_limit: self.time_limit,
            stop: Some(self.stop.as_fd()),
        }
    }

    /// Returns the directories that were searched, as text.
    fn searched(&self) -> String {
        let directories = self.directories.all().into_iter();
        let outside = directories.map(|path: PathBuf| self.root.outside(&path));
        let shown: Vec<_> = outside.map(|path| text::path(&path)).collect();
        shown.join(", ")
    }
}

/// Returns those of `features` that the program does not have.
fn lacking<'a>(
    capabilities: &VHostUserBackendCapabilities,
    features: &'a [String],
) -> Vec<&'a str> {
    let features = features.iter().map(String::as_str);
    features
        .filter(|feature| !capabilities.has(feature))
        .collect()
}

fn is_stopped(problem: &Problem) -> bool {
    matches!(problem, Problem::Query(_, QueryError::Stopped))
}

fn interrupted() -> Failure {
    Failure("interrupted".to_owned())
}

/// Prints what the query waits for.
fn waiting(left: usize) {
    message(match left {
        1 => "waiting for a program to print its capabilities".to_owned(),
        _ => format!("waiting for {left} programs to print their capabilities"),
    });
}

fn warn(file: &Path, problem: impl Display) {
    message(format!("warning: {}: {problem}", text::path(file)));
}

fn message(line: impl Display) {
    let line = text::escaped(&line.to_string());
    // There is no place to report that stderr failed.
    let _ = writeln!(io::stderr(), "{NAME}: {line}");
}

fn print(output: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(output.as_bytes());
    written.and_then(|()| stdout.flush()).map_err(cannot_print)
}

fn cannot_print(error: impl Display) -> Failure {
    Failure(format!("cannot print: {error}"))
}
