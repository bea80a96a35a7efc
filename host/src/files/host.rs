//! `wasi:filesystem` for the three kinds of mounts.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use wasmtime::component::{HasData, Linker, Resource, ResourceTable};
use wasmtime_wasi::async_trait;
use wasmtime_wasi::p2::bindings::clocks::wall_clock::Datetime;
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};
use wasmtime_wasi::p2::{
    DynInputStream, DynOutputStream, FsError, FsResult, InputStream, OutputStream, Pollable, ReaddirIterator,
    StreamError, StreamResult,
};

use types::{
    Advice, DescriptorFlags, DescriptorStat, DescriptorType, DirectoryEntry, ErrorCode, Filesize,
    MetadataHashValue, NewTimestamp, OpenFlags, PathFlags,
};

use super::FileSpace;
use super::granted::{self, Opened};
use super::image::Image;
use super::memory::{self, Options};
use crate::disk::{self, Work};
use crate::footprint::{self, Footprint};

/// Bytes that one read or write moves at most.
const MAX_TRANSFER: usize = 256 << 10;

/// What a `stat` tells, of any kind of mount.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// What it is.
    pub kind: DescriptorType,
    /// How many names it has.
    pub links: u64,
    /// Its size in bytes.
    pub size: u64,
    /// When it was read last.
    pub accessed: SystemTime,
    /// When its content changed last.
    pub modified: SystemTime,
    /// When anything about it changed last.
    pub changed: SystemTime,
}

/// The kind of what is a directory or else a plain file.
pub fn kind(is_directory: bool) -> DescriptorType {
    if is_directory { DescriptorType::Directory } else { DescriptorType::RegularFile }
}

/// Tells one file from all others that a guest sees. Becomes its inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64);

impl Identity {
    /// From what is unique to a file.
    pub fn new(unique: impl Hash) -> Identity {
        let mut hasher = DefaultHasher::new();
        unique.hash(&mut hasher);
        Identity(hasher.finish())
    }
}

impl From<Identity> for MetadataHashValue {
    fn from(identity: Identity) -> MetadataHashValue {
        MetadataHashValue { lower: identity.0, upper: !identity.0 }
    }
}

/// Where a write goes.
#[derive(Clone, Copy, Debug)]
pub enum WriteAt {
    /// So many bytes after the start.
    Offset(u64),
    /// Behind the last byte.
    End,
}

/// Something open. Clones are the same one.
#[derive(Clone, Debug)]
enum Node {
    Image(Arc<Image>, u32),
    Memory(memory::Handle),
    Directory(Arc<granted::Directory>),
    File(Arc<granted::OpenFile>),
}

/// A descriptor of a guest.
#[derive(Debug)]
struct Descriptor {
    node: Node,
    flags: DescriptorFlags,
}

/// The entries of a directory that a guest has not seen yet.
enum Listing {
    Image { image: Arc<Image>, node: u32, index: u32 },
    Memory { directory: memory::Handle, after: Option<Box<str>> },
    Granted { listing: Option<granted::Listing>, batch: VecDeque<(String, DescriptorType)> },
}

/// What the functions need of an instance.
pub struct FileView<'a> {
    /// Its mounts.
    pub space: &'a mut FileSpace,
    /// Its handles.
    pub table: &'a mut ResourceTable,
}

/// Names [`FileView`] to the linker.
struct HasFiles;

impl HasData for HasFiles {
    type Data<'a> = FileView<'a>;
}

/// Links `wasi:filesystem`.
///
/// # Errors
///
/// If it is linked already.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    view: fn(&mut T) -> FileView<'_>,
) -> wasmtime::Result<()> {
    types::add_to_linker::<T, HasFiles>(linker, view)?;
    preopens::add_to_linker::<T, HasFiles>(linker, view)
}

/// Does what may wait for a disk, off the runtime's threads. It is done to
/// its end even if the guest is stopped meanwhile.
fn off_thread<T, W>(footprint: &Footprint, work: W) -> impl Future<Output = Result<T, ErrorCode>> + use<T, W>
where
    T: Send + 'static,
    W: FnOnce() -> Result<T, ErrorCode> + Send + 'static,
{
    let work = disk::begin(footprint, work);
    async { work.await.unwrap_or(Err(ErrorCode::Io)) }
}

/// Reads from a file, if that needs no waiting.
fn read_cached(file: &std::fs::File, offset: u64, length: usize) -> Option<io::Result<Vec<u8>>> {
    let mut bytes = vec![0; length];
    match preadv2(file, &mut [IoSliceMut::new(&mut bytes)], offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => {
            bytes.truncate(read);
            Some(Ok(bytes))
        }
        // Not in memory, or this file system can not tell.
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INTR) => None,
        Err(error) => Some(Err(error.into())),
    }
}

