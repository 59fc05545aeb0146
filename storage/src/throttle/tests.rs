// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Limits and fairness, by a simulated clock.

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn limit(rate: u64, burst: u64) -> Option<Limit> {
    Some(Limit {
        rate,
        burst: Some(burst),
    })
}

/// A queue with requests of so many bytes, and a thread that comes so much too late each time.
#[derive(Clone, Copy, Debug)]
struct Source {
    bytes: u64,
    /// It has no more than this many requests in flight, each of which takes `latency`. 0 is no limit.
    depth: u64,
    latency: Duration,
    late: Duration,
}

const FLOOD: Source = Source {
    bytes: 4096,
    depth: 0,
    latency: Duration::ZERO,
    late: Duration::ZERO,
};

/// What became of a queue.
#[derive(Clone, Debug, Default)]
struct Served {
    requests: u64,
    bytes: u64,
    looks: u64,
    /// The longest that a request has waited.
    longest: Duration,
}

/// Lets the queues do what they may until `end`.
fn play(state: &mut State, sources: &[Source], end: Duration) -> Vec<Served> {
    let mut served = vec![Served::default(); sources.len()];
    let mut next = vec![Duration::ZERO; sources.len()];
    let mut since = vec![None; sources.len()];
    let mut under_way = vec![0; sources.len()];
    loop {
        let first = (0..sources.len()).min_by_key(|&queue| next[queue]);
        let Some(queue) = first.filter(|&queue| next[queue] < end) else {
            return served;
        };
        let now = next[queue];
        let (source, result) = (sources[queue], &mut served[queue]);
        result.looks += 1;
        loop {
            if source.depth > 0 && under_way[queue] == source.depth {
                state.leave(queue);
                under_way[queue] = 0;
                next[queue] = now + source.latency;
                break;
            }
            let came = *since[queue].get_or_insert(now);
            match state.start(queue, source.bytes, now) {
                Ok(()) => {
                    since[queue] = None;
                    under_way[queue] += 1;
                    result.requests += 1;
                    result.bytes += source.bytes;
                    result.longest = result.longest.max(now - came);
                }
                Err(wait) => {
                    assert!(wait >= SLICE);
                    next[queue] = now + wait + source.late;
                    break;
                }
            }
        }
    }
}

fn sum(served: &[Served]) -> (u64, u64) {
    served.iter().fold((0, 0), |(requests, bytes), one| {
        (requests + one.requests, bytes + one.bytes)
    })
}

#[test]
fn no_limits_are_no_throttle() {
    assert!(Throttle::new(None, None, 1).is_none());
    assert!(Throttle::new(limit(1, 1), None, 1).is_some());
    assert!(Throttle::new(None, limit(1, 1), 1).is_some());
}

#[test]
fn a_burst_goes_at_once_and_then_one_request_at_a_time() {
    let mut state = State::new(limit(100, 5), None, 1);
    for _ in 0..5 {
        assert_eq!(state.start(0, 0, SECOND), Ok(()));
    }
    for number in 0..100 {
        let now = SECOND + 10 * number * MS;
        assert_eq!(state.start(0, 0, now), Err(10 * MS));
        assert_eq!(state.start(0, 0, now + 9 * MS), Err(MS));
        assert_eq!(state.start(0, 0, now + 10 * MS), Ok(()));
    }
}

#[test]
fn a_pause_gives_no_more_than_the_burst() {
    let mut state = State::new(limit(100, 5), None, 1);
    for pause in [MS, SECOND, 1000 * SECOND] {
        let served = play(&mut state, &[FLOOD], pause);
        assert!(served[0].requests <= 5 + 100 * pause.as_secs() + 1);
        let mut at_once = 0;
        while state.start(0, 0, 10_000 * pause).is_ok() {
            at_once += 1;
        }
        assert_eq!(at_once, 5);
        state = State::new(limit(100, 5), None, 1);
    }
}

#[test]
fn a_request_beyond_the_burst_goes_and_those_behind_it_pay() {
    let mut state = State::new(None, limit(1_000_000, 10_000), 1);
    assert_eq!(state.start(0, 5_000_000, SECOND), Ok(()));
    let wait = state.start(0, 1, SECOND).unwrap_err();
    assert!(wait.abs_diff(4990 * MS) < MS, "{wait:?}");
    assert_eq!(state.start(0, 1, SECOND + wait), Ok(()));
}

