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
use granted::{Grant, Holder, Quota};
use image::Image;
use memory::{Limits, Memory};

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

    /// The mounts of a new instance.
    pub fn space(self: &Arc<Self>) -> FileSpace {
        FileSpace {
            files: Arc::clone(self),
            temporary: Memory::new(self.temporary),
            data: self.data.as_ref().map(Grant::holder),
        }
    }
}
