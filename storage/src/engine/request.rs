// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an engine carries out for a device.

use std::convert::Infallible;

use vhost_device_common::chain::Chain;

use crate::disk::Disk;
use crate::operation::Operation;

/// What a device chooses the requests by that it suspends.
#[derive(Clone, Copy, Debug)]
pub struct Label {
    /// Index of the queue.
    pub queue: u16,
    /// Whether the request changes the disk.
    pub is_change: bool,
    /// Whether its chain was taken out ([`IoRequest::abandon`]), or it has none.
    pub is_abandoned: bool,
}

/// A request of a device, which an engine carries out one operation at a time.
///
/// The engine owns the request, and does not move it, for as long as the operation is in flight.
///
/// # Safety
/// The kernel uses what [`IoRequest::operation`] returned until the operation has ended. So nothing that it refers to may be freed or
/// moved before the request is dropped: neither by [`IoRequest::abandon`], nor, once that returned the chain, by dropping the chain. The
/// same is true of the disk that [`IoRequest::disk`] returned, which stays open.
pub unsafe trait IoRequest: Send + 'static {
    /// Returns the next operation.
    fn operation(&self) -> Operation<'_>;

    /// Returns the disk that the operation is for, of a device with several disks. `None` if it is the disk that the engine was opened for.
    #[inline]
    fn disk(&self) -> Option<&Disk> {
        None
    }

    /// Returns what the request is, for [`Engine::suspend`](super::Engine::suspend).
    fn label(&self) -> Label;

    /// Takes the chain out of the request while the operation is in flight, if the operation does not use guest memory and borrows
    /// nothing from the chain. The operation stays the same; what is left of the request completes nothing. `None` if that is not
    /// possible, or was done before.
    fn abandon(&mut self) -> Option<Chain>;

    /// Puts the chain of an abandoned request back.
    fn restore(&mut self, chain: Chain);

    /// Takes the chain out of a request without an operation in flight, and drops the rest.
    fn into_chain(self) -> Option<Chain>
    where
        Self: Sized;
}

/// For engines without requests.
// SAFETY: there are none.
unsafe impl IoRequest for Infallible {
    fn operation(&self) -> Operation<'_> {
        match *self {}
    }

    fn label(&self) -> Label {
        match *self {}
    }

    fn abandon(&mut self) -> Option<Chain> {
        match *self {}
    }

    fn restore(&mut self, _chain: Chain) {
        match *self {}
    }

    fn into_chain(self) -> Option<Chain> {
        match self {}
    }
}
