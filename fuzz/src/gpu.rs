// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands to the GPU device (2D), and a display that answers correctly or not.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arbitrary::Arbitrary;
use vhost_device_common::device::{Device, DeviceRequest, QueueHandler};
use vhost_device_gpu::Gpu;
use virtio_bindings::virtio_gpu as gpu;

use crate::bench::{Bench, load, open, poller, queue, save};
use crate::driver::{Driver, Shape};
use crate::guest::{Address, Guest};
use crate::split::{Mistake, Start};

/// Memory limit for resources. It is low, so that inputs reach it.
const MAX_HOSTMEM: &str = "--max-hostmem=1M";
const CONTROL: u16 = 0;
const CURSOR: u16 = 1;
/// The size of the header of a command, in bytes.
const HEADER: usize = 24;

/// A driver and a display.
#[derive(Arbitrary, Debug)]
pub struct Input {
    /// A device state, valid or not.
    state: Option<Vec<u8>>,
    start: Start,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Control(Command, Form),
    Cursor(Cursor, Form),
    /// The driver makes a mistake, on the cursor queue if the flag is set.
    Err(bool, Mistake),
    Connect,
    Disconnect,
    /// The display reads its requests and answers them.
    Answer,
    /// The display sends arbitrary bytes.
    Send(Vec<u8>),
    /// The display sends a part of an answer.
    Begin(u8, u16),
    /// The front-end sends the same memory again.
    Memory,
    NewDriver,
    Config(u16, u16),
}

/// How a command is sent.
#[derive(Arbitrary, Debug)]
struct Form {
    fence: Option<u64>,
    room: Room,
    shape: Shape,
    /// Number of bytes that are removed at the end.
    cut: Option<u8>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Room {
    Enough,
    Header,
    Any(u16),
}

impl Room {
    fn bytes(self) -> u64 {
        match self {
            Self::Enough => 2048,
            Self::Header => HEADER as u64,
            Self::Any(room) => room.into(),
        }
    }
}

/// The id of a resource. Most are one of a few.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Id {
    Few(u8),
    Any(u32),
}

impl Id {
    fn number(self) -> u32 {
        match self {
            Self::Few(number) => u32::from(number) % 4,
            Self::Any(number) => number,
        }
    }
}

/// A length or a coordinate in a picture.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Length {
    Zero,
    Cursor,
    Few(u8),
    Some(u16),
    Any(u32),
}

