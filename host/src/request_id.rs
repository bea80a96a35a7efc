//! Names for requests, by which log lines and error pages find each other.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names one request, unique across restarts with overwhelming likelihood.
/// Not a secret: it may be shown to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestId {
    /// Made here.
    Made(u64),
    /// Given by a proxy: the text and its length.
    Given([u8; MAX_GIVEN], u8),
}

/// The longest name that is taken from a proxy.
const MAX_GIVEN: usize = 64;

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
        RequestId::Made(START.0.wrapping_add(count.wrapping_mul(START.1)))
    }

    /// The name that a proxy gave, if it can stand in a log line.
    pub fn given(text: &[u8]) -> Option<RequestId> {
        let is_sane = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:=+/@".contains(byte);
        let mut name = [0; MAX_GIVEN];
        name.get_mut(..text.len())?.copy_from_slice(text);
        let length = u8::try_from(text.len()).ok().filter(|length| *length > 0)?;
        text.iter().all(is_sane).then_some(RequestId::Given(name, length))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestId::Made(number) => write!(f, "{number:016x}"),
            RequestId::Given(name, length) => {
                f.write_str(str::from_utf8(&name[..usize::from(*length)]).unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sane_names_are_taken() {
        let uuid = "0b8a3a5e-7c39-4b9c-8a57-0f5d5a0d9b01";
        assert_eq!(RequestId::given(uuid.as_bytes()).unwrap().to_string(), uuid);
        for bad in ["", "a b", "a\nb", "a\"b", &"x".repeat(65), "caf\u{e9}"] {
            assert_eq!(RequestId::given(bad.as_bytes()), None, "{bad}");
        }
    }
}
