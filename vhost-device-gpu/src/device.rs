// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The GPU device: features, config space, display socket.

use std::io;
use std::sync::{Arc, Mutex};

use vhost_device_common::device::{
    Call, ConfigError, Device, DeviceRequest, Needs, StartError, StateError, Watcher,
};
use vhost_device_common::{lock, warn_limited};
use virtio_bindings::virtio_gpu::{
    VIRTIO_GPU_F_EDID, VIRTIO_GPU_F_RESOURCE_UUID, VIRTIO_GPU_F_VIRGL,
};

use crate::capsets::Capsets;
use crate::handler::GpuHandler;
use crate::options::Options;
use crate::protocol::MAX_SCANOUTS;
use crate::saved;
use crate::state::State;
use crate::virgl;

/// Size of the config space in bytes (VIRTIO 1.3, 5.7.4): events_read, events_clear, num_scanouts, num_capsets.
const CONFIG_SIZE: usize = 16;

/// The GPU device.
pub struct Gpu {
    state: Arc<Mutex<State>>,
    headless: bool,
    max_hostmem: u64,
    /// The capability sets of the renderer; `None` without `--virgl`.
    capsets: Option<Arc<Capsets>>,
}

impl Device for Gpu {
    const TYPE: &'static str = "gpu";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio GPU";
    // QEMU does not migrate the contents of resources.
    const LOGS: bool = false;
    const STATE_VERSION: u32 = saved::VERSION;

    type Options = Options;
    type Handler = GpuHandler;

    fn capabilities() -> Vec<&'static str> {
        let mut capabilities = Vec::new();
        if virgl::has_render_node() {
            capabilities.push("render-node");
        }
        if can_render() {
            capabilities.push("virgl");
        }
        capabilities
    }

    fn open(options: Options) -> Result<Self, StartError> {
        let node = options.render_node.as_deref();
        let export_dmabufs = !options.no_dmabuf && !options.headless;
        let capsets = options.virgl.then(|| Capsets::probe(node, export_dmabufs));
        let capsets = capsets.transpose().map_err(|error| {
            StartError(format!(
                "cannot enable 3D: {error}; fix this or omit --virgl"
            ))
        })?;
        let state = State::new(options.max_hostmem).map_err(|error| {
            StartError(format!(
                "cannot create the display's epoll instance: {error}"
            ))
        })?;
        Ok(Self {
            state: Arc::new(Mutex::new(state)),
            headless: options.headless,
            max_hostmem: options.max_hostmem,
            capsets: capsets.map(Arc::new),
        })
    }

    fn features(&self) -> u64 {
        let virgl = u64::from(self.capsets.is_some()) << VIRTIO_GPU_F_VIRGL;
        1 << VIRTIO_GPU_F_EDID | 1 << VIRTIO_GPU_F_RESOURCE_UUID | virgl
    }

    fn set_features(&self, accepted: u64) {
        lock(&self.state).accepts_3d = accepted & 1 << VIRTIO_GPU_F_VIRGL != 0;
    }

    fn num_queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        let capsets = self.capsets.as_ref();
        let num_capsets = capsets.map_or(0, |capsets| capsets.sets.len());
        [0, 0, MAX_SCANOUTS as u32, num_capsets as u32]
            .map(u32::to_le_bytes)
            .concat()
    }

    /// Ignores valid writes: the front-end handles the events, no other field is writable, and front-ends write the
    /// whole space.
    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        match offset.checked_add(size) {
            Some(end) if end <= CONFIG_SIZE => Ok(()),
            _ => Err(ConfigError { offset, size }),
        }
    }

    fn handle_request(&self, request: DeviceRequest) -> Result<(), DeviceRequest> {
        let DeviceRequest::GpuSocket(socket) = request else {
            return Err(request);
        };
        let display = &mut lock(&self.state).display;
        if self.headless {
            display.keep_open(socket);
        } else if let Err(error) = display.connect(socket) {
            warn_limited(format_args!("cannot use the display: {error}"));
        }
        Ok(())
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<GpuHandler> {
        GpuHandler::new(Arc::clone(&self.state), self.capsets.clone(), watcher)
    }

    fn new_driver(&self) {
        lock(&self.state).clear();
    }

    fn needs(&self) -> Needs {
        // For the display.
        let display = [libc::SYS_sendmsg, libc::SYS_recvfrom].map(Call::new);
        let mut needs = Needs {
            queue: display.to_vec(),
            ..Needs::default()
        };
        if let Some(capsets) = &self.capsets {
            virgl::add_needs(&mut needs, capsets.node.as_deref());
        }
        needs
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.display.disconnect();
        state.display.forget_watcher();
        state.clear();
    }

    fn max_state_size(&self) -> u64 {
        self.max_hostmem.saturating_add(saved::MAX_SCANOUTS_SIZE)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        saved::save(&lock(&self.state))
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        saved::load(&mut lock(&self.state), state)
    }
}

/// Returns whether 3D works on this host. While it tests this, stdout is redirected to stderr: libraries may print, and
/// the output of `--print-capabilities` must be one JSON document.
fn can_render() -> bool {
    let Ok(stdout) = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3) else {
        return false;
    };
    if rustix::stdio::dup2_stdout(std::io::stderr()).is_err() {
        return false;
    }
    let can = Capsets::probe(None, false).is_ok();
    rustix::stdio::dup2_stdout(stdout).is_ok() && can
}
