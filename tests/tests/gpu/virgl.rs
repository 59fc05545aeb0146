// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! 3D commands, if virglrenderer is available and can draw.

mod refused;

use std::process::Stdio;

use vhost_device_tests::front_end::gpu::{
    Answers, GpuDriver, Shown, command, fenced_command, number, words,
};
use vhost_device_tests::front_end::{Buffer, Options};
use vhost_device_tests::process;
use vhost_device_tests::skip::skip;

use crate::scanouts::{FORMATS, bytes_in};
use crate::{B8G8R8X8, Device, QUIET, bytes, pattern};

/// `pipe_texture_target`: a buffer, and a 2D texture.
const BUFFER: u32 = 0;
const TEXTURE_2D: u32 = 2;
/// Use of a resource: `VIRGL_BIND_RENDER_TARGET` and `VIRGL_BIND_SAMPLER_VIEW`; `VIRGL_BIND_VERTEX_BUFFER`.
const PICTURE: u32 = 1 << 1 | 1 << 3;
const VERTICES: u32 = 1 << 4;
/// `VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP`.
pub const Y_0_TOP: u32 = 1 << 0;
/// The context that the tests draw in.
pub const CONTEXT: u32 = 7;
/// `VIRTIO_GPU_FLAG_FENCE`.
pub const FENCE: u32 = 1 << 0;

/// Returns whether this host has 3D, according to the back-end.
pub fn is_there() -> bool {
    let output = process::command("vhost-device-gpu")
        .unwrap()
        .arg("--print-capabilities")
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let there = String::from_utf8_lossy(&output.stdout).contains("\"virgl\"");
    if !there {
        skip("there is no virglrenderer on this host that can draw");
    }
    there
}

/// Starts a device with 3D; skips the test on hosts without.
pub fn start(arguments: &[&str]) -> Option<Device> {
    is_there().then(|| Device::start(&[&["--virgl"], arguments].concat()))
}

/// Creates a command in a context.
pub fn in_context(context: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = command(kind, body);
    bytes[16..20].copy_from_slice(&context.to_le_bytes());
    bytes
}

pub fn done_in(driver: &mut GpuDriver, context: u32, kind: u32, body: &[u8]) {
    let response = driver.run(&in_context(context, kind, body));
    assert_eq!(response.kind(), number::OK_NODATA, "command {kind:#x}");
}

/// Creates the body of CTX_CREATE.
pub fn context() -> Vec<u8> {
    let mut body = words(&[4, 0]);
    body.extend(b"test");
    body.resize(72, 0);
    body
}

/// Creates [`CONTEXT`].
pub fn create_context(driver: &mut GpuDriver) {
    done_in(driver, CONTEXT, number::CTX_CREATE, &context());
}

/// Attaches a resource to [`CONTEXT`].
fn attach_to_context(driver: &mut GpuDriver, resource: u32) {
    let body = words(&[resource, 0]);
    done_in(driver, CONTEXT, number::CTX_ATTACH_RESOURCE, &body);
}

/// Fills a resource with one colour: red, green, blue.
fn draw(driver: &mut GpuDriver, resource: u32, colour: [f32; 3]) {
    let body = submit(&clear(resource, colour));
    done_in(driver, CONTEXT, number::SUBMIT_3D, &body);
}

/// Creates the body of RESOURCE_CREATE_3D for a picture.
pub fn picture(number: u32, width: u32, height: u32, flags: u32) -> Vec<u8> {
    let what = [number, TEXTURE_2D, B8G8R8X8, PICTURE];
    let shape = [width, height, 1, 1, 0, 0, flags, 0];
    [words(&what), words(&shape)].concat()
}

/// Creates the body of TRANSFER_TO_HOST_3D and TRANSFER_FROM_HOST_3D for a rectangle of a resource.
pub fn transfer([x, y, w, h]: [u32; 4], offset: u64, resource: u32, stride: u32) -> Vec<u8> {
    let mut body = words(&[x, y, 0, w, h, 1]);
    body.extend(offset.to_le_bytes());
    body.extend(words(&[resource, 0, stride, 0]));
    body
}

/// Creates the body of SUBMIT_3D.
pub fn submit(commands: &[u32]) -> Vec<u8> {
    [words(&[commands.len() as u32 * 4, 0]), words(commands)].concat()
}

