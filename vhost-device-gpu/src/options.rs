// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the GPU device.

use std::path::PathBuf;

use clap::Args;
use vhost_device_common::program::size;

/// Options of the GPU device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Limit on the host memory that the guest's resources use: bytes, or a number with the suffix K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub max_hostmem: u64,

    /// Offer 3D with virglrenderer.
    #[arg(long)]
    pub virgl: bool,

    /// Render 3D on this GPU, such as /dev/dri/renderD128. By default virglrenderer chooses one.
    #[arg(long, value_name = "PATH")]
    pub render_node: Option<PathBuf>,

    /// Send pixels to the display even if the GPU can export dma-bufs: for front-ends whose display does not use a GPU.
    #[arg(long)]
    pub no_dmabuf: bool,

    /// Run without a display: the guest has one 1024x768 screen, and its output is discarded.
    #[arg(long)]
    pub headless: bool,
}
