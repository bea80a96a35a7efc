//! Content-addressed store for everything that is costly to make: the
//! toolchain, vendored packages, built guests, unpacked layers, machine code.
//!
//! ```text
//! <root>/                       WSGI_WASM_CACHE, or wsgi-wasm in the user's cache directory
//!   <bucket>-v<N>/              one per kind of entry; N is the format's version
//!     <key>                     a file or a directory, complete from the moment it has this name
//!     .locks/<key>              held by the one process that makes the entry
//!     .tmp-<random>             an entry being made
//! ```
//!
//! A key is a digest of all that goes into the entry, so an entry never
//! changes. It appears by a rename within its bucket: a crash or a second
//! process can not leave or see half of one. A format change raises the
//! bucket's version; entries of another version are not read.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::error::UserError;

/// Names the directory of the cache.
pub const CACHE_VARIABLE: &str = "WSGI_WASM_CACHE";

/// A kind of cache entry, with the version of its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bucket {
    /// Private virtual environments with the pinned build tools.
    Toolchains,
    /// The guest's standard library with its bytecode.
    StandardLibraries,
    /// Vendored requirements with the adapter and their bytecode.
    Sites,
    /// Built apps.
    Apps,
    /// File layers of apps, as plain tar archives.
    Layers,
    /// Digests of the parts of apps' files, by what tells that a file is the same.
    Digests,
    /// Machine code of apps, as far as they do not share it.
    Compiled,
    /// Machine code that apps share.
    Skeletons,
}

impl Bucket {
    /// The bucket's directory. The number rises when the format changes.
    pub fn directory(self) -> &'static str {
        match self {
            Bucket::Toolchains => "toolchains-v1",
            Bucket::StandardLibraries => "standard-libraries-v1",
            Bucket::Sites => "sites-v1",
            Bucket::Apps => "apps-v2",
            Bucket::Layers => "layers-v2",
            Bucket::Digests => "digests-v1",
            Bucket::Compiled => "compiled-v2",
            Bucket::Skeletons => "skeletons-v1",
        }
    }
}

/// Handle on the cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache at `WSGI_WASM_CACHE`, or in the user's cache directory
    /// by the rules of the XDG base directory specification.
    ///
    /// # Errors
    ///
    /// If there is no home directory to put it in or it can not be made.
    pub fn open() -> Result<Cache> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let root = if let Some(root) = set(CACHE_VARIABLE) {
            PathBuf::from(root)
        } else if let Some(caches) = set("XDG_CACHE_HOME") {
            Path::new(&caches).join("wsgi-wasm")
        } else if let Some(home) = set("HOME") {
            Path::new(&home).join(".cache/wsgi-wasm")
        } else {
            return Err(UserError::new("found no directory for the cache: HOME is not set")
                .remedy(format!("set {CACHE_VARIABLE} to a directory that can be written"))
                .into());
        };
        Cache::at(&root)
    }

    /// Opens the cache at `root`, which is made if it does not exist.
    ///
    /// # Errors
    ///
    /// If `root` can not be made or is not a directory.
    pub fn at(root: &Path) -> Result<Cache> {
        let make = || -> std::io::Result<PathBuf> {
            fs::create_dir_all(root)?;
            // Machine code from here is mapped and run: nobody else may write it.
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt as _;
                let mode = fs::metadata(root)?.permissions().mode();
                if mode & 0o022 != 0 {
                    fs::set_permissions(root, fs::Permissions::from_mode(mode & !0o022))?;
                }
            }
            root.canonicalize()
        };
        let root = make().map_err(|error| {
            UserError::new(format!("can not use the cache directory `{}`: {error}", root.display()))
                .remedy(format!("set {CACHE_VARIABLE} to a directory that can be written"))
        })?;
        Ok(Cache { root })
    }

    /// The directory that holds the cache.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry `key`, if it is there.
    pub fn get(&self, bucket: Bucket, key: &str) -> Option<PathBuf> {
        let path = self.path(bucket, key);
        path.exists().then_some(path)
    }

    /// The entry `key`; if it is not there, `make` fills the path that it
    /// gets (which does not exist yet) with a file or a directory.
    ///
    /// Of several processes that want the same entry one makes it and the
    /// others wait. `make` runs again if its process died.
    ///
    /// # Errors
    ///
    /// What `make` returns, and failures of the file system.
    pub fn get_or_make(
        &self,
        bucket: Bucket,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.path(bucket, key);
        if path.exists() {
            return Ok(path);
        }
        let directory = self.root.join(bucket.directory());
        let locks = directory.join(".locks");
        fs::create_dir_all(&locks).with_context(|| format!("failed to create `{}`", locks.display()))?;
        let lock_path = locks.join(key);
        let lock = File::create(&lock_path)
            .with_context(|| format!("failed to create `{}`", lock_path.display()))?;
        // Released when the file is closed, also by the death of the process.
        lock.lock().with_context(|| format!("failed to lock `{}`", lock_path.display()))?;
        if path.exists() {
            return Ok(path);
        }
        let scratch = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempdir_in(&directory)
            .with_context(|| format!("failed to create a directory in `{}`", directory.display()))?;
        let entry = scratch.path().join("entry");
        make(&entry)?;
        match fs::rename(&entry, &path) {
            Ok(()) => Ok(path),
            // A process on another machine that shares the directory but not
            // the lock was faster. Its entry has the same content.
            Err(error)
                if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty)
                    && path.exists() =>
            {
                Ok(path)
            }
            Err(error) => {
                Err(error).with_context(|| format!("failed to move the new entry to `{}`", path.display()))
            }
        }
    }

    /// Where the entry `key` is or would be.
    fn path(&self, bucket: Bucket, key: &str) -> PathBuf {
        debug_assert!(!key.is_empty() && !key.contains(['/', '\\']) && !key.starts_with('.'));
        self.root.join(bucket.directory()).join(key)
    }
}

