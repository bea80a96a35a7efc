//! Password hashing lent to guests: PBKDF2 and scrypt by the RustCrypto
//! implementations, on threads where they may block.
//!
//! A derivation is work of the app that asks for it: its processor time counts
//! for the app, and who has had the least goes first. PBKDF2 takes turns with
//! the guests' own computations, slice by slice, and so can go on for long.
//! scrypt can not be divided: what one call may ask for is bounded by the time
//! that others have to wait for it, and its memory is the tenant's.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use pbkdf2::hmac::block_api::HmacCore;
use pbkdf2::hmac::digest::block_api::{Buffer, CoreProxy as _};
use pbkdf2::hmac::digest::{FixedOutput as _, KeyInit as _, Output, Update as _};
use pbkdf2::hmac::{EagerHash, Hmac};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::footprint::Footprint;
use crate::scheduler::{self, Scheduler, Share, processors};

/// Iterations that one call to PBKDF2 may ask for, some seconds of one core.
/// Django's and Werkzeug's default costs are a fifth of it.
const MAX_PBKDF2_WORK: u64 = 5_000_000;
/// Bytes of salt that are as much work as an iteration: it hashes two blocks,
/// the smallest of which have 64 bytes, and the salt is hashed for each block
/// of the key.
const SALT_PER_ITERATION: u64 = 128;
/// Bytes of a password, and of a salt. Our adapter hashes a longer password
/// itself, as HMAC says (RFC 2104 section 2).
const MAX_INPUT: usize = 64 << 10;
/// How long PBKDF2 computes before others get their turn.
const SLICE: Duration = Duration::from_millis(10);
/// Iterations between two looks at the clock.
const STEP: u32 = 256;
/// Memory that one call to scrypt may ask for: OpenSSL's default in CPython
/// is 32 MiB, Werkzeug asks for 32 MiB and a little, OWASP for up to 128 MiB.
const MAX_SCRYPT_BYTES: u64 = (128 << 20) + (1 << 20);
/// Bytes that scrypt may mix, over all its passes: about half a second, for
/// which a thread can not be taken back. Django asks for 80 MiB.
const MAX_SCRYPT_WORK: u64 = 128 << 20;
/// Bytes that scrypt may hash before and after that.
const MAX_SCRYPT_HASHED: u64 = 32 << 20;
/// Bytes of derived key; longer ones are of no use as a password's hash.
const MAX_LENGTH: u32 = 1 << 16;

/// Who may use scrypt: as many at a time as there are cores, so that a flood of
/// logins takes no more threads and no more memory than that. Not the turns of
/// the guests, which nobody may keep for so long.
static SCRYPT_TURNS: LazyLock<Arc<Scheduler>> = LazyLock::new(|| Scheduler::new(None));

/// One app's part in the derivations.
#[derive(Debug)]
pub struct Derivations {
    share: Arc<Share>,
    /// The app's part in [`SCRYPT_TURNS`]. A share of its own: one that was
    /// used with two schedulers would take the backlog of each to the other.
    scrypt_share: Arc<Share>,
    footprint: Arc<Footprint>,
    /// Derivations of the app under way: first come, first served.
    places: Arc<Semaphore>,
    /// Half of what there is, so that another app need not wait for this one.
    scrypt_places: Arc<Semaphore>,
}

impl Derivations {
    /// For the app with this share in the processors, and what it holds of the
    /// host's memory.
    pub fn new(share: Arc<Share>, footprint: Arc<Footprint>) -> Derivations {
        Derivations {
            share,
            scrypt_share: Share::new(&SCRYPT_TURNS, 1, None),
            footprint,
            places: Arc::new(Semaphore::new(processors())),
            scrypt_places: Arc::new(Semaphore::new((processors() / 2).max(1))),
        }
    }
}

/// A key, and the processor time that it took.
pub type Derived = Result<(Vec<u8>, Duration), Refusal>;

/// Why nothing was derived.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The algorithm does not allow these parameters.
    Invalid(String),
    /// More than the host grants to one call.
    TooExpensive(String),
}

/// The hash function below PBKDF2's HMAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digest {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Sha3_224,
    Sha3_256,
    Sha3_384,
    Sha3_512,
}