fn read_waiting(file: &std::fs::File, offset: u64, length: usize) -> Result<Vec<u8>, ErrorCode> {
    let mut bytes = vec![0; length];
    let read = std::os::unix::fs::FileExt::read_at(file, &mut bytes, offset)?;
    bytes.truncate(read);
    Ok(bytes)
}

impl Node {
    /// At most `length` bytes from `offset`, if they are in memory. None at the end.
    fn read_now(&self, offset: u64, length: usize) -> Option<Result<Vec<u8>, ErrorCode>> {
        let length = length.min(MAX_TRANSFER);
        match self {
            Node::Image(image, node) => match image.place(*node, offset, length) {
                Err(error) => Some(Err(error)),
                Ok((_, _, 0)) => Some(Ok(Vec::new())),
                Ok((file, at, length)) => Some(read_cached(file, at, length)?.map_err(ErrorCode::from)),
            },
            Node::Memory(file) => Some(file.read(offset, length)),
            Node::Directory(_) => Some(Err(ErrorCode::IsDirectory)),
            // The kernel takes no offset beyond.
            Node::File(_) if offset > i64::MAX as u64 - MAX_TRANSFER as u64 => Some(Ok(Vec::new())),
            Node::File(file) => Some(read_cached(file.file(), offset, length)?.map_err(ErrorCode::from)),
        }
    }

    /// The same, also if it takes time: off the runtime's threads.
    fn read_waiting(&self, offset: u64, length: usize) -> Result<Vec<u8>, ErrorCode> {
        let length = length.min(MAX_TRANSFER);
        match self {
            Node::Image(image, node) => {
                let (file, at, length) = image.place(*node, offset, length)?;
                read_waiting(file, at, length)
            }
            Node::File(file) => read_waiting(file.file(), offset, length),
            Node::Memory(_) | Node::Directory(_) => Err(ErrorCode::Io),
        }
    }

    /// Begins to write all of `bytes`. They are held until they are written,
    /// also if the guest has lost its interest by then.
    fn write(&self, footprint: &Arc<Footprint>, at: WriteAt, bytes: Bytes) -> Writing {
        match self {
            Node::Image(..) => Writing::Done(Err(ErrorCode::NotPermitted)),
            Node::Memory(file) => Writing::Done(file.write(at, &bytes)),
            Node::Directory(_) => Writing::Done(Err(ErrorCode::IsDirectory)),
            Node::File(file) => {
                let Some(held) = footprint.try_hold(bytes.len() as u64 + footprint::MESSAGE) else {
                    return Writing::Done(Err(ErrorCode::InsufficientMemory));
                };
                let file = Arc::clone(file);
                Writing::Begun(disk::begin(footprint, move || {
                    let written = file.write(at, &bytes);
                    drop((bytes, held));
                    written
                }))
            }
        }
    }

    fn is_directory(&self) -> bool {
        match self {
            Node::Image(image, node) => image.is_directory(*node),
            Node::Memory(handle) => handle.is_directory(),
            Node::Directory(_) => true,
            Node::File(_) => false,
        }
    }

    /// What a guest may do with a directory of this kind.
    fn directory_flags(&self) -> DescriptorFlags {
        match self {
            Node::Image(..) => DescriptorFlags::READ,
            _ => DescriptorFlags::READ | DescriptorFlags::MUTATE_DIRECTORY,
        }
    }

    fn stat(&self) -> Result<(Stat, Identity), ErrorCode> {
        match self {
            Node::Image(image, node) => Ok((image.stat(*node), image.identity(*node))),
            Node::Memory(handle) => Ok((handle.stat()?, handle.identity())),
            // These two need no look-up and no disk.
            Node::Directory(directory) => directory.stat(),
            Node::File(file) => file.stat(),
        }
    }

    async fn stat_at(
        &self,
        footprint: &Footprint,
        path: String,
        follow: bool,
    ) -> Result<(Stat, Identity), ErrorCode> {
        match self {
            Node::Image(image, node) => {
                let node = image.look_up(*node, &path)?;
                Ok((image.stat(node), image.identity(node)))
            }
            Node::Memory(handle) => Ok((handle.stat_at(&path)?, handle.identity_at(&path)?)),
            Node::Directory(directory) => {
                let directory = Arc::clone(directory);
                off_thread(footprint, move || directory.stat_at(&path, follow)).await
            }
            Node::File(_) => Err(ErrorCode::NotDirectory),
        }
    }
}

enum Writing {
    Done(Result<(), ErrorCode>),
    Begun(Work<Result<(), ErrorCode>>),
}