/// A SHA-256 digest under construction, from parts that can not run together.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// Starts a key for entries of `bucket`.
    pub fn new(bucket: Bucket) -> Key {
        Key::default().with(bucket.directory())
    }

    /// Adds one part. Its length goes in first: `ab`, `c` is not `a`, `bc`.
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Key {
        self.add(part);
        self
    }

    /// Adds one part in place.
    pub fn add(&mut self, part: impl AsRef<[u8]>) {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// The key in hexadecimal.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// The SHA-256 digest of `bytes` in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Digits of a digest.
pub fn hex(digest: &[u8]) -> String {
    use std::fmt::Write as _;
    digest.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What [`walk`] does with symbolic links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// Takes what they point to. For directories of the user's own.
    Follow,
    /// Leaves them out. For directories that a guest wrote to, who could make
    /// one that points to a file of the host.
    Skip,
}

/// Every file below `root` that `keep` accepts, sorted by path, as paths
/// relative to `root`. A directory that `keep` refuses is not entered.
///
/// # Errors
///
/// If a directory can not be read, or a link makes a circle.
pub fn walk(
    root: &Path,
    links: Links,
    keep: &mut dyn FnMut(&Path, &fs::Metadata) -> bool,
) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![(PathBuf::new(), 0u32)];
    while let Some((relative, depth)) = directories.pop() {
        let directory = root.join(&relative);
        // A link to a directory above itself would never end.
        if depth > 64 {
            return Err(UserError::new(format!(
                "`{}` is nested more than 64 directories deep",
                directory.display()
            ))
            .remedy("look for a symbolic link that points to a directory above itself")
            .into());
        }
        let list = || -> std::io::Result<Vec<_>> {
            fs::read_dir(&directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
        };
        let names = list().with_context(|| format!("failed to list `{}`", directory.display()))?;
        for name in names {
            let relative = relative.join(name);
            let path = root.join(&relative);
            let metadata = match links {
                Links::Follow => fs::metadata(&path),
                Links::Skip => fs::symlink_metadata(&path),
            };
            // A dangling link is no file of anybody's.
            let Ok(metadata) = metadata else { continue };
            if !keep(&relative, &metadata) {
                continue;
            }
            if metadata.is_dir() {
                directories.push((relative, depth + 1));
            } else if metadata.is_file() {
                found.push(relative);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once_and_a_failed_one_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let failed = cache.get_or_make(Bucket::Apps, "k", |_| anyhow::bail!("no"));
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert!(cache.get(Bucket::Apps, "k").is_none());
        let path = cache.get_or_make(Bucket::Apps, "k", |path| Ok(fs::write(path, "one")?)).unwrap();
        let again = cache.get_or_make(Bucket::Apps, "k", |_| panic!("made twice")).unwrap();
        assert_eq!(path, again);
        assert_eq!(fs::read_to_string(again).unwrap(), "one");
        let left: Vec<_> =
            fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "only the entry and .locks: {left:?}");
    }

    #[test]
    fn of_many_makers_one_works() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    cache
                        .get_or_make(Bucket::Apps, "k", |path| {
                            made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            Ok(fs::create_dir(path)?)
                        })
                        .unwrap()
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        let key = |parts: &[&str]| parts.iter().fold(Key::default(), |key, part| key.with(part)).finish();
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["ab"]), key(&["ab", ""]));
    }
}
