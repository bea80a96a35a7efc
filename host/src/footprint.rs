//! What a tenant holds of the host's memory: one number for all of it.
//!
//! In it are the linear memories and tables of its instances, the files in
//! their `/tmp`, and what the host itself holds for them: an instance's own
//! state, heads and bodies of requests and responses on their way. Linear
//! memory counts in full, though pages that an instance has not written to are
//! shared with others.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// What an instance costs the host besides its memory: the store, the part of
/// the fiber's stack that is in use, and lines of the log that are not complete.
pub const INSTANCE: u64 = 128 << 10;

/// The memory that is held for one tenant.
#[derive(Debug)]
pub struct Footprint {
    held: AtomicU64,
    limit: u64,
    all: Arc<Together>,
}

impl Footprint {
    /// Nothing, of at most `limit` bytes.
    #[cfg(test)]
    pub fn new(limit: Option<u64>) -> Arc<Footprint> {
        Footprint::within(limit, &Together::new(u64::MAX))
    }

    /// Nothing, of at most `limit` bytes, and a part of what `all` hold.
    pub fn within(limit: Option<u64>, all: &Arc<Together>) -> Arc<Footprint> {
        let limit = limit.unwrap_or(u64::MAX);
        Arc::new(Footprint { held: AtomicU64::new(0), limit, all: Arc::clone(all) })
    }

    /// Whether what all hold leaves less room than the tenant's own limit.
    pub fn is_short_together(&self) -> bool {
        let held = self.held();
        self.all.limit_for(held).saturating_sub(self.all.held()) < self.limit.saturating_sub(held)
    }

    fn add(&self, bytes: u64) -> u64 {
        self.all.held.fetch_add(bytes, Ordering::Relaxed);
        self.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes)
    }

    fn take(&self, bytes: u64) {
        self.all.held.fetch_sub(bytes, Ordering::Relaxed);
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes that are held.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Counts `bytes` that are held in any case, for as long as the guard lives.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Held {
        self.add(bytes);
        Held { footprint: Arc::clone(self), bytes }
    }
}

/// A part of a tenant's footprint. Counted until it is dropped.
#[derive(Debug)]
pub struct Held {
    footprint: Arc<Footprint>,
    bytes: u64,
}

impl Held {
    /// Sets what is held.
    pub fn set(&mut self, bytes: u64) {
        match bytes.checked_sub(self.bytes) {
            Some(more) => drop(self.footprint.add(more)),
            None => self.footprint.take(self.bytes - bytes),
        }
        self.bytes = bytes;
    }

    /// Adds `bytes`, if the tenant may have so many more.
    pub fn grow(&mut self, bytes: u64) -> bool {
        let held = self.footprint.add(bytes);
        if held > self.footprint.limit || !self.footprint.all.make_room(held) {
            self.footprint.take(bytes);
            return false;
        }
        self.bytes += bytes;
        true
    }

    /// Takes `bytes` away, of those that were added.
    pub fn shrink(&mut self, bytes: u64) {
        self.set(self.bytes.saturating_sub(bytes));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.footprint.take(self.bytes);
    }
}

/// What a tenant may hold of the part that is kept for those who hold little:
/// a first instance of most apps.
const LITTLE: u64 = 32 << 20;

/// The memory that is held for all tenants together.
pub struct Together {
    held: AtomicU64,
    limit: u64,
    /// Gives back what somebody holds without need. False if there is nothing.
    relief: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl Together {
    /// Nothing, of at most `limit` bytes.
    pub fn new(limit: u64) -> Arc<Together> {
        Arc::new(Together { held: AtomicU64::new(0), limit, relief: OnceLock::new() })
    }

    /// Has `relief` called when memory runs short. It is false when there is
    /// nothing to give back.
    pub fn relieve_by(&self, relief: impl Fn() -> bool + Send + Sync + 'static) {
        // There is one, set once.
        let _ = self.relief.set(Box::new(relief));
    }

    fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// What all may hold when one who holds `own` wants more: an eighth is left
    /// for those that hold little, whatever the others do.
    fn limit_for(&self, own: u64) -> u64 {
        if own <= LITTLE { self.limit } else { self.limit - self.limit / 8 }
    }

    /// Whether no more is held than may be by one who holds `own`, if need be
    /// after some was given back.
    fn make_room(&self, own: u64) -> bool {
        while self.held() > self.limit_for(own) {
            if !self.relief.get().is_some_and(|relief| relief()) {
                return false;
            }
        }
        true
    }
}

impl fmt::Debug for Together {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.held(), self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn together_tenants_hold_no_more_than_there_is() {
        let all = Together::new(8 * LITTLE);
        let (one, two) = (Footprint::within(None, &all), Footprint::within(None, &all));
        let (mut large, mut little) = (one.hold(0), two.hold(0));
        assert!(large.grow(7 * LITTLE) && !large.grow(1), "an eighth is left for others");
        assert!(one.is_short_together());
        assert!(little.grow(LITTLE) && !little.grow(1));
        assert_eq!(all.held(), 8 * LITTLE);
        // Somebody has something to spare, once.
        let spare = std::sync::Mutex::new(Some(large));
        all.relieve_by(move || spare.lock().unwrap().take().is_some());
        assert!(little.grow(6 * LITTLE) && !little.grow(1));
        drop(little);
        assert_eq!((one.held(), two.held(), all.held()), (0, 0, 0));
    }

    #[test]
    fn what_is_dropped_is_not_held() {
        let footprint = Footprint::new(Some(100));
        let mut one = footprint.hold(10);
        let mut two = footprint.hold(0);
        assert!(two.grow(90) && !two.grow(1));
        one.set(5);
        assert!(two.grow(5));
        two.shrink(50);
        assert_eq!(footprint.held(), 50);
        drop((one, two));
        assert_eq!(footprint.held(), 0);
    }
}
