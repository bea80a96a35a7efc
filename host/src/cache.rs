//! Content-addressed store for everything that is costly to make: the
//! toolchain, vendored packages, built guests, unpacked layers, machine code.
//!
//! ```text
//! <root>/                       WSGI_WASM_CACHE, or wsgi-wasm in the user's cache directory
//!   <bucket>-v<N>/              one per kind of entry; N is the format's version
//!     <key>                     a file or a directory, complete from the moment it has this name
//!     .seals/<key>              digests of its files
//!     .locks/<key>              held by the one process that makes the entry; its time tells
//!                               when the entry was last asked for
//!     .tmp-<key>-<random>       an entry being made, with all that its making needs
//! ```
//!
//! A key is a digest of all that goes into the entry, so an entry never
//! changes. It appears by a rename within its bucket: a crash or a second
//! process can not leave or see half of one. A format change raises the
//! bucket's version; entries of another version are not read.
//!
//! Machine code from here is mapped and run. So nobody else may write here,
//! and machine code is used only if it still is what was sealed.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, TryLockError};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
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
    /// All of them.
    pub const ALL: [Bucket; 8] = [
        Bucket::Toolchains,
        Bucket::StandardLibraries,
        Bucket::Sites,
        Bucket::Apps,
        Bucket::Layers,
        Bucket::Digests,
        Bucket::Compiled,
        Bucket::Skeletons,
    ];

    /// Whether what is in it is run outside of any sandbox.
    fn is_code(self) -> bool {
        matches!(self, Bucket::Compiled | Bucket::Skeletons)
    }

    /// The bucket's directory. The number rises when the format changes.
    pub fn directory(self) -> &'static str {
        match self {
            Bucket::Toolchains => "toolchains-v1",
            Bucket::StandardLibraries => "standard-libraries-v1",
            Bucket::Sites => "sites-v1",
            Bucket::Apps => "apps-v2",
            Bucket::Layers => "layers-v2",
            Bucket::Digests => "digests-v1",
            Bucket::Compiled => "compiled-v3",
            Bucket::Skeletons => "skeletons-v2",
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
    /// If `root` can not be made, or others than this user can write there.
    pub fn at(root: &Path) -> Result<Cache> {
        let make = || -> std::io::Result<(PathBuf, Metadata, u32)> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(root)?;
            let ours = tempfile::tempfile_in(root)?.metadata()?.uid();
            Ok((root.canonicalize()?, fs::metadata(root)?, ours))
        };
        let refuse = |reason: &str| {
            UserError::new(format!("can not use the cache directory `{}`: {reason}", root.display()))
        };
        let (root, metadata, ours) = make().map_err(|error| {
            refuse(&error.to_string())
                .remedy(format!("set {CACHE_VARIABLE} to a directory that can be written"))
        })?;
        if metadata.uid() != ours || metadata.mode() & 0o022 != 0 {
            return Err(refuse("other users can put machine code there")
                .remedy(format!(
                    "make it yours alone with `chown` and `chmod go-w`, or set {CACHE_VARIABLE} to another one"
                ))
                .into());
        }
        Ok(Cache { root })
    }

    /// The directory that holds the cache.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry `key`, if it is there. Machine code is there only if nobody
    /// has changed it.
    pub fn get(&self, bucket: Bucket, key: &str) -> Option<PathBuf> {
        let path = self.path(bucket, key);
        let is_there = if bucket.is_code() { self.is_intact(bucket, key) } else { path.exists() };
        if is_there {
            self.note_use(bucket, key);
        }
        is_there.then_some(path)
    }

    /// The entry `key`; if it is not there, `make` fills the path that it
    /// gets (which does not exist yet) with a file or a directory. What else it
    /// puts beside that path is removed afterwards.
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
        if let Some(path) = self.get(bucket, key) {
            return Ok(path);
        }
        let directory = self.root.join(bucket.directory());
        // Released when the file is closed, also by the death of the process.
        let _lock = self.lock(bucket, key)?;
        if let Some(path) = self.get(bucket, key) {
            return Ok(path);
        }
        let path = self.path(bucket, key);
        self.sweep(bucket);
        let scratch = tempfile::Builder::new()
            .prefix(&format!("{SCRATCH}{key}-"))
            .tempdir_in(&directory)
            .with_context(|| format!("failed to create a directory in `{}`", directory.display()))?;
        let _unfinished = Unfinished::new(scratch.path());
        let entry = scratch.path().join("entry");
        make(&entry)?;
        let digests = Seal::digests(&entry)?;
        if bucket.is_code() && path.exists() {
            // Without a seal, or with a broken one.
            fs::rename(&path, scratch.path().join("replaced"))
                .with_context(|| format!("failed to remove `{}`", path.display()))?;
        }
        match fs::rename(&entry, &path) {
            Ok(()) => {}
            // A process on another machine that shares the directory but not
            // the lock was faster. Its entry has the same content.
            Err(error)
                if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty)
                    && path.exists() =>
            {
                return Ok(path);
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("failed to move the new entry to `{}`", path.display()));
            }
        }
        // A rename changes a file's identity: only now it is what it will be.
        let seal = serde_json::to_vec(&Seal::new(&path, digests)?)?;
        let seals = directory.join(SEALS);
        fs::create_dir_all(&seals).with_context(|| format!("failed to create `{}`", seals.display()))?;
        let scratch = scratch.path().join("seal");
        let written = fs::write(&scratch, seal).and_then(|()| fs::rename(&scratch, seals.join(key)));
        written.with_context(|| format!("failed to write in `{}`", seals.display()))?;
        Ok(path)
    }

    fn lock(&self, bucket: Bucket, key: &str) -> Result<File> {
        let locks = self.root.join(bucket.directory()).join(LOCKS);
        fs::create_dir_all(&locks).with_context(|| format!("failed to create `{}`", locks.display()))?;
        let path = locks.join(key);
        let lock = File::create(&path).with_context(|| format!("failed to create `{}`", path.display()))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            tracing::info!(
                "waiting for another process, which is at work on the same ({})",
                bucket.directory()
            );
            lock.lock().with_context(|| format!("failed to lock `{}`", path.display()))?;
        }
        Ok(lock)
    }

    /// Whether this is left of a process that died while it made an entry:
    /// nobody holds the entry's lock.
    fn is_left_over(&self, bucket: Bucket, name: &str) -> bool {
        let Some((key, _)) = name.strip_prefix(SCRATCH).and_then(|name| name.rsplit_once('-')) else {
            return false;
        };
        let lock = File::open(self.root.join(bucket.directory()).join(LOCKS).join(key));
        lock.is_ok_and(|lock| lock.try_lock().is_ok())
    }

    /// Removes what processes that died have left in the bucket.
    fn sweep(&self, bucket: Bucket) {
        let Ok(list) = fs::read_dir(self.root.join(bucket.directory())) else { return };
        for entry in list.flatten() {
            let is_old = || {
                let made = entry.metadata().and_then(|metadata| metadata.modified());
                // On some network file systems locks hold on one machine only.
                made.is_ok_and(|made| made.elapsed().unwrap_or_default() > LONGEST_MAKING)
            };
            if self.is_left_over(bucket, &entry.file_name().to_string_lossy()) && is_old() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Remembers that the entry is in use, for `cache prune`.
    fn note_use(&self, bucket: Bucket, key: &str) {
        let path = self.root.join(bucket.directory()).join(LOCKS).join(key);
        let now = SystemTime::now();
        let is_recent = fs::metadata(&path)
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|used| now.duration_since(used).unwrap_or_default() < Duration::from_secs(600));
        if !is_recent {
            // At worst the entry is made again.
            let _ = File::create(&path).and_then(|file| file.set_modified(now));
        }
    }

    /// Whether the entry is what was sealed.
    fn is_intact(&self, bucket: Bucket, key: &str) -> bool {
        let seal = self.seal(bucket, key);
        seal.is_some_and(|seal| seal.holds(&self.path(bucket, key), Trust::Identity))
    }

    fn seal(&self, bucket: Bucket, key: &str) -> Option<Seal> {
        let seal = fs::read(self.root.join(bucket.directory()).join(SEALS).join(key)).ok()?;
        serde_json::from_slice(&seal).ok()
    }

    /// All entries, and what else lies in the buckets.
    ///
    /// # Errors
    ///
    /// If the directory can not be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let list = |path: &Path| -> Vec<fs::DirEntry> {
            fs::read_dir(path).map_or_else(|_| Vec::new(), |list| list.flatten().collect())
        };
        for directory in list(&self.root) {
            let name = directory.file_name().to_string_lossy().into_owned();
            let Some(bucket) = Bucket::ALL.into_iter().find(|bucket| bucket.directory() == name) else {
                // Of another version of this program, or left of a removal.
                let of_another =
                    name.rsplit_once("-v").is_some_and(|(_, version)| version.parse::<u32>().is_ok());
                if of_another || name.starts_with(SCRATCH) {
                    entries.push(Entry::new(directory.path(), name, None, None)?);
                }
                continue;
            };
            for entry in list(&directory.path()) {
                let key = entry.file_name().to_string_lossy().into_owned();
                if key == LOCKS || key == SEALS {
                    continue;
                }
                let lock = directory.path().join(LOCKS).join(&key);
                let used = fs::metadata(lock).and_then(|metadata| metadata.modified()).ok();
                entries.push(Entry::new(entry.path(), key, Some(bucket), used)?);
            }
        }
        entries.sort_by_key(|entry| entry.used);
        Ok(entries)
    }

    /// Removes the entry. Who uses it still has it, and who wants it next
    /// makes it again.
    ///
    /// # Errors
    ///
    /// If it can not be removed, other than because it is gone.
    pub fn remove(&self, entry: &Entry) -> Result<()> {
        // A lock is kept: a process may wait for it.
        let _lock = match entry.bucket {
            Some(bucket) if !entry.is_scratch() => {
                let lock = self.lock(bucket, &entry.key)?;
                let _ = fs::remove_file(self.root.join(bucket.directory()).join(SEALS).join(&entry.key));
                Some(lock)
            }
            _ => None,
        };
        let scratch = tempfile::Builder::new().prefix(SCRATCH).tempdir_in(&self.root)?;
        // Gone at once, for everyone who looks.
        match fs::rename(&entry.path, scratch.path().join("removed")) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("failed to remove `{}`", entry.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether the entry is what a process that died has left of one.
    pub fn is_abandoned(&self, entry: &Entry) -> bool {
        entry.bucket.is_some_and(|bucket| self.is_left_over(bucket, &entry.key))
    }

    /// Whether the entry's files are as they were made; none if that is not
    /// known. Reads all of them.
    pub fn verify(&self, entry: &Entry) -> Option<bool> {
        let bucket = entry.bucket.filter(|_| !entry.is_scratch())?;
        Some(self.seal(bucket, &entry.key)?.holds(&entry.path, Trust::Nothing))
    }

    /// Where the entry `key` is or would be.
    fn path(&self, bucket: Bucket, key: &str) -> PathBuf {
        debug_assert!(!key.is_empty() && !key.contains(['/', '\\']) && !key.starts_with('.'));
        self.root.join(bucket.directory()).join(key)
    }
}

const LOCKS: &str = ".locks";
const SEALS: &str = ".seals";
const SCRATCH: &str = ".tmp-";
/// No entry takes longer to make.
const LONGEST_MAKING: Duration = Duration::from_secs(3600);

/// The directories in which this process makes entries.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// One of them, as long as this lives.
struct Unfinished(PathBuf);

impl Unfinished {
    fn new(path: &Path) -> Unfinished {
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_path_buf());
        Unfinished(path.to_path_buf())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Listed until it is gone.
        let _ = fs::remove_dir_all(&self.0);
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.0);
    }
}

