// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contents of a ring: descriptors, and the buffers that they describe (VIRTIO 1.3, sections 2.7.5 and 2.8.13).

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Descriptor flag: the buffer holds a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Bytes of a descriptor.
pub const DESCRIPTOR_SIZE: usize = 16;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// Whether the device writes it (else the device reads it).
    pub writable: bool,
}

impl Buffer {
    /// Creates a buffer that the device reads.
    pub fn readable(address: u64, length: u32) -> Self {
        Buffer {
            address,
            length,
            writable: false,
        }
    }

    /// Creates a buffer that the device writes.
    pub fn writable(address: u64, length: u32) -> Self {
        Buffer {
            address,
            length,
            writable: true,
        }
    }

    /// Splits the buffer into consecutive buffers of these lengths; the remaining bytes are one more buffer.
    pub fn split(self, lengths: &[u32]) -> Vec<Buffer> {
        let mut rest = self;
        let mut pieces: Vec<Buffer> = lengths
            .iter()
            .map(|&length| {
                let piece = Buffer { length, ..rest };
                rest.address += u64::from(length);
                rest.length = rest
                    .length
                    .checked_sub(length)
                    .expect("pieces longer than the buffer");
                piece
            })
            .collect();
        if rest.length > 0 {
            pieces.push(rest);
        }
        pieces
    }
}

/// A chain that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head descriptor of the chain, or its id in a packed ring, as [`super::Queue::add`] returned it.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// A descriptor in a ring or an indirect table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, with [`NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// Creates the descriptor of a buffer without a successor.
    #[inline]
    pub fn of(buffer: &Buffer) -> Self {
        Descriptor {
            address: buffer.address,
            length: buffer.length,
            flags: if buffer.writable { WRITE } else { 0 },
            next: 0,
        }
    }

    /// Creates the descriptor of a table with this many descriptors.
    #[inline]
    pub fn of_table(address: u64, count: usize) -> Self {
        Descriptor {
            address,
            length: (count * DESCRIPTOR_SIZE) as u32,
            flags: INDIRECT,
            next: 0,
        }
    }

    /// Returns the same descriptor, followed by descriptor `next` of its chain.
    #[inline]
    pub fn followed_by(self, next: u16) -> Self {
        Descriptor {
            flags: self.flags | NEXT,
            next,
            ..self
        }
    }

    /// Returns the 16 bytes of the descriptor.
    pub fn to_bytes(self) -> [u8; DESCRIPTOR_SIZE] {
        let mut bytes = [0; DESCRIPTOR_SIZE];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// # Safety
/// `table` has more than `index` descriptors.
#[inline]
pub(super) unsafe fn write_descriptor(table: *mut u8, index: u16, descriptor: Descriptor) {
    // SAFETY: by this function's contract; the device may read it at any time, hence volatile.
    unsafe {
        table
            .cast::<[u8; DESCRIPTOR_SIZE]>()
            .add(usize::from(index))
            .write_volatile(descriptor.to_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_split_into_pieces_and_a_rest() {
        assert_eq!(
            Buffer::writable(100, 16).split(&[1, 0, 7]),
            [(100, 1), (101, 0), (101, 7), (108, 8)]
                .map(|(address, length)| Buffer::writable(address, length))
        );
        assert_eq!(Buffer::readable(5, 4).split(&[4]), [Buffer::readable(5, 4)]);
    }
}
