// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end `pulse`, with a sound server that does what the test says, and with PulseAudio.

use std::time::{Duration, Instant};

use vhost_device_tests::ended::assert_refused;
use vhost_device_tests::process;

use crate::server::{Manners, Server};
use crate::{
    CONTROL, Device, Driver, EVENT, NOT_SUPP, OK, PATIENCE, PCM_INFO, PREPARE, Params, QUIET,
    RELEASE, RX, START, STOP, TX, XRUN, assert_same, noise, words,
};

/// Parameters with a large buffer: the server may take long.
const PATIENT: Params = Params {
    buffer: 1920 * 60,
    ..Params::USUAL
};

/// A server, and a device that is connected to it.
struct Pair {
    server: Server,
    device: Device,
}

impl Pair {
    fn start(manners: Manners, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::start(&directory.path().join("server"), manners);
        let mut all = vec!["--backend=pulse", "--pulse-server=DIR/server"];
        all.extend(arguments);
        let device = Device::start_in(directory, &all);
        Self { server, device }
    }
}

fn play(driver: &mut Driver, count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for tag in 0..count {
        let period = noise(1920, tag.into());
        driver.play(0, &period, tag);
        bytes.extend(period);
    }
    bytes
}

#[test]
fn a_server_gets_exactly_what_the_guest_plays() {
    let pair = Pair::start(
        Manners::Eager,
        &["--streams=output,formats=u8+s16+s24-3+s24+s32+float"],
    );
    let mut driver = pair.device.connect();
    for (number, (format, size)) in [(4, 1), (5, 2), (11, 3), (15, 4), (17, 4), (19, 4)]
        .into_iter()
        .enumerate()
    {
        let period = 480 * 2 * size;
        let params = Params {
            format,
            period,
            buffer: period * 4,
            ..Params::USUAL
        };
        driver.prepare(0, &params);
        let bytes = noise(period as usize * 30, 1);
        let mut chunks = bytes.chunks(period as usize);
        for chunk in chunks.by_ref().take(4) {
            driver.play(0, chunk, 0);
        }
        driver.commands(&[START], 0);
        for _ in 0..30 {
            let done = driver.wait(TX);
            assert_eq!((done.status, done.used), (OK, 8));
            if let Some(chunk) = chunks.next() {
                driver.play(0, chunk, 0);
            }
        }
        driver.commands(&[STOP, RELEASE], 0);
        let stream = pair.server.wait(number as u32, |stream| stream.is_deleted);
        assert_same(&stream.played, &bytes);
        assert_eq!((stream.spec.channels, stream.spec.sample_rate), (2, 48_000));
        assert_eq!(stream.spec.format.bytes_per_sample() as u32, size);
        assert!(
            stream.was_drained,
            "the end of the sound is still to be heard"
        );
    }
}

#[test]
fn the_server_is_the_clock() {
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    driver.prepare(0, &PATIENT);
    let bytes = play(&mut driver, 20);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    // Nothing was asked for.
    driver.assert_quiet(TX);
    pair.server.ask(0, 1920);
    assert_eq!(driver.wait(TX).tag, 0);
    driver.assert_quiet(TX);
    // A buffer is finished when its last byte was asked for.
    pair.server.ask(0, 1916);
    driver.assert_quiet(TX);
    pair.server.ask(0, 4);
    assert_eq!(driver.wait(TX).tag, 1);
    pair.server.ask(0, 1920 * 3);
    for tag in 2..5 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    assert_eq!(driver.take(TX), None);
    // A stop keeps what the server has.
    driver.commands(&[STOP], 0);
    let stream = pair.server.wait(0, |stream| stream.is_corked);
    assert_same(&stream.played, &bytes[..1920 * 5]);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    pair.server.ask(0, 1920);
    assert_eq!(driver.wait(TX).tag, 5);
    // The guest gives up what it has queued: nothing is left to be heard.
    driver.commands(&[STOP, RELEASE], 0);
    let stream = pair.server.wait(0, |stream| stream.is_deleted);
    assert!(!stream.was_drained);
}

