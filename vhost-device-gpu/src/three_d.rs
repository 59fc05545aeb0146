// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The 3D commands (VIRTIO 1.3, 5.7.6.8), and when the renderer that carries them out is there.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vhost_device_common::chain::Chain;
use vhost_device_common::device::Needs;
use vhost_device_common::memory::GuestMemory;
use vhost_device_common::{info_limited, warn_limited};
use virtio_bindings::virtio_gpu as gpu;
use zerocopy::IntoBytes;

use crate::command::{no_data, read};
use crate::dmabuf::Dmabuf;
use crate::format::{Format, PIXEL_SIZE};
use crate::protocol::{
    CapsetInfo, Create2d, Create3d, CreateContext, GetCapset, Header, Number, Refusal, Response,
    Transfer3d,
};
use crate::rectangle::Rectangle;
use crate::resource::Resources;
use crate::virgl::{self, Capset, Direction, Renderer, TransferBox, VirglError};

/// Bytes of one SUBMIT_3D: Linux guests stay far below.
const MAX_COMMANDS: u32 = 16 << 20;
/// `pipe_texture_target`: a resource that is bytes, and one that is a picture.
const BUFFER: u32 = 0;
const TEXTURE_2D: u32 = 2;
/// `VIRGL_BIND_RENDER_TARGET`: contexts may draw in it.
const RENDER_TARGET: u32 = 1 << 1;
/// Bytes of a pixel, or block of pixels, of the largest format.
const MAX_BLOCK_SIZE: u64 = 16;
/// The smallest picture of the largest resource that there can be.
const MAX_LEVEL: u32 = 31;
/// How often fences are looked at where nothing tells when they are done.
const FENCE_INTERVAL_NS: i64 = 1_000_000;

/// What the device offers of 3D.
#[derive(Debug)]
pub struct Offer {
    node: Option<PathBuf>,
    /// Displays may take pictures from buffers of the renderer's.
    gives_buffers: bool,
    capsets: Vec<Capset>,
}

impl Offer {
    /// Finds out what the renderer can do on this host.
    pub fn probe(node: Option<&Path>, gives_buffers: bool) -> Result<Self, VirglError> {
        virgl::keep_no_files();
        let draws = virgl::try_drawing(node)?;
        // What the library leaves in a thread ends with the thread.
        let capsets = std::thread::scope(|scope| {
            let probe = scope.spawn(|| Renderer::new(node).map(|renderer| renderer.capsets()));
            probe.join().unwrap_or(Err(VirglError::Init))
        })?;
        if capsets.is_empty() || !draws {
            return Err(VirglError::Init);
        }
        Ok(Self {
            node: node.map(Path::to_owned),
            gives_buffers,
            capsets,
        })
    }

    /// What the renderer does, beside the 2D device.
    pub fn add_needs(&self, needs: &mut Needs) {
        virgl::add_needs(needs, self.node.as_deref());
    }

    /// How many sets of capabilities there are.
    pub fn num_capsets(&self) -> u32 {
        self.capsets.len() as u32
    }
}

/// 3D in the thread that works on the queues. The renderer starts with the first command for it.
pub struct ThreeD {
    offer: Arc<Offer>,
    renderer: Option<Renderer>,
    /// Becomes readable when fences are to be looked at.
    events: OwnedFd,
    /// What does that, unless the renderer has something better.
    timer: OwnedFd,
}

