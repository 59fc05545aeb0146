// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Input: reports of a uinput device, numbered, so that none is delivered twice or out of order; the final state of the guest
//! must agree with the keys and axes of the device.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::back_end::BackEnd;
use super::fault::Fault;
use super::link::{Link, MOVING_SIZE};
use super::loss::{Loss, patience};
use super::report::Tally;
use super::scenario::{Lives, Scenario, Start};
use crate::evdev::{
    Description, Device, EV_ABS, EV_KEY, EV_LED, EV_MSC, Event, Guest, Node, Report, devices,
};
use crate::front_end::{Buffer, GuestMemory};
use crate::process::{Resources, option};

/// Buffers of the event queue.
const DEPTH: u16 = 64;
/// Queues.
const EVENTS: usize = 0;
const STATUS: usize = 1;
/// The device file of uinput.
const UINPUT: &str = "/dev/uinput";

/// The devices: name of the scenario, and description.
pub const DEVICES: [(&str, &Description); 2] = [
    ("input keyboard", &devices::KEYBOARD),
    ("input tablet", &devices::TABLET),
];

/// Names of the scenarios.
pub fn names() -> impl Iterator<Item = String> {
    let all = [Lives::One, Lives::Many].into_iter();
    all.flat_map(|lives| DEVICES.map(|(name, _)| lives.name(name)))
}

/// Returns whether this host allows creating devices; if not, prints why.
pub fn is_possible() -> bool {
    let opened = File::options().write(true).open(UINPUT);
    if let Err(error) = &opened {
        println!("soak: this host cannot run input: {UINPUT}: {error}");
    }
    opened.is_ok()
}

/// Returns how to start the scenario.
pub fn start(name: &str, description: &'static Description, lives: Lives) -> (String, Start) {
    let start =
        move |random| Ok(Box::new(Input::new(description, lives, random)?) as Box<dyn Scenario>);
    (lives.name(name), Box::new(start))
}

/// A buffer that belongs to the device.
struct Pending {
    address: u64,
    /// Its address, if that is in memory that may be removed.
    moving: Option<GuestMemory>,
    since: Instant,
}

/// The scenario.
struct Input {
    link: Link,
    lives: Lives,
    random: Rng,
    description: &'static Description,
    device: Device,
    node: Node,
    /// Code of the events that number the reports.
    number_code: u16,
    number: i32,
    /// The last number that the guest received.
    seen: i32,
    down: Vec<u16>,
    guest: Guest,
    report: Report,
    pending: BTreeMap<u16, Pending>,
    buffers: u64,
    status: u64,
}

impl Input {
    fn new(description: &'static Description, lives: Lives, mut random: Rng) -> Result<Self, Loss> {
        let device = Device::create(description)?;
        let node = Node::open(device.node())?;
        let arguments = vec![option("evdev-path", device.node())];
        let back_end = BackEnd::start("vhost-device-input", arguments, Resources::default())?;
        let link = Link::new(back_end, &[DEPTH, DEPTH], &[(0, 1 << 20)], &mut random)?;
        let codes = description.codes.iter().find(|(kind, _)| *kind == EV_MSC);
        let number_code = codes.map(|(_, codes)| *codes.start());
        Ok(Self {
            buffers: link
                .memory()
                .allocate(u64::from(DEPTH) * Event::GUEST_SIZE as u64, 8),
            status: link.memory().allocate(Event::GUEST_SIZE as u64, 8),
            link,
            lives,
            random,
            description,
            device,
            node,
            number_code: number_code
                .ok_or_else(|| Loss("a device without a place for numbers".into()))?,
            number: 0,
            seen: 0,
            down: Vec::new(),
            guest: Guest::default(),
            report: Report::new(),
            pending: BTreeMap::new(),
        })
    }

    /// Makes a report on the host's device.
    fn make_report(&mut self) -> Result<(), Loss> {
        self.number += 1;
        let mut report = vec![Event::new(EV_MSC, self.number_code, self.number)];
        for axis in self.description.axes {
            if self.random.u32(..4) == 0 {
                let value = self.random.i32(axis.minimum..=axis.maximum);
                report.push(Event::new(EV_ABS, axis.code, value));
            }
        }
        let mut keys = self.description.codes.iter();
        if self.random.bool()
            && let Some((_, codes)) = keys.find(|(kind, _)| *kind == EV_KEY)
        {
            let code = self.random.u16(codes.clone());
            let place = self.down.iter().position(|down| *down == code);
            match place {
                Some(place) => _ = self.down.swap_remove(place),
                None => self.down.push(code),
            }
            report.push(Event::new(EV_KEY, code, place.is_none().into()));
        }
        Ok(self.device.report(&report)?)
    }