impl Digest {
    /// Length of the hash in bytes.
    fn length(self) -> u64 {
        match self {
            Digest::Md5 => 16,
            Digest::Sha1 => 20,
            Digest::Sha224 | Digest::Sha3_224 => 28,
            Digest::Sha256 | Digest::Sha3_256 => 32,
            Digest::Sha384 | Digest::Sha3_384 => 48,
            Digest::Sha512 | Digest::Sha3_512 => 64,
        }
    }
}

/// PBKDF2 with HMAC (RFC 8018 section 5.2).
///
/// # Errors
///
/// If a parameter is out of range or asks for too much work.
pub async fn pbkdf2_hmac(
    app: &Derivations,
    digest: Digest,
    password: Vec<u8>,
    salt: Vec<u8>,
    iterations: u32,
    length: u32,
) -> Derived {
    if iterations == 0 {
        return Err(Refusal::Invalid("iteration value must be greater than 0".into()));
    }
    check_length(length)?;
    check_input(&password, &salt)?;
    let blocks = u64::from(length).div_ceil(digest.length());
    let work = u64::from(iterations) + salt.len() as u64 / SALT_PER_ITERATION;
    if blocks * work > MAX_PBKDF2_WORK {
        return Err(Refusal::TooExpensive(format!(
            "{iterations} iterations for {length} bytes are more than one call may ask for; \
             the limit is {MAX_PBKDF2_WORK} iterations for each {} bytes, and {SALT_PER_ITERATION} bytes \
             of salt are as many as one",
            digest.length()
        )));
    }
    let begin = match digest {
        Digest::Md5 => Pbkdf2::<md5::Md5>::begin,
        Digest::Sha1 => Pbkdf2::<sha1::Sha1>::begin,
        Digest::Sha224 => Pbkdf2::<sha2::Sha224>::begin,
        Digest::Sha256 => Pbkdf2::<sha2::Sha256>::begin,
        Digest::Sha384 => Pbkdf2::<sha2::Sha384>::begin,
        Digest::Sha512 => Pbkdf2::<sha2::Sha512>::begin,
        Digest::Sha3_224 => Pbkdf2::<sha3::Sha3_224>::begin,
        Digest::Sha3_256 => Pbkdf2::<sha3::Sha3_256>::begin,
        Digest::Sha3_384 => Pbkdf2::<sha3::Sha3_384>::begin,
        Digest::Sha3_512 => Pbkdf2::<sha3::Sha3_512>::begin,
    };
    let mut work = begin(&password, salt, iterations, length as usize)?;
    let (places, share) = (Arc::clone(&app.places), Arc::clone(&app.share));
    apart(&app.share, async move {
        let _place = places.acquire().await.map_err(|_| failed())?;
        let mut spent = Duration::ZERO;
        loop {
            let slot = share.turn().await;
            let charged = Arc::clone(&share);
            let slice = share.background().spawn_blocking(move || {
                // Held by the work, not by the request: that may be gone before.
                let _held = slot;
                let (key, time) = charged.charged(|| work.go_on(Instant::now() + SLICE));
                (work, key, time)
            });
            let (key, time);
            (work, key, time) = slice.await.map_err(|_| failed())?;
            spent += time;
            if let Some(key) = key {
                return Ok((key, spent));
            }
        }
    })
    .await
}

/// Lets a derivation of the tenant with this share go on in a task of its own,
/// for as long as it is waited for. Not in the guest's: that is polled only when
/// it is the guest's turn, and the derivation would have a turn meanwhile and
/// not use it.
async fn apart(share: &Share, derivation: impl Future<Output = Derived> + Send + 'static) -> Derived {
    let mut task = JoinSet::new();
    task.spawn_on(derivation, &share.background());
    task.join_next().await.and_then(Result::ok).unwrap_or_else(|| Err(failed()))
}

/// A derivation that goes on where it stopped.
trait Resume: Send {
    /// Computes until this time, and returns the key if that is done.
    fn go_on(&mut self, until: Instant) -> Option<Vec<u8>>;
}

/// PBKDF2 with `D`, somewhere in the middle.
struct Pbkdf2<D: EagerHash> {
    /// The two states that the password makes; each HMAC begins with a copy.
    keyed: HmacCore<D>,
    salt: Vec<u8>,
    iterations: u32,
    length: usize,
    /// The blocks that are complete.
    key: Vec<u8>,
    /// Iterations that are left of this block; none before the first one.
    left: Option<u32>,
    /// What the last iteration gave, and the sum of all.
    last: Output<Hmac<D>>,
    sum: Output<Hmac<D>>,
}

