// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console device: features, config space, and the ports that its queues share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::Value;
use vhost_device_common::device::{
    Arguments, CommandError, ConfigError, Device, FrontEnd, ListeningSocket, Needs, StartError,
    StateError, Verb, Watcher,
};
use vhost_device_common::state;

use crate::commands;
use crate::handler::ConsoleHandler;
use crate::log_file::LogFile;
use crate::options::{Backend, LogOption, Options};
use crate::port::Port;
use crate::saved::{self, Saved};
use crate::state::{Shared, State};

/// Feature bits (VIRTIO 1.3, 5.3.3).
const SIZE: u64 = 1 << 0;
const MULTIPORT: u64 = 1 << 1;
const EMERG_WRITE: u64 = 1 << 2;
/// Maximum number of ports, as in QEMU.
const MAX_PORTS: usize = 31;
/// Size of the config space, and the offset of `emerg_wr` in it (VIRTIO 1.3, 5.3.4).
const CONFIG_SIZE: usize = 12;
const EMERGENCY: usize = 8;

/// The console device.
pub struct Console(Arc<Shared>);

impl Device for Console {
    const TYPE: &'static str = "console";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio console device";
    const IN_ORDER: bool = true;
    const STATE_VERSION: u32 = 1;
    const REQUESTS: &'static [&'static str] = &["receive", "transmit", "control"];
    const VERBS: &'static [Verb] = commands::VERBS;

    type Options = Options;
    type Handler = ConsoleHandler;

    fn open(options: Options) -> Result<Self, StartError> {
        check(&options)?;
        let mut ports = Vec::new();
        for (index, option) in options.ports.into_iter().enumerate() {
            let logs = options.logs.iter().filter(|log| log.port == index);
            let open = |log: &LogOption| LogFile::open(log.path.clone(), true, Some(log.rotation));
            let files = logs.map(open).collect::<Result<_, _>>()?;
            ports.push(Port::open(index as u32, option, files, options.filter)?);
        }
        let shared = Shared::new(State {
            ports,
            swap_resize: options.swap_resize,
            ..State::default()
        })?;
        let mut state = shared.lock();
        (0..state.ports.len()).for_each(|index| state.follow_size(index));
        drop(state);
        Ok(Self(Arc::new(shared)))
    }

    fn features(&self) -> u64 {
        SIZE | MULTIPORT | EMERG_WRITE
    }

    fn set_features(&self, accepted: u64) {
        let mut state = self.0.lock();
        state.multiport = accepted & MULTIPORT != 0;
        state.sizes = accepted & SIZE != 0;
    }

    /// Two queues for each port, and two for control messages (VIRTIO 1.3, 5.3.2).
    fn num_queues(&self) -> u16 {
        2 + 2 * self.0.ports as u16
    }

    fn config(&self) -> Vec<u8> {
        let state = self.0.lock();
        let size = state.ports.first().and_then(|port| port.size);
        let (columns, rows) = size.map_or((0, 0), |size| (size.columns, size.rows));
        let mut config = [columns, rows].map(u16::to_le_bytes).concat();
        config.extend((state.ports.len() as u32).to_le_bytes());
        config.resize(CONFIG_SIZE, 0);
        config
    }

    /// Only `emerg_wr` can be written. QEMU writes the whole config space for it.
    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        if data.is_empty() {
            return Ok(());
        }
        let place = EMERGENCY.checked_sub(offset);
        match place.and_then(|place| data.get(place)) {
            Some(&byte) if offset.saturating_add(size) <= CONFIG_SIZE => {
                // The whole config space, as it is read.
                if offset == EMERGENCY || byte != 0 {
                    let mut state = self.0.lock();
                    let port = state.ports.first_mut();
                    let is_served = port.is_some_and(|port| {
                        port.write_emergency(byte);
                        port.is_served()
                    });
                    drop(state);
                    match is_served {
                        true => self.0.wake(),
                        false => self.0.write_files(),
                    }
                }
                Ok(())
            }
            _ => Err(ConfigError { offset, size }),
        }
    }

    fn connected(&self, front_end: &FrontEnd) {
        self.0.lock().front_end = front_end.clone();
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<ConsoleHandler> {
        ConsoleHandler::new(Arc::clone(&self.0), &watcher)
    }

    /// With the value unknown, an earlier device served the driver.
    fn set_kept(&self, kept: Option<u8>) {
        let mut state = self.0.lock();
        if kept.is_none() && !state.is_ready {
            state.continue_driver();
        }
    }

    fn new_driver(&self) {
        self.0.lock().reset();
    }

    fn sockets(&self) -> Vec<ListeningSocket> {
        let state = self.0.lock();
        let ports = state.ports.iter();
        ports
            .filter_map(|port| port.endpoint.listening_socket())
            .collect()
    }

    fn set_sockets(&self, sockets: Vec<OwnedFd>) -> Result<(), StartError> {
        let mut state = self.0.lock();
        let ports = state.ports.iter_mut();
        let listeners = ports.filter_map(|port| port.endpoint.listener());
        for (listener, socket) in listeners.zip(sockets) {
            *listener = Some(socket);
        }
        state.ports.iter_mut().try_for_each(Port::claim)
    }

    fn needs(&self) -> Needs {
        let mut needs = Needs {
            open_files: 64,
            ..Needs::default()
        };
        for port in &self.0.lock().ports {
            port.add_needs(&mut needs);
        }
        needs
    }

    fn command(
        &self,
        name: &str,
        arguments: &Arguments,
        _files: Vec<OwnedFd>,
    ) -> Result<Value, CommandError> {
        let mut state = self.0.lock();
        match name {
            "query-ports" => Ok(commands::query_ports(&state)),
            "resize" => {
                let answer = commands::resize(&mut state, arguments)?;
                self.0.wake();
                Ok(answer)
            }
            _ => Err(CommandError::NotFound(name.to_owned())),
        }
    }

    fn reset(&self) {
        let mut state = self.0.lock();
        state.reset();
        state.ports.iter_mut().for_each(Port::unwatch);
        drop(state);
        self.0.write_files();
    }

    fn max_state_size(&self) -> u64 {
        saved::max_size(self.0.ports)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(&Saved::new(&mut self.0.lock()))
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let saved: Saved = state::decode(state)?;
        self.0.write_files();
        saved.load(&mut self.0.lock())?;
        self.0.write_files();
        Ok(())
    }
}

