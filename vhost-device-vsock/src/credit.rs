// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Credit: how much each side of a connection may send (VIRTIO 1.3, 5.10.6.3). All counters wrap around.

/// What the guest may send.
#[derive(Clone, Copy, Debug)]
pub struct Inbound {
    /// Bytes that this device buffers for the connection at most.
    size: u32,
    /// Bytes that the guest has sent.
    received: u32,
    /// Bytes that the host has taken.
    forwarded: u32,
    /// The value of `forwarded` that the guest was told last.
    reported: u32,
}

impl Inbound {
    /// Creates the credit of a connection whose buffer has `size` bytes.
    pub fn new(size: u32) -> Self {
        Self {
            size,
            received: 0,
            forwarded: 0,
            reported: 0,
        }
    }

    /// Returns the size of the buffer in bytes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Counts `length` bytes of the guest. Returns false if they exceed the credit.
    #[must_use]
    pub fn receive(&mut self, length: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = length <= self.size.saturating_sub(held);
        if fits {
            self.received = self.received.wrapping_add(length);
        }
        fits
    }

    /// Counts `length` bytes that left the buffer.
    pub fn forward(&mut self, length: u32) {
        self.forwarded = self.forwarded.wrapping_add(length);
    }

    /// Returns whether to tell the guest about free space: it does not know of half of the buffer, or it knows of little and there is
    /// more. An incomplete message is not forwarded, so the guest may use up what it knows of before half of the buffer is forwarded.
    pub fn is_outdated(&self) -> bool {
        let unreported = self.forwarded.wrapping_sub(self.reported);
        let known = self
            .size
            .saturating_sub(self.received.wrapping_sub(self.reported));
        unreported >= self.size / 2 || unreported > 0 && known < self.size / 4
    }

    /// Returns `buf_alloc` and `fwd_cnt` for a packet to the guest.
    pub fn report(&mut self) -> (u32, u32) {
        self.reported = self.forwarded;
        (self.size, self.forwarded)
    }
}

/// What the guest can receive.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outbound {
    size: u32,
    forwarded: u32,
    sent: u32,
}

impl Outbound {
    /// Sets `buf_alloc` and `fwd_cnt` of a packet of the guest.
    pub fn update(&mut self, size: u32, forwarded: u32) {
        (self.size, self.forwarded) = (size, forwarded);
    }

    /// Returns the size of the guest's buffer in bytes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Returns how many bytes can be sent. None if the guest has shrunk its buffer below what it holds, or claims to have taken more than
    /// was sent.
    pub fn free(&self) -> u32 {
        let held = self.sent.wrapping_sub(self.forwarded);
        self.size.saturating_sub(held)
    }

    /// Counts `length` bytes that were sent.
    pub fn send(&mut self, length: u32) {
        self.sent = self.sent.wrapping_add(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_cannot_send_more_than_the_buffer_holds() {
        let mut credit = Inbound::new(100);
        credit.received = u32::MAX - 10;
        credit.forwarded = u32::MAX - 10;
        credit.reported = u32::MAX - 10;
        assert!(credit.receive(60));
        assert!(!credit.receive(41));
        assert!(!credit.receive(u32::MAX));
        assert!(credit.receive(40));
        assert!(!credit.receive(1));
        assert!(credit.receive(0));
        assert!(!credit.is_outdated(), "there is no more");
        // The guest knows of no free space at all.
        credit.forward(1);
        assert!(credit.is_outdated());
        credit.forward(49);
        assert_eq!(credit.report(), (100, 39));
        assert!(!credit.is_outdated());
        assert!(credit.receive(50));
        assert!(!credit.receive(1));
    }

    #[test]
    fn a_guest_that_knows_of_enough_free_space_is_not_told_of_each_byte() {
        let mut credit = Inbound::new(100);
        for _ in 0..49 {
            assert!(credit.receive(1));
            credit.forward(1);
            assert!(!credit.is_outdated());
        }
        assert!(credit.receive(1));
        credit.forward(1);
        assert!(credit.is_outdated());
    }

    #[test]
    fn a_guest_that_lies_about_its_buffer_receives_nothing() {
        let mut credit = Outbound::default();
        assert_eq!(credit.free(), 0);
        credit.update(100, 0);
        credit.send(80);
        assert_eq!(credit.free(), 20);
        // It shrinks its buffer below what it holds: CVE-2026-23069.
        credit.update(50, 0);
        assert_eq!(credit.free(), 0);
        // It claims to have taken more than it got.
        credit.update(100, 81);
        assert_eq!(credit.free(), 0);
        credit.update(u32::MAX, 80);
        assert_eq!(credit.free(), u32::MAX);
        credit.update(100, 80);
        assert_eq!(credit.free(), 100);
    }

    #[test]
    fn counters_wrap_around() {
        let mut credit = Outbound::default();
        credit.update(64, u32::MAX - 5);
        credit.send(u32::MAX - 5);
        assert_eq!(credit.free(), 64);
        credit.send(60);
        assert_eq!(credit.free(), 4);
        credit.update(64, 54);
        assert_eq!(credit.free(), 64);
    }
}