impl Writing {
    async fn finish(self) -> Result<(), ErrorCode> {
        match self {
            Writing::Done(done) => done,
            Writing::Begun(work) => work.await.unwrap_or(Err(ErrorCode::Io)),
        }
    }
}

impl FileView<'_> {
    fn descriptor(&self, fd: &Resource<types::Descriptor>) -> FsResult<&Descriptor> {
        // The guest's handle has the type of wasmtime-wasi's own descriptors;
        // what is in the table is ours.
        Ok(self.table.get(&Resource::<Descriptor>::new_borrow(fd.rep()))?)
    }

    fn node(&self, fd: &Resource<types::Descriptor>) -> FsResult<Node> {
        Ok(self.descriptor(fd)?.node.clone())
    }

    /// For what writes to a file.
    fn writable(&self, fd: &Resource<types::Descriptor>) -> FsResult<Node> {
        let descriptor = self.descriptor(fd)?;
        if descriptor.node.is_directory() || !descriptor.flags.contains(DescriptorFlags::WRITE) {
            return Err(ErrorCode::BadDescriptor.into());
        }
        Ok(descriptor.node.clone())
    }

    fn readable(&self, fd: &Resource<types::Descriptor>) -> FsResult<Node> {
        let descriptor = self.descriptor(fd)?;
        if descriptor.node.is_directory() {
            return Err(ErrorCode::IsDirectory.into());
        }
        if !descriptor.flags.contains(DescriptorFlags::READ) {
            return Err(ErrorCode::BadDescriptor.into());
        }
        Ok(descriptor.node.clone())
    }

    fn push(&mut self, node: Node, flags: DescriptorFlags) -> FsResult<Resource<types::Descriptor>> {
        let fd = self.table.push(Descriptor { node, flags }).map_err(|_| ErrorCode::InsufficientMemory)?;
        Ok(Resource::new_own(fd.rep()))
    }

    fn write_stream(
        &mut self,
        fd: &Resource<types::Descriptor>,
        at: WriteAt,
    ) -> FsResult<Resource<DynOutputStream>> {
        let node = self.writable(fd)?;
        let stream: DynOutputStream = Box::new(WriteStream {
            node,
            footprint: Arc::clone(&self.space.footprint),
            at,
            state: WriteState::Idle,
        });
        Ok(self.table.push(stream).map_err(|_| ErrorCode::InsufficientMemory)?)
    }

    fn mount(&mut self, node: Node, name: &str) -> wasmtime::Result<(Resource<types::Descriptor>, String)> {
        let flags = node.directory_flags();
        let fd = self.table.push(Descriptor { node, flags })?;
        Ok((Resource::new_own(fd.rep()), name.to_owned()))
    }
}

impl preopens::Host for FileView<'_> {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Resource<types::Descriptor>, String)>> {
        let mut mounts = Vec::new();
        let files = Arc::clone(&self.space.files);
        for (path, image) in &files.images {
            mounts.push(self.mount(Node::Image(Arc::clone(image), Image::ROOT), path)?);
        }
        let temporary = self.space.temporary.root();
        mounts.push(self.mount(Node::Memory(temporary), super::TEMPORARY)?);
        if let Some(holder) = &self.space.data {
            let root = Node::Directory(Arc::new(holder.root()));
            mounts.push(self.mount(root, super::DATA)?);
        }
        Ok(mounts)
    }
}

impl types::Host for FileView<'_> {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<ErrorCode> {
        error.downcast()
    }

    fn filesystem_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<ErrorCode>> {
        Ok(self.table.get(&error)?.downcast_ref::<ErrorCode>().copied())
    }
}

