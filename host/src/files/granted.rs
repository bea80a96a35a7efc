//! `/data`: a directory of the host that apps may write to, within a quota.
//!
//! Paths are resolved by cap-std, which asks the kernel (`openat2`) to stay
//! below the directory whatever links and `..` say, also while others rename.
//! Guests can not make links at all.
//!
//! All functions here block and are called off the runtime's threads.
//!
//! # The quota
//!
//! One [`Grant`] per directory and process counts for all instances of all
//! apps that have it. Bytes are lengths of files, so a hole counts too: the
//! directory never takes more of the disk than the quota. Two locks keep the
//! count right between concurrent writers: `names` of the grant, held for
//! writing by what adds or removes a name, and `counted` of a file, held by
//! what changes its length. A file without a name counts until it is closed.
//!
//! # SQLite's locks
//!
//! SQLite for WASI locks `x.db` by making the directory `x.db.lock`. An
//! instance that is stopped in a transaction leaves it, and nobody could open
//! the database again. So the grant remembers which instance made which lock
//! and removes it when the instance is gone, after its last write: then SQLite
//! itself rolls the transaction back, by its journal. Locks that a crash of the
//! host left go at start-up, if no other process uses the directory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use cap_std::fs::{Dir, MetadataExt as _, OpenOptions, OpenOptionsExt as _, ReadDir};
use rustix::fs::{FlockOperation, OFlags};
use wasmtime_wasi::p2::bindings::filesystem::types::{DescriptorType, ErrorCode};

use super::host::{Identity, Stat, WriteAt, kind};
use super::memory::Options;
use super::path;
use crate::error::UserError;
use crate::units::Size;

/// Directories within one another.
const MAX_DEPTH: usize = 64;
/// Files, directories and listings that one instance may have open.
const MAX_OPEN: usize = 64;
/// Files on their way to clients that one tenant may have open.
const MAX_SENT: usize = 256;
/// The same for all together: each is a descriptor of the host.
const MAX_OPEN_TOGETHER: usize = 512;
/// Locks of instances that are remembered.
const MAX_LOCKS: usize = 1024;
/// Time after which the log says again that a quota is used up.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// Ends the name of a lock of SQLite.
const LOCK: &str = ".lock";

/// What a directory may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of all files.
    pub bytes: u64,
    /// Files and directories.
    pub files: u64,
}

/// A directory that is granted to one or more apps.
#[derive(Debug)]
pub struct Grant {
    path: PathBuf,
    root: Arc<Dir>,
    max_bytes: AtomicU64,
    max_files: AtomicU64,
    bytes: AtomicU64,
    files: AtomicU64,
    open: AtomicUsize,
    /// Held for writing by what adds, removes or moves a name.
    names: RwLock<()>,
    /// The files that are open, by device and inode.
    nodes: Mutex<HashMap<Key, Weak<Node>>>,
    /// The locks of SQLite that instances hold.
    locks: Mutex<HashMap<Key, Lock>>,
    holders: AtomicU64,
    /// When the log said last that the quota is used up.
    told: Mutex<Option<Instant>>,
    /// Holds a shared `flock` on the directory: another process sees that it
    /// is in use.
    _presence: std::fs::File,
}

/// Device and inode.
type Key = (u64, u64);

#[derive(Debug)]
struct Lock {
    holder: u64,
    /// From the granted directory on: a descriptor would be one that no bound
    /// counts.
    path: String,
}

/// A file that is open.
#[derive(Debug)]
struct Node {
    grant: Arc<Grant>,
    key: Key,
    /// Its length as the quota has it.
    counted: Mutex<u64>,
    /// Its last name was removed.
    nameless: AtomicBool,
}

/// One instance's share of a grant, or that of the files which a tenant sends.
/// When it is dropped, with the last operation of the instance, its locks go.
#[derive(Debug)]
pub struct Holder {
    grant: Arc<Grant>,
    number: u64,
    open: AtomicUsize,
    max_open: usize,
}

