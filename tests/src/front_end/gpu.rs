// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a GPU device, and the display that a front-end passes to it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;

use super::connection::VERSION;
use super::descriptor::Buffer;
use super::device::FrontEnd;
use super::error::Result;
use super::queue::Queue;

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes reserved for a command, for its response, and for a command of the cursor queue.
const AREA: u64 = 1 << 20;
/// Bytes of the header of a command and of a response.
pub const HEADER_SIZE: usize = 24;

/// Commands and responses by their numbers (VIRTIO 1.3, 5.7.6.7).
pub mod number {
    pub use virtio_bindings::virtio_gpu::{
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE as CTX_ATTACH_RESOURCE,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_CREATE as CTX_CREATE,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DESTROY as CTX_DESTROY,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE as CTX_DETACH_RESOURCE,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET as GET_CAPSET,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO as GET_CAPSET_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO as GET_DISPLAY_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_EDID as GET_EDID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_MOVE_CURSOR as MOVE_CURSOR,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ASSIGN_UUID as ASSIGN_UUID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING as ATTACH_BACKING,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D as CREATE_2D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_3D as CREATE_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING as DETACH_BACKING,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH as FLUSH,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF as UNREF,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT as SET_SCANOUT,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SUBMIT_3D as SUBMIT_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D as TRANSFER_FROM_HOST_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D as TRANSFER_TO_HOST_2D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D as TRANSFER_TO_HOST_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR as UPDATE_CURSOR,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID as INVALID_CONTEXT_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER as INVALID_PARAMETER,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID as INVALID_RESOURCE_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID as INVALID_SCANOUT_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY as OUT_OF_MEMORY,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_UNSPEC as UNSPEC,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET as OK_CAPSET,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET_INFO as OK_CAPSET_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO as OK_DISPLAY_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_EDID as OK_EDID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA as OK_NODATA,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_RESOURCE_UUID as OK_RESOURCE_UUID,
    };
}

/// Returns words as they lie in a command.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Creates a command of a header and a body.
pub fn command(kind: u32, body: &[u8]) -> Vec<u8> {
    fenced_command(kind, 0, 0, body)
}

/// Creates a command with flags, and the number of its fence.
pub fn fenced_command(kind: u32, flags: u32, fence: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[kind, flags]);
    bytes.extend(fence.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// A response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The whole of it.
    pub bytes: Vec<u8>,
}

impl Response {
    /// Returns the type of the response.
    pub fn kind(&self) -> u32 {
        u32::from_le_bytes(self.bytes[..4].try_into().expect("a header"))
    }

    /// Returns the bytes after the header.
    pub fn body(&self) -> &[u8] {
        &self.bytes[HEADER_SIZE..]
    }
}

/// A driver that sends one command at a time.
pub struct GpuDriver {
    /// The connection.
    pub front_end: FrontEnd,
    /// The control queue.
    pub control: Queue,
    /// The cursor queue.
    pub cursor: Queue,
    area: u64,
}

impl GpuDriver {
    /// Starts both queues.
    pub fn new(front_end: FrontEnd) -> Result<Self> {
        let control = front_end.queue(0, 64)?;
        let cursor = front_end.queue(1, 16)?;
        let area = front_end.memory().allocate(3 * AREA, 4096);
        Ok(Self {
            front_end,
            control,
            cursor,
            area,
        })
    }

    /// Passes a display to the device (GPU_SET_SOCKET).
    pub fn set_display(&self, socket: &UnixStream) -> Result<()> {
        let raw = self.front_end.raw()?;
        raw.send(FrontendReq::GPU_SET_SOCKET, VERSION, &[], &[socket.as_fd()])
    }

    /// Passes a new display to the device, and waits until the device has accepted its features.
    pub fn connect_display(&self, answers: Answers) -> Display {
        let (display, socket) = Display::new(answers);
        self.set_display(&socket).expect("the socket is open");
        assert_eq!(display.next(), Shown::Features(3));
        display
    }

    /// Makes a command available, with `room` bytes for its response.
    pub fn send(&mut self, command: &[u8], room: u32) {
        let memory = self.front_end.memory();
        memory.write(self.area, command);
        memory.fill(self.area + AREA, room as usize, 0xdd);
        let mut chain = vec![Buffer::readable(self.area, command.len() as u32)];
        if room > 0 {
            chain.push(Buffer::writable(self.area + AREA, room));
        }
        self.control.submit(&chain);
    }

    /// Waits for the response to the command that was sent.
    pub fn receive(&mut self) -> Response {
        assert!(
            self.control.wait_used(PATIENCE),
            "a command was not answered"
        );
        let used = self.control.take_used().expect("a used command");
        Response {
            bytes: self
                .front_end
                .memory()
                .read_vec(self.area + AREA, used.length as usize),
        }
    }

    /// Sends a command, and waits for its response.
    pub fn run(&mut self, command: &[u8]) -> Response {
        self.send(command, 4096);
        self.receive()
    }