impl types::HostDescriptor for FileView<'_> {
    fn read_via_stream(
        &mut self,
        fd: Resource<types::Descriptor>,
        offset: Filesize,
    ) -> FsResult<Resource<DynInputStream>> {
        let stream: DynInputStream = Box::new(ReadStream {
            node: self.readable(&fd)?,
            footprint: Arc::clone(&self.space.footprint),
            position: offset,
            state: ReadState::Idle,
        });
        Ok(self.table.push(stream).map_err(|_| ErrorCode::InsufficientMemory)?)
    }

    fn write_via_stream(
        &mut self,
        fd: Resource<types::Descriptor>,
        offset: Filesize,
    ) -> FsResult<Resource<DynOutputStream>> {
        self.write_stream(&fd, WriteAt::Offset(offset))
    }

    fn append_via_stream(&mut self, fd: Resource<types::Descriptor>) -> FsResult<Resource<DynOutputStream>> {
        self.write_stream(&fd, WriteAt::End)
    }

    async fn advise(
        &mut self,
        fd: Resource<types::Descriptor>,
        _offset: Filesize,
        _length: Filesize,
        _advice: Advice,
    ) -> FsResult<()> {
        if self.descriptor(&fd)?.node.is_directory() {
            return Err(ErrorCode::BadDescriptor.into());
        }
        // Nothing that would help the guest and could not harm its neighbours.
        Ok(())
    }

    async fn sync_data(&mut self, fd: Resource<types::Descriptor>) -> FsResult<()> {
        match self.node(&fd)? {
            Node::Image(..) | Node::Memory(_) => Ok(()),
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.sync()).await?)
            }
            Node::File(file) => Ok(off_thread(&self.space.footprint, move || file.sync(true)).await?),
        }
    }

    async fn sync(&mut self, fd: Resource<types::Descriptor>) -> FsResult<()> {
        match self.node(&fd)? {
            Node::Image(..) | Node::Memory(_) => Ok(()),
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.sync()).await?)
            }
            Node::File(file) => Ok(off_thread(&self.space.footprint, move || file.sync(false)).await?),
        }
    }

    async fn get_flags(&mut self, fd: Resource<types::Descriptor>) -> FsResult<DescriptorFlags> {
        Ok(self.descriptor(&fd)?.flags)
    }

    async fn get_type(&mut self, fd: Resource<types::Descriptor>) -> FsResult<DescriptorType> {
        Ok(kind(self.descriptor(&fd)?.node.is_directory()))
    }

    async fn set_size(&mut self, fd: Resource<types::Descriptor>, size: Filesize) -> FsResult<()> {
        match self.writable(&fd)? {
            Node::Memory(file) => Ok(file.set_size(size)?),
            Node::File(file) => Ok(off_thread(&self.space.footprint, move || file.set_size(size)).await?),
            Node::Image(..) | Node::Directory(_) => Err(ErrorCode::NotPermitted.into()),
        }
    }

    async fn set_times(
        &mut self,
        fd: Resource<types::Descriptor>,
        accessed: NewTimestamp,
        modified: NewTimestamp,
    ) -> FsResult<()> {
        let (accessed, modified) = (new_time(accessed)?, new_time(modified)?);
        match self.node(&fd)? {
            Node::Image(..) => Err(ErrorCode::NotPermitted.into()),
            Node::Memory(handle) => Ok(handle.set_times(accessed, modified)?),
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.set_times(accessed, modified)).await?)
            }
            Node::File(file) => {
                Ok(off_thread(&self.space.footprint, move || file.set_times(accessed, modified)).await?)
            }
        }
    }

    async fn read(
        &mut self,
        fd: Resource<types::Descriptor>,
        length: Filesize,
        offset: Filesize,
    ) -> FsResult<(Vec<u8>, bool)> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let node = self.readable(&fd)?;
        let bytes = match node.read_now(offset, length) {
            Some(read) => read?,
            None => off_thread(&self.space.footprint, move || node.read_waiting(offset, length)).await?,
        };
        let at_end = bytes.is_empty();
        Ok((bytes, at_end))
    }

    async fn write(
        &mut self,
        fd: Resource<types::Descriptor>,
        mut bytes: Vec<u8>,
        offset: Filesize,
    ) -> FsResult<Filesize> {
        let node = self.writable(&fd)?;
        bytes.truncate(MAX_TRANSFER);
        let length = bytes.len() as Filesize;
        node.write(&self.space.footprint, WriteAt::Offset(offset), bytes.into()).finish().await?;
        Ok(length)
    }

    async fn read_directory(
        &mut self,
        fd: Resource<types::Descriptor>,
    ) -> FsResult<Resource<types::DirectoryEntryStream>> {
        let node = self.node(&fd)?;
        if !node.is_directory() {
            return Err(ErrorCode::NotDirectory.into());
        }
        let listing = match node {
            Node::Image(image, node) => Listing::Image { image, node, index: 0 },
            Node::Memory(directory) => Listing::Memory { directory, after: None },
            Node::Directory(directory) => {
                let listing = off_thread(&self.space.footprint, move || directory.list()).await?;
                Listing::Granted { listing: Some(listing), batch: VecDeque::new() }
            }
            Node::File(_) => return Err(ErrorCode::NotDirectory.into()),
        };
        let stream = self.table.push(listing).map_err(|_| ErrorCode::InsufficientMemory)?;
        Ok(Resource::<ReaddirIterator>::new_own(stream.rep()))
    }

    async fn create_directory_at(&mut self, fd: Resource<types::Descriptor>, path: String) -> FsResult<()> {
        match self.node(&fd)? {
            Node::Image(image, node) => Err(match image.look_up(node, &path) {
                Ok(_) => ErrorCode::Exist,
                Err(_) => ErrorCode::NotPermitted,
            }
            .into()),
            Node::Memory(directory) => Ok(directory.create_directory(&path)?),
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.create_directory(&path)).await?)
            }
            Node::File(_) => Err(ErrorCode::NotDirectory.into()),
        }
    }

    async fn stat(&mut self, fd: Resource<types::Descriptor>) -> FsResult<DescriptorStat> {
        Ok(self.descriptor(&fd)?.node.stat()?.0.into())
    }

    async fn stat_at(
        &mut self,
        fd: Resource<types::Descriptor>,
        path_flags: PathFlags,
        path: String,
    ) -> FsResult<DescriptorStat> {
        Ok(self.node(&fd)?.stat_at(&self.space.footprint, path, follows(path_flags)).await?.0.into())
    }

    async fn set_times_at(
        &mut self,
        fd: Resource<types::Descriptor>,
        path_flags: PathFlags,
        path: String,
        accessed: NewTimestamp,
        modified: NewTimestamp,
    ) -> FsResult<()> {
        let (accessed, modified) = (new_time(accessed)?, new_time(modified)?);
        let follow = follows(path_flags);
        match self.node(&fd)? {
            Node::Image(..) => Err(ErrorCode::NotPermitted.into()),
            Node::Memory(directory) => Ok(directory.set_times_at(&path, accessed, modified)?),
            Node::Directory(directory) => Ok(off_thread(&self.space.footprint, move || {
                directory.set_times_at(&path, follow, accessed, modified)
            })
            .await?),
            Node::File(_) => Err(ErrorCode::NotDirectory.into()),
        }
    }

    /// Never: two names for one file are more than the quota can count.
    async fn link_at(
        &mut self,
        _fd: Resource<types::Descriptor>,
        _path_flags: PathFlags,
        _path: String,
        _target: Resource<types::Descriptor>,
        _target_path: String,
    ) -> FsResult<()> {
        Err(ErrorCode::NotPermitted.into())
    }

    async fn open_at(
        &mut self,
        fd: Resource<types::Descriptor>,
        path_flags: PathFlags,
        path: String,
        open_flags: OpenFlags,
        flags: DescriptorFlags,
    ) -> FsResult<Resource<types::Descriptor>> {
        let options = Options {
            create: open_flags.contains(OpenFlags::CREATE),
            exclusive: open_flags.contains(OpenFlags::EXCLUSIVE),
            truncate: open_flags.contains(OpenFlags::TRUNCATE),
            directory: open_flags.contains(OpenFlags::DIRECTORY),
            write: flags.contains(DescriptorFlags::WRITE),
        };
        if options.directory && (options.create || options.exclusive || options.truncate) {
            return Err(ErrorCode::Invalid.into());
        }
        let follow = follows(path_flags);
        let changes = options.create || options.truncate || options.write;
        let opened = match self.node(&fd)? {
            Node::Image(image, node) => {
                let found = match image.look_up(node, &path) {
                    Ok(_) if options.create && options.exclusive => Err(ErrorCode::Exist),
                    Ok(found) if changes && image.is_directory(found) => Err(ErrorCode::IsDirectory),
                    Ok(_) if options.write || options.truncate => Err(ErrorCode::NotPermitted),
                    Ok(found) if options.directory && !image.is_directory(found) => {
                        Err(ErrorCode::NotDirectory)
                    }
                    Err(ErrorCode::NoEntry) if options.create => Err(ErrorCode::NotPermitted),
                    found => found,
                }?;
                Node::Image(image, found)
            }
            Node::Memory(directory) => Node::Memory(directory.open(&path, options)?),
            Node::Directory(directory) => {
                match off_thread(&self.space.footprint, move || directory.open(&path, follow, options))
                    .await?
                {
                    Opened::Directory(directory) => Node::Directory(Arc::new(directory)),
                    Opened::File(file) => Node::File(Arc::new(file)),
                }
            }
            Node::File(_) => return Err(ErrorCode::NotDirectory.into()),
        };
        let flags = match opened.is_directory() {
            true => opened.directory_flags(),
            false => flags & (DescriptorFlags::READ | DescriptorFlags::WRITE),
        };
        self.push(opened, flags)
    }

    async fn readlink_at(&mut self, fd: Resource<types::Descriptor>, path: String) -> FsResult<String> {
        match self.node(&fd)? {
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.read_link(&path)).await?)
            }
            // Nothing there is a link.
            node => match node.stat_at(&self.space.footprint, path, false).await {
                Ok(_) => Err(ErrorCode::Invalid.into()),
                Err(error) => Err(error.into()),
            },
        }
    }

    async fn remove_directory_at(&mut self, fd: Resource<types::Descriptor>, path: String) -> FsResult<()> {
        match self.node(&fd)? {
            Node::Image(image, node) => {
                image.look_up(node, &path)?;
                Err(ErrorCode::NotPermitted.into())
            }
            Node::Memory(directory) => Ok(directory.remove_directory(&path)?),
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.remove_directory(&path)).await?)
            }
            Node::File(_) => Err(ErrorCode::NotDirectory.into()),
        }
    }

    async fn rename_at(
        &mut self,
        fd: Resource<types::Descriptor>,
        old_path: String,
        new_fd: Resource<types::Descriptor>,
        new_path: String,
    ) -> FsResult<()> {
        match (self.node(&fd)?, self.node(&new_fd)?) {
            (Node::Image(..), Node::Image(..)) => Err(ErrorCode::NotPermitted.into()),
            (Node::Memory(old), Node::Memory(new)) => Ok(old.rename(&old_path, &new, &new_path)?),
            (Node::Directory(old), Node::Directory(new)) => {
                Ok(off_thread(&self.space.footprint, move || old.rename(&old_path, &new, &new_path)).await?)
            }
            (Node::File(_), _) | (_, Node::File(_)) => Err(ErrorCode::NotDirectory.into()),
            _ => Err(ErrorCode::CrossDevice.into()),
        }
    }

    /// Never: others on the host who read the directory would follow it.
    async fn symlink_at(
        &mut self,
        _fd: Resource<types::Descriptor>,
        _content: String,
        _path: String,
    ) -> FsResult<()> {
        Err(ErrorCode::NotPermitted.into())
    }

    async fn unlink_file_at(&mut self, fd: Resource<types::Descriptor>, path: String) -> FsResult<()> {
        match self.node(&fd)? {
            Node::Image(image, node) => {
                image.look_up(node, &path)?;
                Err(ErrorCode::NotPermitted.into())
            }
            Node::Memory(directory) => Ok(directory.remove_file(&path)?),
            Node::Directory(directory) => {
                Ok(off_thread(&self.space.footprint, move || directory.remove_file(&path)).await?)
            }
            Node::File(_) => Err(ErrorCode::NotDirectory.into()),
        }
    }

    async fn is_same_object(
        &mut self,
        one: Resource<types::Descriptor>,
        other: Resource<types::Descriptor>,
    ) -> wasmtime::Result<bool> {
        let identity = |fd| -> FsResult<_> { Ok(self.descriptor(fd)?.node.stat()?.1) };
        Ok(matches!((identity(&one), identity(&other)), (Ok(one), Ok(other)) if one == other))
    }

    async fn metadata_hash(&mut self, fd: Resource<types::Descriptor>) -> FsResult<MetadataHashValue> {
        Ok(self.descriptor(&fd)?.node.stat()?.1.into())
    }

    async fn metadata_hash_at(
        &mut self,
        fd: Resource<types::Descriptor>,
        path_flags: PathFlags,
        path: String,
    ) -> FsResult<MetadataHashValue> {
        Ok(self.node(&fd)?.stat_at(&self.space.footprint, path, follows(path_flags)).await?.1.into())
    }

    fn drop(&mut self, fd: Resource<types::Descriptor>) -> wasmtime::Result<()> {
        self.table.delete(Resource::<Descriptor>::new_own(fd.rep()))?;
        Ok(())
    }
}

