// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics in the text format of Prometheus (version 0.0.4).

use std::fmt::{Display, Write};
use std::sync::Arc;

use super::{QueueStatistics, RequestStatistics, Statistics};

/// Prefix of the name of each metric.
const PREFIX: &str = "vhost_device";

/// Labels of a sample, besides that of the device.
type Labels<'a> = &'a [(&'a str, &'a dyn Display)];

/// A counter of a queue: name, help text, and value.
type QueueNumber = (&'static str, &'static str, fn(&QueueStatistics) -> u64);

/// A counter of a request type.
type RequestNumber = (&'static str, &'static str, fn(&RequestStatistics) -> u64);

const QUEUE_NUMBERS: [QueueNumber; 4] = [
    (
        "kicks_total",
        "Kicks that were received; several in quick succession count as one.",
        |queue| queue.kicks.get(),
    ),
    ("calls_total", "Calls that were sent.", |queue| {
        queue.calls.get()
    }),
    (
        "calls_suppressed_total",
        "Publications of completed requests without a call, because the driver did not want one.",
        |queue| queue.suppressed_calls.get(),
    ),
    (
        "batches_unkicked_total",
        "Batches of requests that were found without a kick.",
        |queue| queue.unkicked_batches.get(),
    ),
];

const REQUEST_NUMBERS: [RequestNumber; 3] = [
    (
        "requests_total",
        "Requests that were completed.",
        |request| request.times.count(),
    ),
    (
        "request_bytes_total",
        "Bytes of data that were transferred for requests.",
        |request| request.bytes.get(),
    ),
    (
        "request_errors_total",
        "Requests that were completed with an error.",
        |request| request.errors.get(),
    ),
];

impl Statistics {
    /// Returns all counters as a page for a Prometheus server.
    pub(crate) fn prometheus(&self) -> String {
        let queues: Vec<(u16, Arc<QueueStatistics>)> = self
            .queues()
            .iter()
            .map(|(index, queue)| (*index, Arc::clone(queue)))
            .collect();
        let mut page = Page {
            text: String::new(),
            device: self.device,
        };
        page.family("front_ends_total", "counter", "Front-ends that connected.");
        page.sample("front_ends_total", &[], self.front_ends());
        for (name, help, number) in QUEUE_NUMBERS {
            page.family(name, "counter", help);
            for (index, queue) in &queues {
                page.sample(name, &[("queue", index)], number(queue));
            }
        }
        let name = "batch_requests";
        page.family(name, "histogram", "Requests that were taken in one batch.");
        for (index, queue) in &queues {
            let buckets = queue.batches.cumulative();
            let buckets = buckets.map(|(bound, count)| (bound.map(|bound| bound as f64), count));
            page.histogram(name, &[("queue", index)], buckets, queue.taken.get() as f64);
        }
        let requests = || {
            queues.iter().flat_map(|(index, queue)| {
                let types = self.types.iter().zip(&queue.requests);
                types.map(move |(name, request)| (index, name, request))
            })
        };
        for (name, help, number) in REQUEST_NUMBERS {
            page.family(name, "counter", help);
            for (index, kind, request) in requests() {
                page.sample(name, &[("queue", index), ("type", kind)], number(request));
            }
        }
        let name = "request_duration_seconds";
        page.family(
            name,
            "histogram",
            "Time from taking a request until completing it. Types without requests are omitted.",
        );
        for (index, kind, request) in requests().filter(|(.., request)| request.times.count() > 0) {
            let buckets = request.times.cumulative();
            let buckets =
                buckets.map(|(bound, count)| (bound.map(|bound| bound as f64 / 1e6), count));
            let sum = request.nanoseconds.get() as f64 / 1e9;
            page.histogram(name, &[("queue", index), ("type", kind)], buckets, sum);
        }
        page.text
    }
}

struct Page {
    text: String,
    device: &'static str,
}

/// Writing to a string does not fail.
impl Page {
    /// Starts a metric. All its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {PREFIX}_{name} {help}");
        let _ = writeln!(self.text, "# TYPE {PREFIX}_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        let _ = write!(self.text, "{PREFIX}_{name}{{device=\"{}\"", self.device);
        for (label, value) in labels {
            let _ = write!(self.text, ",{label}=\"{value}\"");
        }
        let _ = writeln!(self.text, "}} {value}");
    }

    /// Adds the samples of a histogram: for each bucket its bound, and how many values do not exceed it.
    fn histogram(
        &mut self,
        name: &str,
        labels: Labels<'_>,
        buckets: impl Iterator<Item = (Option<f64>, u64)>,
        sum: f64,
    ) {
        let mut total = 0;
        for (bound, count) in buckets {
            let bound = bound.map_or_else(|| "+Inf".to_owned(), |bound| bound.to_string());
            let mut labels = labels.to_vec();
            labels.push(("le", &bound));
            self.sample(&format!("{name}_bucket"), &labels, count);
            total = count;
        }
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, total);
    }
}