/// The right to one descriptor.
#[derive(Debug)]
struct Slot(Arc<Holder>);

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    directory: Arc<Dir>,
    /// Where it was when it was opened, from the granted directory on. None if
    /// that is too long a path.
    path: Option<String>,
    /// Directories above it in the grant.
    depth: usize,
    holder: Arc<Holder>,
    /// None for the granted directory itself, which all share.
    _slot: Option<Slot>,
}

/// An open file.
#[derive(Debug)]
pub struct OpenFile {
    file: std::fs::File,
    node: Arc<Node>,
    /// Keeps the locks of the instance until its last write is done.
    _slot: Slot,
}

/// What was opened.
#[derive(Debug)]
pub enum Opened {
    /// A directory.
    Directory(Directory),
    /// A plain file.
    File(OpenFile),
}

/// The entries of a directory.
#[derive(Debug)]
pub struct Listing {
    entries: ReadDir,
    _slot: Slot,
}

/// What a tree holds.
#[derive(Debug, Default)]
struct Usage {
    bytes: u64,
    files: u64,
    height: usize,
}

// === Grant ===

impl Grant {
    /// Grants the directory at `path`. It is the same grant as long as any app
    /// has it; the last quota counts.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if there is no such directory.
    pub fn open(path: &Path, quota: Quota) -> Result<Arc<Grant>> {
        static OPEN: Mutex<BTreeMap<PathBuf, Weak<Grant>>> = Mutex::new(BTreeMap::new());
        if path.exists() && !path.is_dir() {
            return Err(UserError::new(format!(
                "the data directory `{}` is not a directory",
                path.display()
            ))
            .remedy("name a directory, which the app then sees as /data")
            .into());
        }
        if !path.is_dir() {
            return Err(UserError::new(format!("the data directory `{}` does not exist", path.display()))
                .remedy(format!("make it with `mkdir {}`", path.display()))
                .into());
        }
        let path = path.canonicalize().with_context(|| format!("failed to resolve `{}`", path.display()))?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let grant = match open.get(&path).and_then(Weak::upgrade) {
            Some(grant) => grant,
            None => {
                let grant = Grant::prepare(&path)
                    .with_context(|| format!("failed to use the data directory `{}`", path.display()))?;
                open.retain(|_, grant| grant.strong_count() > 0);
                open.insert(path.clone(), Arc::downgrade(&grant));
                grant
            }
        };
        grant.max_bytes.store(quota.bytes, Ordering::Relaxed);
        grant.max_files.store(quota.files, Ordering::Relaxed);
        let (bytes, files) = grant.used();
        if bytes > quota.bytes || files > quota.files {
            tracing::warn!(
                "`{}` holds {} in {files} files, more than its quota of {} in {} files",
                path.display(),
                Size(bytes),
                Size(quota.bytes),
                quota.files
            );
        }
        Ok(grant)
    }

    fn prepare(path: &Path) -> Result<Arc<Grant>> {
        let presence = std::fs::File::open(path)?;
        // Not on every file system. Then stale locks stay, which is safe.
        let alone = rustix::fs::flock(&presence, FlockOperation::NonBlockingLockExclusive).is_ok();
        let root = Dir::from_std_file(std::fs::File::open(path)?);
        let mut usage = Usage::default();
        scan(&root, 0, alone, &mut HashSet::new(), &mut usage)?;
        let _ = rustix::fs::flock(&presence, FlockOperation::NonBlockingLockShared);
        Ok(Arc::new(Grant {
            path: path.to_path_buf(),
            root: Arc::new(root),
            max_bytes: AtomicU64::new(u64::MAX),
            max_files: AtomicU64::new(u64::MAX),
            bytes: AtomicU64::new(usage.bytes),
            files: AtomicU64::new(usage.files),
            open: AtomicUsize::new(0),
            names: RwLock::new(()),
            nodes: Mutex::default(),
            locks: Mutex::default(),
            holders: AtomicU64::new(0),
            told: Mutex::default(),
            _presence: presence,
        }))
    }

