// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics as the control socket sends them: plain numbers, one object a queue and one a type of requests.

use serde::Serialize;

use super::Statistics;

/// What was counted of one queue.
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

/// What was counted of one type of requests of a queue.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct RequestNumbers {
    queue: u16,
    r#type: &'static str,
    requests: u64,
    bytes: u64,
    errors: u64,
    /// The time that they took altogether.
    nanoseconds: u64,
}

impl Statistics {
    /// Front-ends that connected so far.
    pub(crate) fn front_ends_so_far(&self) -> u64 {
        self.front_ends()
    }

    /// The numbers of each queue that was started at least once, in the order of the queues.
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

    /// The numbers of each type of requests that a queue had.
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