impl types::HostDirectoryEntryStream for FileView<'_> {
    async fn read_directory_entry(
        &mut self,
        stream: Resource<types::DirectoryEntryStream>,
    ) -> FsResult<Option<DirectoryEntry>> {
        let listing = self.table.get_mut(&Resource::<Listing>::new_borrow(stream.rep()))?;
        let entry = match listing {
            Listing::Image { image, node, index } => {
                let entry = image.entry(*node, *index);
                *index += u32::from(entry.is_some());
                entry.map(|(name, is_directory)| (name.to_owned(), kind(is_directory)))
            }
            Listing::Memory { directory, after } => {
                let entry = directory.entry_after(after.as_deref());
                entry.map(|(name, is_directory)| {
                    *after = Some(name.clone());
                    (name.into(), kind(is_directory))
                })
            }
            Listing::Granted { listing, batch } => {
                if batch.is_empty()
                    && let Some(mut rest) = listing.take()
                {
                    let (entries, rest) =
                        off_thread(&self.space.footprint, move || Ok((rest.next_entries()?, rest))).await?;
                    // Closed as soon as it has no more.
                    *listing = (!entries.is_empty()).then_some(rest);
                    batch.extend(entries);
                }
                batch.pop_front()
            }
        };
        Ok(entry.map(|(name, type_)| DirectoryEntry { type_, name }))
    }

    fn drop(&mut self, stream: Resource<types::DirectoryEntryStream>) -> wasmtime::Result<()> {
        self.table.delete(Resource::<Listing>::new_own(stream.rep()))?;
        Ok(())
    }
}