    /// Bytes and files in use.
    pub fn used(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.files.load(Ordering::Relaxed))
    }

    /// The share of a new instance.
    pub fn holder(self: &Arc<Self>) -> Arc<Holder> {
        self.share(MAX_OPEN)
    }

    /// The share of the files that a tenant sends. Not their instances' own: a
    /// slow client must not keep locks of an instance that is gone.
    pub fn sender(self: &Arc<Self>) -> Arc<Holder> {
        self.share(MAX_SENT)
    }

    fn share(self: &Arc<Self>, max_open: usize) -> Arc<Holder> {
        let number = self.holders.fetch_add(1, Ordering::Relaxed);
        Arc::new(Holder { grant: Arc::clone(self), number, open: AtomicUsize::new(0), max_open })
    }

    fn take_bytes(&self, more: u64) -> Result<(), ErrorCode> {
        // Beyond a quota that became smaller, what takes nothing is still fine.
        if more == 0 { Ok(()) } else { self.take(&self.bytes, &self.max_bytes, more) }
    }

    fn give_bytes(&self, less: u64) {
        give(&self.bytes, less);
    }

    fn take_file(&self) -> Result<(), ErrorCode> {
        self.take(&self.files, &self.max_files, 1)
    }

    fn give_file(&self) {
        give(&self.files, 1);
    }

    fn take(&self, used: &AtomicU64, max: &AtomicU64, more: u64) -> Result<(), ErrorCode> {
        let max = max.load(Ordering::Relaxed);
        let within = |used: u64| used.checked_add(more).filter(|used| *used <= max);
        if used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok() {
            return Ok(());
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() > TELL_AGAIN) {
            *told = Some(Instant::now());
            let (bytes, files) = self.used();
            tracing::warn!(
                "the quota of `{}` is used up: {} in {files} files; raise it with `--data-quota` or `--data-files`",
                self.path.display(),
                Size(bytes)
            );
        }
        Err(ErrorCode::InsufficientSpace)
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<Key, Weak<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locks(&self) -> MutexGuard<'_, HashMap<Key, Lock>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name of a file or directory was removed. `names` is held.
    fn forget(&self, metadata: &cap_std::fs::Metadata) {
        self.give_file();
        if metadata.is_dir() || metadata.nlink() > 1 {
            return;
        }
        let node = self.nodes().get(&key(metadata)).and_then(Weak::upgrade);
        match node {
            Some(node) => node.nameless.store(true, Ordering::Relaxed),
            None => self.give_bytes(metadata.len()),
        }
    }
}

fn give(used: &AtomicU64, less: u64) {
    // Saturating: others may have changed the directory behind our back.
    let _ = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| Some(used.saturating_sub(less)));
}

fn key(metadata: &cap_std::fs::Metadata) -> Key {
    (metadata.dev(), metadata.ino())
}

/// Adds up what is below `directory`, and with `clean` removes SQLite's locks.
fn scan(
    directory: &Dir,
    depth: usize,
    clean: bool,
    linked: &mut HashSet<Key>,
    usage: &mut Usage,
) -> Result<()> {
    if depth > MAX_DEPTH {
        bail!("it is nested more than {MAX_DEPTH} directories deep");
    }
    usage.height = usage.height.max(depth);
    for entry in directory.entries()? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let name = entry.file_name();
        if metadata.is_dir() {
            if clean && name.to_str().is_some_and(|name| remove_lock(directory, name)) {
                tracing::info!("removed the stale lock {name:?}");
                continue;
            }
            usage.files += 1;
            let inner = directory.open_with(&name, &directory_only())?;
            scan(&Dir::from_std_file(inner.into_std()), depth + 1, clean, linked, usage)?;
        } else {
            usage.files += 1;
            if metadata.nlink() == 1 || linked.insert(key(&metadata)) {
                usage.bytes = usage.bytes.saturating_add(metadata.len());
            }
        }
    }
    Ok(())
}

/// Options to open a directory that is no link.
fn directory_only() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(raw(OFlags::DIRECTORY | OFlags::NOFOLLOW));
    options
}

