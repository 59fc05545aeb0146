// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The renderer, in the thread that processes the queues.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use vhost_device_common::memory::GuestMemory;
use vhost_device_common::worker::{Readiness, Timer, Watcher};
use vhost_device_common::{info_limited, warn_limited};

use crate::capsets::Capsets;
use crate::dmabuf::Dmabuf;
use crate::format::{Format, PIXEL_SIZE};
use crate::protocol::{CommandError, Create2d, Create3d, Transfer2d, Transfer3d};
use crate::rectangle::Rectangle;
use crate::resource_table::ResourceTable;
use crate::virgl::{Direction, Renderer, TransferBox, VirglError};

/// Value of `pipe_texture_target`: the resource holds plain bytes.
const PIPE_BUFFER: u32 = 0;
/// `VIRGL_BIND_RENDER_TARGET`: contexts can render to the resource.
const VIRGL_BIND_RENDER_TARGET: u32 = 1 << 1;
/// Size in bytes of a pixel, or compressed block, of the largest format.
const MAX_BLOCK_SIZE: u64 = 16;
/// Highest mipmap level of the largest possible resource.
const MAX_LEVEL: u32 = 31;
/// How often fences are polled if the renderer has no poll descriptor.
const FENCE_INTERVAL: Duration = Duration::from_millis(1);

/// 3D in the thread that processes the queues. The first command that needs the renderer starts it.
pub struct ThreeD {
    pub capsets: Arc<Capsets>,
    renderer: Option<Renderer>,
    watcher: Watcher,
    /// The watcher reports fences as this token.
    token: u32,
    /// Triggers polling if the renderer has no poll descriptor.
    timer: Timer,
}

impl ThreeD {
    /// Prepares to start the renderer. The watcher reports `token` when [`ThreeD::poll`] may return a new fence.
    pub fn new(capsets: Arc<Capsets>, watcher: Watcher, token: u32) -> io::Result<Self> {
        Ok(Self {
            capsets,
            renderer: None,
            watcher,
            token,
            timer: Timer::new()?,
        })
    }