impl ThreeD {
    pub fn new(offer: Arc<Offer>) -> std::io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            offer,
            renderer: None,
            events: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        })
    }

    /// What becomes readable when [`ThreeD::poll`] may have news.
    pub fn events(&self) -> &OwnedFd {
        &self.events
    }

    /// The renderer, if it has started.
    pub fn started(&mut self) -> Option<&mut Renderer> {
        self.renderer.as_mut()
    }

    /// RESOURCE_CREATE_2D, with the renderer.
    pub fn create_2d(
        &mut self,
        resources: &mut Resources,
        command: &Create2d,
    ) -> Result<(), Refusal> {
        let command = Create3d {
            resource: command.resource,
            target: TEXTURE_2D.into(),
            format: command.format,
            bind: RENDER_TARGET.into(),
            width: command.width,
            height: command.height,
            depth: 1.into(),
            array_size: 1.into(),
            flags: gpu::VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP.into(),
            ..Create3d::default()
        };
        create(self.renderer()?, resources, &command)
    }

    /// TRANSFER_TO_HOST_2D to a resource that the renderer has. The rectangle is in the picture.
    pub fn transfer_2d(
        &mut self,
        number: u32,
        rectangle: &Rectangle,
        offset: u64,
    ) -> Result<(), Refusal> {
        let part = TransferBox {
            x: rectangle.x,
            y: rectangle.y,
            z: 0,
            width: rectangle.width,
            height: rectangle.height,
            depth: 1,
        };
        // Rows are as long as the resource's.
        self.transfer(Direction::ToHost, 0, number, 0, (0, 0), part, offset)
    }

    #[allow(clippy::too_many_arguments, reason = "it has these fields")]
    fn transfer(
        &mut self,
        direction: Direction,
        context: u32,
        number: u32,
        level: u32,
        strides: (u32, u32),
        part: TransferBox,
        offset: u64,
    ) -> Result<(), Refusal> {
        if !is_countable(&part, strides, offset) || level > MAX_LEVEL {
            return Err(Refusal::Parameter);
        }
        let renderer = self.renderer()?;
        renderer.transfer(direction, context, number, level, strides, part, offset)
    }

    /// A resource as a buffer that the display can show by itself, where that can be.
    pub fn export(&mut self, number: u32) -> Option<Dmabuf> {
        let renderer = self.renderer.as_mut()?;
        let buffer = self.offer.gives_buffers.then(|| renderer.export(number))?;
        log::debug!("resource {number} is shown from {buffer:?}");
        buffer
    }

    fn renderer(&mut self) -> Result<&mut Renderer, Refusal> {
        match &mut self.renderer {
            Some(renderer) => Ok(renderer),
            none => {
                let renderer = start(&self.offer, &self.events, &self.timer).map_err(|error| {
                    warn_limited(format_args!("cannot enable 3D: {error}"));
                    Refusal::Unspecified
                })?;
                Ok(none.insert(renderer))
            }
        }
    }

    /// Has [`ThreeD::events`] tell when a fence may be done.
    pub fn expect_fence(&self) {
        let Some(renderer) = &self.renderer else {
            return;
        };
        if renderer.events().is_none() {
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec {
                    tv_sec: 0,
                    tv_nsec: FENCE_INTERVAL_NS,
                },
            };
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        }
    }

    /// The last fence that is done.
    pub fn poll(&mut self) -> u32 {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.renderer.as_mut().map_or(0, Renderer::poll)
    }

    /// Forgets all of the guest.
    pub fn clear(&mut self) {
        if let Some(renderer) = &mut self.renderer {
            renderer.clear();
        }
    }

    /// Has all resources use another table of guest memory.
    pub fn set_memory(&mut self, resources: &Resources, memory: &Arc<GuestMemory>) {
        let Some(renderer) = &mut self.renderer else {
            return;
        };
        for (number, resource) in resources.rendered() {
            if let Some(backing) = resource.backing()
                && renderer.attach_backing(number, backing, memory).is_err()
            {
                log::debug!("the memory behind resource {number} is gone");
            }
        }
    }
}

/// Starts the renderer on this thread.
fn start(offer: &Offer, events: &OwnedFd, timer: &OwnedFd) -> Result<Renderer, VirglError> {
    let renderer = Renderer::new(offer.node.as_deref())?;
    let source = renderer.events().unwrap_or(timer.as_fd());
    epoll::add(
        events,
        source,
        epoll::EventData::new_u64(0),
        epoll::EventFlags::IN,
    )
    .map_err(|errno| VirglError::System(errno.kind()))?;
    info_limited(format_args!("3D is used"));
    Ok(renderer)
}

