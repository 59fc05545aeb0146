// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that keeps what devices can keep after their start, so that tests can see that it is kept, and nothing else is.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use vhost_device_common::device::{
    Access, Call, CapabilitySet, Device, Needs, QueueHandler, StartError, Watcher,
};
use vhost_device_common::program;
use vhost_device_common::worker::Queue;

#[derive(Clone, clap::Args)]
struct Options {
    /// Keep all access to what is below DIR.
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,

    /// Keep the access to create and remove files below DIR, but not to rename them to other directories, or to truncate them.
    #[arg(long, value_name = "DIR")]
    flat_tree: Option<PathBuf>,

    /// Keep the access to read what is below DIR.
    #[arg(long, value_name = "DIR")]
    read_tree: Option<PathBuf>,

    /// Connect to abstract sockets.
    #[arg(long)]
    abstract_sockets: bool,

    /// Keep CAP_CHOWN and CAP_FOWNER.
    #[arg(long)]
    capabilities: bool,

    /// Have N files open.
    #[arg(long, value_name = "N", default_value_t = 0)]
    open_files: u64,
}

struct Needy(Options);

impl Device for Needy {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = "needy-device";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "A device that keeps what it is told to, for tests";

    type Options = Options;
    type Handler = Idle;

    fn open(options: Options) -> Result<Self, StartError> {
        Ok(Self(options))
    }

    fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Idle> {
        Ok(Idle)
    }

    fn needs(&self) -> Needs {
        let flat = Access::READ_WRITE | Access::MAKE | Access::REMOVE | Access::REMOVE_DIRECTORIES;
        let sockets = Access::MAKE_SOCKETS | Access::CONNECT;
        let all = flat | sockets | Access::RENAME | Access::TRUNCATE;
        let trees = [
            (&self.0.tree, all),
            (&self.0.flat_tree, flat),
            (&self.0.read_tree, Access::READ),
        ];
        let files = trees.into_iter();
        let files = files.filter_map(|(path, access)| Some((path.clone()?, access)));
        let mut session: Vec<Call> = [
            libc::SYS_openat,
            libc::SYS_mkdirat,
            libc::SYS_symlinkat,
            libc::SYS_renameat2,
            libc::SYS_unlinkat,
            libc::SYS_truncate,
            libc::SYS_mknodat,
            libc::SYS_fchownat,
        ]
        .map(Call::new)
        .to_vec();
        session.extend(Call::connect_unix());
        session.extend(Call::bind_unix());
        Needs {
            session,
            files: files.collect(),
            abstract_sockets: self.0.abstract_sockets,
            capabilities: match self.0.capabilities {
                true => CapabilitySet::CHOWN | CapabilitySet::FOWNER,
                false => CapabilitySet::empty(),
            },
            open_files: self.0.open_files,
            ..Needs::default()
        }
    }
}

struct Idle;

impl QueueHandler for Idle {
    fn process(&mut self, _queue: &mut Queue) {}
}

fn main() -> ExitCode {
    program::run::<Needy>()
}