fn follows(flags: PathFlags) -> bool {
    flags.contains(PathFlags::SYMLINK_FOLLOW)
}

/// The time to set; none leaves it as it is.
fn new_time(time: NewTimestamp) -> Result<Option<SystemTime>, ErrorCode> {
    match time {
        NewTimestamp::NoChange => Ok(None),
        NewTimestamp::Now => Ok(Some(SystemTime::now())),
        NewTimestamp::Timestamp(Datetime { nanoseconds: 1_000_000_000.., .. }) => Err(ErrorCode::Invalid),
        NewTimestamp::Timestamp(Datetime { seconds, nanoseconds }) => SystemTime::UNIX_EPOCH
            .checked_add(Duration::new(seconds, nanoseconds))
            .map(Some)
            .ok_or(ErrorCode::Overflow),
    }
}

impl From<Stat> for DescriptorStat {
    fn from(stat: Stat) -> DescriptorStat {
        let time = |time: SystemTime| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            Some(Datetime { seconds: since.as_secs(), nanoseconds: since.subsec_nanos() })
        };
        DescriptorStat {
            type_: stat.kind,
            link_count: stat.links,
            size: stat.size,
            data_access_timestamp: time(stat.accessed),
            data_modification_timestamp: time(stat.modified),
            status_change_timestamp: time(stat.changed),
        }
    }
}

