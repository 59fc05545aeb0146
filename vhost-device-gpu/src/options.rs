// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the GPU device.

use std::path::PathBuf;

use clap::Args;
use vhost_device_common::program::size;

/// Options of the GPU device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Memory of this host that the guest's resources may take: bytes, or a number with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub max_hostmem: u64,

    /// Offer 3D, by virglrenderer.
    #[arg(long)]
    pub virgl: bool,

    /// Draw 3D with this GPU, instead of one that virglrenderer finds: such as /dev/dri/renderD128.
    #[arg(long, value_name = "PATH")]
    pub render_node: Option<PathBuf>,

    /// Send the display pixels even where the GPU could share its buffers: for a front-end that shows without a GPU.
    #[arg(long)]
    pub no_dmabuf: bool,

    /// Do without a display: the guest has one screen of 1024x768, and nobody sees what it draws.
    #[arg(long)]
    pub headless: bool,
}
