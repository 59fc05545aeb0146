// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Persistent reservations (SPC-4, 5.13): registrations, the reservation, and what it keeps other initiators from.

use serde::{Deserialize, Serialize};

use super::Nexus;
use super::answer::Failure;
use super::attention::Attention;
use super::sense::{Sense, code};

/// What reservations of other initiators keep a command from (SPC-4, table 67; SBC-3, table 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nothing does, not even RESERVE.
    Free,
    /// Nothing does but RESERVE.
    Report,
    /// Exclusive access does.
    Read,
    /// Every reservation does.
    Write,
}

/// The most registrations of a logical unit.
pub const MAX_REGISTRATIONS: usize = 64;

/// Types of persistent reservations (SPC-4, 6.15.3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Type {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrantsOnly = 5,
    ExclusiveAccessRegistrantsOnly = 6,
    WriteExclusiveAllRegistrants = 7,
    ExclusiveAccessAllRegistrants = 8,
}

impl Type {
    /// Returns the type with this code.
    pub fn of(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrantsOnly,
            6 => Self::ExclusiveAccessRegistrantsOnly,
            7 => Self::WriteExclusiveAllRegistrants,
            8 => Self::ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }

    /// Returns whether all registrants hold the reservation.
    fn is_all_registrants(self) -> bool {
        matches!(
            self,
            Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants
        )
    }

    /// Returns whether registrants that do not hold the reservation may use the logical unit.
    fn is_for_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    /// Returns whether others may read.
    fn allows_reads(self) -> bool {
        matches!(
            self,
            Self::WriteExclusive
                | Self::WriteExclusiveRegistrantsOnly
                | Self::WriteExclusiveAllRegistrants
        )
    }
}

/// A registered I_T nexus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    pub nexus: Nexus,
    pub key: u64,
}

/// The reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    pub kind: Type,
    /// Who made it. If all registrants hold it, this does not matter.
    holder: Nexus,
}

/// Registrations and the reservation of a logical unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// PRGENERATION.
    pub generation: u32,
    /// Whether they survive a loss of power (APTPL).
    pub persists: bool,
    registrations: Vec<Registration>,
    reservation: Option<Reservation>,
}

/// Unit attentions that a change causes.
pub type Attentions = Vec<(Nexus, Attention)>;

/// The outcome of a change.
pub type Change = Result<Attentions, Failure>;

impl Registry {
    /// Returns whether there is anything that could keep a command from being carried out.
    pub fn is_reserved(&self) -> bool {
        self.reservation.is_some()
    }

    /// Returns whether no initiator is registered.
    pub fn is_empty(&self) -> bool {
        self.registrations.is_empty()
    }

    pub fn registrations(&self) -> &[Registration] {
        &self.registrations
    }

    pub fn reservation(&self) -> Option<Reservation> {
        self.reservation
    }

    /// Returns whether these can be registrations and a reservation that this program has saved.
    pub fn is_valid(&self) -> bool {
        let list = &self.registrations;
        let distinct = list.iter().enumerate().all(|(index, one)| {
            list.iter()
                .skip(index + 1)
                .all(|other| other.nexus != one.nexus)
        });
        let keys = list.iter().all(|one| one.key != 0);
        let holder = self
            .reservation
            .is_none_or(|reservation| self.holders(reservation).next().is_some());
        list.len() <= MAX_REGISTRATIONS && distinct && keys && holder
    }

    /// Returns the registrations that hold `reservation`.
    fn holders(&self, reservation: Reservation) -> impl Iterator<Item = &Registration> {
        self.registrations.iter().filter(move |registration| {
            reservation.kind.is_all_registrants() || registration.nexus == reservation.holder
        })
    }

    /// Returns whether `nexus` holds the reservation.
    pub fn is_holder(&self, nexus: Nexus) -> bool {
        self.reservation
            .is_some_and(|reservation| self.holders(reservation).any(|one| one.nexus == nexus))
    }

    /// Returns the key of the reservation: 0 if all registrants hold it.
    pub fn reservation_key(&self) -> u64 {
        match self.reservation {
            Some(reservation) if !reservation.kind.is_all_registrants() => {
                let holder = self.holders(reservation).next();
                holder.map_or(0, |registration| registration.key)
            }
            _ => 0,
        }
    }

    fn key_of(&self, nexus: Nexus) -> Option<u64> {
        let mut registrations = self.registrations.iter();
        let found = registrations.find(|registration| registration.nexus == nexus);
        found.map(|registration| registration.key)
    }

    /// Returns whether the reservation lets `nexus` send a command of this class (SPC-4, table 67).
    pub fn allows(&self, nexus: Nexus, class: Class) -> bool {
        let Some(Reservation { kind, .. }) = self.reservation else {
            return true;
        };
        match class {
            Class::Free | Class::Report => true,
            Class::Read if kind.allows_reads() => true,
            Class::Read | Class::Write => {
                self.is_holder(nexus) || kind.is_for_registrants() && self.key_of(nexus).is_some()
            }
        }
    }

    /// Checks that `nexus` is registered with `key`.
    fn check(&self, nexus: Nexus, key: u64) -> Result<(), Failure> {
        match self.key_of(nexus) {
            Some(registered) if registered == key => Ok(()),
            _ => Err(Failure::Conflict),
        }
    }