fn raw(flags: OFlags) -> i32 {
    // The kernel's flags have 32 bits; the sign does not matter.
    flags.bits() as i32
}

/// Removes `path` if it is a lock of SQLite: an empty directory that is named
/// after the file beside it.
fn remove_lock(directory: &Dir, path: &str) -> bool {
    path.strip_suffix(LOCK)
        .is_some_and(|database| directory.symlink_metadata(database).is_ok_and(|metadata| metadata.is_file()))
        && directory.remove_dir(path).is_ok()
}

// === Holder, Slot and Node ===

impl Holder {
    /// The granted directory itself.
    pub fn root(self: &Arc<Self>) -> Directory {
        let directory = Arc::clone(&self.grant.root);
        Directory { directory, path: Some(".".into()), depth: 0, holder: Arc::clone(self), _slot: None }
    }

    fn slot(self: &Arc<Self>) -> Result<Slot, ErrorCode> {
        // Counted first, so that the slot's drop is right on the way out.
        let mine = self.open.fetch_add(1, Ordering::Relaxed);
        let all = self.grant.open.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(Arc::clone(self));
        // WASI has no code for too many open files.
        let is_free = mine < self.max_open && all < MAX_OPEN_TOGETHER;
        if is_free { Ok(slot) } else { Err(ErrorCode::InsufficientMemory) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut locks = self.grant.locks();
        if locks.is_empty() {
            return;
        }
        let held: Vec<_> = locks.extract_if(|_, lock| lock.holder == self.number).collect();
        drop(locks);
        if held.is_empty() {
            return;
        }
        let grant = Arc::clone(&self.grant);
        let release = move || {
            let _names = grant.names.write().unwrap_or_else(PoisonError::into_inner);
            let mut released = Vec::new();
            for (key, Lock { path, .. }) in held {
                let metadata = grant.root.symlink_metadata(&path);
                if let Ok(metadata) = metadata
                    && self::key(&metadata) == key
                    && remove_lock(&grant.root, &path)
                {
                    grant.forget(&metadata);
                    released.push(path);
                }
            }
            // The names are the guest's own words.
            if let Some(first) = released.first() {
                tracing::info!(
                    "released {} of an instance that is gone, such as {first:?}, in `{}`",
                    if released.len() == 1 { "the lock".into() } else { format!("{} locks", released.len()) },
                    grant.path.display()
                );
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(release)),
            Err(_) => release(),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.grant.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let mut nodes = self.grant.nodes();
        // Another one may have taken the place since.
        if nodes.get(&self.key).is_some_and(|node| node.strong_count() == 0) {
            nodes.remove(&self.key);
        }
        drop(nodes);
        if self.nameless.load(Ordering::Relaxed) {
            let counted = *self.counted.get_mut().unwrap_or_else(PoisonError::into_inner);
            self.grant.give_bytes(counted);
        }
    }
}

impl Node {
    /// The file's length, as the quota has it, locked against all who would
    /// change it.
    fn counted(&self, file: &std::fs::File) -> io::Result<MutexGuard<'_, u64>> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let length = file.metadata()?.len();
        self.settle(&mut counted, length);
        Ok(counted)
    }

    /// Makes the quota agree with what the file system says.
    fn settle(&self, counted: &mut u64, length: u64) {
        if length > *counted {
            self.grant.bytes.fetch_add(length - *counted, Ordering::Relaxed);
        } else if length < *counted {
            self.grant.give_bytes(*counted - length);
        }
        *counted = length;
    }
}

// === Directory ===

impl Directory {
    fn grant(&self) -> &Arc<Grant> {
        &self.holder.grant
    }

    /// Directories above what `path` names, at most.
    fn depth_of(&self, path: &str) -> Result<usize, ErrorCode> {
        path::check(path)?;
        let depth = self.depth + path.split('/').filter(|part| !matches!(*part, "" | "." | "..")).count();
        if depth > MAX_DEPTH { Err(ErrorCode::NameTooLong) } else { Ok(depth) }
    }