#[test]
fn the_guest_records_exactly_what_the_server_sends() {
    let pair = Pair::start(Manners::Told, &["--streams=input"]);
    let mut driver = pair.device.connect();
    driver.prepare(0, &Params::USUAL);
    for tag in 0..30 {
        driver.record(0, 1920, tag);
    }
    driver.commands(&[START], 0);
    let stream = pair.server.wait(0, |stream| !stream.is_corked);
    assert_eq!((stream.is_record, stream.target), (true, 1920));
    let sound = noise(1920 * 30, 7);
    // In pieces of any size.
    for piece in sound.chunks(1000) {
        pair.server.record(0, piece);
    }
    let mut recorded = Vec::new();
    for tag in 0..30 {
        let done = driver.wait(RX);
        assert_eq!((done.tag, done.status, done.used), (tag, OK, 1928));
        recorded.extend(done.data);
    }
    assert_same(&recorded, &sound);
}

#[test]
fn an_overrun_drops_the_oldest_sound_once() {
    let pair = Pair::start(Manners::Told, &["--streams=input"]);
    let mut driver = pair.device.connect();
    driver.listen(4);
    driver.prepare(0, &Params::USUAL);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    let sound = noise(1920 * 20, 7);
    // The server sends a fragment a period.
    for piece in sound.chunks(1920) {
        pair.server.record(0, piece);
        std::thread::sleep(Params::PERIOD);
    }
    assert_eq!(driver.event(), (XRUN, 0));
    driver.assert_quiet(EVENT);
    for tag in 0..8 {
        driver.record(0, 1920, tag);
    }
    let mut recorded = Vec::new();
    for _ in 0..8 {
        recorded.extend(driver.wait(RX).data);
    }
    assert_same(&recorded, &sound[1920 * 12..]);
    assert_eq!(driver.take_event(), None);
    // The guest has recorded meanwhile: this is another overrun.
    for piece in sound.chunks(1920) {
        pair.server.record(0, piece);
    }
    assert_eq!(driver.event(), (XRUN, 0));
    driver.assert_quiet(EVENT);
}

#[test]
fn an_underrun_of_the_server_is_an_event() {
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    driver.listen(4);
    driver.prepare(0, &PATIENT);
    play(&mut driver, 1);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    pair.server.ask(0, 3840);
    driver.wait(TX);
    driver.assert_quiet(TX);
    assert_eq!(driver.take_event(), None, "the server still has sound");
    pair.server.underflow(0);
    assert_eq!(driver.event(), (XRUN, 0));
    // What was asked for is sent when it is there.
    driver.play(0, &noise(1920, 9), 9);
    assert_eq!(driver.wait(TX).tag, 9);
}

#[test]
fn the_latency_is_that_of_the_server() {
    let pair = Pair::start(Manners::Told, &[]);
    pair.server.set_latency(Duration::from_millis(40));
    let mut driver = pair.device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 10);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    let deadline = Instant::now() + PATIENCE;
    let mut begin = Instant::now();
    while pair.device.stream(0)["latency-frames"] == 0 {
        assert!(Instant::now() < deadline);
        begin = Instant::now();
    }
    pair.server.ask(0, 1920);
    let done = driver.wait(TX);
    // 40 ms of the device, 10 ms in the server's buffer, and the 10 ms that were just sent, without the time since then.
    let second = 192_000;
    let since = begin.elapsed().as_millis() as u32 * second / 1000;
    let all = 60 * second / 1000;
    assert!(done.latency <= all, "{}", done.latency);
    let least = all.saturating_sub(since + second / 1000);
    assert!(done.latency >= least, "{} {least}", done.latency);
    assert_eq!(done.latency % 4, 0);
}

