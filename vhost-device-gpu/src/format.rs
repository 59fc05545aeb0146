// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pixel formats of 2D resources, and their conversion to the format of displays.

use virtio_bindings::virtio_gpu::{
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_A8B8G8R8_UNORM as A8B8G8R8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_A8R8G8B8_UNORM as A8R8G8B8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8A8_UNORM as B8G8R8A8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM as B8G8R8X8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8A8_UNORM as R8G8B8A8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8X8_UNORM as R8G8B8X8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8B8G8R8_UNORM as X8B8G8R8,
    virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8R8G8B8_UNORM as X8R8G8B8,
};

/// Size of a pixel in bytes, in all formats.
pub const PIXEL_SIZE: u64 = 4;

/// Order of a pixel's bytes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Bgra,
    Argb,
    Rgba,
    Abgr,
}

/// The format of a 2D resource (VIRTIO 1.3, 5.7.6.8, `virtio_gpu_formats`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    order: Order,
    number: u32,
}

impl Format {
    /// Returns the format with this VIRTIO number.
    pub fn from_number(number: u32) -> Option<Self> {
        let order = match number {
            B8G8R8A8 | B8G8R8X8 => Order::Bgra,
            A8R8G8B8 | X8R8G8B8 => Order::Argb,
            R8G8B8A8 | R8G8B8X8 => Order::Rgba,
            A8B8G8R8 | X8B8G8R8 => Order::Abgr,
            _ => return None,
        };
        Some(Self { order, number })
    }

    /// Returns the VIRTIO number of the format.
    pub fn number(self) -> u32 {
        self.number
    }

    /// Converts pixels from the guest's layout to 0xAARRGGBB. In formats without alpha, AA is the padding byte of the
    /// guest.
    pub fn convert(self, pixels: &mut [u32]) {
        let each = |convert: fn(u32) -> u32, pixels: &mut [u32]| {
            for pixel in pixels {
                *pixel = convert(u32::from_le(*pixel));
            }
        };
        match self.order {
            Order::Bgra if cfg!(target_endian = "little") => {}
            Order::Bgra => each(|pixel| pixel, pixels),
            Order::Argb => each(u32::swap_bytes, pixels),
            Order::Rgba => each(|pixel| pixel.swap_bytes().rotate_right(8), pixels),
            Order::Abgr => each(|pixel| pixel.rotate_right(8), pixels),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_formats_are_converted_to_the_same_pixels() {
        // The bytes of a pixel with alpha 1, red 2, green 3, blue 4.
        let formats = [
            (B8G8R8A8, [4, 3, 2, 1]),
            (B8G8R8X8, [4, 3, 2, 1]),
            (A8R8G8B8, [1, 2, 3, 4]),
            (X8R8G8B8, [1, 2, 3, 4]),
            (R8G8B8A8, [2, 3, 4, 1]),
            (R8G8B8X8, [2, 3, 4, 1]),
            (A8B8G8R8, [1, 4, 3, 2]),
            (X8B8G8R8, [1, 4, 3, 2]),
        ];
        for (number, bytes) in formats {
            let mut pixels = [u32::from_ne_bytes(bytes); 3];
            let format = Format::from_number(number).unwrap();
            assert_eq!(format.number(), number);
            format.convert(&mut pixels);
            assert_eq!(pixels, [0x0102_0304; 3], "format {number}");
        }
    }

    #[test]
    fn unknown_format_numbers_are_rejected() {
        for number in [0, 5, 66, 69, 120, 122, 133, 135, u32::MAX] {
            assert_eq!(Format::from_number(number), None);
        }
    }
}