/// Creates the renderer's commands that fill a resource with one colour.
fn clear(resource: u32, [red, green, blue]: [f32; 3]) -> Vec<u32> {
    const SURFACE: u32 = 9;
    let head = |kind: u32, object: u32, length: u32| kind | object << 8 | length << 16;
    let surface = [head(1, 8, 5), SURFACE, resource, B8G8R8X8, 0, 0];
    let frame_buffer = [head(5, 0, 3), 1, 0, SURFACE];
    let [red, green, blue, alpha] = [red, green, blue, 1.0].map(f32::to_bits);
    let clear = [head(7, 0, 8), 1 << 2, red, green, blue, alpha, 0, 0, 0];
    let forget = [head(3, 8, 1), SURFACE];
    [&surface[..], &frame_buffer, &clear, &forget].concat()
}

/// Returns the scanout, rectangle and colours of an update.
fn colours(shown: Shown) -> (u32, [u32; 4], Vec<u32>) {
    let Shown::Update(scanout, rectangle, pixels) = shown else {
        panic!("{shown:?} is no picture");
    };
    (scanout, rectangle, opaque(&pixels))
}

/// Returns pixels without the byte that is alpha, or unused.
fn opaque(pixels: &[u32]) -> Vec<u32> {
    pixels.iter().map(|pixel| pixel & 0xff_ffff).collect()
}

/// Does the same with bytes in guest memory.
fn colours_in(bytes: &[u8]) -> Vec<u32> {
    let pixels = bytes.chunks_exact(4);
    let pixels = pixels.map(|pixel| u32::from_le_bytes(pixel.try_into().unwrap()));
    opaque(&pixels.collect::<Vec<_>>())
}

#[test]
fn num_capsets_matches_the_capability_sets() {
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let mut driver = device.connect();
    assert_eq!(driver.front_end.features() & 1, 1, "VIRGL is offered");
    let count = driver.front_end.config(12, 4).unwrap();
    let count = u32::from_le_bytes(count.try_into().unwrap());
    assert!((1..=2).contains(&count), "{count} sets");
    for index in 0..count {
        let info = driver.run(&command(number::GET_CAPSET_INFO, &words(&[index, 0])));
        assert_eq!(info.kind(), number::OK_CAPSET_INFO);
        assert_eq!(info.body().len(), 16);
        let word = |at: usize| u32::from_le_bytes(info.body()[at..at + 4].try_into().unwrap());
        let (id, version, size) = (word(0), word(4), word(8));
        assert_eq!((id, word(12)), (index + 1, 0));
        let mut get =
            |id, version| driver.run(&command(number::GET_CAPSET, &words(&[id, version])));
        let capset = get(id, version);
        assert_eq!(capset.kind(), number::OK_CAPSET);
        assert_eq!(capset.body().len(), size as usize);
        assert!(capset.body().iter().any(|byte| *byte != 0));
        assert_eq!(get(id, version), capset, "it is always the same");
        assert_eq!(get(id, version + 1).kind(), number::INVALID_PARAMETER);
        assert_eq!(get(id + 2, 0).kind(), number::INVALID_PARAMETER);
    }
    let beyond = driver.run(&command(number::GET_CAPSET_INFO, &words(&[count, 0])));
    assert_eq!(beyond.kind(), number::INVALID_PARAMETER);
    // Without room for all of it, nothing is written past the end.
    driver.send(&command(number::GET_CAPSET, &words(&[1, 0])), 100);
    assert_eq!(driver.receive().kind(), number::INVALID_PARAMETER);
}

#[test]
fn drawing_appears_in_the_flushed_rectangle() {
    let Some(device) = start(&[]) else {
        return;
    };
    let (mut driver, display) = device.connect_with_display(Answers::default());
    create_context(&mut driver);
    driver.done(number::CREATE_3D, &picture(3, 64, 32, 0));
    attach_to_context(&mut driver, 3);
    draw(&mut driver, 3, [1.0, 0.0, 0.0]);
    driver.flush(3, [0, 0, 64, 32]);
    assert_eq!(display.next_within(QUIET), None, "nothing shows it yet");
    driver.set_scanout(1, 3, [0, 0, 64, 32]);
    assert_eq!(display.next(), Shown::Scanout(1, 64, 32));
    driver.flush(3, [0, 0, 64, 32]);
    let red = (1, [0, 0, 64, 32], vec![0xff_0000; 64 * 32]);
    assert_eq!(colours(display.next()), red);
    draw(&mut driver, 3, [0.0, 0.0, 1.0]);
    driver.flush(3, [8, 4, 10, 6]);
    let blue = (1, [8, 4, 10, 6], vec![0xff; 60]);
    assert_eq!(colours(display.next()), blue);
    driver.unref(3);
    assert_eq!(display.next(), Shown::Scanout(1, 0, 0));
    done_in(&mut driver, CONTEXT, number::CTX_DESTROY, &[]);
}