#[test]
fn the_latency_is_known_at_once_and_stands_still_in_a_pause() {
    /// A second.
    const FRAMES: u64 = 48_000;
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    let params = Params {
        period: 1920 * 100,
        buffer: 1920 * 400,
        ..Params::USUAL
    };
    driver.prepare(0, &params);
    driver.play(0, &noise(1920 * 100, 0), 0);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    let begin = Instant::now();
    pair.server.ask(0, 1920 * 100);
    let latency = u64::from(driver.wait(TX).latency / 4);
    if begin.elapsed() < Duration::from_millis(40) {
        assert!((FRAMES - 1920..=FRAMES).contains(&latency), "{latency}");
    }
    driver.commands(&[STOP], 0);
    let frames = || pair.device.stream(0)["latency-frames"].as_u64().unwrap();
    let before = frames();
    std::thread::sleep(2 * QUIET);
    assert_eq!(frames(), before);
}

/// The guest notices nothing but silence, and hears the server again when it is back.
#[test]
fn a_stream_goes_on_without_its_server() {
    let Pair { server, device } = Pair::start(Manners::Eager, &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 20);
    driver.commands(&[START], 0);
    server.wait(0, |stream| stream.played.len() == 1920 * 20);
    for _ in 0..20 {
        driver.wait(TX);
    }
    drop(server);
    play(&mut driver, 30);
    let begin = Instant::now();
    for tag in 0..30 {
        let done = driver.wait(TX);
        assert_eq!((done.tag, done.status), (tag, OK));
    }
    assert!(
        begin.elapsed() >= Params::PERIOD * 25,
        "{:?}",
        begin.elapsed()
    );
    // All commands work meanwhile.
    driver.commands(&[STOP, RELEASE], 0);
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 4);
    driver.commands(&[START], 0);
    driver.wait(TX);
    let server = Server::start(&device.path("server"), Manners::Eager);
    let stream = server.wait(0, |stream| !stream.is_corked);
    assert!(stream.played.is_empty());
    driver.play(0, &noise(1920, 77), 77);
    server.wait(0, |stream| stream.played.ends_with(&noise(1920, 77)));
    let log = device.program.stderr();
    assert!(
        log.contains("the connection to the sound server has ended"),
        "{log}"
    );
    assert!(
        log.matches("connected to the sound server at").count() == 2,
        "{log}"
    );
}

#[test]
fn a_link_to_the_socket_of_a_server_can_be_named() {
    let directory = tempfile::tempdir().unwrap();
    let real = directory.path().join("real");
    std::fs::create_dir(&real).unwrap();
    let links = directory.path().join("links");
    std::fs::create_dir(&links).unwrap();
    let server = Server::start(&real.join("server"), Manners::Told);
    std::os::unix::fs::symlink(real.join("server"), links.join("server")).unwrap();
    let arguments = ["--backend=pulse", "--pulse-server=DIR/links/server"];
    let device = Device::start_in(directory, &arguments);
    let mut driver = device.connect();
    drop(server);
    driver.prepare(0, &Params::USUAL);
    // The program connects again, in its sandbox.
    let server = Server::start(&device.path("real/server"), Manners::Told);
    server.wait(0, |stream| stream.is_corked);
}

#[test]
fn a_server_that_does_not_move_a_stream_does_not_hold_the_guest() {
    for manners in [Manners::Told, Manners::Silent, Manners::Refusing] {
        let pair = Pair::start(manners, &[]);
        let mut driver = pair.device.connect();
        let begin = Instant::now();
        driver.prepare(0, &Params::USUAL);
        driver.prepare(1, &Params::USUAL);
        play(&mut driver, 20);
        for tag in 0..20 {
            driver.record(1, 1920, tag);
        }
        driver.commands(&[START], 0);
        driver.commands(&[START], 1);
        assert!(begin.elapsed() < Duration::from_secs(1));
        for queue in [TX, RX] {
            for tag in 0..20 {
                let done = driver.wait(queue);
                assert_eq!((done.tag, done.status), (tag, OK), "{manners:?}");
            }
        }
        assert!(begin.elapsed() >= Params::PERIOD * 20);
        let begin = Instant::now();
        for stream in [0, 1] {
            driver.commands(&[STOP, RELEASE, PREPARE, RELEASE], stream);
        }
        assert!(begin.elapsed() < Duration::from_secs(1));
        driver.front_end.stop(CONTROL).unwrap();
    }
}

