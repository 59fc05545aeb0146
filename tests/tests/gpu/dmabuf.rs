// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pictures that the display takes from buffers of the renderer. Only a GPU has such buffers; the stand-in for the renderer makes
//! them from shared memory.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use stand_in_renderer::{FILL, MODIFIER, ROW};
use vhost_device_tests::front_end::gpu::{GpuDriver, command, number, words};
use vhost_device_tests::process::PATIENCE;
use vhost_device_tests::stand_in::StandIn;

use crate::virgl::{
    CONTEXT, Y_0_TOP, context, create_context, done_in, in_context, picture, submit, transfer,
};
use crate::{Device, QUIET, pass_display};

const B8G8R8A8: u32 = 1;
const UPDATE: u32 = 8;
const SCANOUT: u32 = 7;
const DMABUF_SCANOUT: u32 = 9;
const DMABUF_UPDATE: u32 = 10;
const DMABUF_SCANOUT2: u32 = 12;
/// Protocol features: EDID, and DMABUF_SCANOUT2.
const FEATURES: u64 = 3;
/// Less than the time that a device waits for a display.
const AT_ONCE: Duration = Duration::from_millis(900);
/// Rectangle of a whole picture.
const ALL: [u32; 4] = [0, 0, 64, 32];

pub fn start(renderer: &StandIn, arguments: &[&str]) -> Device {
    Device::start_configured(&[&["--virgl"], arguments].concat(), |command| {
        renderer.configure(command);
    })
}

/// A message to a display, and the file that was sent with it.
struct Told {
    request: u32,
    payload: Vec<u8>,
    file: Option<File>,
}

impl Told {
    fn words(&self) -> Vec<u32> {
        let words = self.payload.chunks_exact(4);
        words
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect()
    }

    fn assert(&self, request: u32, words: &[u32]) {
        assert_eq!((self.request, &self.words()[..]), (request, words));
        assert!(self.file.is_none(), "a file came with request {request}");
    }

    /// Returns the file of a buffer of the 64x32 pixels of `resource`, which a scanout shows from the first pixel on.
    fn buffer(self, scanout: u32, modifier: Option<u64>) -> File {
        let fourcc = u32::from_le_bytes(*b"AR24");
        let mut expected = vec![scanout, 0, 0, 64, 32, 64, 32, ROW, Y_0_TOP, fourcc];
        let request = match modifier {
            Some(modifier) => {
                expected.extend([modifier as u32, (modifier >> 32) as u32]);
                DMABUF_SCANOUT2
            }
            None => DMABUF_SCANOUT,
        };
        assert_eq!((self.request, self.words()), (request, expected));
        let file = self.file.expect("a file");
        assert_eq!(file.metadata().unwrap().len(), u64::from(ROW * 32));
        file
    }
}

/// A display that takes buffers, and answers when a test tells it to.
struct GlDisplay(UnixStream);

impl GlDisplay {
    fn connect(driver: &GpuDriver, features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        pass_display(driver, theirs.as_fd());
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut display = Self(ours);
        display.told().assert(1, &[]);
        display.told().assert(3, &[]);
        let features = features.to_ne_bytes().to_vec();
        let info = [words(&[3, 4, 408]), vec![0; 408]].concat();
        let answers = [words(&[1, 4, 8]), features.clone(), info];
        display.0.write_all(&answers.concat()).unwrap();
        let told = display.told();
        assert_eq!((told.request, told.payload), (2, features));
        display
    }

    fn told(&mut self) -> Told {
        let mut header = [0; 12];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut pieces = [IoSliceMut::new(&mut header)];
        let received = recvmsg(&self.0, &mut pieces, &mut control, flags).unwrap();
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                files.extend(received.map(File::from));
            }
        }
        assert!(files.len() <= 1, "{} files", files.len());
        self.0.read_exact(&mut header[received.bytes..]).unwrap();
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap()));
        assert_eq!(flags, 0, "flags of request {request}");
        let mut payload = vec![0; size as usize];
        self.0.read_exact(&mut payload).unwrap();
        Told {
            request,
            payload,
            file: files.pop(),
        }
    }

    fn answer_update(&mut self) {
        self.0.write_all(&words(&[DMABUF_UPDATE, 4, 0])).unwrap();
    }

    /// Receives an update of a part of a scanout, and acknowledges it.
    fn shows(&mut self, scanout: u32, [x, y, width, height]: [u32; 4]) {
        let told = self.told();
        told.assert(DMABUF_UPDATE, &[scanout, x, y, width, height]);
        self.answer_update();
    }

    fn is_told_something_within(&self, limit: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut events = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut events, Some(&limit.try_into().unwrap())).unwrap() > 0
    }
}