#[test]
fn pictures_come_out_as_the_guest_laid_them_down() {
    let Some(device) = start(&[]) else {
        return;
    };
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let (width, height) = (48, 20);
    let all = [0, 0, width, height];
    for (number, flags) in [(1, 0), (2, Y_0_TOP)] {
        let drawn = opaque(&pattern(width * height));
        driver.done(number::CREATE_3D, &picture(number, width, height, flags));
        let pages = driver.attach(number, u64::from(width * height * 4));
        driver.draw(&pages, &bytes(&drawn));
        driver.done(
            number::TRANSFER_TO_HOST_3D,
            &transfer(all, 0, number, width * 4),
        );
        driver.set_scanout(0, number, all);
        if number == 1 {
            assert_eq!(display.next(), Shown::Scanout(0, width, height));
        }
        driver.flush(number, [5, 3, 11, 7]);
        let part = (3..10).flat_map(|y| &drawn[y * 48 + 5..][..11]);
        let part = part.copied().collect();
        assert_eq!(colours(display.next()), (0, [5, 3, 11, 7], part));
        driver.flush(number, all);
        assert_eq!(colours(display.next()), (0, all, drawn.clone()));

        // Back to other guest memory.
        driver.draw(&pages, &vec![0xee; 4096 * pages.len()]);
        let back = transfer(
            [0, 10, width, 10],
            u64::from(width * 10 * 4),
            number,
            width * 4,
        );
        driver.done(number::TRANSFER_FROM_HOST_3D, &back);
        let seen = driver.look(&pages);
        let half = (width * 10 * 4) as usize;
        assert!(seen[..half].iter().all(|byte| *byte == 0xee));
        let part = colours_in(&seen[half..2 * half]);
        assert_eq!(part, drawn[48 * 10..], "flags {flags}");
        assert!(seen[2 * half..].iter().all(|byte| *byte == 0xee));
    }
}

#[test]
fn a_resource_of_3d_can_be_a_cursor() {
    let Some(device) = start(&[]) else {
        return;
    };
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let image = pattern(64 * 64);
    driver.done(number::CREATE_3D, &picture(1, 64, 64, 0));
    let pages = driver.attach(1, 64 * 64 * 4);
    driver.draw(&pages, &bytes(&image));
    let all = transfer([0, 0, 64, 64], 0, 1, 0);
    driver.done(number::TRANSFER_TO_HOST_3D, &all);
    driver.update_cursor(0, [10, 20], 1, [3, 4]);
    assert_eq!(display.next(), Shown::CursorImage(0, [10, 20, 3, 4], image));
}

#[test]
fn a_2d_resource_can_be_used_by_contexts() {
    let Some(device) = start(&[]) else {
        return;
    };
    let (mut driver, display) = device.connect_with_display(Answers::default());
    create_context(&mut driver);
    let (width, height) = (48, 20);
    let all = [0, 0, width, height];
    let drawn = opaque(&pattern(width * height));
    let pages = driver.create(1, B8G8R8X8, width, height);
    attach_to_context(&mut driver, 1);
    driver.draw(&pages, &bytes(&drawn));
    driver.transfer(1, width, all);
    driver.set_scanout(0, 1, all);
    assert_eq!(display.next(), Shown::Scanout(0, width, height));
    driver.flush(1, all);
    assert_eq!(colours(display.next()), (0, all, drawn.clone()));

    // The context draws to it, then the guest draws over that.
    draw(&mut driver, 1, [1.0, 0.0, 0.0]);
    driver.transfer(1, width, [7, 5, 10, 3]);
    driver.flush(1, all);
    let mixed: Vec<u32> = (0..width * height)
        .map(|index| {
            let is_new = (7..17).contains(&(index % width)) && (5..8).contains(&(index / width));
            if is_new {
                drawn[index as usize]
            } else {
                0xff_0000
            }
        })
        .collect();
    assert_eq!(colours(display.next()), (0, all, mixed.clone()));
    let back = transfer(all, 0, 1, 0);
    driver.done(number::TRANSFER_FROM_HOST_3D, &back);
    let seen = driver.look(&pages);
    assert_eq!(colours_in(&seen[..(width * height * 4) as usize]), mixed);

    let resource = words(&[1, 0]);
    done_in(&mut driver, CONTEXT, number::CTX_DETACH_RESOURCE, &resource);
    driver.done(number::DETACH_BACKING, &resource);
    driver.unref(1);
    assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
}

