// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front-end's display, which has a socket of its own (vhost-user-gpu protocol, GPU_SET_SOCKET).
//!
//! This module keeps what is shown, and sends all of it to a display that connects or reconnects. No function blocks:
//! what the socket cannot take is sent later, in its state at that time.

mod link;
mod message;
mod outgoing;
mod scanout;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use vhost_device_common::worker::{Readiness, Watcher};
use vhost_device_common::{info_limited, warn_limited};

use crate::dmabuf::Dmabuf;
use crate::protocol::MAX_SCANOUTS;
use crate::rectangle::Rectangle;
use crate::resource_table::ResourceTable;
use link::{DISPLAY, DisplayError, Link, MAX_SENT_QUERIES};
pub use message::Query;
use message::{HEADER_SIZE, Request, message};
use outgoing::Outgoing;
use scanout::Scanout;
pub use scanout::{Cursor, Source};

/// Size of the socket's send buffer in bytes; the kernel doubles it. Twice the default halves the wake-ups for a large
/// image. A larger buffer would complete flushes long before their pixels are shown.
const SEND_BUFFER: usize = 208 << 10;

/// The display.
#[derive(Debug)]
pub struct Display {
    /// The watcher of the handler, once there is one.
    watcher: Option<Watcher>,
    /// An eventfd. Signals that a display has disconnected: the cursor queue may notice this while a command of the control queue
    /// waits for the display.
    disconnected: OwnedFd,
    link: Option<Link>,
    /// The socket of a display that is not used. It stays open, because QEMU keeps a CPU busy once the peer has closed
    /// it.
    idle_socket: Option<UnixStream>,
    scanouts: [Scanout; MAX_SCANOUTS],
    /// The query whose reply a command waits for.
    query: Option<Query>,
    /// Increases with all data received and each part of an image sent; shows whether the display is responsive.
    progress: u64,
}

