// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front-end's display, behind a socket of its own (vhost-user-gpu protocol, GPU_SET_SOCKET).
//!
//! What is shown is kept here: when a display comes (back), it is told all of it. Nothing here waits. What the display has no
//! room for is sent when it has, and then as it is by then.

mod link;
mod message;
mod outgoing;
mod output;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use vhost_device_common::{info_limited, warn_limited};

use crate::dmabuf::Dmabuf;
use crate::protocol::MAX_SCANOUTS;
use crate::rectangle::Rectangle;
use crate::resource::Resources;
use link::{DisplayError, Link, MAX_ASKED, watch};
pub use message::Query;
use message::{HEADER_SIZE, Request, message};
use outgoing::Outgoing;
pub use output::{Cursor, Source};
use output::{Output, whole};

/// Room for what the display has yet to read, in bytes; the kernel doubles it. Twice the usual room halves how often a large
/// picture wakes both sides. With more, flushes would be done long before their picture is seen.
const SEND_BUFFER: usize = 208 << 10;

/// The display.
#[derive(Debug)]
pub struct Display {
    /// Becomes readable when there is something to do.
    events: Arc<OwnedFd>,
    /// An event of its own, when a display ends: whoever waits for it may be on another queue than the one that saw that.
    ended: OwnedFd,
    link: Option<Link>,
    /// A display that is not used. QEMU waits with one CPU for what comes from a socket whose other end is closed.
    unused: Option<UnixStream>,
    outputs: [Output; MAX_SCANOUTS],
    /// The question that a command waits for the answer to.
    question: Option<Query>,
    /// Counts what comes, and the pictures that go, so that one sees whether the display is alive.
    progress: u64,
}