impl Length {
    fn number(self) -> u32 {
        match self {
            Self::Zero => 0,
            Self::Cursor => 64,
            Self::Few(number) => u32::from(number) % 96,
            Self::Some(number) => number.into(),
            Self::Any(number) => number,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Rectangle([Length; 4]);

impl Rectangle {
    fn words(self) -> [u32; 4] {
        self.0.map(Length::number)
    }
}

#[derive(Arbitrary, Debug)]
enum Command {
    DisplayInfo,
    Edid(u8),
    Create(Id, u8, Length, Length),
    /// Creates a resource that all other commands can use.
    CreateGood(Id, u8),
    Unref(Id),
    Scanout(u8, Id, Rectangle),
    ScanoutGood(u8, Id),
    Flush(Id, Rectangle),
    Transfer(Id, Rectangle, Length),
    Attach(Id, Vec<(Address, Length)>, Option<u32>),
    AttachGood(Id),
    Detach(Id),
    AssignUuid(Id),
    CapsetInfo(u32),
    Capset(u32, u32),
    Other(u32, Vec<u8>),
}

const FORMATS: [u32; 9] = [1, 2, 3, 4, 67, 68, 121, 134, 5];

impl Command {
    /// Returns the type of the command, and the words after the header.
    fn parts(&self) -> (u32, Vec<u32>) {
        let format = |number: u8| FORMATS[usize::from(number) % FORMATS.len()];
        let good = |number: u8| FORMATS[usize::from(number) % 8];
        let scanout = |number: u8| u32::from(number) % 17;
        let whole = [0, 0, 64, 64];
        match self {
            Self::DisplayInfo => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO,
                vec![],
            ),
            Self::Edid(number) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_EDID,
                vec![scanout(*number), 0],
            ),
            Self::Create(id, number, width, height) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D,
                vec![
                    id.number(),
                    format(*number),
                    width.number(),
                    height.number(),
                ],
            ),
            Self::CreateGood(id, number) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D,
                vec![id.number(), good(*number), 64, 64],
            ),
            Self::Unref(id) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF,
                vec![id.number(), 0],
            ),
            Self::Scanout(number, id, rectangle) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT,
                [&rectangle.words()[..], &[scanout(*number), id.number()]].concat(),
            ),
            Self::ScanoutGood(number, id) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT,
                [&whole[..], &[scanout(*number), id.number()]].concat(),
            ),
            Self::Flush(id, rectangle) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH,
                [&rectangle.words()[..], &[id.number(), 0]].concat(),
            ),
            Self::Transfer(id, rectangle, offset) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D,
                [
                    &rectangle.words()[..],
                    &[offset.number(), 0, id.number(), 0],
                ]
                .concat(),
            ),
            Self::Attach(id, pieces, count) => {
                let count = count.unwrap_or(pieces.len() as u32);
                let mut words = vec![id.number(), count];
                for (Address(address), length) in pieces {
                    words.extend([*address as u32, (address >> 32) as u32, length.number(), 0]);
                }
                (
                    gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING,
                    words,
                )
            }
            Self::AttachGood(id) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING,
                vec![id.number(), 2, 0x8000, 0, 0x2000, 0, 0xf000, 0, 0x8000, 0],
            ),
            Self::Detach(id) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING,
                vec![id.number(), 0],
            ),
            Self::AssignUuid(id) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID,
                vec![id.number(), 0],
            ),
            Self::CapsetInfo(number) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO,
                vec![*number, 0],
            ),
            Self::Capset(number, version) => (
                gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET,
                vec![*number, *version],
            ),
            Self::Other(kind, data) => (*kind, data.iter().map(|byte| u32::from(*byte)).collect()),
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Cursor {
    kind: CursorKind,
    scanout: u8,
    position: [Length; 2],
    id: Id,
    hot: [Length; 2],
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum CursorKind {
    Update,
    Move,
    Other(u32),
}

impl Cursor {
    fn parts(&self) -> (u32, Vec<u32>) {
        let kind = match self.kind {
            CursorKind::Update => gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR,
            CursorKind::Move => gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_MOVE_CURSOR,
            CursorKind::Other(kind) => kind,
        };
        let [x, y] = self.position.map(Length::number);
        let [hot_x, hot_y] = self.hot.map(Length::number);
        let scanout = u32::from(self.scanout) % 17;
        (
            kind,
            vec![scanout, x, y, 0, self.id.number(), hot_x, hot_y, 0],
        )
    }
}

/// Returns the bytes of a command.
fn bytes((kind, words): &(u32, Vec<u32>), form: &Form) -> Vec<u8> {
    let flags = form.fence.map_or(0, |_| gpu::VIRTIO_GPU_FLAG_FENCE);
    let mut bytes = [*kind, flags].map(u32::to_le_bytes).concat();
    bytes.extend(form.fence.unwrap_or(0).to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let cut = form.cut.map_or(0, usize::from);
    bytes.truncate(bytes.len().saturating_sub(cut));
    bytes
}

/// The display of the front-end.
#[derive(Default)]
struct Peer {
    socket: Option<UnixStream>,
    /// Received bytes that are not handled yet.
    sent: Vec<u8>,
}

/// The requests that a display answers, and the sizes of the answers.
const ANSWERS: [(u32, usize); 3] = [(1, 8), (3, 408), (11, 1056)];

impl Peer {
    /// Reads what is available. Returns the requests that expect an answer.
    fn read(&mut self) -> Vec<u32> {
        let Some(socket) = &mut self.socket else {
            return Vec::new();
        };
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count) = socket.read(&mut buffer)
            && count > 0
        {
            self.sent.extend_from_slice(&buffer[..count]);
        }
        let mut asked = Vec::new();
        let mut rest = self.sent.as_slice();
        let number = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap_or_default());
        while rest.len() >= 12 {
            let (request, size) = (number(&rest[..4]), number(&rest[8..12]) as usize);
            assert!(
                (1..=13).contains(&request),
                "request {request} to the display"
            );
            if rest.len() - 12 < size {
                break;
            }
            rest = &rest[12 + size..];
            if ANSWERS.iter().any(|(number, _)| *number == request) {
                asked.push(request);
            }
        }
        self.sent = rest.to_vec();
        asked
    }

    fn send(&mut self, bytes: &[u8]) {
        if let Some(socket) = &mut self.socket {
            let _ = socket.write(bytes);
        }
    }
}