impl<D: EagerHash + 'static> Pbkdf2<D>
where
    Pbkdf2<D>: Resume,
{
    fn begin(
        password: &[u8],
        salt: Vec<u8>,
        iterations: u32,
        length: usize,
    ) -> Result<Box<dyn Resume>, Refusal> {
        let keyed = HmacCore::<D>::new_from_slice(password);
        let keyed = keyed.map_err(|_| Refusal::Invalid("the password has no valid length".into()))?;
        let (key, last, sum) = (Vec::new(), Output::<Hmac<D>>::default(), Output::<Hmac<D>>::default());
        Ok(Box::new(Pbkdf2 { keyed, salt, iterations, length, key, left: None, last, sum }))
    }
}

impl<D: EagerHash> Resume for Pbkdf2<D>
where
    HmacCore<D>: Send,
    Output<Hmac<D>>: Send,
{
    fn go_on(&mut self, until: Instant) -> Option<Vec<u8>> {
        // With an empty buffer, and the compiler knows that it is: a copy of a
        // whole `Hmac` costs an eighth.
        let hmac = || Hmac::<D>::compose(self.keyed.clone(), Buffer::<HmacCore<D>>::default());
        loop {
            let mut left = if let Some(left) = self.left {
                left
            } else {
                let block = u32::try_from(self.key.len() / self.sum.len()).unwrap_or(u32::MAX);
                let mut first = hmac();
                first.update(&self.salt);
                first.update(&block.saturating_add(1).to_be_bytes());
                self.last = first.finalize_fixed();
                self.sum.clone_from(&self.last);
                self.iterations - 1
            };
            // In registers, not through `self`.
            let (mut last, mut sum) = (std::mem::take(&mut self.last), std::mem::take(&mut self.sum));
            for _ in 0..left.min(STEP) {
                let mut next = hmac();
                next.update(&last);
                last = next.finalize_fixed();
                sum.iter_mut().zip(&last).for_each(|(sum, byte)| *sum ^= byte);
            }
            (self.last, self.sum) = (last, sum);
            left = left.saturating_sub(STEP);
            self.left = Some(left);
            if left == 0 {
                self.left = None;
                self.key.extend_from_slice(&self.sum);
                if self.key.len() >= self.length {
                    self.key.truncate(self.length);
                    return Some(std::mem::take(&mut self.key));
                }
            }
            if Instant::now() >= until {
                return None;
            }
            scheduler::let_others_go_first();
        }
    }
}

/// scrypt (RFC 7914).
///
/// # Errors
///
/// If a parameter is out of range or asks for too much work or memory.
pub async fn scrypt(
    app: &Derivations,
    password: Vec<u8>,
    salt: Vec<u8>,
    n: u32,
    r: u32,
    p: u32,
    length: u32,
) -> Derived {
    if n < 2 || !n.is_power_of_two() {
        return Err(Refusal::Invalid("n must be a power of 2 and greater than 1".into()));
    }
    check_length(length)?;
    let parameters = u8::try_from(n.ilog2())
        .ok()
        .and_then(|log_n| scrypt::Params::new(log_n, r, p).ok())
        .ok_or_else(|| Refusal::Invalid(format!("scrypt does not allow n={n}, r={r}, p={p}")))?;
    check_input(&password, &salt)?;
    let (n_, r_, p_) = (u64::from(n), u64::from(r), u64::from(p));
    // RFC 7914 section 5: one block of 128 * r bytes for each of n and p.
    let memory = (128 * r_).saturating_mul(n_ + p_);
    let mixed = (128 * r_).saturating_mul(n_).saturating_mul(p_);
    if memory > MAX_SCRYPT_BYTES || mixed > MAX_SCRYPT_WORK {
        return Err(Refusal::TooExpensive(format!(
            "scrypt with n={n}, r={r}, p={p} needs {memory} bytes; one call may ask for {MAX_SCRYPT_BYTES} \
             and {MAX_SCRYPT_WORK} over its p passes"
        )));
    }
    // The same, section 6: PBKDF2 with one iteration makes the blocks, and of
    // them the key.
    let blocks = 128 * r_ * p_;
    let hashed = blocks.div_ceil(32).saturating_mul(salt.len() as u64 + SALT_PER_ITERATION);
    let hashed =
        hashed.saturating_add(u64::from(length.div_ceil(32)).saturating_mul(blocks + SALT_PER_ITERATION));
    if hashed > MAX_SCRYPT_HASHED {
        return Err(Refusal::TooExpensive(format!(
            "scrypt with r={r}, p={p}, {} bytes of salt and a key of {length} bytes hashes {hashed} bytes; one \
             call may ask for {MAX_SCRYPT_HASHED}",
            salt.len()
        )));
    }
    let (places, footprint) = (Arc::clone(&app.scrypt_places), Arc::clone(&app.footprint));
    let shares = (Arc::clone(&app.share), Arc::clone(&app.scrypt_share));
    apart(&app.share, async move {
        let place = places.acquire_owned().await.map_err(|_| failed())?;
        let slot = shares.1.turn().await;
        let mut held = footprint.hold(0);
        if !held.grow(memory) {
            return Err(Refusal::TooExpensive(format!(
                "scrypt with n={n}, r={r}, p={p} needs {memory} bytes, and the tenant holds as much memory as it may"
            )));
        }
        let background = shares.0.background();
        let derived = background.spawn_blocking(move || {
            // Held by the work, not by the request: that may be gone before.
            let _held = (place, slot, held);
            let derive = || {
                let mut key = vec![0; length as usize];
                // Fails only for a key length that was checked above.
                let _ = scrypt::scrypt(&password, &salt, &parameters, &mut key);
                key
            };
            shares.1.charged(|| shares.0.charged(derive)).0
        });
        derived.await.map_err(|_| failed())
    })
    .await
}

