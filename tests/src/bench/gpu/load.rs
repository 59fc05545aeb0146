// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver that makes the load: a fixed number of items in flight, each of one command or two.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::front_end::gpu::{GpuDriver, HEADER_SIZE, fenced_command, number, words};
use crate::front_end::{Buffer, FrontEnd, Queue};

/// Time limit of an item.
const LIMIT: Duration = Duration::from_secs(20);
/// Blue, green, red, unused: the format that Linux uses.
const B8G8R8X8: u32 = 2;
/// The resource that is drawn to.
const PICTURE: u32 = 1;
/// The first of the resources that are created and destroyed.
const FLEETING: u32 = 100;
/// Flag of a command: its response tells that the work is complete.
const FENCE: u32 = 1;
/// Descriptors of a ring.
const QUEUE_SIZE: usize = 64;
/// Bytes for a command, and for its response.
const PLACE: u64 = 128;
/// Commands of an item at most.
const COMMANDS: u64 = 2;

/// What one item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// A rectangle of this size is transferred and flushed.
    Show(u32, u32),
    /// A rectangle of this size is transferred.
    Transfer(u32, u32),
    /// The cursor is moved.
    MoveCursor,
    /// A resource of this size is created and unreferenced.
    CreateUnref(u32, u32),
}

/// A kind of load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// What is done.
    pub item: Item,
    /// Width and height of the scanout.
    pub picture: (u32, u32),
    /// Items in flight.
    pub depth: usize,
}

impl Load {
    /// Returns bytes of pixels that an item moves.
    pub fn item_bytes(&self) -> u64 {
        match self.item {
            Item::Show(width, height) | Item::Transfer(width, height) => bytes(width, height),
            Item::MoveCursor | Item::CreateUnref(..) => 0,
        }
    }

    /// Returns whether an item is a picture as large as the scanout, which is shown.
    pub fn is_frame(&self) -> bool {
        self.item == Item::Show(self.picture.0, self.picture.1)
    }

    /// Returns guest memory that the load needs, in bytes: the picture, commands and rings.
    pub fn memory_size(&self) -> usize {
        bytes(self.picture.0, self.picture.1) as usize + (8 << 20)
    }

    /// Returns where the item that is the `count`th is, so that the whole picture is used.
    fn position(&self, width: u32, height: u32, count: u64) -> (u32, u32) {
        let columns = u64::from(self.picture.0 / width);
        let rows = u64::from(self.picture.1 / height);
        let (column, row) = (count % columns, count / columns % rows);
        (column as u32 * width, row as u32 * height)
    }

    /// Returns the commands of the `count`th item, in a place of its own among those in flight.
    fn commands(&self, slot: usize, count: u64) -> Vec<Vec<u8>> {
        let plain = |kind, body: &[u32]| fenced_command(kind, 0, 0, &words(body));
        let transfer = |width, height| {
            let (x, y) = self.position(width, height, count);
            let offset = (y * self.picture.0 + x) * 4;
            plain(
                number::TRANSFER_TO_HOST_2D,
                &[x, y, width, height, offset, 0, PICTURE, 0],
            )
        };
        match self.item {
            Item::Show(width, height) => {
                let (x, y) = self.position(width, height, count);
                let body = words(&[x, y, width, height, PICTURE, 0]);
                let flush = fenced_command(number::FLUSH, FENCE, count, &body);
                vec![transfer(width, height), flush]
            }
            Item::Transfer(width, height) => vec![transfer(width, height)],
            Item::MoveCursor => {
                let (x, y) = self.position(1, 1, count);
                let body = [0, x, y, 0, PICTURE, 0, 0, 0];
                vec![plain(number::MOVE_CURSOR, &body)]
            }
            Item::CreateUnref(width, height) => {
                let resource = FLEETING + slot as u32;
                vec![
                    plain(number::CREATE_2D, &[resource, B8G8R8X8, width, height]),
                    plain(number::UNREF, &[resource, 0]),
                ]
            }
        }
    }
}

fn bytes(width: u32, height: u32) -> u64 {
    u64::from(width) * u64::from(height) * 4
}

/// What was counted in the window.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Items that were completed.
    pub items: u64,
    /// How long that took.
    pub time: Duration,
    /// CPU time of the back-end.
    pub cpu: Duration,
}

/// A connection with started queues and a picture on the screen, ready to run a load.
pub struct Driver {
    gpu: GpuDriver,
    load: Load,
    /// Where commands and responses are.
    area: u64,
    /// Items that were made available, warm-up included.
    started: u64,
    /// For the head of an item's last command: the item's place.
    slot_of_head: [Option<usize>; QUEUE_SIZE],
}