fn create(driver: &mut GpuDriver, number: u32) {
    let mut body = picture(number, 64, 32, Y_0_TOP);
    body[8..12].copy_from_slice(&B8G8R8A8.to_le_bytes());
    driver.done(number::CREATE_3D, &body);
}

fn fill(driver: &mut GpuDriver, resource: u32, pixel: u32) {
    let commands = submit(&[FILL, resource, pixel]);
    done_in(driver, CONTEXT, number::SUBMIT_3D, &commands);
}

fn flushed(driver: &mut GpuDriver) {
    assert_eq!(driver.receive().kind(), number::OK_NODATA);
}

/// Connects a driver with a context and resource 1, and a display.
fn started(device: &Device, features: u64) -> (GpuDriver, GlDisplay) {
    let mut driver = device.connect();
    let display = GlDisplay::connect(&driver, features);
    create_context(&mut driver);
    create(&mut driver, 1);
    (driver, display)
}

/// Does the same, and shows the resource on scanout 0.
fn shown(device: &Device) -> (GpuDriver, GlDisplay, File) {
    let (mut driver, mut display) = started(device, FEATURES);
    driver.set_scanout(0, 1, ALL);
    let file = display.told().buffer(0, Some(MODIFIER));
    (driver, display, file)
}

fn inode(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

fn pixel(file: &File) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, u64::from(ROW * 31 + 63 * 4))
        .unwrap();
    u32::from_ne_bytes(bytes)
}

#[test]
fn a_picture_is_shown_from_its_buffer_and_a_flush_waits_for_that() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display, file) = shown(&device);
    for (colour, part) in [(0x1122_3344, ALL), (0x5566_7788, [3, 4, 50, 20])] {
        fill(&mut driver, 1, colour);
        let fences = renderer.calls("create_fence");
        driver.send_flush(1, part);
        let told = display.told();
        let [x, y, width, height] = part;
        told.assert(DMABUF_UPDATE, &[0, x, y, width, height]);
        assert_eq!(pixel(&file), colour);
        assert_eq!(renderer.calls("create_fence"), fences + 1, "GL is flushed");
        assert!(!driver.control.wait_used(Duration::from_millis(30)));
        display.answer_update();
        flushed(&mut driver);
    }
    // A resource without a scanout needs nothing.
    create(&mut driver, 2);
    driver.flush(2, ALL);
    assert_eq!(
        renderer.calls("transfer_read_iov"),
        0,
        "nothing is read back"
    );
    assert_eq!(renderer.calls("get_fd_for_texture2"), 1);
    // The same scanout again changes nothing.
    driver.set_scanout(0, 1, ALL);
    driver.send_flush(1, ALL);
    display.shows(0, ALL);
    flushed(&mut driver);
    assert_eq!(renderer.calls("get_fd_for_texture2"), 1);
}

#[test]
fn modifiers_are_left_out_if_the_library_or_the_display_has_none() {
    let renderer = StandIn::new("", &["resource_get_info_ext"]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display) = started(&device, FEATURES);
    driver.set_scanout(3, 1, ALL);
    display.told().buffer(3, None);
    assert_eq!(renderer.calls("resource_get_info"), 1);

    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display) = started(&device, 1);
    driver.set_scanout(3, 1, ALL);
    display.told().buffer(3, None);
    driver.send_flush(1, ALL);
    display.shows(3, ALL);
    flushed(&mut driver);
}

