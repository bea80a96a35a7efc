//! What a tenant holds of the host's memory: one number for all of it.
//!
//! In it are the linear memories and tables of its instances, the files in
//! their `/tmp`, and what the host itself holds for them: an instance's own
//! state, heads and bodies of requests and responses on their way. Linear
//! memory counts in full, though pages that an instance has not written to are
//! shared with others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an instance costs the host besides its memory: the store, the part of
/// the fiber's stack that is in use, and lines of the log that are not complete.
pub const INSTANCE: u64 = 128 << 10;

/// The memory that is held for one tenant.
#[derive(Debug)]
pub struct Footprint {
    held: AtomicU64,
    limit: u64,
}

impl Footprint {
    /// Nothing, of at most `limit` bytes.
    pub fn new(limit: Option<u64>) -> Arc<Footprint> {
        Arc::new(Footprint { held: AtomicU64::new(0), limit: limit.unwrap_or(u64::MAX) })
    }

    /// Bytes that are held.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Counts `bytes` that are held in any case, for as long as the guard lives.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Held {
        self.held.fetch_add(bytes, Ordering::Relaxed);
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
            Some(more) => self.footprint.held.fetch_add(more, Ordering::Relaxed),
            None => self.footprint.held.fetch_sub(self.bytes - bytes, Ordering::Relaxed),
        };
        self.bytes = bytes;
    }

    /// Adds `bytes`, if the tenant may have so many more.
    pub fn grow(&mut self, bytes: u64) -> bool {
        let held = self.footprint.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if held > self.footprint.limit {
            self.footprint.held.fetch_sub(bytes, Ordering::Relaxed);
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
        self.footprint.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
