// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a chain remembers for its ring.

/// How a ring knows a request that it gave out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// The driver's name for it: index of the first descriptor, or, in a packed ring, the buffer id.
    pub id: u16,
    /// Descriptors of the ring that it takes in a packed ring.
    pub descriptors: u16,
    /// Where it is noted as in flight, in a packed ring.
    pub entry: u16,
    /// Its number among the requests that were taken from this ring, from 1; 0 for one that is taken again.
    pub sequence: u64,
}