impl Display {
    pub fn new() -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Each time once, so that it need not be read.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&events, &ended, epoll::EventData::new_u64(0), flags)?;
        Ok(Self {
            events: Arc::new(events),
            ended,
            link: None,
            unused: None,
            outputs: Default::default(),
            question: None,
            progress: 0,
        })
    }

    /// What becomes readable when [`Display::advance`] is to be called.
    pub fn events(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.events)
    }

    /// Uses another display from now on.
    pub fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        // Of the display before this one; it waits for this one's answer from now on.
        let question = self.question;
        self.disconnect();
        watch(&self.events, socket.as_fd())?;
        let _ = set_socket_send_buffer_size(&socket, SEND_BUFFER);
        self.link = Some(Link::new(socket, question));
        self.question = question;
        for output in &mut self.outputs {
            output.announce = output.source.is_some();
            output.has_buffer = false;
            output.dirty = output.source.map(|source| whole(&source));
            output.cursor.moved = output.cursor.visible;
            output.cursor.changed = output.cursor.visible && !output.cursor.image.is_empty();
        }
        Ok(())
    }

    /// Keeps the socket of a display open until the next one comes or the device is reset, and does not use it.
    pub fn keep(&mut self, socket: UnixStream) {
        self.disconnect();
        self.unused = Some(socket);
    }

    /// Whether there is a display.
    pub fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    /// Lets go of the display. What is shown is remembered for the next one.
    pub fn disconnect(&mut self) {
        self.unused = None;
        self.end_link();
    }

    /// Uses the display no more. Gives its socket.
    fn end_link(&mut self) -> Option<UnixStream> {
        self.question = None;
        let Link { socket, .. } = self.link.take()?;
        let _ = epoll::delete(&*self.events, &socket);
        let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
        Some(socket)
    }

    /// Forgets what the guest shows.
    pub fn clear(&mut self, resources: &Resources) {
        self.detach(None, resources);
        for Output { cursor, .. } in &mut self.outputs {
            // The display may not have been told yet that it is gone.
            let moved = (cursor.visible || cursor.moved) && self.link.is_some();
            *cursor = Cursor {
                moved,
                ..Cursor::default()
            };
        }
        self.forget_question();
    }

    /// A resource (or all, without a number) is about to go. No scanout may show it any more.
    pub fn detach(&mut self, number: Option<u32>, resources: &Resources) {
        if let Some(outgoing) = self.link.as_mut().and_then(|link| link.outgoing.as_mut()) {
            outgoing.detach(number, resources);
        }
        for output in &mut self.outputs {
            if let Some(source) = output.source
                && number.is_none_or(|number| number == source.resource)
            {
                output.show(None, None);
            }
        }
    }

    /// Shows something else on a scanout, which the display takes from the buffer where there is one. There is no scanout with
    /// another number.
    pub fn set_scanout(
        &mut self,
        scanout: u32,
        source: Option<Source>,
        buffer: Option<Arc<Dmabuf>>,
    ) {
        if let Some(output) = self.outputs.get_mut(scanout as usize) {
            output.show(source, buffer);
        }
    }

    /// What each scanout shows, and its cursor.
    pub fn shown(&self) -> [(Option<Source>, &Cursor); MAX_SCANOUTS] {
        self.outputs
            .each_ref()
            .map(|output| (output.source, &output.cursor))
    }

    fn outputs_of(&self, resource: u32) -> impl Iterator<Item = &Output> {
        let outputs = self.outputs.iter();
        outputs.filter(move |output| {
            output
                .source
                .is_some_and(|source| source.resource == resource)
        })
    }

    /// Whether a scanout shows something of a resource, and is sent its pixels.
    pub fn shows_pixels(&self, resource: u32) -> bool {
        self.outputs_of(resource)
            .any(|output| output.buffer.is_none())
    }

    /// The buffer that a scanout shows a resource from.
    pub fn buffer(&self, resource: u32) -> Option<Arc<Dmabuf>> {
        self.outputs_of(resource)
            .find_map(|output| output.buffer.clone())
    }

    /// A part of a resource has changed.
    pub fn flush(&mut self, resource: u32, rectangle: &Rectangle) {
        for output in &mut self.outputs {
            if let Some(source) = output.source
                && source.resource == resource
                && let Some(shown) = rectangle.intersection(&source.rectangle)
            {
                let shown = shown.relative_to(&source.rectangle);
                let dirty = output.dirty.map_or(shown, |dirty| dirty.union(&shown));
                output.dirty = self.link.is_some().then_some(dirty);
            }
        }
    }

    /// Moves or hides a cursor, and gives it another image where there is one.
    pub fn set_cursor(
        &mut self,
        scanout: u32,
        (x, y): (u32, u32),
        visible: bool,
        image: Option<((u32, u32), Vec<u32>)>,
    ) {
        let connected = self.link.is_some();
        let Some(Output { cursor, .. }) = self.outputs.get_mut(scanout as usize) else {
            return;
        };
        (cursor.x, cursor.y, cursor.visible) = (x, y, visible);
        cursor.moved = connected;
        if let Some((hot, image)) = image {
            (cursor.hot_x, cursor.hot_y) = hot;
            cursor.image = image;
            cursor.changed = connected;
        }
    }

    /// Asks the display something. Returns whether its answer is worth waiting for.
    pub fn ask(&mut self, query: Query) -> bool {
        let Some(link) = self.link.as_mut() else {
            return false;
        };
        if link.ready && !link.can_answer(query) {
            return false;
        }
        // One that is silent is asked too: it may answer again.
        link.question = Some(query);
        let answers = !link.silent && !link.stalled;
        self.question = answers.then_some(query);
        answers
    }

    /// Takes back the question, whose answer nobody waits for any more.
    pub fn forget_question(&mut self) {
        self.question = None;
        if let Some(link) = &mut self.link {
            link.question = None;
        }
    }

    /// Whether all that was flushed has been sent or, from buffers, shown, as far as there is a display that does something.
    pub fn is_flushed(&self) -> bool {
        let Some(link) = self.link.as_ref().filter(|link| !link.stalled) else {
            return true;
        };
        let sends = matches!(link.outgoing, Some(Outgoing::Update(_)));
        !sends && !link.is_showing() && self.outputs.iter().all(|output| output.dirty.is_none())
    }

    /// The display has done nothing for too long: has nobody wait for it until it does something. One that has not told its features is
    /// used without any.
    pub fn stop_waiting(&mut self) {
        if let Some(link) = &mut self.link {
            link.stalled = true;
            link.silent |= self.question.is_some();
            link.ready = true;
        }
    }

    /// Whether a question waits for its answer.
    pub fn is_asked(&self) -> bool {
        self.question.is_some() && self.link.is_some()
    }

    /// Grows whenever something comes from the display, or a part of a picture goes there.
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Sends what can be without waiting, and receives: an answer that is due, or, with `readable`, whatever there is.
    /// Returns the answer to the question, when it has come.
    pub fn advance(&mut self, resources: &Resources, readable: bool) -> Option<Vec<u8>> {
        let mut answer = None;
        if let Err(error) = self.exchange(resources, readable, &mut answer) {
            self.leave(&error);
        }
        answer
    }

    /// Sends what can be without waiting. It is left to [`Display::advance`] to see what comes, and that all is sent.
    pub fn send_all(&mut self, resources: &Resources) {
        loop {
            match self.send(resources) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.leave(&error),
            }
        }
    }

    fn leave(&mut self, error: &DisplayError) {
        let socket = self.end_link();
        match error {
            DisplayError::Closed => info_limited(format_args!("the display is gone")),
            error => {
                warn_limited(format_args!("the display is not used any more: {error}"));
                self.unused = socket;
            }
        }
    }

    fn exchange(
        &mut self,
        resources: &Resources,
        readable: bool,
        answer: &mut Option<Vec<u8>>,
    ) -> Result<(), DisplayError> {
        let is_due = |display: &Self| {
            let link = display.link.as_ref();
            link.is_some_and(|link| !link.asked.is_empty())
        };
        if readable || is_due(self) {
            self.receive(answer)?;
        }
        while self.send(resources)? {
            if answer.is_none() && is_due(self) {
                self.receive(answer)?;
            }
        }
        if let Some(link) = self.link.as_mut().filter(|link| link.outgoing.is_none()) {
            link.watch_room(&self.events, false)?;
        }
        Ok(())
    }

    /// Sends one message, or what there is room for of it. Returns whether there may be room for another.
    fn send(&mut self, resources: &Resources) -> Result<bool, DisplayError> {
        let next = self.next_message();
        let Some(link) = &mut self.link else {
            return Ok(false);
        };
        let Some(mut outgoing) = link.outgoing.take().or(next) else {
            return Ok(false);
        };
        let pieces = outgoing
            .pieces(resources)
            .map_err(|_| DisplayError::Resource)?;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let files: Vec<_> = outgoing.file().into_iter().collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&files));
        }
        match sendmsg(&link.socket, &pieces, &mut control, flags) {
            Ok(0) => Err(DisplayError::Resource),
            Ok(count) => {
                if matches!(outgoing, Outgoing::Update(_)) {
                    self.progress = self.progress.wrapping_add(1);
                    link.stalled = false;
                }
                if !outgoing.advance(count) {
                    link.outgoing = Some(outgoing);
                }
                Ok(true)
            }
            Err(Errno::AGAIN) => {
                link.outgoing = Some(outgoing);
                link.watch_room(&self.events, true)?;
                Ok(false)
            }
            Err(Errno::INTR) => {
                link.outgoing = Some(outgoing);
                Ok(true)
            }
            Err(Errno::PIPE | Errno::CONNRESET) => Err(DisplayError::Closed),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What to send when nothing is on its way.
    fn next_message(&mut self) -> Option<Outgoing> {
        let link = self.link.as_mut()?;
        if link.outgoing.is_some() || !link.ready {
            return None;
        }
        if std::mem::take(&mut link.agrees) {
            let features = [link.features as u32, (link.features >> 32) as u32];
            let message = message(Request::SetProtocolFeatures, &features);
            return Some(Outgoing::bytes(message));
        }
        let mut outputs = (0..).zip(&mut self.outputs);
        let features = link.features;
        if let Some(message) =
            outputs.find_map(|(number, output)| output.next_small(number, features))
        {
            return Some(message);
        }
        if link.asked.len() < MAX_ASKED
            && let Some(query) = link.question.take()
        {
            if link.can_answer(query) {
                return Some(link.ask(query));
            }
            self.question = None;
        }
        for (number, output) in (0..).zip(&mut self.outputs) {
            if output.buffer.is_none() {
                if let Some(update) = output.next_update(number) {
                    return Some(Outgoing::Update(update));
                }
            } else if !link.is_showing()
                && let Some(part) = output.dirty.take()
            {
                let scanout = number;
                return Some(link.ask(Query::Shown { scanout, part }));
            }
        }
        None
    }

    /// Takes all that has come. Gives the payload of the answer that a command waits for.
    fn receive(&mut self, awaited: &mut Option<Vec<u8>>) -> Result<(), DisplayError> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        loop {
            let header = link.answer.get(..HEADER_SIZE);
            let place = header.map(|header| link.place(header)).transpose()?;
            let size = match place {
                Some((_, query)) => HEADER_SIZE + query.answer_size(),
                None if link.asked.is_empty() => 1,
                None => HEADER_SIZE,
            };
            let room = size.saturating_sub(link.answer.len());
            if let Some((index, query)) = place
                && room == 0
            {
                let answer = std::mem::take(&mut link.answer).split_off(HEADER_SIZE);
                link.settle(index, &answer);
                if self.question == Some(query) {
                    // It may have been asked for another reason, and be to be asked yet.
                    (self.question, link.question) = (None, None);
                    *awaited = Some(answer);
                }
                if self.question.is_some_and(|query| !link.is_asking(query)) {
                    self.question = None;
                }
                continue;
            }
            let mut chunk = Vec::with_capacity(room);
            match recv(
                &link.socket,
                spare_capacity(&mut chunk),
                RecvFlags::DONTWAIT,
            ) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Err(DisplayError::Closed),
                Err(errno) => return Err(errno.into()),
            }
            if chunk.is_empty() {
                return Err(DisplayError::Closed);
            }
            if link.asked.is_empty() {
                return Err(DisplayError::Answer(None));
            }
            self.progress = self.progress.wrapping_add(1);
            link.stalled = false;
            link.answer.extend_from_slice(&chunk);
        }
    }

    /// Empties the list of what happened, so that what happens next is told. Returns whether there may be something to receive.
    pub fn drain_events(&self) -> bool {
        let mut events = Vec::with_capacity(4);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let _ = epoll::wait(&*self.events, spare_capacity(&mut events), Some(&now));
        let room = epoll::EventFlags::OUT;
        events
            .iter()
            .any(|event: &epoll::Event| { event.flags } != room)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::event::{PollFd, PollFlags, poll};
    use zerocopy::IntoBytes;

    use super::*;

    fn has_events(display: &Display) -> bool {
        let events = display.events();
        let mut events = [PollFd::new(&*events, PollFlags::IN)];
        poll(&mut events, Some(&Timespec::default())).unwrap() > 0
    }

    /// What waits for the display is on the control queue, and is looked at when there are events.
    #[test]
    fn a_display_whose_end_is_seen_while_the_cursor_moves_is_an_event() {
        let resources = Resources::new(0);
        let mut display = Display::new().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        display.connect(theirs).unwrap();
        display.advance(&resources, false);
        ours.write_all([1u32, 4, 8, 3, 0].as_bytes()).unwrap();
        display.advance(&resources, true);
        assert!(display.ask(Query::DisplayInfo));
        display.advance(&resources, false);
        display.drain_events();
        assert!(!has_events(&display));
        drop(ours);
        display.set_cursor(0, (1, 1), true, None);
        display.send_all(&resources);
        assert!(!display.is_asked());
        assert!(has_events(&display), "nobody would be told");
        display.drain_events();
        assert!(!has_events(&display));
    }

    /// Whatever comes in place of a display ends it.
    #[test]
    fn what_is_no_display_is_an_event_for_what_waits_for_the_one_before() {
        let resources = Resources::new(0);
        let mut display = Display::new().unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        display.connect(theirs).unwrap();
        assert!(display.ask(Query::DisplayInfo));
        display.advance(&resources, false);
        display.drain_events();
        let file = File::open("/").unwrap();
        display.connect(OwnedFd::from(file).into()).unwrap_err();
        assert!(!display.is_asked());
        assert!(has_events(&display), "nobody would be told");
    }
}
