//! Password hashing lent to guests: PBKDF2 and scrypt by the RustCrypto
//! implementations, on threads where they may block.
//!
//! A derivation is work of the app that asks for it: its processor time counts
//! for the app, and who has had the least goes first.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::scheduler::{Scheduler, Share, processors};

/// Work that one call may ask for, some seconds of one core: it can not be
/// interrupted. Django's and Werkzeug's default costs are a fifth of it.
const MAX_PBKDF2_BLOCKS: u64 = 5_000_000;
/// Memory that one call to scrypt may ask for: OpenSSL's default in CPython
/// is 32 MiB, Werkzeug asks for 32 MiB and a little.
const MAX_SCRYPT_BYTES: u64 = 128 << 20;
/// Blocks of memory that scrypt may mix, over all its passes.
const MAX_SCRYPT_WORK: u64 = 1 << 30;
/// Bytes of derived key; longer ones are of no use as a password's hash.
const MAX_LENGTH: u32 = 1 << 16;

/// Who may derive: as many at a time as there are cores, so that a flood of
/// logins takes no more threads and no more memory than that.
static TURNS: LazyLock<Arc<Scheduler>> = LazyLock::new(Scheduler::new);

/// One app's part in the derivations.
#[derive(Debug)]
pub struct Derivations {
    share: Arc<Share>,
    /// Half of what there is, so that another app need not wait for this one.
    places: Arc<Semaphore>,
}

impl Derivations {
    /// For the app with this share.
    pub fn new(share: Arc<Share>) -> Derivations {
        Derivations { share, places: Arc::new(Semaphore::new((processors() / 2).max(1))) }
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
    let blocks = u64::from(length).div_ceil(digest.length());
    if blocks * u64::from(iterations) > MAX_PBKDF2_BLOCKS {
        return Err(Refusal::TooExpensive(format!(
            "{iterations} iterations for {length} bytes are more than one call may ask for; \
             the limit is {MAX_PBKDF2_BLOCKS} iterations for each {} bytes",
            digest.length()
        )));
    }
    run(app, length, move |key| {
        let derive = match digest {
            Digest::Md5 => pbkdf2::pbkdf2_hmac::<md5::Md5>,
            Digest::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>,
            Digest::Sha224 => pbkdf2::pbkdf2_hmac::<sha2::Sha224>,
            Digest::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>,
            Digest::Sha384 => pbkdf2::pbkdf2_hmac::<sha2::Sha384>,
            Digest::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>,
            Digest::Sha3_224 => pbkdf2::pbkdf2_hmac::<sha3::Sha3_224>,
            Digest::Sha3_256 => pbkdf2::pbkdf2_hmac::<sha3::Sha3_256>,
            Digest::Sha3_384 => pbkdf2::pbkdf2_hmac::<sha3::Sha3_384>,
            Digest::Sha3_512 => pbkdf2::pbkdf2_hmac::<sha3::Sha3_512>,
        };
        derive(&password, &salt, iterations, key);
    })
    .await
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
    let (n_, r_, p_) = (u64::from(n), u64::from(r), u64::from(p));
    // RFC 7914 section 5: one block of 128 * r bytes for each of n and p.
    let memory = (128 * r_).saturating_mul(n_ + p_);
    if memory > MAX_SCRYPT_BYTES || memory.saturating_mul(p_) > MAX_SCRYPT_WORK {
        return Err(Refusal::TooExpensive(format!(
            "scrypt with n={n}, r={r}, p={p} needs {memory} bytes; one call may ask for {MAX_SCRYPT_BYTES} \
             and {MAX_SCRYPT_WORK} over its p passes"
        )));
    }
    run(app, length, move |key| {
        // Fails only for a key length that was checked above.
        let _ = scrypt::scrypt(&password, &salt, &parameters, key);
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

/// Runs `derive` on a thread for blocking work, when its turn comes.
async fn run(app: &Derivations, length: u32, derive: impl FnOnce(&mut [u8]) + Send + 'static) -> Derived {
    let failed = || Refusal::TooExpensive("the host could not run the derivation".into());
    let place = Arc::clone(&app.places).acquire_owned().await.map_err(|_| failed())?;
    let slot = TURNS.turn(&app.share).await;
    let share = Arc::clone(&app.share);
    let derived = tokio::task::spawn_blocking(move || {
        // Held by the work, not by the request: that may be gone before.
        let _held = (place, slot);
        let start = Instant::now();
        let mut key = vec![0; length as usize];
        derive(&mut key);
        let spent = start.elapsed();
        share.charge(u64::try_from(spent.as_micros()).unwrap_or(u64::MAX));
        (key, spent)
    });
    derived.await.map_err(|_| failed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn app() -> Derivations {
        Derivations::new(Share::new(1, None))
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
        assert!(invalid(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), 0, 32))));
        assert!(invalid(block_on(pbkdf2_hmac(&app(), Digest::Sha256, p(), s(), 1, 0))));
        assert!(expensive(block_on(scrypt(&app(), p(), s(), 1 << 30, 8, 1, 32))));
        assert!(expensive(block_on(scrypt(&app(), p(), s(), 2, 8, 1 << 20, 32))));
        assert!(invalid(block_on(scrypt(&app(), p(), s(), 3, 8, 1, 32))));
        assert!(invalid(block_on(scrypt(&app(), p(), s(), 2, 0, 1, 32))));
        assert!(invalid(block_on(scrypt(&app(), p(), s(), 2, 8, 0, 32))));
    }
}