/// A file read from a point on.
///
/// It keeps nothing of the file: the C library of guests goes on using a
/// stream after others have written to the file, also one that was at the end
/// before. SQLite does, when it opens an empty database that another instance
/// then fills; with an end that stays, it would find no database there.
struct ReadStream {
    node: Node,
    footprint: Arc<Footprint>,
    position: u64,
    state: ReadState,
}

enum ReadState {
    /// The next read may find something in memory.
    Idle,
    /// A read of so many bytes found nothing in memory.
    Waiting(usize),
    /// They are being read. Stays so if the guest stops waiting, for which it
    /// needs but a second pollable: then it waits for the same read again.
    Reading(Work<Result<Bytes, ErrorCode>>),
    /// What was read since.
    Read(Result<Bytes, ErrorCode>),
}

impl ReadStream {
    /// Begins to read `size` bytes, which are held until the guest has them.
    fn begin(&self, size: usize) -> ReadState {
        let size = size.min(MAX_TRANSFER);
        let Some(held) = self.footprint.try_hold(size as u64 + footprint::MESSAGE) else {
            return ReadState::Read(Err(ErrorCode::InsufficientMemory));
        };
        let (node, position) = (self.node.clone(), self.position);
        ReadState::Reading(disk::begin(&self.footprint, move || {
            node.read_waiting(position, size).map(|bytes| held.tie(bytes))
        }))
    }
}

#[async_trait]
impl Pollable for ReadStream {
    async fn ready(&mut self) {
        if let ReadState::Waiting(size) = self.state {
            self.state = self.begin(size);
        }
        if let ReadState::Reading(work) = &mut self.state {
            let read = work.await.unwrap_or(Err(ErrorCode::Io));
            self.state = ReadState::Read(read);
        }
    }
}

#[async_trait]
impl InputStream for ReadStream {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        if size == 0 {
            return Ok(Bytes::new());
        }
        let read = match std::mem::replace(&mut self.state, ReadState::Idle) {
            ReadState::Read(read) => Some(read),
            ReadState::Idle => self.node.read_now(self.position, size).map(|read| read.map(Bytes::from)),
            ReadState::Waiting(_) => None,
            reading @ ReadState::Reading(_) => {
                self.state = reading;
                return Ok(Bytes::new());
            }
        };
        match read {
            Some(Ok(bytes)) if bytes.is_empty() => Err(StreamError::Closed),
            Some(Ok(mut bytes)) => {
                bytes.truncate(size);
                self.position = self.position.saturating_add(bytes.len() as u64);
                Ok(bytes)
            }
            Some(Err(error)) => Err(StreamError::LastOperationFailed(error.into())),
            None => {
                self.state = ReadState::Waiting(size);
                Ok(Bytes::new())
            }
        }
    }

    async fn blocking_read(&mut self, size: usize) -> StreamResult<Bytes> {
        let first = self.read(size)?;
        if !first.is_empty() || size == 0 {
            return Ok(first);
        }
        self.ready().await;
        self.read(size)
    }
}

/// A file written from a point on, or at its end. It stays usable after a
/// write has failed: SQLite must be able to undo what it can not finish.
struct WriteStream {
    node: Node,
    footprint: Arc<Footprint>,
    at: WriteAt,
    state: WriteState,
}

