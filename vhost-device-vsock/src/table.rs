// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The connections: by their slots, which are small numbers, and by their addresses.

use std::collections::HashMap;

use crate::connection::{Connection, Key, State};

/// All connections.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Option<Box<Connection>>>,
    free: Vec<u32>,
    /// Those that the guest knows, or will know soon.
    keys: HashMap<Key, u32>,
}

impl Table {
    /// Returns the number of connections.
    pub fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Adds a connection, and returns its slot.
    pub fn insert(&mut self, connection: Connection) -> u32 {
        let key = (connection.state != State::Greeting).then_some(connection.key);
        let connection = Some(Box::new(connection));
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                self.slots.len().saturating_sub(1) as u32
            }
        };
        if let Some(place) = self.slots.get_mut(slot as usize) {
            *place = connection;
        }
        if let Some(key) = key {
            self.keys.insert(key, slot);
        }
        slot
    }

    /// Returns the slot of the connection with these addresses.
    pub fn find(&self, key: &Key) -> Option<u32> {
        self.keys.get(key).copied()
    }

    /// Returns the connection in a slot.
    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Connection> {
        self.slots.get_mut(slot as usize)?.as_deref_mut()
    }

    /// Gives a connection its addresses.
    pub fn set_key(&mut self, slot: u32, key: Key) {
        if let Some(connection) = self.get_mut(slot) {
            connection.key = key;
            self.keys.insert(key, slot);
        }
    }

    /// Frees the addresses of a connection, which stays.
    pub fn forget_key(&mut self, slot: u32) {
        if let Some(connection) = self.get_mut(slot) {
            let key = connection.key;
            if self.keys.get(&key) == Some(&slot) {
                self.keys.remove(&key);
            }
        }
    }

    /// Removes a connection.
    pub fn remove(&mut self, slot: u32) -> Option<Connection> {
        self.forget_key(slot);
        let connection = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(*connection)
    }

    /// Returns all slots in use, with their connections.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Connection)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(slot, place)| Some((slot as u32, place.as_deref()?)))
    }
}
