// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the device: streams, jacks, control elements, and the events that the driver has not received yet.

use std::collections::VecDeque;
use std::time::Instant;

use serde_json::Value;
use vhost_device_common::chain::Chain;
use zerocopy::IntoBytes;

use crate::chmap;
use crate::elements::{self, Elements};
use crate::jack;
use crate::protocol::{ChmapInfo, Direction, Event, PCM_STATUS_SIZE, Status};
use crate::stream::{self, Finished, SavedStream, Stream};

/// What is saved: the device state, version 1.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    streams: Vec<SavedStream>,
    elements: Vec<u32>,
}

/// The state of the device.
pub struct Card {
    /// Streams, by their numbers.
    pub streams: Vec<Stream>,
    /// Whether something is plugged into the jack of each stream.
    jacks: Vec<bool>,
    /// Channel maps of all streams.
    chmaps: Vec<ChmapInfo>,
    /// Control elements, if the device offers them.
    elements: Option<Elements>,
    /// Whether the driver knows control elements.
    has_elements: bool,
    /// Events that the driver has not received, of each source one at most.
    events: VecDeque<Event>,
    /// Number of buffers that were taken of each direction's queue.
    taken: [u64; 2],
}

impl Card {
    /// Creates a device with these streams.
    pub fn new(streams: Vec<Stream>, has_elements: bool) -> Self {
        let mut card = Self {
            jacks: vec![true; streams.len()],
            chmaps: Vec::new(),
            streams,
            elements: has_elements.then(Elements::default),
            has_elements: false,
            events: VecDeque::new(),
            taken: [0; 2],
        };
        for (index, stream) in card.streams.iter().enumerate() {
            let maps = chmap::maps(stream.profile(), card.group(index));
            card.chmaps.extend(maps);
        }
        card
    }

    /// Returns the number of the PCM device of a stream: outputs and inputs are counted separately, so that Linux makes one PCM device of
    /// the first output and the first input.
    fn group(&self, stream: usize) -> u32 {
        let direction = self.streams.get(stream).map(Stream::direction);
        let before = self.streams.iter().take(stream);
        let same = before.filter(|stream| Some(stream.direction()) == direction);
        same.count() as u32
    }

    /// Returns the config space (VIRTIO 1.3, 5.14.4).
    pub fn config(&self) -> Vec<u8> {
        let mut fields = vec![self.jacks.len(), self.streams.len(), self.chmaps.len()];
        if self.elements.is_some() {
            fields.push(elements::COUNT);
        }
        let bytes = fields
            .into_iter()
            .flat_map(|field| (field as u32).to_le_bytes());
        bytes.collect()
    }

    /// Returns whether the device offers control elements.
    pub fn offers_elements(&self) -> bool {
        self.elements.is_some()
    }

    /// Notes whether the driver knows control elements.
    pub fn accept_elements(&mut self, accepted: bool) {
        self.has_elements = accepted;
        if !accepted {
            self.events
                .retain(|event| !matches!(event, Event::Value(_)));
        }
    }

    /// Drops the event of an underrun or overrun of a stream that the driver prepares for another run.
    pub fn drop_xrun(&mut self, stream: usize) {
        self.events
            .retain(|event| *event != Event::Xrun(stream as u32));
    }

    /// Discards all state of the driver.
    pub fn reset(&mut self) {
        self.streams.iter_mut().for_each(Stream::reset);
        if let Some(elements) = &mut self.elements {
            *elements = Elements::default();
        }
        self.apply_elements();
        self.events.clear();
    }

    /// Returns the control elements, if the driver knows them.
    pub fn elements(&mut self) -> Option<&mut Elements> {
        self.elements.as_mut().filter(|_| self.has_elements)
    }

    /// Tells all streams their volume.
    fn apply_elements(&mut self) {
        let Some(elements) = &self.elements else {
            return;
        };
        for stream in &mut self.streams {
            stream.set_factor(elements.factor(stream.direction()));
        }
    }

    /// Returns the information about one stream.
    pub fn pcm_info(&self, index: usize) -> Option<Vec<u8>> {
        let stream = self.streams.get(index)?;
        let info = stream.profile().info(self.group(index));
        Some(info.as_bytes().to_vec())
    }

    /// Returns the information about one jack.
    pub fn jack_info(&self, index: usize) -> Option<Vec<u8>> {
        let (stream, connected) = (self.streams.get(index)?, self.jacks.get(index)?);
        let info = jack::info(stream.direction(), self.group(index), *connected);
        Some(info.as_bytes().to_vec())
    }

    /// Returns the information about one channel map.
    pub fn chmap_info(&self, index: usize) -> Option<Vec<u8>> {
        let info = self.chmaps.get(index)?;
        Some(info.as_bytes().to_vec())
    }