    /// Returns the file that becomes readable when [`ThreeD::poll`] may return a new fence.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        let renderer = self.renderer.as_ref();
        let own = renderer.and_then(Renderer::poll_fd);
        own.unwrap_or(self.timer.as_fd())
    }

    /// Returns the renderer if it has started.
    pub fn started_renderer(&mut self) -> Option<&mut Renderer> {
        self.renderer.as_mut()
    }

    /// Executes RESOURCE_CREATE_3D.
    pub fn create(
        &mut self,
        resources: &mut ResourceTable,
        command: &Create3d,
    ) -> Result<(), CommandError> {
        let renderer = self.start_renderer()?;
        let id = command.resource.get();
        let size = (command.width.get(), command.height.get());
        let format = Format::from_number(command.format.get())
            .filter(|_| command.target.get() != PIPE_BUFFER && size.0 > 0 && size.1 > 0);
        resources.create_in_renderer(id, format, size, estimated_size(command), || {
            renderer.create_resource(command)
        })
    }

    /// Executes RESOURCE_CREATE_2D in the renderer.
    pub fn create_2d(
        &mut self,
        resources: &mut ResourceTable,
        command: &Create2d,
    ) -> Result<(), CommandError> {
        let command = Create3d::image(command, VIRGL_BIND_RENDER_TARGET);
        self.create(resources, &command)
    }

    /// Executes TRANSFER_TO_HOST_2D for a resource in the renderer. The rectangle must be within the resource.
    pub fn transfer_2d(&mut self, command: &Transfer2d) -> Result<(), CommandError> {
        // Stride 0: rows are as long as the resource's.
        let command = Transfer3d {
            x: command.rectangle.x,
            y: command.rectangle.y,
            width: command.rectangle.width,
            height: command.rectangle.height,
            depth: 1.into(),
            offset: command.offset,
            resource: command.resource,
            ..Transfer3d::default()
        };
        self.transfer(Direction::ToHost, 0, &command)
    }

    /// Executes TRANSFER_TO_HOST_3D or TRANSFER_FROM_HOST_3D. Context 0 stands for none.
    ///
    /// # Errors
    /// The transfer is not within the resource and its backing, or the renderer cannot be started.
    pub fn transfer(
        &mut self,
        direction: Direction,
        context: u32,
        command: &Transfer3d,
    ) -> Result<(), CommandError> {
        if !fits_in_32_bits(command) || command.level.get() > MAX_LEVEL {
            return Err(CommandError::InvalidParameter);
        }
        let renderer = self.start_renderer()?;
        renderer.transfer(direction, context, command)
    }

    /// Exports a resource as a dma-buf for the display. Returns `None` if this is disabled or not possible.
    pub fn export(&mut self, id: u32) -> Option<Dmabuf> {
        let renderer = self.renderer.as_mut()?;
        let dmabuf = self.capsets.export_dmabufs.then(|| renderer.export(id))?;
        log::debug!("resource {id} is exported as {dmabuf:?}");
        dmabuf
    }

    /// Returns the renderer, which starts if necessary.
    pub fn start_renderer(&mut self) -> Result<&mut Renderer, CommandError> {
        match &mut self.renderer {
            Some(renderer) => Ok(renderer),
            none => {
                let renderer = Renderer::new(self.capsets.node.as_deref())
                    .and_then(|renderer| {
                        let fences = renderer.poll_fd().unwrap_or(self.timer.as_fd());
                        self.watcher
                            .add(fences, Readiness::READABLE, self.token)
                            .map_err(|error| VirglError::System(error.kind()))?;
                        Ok(renderer)
                    })
                    .map_err(|error| {
                        warn_limited(format_args!("cannot enable 3D: {error}"));
                        CommandError::Unspecified
                    })?;
                info_limited(format_args!("3D started"));
                Ok(none.insert(renderer))
            }
        }
    }

    /// Has the watcher report when a fence may have signalled.
    pub fn expect_fence(&self) {
        let renderer = self.renderer.as_ref();
        if renderer.is_some_and(|renderer| renderer.poll_fd().is_none()) {
            self.timer.set(FENCE_INTERVAL);
        }
    }

    /// Returns the last fence that has signalled.
    pub fn poll(&mut self) -> u32 {
        self.renderer.as_mut().map_or(0, Renderer::poll)
    }

    /// Destroys all contexts and resources of the guest.
    pub fn clear(&mut self) {
        if let Some(renderer) = &mut self.renderer {
            renderer.clear();
        }
    }

    /// Attaches all backings again after a change of the guest memory table.
    pub fn set_memory(&mut self, resources: &ResourceTable, memory: &Arc<GuestMemory>) {
        let Some(renderer) = &mut self.renderer else {
            return;
        };
        for (id, resource) in resources.in_renderer() {
            if let Some(backing) = &resource.backing
                && renderer.attach_backing(id, backing, memory).is_err()
            {
                log::debug!("resource {id} has lost its backing: not in guest memory any more");
            }
        }
    }
}

/// Copies a rectangle from the renderer into the resource's pixels. Does nothing if the resource is not in the
/// renderer.
pub fn read_back(
    three_d: Option<&mut ThreeD>,
    resources: &mut ResourceTable,
    id: u32,
    rectangle: &Rectangle,
) -> Result<(), CommandError> {
    let resource = resources.get_mut(id)?;
    match three_d.and_then(ThreeD::started_renderer) {
        Some(renderer) if resource.is_in_renderer() => resource
            .read_back(rectangle, |rectangle, width, pixels| {
                renderer.read_pixels(id, rectangle, width, pixels)
            }),
        _ => Ok(()),
    }
}

/// Estimates the host memory of a resource in bytes. It assumes 4 bytes a pixel; the actual size depends on the format
/// and the GPU's driver.
fn estimated_size(command: &Create3d) -> u64 {
    let width = u64::from(command.width.get());
    if command.target.get() == PIPE_BUFFER {
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
        // Each mipmap level has a quarter of the size of the level before it.
        _ => size.saturating_add(size / 3),
    }
}

/// Returns whether virglrenderer, which computes sizes with 32 bits, can check that the transfer is within the backing.
fn fits_in_32_bits(command: &Transfer3d) -> bool {
    let region = TransferBox::from(command);
    let ends = [
        region.x.checked_add(region.width),
        region.y.checked_add(region.height),
        region.z.checked_add(region.depth),
    ];
    let product = |factors: [u32; 3]| {
        let factors = factors.into_iter().map(u64::from);
        factors.fold(MAX_BLOCK_SIZE, u64::saturating_mul)
    };
    let sizes = [
        product([region.width, region.height, region.depth]),
        u64::from(command.stride) * u64::from(region.height),
        u64::from(command.layer_stride) * u64::from(region.depth),
        command.offset.get(),
    ];
    let size = sizes.into_iter().fold(0, u64::saturating_add);
    ends.into_iter().all(|end| end.is_some()) && size <= u32::MAX.into()
}