#[test]
fn pictures_of_all_formats_are_right_with_3d_too() {
    let Some(device) = start(&[]) else {
        return;
    };
    let (mut driver, display) = device.connect_with_display(Answers::default());
    create_context(&mut driver);
    let image = pattern(64 * 64);
    for (number, (format, places)) in (1..).zip(FORMATS) {
        let pages = driver.create(number, format, 64, 64);
        attach_to_context(&mut driver, number);
        driver.draw(&pages, &bytes_in(places, &image));
        driver.transfer(number, 64, [0, 0, 64, 64]);
        driver.set_scanout(0, number, [2, 1, 60, 50]);
        if number == 1 {
            assert_eq!(display.next(), Shown::Scanout(0, 60, 50));
        }
        driver.flush(number, [3, 2, 11, 7]);
        let part = (2..9).flat_map(|y| &image[y * 64 + 3..][..11]);
        let part = part.map(|pixel| pixel & 0xff_ffff).collect();
        let expected = (0, [1, 1, 11, 7], part);
        assert_eq!(colours(display.next()), expected, "format {format}");
    }
}

#[test]
fn fences_come_back_in_order() {
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let mut driver = device.connect();
    create_context(&mut driver);
    driver.done(number::CREATE_3D, &picture(3, 512, 512, 0));
    attach_to_context(&mut driver, 3);
    let memory = driver.front_end.memory();
    let commands: Vec<u32> = (0..20).flat_map(|_| clear(3, [0.0, 1.0, 0.0])).collect();
    let mut fences = Vec::new();
    for fence in 1..=24u64 {
        // Every third is a 2D command, every fourth is refused.
        let mut bytes = match fence {
            fence if fence % 3 == 0 => fenced_command(number::GET_DISPLAY_INFO, FENCE, fence, &[]),
            fence if fence % 4 == 0 => fenced_command(number::SUBMIT_3D, FENCE, fence, &[]),
            fence => fenced_command(number::SUBMIT_3D, FENCE, fence, &submit(&commands)),
        };
        bytes[16..20].copy_from_slice(&CONTEXT.to_le_bytes());
        let request = memory.allocate(bytes.len() as u64, 16);
        let response = memory.allocate(512, 16);
        memory.write(request, &bytes);
        driver.control.submit(&[
            Buffer::readable(request, bytes.len() as u32),
            Buffer::writable(response, 512),
        ]);
        fences.push((fence, response));
    }
    for (fence, response) in fences {
        assert!(driver.control.wait_used(process::PATIENCE), "fence {fence}");
        driver.control.take_used().unwrap();
        assert_eq!(memory.read_u32(response + 4) & FENCE, FENCE);
        assert_eq!(memory.read_u64(response + 8), fence);
        assert_eq!(memory.read_u32(response + 16), CONTEXT);
    }
}

#[test]
fn a_queue_that_stops_has_answered_all_that_it_took() {
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let mut driver = device.connect();
    create_context(&mut driver);
    driver.done(number::CREATE_3D, &picture(3, 2048, 2048, 0));
    attach_to_context(&mut driver, 3);
    let memory = driver.front_end.memory();
    let commands: Vec<u32> = (0..5).flat_map(|_| clear(3, [0.0, 1.0, 0.0])).collect();
    let mut bytes = fenced_command(number::SUBMIT_3D, FENCE, 1, &submit(&commands));
    bytes[16..20].copy_from_slice(&CONTEXT.to_le_bytes());
    let request = memory.allocate(bytes.len() as u64, 16);
    memory.write(request, &bytes);
    for _ in 0..20 {
        let response = memory.allocate(24, 16);
        driver.control.submit(&[
            Buffer::readable(request, bytes.len() as u32),
            Buffer::writable(response, 24),
        ]);
    }
    let base = driver.front_end.stop(0).unwrap();
    while driver.control.take_used().is_some() {}
    assert_eq!(driver.control.used_base(), base);
}

