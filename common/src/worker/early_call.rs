// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls a sleeping driver shortly before its last request completes, so that the driver wakes up meanwhile.

/// The largest number of requests left at an early call.
const MOST: u16 = 32;
/// How often a driver must be late before it gets its first early call. A call in the middle of a batch interrupts the device if both
/// share a processor.
const LATE: i16 = 16;
/// How many more times a driver must be late once even the earliest call did not help.
const PAUSE: i16 = 1000;

/// Decides when to call the driver of one queue early. Learns how early: earlier if the queue was empty when the last request
/// completed, later if the driver had made more available by then.
#[derive(Debug, Default)]
pub(super) struct EarlyCall {
    /// How many requests are left at the early call; 0 for no early call.
    length: u16,
    /// How many of those are still to be taken, after the early call.
    left: Option<u16>,
    /// How often the driver was late since an early call was last unnecessary or useless.
    late: i16,
}

impl EarlyCall {
    /// Returns whether to call the driver now. `has_more_than` tells whether more than a number of requests are available.
    #[inline]
    pub fn should_call(&mut self, has_more_than: impl Fn(u16) -> bool) -> bool {
        let calls = self.length > 0
            && self.left.is_none()
            && !has_more_than(self.length)
            && has_more_than(0);
        if calls {
            self.left = Some(self.length);
        }
        calls
    }

    /// Records a take: whether it found a request, and whether completed requests wait for a call.
    #[inline]
    pub fn note_take(&mut self, another: bool, has_completed: bool) {
        match self.left {
            Some(left @ 1..) if another => self.left = Some(left - 1),
            Some(_) => {
                self.left = None;
                self.learn(another);
            }
            None if self.length == 0 && has_completed && !another => self.learn(false),
            None => {}
        }
    }

    fn learn(&mut self, in_time: bool) {
        if in_time {
            self.length = self.length.saturating_sub(1);
            self.late = 0;
        } else if self.length == MOST {
            *self = Self {
                late: -PAUSE,
                ..Self::default()
            };
        } else if self.length > 0 || self.late == LATE {
            self.length += 1;
        } else {
            self.late += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a driver that submits `depth` requests, `rounds` times, and submits the next ones when `reaction` more have completed after
    /// its call. Returns how many were left at the call of each round.
    fn calls(rounds: usize, depth: u16, reaction: u16) -> Vec<u16> {
        let mut early_call = EarlyCall::default();
        let play = |_| {
            let (mut left, mut call) = (depth, None);
            loop {
                if left < depth && early_call.should_call(|count| left > count) {
                    assert_eq!(call, None);
                    call = Some(left);
                }
                let reacted = call.is_some_and(|at| at - left >= reaction);
                early_call.note_take(left > 0 || reacted, call != Some(left));
                if left == 0 {
                    return call.unwrap_or(0);
                }
                left -= 1;
            }
        };
        (0..rounds).map(play).collect()
    }

    #[test]
    fn the_call_is_as_early_as_the_driver_needs() {
        for reaction in [1, 5, 12, 25] {
            for left in calls(200, 32, reaction).split_off(100) {
                assert!(left.abs_diff(reaction) <= 1, "{reaction}: {left}");
            }
        }
    }

    #[test]
    fn a_fast_driver_is_seldom_called_early() {
        let early = calls(1000, 32, 0).into_iter().filter(|left| *left > 0);
        assert!(early.count() <= 1000 / LATE as usize);
    }

    #[test]
    fn early_calls_are_bounded_and_seldom_retried_where_they_do_not_help() {
        for (depth, most) in [(64, MOST), (4, 3), (1, 0)] {
            let calls = calls(10_000, depth, 1000);
            assert_eq!(calls.iter().max(), Some(&most), "{depth}");
            let early = calls.into_iter().filter(|left| *left > 0);
            assert!(early.count() <= 500, "{depth}");
        }
    }
}