    /// Returns the numbers of jacks, streams and channel maps.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.jacks.len(), self.streams.len(), self.chmaps.len())
    }

    /// Plugs something into a jack, or out. Returns whether the driver is to be notified, or `None` if the jack does not exist.
    pub fn set_jack(&mut self, jack: usize, connected: bool) -> Option<bool> {
        let before = std::mem::replace(self.jacks.get_mut(jack)?, connected);
        if before == connected {
            return Some(false);
        }
        self.notify(Event::Jack {
            jack: jack as u32,
            connected,
        });
        Some(true)
    }

    /// Sets the value of a control element. Returns whether the driver is to be notified, or `None` if that is not possible.
    pub fn set_element(&mut self, element: u32, value: u32) -> Option<bool> {
        let has_changed = self.elements.as_mut()?.set(element, value)?;
        let notifies = has_changed && self.has_elements;
        if has_changed {
            self.apply_elements();
        }
        if notifies {
            self.notify(Event::Value(element as u16));
        }
        Some(notifies)
    }

    fn notify(&mut self, event: Event) {
        self.events.retain(|earlier| !event.replaces(*earlier));
        self.events.push_back(event);
    }

    /// Returns the next event for the driver.
    pub fn next_event(&self) -> Option<Event> {
        self.events.front().copied()
    }

    /// Removes the next event, which was sent.
    pub fn remove_event(&mut self) {
        self.events.pop_front();
    }

    /// Takes a buffer of a queue. If it cannot be used, or is done at once, it is added to `finished`.
    pub fn take(
        &mut self,
        direction: Direction,
        mut chain: Chain,
        now: Instant,
        finished: &mut Vec<Finished>,
    ) {
        let taken = match direction {
            Direction::Output => &mut self.taken[0],
            Direction::Input => &mut self.taken[1],
        };
        *taken += 1;
        let taken = *taken;
        // Without room for it, there is no status.
        let has_status = chain.split_tail(PCM_STATUS_SIZE.into()).is_ok();
        let mut number = [0; 4];
        let number = chain.read(&mut number).map(|()| u32::from_le_bytes(number));
        let stream = number
            .ok()
            .and_then(|number| self.streams.get_mut(number as usize));
        match stream {
            Some(stream) if has_status && stream.direction() == direction => {
                stream.take(chain, taken, now, finished);
            }
            _ => finished.push(stream::complete(chain, direction, Status::IoError, 0, 0)),
        }
    }

    /// Moves the sound of all streams up to `now`.
    pub fn tick(&mut self, now: Instant, finished: &mut Vec<(u16, Finished)>) {
        let mut done = Vec::new();
        let mut xruns = Vec::new();
        for (index, stream) in self.streams.iter_mut().enumerate() {
            if stream.tick(now, &mut done) {
                xruns.push(Event::Xrun(index as u32));
            }
            let queue = stream.direction().queue();
            finished.extend(done.drain(..).map(|done| (queue, done)));
        }
        xruns.into_iter().for_each(|event| self.notify(event));
    }

    /// Returns when to call [`Card::tick`] next, if a stream runs.
    pub fn next_tick(&self, now: Instant) -> Option<Instant> {
        let streams = self.streams.iter();
        streams.filter_map(|stream| stream.next_tick(now)).min()
    }

    /// Returns the streams of a direction.
    pub fn streams_of(&mut self, direction: Direction) -> impl Iterator<Item = &mut Stream> {
        let streams = self.streams.iter_mut();
        streams.filter(move |stream| stream.direction() == direction)
    }

    /// Returns the requests of all buffers of a queue that stops, the one taken last first, to be put back into the ring. Only those can
    /// be that no completed request follows; the others are added to `finished`.
    pub fn take_back(
        &mut self,
        direction: Direction,
        now: Instant,
        finished: &mut Vec<Finished>,
    ) -> Vec<Chain> {
        let mut first = 1 + match direction {
            Direction::Output => self.taken[0],
            Direction::Input => self.taken[1],
        };
        let mut held: Vec<u64> = Vec::new();
        for stream in self.streams_of(direction) {
            held.extend(stream.sequences());
        }
        held.sort_unstable();
        while held.last().is_some_and(|last| last + 1 == first) {
            held.pop();
            first -= 1;
        }
        let mut chains = Vec::new();
        for stream in self.streams_of(direction) {
            chains.extend(stream.take_back(first, now, finished));
        }
        chains.sort_unstable_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
        chains.into_iter().map(|(_, chain)| chain).collect()
    }

    /// Returns the device state.
    pub fn save(&self) -> Saved {
        Saved {
            streams: self.streams.iter().map(Stream::save).collect(),
            elements: self
                .elements
                .map_or(Vec::new(), |elements| elements.values().to_vec()),
        }
    }

    /// Continues from a device state.
    ///
    /// # Errors
    /// Returns what this device does not have. Nothing has changed, unless the host failed.
    pub fn load(&mut self, saved: Saved) -> Result<(), &'static str> {
        if saved.streams.len() != self.streams.len() {
            return Err("another number of streams; start this program with the same --streams");
        }
        let mut pairs = self.streams.iter().zip(&saved.streams);
        if !pairs.all(|(stream, saved)| stream.accepts(saved)) {
            return Err(
                "parameters that a stream does not offer; start this program with the same --streams",
            );
        }
        let elements = match (&self.elements, saved.elements.as_slice()) {
            (None, []) => None,
            (None, _) | (Some(_), []) => {
                return Err("other control elements; start this program with the same --controls");
            }
            (Some(_), values) => {
                Some(Elements::with_values(values).ok_or("an invalid value of a control element")?)
            }
        };
        for (stream, saved) in self.streams.iter_mut().zip(saved.streams) {
            let loaded = stream.load(saved);
            loaded.map_err(|_| "parameters that the back-end does not support")?;
        }
        self.elements = elements;
        self.apply_elements();
        Ok(())
    }

    /// Returns the state of all streams, for people and programs.
    pub fn report(&self) -> Value {
        let reports = self.streams.iter().enumerate().map(|(index, stream)| {
            let mut report = stream.report();
            if let Value::Object(fields) = &mut report {
                fields.insert("id".to_owned(), index.into());
                fields.insert("jack".to_owned(), self.jacks.get(index).copied().into());
            }
            report
        });
        reports.collect()
    }
}