enum WriteState {
    Idle,
    Writing(Work<Result<(), ErrorCode>>, usize),
    Failed(ErrorCode),
}

impl WriteStream {
    fn finished(&mut self, length: usize, result: Result<(), ErrorCode>) {
        self.state = match result {
            Ok(()) => WriteState::Idle,
            Err(error) => WriteState::Failed(error),
        };
        if let (Ok(()), WriteAt::Offset(offset)) = (result, &mut self.at) {
            *offset = offset.saturating_add(length as u64);
        }
    }

    /// Tells once how the last write failed.
    fn failure(&mut self) -> StreamResult<()> {
        if let WriteState::Failed(error) = self.state {
            self.state = WriteState::Idle;
            return Err(StreamError::LastOperationFailed(error.into()));
        }
        Ok(())
    }
}

#[async_trait]
impl Pollable for WriteStream {
    async fn ready(&mut self) {
        if let WriteState::Writing(work, length) = &mut self.state {
            let length = *length;
            let result = work.await.unwrap_or(Err(ErrorCode::Io));
            self.finished(length, result);
        }
    }
}

#[async_trait]
impl OutputStream for WriteStream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.failure()?;
        if bytes.len() > MAX_TRANSFER || matches!(self.state, WriteState::Writing(..)) {
            return Err(StreamError::trap("written without a permit of check-write"));
        }
        let length = bytes.len();
        match self.node.write(&self.footprint, self.at, bytes) {
            Writing::Done(result) => self.finished(length, result),
            Writing::Begun(work) => self.state = WriteState::Writing(work, length),
        }
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.failure()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.failure()?;
        Ok(if matches!(self.state, WriteState::Writing(..)) { 0 } else { MAX_TRANSFER })
    }

    async fn blocking_write_and_flush(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.ready().await;
        self.write(bytes)?;
        self.ready().await;
        self.failure()
    }

    async fn cancel(&mut self) {
        // What a guest writes next must not overtake this.
        self.ready().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::granted::{Grant, Quota};

    const QUOTA: Quota = Quota { bytes: 1 << 30, files: 100 };

    fn granted_file(directory: &std::path::Path) -> Node {
        let root = Grant::open(directory, QUOTA).unwrap().holder().root();
        let options = Options { create: true, write: true, ..Options::default() };
        match root.open("file", true, options).unwrap() {
            Opened::File(file) => Node::File(Arc::new(file)),
            Opened::Directory(_) => panic!("it is a directory"),
        }
    }

    #[tokio::test]
    async fn what_many_streams_write_at_once_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let footprint = Footprint::new(Some(10 << 20));
        let node = granted_file(directory.path());
        let places = Arc::clone(footprint.disk_places());
        let all = Arc::clone(&places).acquire_many_owned(16).await.unwrap();
        let mut refused = 0;
        for number in 0..1000 {
            let footprint = Arc::clone(&footprint);
            let at = WriteAt::Offset(number << 18);
            let mut stream = WriteStream { node: node.clone(), footprint, at, state: WriteState::Idle };
            stream.write(vec![b'x'; MAX_TRANSFER].into()).unwrap();
            refused += u64::from(matches!(stream.state, WriteState::Failed(ErrorCode::InsufficientMemory)));
            // It is dropped, and its write goes on.
        }
        assert!(footprint.held() <= 10 << 20 && refused > 900, "{} and {refused}", footprint.held());
        drop(all);
        while footprint.held() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(node.stat().unwrap().0.size, (1000 - refused) << 18);
    }

    #[tokio::test]
    async fn a_read_is_begun_once_and_held() {
        let directory = tempfile::tempdir().unwrap();
        let footprint = Footprint::new(None);
        let node = granted_file(directory.path());
        node.write(&footprint, WriteAt::End, vec![b'x'; 1000].into()).finish().await.unwrap();
        let all = Arc::clone(footprint.disk_places()).acquire_many_owned(16).await.unwrap();
        let mut stream = ReadStream {
            node,
            footprint: Arc::clone(&footprint),
            position: 0,
            state: ReadState::Waiting(500),
        };
        for _ in 0..10 {
            // Another pollable was ready first.
            tokio::select! {
                biased;
                () = stream.ready() => panic!("there is no place for it"),
                () = std::future::ready(()) => {}
            }
            assert!(stream.read(100).unwrap().is_empty());
        }
        assert_eq!(footprint.held(), 500 + footprint::MESSAGE);
        drop(all);
        let bytes = stream.blocking_read(100).await.unwrap();
        assert_eq!(&bytes[..], [b'x'; 100]);
        drop(bytes);
        assert_eq!(footprint.held(), 0);
        assert_eq!(stream.position, 100);
    }
}
