//! Read-only files: a layer of an app as one file of the cache.
//!
//! The tree is in memory, the files' content in the cache's file, a plain tar
//! archive. Looking something up costs no system call and no descriptor, and
//! all instances of all apps with the same layer share one [`Image`]. A read
//! costs one system call, made on the spot if the kernel has the bytes in its
//! page cache.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::fs::File;
use std::io::{BufReader, Read as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;

use super::host::{Identity, Stat, kind};
use super::path::{self, Step};

/// Entries that a layer may have; the tree is in memory.
const MAX_FILES: usize = 200_000;
/// Bytes of a name with its directories.
const MAX_NAME: u64 = 4096;
/// Directories above a file.
const MAX_DEPTH: usize = 64;

/// One layer's files.
#[derive(Debug)]
pub struct Image {
    /// Shared with the responses that are parts of it.
    file: Arc<File>,
    /// The root first; the entries of a directory follow one another, sorted.
    nodes: Vec<Node>,
    /// When the layer came to this host. Stands for the time of every file,
    /// so that another build's files are newer to whoever compares.
    modified: SystemTime,
    /// Tells the identities of this image's files from those of others.
    number: u64,
}

#[derive(Debug)]
struct Node {
    name: Box<str>,
    parent: u32,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Directory { children: Range<u32> },
    File { offset: u64, length: u64 },
}

/// A tree while it is read.
#[derive(Default)]
struct Draft(BTreeMap<Box<str>, DraftEntry>);

enum DraftEntry {
    Directory(Draft),
    File { offset: u64, length: u64 },
}

impl Image {
    /// The image in the file at `path`, read once however many apps have it.
    ///
    /// # Errors
    ///
    /// If the file can not be read, or is no archive of plain files.
    pub fn open(path: &Path) -> Result<Arc<Image>> {
        static OPEN: Mutex<BTreeMap<PathBuf, Weak<Image>>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = open.get(path).and_then(Weak::upgrade) {
            return Ok(image);
        }
        let image = Arc::new(Image::read(path)?);
        open.retain(|_, image| image.strong_count() > 0);
        open.insert(path.to_path_buf(), Arc::downgrade(&image));
        Ok(image)
    }

    /// Reads the tree of the archive at `path`, which nobody has checked yet.
    ///
    /// # Errors
    ///
    /// If the file can not be read, or is no archive of plain files.
    pub fn read(path: &Path) -> Result<Image> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let context = || format!("failed to read the layer `{}`", path.display());
        let file = File::open(path).with_context(context)?;
        let metadata = file.metadata().with_context(context)?;
        let draft = draft(&file, metadata.len())?;
        Ok(Image {
            nodes: flatten(draft),
            modified: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            file: Arc::new(file),
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// The directory at the top.
    pub const ROOT: u32 = 0;

    /// What is at `path` from the directory `from`.
    pub fn look_up(&self, from: u32, path: &str) -> Result<u32, ErrorCode> {
        let mut at = from;
        for step in path::steps(path)? {
            let Kind::Directory { children } = &self.node(at).kind else {
                return Err(ErrorCode::NotDirectory);
            };
            at = match step {
                Step::Here => at,
                Step::Up if at == from => return Err(ErrorCode::NotPermitted),
                Step::Up => self.node(at).parent,
                Step::Into(name) => {
                    let siblings = &self.nodes[children.start as usize..children.end as usize];
                    let index = siblings
                        .binary_search_by(|node| (*node.name).cmp(name))
                        .map_err(|_| ErrorCode::NoEntry)?;
                    // No more nodes than fit in 32 bits.
                    children.start + index as u32
                }
            };
        }
        Ok(at)
    }

    /// Whether `node` is a directory.
    pub fn is_directory(&self, node: u32) -> bool {
        matches!(self.node(node).kind, Kind::Directory { .. })
    }

    /// What `stat` says.
    pub fn stat(&self, node: u32) -> Stat {
        let size = match self.node(node).kind {
            Kind::Directory { .. } => 0,
            Kind::File { length, .. } => length,
        };
        Stat {
            kind: kind(self.is_directory(node)),
            links: 1,
            size,
            accessed: self.modified,
            modified: self.modified,
            changed: self.modified,
        }
    }

    /// The identity of a file among all that a guest sees.
    pub fn identity(&self, node: u32) -> Identity {
        Identity::new(("image", self.number, node))
    }

    /// The entry of a directory that comes `index`-th: its name and whether it
    /// is a directory.
    pub fn entry(&self, directory: u32, index: u32) -> Option<(&str, bool)> {
        let Kind::Directory { children } = &self.node(directory).kind else { return None };
        let at = children.start.checked_add(index).filter(|at| *at < children.end)?;
        Some((&self.node(at).name, self.is_directory(at)))
    }

    /// Where in the cache's file to read for `length` bytes at `offset` of a
    /// file: the place, and how many there are.
    pub fn place(
        &self,
        node: u32,
        offset: u64,
        length: usize,
    ) -> Result<(&Arc<File>, u64, usize), ErrorCode> {
        let Kind::File { offset: start, length: size } = self.node(node).kind else {
            return Err(ErrorCode::IsDirectory);
        };
        let left = size.saturating_sub(offset);
        Ok((&self.file, start.saturating_add(offset), usize::try_from(left).unwrap_or(length).min(length)))
    }

    fn node(&self, node: u32) -> &Node {
        // Only numbers from this image reach it.
        &self.nodes[node as usize]
    }
}

/// Reads the headers of an archive whose file has `size` bytes.
fn draft(file: &File, size: u64) -> Result<Draft> {
    let mut root = Draft::default();
    let mut archive = tar::Archive::new(BufReader::with_capacity(512, file));
    let mut long_name: Option<Vec<u8>> = None;
    let mut count = 0;
    // Raw, so that the library keeps no name in memory that has no bound.
    for entry in archive.entries_with_seek()?.raw(true) {
        let mut entry = entry?;
        let (offset, length) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(length).is_none_or(|end| end > size) {
            bail!("it is cut off");
        }
        if entry.header().entry_type() == tar::EntryType::GNULongName {
            if length > MAX_NAME || long_name.is_some() {
                bail!("it has a name that is too long");
            }
            let mut name = Vec::new();
            entry.read_to_end(&mut name)?;
            name.pop_if(|end| *end == 0);
            long_name = Some(name);
            continue;
        }
        let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        if entry.header().entry_type() != tar::EntryType::Regular {
            bail!("`{}` is not a plain file", String::from_utf8_lossy(&name));
        }
        // A guest has no way to name a file that is not UTF-8.
        let Ok(name) = String::from_utf8(name) else { continue };
        count += 1;
        if count > MAX_FILES {
            bail!("it has more than {MAX_FILES} files");
        }
        root.add(&name, offset, length)?;
    }
    Ok(root)
}

impl Draft {
    fn add(&mut self, path: &str, offset: u64, length: u64) -> Result<()> {
        let (parents, name) =
            path.rsplit_once('/').map_or((None, path), |(parents, name)| (Some(parents), name));
        let is_plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        let mut directory = self;
        for (depth, part) in parents.into_iter().flat_map(|parents| parents.split('/')).enumerate() {
            if !is_plain(part) || depth >= MAX_DEPTH {
                bail!("`{path}` points outside of the layer");
            }
            let entry =
                directory.0.entry(part.into()).or_insert_with(|| DraftEntry::Directory(Draft::default()));
            directory = match entry {
                DraftEntry::Directory(inner) => inner,
                DraftEntry::File { .. } => bail!("`{path}` is below a file"),
            };
        }
        if !is_plain(name) {
            bail!("`{path}` points outside of the layer");
        }
        match directory.0.entry(name.into()) {
            MapEntry::Vacant(vacant) => vacant.insert(DraftEntry::File { offset, length }),
            MapEntry::Occupied(_) => bail!("`{path}` is there twice"),
        };
        Ok(())
    }
}

/// Puts a tree in one list, directory by directory.
fn flatten(root: Draft) -> Vec<Node> {
    let empty = || Kind::Directory { children: 0..0 };
    let mut nodes = vec![Node { name: "".into(), parent: Image::ROOT, kind: empty() }];
    let mut open = vec![(Image::ROOT, root)];
    while let Some((parent, draft)) = open.pop() {
        // Far fewer than 2^32, see MAX_FILES and MAX_DEPTH.
        let start = nodes.len() as u32;
        for (name, entry) in draft.0 {
            let kind = match entry {
                DraftEntry::File { offset, length } => Kind::File { offset, length },
                DraftEntry::Directory(inner) => {
                    open.push((nodes.len() as u32, inner));
                    empty()
                }
            };
            nodes.push(Node { name, parent, kind });
        }
        nodes[parent as usize].kind = Kind::Directory { children: start..nodes.len() as u32 };
    }
    nodes.shrink_to_fit();
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(names: &[&str]) -> Result<Image> {
        let mut archive = tar::Builder::new(tempfile::NamedTempFile::new().unwrap());
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(name.len() as u64);
            header.set_cksum();
            archive.append_data(&mut header, name, name.as_bytes()).unwrap();
        }
        Image::read(archive.into_inner().unwrap().path())
    }

    #[test]
    fn files_are_found_and_nothing_else() {
        let long = format!("long/{}/end", "x".repeat(200));
        let image = image(&["b/c", "a", "b/a/d", "b/ab", &long]).unwrap();
        let root = Image::ROOT;
        let b = image.look_up(root, "b").unwrap();
        for path in ["b/c", "./b//c", "b/a/../c", "b/../b/c"] {
            let node = image.look_up(root, path).unwrap();
            assert_eq!(node, image.look_up(b, "c").unwrap());
            let (file, at, length) = image.place(node, 1, 100).unwrap();
            let mut content = vec![0; length];
            std::os::unix::fs::FileExt::read_exact_at(&**file, &mut content, at).unwrap();
            assert_eq!(content, b"/c");
        }
        assert_eq!(image.stat(image.look_up(root, &long).unwrap()).size, long.len() as u64);
        for (path, error) in [
            ("x", ErrorCode::NoEntry),
            ("b/x", ErrorCode::NoEntry),
            ("a/x", ErrorCode::NotDirectory),
            ("a/", ErrorCode::NotDirectory),
            ("a/..", ErrorCode::NotDirectory),
            ("..", ErrorCode::NotPermitted),
            ("b/../..", ErrorCode::NotPermitted),
            ("/b/c", ErrorCode::NotPermitted),
            ("", ErrorCode::NoEntry),
        ] {
            assert_eq!(image.look_up(root, path), Err(error), "{path}");
        }
        assert_eq!(image.look_up(b, "../a"), Err(ErrorCode::NotPermitted));
        let names: Vec<_> = (0..).map_while(|index| image.entry(b, index)).collect();
        assert_eq!(names, [("a", true), ("ab", false), ("c", false)]);
        assert_eq!(image.place(b, 0, 1).err(), Some(ErrorCode::IsDirectory));
        let a = image.look_up(root, "a").unwrap();
        assert_eq!(image.place(a, u64::MAX, usize::MAX).unwrap().2, 0);
    }

    #[test]
    fn a_layer_that_is_not_honest_is_refused() {
        assert!(image(&["a", "a"]).is_err());
        assert!(image(&["a", "a/b"]).is_err());
        assert!(image(&["a/b", "a"]).is_err());
        assert!(image(&["d/".repeat(100).trim_end_matches('/')]).is_err());
    }
}