/// ALSA in the guest gives up if no period ends within 1.1 buffers.
#[test]
fn a_stalled_server_does_not_fail_a_guest_with_two_periods() {
    const BYTES: u32 = 1920 * 16;
    const BUFFER: Duration = Duration::from_millis(320);
    let params = Params {
        period: BYTES,
        buffer: 2 * BYTES,
        ..Params::USUAL
    };
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    driver.prepare(0, &params);
    let sound = noise(BYTES as usize, 3);
    driver.play(0, &sound, 0);
    driver.play(0, &sound, 1);
    // In the second run, the server moves the stream before it stalls.
    for run in 0..2 {
        let mut last = Instant::now();
        driver.commands(&[START], 0);
        pair.server.wait(0, |stream| !stream.is_corked);
        if run == 1 {
            pair.server.ask(0, BYTES);
        }
        for number in 0..4 {
            let tag = driver.wait(TX).tag;
            let gap = last.elapsed();
            last = Instant::now();
            assert!(
                gap < BUFFER * 11 / 10,
                "run {run}, buffer {number}: {gap:?}"
            );
            driver.play(0, &sound, tag);
        }
        driver.commands(&[STOP], 0);
        pair.server.wait(0, |stream| stream.is_corked);
    }
}

#[test]
fn a_stream_that_the_server_ends_goes_on_in_silence() {
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 10);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    pair.server.kill(0);
    for tag in 0..10 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    driver.commands(&[STOP, RELEASE, PREPARE], 0);
    pair.server.wait(1, |stream| stream.is_corked);
}

#[test]
fn a_stream_that_the_server_ends_is_created_again() {
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    driver.prepare(0, &PATIENT);
    driver.commands(&[START], 0);
    pair.server.wait(0, |stream| !stream.is_corked);
    pair.server.kill(0);
    pair.server.wait(1, |stream| !stream.is_corked);
    let sound = noise(1920, 5);
    driver.play(0, &sound, 0);
    pair.server.ask(1, 1920);
    pair.server
        .wait(1, |stream| stream.played.ends_with(&sound));
}

