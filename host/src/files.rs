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

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;

use crate::artifact::Layer;
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
}

/// The mounts of one instance.
#[derive(Debug)]
pub struct FileSpace {
    files: Arc<Files>,
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
        Ok(Arc::new(Files { images, temporary: grants.temporary, data }))
    }

    /// The mounts of a new instance of the tenant with this footprint.
    pub fn space(self: &Arc<Self>, footprint: &Arc<Footprint>) -> FileSpace {
        FileSpace {
            files: Arc::clone(self),
            temporary: Memory::new(self.temporary, footprint.hold(0)),
            data: self.data.as_ref().map(Grant::holder),
        }
    }
}

impl FileSpace {
    /// Opens the file that the guest sees at the absolute `guest_path`, for
    /// the host to send: a file of ours, and where in it the guest's starts
    /// and how long that is. None if there is none, or it is in memory.
    pub async fn open_for_sending(&self, guest_path: &str) -> Option<(File, u64, u64)> {
        let below = |mount: &str| guest_path.strip_prefix(mount)?.strip_prefix('/');
        for (mount, image) in &self.files.images {
            let Some(path) = below(mount) else { continue };
            let node = image.look_up(Image::ROOT, path).ok()?;
            let (file, start, _) = image.place(node, 0, 0).ok()?;
            return Some((file.try_clone().ok()?, start, image.stat(node).size));
        }
        let (path, holder) = (below(DATA)?.to_owned(), Arc::clone(self.data.as_ref()?));
        let open = move || {
            let options = Options::default();
            let Opened::File(file) = holder.root().open(&path, true, options).ok()? else {
                return None;
            };
            let file = file.file().try_clone().ok()?;
            let size = file.metadata().ok()?.len();
            Some((file, 0, size))
        };
        // What is granted may be on a slow disk.
        tokio::task::spawn_blocking(open).await.ok().flatten()
    }
}
