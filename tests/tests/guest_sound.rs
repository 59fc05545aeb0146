// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A sound card in a guest: Linux's driver and ALSA's programs in User-Mode Linux, and once in QEMU. What they play and record is
//! compared byte by byte.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::{Machine, Qmp};
use vhost_device_tests::process::{Program, Signal, command, option};
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{self, Device};

/// VIRTIO's number of sound devices.
const SOUND: u32 = 25;

/// A guest that hangs is ended.
const PATIENCE: Duration = Duration::from_secs(240);

/// A stream that can do everything. `DIRECTION` is replaced.
const ALL: &str = "--streams=DIRECTION,channels=1-8,formats=s8+u8+s16+s24-3+s24+s32+float+float64,rates=8000+11025+16000+22050+32000+44100+48000+64000+88200+96000+176400+192000";

/// Formats with ALSA's names, and the size of a sample.
const FORMATS: [(&str, usize); 8] = [
    ("S8", 1),
    ("U8", 1),
    ("S16_LE", 2),
    ("S24_3LE", 3),
    ("S24_LE", 4),
    ("S32_LE", 4),
    ("FLOAT_LE", 4),
    ("FLOAT64_LE", 8),
];
const RATES: [usize; 12] = [
    8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000, 176_400, 192_000,
];

/// A back-end, and the directory that it shares with a guest.
struct BackEnd {
    work: TempDir,
    program: Program,
}

impl BackEnd {
    /// Starts the back-end with these arguments, in which `DIR` is the directory.
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(uml::work().unwrap(), arguments)
    }

    fn start_in(work: TempDir, arguments: &[&str]) -> Self {
        // The kernel is built before the clock starts.
        uml::kernel::prepare().unwrap();
        let socket = work.path().join("socket");
        let mut command = command("vhost-device-sound").unwrap();
        command.env_remove("RUST_LOG");
        let place = work.path().to_str().unwrap();
        command.args(arguments.iter().map(|text| text.replace("DIR", place)));
        command.arg(option("socket-path", &socket));
        command.arg(option("control-socket", work.path().join("control")));
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { work, program }
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join(name)).unwrap()
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// Runs a script in a guest with this device. The script stops at the first error.
    fn guest(&mut self, script: &str) {
        let socket = self.path().join("socket");
        let device = Device {
            socket: &socket,
            id: SOUND,
        };
        let script = format!("set -e\n{script}");
        let status = front_end::run(&[device], script, self.work.path(), PATIENCE).unwrap();
        assert_eq!(status, 0, "status of the script");
        assert!(self.program.status().unwrap().is_none());
    }

    fn query(&self) -> Value {
        let mut client = Qmp::connect(&self.path().join("control")).unwrap();
        client.execute("query-streams", json!({})).unwrap()
    }
}

/// Returns noise of whole samples. Those of 24 bits in 4 bytes are sign-extended.
fn samples(format: &str, length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    if format == "S24_LE" {
        for sample in bytes.chunks_exact_mut(4) {
            sample[3] = if sample[2] & 0x80 == 0 { 0 } else { 0xff };
        }
    }
    bytes
}

#[track_caller]
fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: the first byte that differs");
    assert_eq!(seen.len(), expected.len(), "{what}: length");
}

/// Frames of a period, for a rate. ALSA gives up if no period elapses within the time of a buffer, so that buffers must be longer than
/// the delays of a busy machine.
const fn period(rate: usize) -> usize {
    rate / 25
}

/// Periods of a buffer.
const PERIODS: usize = 8;