#[test]
fn a_server_that_sends_nonsense_is_left() {
    let pair = Pair::start(Manners::Told, &[]);
    let mut driver = pair.device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    let mut random = fastrand::Rng::with_seed(5);
    let mut head = |length: u32, channel: u32| {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend(channel.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.extend((0..length.min(4096)).map(|_| random.u8(..)));
        bytes
    };
    for bytes in [
        vec![0xff; 100],
        head(u32::MAX, 0),
        head(100, u32::MAX),
        head(0, u32::MAX),
        head(4096, 1),
        head(3, 1),
        head(1 << 21, 1),
        vec![0; 19],
    ] {
        pair.server.send_raw(&bytes);
        std::thread::sleep(Duration::from_millis(20));
        driver.assert_alive();
    }
    play(&mut driver, 4);
    driver.record(1, 1920, 0);
    driver.commands(&[START], 0);
    driver.commands(&[START], 1);
    for queue in [TX, RX] {
        assert_eq!(driver.wait(queue).tag, 0);
    }
    std::thread::sleep(QUIET);
}

#[test]
fn a_server_with_an_impossible_latency_is_harmless() {
    for offsets in [(i64::MAX, i64::MIN), (i64::MIN, i64::MAX)] {
        let pair = Pair::start(Manners::Told, &[]);
        pair.server.set_offsets(offsets);
        pair.server.set_latency(Duration::MAX);
        let mut driver = pair.device.connect();
        for stream in [0, 1] {
            driver.prepare(stream, &PATIENT);
            driver.commands(&[START], stream);
        }
        // It is asked for soon after the start.
        std::thread::sleep(2 * QUIET);
        for stream in [0, 1] {
            assert!(pair.device.stream(stream)["latency-frames"].is_u64());
            driver.commands(&[STOP], stream as u32);
        }
    }
}

#[test]
fn a_server_that_stands_still_keeps_one_earlier_stream() {
    let pair = Pair::start(Manners::Endless, &[]);
    let mut driver = pair.device.connect();
    for channel in 0..4 {
        driver.prepare(0, &Params::USUAL);
        driver.play(0, &noise(1920, 1), 0);
        driver.commands(&[START], 0);
        pair.server.wait(channel, |stream| !stream.is_corked);
        pair.server.ask(channel, 1920);
        driver.wait(TX);
        driver.commands(&[STOP, RELEASE], 0);
        let stream = pair.server.wait(channel, |stream| stream.was_drained);
        assert!(!stream.is_deleted);
        if let Some(earlier) = channel.checked_sub(1) {
            pair.server.wait(earlier, |stream| stream.is_deleted);
        }
    }
}

#[test]
fn streams_offer_what_the_server_has() {
    let pair = Pair::start(
        Manners::Told,
        &["--streams=output,formats=s8+s16+float64", "--streams=input"],
    );
    let mut driver = pair.device.connect();
    let (_, info) = driver.request(&words(&[PCM_INFO, 0, 1, 32]), 36);
    assert_eq!(info[8..16], (1u64 << 5).to_le_bytes());
    let wrong = Params {
        format: 3,
        ..Params::USUAL
    };
    assert_eq!(driver.status(&wrong.request(0)), NOT_SUPP);
    assert_eq!(pair.server.count(), 0);
}

#[test]
fn a_server_that_cannot_be_used_is_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server");
    let refused = |arguments: &[&str], word: &str| {
        let mut command = process::command("vhost-device-sound").unwrap();
        command
            .env_remove("RUST_LOG")
            .env_remove("PULSE_SERVER")
            .env("XDG_RUNTIME_DIR", directory.path())
            .arg("--socket-path=/nonexistent/socket")
            .arg("--backend=pulse")
            .args(arguments);
        assert_refused(&mut command, 1, word);
    };
    refused(&[], "there is no PulseAudio server");
    let named = process::option("pulse-server", &path);
    let named = named.to_str().unwrap();
    refused(&[named], "No such file");
    let server = Server::start(&path, Manners::Closed);
    refused(&[named], "Access failure");
    drop(server);
    let _server = Server::start(&path, Manners::Told);
    refused(
        &[named, "--streams=output,formats=s8"],
        "none of the formats",
    );
    refused(&[named, "--playback-file=/tmp/x"], "needs --backend=file");
}

#[test]
fn the_environment_names_a_server_by_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server");
    let _server = Server::start(&path, Manners::Closed);
    let path = path.to_str().unwrap();
    for (value, word) in [
        (format!("unix:{path}"), "Access failure"),
        (path.to_owned(), "Access failure"),
        ("tcp:localhost".to_owned(), "PULSE_SERVER=tcp:localhost"),
    ] {
        let mut command = process::command("vhost-device-sound").unwrap();
        command
            .env_remove("RUST_LOG")
            .env_remove("XDG_RUNTIME_DIR")
            .env("PULSE_SERVER", &value)
            .arg("--socket-path=/nonexistent/socket")
            .arg("--backend=pulse");
        assert_refused(&mut command, 1, word);
    }
}

#[test]
fn the_usual_back_end_is_a_server_that_answers_or_none() {
    let directory = tempfile::tempdir().unwrap();
    let pulse = directory.path().join("pulse");
    std::fs::create_dir(&pulse).unwrap();
    let start = |name: &str| {
        let socket = directory.path().join(name);
        let mut command = process::command("vhost-device-sound").unwrap();
        command
            .env_remove("RUST_LOG")
            .env_remove("PULSE_SERVER")
            .env("XDG_RUNTIME_DIR", directory.path())
            .arg(process::option("socket-path", &socket));
        process::Program::serve(&mut command, &socket).unwrap()
    };
    let without = start("one").stderr();
    assert!(
        without.contains("there is no PulseAudio server"),
        "{without}"
    );
    assert!(
        without.contains("discarding what the guest plays"),
        "{without}"
    );
    let _server = Server::start(&pulse.join("native"), Manners::Told);
    let with = start("two").stderr();
    assert!(with.contains("connected to the sound server at"), "{with}");
}
