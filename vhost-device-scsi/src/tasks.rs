// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands that a logical unit has in hand, for task management, and who may change its medium.
//!
//! A task management function cannot stop an operation of the kernel that may write guest memory. So it marks tasks, and waits until the
//! threads that carry them out have answered them; these answer a marked task as aborted, whatever its operation has done.
//!
//! Some procedures need the medium to themselves, such as COMPARE AND WRITE. They wait until no other task changes the medium, and other
//! tasks that would change it wait for them.

use std::sync::{Mutex, MutexGuard};

use vhost_device_common::lock;

/// Why a task ends without its own answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// ABORT TASK, ABORT TASK SET or CLEAR TASK SET.
    Aborted,
    /// The logical unit or the I_T nexus was reset.
    Reset,
}

/// A task, by its place in the list. It is valid until the task has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task(u32);

#[derive(Debug)]
struct Entry {
    /// The driver's name for the request. Two requests may have the same one. `None` if the driver sent none to this logical unit.
    tag: Option<u64>,
    /// Differs from that of all other tasks of the logical unit.
    number: u64,
    mark: Option<Mark>,
    /// It may change the medium now.
    changes: bool,
    /// It has the medium to itself, or waits until it has.
    excludes: bool,
}

#[derive(Debug, Default)]
struct State {
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    /// The number of the last task.
    last: u64,
    /// Tasks that may change the medium now.
    changes: usize,
    /// A task excludes others.
    is_exclusive: bool,
    /// Resets in progress.
    resets: usize,
}

/// The tasks of a logical unit. All threads share them.
#[derive(Debug, Default)]
pub struct Tasks(Mutex<State>);

/// What the end of a task means for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// A function waits for its answer: publish it, then call [`Tasks::forget`].
    pub mark: Option<Mark>,
    /// Other tasks may go on now.
    pub frees_others: bool,
}

impl Tasks {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Begins a task. Returns also whether it may start now: it waits for a reset that is in progress. The caller bounds the number of
    /// tasks.
    pub fn begin(&self, tag: u64) -> (Task, bool) {
        self.begin_one(Some(tag))
    }

    /// Begins a task that no request of the driver is, and that waits for nothing.
    pub fn begin_unnamed(&self) -> Task {
        self.begin_one(None).0
    }

    fn begin_one(&self, tag: Option<u64>) -> (Task, bool) {
        let mut state = self.state();
        let may_start = state.resets == 0;
        state.last += 1;
        let entry = Some(Entry {
            tag,
            number: state.last,
            mark: None,
            changes: false,
            excludes: false,
        });
        if let Some(place) = state.free.pop()
            && let Some(slot) = state.entries.get_mut(place as usize)
        {
            *slot = entry;
            return (Task(place), may_start);
        }
        state.entries.push(entry);
        (Task(state.entries.len() as u32 - 1), may_start)
    }

    /// Returns whether a reset is in progress, so that new commands wait.
    pub fn is_resetting(&self) -> bool {
        self.state().resets > 0
    }

    /// Returns how a task is marked.
    pub fn mark(&self, task: Task) -> Option<Mark> {
        self.state().entry(task)?.mark
    }

    /// Lets a task change the medium, unless another one excludes it.
    #[must_use]
    pub fn enter(&self, task: Task) -> bool {
        let mut state = self.state();
        let allowed = !state.is_exclusive;
        if allowed && let Some(entry) = state.entry(task) {
            entry.changes = true;
            state.changes += 1;
        }
        allowed
    }

    /// Gives a task the medium for itself. Returns false while other tasks change it: call again when these have ended.
    #[must_use]
    pub fn exclude(&self, task: Task) -> bool {
        let mut state = self.state();
        let is_free = !state.is_exclusive;
        let Some(entry) = state.entry(task) else {
            return false;
        };
        if is_free {
            entry.excludes = true;
        } else if !entry.excludes {
            return false;
        }
        state.is_exclusive = true;
        state.changes == 0
    }

    /// Ends a task. A marked one stays in the list until it is forgotten.
    pub fn end(&self, task: Task) -> Ended {
        let mut state = self.state();
        let Some(entry) = state.entry(task) else {
            return Ended::default();
        };
        let mark = entry.mark;
        let changes = std::mem::take(&mut entry.changes);
        let excludes = std::mem::take(&mut entry.excludes);
        state.changes = state.changes.saturating_sub(changes.into());
        let mut frees_others = false;
        if excludes {
            state.is_exclusive = false;
            frees_others = true;
        } else if changes && state.is_exclusive && state.changes == 0 {
            frees_others = true;
        }
        if mark.is_none() {
            state.remove(task);
        }
        Ended { mark, frees_others }
    }

    /// Removes a marked task whose answer is published. Wake the threads then: functions wait for this.
    pub fn forget(&self, task: Task) {
        self.state().remove(task);
    }

    /// Ends a task that is suspended: it is not answered. Wake the threads afterwards.
    pub fn drop(&self, task: Task) {
        if self.end(task).mark.is_some() {
            self.forget(task);
        }
    }