#[test]
fn contexts_are_bounded() {
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let mut driver = device.connect();
    let mut made = 0;
    let refused = (1..2000).find_map(|number| {
        let response = driver.run(&in_context(number, number::CTX_CREATE, &context()));
        made += 1;
        (response.kind() != number::OK_NODATA).then(|| response.kind())
    });
    assert_eq!(refused, Some(number::OUT_OF_MEMORY));
    assert!(made > 100, "{made} contexts");
    done_in(&mut driver, 1, number::CTX_DESTROY, &[]);
    done_in(&mut driver, 5000, number::CTX_CREATE, &context());
}

#[test]
fn resources_follow_the_memory_of_the_guest() {
    const ADDRESS: u64 = 0x4000_0000;
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let options = Options {
        memory_slots: true,
        ..Options::default()
    };
    let mut driver = device.connect_with(&options);
    driver.front_end.add_region(ADDRESS, 1 << 20).unwrap();
    driver.done(number::CREATE_3D, &picture(1, 16, 16, 0));
    let backing = words(&[1, 1, ADDRESS as u32, 0, 1024, 0]);
    driver.done(number::ATTACH_BACKING, &backing);
    let all = transfer([0, 0, 16, 16], 0, 1, 0);
    driver.front_end.memory().fill(ADDRESS, 1024, 0x11);
    driver.done(number::TRANSFER_TO_HOST_3D, &all);
    let mapped = mappings(&device);

    driver.front_end.remove_region(ADDRESS).unwrap();
    assert_eq!(mappings(&device), mapped - 1, "nothing keeps it mapped");
    let response = driver.run(&command(number::TRANSFER_FROM_HOST_3D, &all));
    assert_eq!(response.kind(), number::UNSPEC);

    // Other memory at the same place.
    driver.front_end.add_region(ADDRESS, 1 << 20).unwrap();
    assert_eq!(driver.front_end.memory().read_u32(ADDRESS), 0);
    driver.done(number::TRANSFER_FROM_HOST_3D, &all);
    let seen = driver.front_end.memory().read_vec(ADDRESS, 1024);
    assert!(seen.chunks(4).all(|pixel| pixel[..3] == [0x11; 3]));
    driver.done(number::DETACH_BACKING, &words(&[1, 0]));
    driver.unref(1);
}

/// Returns the number of pieces of guest memory that the device has mapped.
fn mappings(device: &Device) -> usize {
    let maps = format!("/proc/{}/maps", device.program.id());
    let maps = std::fs::read_to_string(maps).unwrap();
    maps.lines().filter(|line| line.contains("rw-s")).count()
}

#[test]
fn a_driver_that_declines_3d_gets_none() {
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let options = Options {
        features: Options::default().features & !1,
        ..Options::default()
    };
    let mut driver = device.connect_with(&options);
    for (kind, body) in [
        (number::CTX_CREATE, context()),
        (number::CREATE_3D, picture(1, 1, 1, 0)),
    ] {
        let response = driver.run(&in_context(1, kind, &body));
        assert_eq!(response.kind(), number::UNSPEC);
    }
    driver.create(1, B8G8R8X8, 4, 4);
}

#[test]
fn two_hundred_guests_leave_no_resources_behind() {
    let Some(device) = start(&["--headless"]) else {
        return;
    };
    let work = |driver: &mut GpuDriver| {
        create_context(driver);
        for number in 1..10 {
            driver.done(number::CREATE_3D, &picture(number, 256, 256, 0));
            driver.attach(number, 256 * 256 * 4);
            attach_to_context(driver, number);
            draw(driver, number, [1.0; 3]);
        }
        driver.set_scanout(0, 1, [0, 0, 256, 256]);
        driver.flush(1, [0, 0, 256, 256]);
    };
    let mut settled = None;
    for cycle in 0..200 {
        let mut driver = device.connect();
        work(&mut driver);
        // A driver that starts again, on the same connection.
        driver.front_end.stop(0).unwrap();
        driver.front_end.stop(1).unwrap();
        driver.control = driver.front_end.queue(0, 64).unwrap();
        work(&mut driver);
        // Mesa keeps some memory for later.
        if cycle >= 20 {
            let used = device.program.resources().unwrap();
            let memory = device.program.resident_bytes().unwrap();
            let (first, before) = *settled.get_or_insert((used, memory));
            assert_eq!(used, first, "cycle {cycle}");
            // Leaking one picture each time would be 45 MiB.
            let grown = memory.saturating_sub(before);
            assert!(grown < 4 << 20, "{grown} bytes more in cycle {cycle}");
        }
    }
}
