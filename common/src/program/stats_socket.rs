// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--stats-socket`: sends statistics to every client, be it an HTTP client or one that only reads.

use std::sync::Arc;

use super::clients::{Answer, Protocol, Request};
use crate::statistics::Statistics;

/// Most bytes of a request.
const MOST_BYTES: usize = 8 << 10;

/// One request and one answer, by HTTP or without.
pub struct StatsProtocol(pub Arc<Statistics>);

impl Protocol for StatsProtocol {
    type State = ();
    const STAYS: bool = false;
    const FILES: bool = false;

    fn answer(&mut self, request: &mut Request, (): &mut ()) -> Answer {
        let bytes = &request.bytes;
        match request.is_last || ends(bytes) || bytes.len() > MOST_BYTES {
            true => Answer::Close(answer(bytes, &self.0)),
            false => Answer::Wait,
        }
    }
}

/// Whether an HTTP request ends here: with an empty line.
fn ends(request: &[u8]) -> bool {
    let has = |end: &[u8]| request.windows(end.len()).any(|bytes| bytes == end);
    has(b"\r\n\r\n") || has(b"\n\n")
}

/// The answer to an HTTP request, or to a client that sent nothing.
fn answer(request: &[u8], statistics: &Statistics) -> Vec<u8> {
    if request.is_empty() {
        return statistics.prometheus().into_bytes();
    }
    let refused =
        |status: &str| format!("HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n").into_bytes();
    if request.len() > MOST_BYTES {
        return refused("413 Content Too Large");
    }
    if !request.starts_with(b"GET ") {
        return refused("405 Method Not Allowed\r\nAllow: GET");
    }
    let page = statistics.prometheus();
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n",
        page.len()
    );
    (head + &page).into_bytes()
}