#[test]
fn without_a_burst_it_is_a_tenth_of_a_second_and_never_less_than_a_hundredth_or_one_request() {
    let at_once = |limit| {
        let mut state = State::new(Some(limit), None, 1);
        (0..)
            .take_while(|_| state.start(0, 0, SECOND).is_ok())
            .count()
    };
    let limit = |rate, burst| Limit { rate, burst };
    assert_eq!(at_once(limit(1000, None)), 100);
    assert_eq!(at_once(limit(1000, Some(1))), 10);
    assert_eq!(at_once(limit(1000, Some(77))), 77);
    assert_eq!(at_once(limit(5, None)), 1);
    assert_eq!(at_once(limit(1, Some(1))), 1);
}

#[test]
fn what_moves_no_bytes_does_not_wait_for_bytes() {
    let mut state = State::new(None, limit(1000, 1000), 1);
    assert_eq!(state.start(0, 1 << 40, SECOND), Ok(()));
    assert!(state.start(0, 1, SECOND).is_err());
    assert_eq!(state.start(0, 0, SECOND), Ok(()));
}

#[test]
fn both_limits_hold() {
    for bytes in [1000, 100_000] {
        let mut state = State::new(limit(100, 10), limit(1_000_000, 100_000), 1);
        let source = Source { bytes, ..FLOOD };
        let served = play(&mut state, &[source], 10 * SECOND);
        let most = 1000.min(10_000_000 / bytes);
        assert!(
            served[0].requests.abs_diff(most) <= most / 50 + 10,
            "{served:?}"
        );
    }
}

#[test]
fn a_thread_that_comes_late_loses_nothing() {
    let mut state = State::new(limit(1000, 100), None, 1);
    let source = Source {
        late: 50 * MS,
        ..FLOOD
    };
    let served = play(&mut state, &[source], 10 * SECOND);
    assert!(served[0].requests >= 10_000, "{served:?}");
}

#[test]
fn a_thread_does_not_look_more_often_than_each_millisecond_or_than_it_must() {
    for (rate, most) in [(100_000, 1000), (1000, 1000), (10, 10), (1, 1)] {
        let mut state = State::new(limit(rate, 1), None, 2);
        let served = play(&mut state, &[FLOOD, FLOOD], 10 * SECOND);
        let (requests, _) = sum(&served);
        assert!(requests >= 9 * rate, "{rate}: {served:?}");
        for one in served {
            assert!(one.looks <= 30 * most + 10, "{rate}: {one:?}");
        }
    }
}

#[test]
fn floods_share_by_bytes_what_bytes_limit() {
    let sizes = [1 << 20, 4096, 65_536];
    let sources = sizes.map(|bytes| Source { bytes, ..FLOOD });
    for rate in [10_000_000, 100_000_000] {
        let mut state = State::new(None, limit(rate, rate / 10), 3);
        let served = play(&mut state, &sources, 10 * SECOND);
        for one in &served {
            let part = one.bytes as f64 / (10 * rate) as f64;
            assert!((0.28..0.4).contains(&part), "{rate}: {served:?}");
        }
    }
}

#[test]
fn floods_share_by_requests_what_requests_limit() {
    let sizes = [1 << 20, 4096];
    let sources = sizes.map(|bytes| Source { bytes, ..FLOOD });
    for rate in [100, 10_000, 50_000] {
        let mut state = State::new(limit(rate, rate / 10), None, 2);
        let served = play(&mut state, &sources, 10 * SECOND);
        for one in &served {
            let part = one.requests as f64 / (10 * rate) as f64;
            assert!((0.45..0.55).contains(&part), "{rate}: {served:?}");
        }
    }
}

#[test]
fn a_queue_with_one_request_at_a_time_is_not_starved_by_floods() {
    let rate = 10_000_000;
    let mut state = State::new(None, limit(rate, rate / 10), 4);
    let flood = Source {
        bytes: 1 << 20,
        ..FLOOD
    };
    let single = Source {
        depth: 1,
        latency: MS / 10,
        ..FLOOD
    };
    let served = play(&mut state, &[flood, single, flood, flood], 20 * SECOND);
    // Each waits for one request of each other queue at most.
    let one = Duration::from_secs_f64(f64::from(1 << 20) / rate as f64);
    assert!(served[1].longest <= 3 * one + 5 * MS, "{served:?}");
    assert!(served[1].requests >= 20 * 9, "{served:?}");
}

#[test]
fn a_queue_that_does_not_come_back_holds_nobody_up_for_long() {
    let mut state = State::new(limit(1000, 10), None, 2);
    while state.start(0, 0, SECOND).is_ok() {}
    assert!(state.start(1, 0, SECOND).is_err());
    // The second one has ended by what is no good way.
    let served = play(&mut state, &[FLOOD], 11 * SECOND);
    assert!(served[0].requests >= 9_900, "{served:?}");
}