/// Removes what this process has made in part, because it ends now.
pub fn abandon() {
    for path in UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = fs::remove_dir_all(path);
    }
}

/// What lies in the cache under one name.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// Its name.
    pub key: String,
    /// Its kind; none if another version of this program made it.
    pub bucket: Option<Bucket>,
    /// Bytes on the disk.
    pub size: u64,
    /// When it was last asked for, give or take ten minutes.
    pub used: SystemTime,
}

impl Entry {
    fn new(path: PathBuf, key: String, bucket: Option<Bucket>, used: Option<SystemTime>) -> Result<Entry> {
        let mut size = 0;
        let metadata = fs::symlink_metadata(&path);
        if metadata.as_ref().is_ok_and(Metadata::is_dir) {
            let walked = walk(&path, Links::Skip, &mut |_, metadata| {
                size += metadata.blocks() * 512;
                true
            });
            // One being made may change meanwhile.
            if !key.starts_with(SCRATCH) {
                walked?;
            }
        }
        let made = metadata.as_ref().ok().and_then(|metadata| metadata.modified().ok());
        size += metadata.map_or(0, |metadata| metadata.blocks() * 512);
        Ok(Entry { path, key, bucket, size, used: used.or(made).unwrap_or(SystemTime::UNIX_EPOCH) })
    }

