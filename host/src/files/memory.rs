//! `/tmp`: files in memory, of one instance, gone with it.
//!
//! Bounded by bytes and by number. There are no links, symbolic or hard.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;

use super::host::{Identity, Stat, WriteAt, kind};
use super::path::{self, Step};
use crate::footprint::Held;

/// Files are kept, and counted, in pages of this size. One that is nothing but
/// a hole costs nothing.
const PAGE: usize = 16 << 10;

/// The directory at the top.
const ROOT: u64 = 1;

/// What `/tmp` may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bytes: u64,
    /// Files and directories.
    pub files: u64,
}

/// The `/tmp` of an instance. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Mutex<Tree>>);

#[derive(Debug)]
struct Tree {
    limits: Limits,
    nodes: HashMap<u64, Node>,
    next: u64,
    bytes: u64,
    /// The same, as a part of all that the tenant holds.
    held: Held,
}

#[derive(Debug)]
struct Node {
    content: Content,
    parent: u64,
    /// Whether a directory has it. Else it lives as long as it is open.
    linked: bool,
    handles: u32,
    accessed: SystemTime,
    modified: SystemTime,
    changed: SystemTime,
}

#[derive(Debug)]
enum Content {
    File { pages: BTreeMap<u64, Box<[u8; PAGE]>>, length: u64 },
    Directory(BTreeMap<Box<str>, u64>),
}

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    memory: Memory,
    inode: u64,
}

/// How to open a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Make it if it is not there.
    pub create: bool,
    /// Fail if it is there.
    pub exclusive: bool,
    /// Empty it.
    pub truncate: bool,
    /// Fail if it is no directory.
    pub directory: bool,
    /// It will be written to.
    pub write: bool,
}

impl Memory {
    /// An empty one, whose files count as `held`.
    pub fn new(limits: Limits, held: Held) -> Memory {
        let root = Node::new(Content::Directory(BTreeMap::new()), ROOT);
        let nodes = HashMap::from([(ROOT, root)]);
        Memory(Arc::new(Mutex::new(Tree { limits, nodes, next: ROOT + 1, bytes: 0, held })))
    }

    /// The directory at the top.
    pub fn root(&self) -> Handle {
        self.handle(&mut self.tree(), ROOT)
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        // Nothing in here panics half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, tree: &mut Tree, inode: u64) -> Handle {
        if let Some(node) = tree.nodes.get_mut(&inode) {
            node.handles += 1;
        }
        Handle { memory: self.clone(), inode }
    }
}

impl Clone for Handle {
    fn clone(&self) -> Handle {
        self.memory.handle(&mut self.memory.tree(), self.inode)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut tree = self.memory.tree();
        if let Some(node) = tree.nodes.get_mut(&self.inode) {
            node.handles -= 1;
        }
        tree.free_if_unused(self.inode);
    }
}

impl Handle {
    /// Opens what is at `path`.
    pub fn open(&self, path: &str, options: Options) -> Result<Handle, ErrorCode> {
        let mut tree = self.memory.tree();
        let found = match tree.look_up(self.inode, path) {
            Err(ErrorCode::NoEntry) if options.create => {
                let (parent, name, is_directory) = path::parent_and_name(path)?;
                if is_directory {
                    return Err(ErrorCode::IsDirectory);
                }
                let parent = tree.look_up(self.inode, parent)?;
                tree.add(parent, name, Content::File { pages: BTreeMap::new(), length: 0 })?
            }
            Ok(_) if options.create && options.exclusive => return Err(ErrorCode::Exist),
            other => other?,
        };
        match &tree.node(found)?.content {
            Content::File { .. } if options.directory => return Err(ErrorCode::NotDirectory),
            Content::Directory(_) if options.write || options.truncate || options.create => {
                return Err(ErrorCode::IsDirectory);
            }
            _ => {}
        }
        if options.truncate {
            tree.set_size(found, 0)?;
        }
        Ok(self.memory.handle(&mut tree, found))
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        let tree = self.memory.tree();
        matches!(tree.node(self.inode), Ok(Node { content: Content::Directory(_), .. }))
    }

    /// What `stat` says of this file.
    pub fn stat(&self) -> Result<Stat, ErrorCode> {
        self.memory.tree().stat(self.inode)
    }

    /// What `stat` says of the file at `path`.
    pub fn stat_at(&self, path: &str) -> Result<Stat, ErrorCode> {
        let tree = self.memory.tree();
        tree.stat(tree.look_up(self.inode, path)?)
    }

