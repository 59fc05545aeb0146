// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a chain stores for its ring.

/// How a ring identifies a request that was taken from it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ticket {
    /// The driver's identifier: the index of the first descriptor, or the buffer id in a packed ring.
    pub id: u16,
    /// Number of descriptors that it occupies in a packed ring.
    pub descriptors: u16,
    /// The entry in which it is recorded as in flight, in a packed ring.
    pub entry: u16,
    /// Its number among the requests taken from this ring, from 1; 0 for a request that is taken again.
    pub sequence: u64,
}
