// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user device that does not use this project's core: `vhost-user-backend` and `virtio-queue` do all the work.
//!
//! It has two queues. It copies the readable bytes of a request to the writable ones, as many as fit.
//! Its config space is 16 bytes that the driver can write. The device-independent suites run against it as well as against
//! our own devices, so that they test the specifications and not the behaviour of our core.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use clap::Parser;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 32768;
const CONFIG_SIZE: usize = 16;

#[derive(Parser)]
#[command(about = "A vhost-user device that echoes, for the conformance suites")]
struct Options {
    /// Listen on this socket; connections are served one after the other
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
}

struct Echo {
    memory: Memory,
    config: [u8; CONFIG_SIZE],
}

impl Echo {
    /// Copies the readable bytes to the writable ones. Returns the number of bytes written.
    fn answer(chain: Chain, memory: &GuestMemoryMmap) -> io::Result<u32> {
        let mut reader = chain.clone().reader(memory).map_err(io::Error::other)?;
        let mut writer = chain.writer(memory).map_err(io::Error::other)?;
        let mut bytes = vec![0; reader.available_bytes().min(writer.available_bytes())];
        reader.read_exact(&mut bytes)?;
        writer.write_all(&bytes)?;
        u32::try_from(bytes.len()).map_err(io::Error::other)
    }
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let held = self.config.iter().copied().skip(offset as usize);
        held.chain(std::iter::repeat(0))
            .take(size as usize)
            .collect()
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        let target = start
            .checked_add(bytes.len())
            .and_then(|end| self.config.get_mut(start..end));
        target
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = vrings
            .get(usize::from(queue))
            .ok_or(io::ErrorKind::NotFound)?;
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            loop {
                let memory = self.memory.memory();
                let mut state = vring.get_mut();
                // The front-end may have stopped or disabled the ring meanwhile.
                if !state.is_enabled() || !state.get_queue().ready() {
                    return Ok(());
                }
                let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                    break;
                };
                drop(state);
                let head = chain.head_index();
                // A request that fails is returned with no bytes written.
                let written = Self::answer(chain, &memory).unwrap_or(0);
                vring.add_used(head, written).map_err(io::Error::other)?;
                if vring.needs_notification().map_err(io::Error::other)? {
                    vring.signal_used_queue()?;
                }
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn serve(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    let mut listener = Listener::new(&options.socket_path, true)?;
    loop {
        let memory = Memory::new(GuestMemoryMmap::new());
        let device = Arc::new(Mutex::new(Echo {
            memory: memory.clone(),
            config: [0; CONFIG_SIZE],
        }));
        let mut daemon = VhostUserDaemon::new("reference-device".to_owned(), device, memory)
            .map_err(|error| error.to_string())?;
        daemon
            .start(&mut listener)
            .map_err(|error| error.to_string())?;
        if let Err(error) = daemon.wait() {
            log::info!("connection ended: {error}");
        }
    }
}

fn main() -> ExitCode {
    env_logger::init();
    match serve(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reference-device: {error}");
            ExitCode::FAILURE
        }
    }
}