    /// The identity of this file.
    pub fn identity(&self) -> Identity {
        Identity::new(("memory", self.inode))
    }

    /// The identity of the file at `path`.
    pub fn identity_at(&self, path: &str) -> Result<Identity, ErrorCode> {
        let inode = self.memory.tree().look_up(self.inode, path)?;
        Ok(Identity::new(("memory", inode)))
    }

    /// Makes a directory.
    pub fn create_directory(&self, path: &str) -> Result<(), ErrorCode> {
        let mut tree = self.memory.tree();
        match tree.look_up(self.inode, path) {
            Ok(_) => Err(ErrorCode::Exist),
            Err(ErrorCode::NoEntry) => {
                let (parent, name, _) = path::parent_and_name(path)?;
                let parent = tree.look_up(self.inode, parent)?;
                tree.add(parent, name, Content::Directory(BTreeMap::new())).map(drop)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes the name of a file.
    pub fn remove_file(&self, path: &str) -> Result<(), ErrorCode> {
        let mut tree = self.memory.tree();
        let inode = tree.look_up(self.inode, path)?;
        match tree.node(inode)?.content {
            Content::Directory(_) => Err(ErrorCode::IsDirectory),
            Content::File { .. } => tree.remove(self.inode, path),
        }
    }

    /// Removes an empty directory.
    pub fn remove_directory(&self, path: &str) -> Result<(), ErrorCode> {
        let mut tree = self.memory.tree();
        let inode = tree.look_up(self.inode, path)?;
        match &tree.node(inode)?.content {
            Content::File { .. } => Err(ErrorCode::NotDirectory),
            Content::Directory(entries) if !entries.is_empty() => Err(ErrorCode::NotEmpty),
            Content::Directory(_) if inode == ROOT => Err(ErrorCode::Busy),
            Content::Directory(_) => tree.remove(self.inode, path),
        }
    }

    /// Moves what is at `old` to `new` below `target`.
    pub fn rename(&self, old: &str, target: &Handle, new: &str) -> Result<(), ErrorCode> {
        if !Arc::ptr_eq(&self.memory.0, &target.memory.0) {
            return Err(ErrorCode::CrossDevice);
        }
        self.memory.tree().rename((self.inode, old), (target.inode, new))
    }

    /// Sets a file's size.
    pub fn set_size(&self, size: u64) -> Result<(), ErrorCode> {
        self.memory.tree().set_size(self.inode, size)
    }

    /// Sets when this file was read and changed last; none leaves it.
    pub fn set_times(
        &self,
        accessed: Option<SystemTime>,
        modified: Option<SystemTime>,
    ) -> Result<(), ErrorCode> {
        self.memory.tree().set_times(self.inode, accessed, modified)
    }

    /// The same for the file at `path`.
    pub fn set_times_at(
        &self,
        path: &str,
        accessed: Option<SystemTime>,
        modified: Option<SystemTime>,
    ) -> Result<(), ErrorCode> {
        let mut tree = self.memory.tree();
        let inode = tree.look_up(self.inode, path)?;
        tree.set_times(inode, accessed, modified)
    }

    /// At most `length` bytes from `offset`; none at the end.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, ErrorCode> {
        let mut tree = self.memory.tree();
        let node = tree.node_mut(self.inode)?;
        let Content::File { pages, length: size } = &node.content else {
            return Err(ErrorCode::IsDirectory);
        };
        let length = usize::try_from(size.saturating_sub(offset)).unwrap_or(length).min(length);
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while filled < length {
            let (page, start) = place(offset + filled as u64);
            let part = (PAGE - start).min(length - filled);
            if let Some(page) = pages.get(&page) {
                bytes[filled..filled + part].copy_from_slice(&page[start..start + part]);
            }
            filled += part;
        }
        node.accessed = SystemTime::now();
        Ok(bytes)
    }

    /// Writes all of `bytes`, or nothing.
    pub fn write(&self, at: WriteAt, bytes: &[u8]) -> Result<(), ErrorCode> {
        self.memory.tree().write(self.inode, at, bytes)
    }

    /// The first entry of this directory behind the name `after`: its name and
    /// whether it is a directory.
    pub fn entry_after(&self, after: Option<&str>) -> Option<(Box<str>, bool)> {
        let tree = self.memory.tree();
        let Content::Directory(entries) = &tree.node(self.inode).ok()?.content else { return None };
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let (name, inode) = entries.range::<str, _>((start, Bound::Unbounded)).next()?;
        let is_directory = matches!(tree.node(*inode).ok()?.content, Content::Directory(_));
        Some((name.clone(), is_directory))
    }
}

impl Node {
    fn new(content: Content, parent: u64) -> Node {
        let now = SystemTime::now();
        Node { content, parent, linked: true, handles: 0, accessed: now, modified: now, changed: now }
    }

    fn touch(&mut self) {
        self.modified = SystemTime::now();
        self.changed = self.modified;
    }
}

/// The page of an offset, and where in it.
fn place(offset: u64) -> (u64, usize) {
    // The remainder is less than a page.
    (offset / PAGE as u64, (offset % PAGE as u64) as usize)
}

impl Tree {
    fn node(&self, inode: u64) -> Result<&Node, ErrorCode> {
        self.nodes.get(&inode).ok_or(ErrorCode::NoEntry)
    }

    fn node_mut(&mut self, inode: u64) -> Result<&mut Node, ErrorCode> {
        self.nodes.get_mut(&inode).ok_or(ErrorCode::NoEntry)
    }

    fn entries(&mut self, directory: u64) -> Result<&mut BTreeMap<Box<str>, u64>, ErrorCode> {
        let node = self.node_mut(directory)?;
        if !node.linked {
            return Err(ErrorCode::NoEntry);
        }
        node.touch();
        match &mut node.content {
            Content::Directory(entries) => Ok(entries),
            Content::File { .. } => Err(ErrorCode::NotDirectory),
        }
    }

    fn look_up(&self, from: u64, path: &str) -> Result<u64, ErrorCode> {
        let mut at = from;
        for step in path::steps(path)? {
            let node = self.node(at)?;
            let Content::Directory(entries) = &node.content else {
                return Err(ErrorCode::NotDirectory);
            };
            at = match step {
                Step::Here => at,
                Step::Up if at == from => return Err(ErrorCode::NotPermitted),
                Step::Up => node.parent,
                Step::Into(name) => *entries.get(name).ok_or(ErrorCode::NoEntry)?,
            };
        }
        Ok(at)
    }

    fn add(&mut self, parent: u64, name: &str, content: Content) -> Result<u64, ErrorCode> {
        // The root is none of the guest's.
        if self.nodes.len() as u64 > self.limits.files {
            return Err(ErrorCode::InsufficientSpace);
        }
        let inode = self.next;
        self.entries(parent)?.insert(name.into(), inode);
        self.next += 1;
        self.nodes.insert(inode, Node::new(content, parent));
        Ok(inode)
    }

    /// Takes the name at `path` away.
    fn remove(&mut self, from: u64, path: &str) -> Result<(), ErrorCode> {
        let (parent, name, _) = path::parent_and_name(path)?;
        let parent = self.look_up(from, parent)?;
        let inode = self.entries(parent)?.remove(name).ok_or(ErrorCode::NoEntry)?;
        self.unlink(inode);
        Ok(())
    }

    /// A directory does not have `inode` any more.
    fn unlink(&mut self, inode: u64) {
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.linked = false;
        }
        self.free_if_unused(inode);
    }

    fn free(&mut self, pages: usize) {
        let bytes = (pages * PAGE) as u64;
        self.bytes -= bytes;
        self.held.shrink(bytes);
    }

    fn free_if_unused(&mut self, inode: u64) {
        let unused = |node: &Node| !node.linked && node.handles == 0;
        if self.nodes.get(&inode).is_some_and(unused)
            && let Some(Node { content: Content::File { pages, .. }, .. }) = self.nodes.remove(&inode)
        {
            self.free(pages.len());
        }
    }

    fn rename(&mut self, old: (u64, &str), new: (u64, &str)) -> Result<(), ErrorCode> {
        let (old_parent, old_name, _) = path::parent_and_name(old.1)?;
        let (new_parent, new_name, new_is_directory) = path::parent_and_name(new.1)?;
        let moved = self.look_up(old.0, old.1)?;
        let old_parent = self.look_up(old.0, old_parent)?;
        let new_parent = self.look_up(new.0, new_parent)?;
        let is_directory = matches!(self.node(moved)?.content, Content::Directory(_));
        if new_is_directory && !is_directory {
            return Err(ErrorCode::NotDirectory);
        }
        // A directory must not end up inside itself.
        let mut above = new_parent;
        while is_directory && above != ROOT {
            if above == moved {
                return Err(ErrorCode::Invalid);
            }
            above = self.node(above)?.parent;
        }
        let replaced = self.entries(new_parent)?.get(new_name).copied();
        if let Some(replaced) = replaced {
            if replaced == moved {
                return Ok(());
            }
            match (&self.node(replaced)?.content, is_directory) {
                (Content::Directory(_), false) => return Err(ErrorCode::IsDirectory),
                (Content::File { .. }, true) => return Err(ErrorCode::NotDirectory),
                (Content::Directory(entries), true) if !entries.is_empty() => {
                    return Err(ErrorCode::NotEmpty);
                }
                _ => {}
            }
        }
        self.entries(old_parent)?.remove(old_name);
        self.entries(new_parent)?.insert(new_name.into(), moved);
        if let Some(node) = self.nodes.get_mut(&moved) {
            node.parent = new_parent;
            node.changed = SystemTime::now();
        }
        if let Some(replaced) = replaced {
            self.unlink(replaced);
        }
        Ok(())
    }

    fn stat(&self, inode: u64) -> Result<Stat, ErrorCode> {
        let node = self.node(inode)?;
        Ok(Stat {
            kind: kind(matches!(node.content, Content::Directory(_))),
            links: u64::from(node.linked),
            size: match &node.content {
                Content::File { length, .. } => *length,
                Content::Directory(_) => 0,
            },
            accessed: node.accessed,
            modified: node.modified,
            changed: node.changed,
        })
    }

    fn set_times(
        &mut self,
        inode: u64,
        accessed: Option<SystemTime>,
        modified: Option<SystemTime>,
    ) -> Result<(), ErrorCode> {
        let node = self.node_mut(inode)?;
        node.accessed = accessed.unwrap_or(node.accessed);
        node.modified = modified.unwrap_or(node.modified);
        node.changed = SystemTime::now();
        Ok(())
    }

    fn set_size(&mut self, inode: u64, size: u64) -> Result<(), ErrorCode> {
        if size > i64::MAX as u64 {
            return Err(ErrorCode::FileTooLarge);
        }
        let node = self.node_mut(inode)?;
        let Content::File { pages, length } = &mut node.content else {
            return Err(ErrorCode::IsDirectory);
        };
        *length = size;
        let (last, used) = place(size);
        let cut = pages.split_off(&(last + u64::from(used > 0)));
        if used > 0
            && let Some(page) = pages.get_mut(&last)
        {
            // A later, longer size must not bring old bytes back.
            page[used..].fill(0);
        }
        node.touch();
        let cut = cut.len();
        self.free(cut);
        Ok(())
    }

    fn write(&mut self, inode: u64, at: WriteAt, bytes: &[u8]) -> Result<(), ErrorCode> {
        let (limit, used) = (self.limits.bytes, self.bytes);
        // Not by a method: the tenant's part of the books is at hand meanwhile.
        let node = self.nodes.get_mut(&inode).ok_or(ErrorCode::NoEntry)?;
        let Content::File { pages, length } = &mut node.content else {
            return Err(ErrorCode::IsDirectory);
        };
        if bytes.is_empty() {
            return Ok(());
        }
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => *length,
        };
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= i64::MAX as u64);
        let end = end.ok_or(ErrorCode::FileTooLarge)?;
        let touched = place(offset).0..=place(end - 1).0;
        let missing = touched.filter(|page| !pages.contains_key(page)).count();
        let more = (missing * PAGE) as u64;
        let used = used.saturating_add(more);
        if used > limit || !self.held.grow(more) {
            return Err(ErrorCode::InsufficientSpace);
        }
        let mut written = 0;
        while written < bytes.len() {
            let (page, start) = place(offset + written as u64);
            let part = (PAGE - start).min(bytes.len() - written);
            let page = pages.entry(page).or_insert_with(|| Box::new([0; PAGE]));
            page[start..start + part].copy_from_slice(&bytes[written..written + part]);
            written += part;
        }
        *length = end.max(*length);
        node.touch();
        self.bytes = used;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::footprint::Footprint;