    /// Sends a command that must succeed without data.
    pub fn done(&mut self, kind: u32, body: &[u8]) {
        let response = self.run(&command(kind, body));
        assert_eq!(response.kind(), number::OK_NODATA, "command {kind:#x}");
        assert_eq!(response.bytes.len(), HEADER_SIZE);
    }

    /// Sends a command of the cursor queue, and waits until it is complete.
    pub fn run_cursor(&mut self, command: &[u8]) {
        // A command of the control queue may be in flight.
        let place = self.area + 2 * AREA;
        self.front_end.memory().write(place, command);
        let chain = [Buffer::readable(place, command.len() as u32)];
        self.cursor.submit(&chain);
        assert!(
            self.cursor.wait_used(PATIENCE),
            "a cursor command was not answered"
        );
        let used = self.cursor.take_used().expect("a used command");
        assert_eq!(used.length, 0);
    }

    /// Creates a resource that is backed by `pages` of guest memory, which are not contiguous. Returns their addresses.
    pub fn create(&mut self, number: u32, format: u32, width: u32, height: u32) -> Vec<u64> {
        self.done(number::CREATE_2D, &words(&[number, format, width, height]));
        self.attach(number, u64::from(width) * u64::from(height) * 4)
    }

    /// Creates a resource like [`GpuDriver::create`], and transfers `bytes` to it.
    pub fn create_drawn(
        &mut self,
        number: u32,
        format: u32,
        [width, height]: [u32; 2],
        bytes: &[u8],
    ) -> Vec<u64> {
        let pages = self.create(number, format, width, height);
        self.draw(&pages, bytes);
        self.transfer(number, width, [0, 0, width, height]);
        pages
    }

    /// Destroys a resource.
    pub fn unref(&mut self, number: u32) {
        self.done(number::UNREF, &words(&[number, 0]));
    }

    /// Backs a resource with pages for `size` bytes, which are not contiguous. Returns their addresses.
    pub fn attach(&mut self, number: u32, size: u64) -> Vec<u64> {
        const PAGE: u64 = 4096;
        let count = size.div_ceil(PAGE);
        let memory = self.front_end.memory();
        let mut pages: Vec<u64> = (0..count).map(|_| memory.allocate(PAGE, PAGE)).collect();
        pages.reverse();
        let mut body = words(&[number, count as u32]);
        for page in &pages {
            body.extend(page.to_le_bytes());
            body.extend(words(&[PAGE as u32, 0]));
        }
        self.done(number::ATTACH_BACKING, &body);
        pages
    }

    /// Returns what is in the pages that back a resource.
    pub fn look(&self, pages: &[u64]) -> Vec<u8> {
        let memory = self.front_end.memory();
        pages
            .iter()
            .flat_map(|page| memory.read_vec(*page, 4096))
            .collect()
    }

    /// Writes bytes to the pages that back a resource.
    pub fn draw(&self, pages: &[u64], bytes: &[u8]) {
        for (page, bytes) in pages.iter().zip(bytes.chunks(4096)) {
            self.front_end.memory().write(*page, bytes);
        }
    }

    /// Copies a rectangle of a resource of `width` from guest memory to the device.
    pub fn transfer(&mut self, number: u32, width: u32, [x, y, w, h]: [u32; 4]) {
        let offset = (u64::from(y) * u64::from(width) + u64::from(x)) * 4;
        let mut body = words(&[x, y, w, h]);
        body.extend(offset.to_le_bytes());
        body.extend(words(&[number, 0]));
        self.done(number::TRANSFER_TO_HOST_2D, &body);
    }

    /// Shows a rectangle of a resource on a scanout.
    pub fn set_scanout(&mut self, scanout: u32, number: u32, [x, y, w, h]: [u32; 4]) {
        self.done(number::SET_SCANOUT, &words(&[x, y, w, h, scanout, number]));
    }

    /// Shows what has changed in a rectangle of a resource.
    pub fn flush(&mut self, number: u32, rectangle: [u32; 4]) {
        self.send_flush(number, rectangle);
        let response = self.receive();
        assert_eq!(response.kind(), number::OK_NODATA, "a flush");
        assert_eq!(response.bytes.len(), HEADER_SIZE);
    }

    /// Sends a flush of a rectangle of a resource, and does not wait for its response.
    pub fn send_flush(&mut self, number: u32, [x, y, w, h]: [u32; 4]) {
        let body = words(&[x, y, w, h, number, 0]);
        self.send(&command(number::FLUSH, &body), 4096);
    }

    /// Sets the cursor of a scanout: its position, the resource that is its image (0 hides it), and its hot spot.
    pub fn update_cursor(
        &mut self,
        scanout: u32,
        [x, y]: [u32; 2],
        number: u32,
        [hot_x, hot_y]: [u32; 2],
    ) {
        let body = words(&[scanout, x, y, 0, number, hot_x, hot_y, 0]);
        self.run_cursor(&command(number::UPDATE_CURSOR, &body));
    }