impl Driver {
    /// Starts the queues, and shows a picture that is made of single pages.
    pub fn new(
        front_end: FrontEnd,
        load: Load,
        display: &UnixStream,
    ) -> crate::front_end::Result<Self> {
        let mut gpu = GpuDriver::new(front_end)?;
        gpu.set_display(display)?;
        let (width, height) = load.picture;
        let pages = gpu.create(PICTURE, B8G8R8X8, width, height);
        let picture: Vec<u8> = (0..u64::from(width) * u64::from(height))
            .flat_map(|pixel| (pixel as u32).wrapping_mul(0x9e37_79b9).to_le_bytes())
            .collect();
        gpu.draw(&pages, &picture);
        gpu.transfer(PICTURE, width, [0, 0, width, height]);
        gpu.set_scanout(0, PICTURE, [0, 0, width, height]);
        let size = PLACE * 2 * COMMANDS * load.depth as u64;
        let area = gpu.front_end.memory().allocate(size, 4096);
        Ok(Self {
            gpu,
            load,
            area,
            started: 0,
            slot_of_head: [None; QUEUE_SIZE],
        })
    }

    /// Returns bytes that the display is sent of all items so far.
    pub fn shown(&self) -> u64 {
        match self.load.item {
            Item::Show(..) => self.started * self.load.item_bytes(),
            _ => 0,
        }
    }

    /// Runs the load for `warm_up`, and counts from then on for `window`. `cpu_time` is the back-end's.
    pub fn run(
        &mut self,
        warm_up: Duration,
        window: Duration,
        cpu_time: impl Fn() -> io::Result<Duration>,
    ) -> io::Result<Measured> {
        let begin = Instant::now() + warm_up;
        let mut counted_from = None;
        let mut measured = None;
        let mut items = 0;
        let mut in_flight = self.load.depth;
        (0..self.load.depth).for_each(|slot| self.add(slot));
        self.queue().publish();
        self.queue().kick();
        while in_flight > 0 {
            if !self.queue().wait_used(LIMIT) {
                return Err(io::Error::other(format!(
                    "an item took longer than {LIMIT:?}"
                )));
            }
            self.queue().disarm_interrupt();
            while let Some(used) = self.queue().take_used() {
                let Some(slot) = self.slot_of_head[usize::from(used.head)].take() else {
                    continue;
                };
                self.check(slot)?;
                items += 1;
                match measured {
                    Some(_) => in_flight -= 1,
                    None => self.add(slot),
                }
            }
            self.queue().publish();
            self.queue().kick();
            let now = Instant::now();
            match counted_from {
                None if now >= begin => counted_from = Some((items, now, cpu_time()?)),
                Some((before, start, cpu)) if measured.is_none() && now - start >= window => {
                    measured = Some(Measured {
                        items: items - before,
                        time: now - start,
                        cpu: cpu_time()?.saturating_sub(cpu),
                    });
                }
                _ => {}
            }
        }
        measured.ok_or_else(|| io::Error::other("no item was completed"))
    }

    fn queue(&mut self) -> &mut Queue {
        match self.load.item {
            Item::MoveCursor => &mut self.gpu.cursor,
            _ => &mut self.gpu.control,
        }
    }

    /// Returns where the place of an item begins.
    fn place(&self, slot: usize) -> u64 {
        self.area + slot as u64 * PLACE * 2 * COMMANDS
    }

    fn add(&mut self, slot: usize) {
        let commands = self.load.commands(slot, self.started);
        self.started += 1;
        let mut place = self.place(slot);
        let mut last = 0;
        for command in commands {
            let memory = self.gpu.front_end.memory();
            memory.write(place, &command);
            memory.write_u32(place + PLACE, 0);
            let chain = [
                Buffer::readable(place, command.len() as u32),
                Buffer::writable(place + PLACE, HEADER_SIZE as u32),
            ];
            // Drivers leave no room for the response to a cursor command.
            let chain = match self.load.item {
                Item::MoveCursor => &chain[..1],
                _ => &chain,
            };
            last = self.queue().add(chain).expect("room for the depth");
            place += 2 * PLACE;
        }
        self.slot_of_head[usize::from(last)] = Some(slot);
    }

    fn check(&self, slot: usize) -> io::Result<()> {
        let count = match self.load.item {
            Item::MoveCursor => 0,
            Item::Transfer(..) => 1,
            Item::Show(..) | Item::CreateUnref(..) => COMMANDS,
        };
        for command in 0..count {
            let place = self.place(slot) + command * 2 * PLACE + PLACE;
            let response = self.gpu.front_end.memory().read_u32(place);
            if response != number::OK_NODATA {
                return Err(io::Error::other(format!(
                    "command {command} of an item was answered by {response:#x}"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_cover_the_picture_and_stay_in_it() {
        let load = Load {
            item: Item::Show(64, 64),
            picture: (256, 128),
            depth: 1,
        };
        let places: Vec<_> = (0..9).map(|count| load.position(64, 64, count)).collect();
        assert_eq!(places[0], (0, 0));
        assert_eq!(places[5], (64, 64));
        assert_eq!(places[7], (192, 64));
        assert_eq!(places[8], (0, 0));
        assert!(!load.is_frame());
        assert_eq!(load.item_bytes(), 16384);
    }
}