#[test]
fn a_queue_that_leaves_holds_nobody_up() {
    let Some(throttle) = Throttle::new(limit(10, 1), None, 2) else {
        panic!("there is a limit");
    };
    assert_eq!(throttle.start(0, 0), Ok(()));
    assert!(throttle.start(1, 0).is_err());
    throttle.leave(1);
    throttle.leave(99);
    assert!(throttle.state().shares[1].waiting.is_none());
}

#[test]
fn a_queue_keeps_its_turn_between_two_requests() {
    let mut state = State::new(None, limit(1_000_000, 1_000_000), 2);
    assert_eq!(state.start(0, 500_000, SECOND), Ok(()));
    assert_eq!(state.start(1, 1000, SECOND), Ok(()));
    assert_eq!(state.start(0, 1000, SECOND), Err(SLICE));
    state.leave(1);
    assert_eq!(state.start(0, 1000, SECOND), Ok(()));
}

#[test]
fn no_number_is_too_large() {
    let mut state = State::new(limit(u64::MAX, u64::MAX), limit(1, u64::MAX), 1);
    assert_eq!(state.start(0, u64::MAX, SECOND), Ok(()));
    let mut state = State::new(limit(1, 1), limit(1, 1), 1);
    assert_eq!(state.start(0, u64::MAX, SECOND), Ok(()));
    assert!(state.start(0, u64::MAX, Duration::MAX / 2).is_err());
    assert_eq!(state.start(9, 1, SECOND), Ok(()));
}

fn source() -> impl Strategy<Value = Source> {
    let bytes = prop_oneof![Just(512), Just(4096), Just(1 << 20), 0..1u64 << 21];
    (bytes, 0..4u64, 0..20_000u64, 0..5000u64).prop_map(|(bytes, depth, latency, late)| Source {
        bytes,
        depth,
        latency: Duration::from_micros(latency + 1),
        late: Duration::from_micros(late),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn no_more_goes_than_the_limits_allow(
        sources in proptest::collection::vec(source(), 1..5),
        iops in 1..5_000u64,
        iops_burst in 1..2000u64,
        bps in 10_000..100_000_000u64,
        bps_burst in 1..10_000_000u64,
        end in 1..3000u32,
    ) {
        let queues = sources.len() as u16;
        let mut state = State::new(limit(iops, iops_burst), limit(bps, bps_burst), queues);
        let end = end * MS;
        let (requests, bytes) = sum(&play(&mut state, &sources, end));
        let allowed = |rate: u64, burst: u64| {
            (rate as f64 * end.as_secs_f64()) as u64 + burst.max(rate / 100) + 1
        };
        let largest = sources.iter().map(|source| source.bytes).max().unwrap_or(0);
        prop_assert!(requests <= allowed(iops, iops_burst));
        prop_assert!(bytes <= allowed(bps, bps_burst) + largest);
    }

    #[test]
    fn floods_get_equal_shares(
        sizes in proptest::collection::vec(prop_oneof![512..4096u64, 4096..1u64 << 20], 2..5),
        late in 0..2000u64,
        iops in 10..10_000u64,
        bps in 1_000_000..100_000_000u64,
    ) {
        let late = Duration::from_micros(late);
        let sources: Vec<_> = sizes.iter().map(|&bytes| Source { bytes, late, ..FLOOD }).collect();
        let limits = [Limit { rate: iops, burst: None }, Limit { rate: bps, burst: None }];
        let mut state = State::new(Some(limits[0]), Some(limits[1]), sizes.len() as u16);
        let served = play(&mut state, &sources, 10 * SECOND);
        let length = |bytes| limits[0].time(1).max(limits[1].time(bytes));
        let times = served.iter().zip(&sizes).map(|(one, &bytes)| one.requests as f64 * length(bytes).as_secs_f64());
        let times: Vec<_> = times.collect();
        let (least, most) = times.iter().fold((f64::MAX, 0f64), |(least, most), &time| (least.min(time), most.max(time)));
        let largest = sizes.iter().map(|&bytes| length(bytes)).max().unwrap_or_default();
        // What was bought by the burst at the start is theirs who came first.
        let slack = 2 * largest + LEAD + DEFAULT_BURST;
        prop_assert!(most - least <= slack.as_secs_f64(), "{times:?}");
    }
}
