// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Locks that a panic does not make unusable.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex, even if a thread has panicked while holding it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mutex_can_be_locked_after_a_panic() {
        let mutex = Mutex::new(7);
        std::thread::scope(|scope| {
            let panics = scope.spawn(|| {
                let _guard = lock(&mutex);
                panic!("while holding the mutex");
            });
            panics.join().unwrap_err();
        });
        assert!(mutex.is_poisoned());
        assert_eq!(*lock(&mutex), 7);
    }
}
