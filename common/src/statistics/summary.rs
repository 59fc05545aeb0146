// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics for the log.

use std::time::Duration;

use super::{QueueStatistics, RequestStatistics, Statistics};

impl Statistics {
    /// Logs all counters: one line for each queue that was started, and one for each type of requests that it had.
    pub(crate) fn log(&self) {
        log::info!("statistics: front-ends so far: {}", self.front_ends());
        for (index, queue) in self.queues().iter() {
            log::info!("statistics: queue {index}: {}", queue.summary());
            for (name, request) in self.types.iter().zip(&queue.requests) {
                if let Some(summary) = request.summary() {
                    log::info!("statistics: queue {index}: {name}: {summary}");
                }
            }
        }
    }
}

impl QueueStatistics {
    fn summary(&self) -> String {
        let batches = self.batches.count();
        format!(
            "{} kicks, {} calls, {} calls suppressed; {batches} batches of {:.1} requests, {} of them found without a kick",
            self.kicks.get(),
            self.calls.get(),
            self.suppressed_calls.get(),
            self.taken.get() as f64 / batches.max(1) as f64,
            self.unkicked_batches.get(),
        )
    }
}

impl RequestStatistics {
    /// Returns a summary; `None` if there were no requests.
    fn summary(&self) -> Option<String> {
        let count = self.times.count();
        let mean = Duration::from_nanos(self.nanoseconds.get().checked_div(count)?);
        let most = |&(_, sum): &(Option<u64>, u64)| sum as f64 >= count as f64 * 0.99;
        let within = match self.times.cumulative().find(most) {
            Some((Some(bound), _)) => format!("99 % within {:?}", Duration::from_micros(bound)),
            _ => "more than 1 % took very long".to_owned(),
        };
        Some(format!(
            "{count} requests, {} bytes, {} errors; {mean:.1?} on average, {within}",
            self.bytes.get(),
            self.errors.get(),
        ))
    }
}