    /// What `path` is from the granted directory on.
    fn path_from_root(&self, path: &str) -> Option<String> {
        let path = format!("{}/{path}", self.path.as_ref()?);
        path::check(&path).ok().map(|()| path)
    }

    /// Opens what is at `path`.
    pub fn open(&self, path: &str, follow: bool, options: Options) -> Result<Opened, ErrorCode> {
        let depth = self.depth_of(path)?;
        let slot = self.holder.slot()?;
        let Options { create, exclusive, truncate, directory, write } = options;
        let grant = self.grant();
        let (_reading, _writing);
        if create {
            _writing = grant.names.write().unwrap_or_else(PoisonError::into_inner);
        } else {
            _reading = grant.names.read().unwrap_or_else(PoisonError::into_inner);
        }
        let write = write || truncate || create;
        // Not to wait for the other end of a pipe that the operator put there.
        let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        flags.set(OFlags::NOFOLLOW, !follow);
        flags.set(OFlags::DIRECTORY, directory);
        let mut how = OpenOptions::new();
        how.read(true).write(write).custom_flags(raw(flags));
        let opened = match self.directory.open_with(path, &how) {
            Ok(_) if create && exclusive => return Err(ErrorCode::Exist),
            Err(error) if create && error.kind() == io::ErrorKind::NotFound => {
                grant.take_file()?;
                self.directory.open_with(path, how.create_new(exclusive).create(true)).inspect_err(|_| {
                    grant.give_file();
                })
            }
            // For what may be written and not read.
            Err(error) if write && error.kind() == io::ErrorKind::PermissionDenied => {
                self.directory.open_with(path, how.read(false))
            }
            other => other,
        };
        let file = opened?.into_std();
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            let directory = Arc::new(Dir::from_std_file(file));
            let (path, holder) = (self.path_from_root(path), Arc::clone(&self.holder));
            return Ok(Opened::Directory(Directory { directory, path, depth, holder, _slot: Some(slot) }));
        }
        if !metadata.is_file() {
            return Err(ErrorCode::NotPermitted);
        }
        let key = (metadata.dev(), metadata.ino());
        let mut nodes = grant.nodes();
        let node = match nodes.get(&key).and_then(Weak::upgrade) {
            Some(node) => node,
            None => {
                let node = Arc::new(Node {
                    grant: Arc::clone(grant),
                    key,
                    counted: Mutex::new(metadata.len()),
                    nameless: AtomicBool::new(false),
                });
                nodes.insert(key, Arc::downgrade(&node));
                node
            }
        };
        drop(nodes);
        let file = OpenFile { file, node, _slot: slot };
        if truncate {
            file.set_size(0)?;
        }
        Ok(Opened::File(file))
    }

    /// What `stat` says of this directory, and its identity.
    pub fn stat(&self) -> Result<(Stat, Identity), ErrorCode> {
        Ok(described(&self.directory.dir_metadata()?))
    }

    /// The same for what is at `path`.
    pub fn stat_at(&self, path: &str, follow: bool) -> Result<(Stat, Identity), ErrorCode> {
        path::check(path)?;
        let metadata =
            if follow { self.directory.metadata(path)? } else { self.directory.symlink_metadata(path)? };
        Ok(described(&metadata))
    }

    /// What a symbolic link says.
    pub fn read_link(&self, path: &str) -> Result<String, ErrorCode> {
        path::check(path)?;
        let target = self.directory.read_link(path)?;
        target.into_os_string().into_string().map_err(|_| ErrorCode::IllegalByteSequence)
    }

    /// Makes a directory.
    pub fn create_directory(&self, path: &str) -> Result<(), ErrorCode> {
        self.depth_of(path)?;
        let grant = self.grant();
        let _names = grant.names.write().unwrap_or_else(PoisonError::into_inner);
        grant.take_file()?;
        self.directory.create_dir(path).inspect_err(|_| grant.give_file())?;
        if path.ends_with(LOCK)
            && let Ok(metadata) = self.directory.symlink_metadata(path)
            && let Some(path) = self.path_from_root(path)
        {
            let mut locks = grant.locks();
            if locks.len() < MAX_LOCKS {
                locks.insert(key(&metadata), Lock { holder: self.holder.number, path });
            }
        }
        Ok(())
    }

