// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls a sleeping driver shortly before its last request is done, so that it wakes up meanwhile.

/// Most requests left when the driver is called.
const MOST: u16 = 32;
/// How often a driver that has needed no early call must be late before it gets one. A call in the middle of a batch interrupts the
/// device if both share a processor.
const LATE: i16 = 16;
/// How many more times it must be late if the earliest call was of no use.
const PAUSE: i16 = 1000;

/// Decides when the driver of one queue is called early. It learns how early: earlier if there was nothing more to do when the last
/// request was done, and later if the driver had made more available by then.
#[derive(Debug, Default)]
pub(super) struct EarlyCall {
    /// How many requests are left when the driver is called.
    length: u16,
    /// How many of those are still left, once it has been called.
    left: Option<u16>,
    /// How often the driver was late since an early call was last not needed, or of no use.
    late: i16,
}

impl EarlyCall {
    /// Whether it begins now. `has_more_than` says whether more requests wait than a number.
    #[inline]
    pub fn begins(&mut self, has_more_than: impl Fn(u16) -> bool) -> bool {
        let begins = self.length > 0
            && self.left.is_none()
            && !has_more_than(self.length)
            && has_more_than(0);
        if begins {
            self.left = Some(self.length);
        }
        begins
    }

    /// Another request was there to be taken, or none, and some are done that the driver was not called for.
    #[inline]
    pub fn took(&mut self, another: bool, has_completed: bool) {
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

    /// Lets a driver have `depth` requests done, `rounds` times, which makes as many available again when `reaction` more were done
    /// after its call. Gives how many were left at the call of each round.
    fn calls(rounds: usize, depth: u16, reaction: u16) -> Vec<u16> {
        let mut early_call = EarlyCall::default();
        let play = |_| {
            let (mut left, mut call) = (depth, None);
            loop {
                if left < depth && early_call.begins(|count| left > count) {
                    assert_eq!(call, None);
                    call = Some(left);
                }
                let reacted = call.is_some_and(|at| at - left >= reaction);
                early_call.took(left > 0 || reacted, call != Some(left));
                if left == 0 {
                    return call.unwrap_or(0);
                }
                left -= 1;
            }
        };
        (0..rounds).map(play).collect()
    }

    #[test]
    fn a_driver_is_called_as_early_as_it_needs() {
        for reaction in [1, 5, 12, 25] {
            for left in calls(200, 32, reaction).split_off(100) {
                assert!(left.abs_diff(reaction) <= 1, "{reaction}: {left}");
            }
        }
    }

    #[test]
    fn a_driver_that_goes_on_at_once_is_seldom_called_before_all_is_done() {
        let early = calls(1000, 32, 0).into_iter().filter(|left| *left > 0);
        assert!(early.count() <= 1000 / LATE as usize);
    }

    #[test]
    fn the_head_start_has_an_end_and_is_seldom_tried_where_it_does_not_help() {
        for (depth, most) in [(64, MOST), (4, 3), (1, 0)] {
            let calls = calls(10_000, depth, 1000);
            assert_eq!(calls.iter().max(), Some(&most), "{depth}");
            let early = calls.into_iter().filter(|left| *left > 0);
            assert!(early.count() <= 500, "{depth}");
        }
    }
}