    /// REGISTER: replaces the key of `nexus`, which must be `key` (0 if it is not registered), by `new`; 0 removes the registration.
    pub fn register(&mut self, nexus: Nexus, key: u64, new: u64, persists: bool) -> Change {
        if self.key_of(nexus).unwrap_or(0) != key {
            return Err(Failure::Conflict);
        }
        self.register_anyway(nexus, new, persists)
    }

    /// REGISTER AND IGNORE EXISTING KEY: as [`Registry::register`] for any key.
    pub fn register_anyway(&mut self, nexus: Nexus, new: u64, persists: bool) -> Change {
        let is_full = self.registrations.len() >= MAX_REGISTRATIONS;
        let mut list = self.registrations.iter_mut();
        let known = list.find(|registration| registration.nexus == nexus);
        let attentions = match known {
            None if new == 0 => Vec::new(),
            None if is_full => {
                return Err(Sense::illegal(code::REGISTRATION_RESOURCES).into());
            }
            None => {
                let key = new;
                self.registrations.push(Registration { nexus, key });
                Vec::new()
            }
            Some(_) if new == 0 => self.unregister(nexus),
            Some(registration) => {
                registration.key = new;
                Vec::new()
            }
        };
        self.persists = persists;
        self.generation = self.generation.wrapping_add(1);
        Ok(attentions)
    }

    /// Removes the registration of `nexus`, and the reservation if nobody else holds it (SPC-4, 5.13.11.2.3).
    fn unregister(&mut self, nexus: Nexus) -> Attentions {
        let before = self.reservation;
        self.registrations
            .retain(|registration| registration.nexus != nexus);
        match before {
            Some(reservation) if self.holders(reservation).next().is_none() => {
                self.reservation = None;
                let is_told = reservation.kind.is_for_registrants();
                self.tell(nexus, Attention::ReservationsReleased, is_told)
            }
            _ => Vec::new(),
        }
    }

    /// Returns `attention` for all registered initiators but `except`, if they are told.
    fn tell(&self, except: Nexus, attention: Attention, is_told: bool) -> Attentions {
        let others = self.registrations.iter();
        others
            .filter(|registration| is_told && registration.nexus != except)
            .map(|registration| (registration.nexus, attention))
            .collect()
    }

    /// RESERVE.
    pub fn reserve(&mut self, nexus: Nexus, key: u64, kind: Type) -> Change {
        self.check(nexus, key)?;
        match self.reservation {
            None => {
                let holder = nexus;
                self.reservation = Some(Reservation { kind, holder });
                Ok(Vec::new())
            }
            Some(reservation) if reservation.kind == kind && self.is_holder(nexus) => {
                Ok(Vec::new())
            }
            Some(_) => Err(Failure::Conflict),
        }
    }

    /// RELEASE.
    pub fn release(&mut self, nexus: Nexus, key: u64, kind: Type) -> Change {
        self.check(nexus, key)?;
        match self.reservation {
            Some(reservation) if self.is_holder(nexus) => {
                if reservation.kind != kind {
                    return Err(Sense::illegal(code::INVALID_RELEASE).into());
                }
                self.reservation = None;
                let is_told = kind.is_for_registrants();
                Ok(self.tell(nexus, Attention::ReservationsReleased, is_told))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// CLEAR.
    pub fn clear(&mut self, nexus: Nexus, key: u64) -> Change {
        self.check(nexus, key)?;
        let attentions = self.tell(nexus, Attention::ReservationsPreempted, true);
        self.registrations.clear();
        self.reservation = None;
        self.generation = self.generation.wrapping_add(1);
        Ok(attentions)
    }

    /// PREEMPT: removes registrations with the key `victim`, and takes over the reservation if they hold it (SPC-4, 5.13.11.2.6).
    pub fn preempt(&mut self, nexus: Nexus, key: u64, victim: u64, kind: Type) -> Change {
        self.check(nexus, key)?;
        let all =
            (self.reservation).is_some_and(|reservation| reservation.kind.is_all_registrants());
        let takes = match self.reservation {
            Some(_) if all => victim == 0,
            Some(_) => victim == self.reservation_key(),
            None => false,
        };
        if victim == 0 && !takes {
            return Err(Sense::parameter(8).into());
        }
        let is_victim = |registration: &Registration| {
            registration.nexus != nexus && (victim == 0 || registration.key == victim)
        };
        let named = |registration: &Registration| registration.key == victim;
        if !takes && !self.registrations.iter().any(named) {
            return Err(Failure::Conflict);
        }
        let removed = self.registrations.iter().copied().filter(is_victim);
        let mut attentions: Attentions = removed
            .map(|registration| (registration.nexus, Attention::RegistrationsPreempted))
            .collect();
        // An initiator that names its own key without taking the reservation removes itself too.
        let keeps_own = takes || key != victim;
        self.registrations.retain(|registration| {
            !is_victim(registration) && (keeps_own || registration.nexus != nexus)
        });
        if takes {
            let before = self.reservation.map(|reservation| reservation.kind);
            let is_told = before.is_some_and(|before| before != kind);
            attentions.extend(self.tell(nexus, Attention::ReservationsReleased, is_told));
            let holder = nexus;
            self.reservation = Some(Reservation { kind, holder });
        } else if let Some(reservation) = self.reservation
            && self.holders(reservation).next().is_none()
        {
            self.reservation = None;
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(attentions)
    }
}