    /// Removes an empty directory.
    pub fn remove_directory(&self, path: &str) -> Result<(), ErrorCode> {
        path::check(path)?;
        let grant = self.grant();
        let _names = grant.names.write().unwrap_or_else(PoisonError::into_inner);
        let metadata = self.directory.symlink_metadata(path)?;
        self.directory.remove_dir(path)?;
        grant.locks().remove(&key(&metadata));
        grant.forget(&metadata);
        Ok(())
    }

    /// Removes the name of a file.
    pub fn remove_file(&self, path: &str) -> Result<(), ErrorCode> {
        path::check(path)?;
        let grant = self.grant();
        let _names = grant.names.write().unwrap_or_else(PoisonError::into_inner);
        let metadata = self.directory.symlink_metadata(path)?;
        self.directory.remove_file(path)?;
        grant.forget(&metadata);
        Ok(())
    }

    /// Moves what is at `old` to `new` below `target`.
    pub fn rename(&self, old: &str, target: &Directory, new: &str) -> Result<(), ErrorCode> {
        let grant = self.grant();
        if !Arc::ptr_eq(grant, target.grant()) {
            return Err(ErrorCode::CrossDevice);
        }
        let (old_depth, new_depth) = (self.depth_of(old)?, target.depth_of(new)?);
        let _names = grant.names.write().unwrap_or_else(PoisonError::into_inner);
        let metadata = self.directory.symlink_metadata(old)?;
        if metadata.is_dir() && new_depth > old_depth {
            let inner = self.directory.open_with(old, &directory_only())?;
            let mut usage = Usage::default();
            let inner = Dir::from_std_file(inner.into_std());
            scan(&inner, new_depth, false, &mut HashSet::new(), &mut usage)
                .map_err(|_| ErrorCode::NameTooLong)?;
        }
        let replaced = target.directory.symlink_metadata(new).ok();
        self.directory.rename(old, &target.directory, new)?;
        if let Some(replaced) = replaced
            && key(&replaced) != key(&metadata)
        {
            grant.forget(&replaced);
        }
        Ok(())
    }

    /// Sets when this directory was read and changed last.
    pub fn set_times(
        &self,
        accessed: Option<SystemTime>,
        modified: Option<SystemTime>,
    ) -> Result<(), ErrorCode> {
        set_times(&self.directory.open_with(".", &directory_only())?.into_std(), accessed, modified)
    }

    /// The same for what is at `path`.
    pub fn set_times_at(
        &self,
        path: &str,
        follow: bool,
        accessed: Option<SystemTime>,
        modified: Option<SystemTime>,
    ) -> Result<(), ErrorCode> {
        match self.open(path, follow, Options::default())? {
            Opened::Directory(directory) => directory.set_times(accessed, modified),
            Opened::File(file) => file.set_times(accessed, modified),
        }
    }

    /// The entries of this directory.
    pub fn list(&self) -> Result<Listing, ErrorCode> {
        let slot = self.holder.slot()?;
        Ok(Listing { entries: self.directory.entries()?, _slot: slot })
    }

    /// Waits until all that was done to its names is on the disk.
    pub fn sync(&self) -> Result<(), ErrorCode> {
        Ok(self.directory.open_with(".", &directory_only())?.sync_all()?)
    }
}

impl Listing {
    /// The next entries, some at a time; none at the end.
    pub fn next_entries(&mut self) -> Result<Vec<(String, DescriptorType)>, ErrorCode> {
        const BATCH: usize = 64;
        let mut batch = Vec::new();
        for entry in self.entries.by_ref() {
            let entry = entry?;
            // A guest has no way to name a file that is not UTF-8.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let kind = entry.file_type().map_or(DescriptorType::Unknown, kind_of);
            batch.push((name, kind));
            if batch.len() == BATCH {
                break;
            }
        }
        Ok(batch)
    }
}