/// Returns an answer to a request.
fn answer(request: u32) -> Vec<u8> {
    let size = ANSWERS.iter().find(|(number, _)| *number == request);
    let size = size.map_or(0, |(_, size)| *size);
    let mut answer = [request, 4, size as u32].map(u32::to_ne_bytes).concat();
    answer.resize(12 + size, 1);
    answer
}

thread_local! {
    static DEVICE: RefCell<Option<Gpu>> = const { RefCell::new(None) };
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the device violates the specification.
    pub fn run(self) {
        DEVICE.with_borrow_mut(|device| {
            let device = device.get_or_insert_with(|| {
                open(&[MAX_HOSTMEM.to_owned()]).expect("the device accepts this option")
            });
            self.run_on(device);
            device.reset();
        });
    }

    fn run_on(self, device: &Gpu) {
        device.set_features(device.features());
        let mut guest = Guest::new();
        let mut driver = Driver::new(2, self.start, &mut guest);
        load(device, self.state.as_deref());
        let (poller, watcher) = poller();
        let mut handler = device.handler(0, watcher).expect("a handler");
        let queues = [CONTROL, CURSOR].map(|number| queue(number, &driver, &guest));
        let mut bench = Bench::new(&mut handler, poller, queues.into());
        let mut peer = Peer::default();
        for step in self.steps {
            match step {
                Step::Control(command, form) => {
                    let command = bytes(&command.parts(), &form);
                    let room = form.room.bytes();
                    driver.submit(CONTROL, &mut guest, &command, room, &form.shape);
                    bench.kick(CONTROL);
                }
                Step::Cursor(command, form) => {
                    let command = bytes(&command.parts(), &form);
                    driver.submit(CURSOR, &mut guest, &command, 0, &form.shape);
                    bench.kick(CURSOR);
                }
                Step::Err(queue, mistake) => {
                    let queue = u16::from(queue);
                    driver.err(queue, &mut guest, mistake);
                    bench.kick(queue);
                }
                Step::Connect => {
                    let (ours, socket) = UnixStream::pair().expect("a pair of sockets");
                    ours.set_nonblocking(true).expect("a socket");
                    let request = DeviceRequest::GpuSocket(socket);
                    assert!(device.handle_request(request).is_ok());
                    peer = Peer {
                        socket: Some(ours),
                        sent: Vec::new(),
                    };
                    bench.wait();
                }
                Step::Disconnect => {
                    peer.socket = None;
                    bench.wait();
                }
                Step::Answer => {
                    for request in peer.read() {
                        peer.send(&answer(request));
                    }
                    bench.wait();
                }
                Step::Send(bytes) => {
                    peer.send(&bytes);
                    bench.wait();
                }
                Step::Begin(request, length) => {
                    let answer = answer(ANSWERS[usize::from(request) % 3].0);
                    peer.send(&answer[..answer.len().min(length.into())]);
                    bench.wait();
                }
                Step::Memory => {
                    let memory = Arc::clone(&guest.memory);
                    bench.handler().memory_changed(&memory);
                }
                Step::NewDriver => {
                    if bench.held(CONTROL) == 0 {
                        device.new_driver();
                    }
                }
                Step::Config(offset, size) => {
                    let data = vec![0; usize::from(size)];
                    let _ = device.write_config(offset.into(), &data);
                    assert_eq!(device.config().len(), 16);
                }
            }
            match bench.held(CONTROL) {
                0 if driver.is_empty(&guest) => driver.settle(),
                // At most one command waits for the display, together with the completed commands of its batch.
                held => assert!(held <= 64),
            }
        }
        bench.kick(CONTROL);
        bench.stop(CONTROL);
        bench.stop(CURSOR);
        save(device);
        driver.assert_untouched(&mut guest);
    }
}
