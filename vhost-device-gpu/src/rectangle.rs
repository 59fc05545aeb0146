// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rectangles of pixels.

/// A rectangle of at least one pixel. `x + width` and `y + height` do not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rectangle {
    pub x: u32,
    pub y: u32,
    pub width: u32,
    pub height: u32,
}

impl Rectangle {
    /// Returns `None` if the rectangle would be empty or overflow.
    pub fn new(x: u32, y: u32, width: u32, height: u32) -> Option<Self> {
        x.checked_add(width)?;
        y.checked_add(height)?;
        (width > 0 && height > 0).then_some(Self {
            x,
            y,
            width,
            height,
        })
    }

    /// Returns x, y, width and height.
    pub fn words(&self) -> [u32; 4] {
        [self.x, self.y, self.width, self.height]
    }

    /// Returns the first column to the right of the rectangle.
    pub fn right(&self) -> u32 {
        self.x.saturating_add(self.width)
    }

    /// Returns the first row below the rectangle.
    pub fn bottom(&self) -> u32 {
        self.y.saturating_add(self.height)
    }

    /// Returns whether the rectangle is within an image of this size.
    pub fn is_within(&self, width: u32, height: u32) -> bool {
        self.right() <= width && self.bottom() <= height
    }

    /// Returns the common part of both rectangles.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        let width = self.right().min(other.right()).checked_sub(x)?;
        let height = self.bottom().min(other.bottom()).checked_sub(y)?;
        Self::new(x, y, width, height)
    }

    /// Returns the smallest rectangle that contains both.
    pub fn union(&self, other: &Self) -> Self {
        let (x, y) = (self.x.min(other.x), self.y.min(other.y));
        Self {
            x,
            y,
            width: self.right().max(other.right()).saturating_sub(x),
            height: self.bottom().max(other.bottom()).saturating_sub(y),
        }
    }

    /// Returns the rectangle in coordinates relative to `origin`, which contains it.
    pub fn relative_to(&self, origin: &Self) -> Self {
        Self {
            x: self.x.saturating_sub(origin.x),
            y: self.y.saturating_sub(origin.y),
            ..*self
        }
    }

    /// Reverses [`Rectangle::relative_to`].
    pub fn absolute_in(&self, origin: &Self) -> Self {
        Self {
            x: self.x.saturating_add(origin.x),
            y: self.y.saturating_add(origin.y),
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rectangle(x: u32, y: u32, width: u32, height: u32) -> Rectangle {
        Rectangle::new(x, y, width, height).unwrap()
    }

    #[test]
    fn empty_and_overflowing_rectangles_are_rejected() {
        assert_eq!(Rectangle::new(0, 0, 0, 1), None);
        assert_eq!(Rectangle::new(0, 0, 1, 0), None);
        assert_eq!(Rectangle::new(u32::MAX, 0, 1, 1), None);
        assert_eq!(Rectangle::new(0, 2, 1, u32::MAX - 1), None);
        assert!(Rectangle::new(u32::MAX - 1, 0, 1, u32::MAX).is_some());
    }

    #[test]
    fn an_intersection_is_the_common_part() {
        let a = rectangle(10, 20, 30, 40);
        assert_eq!(
            a.intersection(&rectangle(0, 0, 11, 21)),
            Rectangle::new(10, 20, 1, 1)
        );
        assert_eq!(
            a.intersection(&rectangle(39, 59, 9, 9)),
            Rectangle::new(39, 59, 1, 1)
        );
        assert_eq!(a.intersection(&rectangle(40, 20, 5, 5)), None);
        assert_eq!(a.intersection(&rectangle(0, 0, 10, 100)), None);
        assert_eq!(a.intersection(&a), Some(a));
    }

    #[test]
    fn a_union_contains_both() {
        let union = rectangle(1, 2, 3, 4).union(&rectangle(10, 1, 1, 1));
        assert_eq!(union, rectangle(1, 1, 10, 5));
    }

    #[test]
    fn relative_coordinates_can_be_reversed() {
        let (part, origin) = (rectangle(15, 25, 2, 3), rectangle(10, 20, 30, 40));
        let relative = part.relative_to(&origin);
        assert_eq!(relative, rectangle(5, 5, 2, 3));
        assert_eq!(relative.absolute_in(&origin), part);
    }
}
