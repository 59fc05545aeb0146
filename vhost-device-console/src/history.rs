// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The last bytes that the guest wrote to a port. Readers have positions in the stream, and may lag behind its end.

/// The end of an endless stream of bytes.
#[derive(Debug)]
pub struct History {
    /// Allocated when the first byte is added.
    bytes: Vec<u8>,
    capacity: usize,
    /// Number of bytes that were ever added.
    end: u64,
}

impl History {
    /// Creates an empty stream, which keeps its last `capacity` bytes (at least one).
    pub fn new(capacity: usize) -> Self {
        Self {
            bytes: Vec::new(),
            capacity: capacity.max(1),
            end: 0,
        }
    }

    /// Returns the position after the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Returns the position of the first byte that is kept.
    pub fn start(&self) -> u64 {
        self.end.saturating_sub(self.capacity as u64)
    }

    fn place(&self, position: u64) -> usize {
        (position % self.capacity as u64) as usize
    }

    /// Returns the place of the next bytes: between 1 and `most` of them, which [`History::added`] adds.
    pub fn space(&mut self, most: usize) -> &mut [u8] {
        if self.bytes.is_empty() {
            self.bytes = vec![0; self.capacity];
        }
        let at = self.place(self.end);
        let size = most.min(self.capacity - at);
        self.bytes.get_mut(at..at + size).unwrap_or_default()
    }

    /// Adds the first `count` bytes of [`History::space`].
    pub fn added(&mut self, count: usize) {
        self.end += count as u64;
    }

    /// Adds `bytes`.
    pub fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let space = self.space(bytes.len());
            let (now, later) = bytes.split_at(space.len());
            space.copy_from_slice(now);
            self.added(now.len());
            bytes = later;
        }
    }

    /// Returns the position after the first end of a line at or behind `position`, or the end if there is none.
    pub fn line_after(&self, position: u64) -> u64 {
        let position = position.max(self.start());
        let [first, second] = self.after(position);
        let found = first.iter().chain(second).position(|byte| *byte == b'\n');
        found.map_or(self.end, |at| position + at as u64 + 1)
    }

    /// Returns the bytes from `position`, which is not before [`History::start`], up to the end.
    pub fn after(&self, position: u64) -> [&[u8]; 2] {
        let count = self.end.saturating_sub(position.max(self.start())) as usize;
        let at = self.place(self.end - count as u64);
        let first = count.min(self.capacity - at);
        [
            self.bytes.get(at..at + first).unwrap_or_default(),
            self.bytes.get(..count - first).unwrap_or_default(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_in_order_whatever_the_sizes_of_the_pieces() {
        let stream: Vec<u8> = (0..2000u32).map(|number| (number * 7) as u8).collect();
        for capacity in [1, 7, 64] {
            for piece in [1, 3, 64, 100] {
                let mut history = History::new(capacity);
                let mut seen = 0;
                for bytes in stream.chunks(piece) {
                    history.append(bytes);
                    seen += bytes.len();
                    assert_eq!(history.end(), seen as u64);
                    let start = history.start() as usize;
                    assert_eq!(start, seen.saturating_sub(capacity));
                    for from in start..=seen {
                        let parts = history.after(from as u64);
                        assert_eq!(parts.concat(), stream[from..seen], "{capacity} {piece}");
                    }
                }
            }
        }
    }

    #[test]
    fn lines_are_found_behind_a_position() {
        let mut history = History::new(8);
        history.append(b"12345\n789\nb");
        assert_eq!(history.line_after(0), 6);
        assert_eq!(history.line_after(5), 6);
        assert_eq!(history.line_after(6), 10);
        assert_eq!(history.line_after(10), 11, "the end");
        assert_eq!(history.line_after(11), 11);
    }

    #[test]
    fn a_position_that_is_not_kept_any_more_gives_what_is_kept() {
        let mut history = History::new(4);
        assert_eq!(history.after(0).concat(), b"");
        history.append(b"abcdef");
        assert_eq!(history.after(0).concat(), b"cdef");
        assert_eq!(history.after(6).concat(), b"");
        assert_eq!(history.after(7).concat(), b"");
    }
}