/// All combinations of formats and rates, with 1 to 8 channels: name, rate, channels, bytes of a period.
fn combinations() -> impl Iterator<Item = (&'static str, usize, usize, usize)> {
    let numbers = 0..FORMATS.len() * RATES.len();
    numbers.map(|number| {
        let (format, size) = FORMATS[number % FORMATS.len()];
        let rate = RATES[number / FORMATS.len()];
        let channels = 1 + number * 5 % 8;
        (format, rate, channels, size * channels * period(rate))
    })
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_plays_all_formats_and_rates_exactly() {
    let stream = ALL.replace("DIRECTION", "output");
    let mut back_end = BackEnd::start(&[
        "--backend=file",
        "--playback-file=DIR/played",
        "--file-clock=free",
        &stream,
    ]);
    let mut script = String::new();
    let mut expected = Vec::new();
    for (number, (format, rate, channels, period)) in combinations().enumerate() {
        let bytes = samples(format, period * 9, number as u64);
        fs::write(back_end.path().join(format!("{number}.raw")), &bytes).unwrap();
        let frames = self::period(rate);
        script += &format!(
            "aplay -q -D hw:0,0 -t raw -f {format} -r {rate} -c {channels} --period-size={frames} --buffer-size={} --samples={} $work/{number}.raw\n",
            frames * PERIODS,
            frames * 9
        );
        expected.push((bytes, format!("{format} {rate} {channels}")));
    }
    back_end.guest(&script);
    let played = back_end.read("played");
    let mut rest = played.as_slice();
    for (bytes, what) in expected {
        let (now, later) = rest.split_at(bytes.len().min(rest.len()));
        assert_same(now, &bytes, &what);
        rest = later;
    }
    assert_eq!(rest.len(), 0, "more than was played");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_records_all_formats_and_rates_exactly() {
    let work = uml::work().unwrap();
    let sound = samples("", 5 << 20, 1);
    fs::write(work.path().join("sound"), &sound).unwrap();
    let stream = ALL.replace("DIRECTION", "input");
    let arguments = [
        "--backend=file",
        "--capture-file=DIR/sound",
        "--file-clock=free",
        &stream,
    ];
    let mut back_end = BackEnd::start_in(work, &arguments);
    let mut script = String::new();
    for (number, (format, rate, channels, _)) in combinations().enumerate() {
        let frames = self::period(rate);
        script += &format!(
            "arecord -q -D hw:0,0 -t raw -f {format} -r {rate} -c {channels} --period-size={frames} --buffer-size={} --samples={} $work/{number}.raw\n",
            frames * PERIODS,
            frames * 9
        );
    }
    back_end.guest(&script);
    for (number, (format, rate, channels, period)) in combinations().enumerate() {
        let mut recorded = back_end.read(&format!("{number}.raw"));
        // arecord makes the number of bytes even.
        recorded.truncate(period * 9);
        let what = format!("{format} {rate} {channels}");
        assert_same(&recorded, &sound[..period * 9], &what);
    }
}

/// In real time, at the smallest periods that the driver allows, and at larger ones. If the machine is too busy, the guest may miss a
/// period; what it plays is not lost then either.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_plays_in_real_time() {
    let mut back_end = BackEnd::start(&["--backend=file", "--playback-file=DIR/played"]);
    let bytes = samples("", 48_000 * 4, 2);
    fs::write(back_end.path().join("second"), &bytes).unwrap();
    back_end.guest(
        "cat /proc/asound/cards /proc/asound/card0/pcm0p/info > $work/card
        for period in 441 480 960 1920; do
            before=$(cut -d ' ' -f 1 /proc/uptime)
            aplay -q -D hw:0,0 -t raw -f S16_LE -r 48000 -c 2 --period-size=$period --buffer-size=$((period * 16)) $work/second
            echo $before $(cut -d ' ' -f 1 /proc/uptime) >> $work/times
        done",
    );
    let card = back_end.text("card");
    assert!(card.contains("virtio"), "{card}");
    for line in back_end.text("times").lines() {
        let mut times = line.split(' ').map(|time| time.parse::<f64>().unwrap());
        let (before, after) = (times.next().unwrap(), times.next().unwrap());
        // ALSA begins when the buffer is full, and ends when it is empty.
        assert!(after - before > 0.9, "{line}");
    }
    let played = back_end.read("played");
    if back_end.query()[0]["xruns"] == 0 {
        // aplay fills its last period with silence.
        let mut rest = played.as_slice();
        for _ in 0..4 {
            let (now, later) = rest.split_at(bytes.len());
            assert_same(now, &bytes, "a second");
            let silent = later
                .iter()
                .position(|byte| *byte != 0)
                .unwrap_or(later.len());
            rest = &later[silent..];
        }
        assert_eq!(rest.len(), 0);
    }
}

/// The back-end does not run for 300 ms: the guest goes on afterwards, without an error.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_survives_a_stall_of_the_back_end() {
    let mut back_end = BackEnd::start(&["--backend=file", "--playback-file=DIR/played"]);
    let bytes = samples("", 48_000 * 4 * 2, 2);
    fs::write(back_end.path().join("seconds"), &bytes).unwrap();
    let played = back_end.path().join("played");
    let id = back_end.program.id();
    let stall = std::thread::spawn(move || {
        while fs::metadata(&played).unwrap().len() < 48_000 {
            std::thread::sleep(Duration::from_millis(2));
        }
        let id = rustix::process::Pid::from_raw(id as i32).unwrap();
        rustix::process::kill_process(id, Signal::STOP).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        rustix::process::kill_process(id, Signal::CONT).unwrap();
    });
    // ALSA gives up if no period elapses within the time of a buffer.
    back_end.guest(
        "aplay -q -D hw:0,0 -t raw -f S16_LE -r 48000 -c 2 --period-size=1920 --buffer-size=15360 $work/seconds",
    );
    stall.join().unwrap();
    // All of it was played, with silence where nothing was there to play.
    let sound = |bytes: &[u8]| -> Vec<u8> {
        let frames = bytes.chunks(4).filter(|frame| *frame != [0; 4]);
        frames.flatten().copied().collect()
    };
    assert_same(
        &sound(&back_end.read("played")),
        &sound(&bytes),
        "two seconds",
    );
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guests_mixer_sets_volumes_and_hears_of_changes() {
    let mut back_end = BackEnd::start(&["--backend=null", "--controls"]);
    back_end.guest(
        "amixer -c 0 contents > $work/before
        amixer -q -c 0 cset name='Master Playback Volume' 80
        amixer -q -c 0 cset name='Master Playback Switch' off
        amixer -q -c 0 sset Capture 50%
        amixer -c 0 contents > $work/after
        amixer -c 0 sget Master > $work/master
        alsactl monitor hw:0 > $work/events 2>&1 &
        monitor=$!
        sleep 0.3
        amixer -q -c 0 cset name='Master Playback Volume' 100
        sleep 0.3
        kill $monitor
        ls /proc/asound/card0 > $work/files",
    );
    let before = back_end.text("before");
    for line in [
        "numid=",
        "name='Master Playback Volume'",
        "type=INTEGER,access=rw---R--,values=1,min=0,max=120,step=1",
        "dBscale-min=-60.00dB,step=0.50dB,mute=1",
        "name='Master Playback Switch'",
        "name='Capture Volume'",
        "name='Line Out Jack'",
        "name='Mic Jack'",
        "name='Playback Channel Map'",
    ] {
        assert!(before.contains(line), "{line}: {before}");
    }
    let after = back_end.text("after");
    assert!(
        after.contains("values=80") && after.contains("values=off"),
        "{after}"
    );
    let master = back_end.text("master");
    assert!(master.contains("[-20.00dB] [off]"), "{master}");
    let events = back_end.text("events");
    assert!(events.contains("Master Playback Volume"), "{events}");
}

/// Two minutes of silence, during which the host's clock and the length of the file must agree.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn two_minutes_of_sound_take_two_minutes() {
    const SECONDS: u64 = 120;
    let mut back_end = BackEnd::start(&["--backend=file", "--playback-file=DIR/played"]);
    let played = back_end.path().join("played");
    let length = move || fs::metadata(&played).map_or(0, |metadata| metadata.len());
    let measure = std::thread::spawn(move || {
        let wait = |bytes: u64| {
            while length() < bytes {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::time::Instant::now()
        };
        let begin = wait(192_000);
        wait(192_000 * (SECONDS - 1)) - begin
    });
    back_end.guest(&format!(
        "dd if=/dev/zero bs=192000 count={SECONDS} 2> /dev/null | aplay -q -D hw:0,0 -t raw -f S16_LE -r 48000 -c 2 --period-size=4800 --buffer-size=48000"
    ));
    let time = measure.join().unwrap();
    let exact = Duration::from_secs(SECONDS - 2);
    let difference = time.abs_diff(exact);
    let xruns = back_end.query()[0]["xruns"].as_u64().unwrap();
    assert!(
        xruns > 0 || difference < Duration::from_millis(100),
        "{time:?}"
    );
}

/// ALSA's own configuration needs many files; this is enough for `hw` without arguments.
const QEMU_SCRIPT: &str = r#"
cat > /tmp/alsa.conf << END
pcm.hw { type hw card 0 device 0 }
ctl.hw { type hw card 0 }
END
export ALSA_CONFIG_PATH=/tmp/alsa.conf
until test -e /dev/snd/controlC0; do sleep 0.1; done
format="-q -D hw -t raw -f S16_LE -r 48000 -c 2"
seq 10000 39999 | head -c 96000 > /tmp/sound
aplay $format --samples=24000 --period-size=2400 --buffer-size=19200 /tmp/sound
amixer -D hw cset name='Master Playback Switch' off
aplay $format --samples=24000 --period-size=2400 --buffer-size=19200 /tmp/sound
arecord $format -s 24000 --period-size=2400 --buffer-size=19200 /tmp/recorded
cmp /tmp/sound /tmp/recorded
"#;

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn qemu_is_a_front_end_too() {
    let work = uml::work().unwrap();
    let sound: String = (10_000..40_000)
        .map(|number| format!("{number}\n"))
        .collect();
    let sound = &sound.as_bytes()[..96_000];
    fs::write(work.path().join("captured"), sound).unwrap();
    let mut back_end = BackEnd::start_in(
        work,
        &[
            "--backend=file",
            "--playback-file=DIR/played",
            "--capture-file=DIR/captured",
            "--controls",
        ],
    );
    let socket = back_end.path().join("socket");
    let mut guest = Machine::new("sound", QEMU_SCRIPT)
        .kernel(Flavour::Plain)
        .module("virtio_snd")
        .program("aplay")
        .program("arecord")
        .program("amixer")
        .vhost_user("vhost-user-snd-pci,controls=on", &socket)
        .start()
        .unwrap();
    guest.finish().unwrap();
    assert!(back_end.program.status().unwrap().is_none());
    // Then muted.
    let expected = [sound, &[0; 96_000]].concat();
    assert_same(&back_end.read("played"), &expected, "QEMU");
}

/// A private PipeWire with a sink that nobody hears, and with pipewire-pulse.
struct PipeWire {
    directory: TempDir,
    programs: Vec<Program>,
}

impl PipeWire {
    const SINK: &str = r#"context.objects = [ { factory = adapter args = {
        factory.name = support.null-audio-sink
        node.name = test-sink
        media.class = Audio/Sink
        object.linger = true
        audio.position = [ FL FR ]
        audio.rate = 48000
    } } ]"#;

    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = directory.path().join("config/pipewire/pipewire.conf.d");
        fs::create_dir_all(&options).unwrap();
        fs::write(options.join("sink.conf"), Self::SINK).unwrap();
        let mut pipewire = Self {
            directory,
            programs: Vec::new(),
        };
        pipewire.run("pipewire", &[]);
        pipewire.wait_for("pipewire-0");
        pipewire.run("wireplumber", &[]);
        pipewire.run("pipewire-pulse", &[]);
        pipewire.wait_for("pulse/native");
        pipewire
    }

    fn run(&mut self, program: &str, arguments: &[&str]) {
        let directory = self.directory.path();
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", directory)
            .env("HOME", directory)
            .env("XDG_CONFIG_HOME", directory.join("config"))
            .env("XDG_STATE_HOME", directory.join("state"))
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
            .stdin(std::process::Stdio::null());
        self.programs.push(Program::spawn(&mut command).unwrap());
    }

    fn wait_for(&mut self, name: &str) {
        let path = self.directory.path().join(name);
        let program = self.programs.last_mut().unwrap();
        let what = "listen on its socket";
        program
            .wait_until(what, Duration::from_secs(20), || Ok(path.exists()))
            .unwrap();
    }
}