fn check_length(length: u32) -> Result<(), Refusal> {
    match length {
        0 => Err(Refusal::Invalid("key length must be greater than 0".into())),
        1..=MAX_LENGTH => Ok(()),
        _ => Err(Refusal::TooExpensive(format!("a key may have {MAX_LENGTH} bytes at most"))),
    }
}

fn check_input(password: &[u8], salt: &[u8]) -> Result<(), Refusal> {
    for (name, input) in [("password", password), ("salt", salt)] {
        if input.len() > MAX_INPUT {
            return Err(Refusal::TooExpensive(format!("a {name} may have {MAX_INPUT} bytes at most")));
        }
    }
    Ok(())
}

fn failed() -> Refusal {
    Refusal::TooExpensive("the host could not run the derivation".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn app() -> Derivations {
        limited(None)
    }

    fn limited(memory: Option<u64>) -> Derivations {
        Derivations::new(Share::new(&Scheduler::new(None), 1, None), Footprint::new(memory))
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn pbkdf2(digest: Digest, password: &str, salt: &str, iterations: u32, length: u32) -> String {
        hex(&block_on(pbkdf2_hmac(&app(), digest, password.into(), salt.into(), iterations, length))
            .unwrap()
            .0)
    }

    /// RFC 6070 section 2, and RFC 7914 section 11 for SHA-256.
    #[test]
    fn pbkdf2_gives_the_vectors_of_the_rfcs() {
        assert_eq!(
            pbkdf2(Digest::Sha1, "password", "salt", 1, 20),
            "0c60c80f961f0e71f3a9b524af6012062fe037a6"
        );
        assert_eq!(
            pbkdf2(Digest::Sha1, "password", "salt", 4096, 20),
            "4b007901b765489abead49d926f721d065a429c1"
        );
        assert_eq!(
            pbkdf2(
                Digest::Sha1,
                "passwordPASSWORDpassword",
                "saltSALTsaltSALTsaltSALTsaltSALTsalt",
                4096,
                25
            ),
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
        );
        assert_eq!(
            pbkdf2(Digest::Sha1, "pass\0word", "sa\0lt", 4096, 16),
            "56fa6aa75548099dcc37d7f03425e0c3"
        );
        assert_eq!(
            pbkdf2(Digest::Sha256, "passwd", "salt", 1, 64),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
    }

    /// RFC 7914 section 12.
    #[test]
    fn scrypt_gives_the_vectors_of_the_rfc() {
        assert_eq!(
            hex(&block_on(scrypt(&app(), "password".into(), "NaCl".into(), 1024, 8, 16, 64)).unwrap().0),
            "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162\
             2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"
        );
        assert_eq!(
            hex(&block_on(scrypt(&app(), "pleaseletmein".into(), "SodiumChloride".into(), 16384, 8, 1, 64))
                .unwrap()
                .0),
            "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2\
             d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
        );
    }

    #[test]
    fn what_costs_too_much_or_makes_no_sense_is_refused() {
        let expensive = |result| matches!(result, Err(Refusal::TooExpensive(_)));
        let invalid = |result| matches!(result, Err(Refusal::Invalid(_)));
        let (p, s) = (Vec::new, Vec::new);
        assert!(expensive(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), u32::MAX, 32))));
        assert!(expensive(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), 1_000_000, 65_536))));
        assert!(expensive(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), 1, u32::MAX))));
        let long = || vec![b's'; MAX_INPUT];
        assert!(expensive(block_on(pbkdf2_hmac(&app(), Digest::Sha224, p(), vec![b's'; 4 << 20], 1, 1))));
        assert!(expensive(block_on(pbkdf2_hmac(&app(), Digest::Sha224, vec![b'p'; 4 << 20], s(), 1, 1))));
        assert!(expensive(block_on(pbkdf2_hmac(&app(), Digest::Sha224, p(), long(), 2000, MAX_LENGTH))));
        assert!(invalid(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), 0, 32))));
        assert!(invalid(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), 1, 0))));
        assert!(expensive(block_on(scrypt(&app(), p(), s(), 1 << 30, 8, 1, 32))));
        assert!(expensive(block_on(scrypt(&app(), p(), s(), 2, 8, 1 << 20, 32))));
        assert!(expensive(block_on(scrypt(&app(), p(), s(), 1 << 17, 8, 2, 32))));
        assert!(expensive(block_on(scrypt(&app(), p(), long(), 2, 1 << 17, 1, 32))));
        assert!(expensive(block_on(scrypt(&app(), p(), s(), 2, 1 << 17, 1, MAX_LENGTH))));
        assert!(invalid(block_on(scrypt(&app(), p(), s(), 3, 8, 1, 32))));
        assert!(invalid(block_on(scrypt(&app(), p(), s(), 2, 0, 1, 32))));
        assert!(invalid(block_on(scrypt(&app(), p(), s(), 2, 8, 0, 32))));
    }

    #[test]
    fn slices_make_the_same_key() {
        for (digest, length) in [(Digest::Md5, 16), (Digest::Sha256, 100), (Digest::Sha3_512, 64)] {
            let begin = match digest {
                Digest::Md5 => Pbkdf2::<md5::Md5>::begin,
                Digest::Sha256 => Pbkdf2::<sha2::Sha256>::begin,
                _ => Pbkdf2::<sha3::Sha3_512>::begin,
            };
            for iterations in [1, STEP, STEP + 1, 3 * STEP + 7] {
                let mut work = begin(b"p", b"s".to_vec(), iterations, length).unwrap();
                let mut slices = 1;
                // Each of them is over before it begins.
                let key = loop {
                    match work.go_on(Instant::now()) {
                        Some(key) => break key,
                        None => slices += 1,
                    }
                };
                let mut whole = vec![0; length];
                match digest {
                    Digest::Md5 => pbkdf2::pbkdf2_hmac::<md5::Md5>(b"p", b"s", iterations, &mut whole),
                    Digest::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(b"p", b"s", iterations, &mut whole),
                    _ => pbkdf2::pbkdf2_hmac::<sha3::Sha3_512>(b"p", b"s", iterations, &mut whole),
                }
                assert_eq!(key, whole, "{digest:?} {iterations}");
                let blocks = length.div_ceil(usize::try_from(digest.length()).unwrap());
                assert_eq!(slices, blocks * (iterations - 1).div_ceil(STEP).max(1) as usize);
            }
        }
    }

    #[test]
    fn the_memory_of_scrypt_is_the_tenants() {
        let app = limited(Some(20 << 20));
        let derive = |n| block_on(scrypt(&app, b"p".to_vec(), b"s".to_vec(), n, 8, 1, 32));
        assert!(derive(1 << 14).is_ok());
        assert!(matches!(derive(1 << 15), Err(Refusal::TooExpensive(_))));
        assert_eq!(app.footprint.held(), 0);
    }

    #[test]
    fn what_frameworks_and_guides_ask_for_is_granted() {
        // Werkzeug, Django, and those that OWASP names.
        for (log_n, p) in [(15, 1), (14, 5), (17, 1), (16, 2), (15, 3), (13, 10)] {
            let derived = block_on(scrypt(&app(), b"p".to_vec(), vec![b's'; 64], 1 << log_n, 8, p, 64));
            assert!(derived.is_ok(), "{log_n} {p}");
        }
    }
}
