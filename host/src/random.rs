//! `wasi:random` for guests: wasmtime's own, but for how bytes are made.
//!
//! wasmtime draws a number for each byte. Every instance asks for 2.5 kB when it starts:
//! CPython seeds its generator `random` anew, so that no two instances have the same.

use rand::Rng as _;
use wasmtime::component::{HasData, Linker};
use wasmtime::error::bail;
use wasmtime_wasi::p2::bindings::random::random;

/// Random bytes that a guest may ask for in one call.
pub const MAX_BYTES: u64 = 1 << 20;

/// The random bytes of a guest: this thread's generator, which the system's entropy seeds
/// and which is fit for secrets.
pub struct Source;

impl HasData for Source {
    type Data<'a> = Source;
}

impl random::Host for Source {
    fn get_random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        if length > MAX_BYTES {
            bail!("{length} random bytes: that exceeds limit {MAX_BYTES}");
        }
        let mut bytes = vec![0; usize::try_from(length)?];
        rand::rng().fill_bytes(&mut bytes);
        Ok(bytes)
    }

    fn get_random_u64(&mut self) -> wasmtime::Result<u64> {
        Ok(rand::rng().next_u64())
    }
}

/// Links `wasi:random/random`.
///
/// # Errors
///
/// If it is linked already and may not be replaced.
pub fn add_to_linker<T: Send + 'static>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    random::add_to_linker::<T, Source>(linker, |_| Source)
}

#[cfg(test)]
mod tests {
    use super::random::Host as _;
    use super::*;

    #[test]
    fn so_many_bytes_come_as_were_asked_for_and_never_the_same() {
        let bytes = |length| Source.get_random_bytes(length);
        assert!(bytes(0).unwrap().is_empty());
        assert_eq!(bytes(MAX_BYTES).unwrap().len() as u64, MAX_BYTES);
        assert_ne!(bytes(32).unwrap(), bytes(32).unwrap());
        assert!(bytes(MAX_BYTES + 1).is_err() && bytes(u64::MAX).is_err());
    }
}