    fn memory() -> Memory {
        Memory::new(Limits { bytes: 4 * PAGE as u64, files: 4 }, Footprint::new(None).hold(0))
    }

    const CREATE: Options =
        Options { create: true, exclusive: false, truncate: false, directory: false, write: true };

    #[test]
    fn what_is_written_is_read() {
        let memory = memory();
        let file = memory.root().open("f", CREATE).unwrap();
        let bytes: Vec<u8> = (0..PAGE + 100).map(|byte| byte as u8).collect();
        file.write(WriteAt::Offset(0), &bytes).unwrap();
        file.write(WriteAt::End, b"end").unwrap();
        assert_eq!(file.read(PAGE as u64 + 98, 100).unwrap(), [&bytes[PAGE + 98..], b"end"].concat());
        assert_eq!(file.read(u64::MAX, usize::MAX).unwrap(), b"");
        // A hole reads as zeros, and so does what was cut and grown again.
        file.set_size(10).unwrap();
        file.set_size(20).unwrap();
        assert_eq!(file.read(8, 100).unwrap(), [8, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(file.stat().unwrap().size, 20);
    }

    #[test]
    fn bytes_are_bounded_and_come_back() {
        let memory = memory();
        let file = memory.root().open("f", CREATE).unwrap();
        let page = vec![1; PAGE];
        for number in 0..4 {
            file.write(WriteAt::Offset(number << 40), &page).unwrap();
        }
        assert_eq!(file.write(WriteAt::Offset(PAGE as u64), b"x"), Err(ErrorCode::InsufficientSpace));
        assert_eq!(file.write(WriteAt::Offset(u64::MAX), b"x"), Err(ErrorCode::FileTooLarge));
        assert_eq!(file.set_size(u64::MAX), Err(ErrorCode::FileTooLarge));
        // Without a name it stays as long as it is open.
        memory.root().remove_file("f").unwrap();
        assert_eq!(file.read(3 << 40, 1).unwrap(), [1]);
        let other = memory.root().open("g", CREATE).unwrap();
        assert_eq!(other.write(WriteAt::End, b"x"), Err(ErrorCode::InsufficientSpace));
        drop(file);
        other.write(WriteAt::End, &[page.clone(), page.clone(), page.clone(), page].concat()).unwrap();
        other.set_size(0).unwrap();
        assert_eq!(memory.tree().bytes, 0);
    }

    #[test]
    fn files_are_bounded_in_number() {
        let root = memory().root();
        for name in ["a", "b", "c"] {
            root.create_directory(name).unwrap();
        }
        root.open("c/f", CREATE).unwrap();
        assert_eq!(root.open("g", CREATE).err(), Some(ErrorCode::InsufficientSpace));
        assert_eq!(root.create_directory("d"), Err(ErrorCode::InsufficientSpace));
        root.remove_directory("a").unwrap();
        root.open("g", CREATE).unwrap();
    }

    #[test]
    fn names_move_as_they_do_in_posix() {
        let limits = Limits { bytes: 1 << 20, files: 100 };
        let root = Memory::new(limits, Footprint::new(None).hold(0)).root();
        root.create_directory("a").unwrap();
        root.create_directory("a/b").unwrap();
        root.open("f", CREATE).unwrap().write(WriteAt::End, b"f").unwrap();
        root.open("a/g", CREATE).unwrap();
        assert_eq!(root.rename("a", &root, "a/b/c"), Err(ErrorCode::Invalid));
        assert_eq!(root.rename("f", &root, "a"), Err(ErrorCode::IsDirectory));
        assert_eq!(root.rename("a/b", &root, "f"), Err(ErrorCode::NotDirectory));
        assert_eq!(root.rename("x", &root, "y"), Err(ErrorCode::NoEntry));
        let inside = root.open("a", Options::default()).unwrap();
        assert_eq!(inside.open("../f", Options::default()).err(), Some(ErrorCode::NotPermitted));
        assert_eq!(inside.rename("../f", &inside, "g"), Err(ErrorCode::NotPermitted));
        root.rename("f", &inside, "g").unwrap();
        assert_eq!(inside.open("g", Options::default()).unwrap().read(0, 9).unwrap(), b"f");
        assert_eq!(root.remove_directory("a"), Err(ErrorCode::NotEmpty));
        assert_eq!(root.remove_file("a"), Err(ErrorCode::IsDirectory));
        root.rename("a/b", &root, "b").unwrap();
        inside.remove_file("g").unwrap();
        root.remove_directory("a").unwrap();
        // A directory that is gone takes nothing more.
        assert_eq!(inside.open("new", CREATE).err(), Some(ErrorCode::NoEntry));
        assert_eq!(inside.create_directory("new"), Err(ErrorCode::NoEntry));
        assert_eq!(root.entry_after(None), Some(("b".into(), true)));
        assert_eq!(root.entry_after(Some("b")), None);
        assert_eq!(root.rename("b", &memory().root(), "b"), Err(ErrorCode::CrossDevice));
        assert_eq!(root.open("b", CREATE).err(), Some(ErrorCode::IsDirectory));
        assert_eq!(root.open("b", Options { exclusive: true, ..CREATE }).err(), Some(ErrorCode::Exist));
    }
}
