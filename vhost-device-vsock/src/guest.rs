// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Packets of the guest (VIRTIO 1.3, 5.10.6).

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use vhost_device_common::chain::Chain;
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use zerocopy::IntoBytes;

use crate::connection::{Fault, Key, State};
use crate::handler::VsockHandler;
use crate::lifecycle::TIME_TO_OPEN;
use crate::packet::{HOST_CID, Header, Kind, op, place, shutdown};
use crate::shared::{count, seqpacket_path};
use crate::socket;

impl VsockHandler {
    /// Handles one packet. What is wrong with it ends its connection with a reset.
    pub fn receive(&mut self, chain: &mut Chain) -> Outcome {
        let mut header = Header::default();
        if let Err(error) = chain.read(header.as_mut_bytes()) {
            warn_limited(format_args!("invalid packet from the guest: {error}"));
            return Outcome {
                failed: true,
                ..Outcome::default()
            };
        }
        let op = header.op.get();
        let handled = self.handle(&header, chain);
        let bytes = match op {
            op::DATA if handled.is_ok() => header.len.get().into(),
            _ => 0,
        };
        if let Err(fault) = &handled {
            log::debug!("a packet is refused: {fault}: {header:?}");
            // A reset is never answered with another one.
            if op != op::RESET {
                self.resets.push_back(header.refusal(self.guest_cid()));
            }
        }
        Outcome {
            request: place(op),
            bytes,
            failed: handled.is_err(),
        }
    }

    fn handle(&mut self, header: &Header, chain: &mut Chain) -> Result<(), Fault> {
        if header.src_cid.get() != u64::from(self.guest_cid()) {
            return Err(Fault::Source);
        }
        let peer_cid = u32::try_from(header.dst_cid.get()).map_err(|_| Fault::Destination)?;
        if peer_cid != HOST_CID && self.shared.sibling(peer_cid).is_none() {
            return Err(Fault::Destination);
        }
        let key = Key {
            peer_cid,
            peer_port: header.dst_port.get(),
            guest_port: header.src_port.get(),
        };
        let op = header.op.get();
        let kind = Kind::from_number(header.kind.get()).filter(|kind| self.shared.accepts(*kind));
        let Some(slot) = self.table.find(&key) else {
            return match (kind, op) {
                (None, _) => Err(Fault::Kind),
                (_, op::RESET) => Ok(()),
                (Some(kind), op::REQUEST) => {
                    let opened = self.open(key, kind, header);
                    if opened.is_err() {
                        count(&self.shared.counters.refused);
                    }
                    opened
                }
                _ => Err(Fault::Unknown),
            };
        };
        let handled = self.handle_known(slot, kind, header, chain);
        if handled.is_err() {
            // The guest gets a reset by the caller.
            count(&self.shared.counters.reset_by_device);
            self.remove(slot);
        }
        handled
    }

    /// Handles a packet of a connection that exists.
    fn handle_known(
        &mut self,
        slot: u32,
        kind: Option<Kind>,
        header: &Header,
        chain: &mut Chain,
    ) -> Result<(), Fault> {
        let Some(connection) = self.table.get_mut(slot) else {
            return Ok(());
        };
        if header.op.get() == op::RESET {
            count(&self.shared.counters.reset_by_guest);
            self.reset_by_guest(slot);
            return Ok(());
        }
        if kind != Some(connection.kind) {
            return Err(Fault::Kind);
        }
        let (size, forwarded) = (header.buf_alloc.get(), header.fwd_cnt.get());
        connection.outbound.update(size, forwarded);
        let is_open = matches!(connection.state, State::Open | State::Closing);
        match header.op.get() {
            op::RESPONSE if connection.state == State::Requested && connection.is_known() => {
                self.accepted_by_guest(slot)?;
            }
            op::SHUTDOWN if is_open => {
                connection.guest_shutdown |= header.flags.get() & shutdown::BOTH;
            }
            op::DATA if is_open => {
                let length = header.len.get();
                if u64::from(length) > chain.readable_len() {
                    return Err(Fault::Memory);
                }
                connection.receive(chain, length, header.flags.get(), &mut self.scratch)?;
            }
            op::CREDIT_UPDATE if is_open => {}
            op::CREDIT_REQUEST if is_open => connection.owed.add(op::CREDIT_UPDATE),
            _ => return Err(Fault::State),
        }
        self.settle(slot);
        Ok(())
    }