impl Display {
    /// Creates the state without a display.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            watcher: None,
            disconnected: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            link: None,
            idle_socket: None,
            scanouts: Default::default(),
            query: None,
            progress: 0,
        })
    }

    /// Has this watcher report when [`Display::advance`] must be called.
    pub fn set_watcher(&mut self, watcher: Watcher) -> io::Result<()> {
        watcher.add(&self.disconnected, Readiness::READABLE, DISPLAY)?;
        if let Some(Err(error)) = self.link.as_ref().map(|link| link.watch(&watcher)) {
            self.drop_link(&error.into());
        }
        self.watcher = Some(watcher);
        Ok(())
    }

    /// Forgets the watcher of a handler that is gone.
    pub fn forget_watcher(&mut self) {
        self.watcher = None;
    }

    /// Switches to a new display.
    pub fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        // A command that waits for the previous display waits for the new one from now on.
        let query = self.query;
        self.disconnect();
        let _ = set_socket_send_buffer_size(&socket, SEND_BUFFER);
        let link = Link::new(socket, query);
        if let Some(watcher) = &self.watcher {
            link.watch(watcher)?;
        }
        self.link = Some(link);
        self.query = query;
        for scanout in &mut self.scanouts {
            scanout.send_again();
        }
        Ok(())
    }

    /// Keeps a socket open without using it, until the next one arrives or the device is reset.
    pub fn keep_open(&mut self, socket: UnixStream) {
        self.disconnect();
        self.idle_socket = Some(socket);
    }

    /// Returns whether a display is connected.
    pub fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    /// Disconnects the display. What is shown is kept for the next one.
    pub fn disconnect(&mut self) {
        self.idle_socket = None;
        self.close_link();
    }

    /// Stops using the display and returns its socket.
    fn close_link(&mut self) -> Option<UnixStream> {
        self.query = None;
        let Link { socket, .. } = self.link.take()?;
        if let Some(watcher) = &self.watcher {
            watcher.remove(&socket);
        }
        let _ = rustix::io::write(&self.disconnected, &1u64.to_ne_bytes());
        Some(socket)
    }

    /// Clears what the guest shows.
    pub fn clear(&mut self, resources: &ResourceTable) {
        self.detach(None, resources);
        for Scanout { cursor, .. } in &mut self.scanouts {
            // The display may not have been told yet that the cursor is hidden.
            let moved = (cursor.visible || cursor.moved) && self.link.is_some();
            *cursor = Cursor {
                moved,
                ..Cursor::default()
            };
        }
        self.cancel_query();
    }

    /// Removes a resource (`None`: all resources) from all scanouts, before it is destroyed.
    pub fn detach(&mut self, id: Option<u32>, resources: &ResourceTable) {
        if let Some(outgoing) = self.link.as_mut().and_then(|link| link.outgoing.as_mut()) {
            outgoing.detach(id, resources);
        }
        for scanout in &mut self.scanouts {
            if let Some(source) = scanout.source
                && id.is_none_or(|id| id == source.resource)
            {
                scanout.set_source(None, None);
            }
        }
    }

    /// Sets the source of a scanout. The display shows `dmabuf` if there is one. An invalid scanout index is ignored.
    pub fn set_scanout(
        &mut self,
        scanout: u32,
        source: Option<Source>,
        dmabuf: Option<Arc<Dmabuf>>,
    ) {
        if let Some(scanout) = self.scanouts.get_mut(scanout as usize) {
            scanout.set_source(source, dmabuf);
        }
    }

    /// Returns the source and cursor of each scanout.
    pub fn scanouts(&self) -> [(Option<Source>, &Cursor); MAX_SCANOUTS] {
        let scanouts = self.scanouts.each_ref();
        scanouts.map(|scanout| (scanout.source, &scanout.cursor))
    }

    fn scanouts_of(&self, resource: u32) -> impl Iterator<Item = &Scanout> {
        let shows = move |source: Source| source.resource == resource;
        let scanouts = self.scanouts.iter();
        scanouts.filter(move |scanout| scanout.source.is_some_and(shows))
    }

    /// Returns whether a scanout shows this resource and needs its pixels.
    pub fn needs_pixels(&self, resource: u32) -> bool {
        self.scanouts_of(resource)
            .any(|scanout| scanout.dmabuf.is_none())
    }

    /// Returns the dma-buf of this resource that a scanout shows.
    pub fn dmabuf(&self, resource: u32) -> Option<Arc<Dmabuf>> {
        self.scanouts_of(resource)
            .find_map(|scanout| scanout.dmabuf.clone())
    }

    /// Marks a rectangle of a resource as changed.
    pub fn flush(&mut self, resource: u32, rectangle: &Rectangle) {
        for scanout in &mut self.scanouts {
            if let Some(source) = scanout.source
                && source.resource == resource
                && let Some(shown) = rectangle.intersection(&source.rectangle)
            {
                let shown = shown.relative_to(&source.rectangle);
                let dirty = scanout.dirty.map_or(shown, |dirty| dirty.union(&shown));
                scanout.dirty = self.link.is_some().then_some(dirty);
            }
        }
    }

    /// Moves, shows or hides a cursor, and changes its image if there is one.
    pub fn set_cursor(
        &mut self,
        scanout: u32,
        (x, y): (u32, u32),
        visible: bool,
        image: Option<((u32, u32), Vec<u32>)>,
    ) {
        let connected = self.link.is_some();
        let Some(Scanout { cursor, .. }) = self.scanouts.get_mut(scanout as usize) else {
            return;
        };
        (cursor.x, cursor.y, cursor.visible) = (x, y, visible);
        cursor.moved = connected;
        if let Some((hot, image)) = image {
            (cursor.hot_x, cursor.hot_y) = hot;
            cursor.image = image;
            cursor.image_changed = connected;
        }
    }

    /// Sends a query to the display. Returns whether to wait for the reply.
    pub fn start_query(&mut self, query: Query) -> bool {
        let Some(link) = self.link.as_mut() else {
            return false;
        };
        if link.ready && !link.supports(query) {
            return false;
        }
        // A silent display gets queries too: it may reply again.
        link.next_query = Some(query);
        let waits = !link.silent && !link.stalled;
        self.query = waits.then_some(query);
        waits
    }

    /// Cancels the query, because no command waits for the reply any more.
    pub fn cancel_query(&mut self) {
        self.query = None;
        if let Some(link) = &mut self.link {
            link.next_query = None;
        }
    }

    /// Returns whether all flushed pixels have been sent and all dma-buf updates shown. Always true without a display,
    /// or with one that is stalled.
    pub fn is_flushed(&self) -> bool {
        let Some(link) = self.link.as_ref().filter(|link| !link.stalled) else {
            return true;
        };
        let sends = matches!(link.outgoing, Some(Outgoing::Update(_)));
        !sends
            && !link.awaits_dmabuf_update()
            && self.scanouts.iter().all(|scanout| scanout.dirty.is_none())
    }

    /// Marks the display as unresponsive: nothing waits for it until it makes progress. If its features are unknown, it
    /// is used without any.
    pub fn mark_unresponsive(&mut self) {
        if let Some(link) = &mut self.link {
            link.stalled = true;
            link.silent |= self.query.is_some();
            link.ready = true;
        }
    }

    /// Returns whether a command waits for a reply.
    pub fn awaits_reply(&self) -> bool {
        self.query.is_some() && self.link.is_some()
    }

    fn has_sent_queries(&self) -> bool {
        let link = self.link.as_ref();
        link.is_some_and(|link| !link.sent_queries.is_empty())
    }

    /// Returns a counter that increases with all data received and each part of an image sent.
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Sends what the socket takes, and receives all data if `readable`. Returns the reply that a command waits for,
    /// once it is complete.
    pub fn advance(&mut self, resources: &ResourceTable, readable: bool) -> Option<Vec<u8>> {
        let mut reply = None;
        if let Err(error) = self.exchange(resources, readable, &mut reply) {
            self.drop_link(&error);
        }
        reply
    }

    /// Sends what the socket takes. [`Display::advance`] receives replies and sends the rest.
    pub fn send_all(&mut self, resources: &ResourceTable) {
        loop {
            match self.send(resources) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.drop_link(&error),
            }
        }
    }

    fn drop_link(&mut self, error: &DisplayError) {
        let socket = self.close_link();
        match error {
            DisplayError::Closed => info_limited(format_args!("the display has disconnected")),
            error => {
                warn_limited(format_args!("display disabled: {error}"));
                self.idle_socket = socket;
            }
        }
    }

    fn exchange(
        &mut self,
        resources: &ResourceTable,
        readable: bool,
        reply: &mut Option<Vec<u8>>,
    ) -> Result<(), DisplayError> {
        // Not for each request: the watcher reports a reply, and to look for one costs a system call.
        if readable {
            self.receive(reply)?;
        }
        while self.send(resources)? {
            if reply.is_none() && self.has_sent_queries() {
                self.receive(reply)?;
            }
        }
        if let Some(link) = self.link.as_mut().filter(|link| link.outgoing.is_none()) {
            link.watch_writable(self.watcher.as_ref(), false)?;
        }
        Ok(())
    }

    /// Sends one message, or a part of it. Returns whether the socket may take more.
    fn send(&mut self, resources: &ResourceTable) -> Result<bool, DisplayError> {
        let next = self.next_message();
        let (Some(mut outgoing), Some(link)) = (next, &mut self.link) else {
            return Ok(false);
        };
        let io_slices = outgoing
            .io_slices(resources)
            .map_err(|_| DisplayError::Resource)?;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let fds: Vec<_> = outgoing.fd().into_iter().collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        match retry_on_intr(|| sendmsg(&link.socket, &io_slices, &mut control, flags)) {
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
                link.watch_writable(self.watcher.as_ref(), true)?;
                Ok(false)
            }
            Err(Errno::PIPE | Errno::CONNRESET) => Err(DisplayError::Closed),
            Err(errno) => Err(io::Error::from(errno).into()),
        }
    }

    /// Takes the message to send next: the rest of the last one, or a new one.
    fn next_message(&mut self) -> Option<Outgoing> {
        let link = self.link.as_mut()?;
        if link.outgoing.is_some() || !link.ready {
            return link.outgoing.take();
        }
        if std::mem::take(&mut link.must_set_features) {
            let features = [link.features as u32, (link.features >> 32) as u32];
            let message = message(Request::SetProtocolFeatures, &features);
            return Some(Outgoing::bytes(message));
        }
        let mut scanouts = (0..).zip(&mut self.scanouts);
        let features = link.features;
        if let Some(message) =
            scanouts.find_map(|(index, scanout)| scanout.next_control_message(index, features))
        {
            return Some(message);
        }
        if link.sent_queries.len() < MAX_SENT_QUERIES
            && let Some(query) = link.next_query.take()
        {
            if link.supports(query) {
                return Some(link.query_message(query));
            }
            self.query = None;
        }
        for (index, scanout) in (0..).zip(&mut self.scanouts) {
            if scanout.dmabuf.is_none() {
                if let Some(update) = scanout.next_update(index) {
                    return Some(Outgoing::Update(update));
                }
            } else if !link.awaits_dmabuf_update()
                && let Some(rectangle) = scanout.dirty.take()
            {
                return Some(link.query_message(Query::DmabufUpdate {
                    scanout: index,
                    rectangle,
                }));
            }
        }
        None
    }

    /// Receives all available data. Stores the payload of the reply that a command waits for.
    fn receive(&mut self, awaited_reply: &mut Option<Vec<u8>>) -> Result<(), DisplayError> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        loop {
            let header = link.reply.get(..HEADER_SIZE);
            let matched = header.map(|header| link.match_reply(header)).transpose()?;
            let size = match matched {
                Some((_, query)) => HEADER_SIZE + query.reply_size(),
                None if link.sent_queries.is_empty() => 1,
                None => HEADER_SIZE,
            };
            let room = size.saturating_sub(link.reply.len());
            if let Some((index, query)) = matched
                && room == 0
            {
                let reply = std::mem::take(&mut link.reply).split_off(HEADER_SIZE);
                link.complete_query(index, &reply);
                if self.query == Some(query) {
                    // The same query may have been sent for another reason and still be due.
                    (self.query, link.next_query) = (None, None);
                    *awaited_reply = Some(reply);
                }
                if self.query.is_some_and(|query| !link.has_query(query)) {
                    self.query = None;
                }
                continue;
            }
            let mut chunk = Vec::with_capacity(room);
            let flags = RecvFlags::DONTWAIT;
            match retry_on_intr(|| recv(&link.socket, spare_capacity(&mut chunk), flags)) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::CONNRESET) => return Err(DisplayError::Closed),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
            if chunk.is_empty() {
                return Err(DisplayError::Closed);
            }
            if link.sent_queries.is_empty() {
                return Err(DisplayError::Unsolicited);
            }
            self.progress = self.progress.wrapping_add(1);
            link.stalled = false;
            link.reply.extend_from_slice(&chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use std::time::Duration;

    use vhost_device_common::worker::{EpollPoller, Poller};
    use zerocopy::IntoBytes;

    use super::*;

    fn watched_display() -> (Display, EpollPoller) {
        let mut display = Display::new().unwrap();
        let poller = EpollPoller::new().unwrap();
        display.set_watcher(poller.watcher()).unwrap();
        (display, poller)
    }

    fn has_events(poller: &mut EpollPoller) -> bool {
        let mut ready = Vec::new();
        poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        std::iter::from_fn(|| poller.next_file()).count() > 0
    }

    /// A command that waits for the display is on the control queue, which is processed again only after an event.
    #[test]
    fn a_disconnection_noticed_while_the_cursor_moves_is_an_event() {
        let resources = ResourceTable::new(0);
        let (mut display, mut poller) = watched_display();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        display.connect(theirs).unwrap();
        display.advance(&resources, false);
        ours.write_all([1u32, 4, 8, 3, 0].as_bytes()).unwrap();
        display.advance(&resources, true);
        assert!(display.start_query(Query::DisplayInfo));
        display.advance(&resources, false);
        has_events(&mut poller);
        assert!(!has_events(&mut poller));
        drop(ours);
        display.set_cursor(0, (1, 1), true, None);
        display.send_all(&resources);
        assert!(!display.awaits_reply());
        assert!(has_events(&mut poller), "no event");
        assert!(!has_events(&mut poller));
    }

    /// A socket that is not one disconnects the previous display, too.
    #[test]
    fn an_invalid_display_is_an_event_for_commands_that_wait_for_the_previous_one() {
        let resources = ResourceTable::new(0);
        let (mut display, mut poller) = watched_display();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        display.connect(theirs).unwrap();
        assert!(display.start_query(Query::DisplayInfo));
        display.advance(&resources, false);
        has_events(&mut poller);
        let file = File::open("/").unwrap();
        display.connect(OwnedFd::from(file).into()).unwrap_err();
        assert!(!display.awaits_reply());
        assert!(has_events(&mut poller), "no event");
    }

    #[test]
    fn an_invalid_display_that_connects_before_the_handler_starts_is_disabled() {
        let mut display = Display::new().unwrap();
        let file = File::open("/").unwrap();
        display.connect(OwnedFd::from(file).into()).unwrap();
        let poller = EpollPoller::new().unwrap();
        display.set_watcher(poller.watcher()).unwrap();
        assert!(!display.is_connected());
    }
}
