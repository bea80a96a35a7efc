//! The files that a guest sees: three kinds of mounts behind one
//! `wasi:filesystem`.
//!
//! | path                      | module    | what it is                                         |
//! |---------------------------|-----------|----------------------------------------------------|
//! | `/python`, `/0`, `/1`     | `image`   | a layer of the app, read-only, shared by all        |
//! | `/tmp`                    | `memory`  | the instance's own, in memory, bounded              |
//! | `/data`                   | `granted` | a directory of the host, with a quota               |
//!
//! `host` is the interface, `path` what it means by a path. An instance's
//! mounts cost no system call, and no descriptor but for files in `/data`.

pub mod granted;
pub mod host;
pub mod image;
pub mod memory;
mod path;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;

use crate::artifact::Layer;
use crate::disk;
use crate::file_part::{FileToSend, Source};
use crate::footprint::Footprint;
use granted::{Grant, Holder, Opened, Quota};
use image::Image;
use memory::{Limits, Memory, Options};

/// Where a guest may keep files for the time of its life.
const TEMPORARY: &str = "/tmp";
/// Where a guest sees the directory that is granted to it.
const DATA: &str = "/data";

/// What an app may have besides its layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileGrants {
    /// Bounds of each instance's `/tmp`.
    pub temporary: Limits,
    /// The directory that becomes `/data`.
    pub data: Option<(PathBuf, Quota)>,
}

/// What instances of one app may see of files.
#[derive(Debug)]
pub struct Files {
    images: Vec<(&'static str, Arc<Image>)>,
    temporary: Limits,
    data: Option<Arc<Grant>>,
    /// What is sent of it has a share of its own.
    sent: Option<Arc<Holder>>,
}

/// The mounts of one instance.
#[derive(Debug)]
pub struct FileSpace {
    files: Arc<Files>,
    footprint: Arc<Footprint>,
    temporary: Memory,
    data: Option<Arc<Holder>>,
}

impl Files {
    /// Mounts `layers`, each an image in the cache, and what `grants` says.
    ///
    /// Reads the images' trees and adds up what the granted directory holds:
    /// not for a runtime's thread.
    ///
    /// # Errors
    ///
    /// A [`UserError`](crate::error::UserError) if the granted directory does
    /// not exist.
    pub fn new(layers: Vec<(Layer, PathBuf)>, grants: &FileGrants) -> Result<Arc<Files>> {
        let images = layers
            .into_iter()
            .map(|(layer, path)| Ok((layer.guest_path(), Image::open(&path)?)))
            .collect::<Result<_>>()?;
        let data = grants.data.as_ref().map(|(path, quota)| Grant::open(path, *quota)).transpose()?;
        let sent = data.as_ref().map(Grant::sender);
        Ok(Arc::new(Files { images, temporary: grants.temporary, data, sent }))
    }

    /// The mounts of a new instance of the tenant with this footprint.
    pub fn space(self: &Arc<Self>, footprint: &Arc<Footprint>) -> FileSpace {
        FileSpace {
            files: Arc::clone(self),
            footprint: Arc::clone(footprint),
            temporary: Memory::new(self.temporary, footprint.hold(0)),
            data: self.data.as_ref().map(Grant::holder),
        }
    }
}

impl FileSpace {
    /// Opens the file that the guest sees at the absolute `guest_path`, for
    /// the host to send. None if there is none, it is in memory, or the tenant
    /// sends as many files as it may.
    pub async fn open_for_sending(&self, guest_path: &str) -> Option<FileToSend> {
        let below = |mount: &str| guest_path.strip_prefix(mount)?.strip_prefix('/');
        let place = self.footprint.file_place()?;
        for (mount, image) in &self.files.images {
            let Some(path) = below(mount) else { continue };
            let node = image.look_up(Image::ROOT, path).ok()?;
            let (file, start, _) = image.place(node, 0, 0).ok()?;
            let (source, size) = (Source::Shared(Arc::clone(file)), image.stat(node).size);
            return Some(FileToSend::new(source, (start, size), &self.footprint, place));
        }
        let (path, holder) = (below(DATA)?.to_owned(), Arc::clone(self.files.sent.as_ref()?));
        let open = move || {
            let options = Options::default();
            let Opened::File(file) = holder.root().open(&path, true, options).ok()? else {
                return None;
            };
            let size = file.file().metadata().ok()?.len();
            Some((file, size))
        };
        // What is granted may be on a slow disk.
        let (file, size) = disk::begin(&self.footprint, open).await.flatten()?;
        Some(FileToSend::new(Source::Granted(file), (0, size), &self.footprint, place))
    }
}
