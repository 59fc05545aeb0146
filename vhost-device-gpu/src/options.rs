// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the GPU device.

use std::path::PathBuf;

use clap::Args;

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

    /// Do without a display: what the guest draws is kept, and nobody sees it.
    #[arg(long)]
    pub headless: bool,
}

/// A number of bytes, with QEMU's suffixes.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 10),
        None => match text.strip_suffix(['M', 'm']) {
            Some(digits) => (digits, 20),
            None => match text.strip_suffix(['G', 'g']) {
                Some(digits) => (digits, 30),
                None => (text, 0),
            },
        },
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "must be a number of bytes, such as 67108864, 64M or 1G".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("4K"), Ok(4096));
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        for bad in ["", "M", "0", "-1", "1T", "1.5G", "99999999999G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }
}
