// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the bytes of a disk are. A layout answers that question and never moves data; an engine moves data and knows no layout.

/// A run of bytes of a disk that is also one run in its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the run begins in the image, in bytes.
    pub offset: u64,
    /// Bytes. A piece that is shorter than what was asked for makes a short transfer: the rest is asked for again.
    pub length: u64,
}

/// How the bytes of a disk lie in its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// A raw image: each byte is at its own offset.
    #[default]
    Flat,
    /// Blocks of so many bytes in reverse order, to test what uses a layout.
    #[cfg(test)]
    Reversed {
        /// Bytes of a block.
        block: u64,
        /// Bytes of the disk.
        size: u64,
    },
}

impl Layout {
    /// Finds the first piece of `length` bytes of the disk at `offset`, where `length` is not 0. The piece has at least one byte.
    #[inline]
    pub fn find(self, offset: u64, length: u64) -> Piece {
        match self {
            Self::Flat => Piece { offset, length },
            #[cfg(test)]
            Self::Reversed { block, size } => {
                let inside = offset % block;
                Piece {
                    offset: size - block - (offset - inside) + inside,
                    length: length.min(block - inside),
                }
            }
        }
    }
}