/// Carries out a command that only a device with 3D has.
pub fn control(
    three_d: &mut ThreeD,
    resources: &mut Resources,
    header: &Header,
    chain: &mut Chain,
) -> Result<Response, Refusal> {
    let context = header.context_id.get();
    match header.kind.get() {
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO => {
            return capset_info(&three_d.offer, read::<Number>(chain)?.number.get());
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET => {
            return capset(three_d, &read(chain)?);
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_CREATE => {
            let command: CreateContext = read(chain)?;
            let length = command.name_length.get() as usize;
            let name = command
                .name
                .as_flattened()
                .get(..length)
                .ok_or(Refusal::Parameter)?;
            three_d.renderer()?.create_context(context, name)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DESTROY => {
            three_d.renderer()?.destroy_context(context)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE => {
            let number = read::<Number>(chain)?.number.get();
            share(three_d, resources, context, number, true)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE => {
            let number = read::<Number>(chain)?.number.get();
            share(three_d, resources, context, number, false)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_3D => {
            create(three_d.renderer()?, resources, &read(chain)?)?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D => {
            transfer(
                three_d,
                resources,
                Direction::ToHost,
                context,
                &read(chain)?,
            )?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D => {
            transfer(
                three_d,
                resources,
                Direction::FromHost,
                context,
                &read(chain)?,
            )?;
        }
        gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SUBMIT_3D => {
            let size = read::<Number>(chain)?.number.get();
            if size > MAX_COMMANDS || !size.is_multiple_of(4) || chain.readable_len() < size.into()
            {
                return Err(Refusal::Parameter);
            }
            let mut commands = vec![0u32; size as usize / 4];
            chain.read(commands.as_mut_bytes())?;
            three_d.renderer()?.submit(context, &mut commands)?;
        }
        _ => return Err(Refusal::Unspecified),
    }
    Ok(no_data())
}

fn capset_info(offer: &Offer, index: u32) -> Result<Response, Refusal> {
    let capset = offer
        .capsets
        .get(index as usize)
        .ok_or(Refusal::Parameter)?;
    let info = CapsetInfo {
        id: capset.id.into(),
        max_version: capset.max_version.into(),
        max_size: capset.size.into(),
        padding: 0.into(),
    };
    Ok(Response {
        kind: gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET_INFO,
        body: info.as_bytes().to_vec(),
    })
}

fn capset(three_d: &mut ThreeD, command: &GetCapset) -> Result<Response, Refusal> {
    let (id, version) = (command.id.get(), command.version.get());
    let mut capsets = three_d.offer.capsets.iter();
    let capset = *capsets
        .find(|capset| capset.id == id && version <= capset.max_version)
        .ok_or(Refusal::Parameter)?;
    Ok(Response {
        kind: gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET,
        body: three_d.renderer()?.fill_capset(&capset, version)?,
    })
}

/// Lets a context use a resource, or not any more. One that the renderer does not have, because it does not know the format, can be used by no
/// context; Linux attaches it all the same.
fn share(
    three_d: &mut ThreeD,
    resources: &Resources,
    context: u32,
    number: u32,
    uses: bool,
) -> Result<(), Refusal> {
    match resources.get(number)?.is_rendered() {
        true => three_d.renderer()?.share(context, number, uses),
        false => Ok(()),
    }
}

/// About what a resource takes of the host, in bytes: the format is taken for one of 4 bytes a pixel, and the driver of the GPU has ways
/// of its own.
fn size(command: &Create3d) -> u64 {
    let width = u64::from(command.width.get());
    if command.target.get() == BUFFER {
        return width;
    }
    let factors = [
        command.height.get(),
        command.depth.get(),
        command.array_size.get(),
        command.samples.get().max(1),
    ];
    let pixels = factors
        .into_iter()
        .fold(width, |pixels, factor| pixels.saturating_mul(factor.into()));
    let size = pixels.saturating_mul(PIXEL_SIZE);
    match command.last_level.get() {
        0 => size,
        // Each level is a quarter of the one before.
        _ => size.saturating_add(size / 3),
    }
}

fn create(
    renderer: &mut Renderer,
    resources: &mut Resources,
    command: &Create3d,
) -> Result<(), Refusal> {
    let number = command.resource.get();
    let shape = (command.width.get(), command.height.get());
    let format = Format::from_number(command.format.get())
        .filter(|_| command.target.get() != BUFFER && shape.0 > 0 && shape.1 > 0);
    resources.create_rendered(number, format, shape, size(command), || {
        renderer.create_resource(command)
    })
}

/// Whether the library, which counts bytes with 32 bits, can tell if all of a transfer is in the memory behind the resource.
fn is_countable(part: &TransferBox, (stride, layer_stride): (u32, u32), offset: u64) -> bool {
    let ends = [
        part.x.checked_add(part.width),
        part.y.checked_add(part.height),
        part.z.checked_add(part.depth),
    ];
    let product = |factors: [u32; 3]| {
        let factors = factors.into_iter().map(u64::from);
        factors.fold(MAX_BLOCK_SIZE, u64::saturating_mul)
    };
    let sizes = [
        product([part.width, part.height, part.depth]),
        u64::from(stride) * u64::from(part.height),
        u64::from(layer_stride) * u64::from(part.depth),
        offset,
    ];
    let size = sizes.into_iter().fold(0, u64::saturating_add);
    ends.into_iter().all(|end| end.is_some()) && size <= u32::MAX.into()
}

fn transfer(
    three_d: &mut ThreeD,
    resources: &Resources,
    direction: Direction,
    context: u32,
    command: &Transfer3d,
) -> Result<(), Refusal> {
    let number = command.resource.get();
    if !resources.get(number)?.is_rendered() {
        return Err(Refusal::Parameter);
    }
    let part = TransferBox {
        x: command.x.get(),
        y: command.y.get(),
        z: command.z.get(),
        width: command.width.get(),
        height: command.height.get(),
        depth: command.depth.get(),
    };
    let level = command.level.get();
    let strides = (command.stride.get(), command.layer_stride.get());
    let offset = command.offset.get();
    three_d.transfer(direction, context, number, level, strides, part, offset)
}
