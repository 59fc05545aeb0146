// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contents of a guest's screen, from the file that QEMU or libvirt writes.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use super::error::{GuestError, system};

/// A picture of red, green, blue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    pixels: Vec<[u8; 3]>,
}

impl Picture {
    /// Reads a PNG file.
    pub fn read(path: &Path) -> Result<Self, GuestError> {
        let file = File::open(path).map_err(system(format!("open {}", path.display())))?;
        let bad =
            |error| GuestError::System(format!("read {}", path.display()), io::Error::other(error));
        let mut reader = png::Decoder::new(BufReader::new(file))
            .read_info()
            .map_err(bad)?;
        let mut bytes = vec![0; reader.output_buffer_size().unwrap_or(0)];
        let info = reader.next_frame(&mut bytes).map_err(bad)?;
        let size = match info.color_type {
            png::ColorType::Rgb => 3,
            png::ColorType::Rgba => 4,
            other => {
                let unknown = io::Error::other(format!("{other:?} is no colour"));
                return Err(GuestError::System(
                    format!("read {}", path.display()),
                    unknown,
                ));
            }
        };
        Ok(Self {
            width: info.width as usize,
            height: info.height as usize,
            pixels: bytes
                .chunks_exact(size)
                .map(|pixel| [pixel[0], pixel[1], pixel[2]])
                .collect(),
        })
    }

    /// Returns this picture with another one to its right. The lower one is padded with black.
    pub fn beside(&self, right: &Self) -> Self {
        let (width, height) = (self.width + right.width, self.height.max(right.height));
        let mut pixels = vec![[0; 3]; width * height];
        for (picture, x) in [(self, 0), (right, self.width)] {
            for row in 0..picture.height {
                pixels[row * width + x..][..picture.width].copy_from_slice(picture.row(row));
            }
        }
        Self {
            width,
            height,
            pixels,
        }
    }

    /// Returns row `row` from the top.
    pub fn row(&self, row: usize) -> &[[u8; 3]] {
        &self.pixels[row * self.width..][..self.width]
    }

    /// Returns the pixels in the corners: top left, top right, bottom left, bottom right.
    pub fn corners(&self) -> [[u8; 3]; 4] {
        let (top, bottom) = (self.row(0), self.row(self.height - 1));
        [
            top[0],
            top[self.width - 1],
            bottom[0],
            bottom[self.width - 1],
        ]
    }

    /// Returns whether the upper half shows the bars of the SMPTE test pattern, from the left.
    pub fn has_bars(&self) -> bool {
        const BARS: [[u8; 3]; 7] = [
            [192, 192, 192],
            [192, 192, 0],
            [0, 192, 192],
            [0, 192, 0],
            [192, 0, 192],
            [192, 0, 0],
            [0, 0, 192],
        ];
        let start = |bar: usize| bar * self.width / BARS.len();
        (0..self.height / 2).all(|row| {
            let bars = BARS.iter().enumerate();
            bars.into_iter().all(|(index, colour)| {
                let inner = &self.row(row)[start(index) + 2..start(index + 1) - 2];
                inner.iter().all(|pixel| pixel == colour)
            })
        })
    }

    /// Returns whether the picture consists of bands of equal height, in these colours from the top.
    pub fn is_bands(&self, colours: &[[u8; 3]]) -> bool {
        let band = self.height / colours.len();
        (0..self.height).all(|row| {
            let colour = colours[(row / band).min(colours.len() - 1)];
            self.row(row).iter().all(|pixel| *pixel == colour)
        })
    }
}