    /// Opens a connection that the guest asks for.
    fn open(&mut self, key: Key, kind: Kind, header: &Header) -> Result<(), Fault> {
        if self.is_full() {
            return Err(Fault::TooMany);
        }
        let ports = self.shared.options.allow_ports.as_ref();
        if ports.is_some_and(|ports| !ports.contains(key.peer_port)) {
            return Err(Fault::Port);
        }
        let (socket, state) = self.connect(key, kind).inspect_err(|fault| {
            // With other errors, nobody listens there.
            if matches!(
                fault,
                Fault::Host(Errno::ACCESS | Errno::MFILE | Errno::NFILE | Errno::NOMEM)
            ) {
                warn_limited(format_args!(
                    "cannot connect the guest to port {} of CID {}: {fault}",
                    key.peer_port, key.peer_cid
                ));
            }
        })?;
        let slot = self.insert(key, kind, state, socket)?;
        if let Some(connection) = self.table.get_mut(slot) {
            let (size, forwarded) = (header.buf_alloc.get(), header.fwd_cnt.get());
            connection.outbound.update(size, forwarded);
            if state == State::Open {
                connection.owed.add(op::RESPONSE);
            }
        }
        count(&self.shared.counters.by_guest);
        match state {
            State::Open => self.queue(slot),
            _ => self.set_deadline(slot, Some(TIME_TO_OPEN)),
        }
        Ok(())
    }

    /// Connects to where the guest wants to be connected.
    fn connect(&self, key: Key, kind: Kind) -> Result<(OwnedFd, State), Fault> {
        let Key {
            peer_cid,
            peer_port,
            ..
        } = key;
        if let Some(sibling) = self.shared.sibling(peer_cid) {
            let socket = match kind {
                Kind::Stream => socket::connect_unix(&sibling.path, kind)?,
                Kind::Seqpacket => {
                    socket::connect_unix(&seqpacket_path(sibling.path.clone()), kind)?
                }
            };
            socket::send_line(&socket, &format!("CONNECT {peer_port}\n"))?;
            return Ok((socket, State::Asking));
        }
        let options = &self.shared.options;
        let mut outcome = Err(Errno::CONNREFUSED);
        if let Some(path) = &options.uds_path {
            outcome =
                socket::connect_port(path, peer_port, kind).map(|socket| (socket, State::Open));
        }
        if let Err(Errno::NOENT | Errno::CONNREFUSED) = outcome
            && options.host_vsock
        {
            let (socket, is_complete) = socket::connect_vsock(peer_port, kind)?;
            let state = if is_complete {
                State::Open
            } else {
                State::Connecting
            };
            return Ok((socket, state));
        }
        Ok(outcome?)
    }

    /// The guest accepts a connection of the host.
    fn accepted_by_guest(&mut self, slot: u32) -> Result<(), Fault> {
        self.set_deadline(slot, None);
        let Some(connection) = self.table.get_mut(slot) else {
            return Ok(());
        };
        if let Some(socket) = &connection.socket {
            match socket::send_line(socket, &format!("OK {}\n", connection.key.peer_port)) {
                // It has left already; the guest still gets what it sent.
                Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        connection.state = State::Open;
        // What the program of the host sent behind its line may have been reported already.
        connection.is_readable = true;
        Ok(())
    }

    /// The guest has forgotten a connection. If it had closed it, the host still gets all data.
    fn reset_by_guest(&mut self, slot: u32) {
        let Some(connection) = self.table.get_mut(slot) else {
            return;
        };
        let was_closed = connection.guest_shutdown == shutdown::BOTH;
        if was_closed && connection.socket.is_some() {
            connection.state = State::Draining;
            connection.deadline = None;
            self.table.forget_key(slot);
            self.settle(slot);
        } else {
            self.remove(slot);
        }
    }
}