// === OpenFile ===

impl OpenFile {
    /// The file itself, to read from.
    pub fn file(&self) -> &std::fs::File {
        &self.file
    }

    /// What `stat` says, and the identity.
    pub fn stat(&self) -> Result<(Stat, Identity), ErrorCode> {
        Ok(described(&cap_std::fs::Metadata::from_file(&self.file)?))
    }

    /// Writes all of `bytes`, or nothing if the quota does not allow it.
    pub fn write(&self, at: WriteAt, bytes: &[u8]) -> Result<(), ErrorCode> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut counted = self.node.counted(&self.file)?;
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => *counted,
        };
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= i64::MAX as u64);
        let end = end.ok_or(ErrorCode::FileTooLarge)?;
        let more = end.saturating_sub(*counted);
        if more == 0 {
            return Ok(self.file.write_all_at(bytes, offset)?);
        }
        self.node.grant.take_bytes(more)?;
        *counted = end;
        let written = self.file.write_all_at(bytes, offset);
        if written.is_err() {
            // The disk itself is full, or worse. It may have taken a part.
            let length = self.file.metadata().map_or(end, |metadata| metadata.len());
            self.node.settle(&mut counted, length);
        }
        Ok(written?)
    }

    /// Sets the size.
    pub fn set_size(&self, size: u64) -> Result<(), ErrorCode> {
        if size > i64::MAX as u64 {
            return Err(ErrorCode::FileTooLarge);
        }
        let mut counted = self.node.counted(&self.file)?;
        let more = size.saturating_sub(*counted);
        self.node.grant.take_bytes(more)?;
        match self.file.set_len(size) {
            Ok(()) => {
                self.node.grant.give_bytes(counted.saturating_sub(size));
                *counted = size;
                Ok(())
            }
            Err(error) => {
                self.node.grant.give_bytes(more);
                Err(error.into())
            }
        }
    }

    /// Sets when it was read and changed last.
    pub fn set_times(
        &self,
        accessed: Option<SystemTime>,
        modified: Option<SystemTime>,
    ) -> Result<(), ErrorCode> {
        set_times(&self.file, accessed, modified)
    }

    /// Waits until all that was written is on the disk.
    pub fn sync(&self, data_only: bool) -> Result<(), ErrorCode> {
        let synced = if data_only { self.file.sync_data() } else { self.file.sync_all() };
        Ok(synced?)
    }
}

fn set_times(
    file: &std::fs::File,
    accessed: Option<SystemTime>,
    modified: Option<SystemTime>,
) -> Result<(), ErrorCode> {
    let mut times = std::fs::FileTimes::new();
    if let Some(accessed) = accessed {
        times = times.set_accessed(accessed);
    }
    if let Some(modified) = modified {
        times = times.set_modified(modified);
    }
    Ok(file.set_times(times)?)
}

fn kind_of(file_type: cap_std::fs::FileType) -> DescriptorType {
    if file_type.is_dir() || file_type.is_file() {
        kind(file_type.is_dir())
    } else if file_type.is_symlink() {
        DescriptorType::SymbolicLink
    } else {
        DescriptorType::Unknown
    }
}

fn described(metadata: &cap_std::fs::Metadata) -> (Stat, Identity) {
    let time = |seconds: i64, nanoseconds: i64| {
        let since =
            Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanoseconds).unwrap_or(0));
        SystemTime::UNIX_EPOCH + since
    };
    let stat = Stat {
        kind: kind_of(metadata.file_type()),
        links: metadata.nlink(),
        size: metadata.len(),
        accessed: time(metadata.atime(), metadata.atime_nsec()),
        modified: time(metadata.mtime(), metadata.mtime_nsec()),
        changed: time(metadata.ctime(), metadata.ctime_nsec()),
    };
    (stat, Identity::new(("granted", key(metadata))))
}
