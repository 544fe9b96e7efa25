//! Contexts that are costly to make and are used by one thread at a time.

use std::sync::{Mutex, PoisonError};

/// Idle values. It grows to the largest number in use at once and never shrinks.
pub(crate) struct Pool<T> {
    idle: Mutex<Vec<T>>,
}

impl<T> Pool<T> {
    pub(crate) const fn new() -> Self {
        Self { idle: Mutex::new(Vec::new()) }
    }

    /// Lends an idle value, or a new one by `make`, to `work`. After an error of `make` the pool is as
    /// before; a value whose `work` panics is not used again.
    pub(crate) fn with<R, E>(
        &self,
        make: impl FnOnce() -> Result<T, E>,
        work: impl FnOnce(&mut T) -> Result<R, E>,
    ) -> Result<R, E> {
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
    fn makes_one_value_for_each_user_at_a_time() {
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