    /// Whether it is an entry being made, or what a process that died has left
    /// of one.
    pub fn is_scratch(&self) -> bool {
        self.key.starts_with(SCRATCH)
    }
}

/// What tells that a file is the same and was not written to: a change gives it
/// another `ctime`, which no program can set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity([u64; 3], [i64; 4]);

impl Identity {
    /// That of the file with this metadata.
    pub fn of(file: &Metadata) -> Identity {
        Identity(
            [file.dev(), file.ino(), file.size()],
            [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()],
        )
    }
}

/// What the files of an entry were when it was made, by their names.
#[derive(Serialize, Deserialize)]
struct Seal(BTreeMap<String, (String, Identity)>);

/// What is enough to believe that a file was not changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// Its identity, or else its digest: the cache may have been copied.
    Identity,
    /// Only its digest.
    Nothing,
}

impl Seal {
    /// Digests of the files of an entry: of one file, or of all in a directory.
    fn digests(entry: &Path) -> Result<BTreeMap<String, String>> {
        let names =
            if entry.is_dir() { walk(entry, Links::Skip, &mut |_, _| true)? } else { vec!["".into()] };
        let digest = |name: PathBuf| -> Result<(String, String)> {
            let path = file_in(entry, &name.to_string_lossy());
            let digest = digest_of(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
            Ok((name.to_string_lossy().into_owned(), digest))
        };
        names.into_iter().map(digest).collect()
    }

    fn new(entry: &Path, digests: BTreeMap<String, String>) -> Result<Seal> {
        let identified = digests.into_iter().map(|(name, digest)| {
            let path = file_in(entry, &name);
            let metadata =
                fs::metadata(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
            Ok((name, (digest, Identity::of(&metadata))))
        });
        Ok(Seal(identified.collect::<Result<_>>()?))
    }

    /// Whether all files are there as they were.
    fn holds(&self, entry: &Path, trust: Trust) -> bool {
        self.0.iter().all(|(name, (digest, identity))| {
            let path = file_in(entry, name);
            let same = || fs::symlink_metadata(&path).is_ok_and(|file| Identity::of(&file) == *identity);
            trust == Trust::Identity && same() || digest_of(&path).is_ok_and(|now| now == *digest)
        })
    }
}

/// The file `name` of an entry that may be a file itself.
fn file_in(entry: &Path, name: &str) -> PathBuf {
    if name.is_empty() { entry.to_path_buf() } else { entry.join(name) }
}

fn digest_of(path: &Path) -> std::io::Result<String> {
    let (mut file, mut digest, mut block) = (File::open(path)?, Sha256::new(), vec![0; 256 << 10]);
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hex(&digest.finalize())),
            read => digest.update(&block[..read]),
        }
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
    keep: &mut dyn FnMut(&Path, &Metadata) -> bool,
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
        assert_eq!(left.len(), 3, "only the entry, .locks and .seals: {left:?}");
    }

    #[test]
    fn what_a_dead_process_left_is_known_by_its_lock() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let directory = home.path().join(Bucket::Apps.directory());
        let unfinished = || {
            let entries = cache.entries().unwrap();
            entries
                .into_iter()
                .filter(Entry::is_scratch)
                .map(|entry| cache.is_abandoned(&entry))
                .collect::<Vec<_>>()
        };
        let made = cache.get_or_make(Bucket::Apps, "k", |path| {
            assert_eq!(unfinished(), [false]);
            Ok(fs::write(path, "")?)
        });
        let made = made.unwrap();
        assert!(unfinished().is_empty());
        fs::remove_file(made).unwrap();
        let left = directory.join(".tmp-k-abcdef");
        fs::create_dir(&left).unwrap();
        assert_eq!(unfinished(), [true]);
        let make = |path: &Path| Ok(fs::write(path, "")?);
        cache.get_or_make(Bucket::Apps, "l", make).unwrap();
        assert!(left.exists(), "it may be another machine's");
        File::open(&left).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        cache.get_or_make(Bucket::Apps, "m", make).unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn machine_code_that_was_changed_is_made_again() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path()).unwrap();
        let make = |path: &Path| {
            fs::create_dir(path)?;
            Ok(fs::write(path.join("code"), "right")?)
        };
        let path = cache.get_or_make(Bucket::Compiled, "k", make).unwrap();
        let file = path.join("code");
        assert_eq!(cache.get(Bucket::Compiled, "k"), Some(path.clone()));
        let entry = &cache.entries().unwrap()[0];
        assert_eq!(
            (&*entry.key, entry.bucket, cache.verify(entry)),
            ("k", Some(Bucket::Compiled), Some(true))
        );
        // A copy with the same content is as good.
        fs::copy(&file, home.path().join("copy")).unwrap();
        fs::rename(home.path().join("copy"), &file).unwrap();
        assert!(cache.get(Bucket::Compiled, "k").is_some());
        fs::write(&file, "wrong").unwrap();
        assert_eq!((cache.get(Bucket::Compiled, "k"), cache.verify(entry)), (None, Some(false)));
        assert_eq!(cache.get_or_make(Bucket::Compiled, "k", make).unwrap(), path);
        assert_eq!(fs::read_to_string(&file).unwrap(), "right");
        // Without a seal nothing vouches for it.
        fs::remove_file(home.path().join("compiled-v3/.seals/k")).unwrap();
        assert_eq!(cache.get(Bucket::Compiled, "k"), None);
        cache.remove(entry).unwrap();
        assert!(cache.entries().unwrap().is_empty() && !file.exists());
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("new/cache");
        Cache::at(&root).unwrap();
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
        let error = Cache::at(&root).unwrap_err();
        assert!(error.is::<UserError>() && error.to_string().contains("other users"), "{error}");
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