    /// Sets a light, as a guest does, whether or not the device has it.
    fn set_light(&mut self) -> Result<(), Loss> {
        let event = Event::new(EV_LED, self.random.u16(..3), self.random.bool().into());
        self.link.memory().write(self.status, &event.to_guest());
        let queue = &mut self.link.queues[STATUS];
        queue.submit(&[Buffer::readable(self.status, Event::GUEST_SIZE as u32)]);
        if !queue.wait_used(patience()) {
            return Err(Loss::late("an event of the guest"));
        }
        queue.take_used();
        self.device.received()?;
        Ok(())
    }

    /// Gives the device all buffers that it does not have.
    fn refill(&mut self) {
        let mut added = false;
        while self.link.queues[EVENTS].free_descriptors() > 0 {
            let place = u64::from(self.random.u16(..DEPTH)) * Event::GUEST_SIZE as u64;
            let moving = self.link.moving().filter(|_| self.random.bool());
            let mut address = moving.unwrap_or(self.buffers) + place;
            while self.pending.values().any(|other| other.address == address) {
                // There is one for each descriptor.
                let start = moving.unwrap_or(self.buffers);
                let size = u64::from(DEPTH) * Event::GUEST_SIZE as u64;
                address = start + (address - start + Event::GUEST_SIZE as u64) % size;
            }
            let memory = self.link.memory();
            memory.fill(address, Event::GUEST_SIZE, 0xee);
            let moving = moving.map(|_| memory.clone());
            let buffer = Buffer::writable(address, Event::GUEST_SIZE as u32);
            let Some(head) = self.link.queues[EVENTS].add(&[buffer]) else {
                break;
            };
            let pending = Pending {
                address,
                moving,
                since: Instant::now(),
            };
            self.pending.insert(head, pending);
            added = true;
        }
        if added {
            self.link.queues[EVENTS].publish();
            self.link.queues[EVENTS].kick();
        }
    }

    fn take(&mut self, tally: &Tally) -> Result<(), Loss> {
        while let Some(used) = self.link.queues[EVENTS].take_used() {
            let pending = self.pending.remove(&used.head);
            let pending = pending.ok_or_else(|| Loss(format!("{used:?} was not in flight")))?;
            if used.length == 0 && pending.moving.is_some() {
                // The memory was removed; the event arrives in another buffer.
                continue;
            }
            if used.length as usize != Event::GUEST_SIZE {
                return Err(Loss(format!("{used:?} for an event")));
            }
            if pending.moving.is_none() {
                let buffer = Buffer::writable(pending.address, used.length);
                self.link
                    .check_log(EVENTS, pending.since, &[buffer], used.length)?;
            }
            let memory = pending.moving.as_ref().unwrap_or(self.link.memory());
            let mut bytes = [0; Event::GUEST_SIZE];
            memory.read(pending.address, &mut bytes);
            tally.answered(Event::GUEST_SIZE as u64);
            self.take_event(Event::from_guest(bytes))?;
        }
        Ok(())
    }

    fn take_event(&mut self, event: Event) -> Result<(), Loss> {
        if event.is_report() {
            let report = std::mem::take(&mut self.report);
            self.guest.take(&[report]);
            return Ok(());
        }
        if (event.kind, event.code) == (EV_MSC, self.number_code) {
            if event.value <= self.seen || event.value > self.number {
                return Err(Loss(format!(
                    "report {} after report {} of {}",
                    event.value, self.seen, self.number
                )));
            }
            self.seen = event.value;
        }
        self.report.push(event);
        Ok(())
    }

    /// Resets the guest, which then has no state.
    fn begin_anew(&mut self) {
        self.guest = Guest::default();
        self.report.clear();
    }
}

impl Scenario for Input {
    fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    fn lives(&self) -> Lives {
        self.lives
    }

    fn load(&mut self, until: Instant, tally: &Tally) -> Result<(), Loss> {
        while Instant::now() < until {
            self.refill();
            self.make_report()?;
            if self.random.u32(..20) == 0 {
                self.set_light()?;
            }
            self.link.queues[EVENTS].wait_used(Duration::from_millis(1));
            self.take(tally)?;
        }
        Ok(())
    }

    fn collect(&mut self, tally: &Tally) -> Result<(), Loss> {
        self.take(tally)
    }

    fn forget(&mut self, _fault: Fault) -> Result<(), Loss> {
        self.pending.clear();
        self.begin_anew();
        Ok(())
    }

    fn connected(&mut self, _is_new: bool, has_state: bool) -> Result<(), Loss> {
        if !has_state {
            self.begin_anew();
        }
        Ok(())
    }

    fn settle(&mut self, tally: &Tally) -> Result<(), Loss> {
        let deadline = Instant::now() + patience();
        loop {
            self.refill();
            self.link.queues[EVENTS].wait_used(Duration::from_millis(5));
            self.take(tally)?;
            match self.guest.difference(&self.node) {
                None => return Ok(()),
                Some(difference) if Instant::now() > deadline => {
                    return Err(Loss(format!("{difference}; {:?}", self.guest)));
                }
                Some(_) => {}
            }
        }
    }
}

// Each buffer has its own part of the memory that is removed.
const _: () = assert!(DEPTH as usize * Event::GUEST_SIZE <= MOVING_SIZE);