/// Checks what concerns several options.
fn check(options: &Options) -> Result<(), StartError> {
    let refuse = |text: String| Err(StartError(text));
    let ports = &options.ports;
    if ports.len() > MAX_PORTS {
        return refuse(format!(
            "{} ports are too many; the maximum is {MAX_PORTS}",
            ports.len()
        ));
    }
    let mut names: Vec<&String> = ports.iter().filter_map(|port| port.name.as_ref()).collect();
    names.sort_unstable();
    if let Some(name) = twice(&names) {
        return refuse(format!(
            "two ports have the name {name}; choose different names"
        ));
    }
    if ports
        .iter()
        .filter(|port| port.backend == Backend::Stdio)
        .count()
        > 1
    {
        return refuse("only one port can be stdio".to_owned());
    }
    if let Some(log) = options.logs.iter().find(|log| log.port >= ports.len()) {
        return refuse(format!(
            "--log={}: port {} does not exist; the last port is {}",
            log.path.display(),
            log.port,
            ports.len().saturating_sub(1)
        ));
    }
    let file = |port: &crate::options::PortOption| match &port.backend {
        Backend::File { path, .. } => Some(path.clone()),
        _ => None,
    };
    let mut paths: Vec<_> = ports.iter().filter_map(file).collect();
    paths.extend(options.logs.iter().map(|log| log.path.clone()));
    paths.sort_unstable();
    if let Some(path) = twice(&paths) {
        return refuse(format!(
            "{} is used twice; choose a different file for each port and log",
            path.display()
        ));
    }
    let port_rotation = |port: &crate::options::PortOption| match &port.backend {
        Backend::File { path, rotation, .. } => rotation.map(|rotation| (path.clone(), rotation)),
        _ => None,
    };
    let mut rotated: Vec<_> = ports.iter().filter_map(port_rotation).collect();
    let logs = options.logs.iter();
    rotated.extend(logs.map(|log| (log.path.clone(), log.rotation)));
    for (path, rotation) in &rotated {
        if let Some(older) = paths
            .iter()
            .find(|other| rotation.renames(path, other.as_path()))
        {
            return refuse(format!(
                "{} is a rotated file of {}; choose a different file for each port and log",
                older.display(),
                path.display()
            ));
        }
    }
    Ok(())
}

/// Returns what is in a sorted list twice.
fn twice<T: PartialEq>(sorted: &[T]) -> Option<&T> {
    let is_same = |pair: &&[T]| matches!(pair, [one, other] if one == other);
    sorted.windows(2).find(is_same).and_then(<[T]>::first)
}
