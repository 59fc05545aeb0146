// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contents of a display, and what it should show.

use crate::front_end::gpu::Shown;
use crate::soak::loss::Loss;

/// Scanouts of a display.
pub const SCANOUTS: usize = 16;

/// Column, row, width and height.
pub type Rectangle = [u32; 4];

/// Rows of pixels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    pixels: Vec<u32>,
}

impl Picture {
    /// Creates a picture of zeroes.
    pub fn new(width: u32, height: u32) -> Self {
        Self {
            width,
            height,
            pixels: vec![0; (width * height) as usize],
        }
    }

    /// Returns its pixels, row by row.
    pub fn pixels(&self) -> &[u32] {
        &self.pixels
    }

    /// Returns all of it.
    pub fn whole(&self) -> Rectangle {
        [0, 0, self.width, self.height]
    }

    /// Replaces a rectangle. Panics if it is not in the picture.
    pub fn put(&mut self, [x, y, w, h]: Rectangle, pixels: &[u32]) {
        for (row, pixels) in (y..y + h).zip(pixels.chunks_exact(w as usize)) {
            let start = (row * self.width + x) as usize;
            self.pixels[start..start + w as usize].copy_from_slice(pixels);
        }
    }

    /// Returns a rectangle of it. Panics if it is not in the picture.
    pub fn part(&self, [x, y, w, h]: Rectangle) -> Self {
        let rows = (y..y + h).flat_map(|row| {
            let start = (row * self.width + x) as usize;
            &self.pixels[start..start + w as usize]
        });
        Self {
            pixels: rows.copied().collect(),
            width: w,
            height: h,
        }
    }

    /// Returns the first difference from a picture of the same size, in the bits of `mask`.
    pub fn difference(&self, other: &Self, mask: u32) -> Option<String> {
        if (self.width, self.height) != (other.width, other.height) {
            return Some(format!(
                "{}x{} instead of {}x{}",
                self.width, self.height, other.width, other.height
            ));
        }
        let mut pixels = self.pixels.iter().zip(&other.pixels);
        let at = pixels.position(|(a, b)| (a ^ b) & mask != 0)?;
        let (x, y) = (at as u32 % self.width, at as u32 / self.width);
        Some(format!(
            "pixel {x}, {y} is {:#x} instead of {:#x}",
            self.pixels[at], other.pixels[at]
        ))
    }
}

/// The state of a display, composed of its messages.
#[derive(Debug)]
pub struct Screen {
    scanouts: Vec<Picture>,
    cursors: Vec<Option<(u32, u32)>>,
}

impl Default for Screen {
    fn default() -> Self {
        Self {
            scanouts: vec![Picture::default(); SCANOUTS],
            cursors: vec![None; SCANOUTS],
        }
    }
}

impl Screen {
    /// Processes a message to the display, which must be valid.
    pub fn show(&mut self, shown: Shown) -> Result<(), Loss> {
        let nonsense = |what: String| Err(Loss(format!("the display received {what}")));
        match shown {
            Shown::Scanout(scanout, width, height) => {
                let Some(place) = self.scanouts.get_mut(scanout as usize) else {
                    return nonsense(format!("of scanout {scanout}"));
                };
                if (place.width, place.height) != (width, height) {
                    *place = Picture::new(width, height);
                }
            }
            Shown::Update(scanout, rectangle, pixels) => {
                let [x, y, w, h] = rectangle.map(u64::from);
                let place = self.scanouts.get_mut(scanout as usize);
                match place {
                    Some(place)
                        if x + w <= place.width.into()
                            && y + h <= place.height.into()
                            && w * h == pixels.len() as u64
                            && w * h > 0 =>
                    {
                        place.put(rectangle, &pixels);
                    }
                    _ => {
                        return nonsense(format!(
                            "to show {} pixels at {rectangle:?} of scanout {scanout}",
                            pixels.len()
                        ));
                    }
                }
            }
            Shown::CursorImage(scanout, [x, y, ..], image) => {
                if image.len() != 64 * 64 {
                    return nonsense(format!("of a cursor of {} pixels", image.len()));
                }
                return self.move_cursor(scanout, Some((x, y)));
            }
            Shown::CursorMove(scanout, x, y) => return self.move_cursor(scanout, Some((x, y))),
            Shown::CursorHide(scanout) => return self.move_cursor(scanout, None),
            Shown::Features(_) => {}
            Shown::Unknown(request) => return nonsense(format!("request {request}")),
        }
        Ok(())
    }

    fn move_cursor(&mut self, scanout: u32, position: Option<(u32, u32)>) -> Result<(), Loss> {
        match self.cursors.get_mut(scanout as usize) {
            Some(cursor) => *cursor = position,
            None => return Err(Loss(format!("a cursor on scanout {scanout}"))),
        }
        Ok(())
    }

    /// Returns what a scanout shows.
    pub fn scanout(&self, scanout: usize) -> &Picture {
        &self.scanouts[scanout]
    }

    /// Returns where the cursor of a scanout is.
    pub fn cursor(&self, scanout: usize) -> Option<(u32, u32)> {
        self.cursors[scanout]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_are_put_together_and_compared() {
        let mut screen = Screen::default();
        screen.show(Shown::Scanout(3, 4, 2)).unwrap();
        screen
            .show(Shown::Update(3, [1, 0, 2, 2], vec![1, 2, 3, 4]))
            .unwrap();
        let mut expected = Picture::new(4, 2);
        expected.put([1, 0, 2, 2], &[1, 2, 3, 4]);
        assert_eq!(screen.scanout(3).pixels(), [0, 1, 2, 0, 0, 3, 4, 0]);
        assert_eq!(screen.scanout(3).difference(&expected, u32::MAX), None);
        expected.put([2, 1, 1, 1], &[9]);
        let difference = screen.scanout(3).difference(&expected, u32::MAX).unwrap();
        assert_eq!(difference, "pixel 2, 1 is 0x4 instead of 0x9");
        assert_eq!(expected.part([2, 0, 1, 2]).pixels(), [2, 9]);
    }

    #[test]
    fn nonsense_is_a_loss() {
        let mut screen = Screen::default();
        screen.show(Shown::Scanout(0, 4, 4)).unwrap();
        for shown in [
            Shown::Scanout(16, 1, 1),
            Shown::Update(0, [3, 0, 2, 1], vec![0; 2]),
            Shown::Update(0, [0, 0, 2, 1], vec![0; 3]),
            Shown::CursorMove(99, 0, 0),
            Shown::Unknown(9),
        ] {
            assert!(screen.show(shown.clone()).is_err(), "{shown:?}");
        }
    }
}