/// What a guest plays arrives at the sink of a real sound server, in stretches that are exact sample by sample; and its latency is
/// reported.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_plays_to_pipewire() {
    let mut pipewire = PipeWire::start();
    let place = pipewire.directory.path().to_owned();
    let recorded = place.join("recorded");
    let server = format!("--pulse-server={}", place.join("pulse/native").display());
    let mut back_end = BackEnd::start(&["--backend=pulse", &server]);
    let arguments = [
        "-P",
        "{ stream.capture.sink=true }",
        "--target=test-sink",
        "--rate=48000",
        "--channels=2",
        "--format=s16",
        recorded.to_str().unwrap(),
    ];
    pipewire.run("pw-record", &arguments);
    // Noise without silent frames.
    let bytes: Vec<u8> = samples("", 48_000 * 4 * 2, 2)
        .iter()
        .map(|byte| byte | 1)
        .collect();
    fs::write(back_end.path().join("seconds"), &bytes).unwrap();
    back_end.guest(
        "aplay -q -D hw:0,0 -t raw -f S16_LE -r 48000 -c 2 --period-size=960 --buffer-size=15360 $work/seconds",
    );
    assert!(back_end.query()[0]["frames"].as_u64().unwrap() >= 96_000);
    std::thread::sleep(Duration::from_millis(500));
    drop(pipewire.programs.pop());
    let heard = fs::read(recorded).unwrap();
    // How much of the noise is in the record, in blocks of 10 ms at any place.
    let blocks: std::collections::HashSet<&[u8]> = heard.windows(64).step_by(2).collect();
    let blocks = bytes
        .chunks(1920)
        .filter(|block| blocks.contains(&block[..64]));
    let found = blocks.count();
    // A busy machine may lose some.
    assert!(found >= 150, "{found} of 200 blocks");
}
