//! The Python side of the contract, carried in this binary.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context as _, Result};

use crate::cache::{Bucket, Key};

/// The contract between host and guest.
pub const WIT: &str = include_str!("../../../wit/gateway.wit");

/// The module that componentize-py exports.
pub const ENTRY: &str = "wsgi_wasm.entry";

/// The adapter's modules.
macro_rules! modules {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../guest-python/src/wsgi_wasm/", $name)))),*]
    };
}
const MODULES: &[(&str, &str)] = modules![
    "__init__.py",
    "build.py",
    "command.py",
    "entry.py",
    "exports.py",
    "image.py",
    "interrupt.py",
    "kdf.py",
    "library.py",
    "loading.py",
    "snapshot.py",
    "sqlite.py",
    "streams.py",
    "wsgi.py",
];

/// Digest of the adapter and the contract, for cache keys.
pub fn digest() -> &'static str {
    static DIGEST: LazyLock<String> = LazyLock::new(|| {
        let key = Key::new(Bucket::Sites).with(WIT);
        MODULES.iter().fold(key, |key, (name, text)| key.with(name).with(text)).finish()
    });
    &DIGEST
}

/// Writes the adapter's package into the directory `site`.
///
/// # Errors
///
/// If a file can not be written.
pub fn write(site: &Path) -> Result<()> {
    let package = site.join("wsgi_wasm");
    fs::create_dir_all(&package).with_context(|| format!("failed to create `{}`", package.display()))?;
    for (name, text) in MODULES {
        fs::write(package.join(name), text)
            .with_context(|| format!("failed to write the adapter's `{name}`"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_module_of_the_adapter_is_forgotten() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-python/src/wsgi_wasm");
        let mut found: Vec<_> = fs::read_dir(sources)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".py"))
            .collect();
        found.sort();
        let embedded: Vec<_> = MODULES.iter().map(|(name, _)| *name).collect();
        assert_eq!(found, embedded);
    }
}