#[test]
fn pictures_that_cannot_be_shared_are_sent_as_pixels() {
    let none: &[&str] = &[];
    for (settings, without, arguments) in [
        ("unshared", none, none),
        ("missing", none, none),
        ("planes=2", none, none),
        ("planes=4", &["resource_get_info_ext"], none),
        ("offset=4096", none, none),
        ("fourcc=0", none, none),
        ("get_fd_for_texture2", none, none),
        ("resource_get_info_ext", none, none),
        ("resource_get_info", &["resource_get_info_ext"], none),
        ("", &["get_fd_for_texture2"], none),
        ("", &["resource_get_info_ext", "resource_get_info"], none),
        ("", none, &["--no-dmabuf"]),
    ] {
        let renderer = StandIn::new(settings, without).unwrap();
        let device = start(&renderer, arguments);
        let (mut driver, mut display) = started(&device, FEATURES);
        let files = device.program.resources().unwrap().files;
        fill(&mut driver, 1, 0x0a0b_0c0d);
        driver.set_scanout(0, 1, ALL);
        display.told().assert(SCANOUT, &[0, 64, 32]);
        driver.send_flush(1, ALL);
        let told = display.told();
        assert_eq!(told.request, UPDATE, "{settings} {without:?} {arguments:?}");
        assert_eq!(told.words()[..5], [0, 0, 0, 64, 32]);
        assert!(told.words()[5..].iter().all(|pixel| *pixel == 0x0a0b_0c0d));
        flushed(&mut driver);
        let now = device.program.resources().unwrap().files;
        assert_eq!(now, files, "{settings} {without:?} leaves no file behind");
    }
}

#[test]
fn a_scanout_goes_from_buffers_to_pixels_and_back() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display, file) = shown(&device);
    let told_no_buffer = [0; 10];
    // QEMU always shows the part that starts at (0, 0).
    driver.set_scanout(0, 1, [1, 0, 63, 32]);
    display.told().assert(DMABUF_SCANOUT, &told_no_buffer);
    display.told().assert(SCANOUT, &[0, 63, 32]);
    driver.send_flush(1, ALL);
    assert_eq!(display.told().words()[..5], [0, 0, 0, 63, 32]);
    flushed(&mut driver);
    // Back, and to another resource.
    driver.set_scanout(0, 1, ALL);
    let again = display.told().buffer(0, Some(MODIFIER));
    assert_eq!(inode(&again), inode(&file));
    create(&mut driver, 2);
    driver.set_scanout(0, 2, ALL);
    let other = display.told().buffer(0, Some(MODIFIER));
    assert_ne!(inode(&other), inode(&file));
    driver.send_flush(2, ALL);
    display.shows(0, ALL);
    flushed(&mut driver);
    // A part of the resource, not all of it.
    driver.set_scanout(0, 2, [0, 0, 60, 30]);
    let told = display.told();
    assert_eq!(told.words()[..7], [0, 0, 0, 60, 30, 64, 32]);
    driver.send_flush(2, ALL);
    display.shows(0, [0, 0, 60, 30]);
    flushed(&mut driver);
    driver.set_scanout(0, 0, [0; 4]);
    display.told().assert(DMABUF_SCANOUT, &told_no_buffer);
    display.told().assert(SCANOUT, &[0, 0, 0]);
    driver.set_scanout(0, 2, ALL);
    display.told().buffer(0, Some(MODIFIER));
    driver.unref(2);
    display.told().assert(DMABUF_SCANOUT, &told_no_buffer);
    display.told().assert(SCANOUT, &[0, 0, 0]);
}

#[test]
fn sixteen_scanouts_show_one_buffer() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display) = started(&device, FEATURES);
    for scanout in 0..16 {
        driver.set_scanout(scanout, 1, ALL);
        display.told().buffer(scanout, Some(MODIFIER));
    }
    assert_eq!(renderer.calls("get_fd_for_texture2"), 1);
    driver.send_flush(1, [8, 8, 8, 8]);
    (0..16).for_each(|scanout| display.shows(scanout, [8, 8, 8, 8]));
    flushed(&mut driver);
}