    /// Moves the cursor of a scanout, whose image is resource `number`.
    pub fn move_cursor(&mut self, scanout: u32, [x, y]: [u32; 2], number: u32) {
        let body = words(&[scanout, x, y, 0, number, 0, 0, 0]);
        self.run_cursor(&command(number::MOVE_CURSOR, &body));
    }
}

/// A message that a display received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// SET_PROTOCOL_FEATURES.
    Features(u64),
    /// SCANOUT: its number, width and height.
    Scanout(u32, u32, u32),
    /// UPDATE: the scanout, the rectangle in it, its pixels.
    Update(u32, [u32; 4], Vec<u32>),
    /// CURSOR_UPDATE: the scanout, position and hot spot, the image.
    CursorImage(u32, [u32; 4], Vec<u32>),
    /// CURSOR_POS: the scanout and the position.
    CursorMove(u32, u32, u32),
    /// CURSOR_POS_HIDE: the scanout.
    CursorHide(u32),
    /// Something else.
    Unknown(u32),
}

/// The answers of a display, as payloads without headers; it does not answer if there is none.
#[derive(Clone, Debug)]
pub struct Answers {
    /// To GET_PROTOCOL_FEATURES.
    pub features: Option<Vec<u8>>,
    /// To GET_DISPLAY_INFO.
    pub display_info: Option<Vec<u8>>,
    /// To GET_EDID.
    pub edid: Option<Vec<u8>>,
}

impl Default for Answers {
    fn default() -> Self {
        let mut edid = vec![0; 1056];
        edid[24..28].copy_from_slice(&128u32.to_le_bytes());
        edid[32..160].fill(0xed);
        let mut display_info = vec![0; 408];
        display_info[24..48].copy_from_slice(&words(&[0, 0, 800, 600, 1, 0]));
        Self {
            features: Some(3u64.to_ne_bytes().to_vec()),
            display_info: Some(display_info),
            edid: Some(edid),
        }
    }
}

/// A display that records its messages, and answers requests.
#[derive(Debug)]
pub struct Display {
    shown: Receiver<Shown>,
    socket: UnixStream,
    /// Delay before it reads a message, in milliseconds.
    delay: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Makes a display. Returns the other end of its socket too, for the device.
    pub fn new(answers: Answers) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let (sender, shown) = channel();
        let socket = ours.try_clone().expect("another handle of a socket");
        let delay = Arc::new(AtomicU64::new(0));
        let its_delay = delay.clone();
        let thread = std::thread::spawn(move || {
            // It ends when either side closes the socket.
            let _ = serve(ours, &answers, &its_delay, &sender);
        });
        let display = Self {
            shown,
            socket,
            delay,
            thread: Some(thread),
        };
        (display, theirs)
    }

    /// Waits for the next message to the display.
    pub fn next(&self) -> Shown {
        match self.shown.recv_timeout(PATIENCE) {
            Ok(shown) => shown,
            Err(error) => panic!("the display receives nothing: {error}"),
        }
    }

    /// Waits this long before it reads each message, from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.delay
            .store(delay.as_millis() as u64, Ordering::Relaxed);
    }

    /// Waits for the next message to the display for a limited time.
    pub fn next_within(&self, limit: Duration) -> Option<Shown> {
        self.shown.recv_timeout(limit).ok()
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut socket: UnixStream,
    answers: &Answers,
    delay: &AtomicU64,
    shown: &Sender<Shown>,
) -> std::io::Result<()> {
    loop {
        let mut header = [0; 12];
        socket.read_exact(&mut header)?;
        std::thread::sleep(Duration::from_millis(delay.load(Ordering::Relaxed)));
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes")));
        assert_eq!(flags, 0, "flags of request {request}");
        let mut payload = vec![0; size as usize];
        socket.read_exact(&mut payload)?;
        let word = |index: usize| {
            u32::from_ne_bytes(payload[index * 4..][..4].try_into().expect("4 bytes"))
        };
        let pixels = |from: usize| -> Vec<u32> { (from..payload.len() / 4).map(word).collect() };
        let answer = match request {
            1 => &answers.features,
            3 => &answers.display_info,
            11 => &answers.edid,
            _ => {
                let what = match request {
                    2 => Shown::Features(u64::from(word(0)) | u64::from(word(1)) << 32),
                    4 => Shown::CursorMove(word(0), word(1), word(2)),
                    5 => Shown::CursorHide(word(0)),
                    6 => Shown::CursorImage(word(0), [1, 2, 3, 4].map(word), pixels(5)),
                    7 => Shown::Scanout(word(0), word(1), word(2)),
                    8 => Shown::Update(word(0), [1, 2, 3, 4].map(word), pixels(5)),
                    other => Shown::Unknown(other),
                };
                let _ = shown.send(what);
                continue;
            }
        };
        if let Some(answer) = answer {
            let header = [request, 4, answer.len() as u32]
                .map(u32::to_ne_bytes)
                .concat();
            socket.write_all(&[header.as_slice(), answer].concat())?;
        }
    }
}
