//! Names for requests, by which log lines and error pages find each other.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names one request, unique across restarts with overwhelming likelihood.
/// Not a secret: it may be shown to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId(u64);

impl RequestId {
    /// The next id. Costs an atomic addition.
    pub fn next() -> RequestId {
        // An odd random step visits all 64-bit numbers in a scattered order.
        static START: LazyLock<(u64, u64)> = LazyLock::new(|| {
            let random = RandomState::new();
            (random.hash_one(1), random.hash_one(2) | 1)
        });
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        RequestId(START.0.wrapping_add(count.wrapping_mul(START.1)))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