#[test]
fn the_next_display_is_given_the_buffer_too() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, display, file) = shown(&device);
    drop(display);
    driver.flush(1, ALL);
    for _ in 0..2 {
        let mut display = GlDisplay::connect(&driver, FEATURES);
        let again = display.told().buffer(0, Some(MODIFIER));
        assert_eq!(inode(&again), inode(&file));
        display.shows(0, ALL);
        driver.send_flush(1, [1, 2, 3, 4]);
        display.shows(0, [1, 2, 3, 4]);
        flushed(&mut driver);
    }
    // A display that disconnects while a flush waits for it.
    let mut display = GlDisplay::connect(&driver, FEATURES);
    display.told().buffer(0, Some(MODIFIER));
    display.shows(0, ALL);
    driver.send_flush(1, ALL);
    display.told().assert(DMABUF_UPDATE, &[0, 0, 0, 64, 32]);
    let start = Instant::now();
    drop(display);
    flushed(&mut driver);
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn a_display_that_never_shows_anything_delays_the_guest_once() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display, _file) = shown(&device);
    let start = Instant::now();
    driver.send_flush(1, [0, 0, 8, 8]);
    display.told().assert(DMABUF_UPDATE, &[0, 0, 0, 8, 8]);
    // The cursor does not wait, and does not count as an answer.
    while !driver.control.has_used() {
        assert!(start.elapsed() < PATIENCE, "the guest waits forever");
        driver.move_cursor(0, [7, 1], 0);
        display.told().assert(5, &[0, 7, 1]);
    }
    flushed(&mut driver);
    assert!(start.elapsed() > Duration::from_millis(900));
    let start = Instant::now();
    driver.flush(1, [10, 10, 8, 8]);
    driver.flush(1, [30, 20, 8, 8]);
    assert!(start.elapsed() < AT_ONCE, "it is waited for again");
    assert!(!display.is_told_something_within(Duration::from_millis(30)));
    // When it continues, it gets the missed update, and flushes wait for it again.
    display.answer_update();
    let missed = display.told();
    missed.assert(DMABUF_UPDATE, &[0, 10, 10, 28, 18]);
    driver.send_flush(1, ALL);
    assert!(!driver.control.wait_used(Duration::from_millis(30)));
    display.answer_update();
    display.shows(0, ALL);
    flushed(&mut driver);
}

#[test]
fn a_queue_stops_at_once_although_the_display_shows_nothing() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display, _file) = shown(&device);
    driver.send_flush(1, ALL);
    display.told().assert(DMABUF_UPDATE, &[0, 0, 0, 64, 32]);
    let start = Instant::now();
    driver.front_end.stop(0).unwrap();
    assert!(start.elapsed() < AT_ONCE, "GET_VRING_BASE waits");
    flushed(&mut driver);
}

#[test]
fn a_display_with_invalid_answers_is_dropped_and_the_next_one_is_used() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display, _file) = shown(&device);
    for nonsense in [
        words(&[DMABUF_UPDATE, 0, 0]),
        words(&[DMABUF_UPDATE, 4, 1]),
        words(&[UPDATE, 4, 0]),
        words(&[3, 4, 408]),
        // One answer too many.
        words(&[DMABUF_UPDATE, 4, 0, DMABUF_UPDATE, 4, 0]),
    ] {
        driver.send_flush(1, ALL);
        display.told().assert(DMABUF_UPDATE, &[0, 0, 0, 64, 32]);
        display.0.write_all(&nonsense).unwrap();
        let start = Instant::now();
        flushed(&mut driver);
        assert!(start.elapsed() < AT_ONCE);
        let told = display.is_told_something_within(QUIET);
        assert!(!told, "its socket stays open, and receives nothing");
        display = GlDisplay::connect(&driver, FEATURES);
        display.told().buffer(0, Some(MODIFIER));
        display.shows(0, ALL);
    }
}

