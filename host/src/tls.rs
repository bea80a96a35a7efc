//! TLS by rustls: certificates by name, renewed when their files change, and
//! certificates of clients.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::server::{
    ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::connection::stopped;
use crate::error::UserError;
use crate::listener::Stream;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What the operator has named.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chains with their keys. The first is for clients that name
    /// no host, or one that no certificate is for.
    pub pairs: Vec<(PathBuf, PathBuf)>,
    /// Who may vouch for clients.
    pub client_ca: Option<PathBuf>,
}

/// Accepts TLS connections.
pub struct Tls {
    files: TlsFiles,
    config: RwLock<Arc<ServerConfig>>,
}

/// A connection after its handshake.
pub struct Secured {
    /// The bytes inside.
    pub stream: Box<dyn Stream>,
    /// The client's certificate as PEM, if it has shown one.
    pub client_certificate: Option<String>,
}

impl Tls {
    /// Pairs certificates and keys as typed, and loads them.
    ///
    /// # Errors
    ///
    /// A [`UserError`] that names the file or the option.
    pub fn new(files: TlsFiles) -> Result<Tls, UserError> {
        let config = load(&files)?;
        Ok(Tls { files, config: RwLock::new(config) })
    }

    /// Does the handshake on `stream`.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub async fn accept(&self, stream: Box<dyn Stream>) -> io::Result<Secured> {
        let config = Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner));
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let certificates = stream.get_ref().1.peer_certificates();
        let client_certificate = certificates.and_then(|chain| chain.first()).map(pem);
        Ok(Secured { stream: Box::new(stream), client_certificate })
    }

    /// Loads the files again whenever one has changed, until told to stop.
    /// Connections that are open keep what they began with.
    pub async fn renew(self: Arc<Tls>, mut stopping: watch::Receiver<bool>) {
        let mut seen = self.state();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = stopped(&mut stopping) => return,
            }
            let now = self.state();
            if now == seen {
                continue;
            }
            // A pair is two files, which no one replaces at once: what does
            // not fit together now may do so at the next look.
            match load(&self.files) {
                Ok(config) => {
                    *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
                    tracing::info!("the certificates were renewed");
                }
                Err(error) => tracing::warn!("the old certificates stay in use: {error}"),
            }
            seen = now;
        }
    }

    /// What tells that a file has changed.
    fn state(&self) -> Vec<Option<(SystemTime, u64)>> {
        let pairs = self.files.pairs.iter().flat_map(|(certificate, key)| [certificate, key]);
        pairs
            .chain(&self.files.client_ca)
            .map(|path| {
                let metadata = std::fs::metadata(path).ok()?;
                Some((metadata.modified().ok()?, metadata.len()))
            })
            .collect()
    }
}

fn load(files: &TlsFiles) -> Result<Arc<ServerConfig>, UserError> {
    let provider = Arc::new(ring::default_provider());
    let keys = files.pairs.iter().map(|pair| load_pair(&provider, pair)).collect::<Result<_, _>>()?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| UserError::new(format!("can not set up TLS: {error}")))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let refused = |error: &dyn std::fmt::Display| {
                UserError::new(format!("can not read the certificates in `{}`: {error}", path.display()))
                    .remedy("`--tls-client-ca` takes a PEM file with the certificates of authorities")
            };
            let mut roots = RootCertStore::empty();
            for certificate in read_chain(path).map_err(|error| refused(&error))? {
                roots.add(certificate).map_err(|error| refused(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                // The app decides what a client without one may do.
                .allow_unauthenticated()
                .build()
                .map_err(|error| refused(&error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(ByName { keys }));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    if let Ok(ticketer) = ring::Ticketer::new() {
        config.ticketer = ticketer;
    }
    Ok(Arc::new(config))
}

fn read_chain(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?;
    if chain.is_empty() { Err(rustls_pki_types::pem::Error::NoItemsFound) } else { Ok(chain) }
}

fn load_pair(
    provider: &CryptoProvider,
    (certificate, key): &(PathBuf, PathBuf),
) -> Result<Arc<CertifiedKey>, UserError> {
    let chain = read_chain(certificate).map_err(|error| {
        UserError::new(format!("can not read the certificate `{}`: {error}", certificate.display()))
            .remedy("`--tls-cert` takes a PEM file with the certificate and those that vouch for it")
    })?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| {
        UserError::new(format!("can not read the key `{}`: {error}", key.display()))
            .remedy("`--tls-key` takes a PEM file with a private key that has no password")
    })?;
    let pair = CertifiedKey::from_der(chain, secret, provider).map_err(|error| {
        UserError::new(format!(
            "the certificate `{}` and the key `{}` do not work together: {error}",
            certificate.display(),
            key.display()
        ))
        .remedy("give each `--tls-cert` the `--tls-key` that it was made for, in the same order")
    })?;
    Ok(Arc::new(pair))
}

/// Chooses the certificate for the host that the client names.
#[derive(Debug)]
struct ByName {
    keys: Vec<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let fits = |key: &&Arc<CertifiedKey>| {
            let (Some(name), Some(certificate)) = (&name, key.cert.first()) else { return false };
            ParsedCertificate::try_from(certificate)
                .is_ok_and(|certificate| verify_server_name(&certificate, name).is_ok())
        };
        self.keys.iter().find(fits).or(self.keys.first()).cloned()
    }
}

/// RFC 7468.
fn pem(certificate: &CertificateDer<'_>) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in certificate.chunks(48) {
        for group in line.chunks(3) {
            let bits =
                group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            for index in 0..4 {
                if index <= group.len() {
                    let digit = bits >> (18 - 6 * index) & 63;
                    text.push(char::from(ALPHABET[digit as usize]));
                } else {
                    text.push('=');
                }
            }
        }
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}