    /// Marks tasks: all, or those with one tag. Returns their numbers in ascending order. With [`Mark::Reset`] new commands wait until
    /// [`Tasks::end_reset`].
    pub fn mark_all(&self, mark: Mark, tag: Option<u64>) -> Vec<u64> {
        let mut state = self.state();
        if mark == Mark::Reset {
            state.resets += 1;
        }
        let chosen = state.entries.iter_mut().flatten();
        let chosen = chosen.filter(|entry| tag.is_none() || tag == entry.tag);
        let numbers = chosen.map(|entry| {
            // The first function decides.
            entry.mark.get_or_insert(mark);
            entry.number
        });
        let mut numbers: Vec<_> = numbers.collect();
        numbers.sort_unstable();
        numbers
    }

    /// Ends a reset. Wake the threads afterwards: commands may wait for it.
    pub fn end_reset(&self) {
        let mut state = self.state();
        state.resets = state.resets.saturating_sub(1);
    }

    /// Returns whether one of these tasks, in ascending order, has not ended yet.
    pub fn has_any(&self, numbers: &[u64]) -> bool {
        let state = self.state();
        let mut entries = state.entries.iter().flatten();
        entries.any(|entry| numbers.binary_search(&entry.number).is_ok())
    }

    /// Returns whether there is a task: any, or one with this tag.
    pub fn has(&self, tag: Option<u64>) -> bool {
        let state = self.state();
        let mut entries = state.entries.iter().flatten();
        entries.any(|entry| tag.is_none() || tag == entry.tag)
    }
}

impl State {
    fn entry(&mut self, Task(place): Task) -> Option<&mut Entry> {
        self.entries.get_mut(place as usize)?.as_mut()
    }

    fn remove(&mut self, task: Task) {
        let Task(place) = task;
        let slot = self.entries.get_mut(place as usize);
        if slot.and_then(Option::take).is_some() {
            self.free.push(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marked_task_stays_until_its_answer_is_published() {
        let tasks = Tasks::default();
        let begin = |tag| tasks.begin(tag).0;
        let (one, other) = (begin(7), begin(8));
        let numbers = tasks.mark_all(Mark::Aborted, Some(7));
        assert_eq!(numbers.len(), 1);
        assert_eq!(tasks.mark(one), Some(Mark::Aborted));
        assert_eq!(tasks.end(one).mark, Some(Mark::Aborted));
        assert!(tasks.has_any(&numbers));
        tasks.forget(one);
        assert!(!tasks.has_any(&numbers) && !tasks.has(Some(7)));
        assert_eq!(tasks.end(other), Ended::default());
        assert!(!tasks.has(None));
    }

    #[test]
    fn tasks_with_the_same_tag_are_all_marked_and_later_ones_are_not() {
        let tasks = Tasks::default();
        let begin = |tag| tasks.begin(tag).0;
        let both = [begin(7), begin(7)];
        let numbers = tasks.mark_all(Mark::Aborted, Some(7));
        assert_eq!(numbers.len(), 2);
        for task in both {
            assert!(tasks.has_any(&numbers));
            tasks.end(task);
            tasks.forget(task);
        }
        // It takes the place of one of them.
        let later = begin(7);
        assert_eq!(tasks.mark(later), None);
        assert!(!tasks.has_any(&numbers));
    }

    #[test]
    fn a_task_without_a_name_is_found_by_no_tag_but_ends_with_all_others() {
        let tasks = Tasks::default();
        let (named, unnamed) = (tasks.begin(0).0, tasks.begin_unnamed());
        assert_eq!(tasks.mark_all(Mark::Aborted, Some(0)).len(), 1);
        assert_eq!(tasks.mark(unnamed), None);
        let numbers = tasks.mark_all(Mark::Aborted, None);
        tasks.drop(named);
        assert!(tasks.has_any(&numbers));
        tasks.drop(unnamed);
        assert!(!tasks.has_any(&numbers));
    }

    #[test]
    fn a_task_excludes_changes_and_waits_for_those_that_have_begun() {
        let tasks = Tasks::default();
        let begin = |tag| tasks.begin(tag).0;
        let (writer, other) = (begin(1), begin(2));
        let (one, two) = (begin(3), begin(4));
        assert!(tasks.enter(writer));
        assert!(!tasks.exclude(one), "the writer is not done");
        assert!(!tasks.enter(other) && !tasks.exclude(two));
        assert!(tasks.end(writer).frees_others);
        assert!(!tasks.exclude(two), "it is the turn of the first one");
        assert!(tasks.exclude(one));
        assert!(!tasks.enter(other));
        assert!(tasks.end(one).frees_others);
        assert!(tasks.enter(other));
        assert!(!tasks.exclude(two));
        assert!(tasks.end(other).frees_others);
        assert!(tasks.exclude(two));
    }

    #[test]
    fn commands_wait_for_all_resets() {
        let tasks = Tasks::default();
        assert!(tasks.mark_all(Mark::Reset, None).is_empty());
        tasks.mark_all(Mark::Reset, None);
        tasks.end_reset();
        assert!(tasks.is_resetting() && !tasks.begin(1).1);
        tasks.end_reset();
        assert!(!tasks.is_resetting() && tasks.begin(2).1);
    }
}
