// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics for the control socket: one object per queue, and one per request type of a queue.

use serde::Serialize;

use super::Statistics;

/// The counters of one queue.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct QueueNumbers {
    pub queue: u16,
    kicks: u64,
    calls: u64,
    suppressed_calls: u64,
    batches: u64,
    unkicked_batches: u64,
    requests: u64,
}

/// The counters of one request type of a queue.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct RequestNumbers {
    queue: u16,
    r#type: &'static str,
    requests: u64,
    bytes: u64,
    errors: u64,
    /// Sum of the durations.
    nanoseconds: u64,
}

impl Statistics {
    /// Returns the counters of each queue that was started at least once, in ascending order.
    pub(crate) fn queue_numbers(&self) -> Vec<QueueNumbers> {
        let queues = self.queues();
        let numbers = queues.iter().map(|(index, queue)| QueueNumbers {
            queue: *index,
            kicks: queue.kicks.get(),
            calls: queue.calls.get(),
            suppressed_calls: queue.suppressed_calls.get(),
            batches: queue.batches.count(),
            unkicked_batches: queue.unkicked_batches.get(),
            requests: queue.taken.get(),
        });
        numbers.collect()
    }

    /// Returns the counters of each request type that occurred on a queue.
    pub(crate) fn request_numbers(&self) -> Vec<RequestNumbers> {
        let queues = self.queues();
        let requests = queues.iter().flat_map(|(index, queue)| {
            let types = self.types.iter().zip(&queue.requests);
            types.map(move |(name, request)| RequestNumbers {
                queue: *index,
                r#type: name,
                requests: request.times.count(),
                bytes: request.bytes.get(),
                errors: request.errors.get(),
                nanoseconds: request.nanoseconds.get(),
            })
        });
        requests.filter(|numbers| numbers.requests > 0).collect()
    }
}
