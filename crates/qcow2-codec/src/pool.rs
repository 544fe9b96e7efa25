//! A pool of contexts that are expensive to create and are used by one thread at a time.

use std::sync::{Mutex, PoisonError};

/// The idle contexts. Grows to the largest number in use at once and never shrinks.
pub(crate) struct Pool<T> {
    idle: Mutex<Vec<T>>,
}

impl<T> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self { idle: Mutex::new(Vec::new()) }
    }

    /// Runs `work` with an idle context, or with a new one from `make`. An error of `make` leaves the pool
    /// unchanged. A context whose `work` panics is dropped.
    pub(crate) fn with<R, E>(
        &self,
        make: impl FnOnce() -> Result<T, E>,
        work: impl FnOnce(&mut T) -> Result<R, E>,
    ) -> Result<R, E> {
        // The lock is not held during `work`. A poisoned lock is harmless: the list of idle contexts is
        // always valid.
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut value = match idle {
            Some(value) => value,
            None => make()?,
        };
        let result = work(&mut value);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(value);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn creates_one_value_per_concurrent_user() {
        let pool = Pool::new();
        let made = Cell::new(0);
        let make = || {
            made.set(made.get() + 1);
            Ok::<_, ()>(made.get())
        };
        for _ in 0..3 {
            pool.with(make, |_| pool.with(make, |_| Ok(()))).unwrap();
        }
        assert_eq!(made.get(), 2);
        assert_eq!(pool.with(|| Err("no"), |_| Ok(1)), Ok(1));
        assert_eq!(Pool::<u8>::new().with(|| Err("no"), |_| Ok(1)), Err("no"));
    }
}