#[test]
fn buffers_are_closed_with_their_resources() {
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &[]);
    let (mut driver, mut display, _file) = shown(&device);
    driver.set_scanout(0, 0, [0; 4]);
    display.told().assert(DMABUF_SCANOUT, &[0; 10]);
    display.told().assert(SCANOUT, &[0, 0, 0]);
    driver.unref(1);
    let files = device.program.resources().unwrap().files;
    for round in 0..100 {
        // A guest that flips pages, on two scanouts.
        create(&mut driver, 1);
        create(&mut driver, 2);
        for (resource, scanout) in [(1, 0), (2, 0), (1, 0), (2, 1), (1, 1)] {
            driver.set_scanout(scanout, resource, ALL);
            display.told().buffer(scanout, Some(MODIFIER));
            driver.send_flush(resource, ALL);
            let shows = if (resource, scanout) == (1, 1) { 2 } else { 1 };
            let first = if shows == 2 { 0 } else { scanout };
            (first..first + shows).for_each(|scanout| display.shows(scanout, ALL));
            flushed(&mut driver);
        }
        // One is destroyed while it is shown, the other when it is not.
        driver.unref(1);
        for scanout in 0..2 {
            let mut none = [0; 10];
            none[0] = scanout;
            display.told().assert(DMABUF_SCANOUT, &none);
            display.told().assert(SCANOUT, &[scanout, 0, 0]);
        }
        driver.unref(2);
        let now = device.program.resources().unwrap().files;
        assert_eq!(now, files, "files after round {round}");
    }
    assert_eq!(
        renderer.calls("resource_create"),
        renderer.calls("resource_unref")
    );
    // A guest that disconnects while everything is shown.
    create(&mut driver, 1);
    driver.set_scanout(0, 1, ALL);
    display.told().buffer(0, Some(MODIFIER));
    drop(driver);
    let mut next = device.connect();
    let gone = next.run(&command(number::UNREF, &words(&[1, 0])));
    assert_eq!(gone.kind(), number::INVALID_RESOURCE_ID);
    let display = GlDisplay::connect(&next, FEATURES);
    create_context(&mut next);
    let now = device.program.resources().unwrap().files;
    assert_eq!(now, files);
    assert!(!display.is_told_something_within(Duration::from_millis(30)));
}

#[test]
fn a_renderer_that_refuses_is_refused() {
    for (function, kind, body, expected) in [
        (
            "resource_create",
            number::CREATE_3D,
            picture(2, 8, 8, 0),
            number::INVALID_PARAMETER,
        ),
        (
            "context_create",
            number::CTX_CREATE,
            context(),
            number::INVALID_PARAMETER,
        ),
        (
            "submit_cmd",
            number::SUBMIT_3D,
            submit(&[FILL, 1, 0]),
            number::INVALID_PARAMETER,
        ),
    ] {
        let renderer = StandIn::new(&format!("afterwards,{function}"), &[]).unwrap();
        let device = start(&renderer, &["--headless"]);
        let mut driver = device.connect();
        if function == "submit_cmd" {
            create_context(&mut driver);
            create(&mut driver, 1);
        }
        let response = driver.run(&in_context(CONTEXT, kind, &body));
        assert_eq!(response.kind(), expected, "{function}");
    }
    // Resources that the renderer refuses use the 2D path.
    let renderer = StandIn::new("afterwards,resource_create", &[]).unwrap();
    let device = start(&renderer, &[]);
    let mut driver = device.connect();
    let mut display = GlDisplay::connect(&driver, FEATURES);
    create_context(&mut driver);
    let pages = driver.create(5, B8G8R8A8, 64, 32);
    let resource = words(&[5, 0]);
    for kind in [number::CTX_ATTACH_RESOURCE, number::CTX_DETACH_RESOURCE] {
        done_in(&mut driver, CONTEXT, kind, &resource);
    }
    driver.draw(&pages, &[0x77; 64 * 32 * 4]);
    driver.transfer(5, 64, ALL);
    driver.set_scanout(0, 5, ALL);
    display.told().assert(SCANOUT, &[0, 64, 32]);
    driver.flush(5, ALL);
    assert_eq!(display.told().words()[5..], [0x7777_7777; 64 * 32]);
    let body = transfer(ALL, 0, 5, 0);
    let response = driver.run(&command(number::TRANSFER_TO_HOST_3D, &body));
    assert_eq!(response.kind(), number::INVALID_PARAMETER);
    // Without a display no buffers are exported.
    let renderer = StandIn::new("", &[]).unwrap();
    let device = start(&renderer, &["--headless"]);
    let mut driver = device.connect();
    create(&mut driver, 1);
    driver.set_scanout(0, 1, ALL);
    driver.flush(1, ALL);
    assert_eq!(renderer.calls("get_fd_for_texture2"), 0);
}
