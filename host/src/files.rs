//! The directories that a guest sees.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use cap_std::ambient_authority;
use cap_std::fs::Dir;
use tempfile::TempDir;
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

use crate::artifact::Layer;
use crate::error::UserError;

/// Where a guest may keep files for the time of its life.
const TEMPORARY: &str = "/tmp";
/// Where a guest sees the directory that `--data` grants.
const DATA: &str = "/data";

/// What instances of one app may see of the host's files.
#[derive(Debug)]
pub struct Files {
    layers: Vec<(Layer, PathBuf)>,
    data: Option<PathBuf>,
    /// Spaces that no instance uses, empty.
    free: Mutex<Vec<FileSpace>>,
}

/// The mounts of one instance: what all share, and a `/tmp` of its own.
///
/// Opening directories costs several system calls, so a space outlives its
/// instance and serves the next one of the same app, with `/tmp` emptied.
pub struct FileSpace {
    mounts: WasiFilesystemCtx,
    temporary: TempDir,
}

impl std::fmt::Debug for FileSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSpace").field("temporary", &self.temporary.path()).finish_non_exhaustive()
    }
}

impl Files {
    /// Grants `layers` read-only and `data`, if there is one, for writing.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if `data` is no directory.
    pub fn new(layers: Vec<(Layer, PathBuf)>, data: Option<&Path>) -> Result<Arc<Files>> {
        let data = match data {
            None => None,
            Some(path) if path.is_dir() => {
                Some(path.canonicalize().with_context(|| format!("failed to resolve `{}`", path.display()))?)
            }
            Some(path) => {
                return Err(UserError::new(format!(
                    "the data directory `{}` does not exist",
                    path.display()
                ))
                .remedy(format!("make it with `mkdir {}`", path.display()))
                .into());
            }
        };
        let files = Files { layers, data, free: Mutex::default() };
        // Finds a mount that does not open now, not at the first request.
        let first = files.open()?;
        files.give_back(first);
        Ok(Arc::new(files))
    }

    /// A space for a new instance.
    ///
    /// # Errors
    ///
    /// If a directory can not be opened or made.
    pub fn take(&self) -> Result<FileSpace> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match free {
            Some(space) => Ok(space),
            None => self.open(),
        }
    }

    /// Takes back the space of an instance that is gone.
    pub fn recycle(self: &Arc<Self>, space: FileSpace) {
        let used = std::fs::read_dir(space.temporary.path()).map(|mut entries| entries.next().is_some());
        if matches!(used, Ok(false)) {
            return self.give_back(space);
        }
        // Deleting what a guest left may take long.
        let files = Arc::clone(self);
        let clean = move || {
            let mut emptied = true;
            if let Ok(entries) = std::fs::read_dir(space.temporary.path()) {
                for entry in entries.flatten() {
                    let path = entry.path();
                    let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                    let removed = if is_directory {
                        std::fs::remove_dir_all(&path)
                    } else {
                        std::fs::remove_file(&path)
                    };
                    emptied &= removed.is_ok();
                }
            }
            // Else it is dropped, which tries once more.
            if emptied {
                files.give_back(space);
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(clean)),
            Err(_) => clean(),
        }
    }

    /// Opens the file that a guest with `space` sees at the absolute
    /// `guest_path`, for the host to read. Nothing outside its mounts is
    /// found: no link leads out of them.
    ///
    /// # Errors
    ///
    /// If there is no such file.
    pub async fn open_for_sending(
        &self,
        space: &FileSpace,
        guest_path: &str,
    ) -> std::io::Result<std::fs::File> {
        let layers = self.layers.iter().map(|(layer, path)| (layer.guest_path(), path.as_path()));
        let own = [(TEMPORARY, Some(space.temporary.path())), (DATA, self.data.as_deref())];
        let own = own.into_iter().filter_map(|(guest_path, path)| Some((guest_path, path?)));
        let (directory, rest) = layers
            .chain(own)
            .find_map(|(mount, path)| {
                let rest = guest_path.strip_prefix(mount)?.strip_prefix('/')?;
                Some((path.to_path_buf(), rest.to_owned()))
            })
            .ok_or(std::io::ErrorKind::NotFound)?;
        let open = move || {
            let directory = Dir::open_ambient_dir(directory, ambient_authority())?;
            // Opening a pipe would wait for its other end.
            if !directory.metadata(&rest)?.is_file() {
                return Err(std::io::ErrorKind::NotFound.into());
            }
            Ok(directory.open(&rest)?.into_std())
        };
        tokio::task::spawn_blocking(open).await?
    }

    fn give_back(&self, space: FileSpace) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(space);
    }

    fn open(&self) -> Result<FileSpace> {
        let temporary = tempfile::Builder::new()
            .prefix("wsgi-wasm-")
            .tempdir()
            .context("failed to create a directory for an instance's `/tmp`")?;
        let mut builder = WasiCtxBuilder::new();
        let mut mount = |path: &Path, guest_path: &str, permissions| {
            builder
                .preopened_dir(path, guest_path, permissions)
                .map(|_| ())
                .map_err(anyhow::Error::from)
                .with_context(|| format!("failed to open `{}` for `{guest_path}`", path.display()))
        };
        for (layer, path) in &self.layers {
            mount(path, layer.guest_path(), FsPerms::ReadOnly)?;
        }
        mount(temporary.path(), TEMPORARY, FsPerms::ReadWrite)?;
        if let Some(data) = &self.data {
            mount(data, DATA, FsPerms::ReadWrite)?;
        }
        let mounts = std::mem::take(builder.build().filesystem());
        Ok(FileSpace { mounts, temporary })
    }
}

impl FileSpace {
    /// The mounts, for the WASI context of an instance.
    pub fn mounts(&self) -> WasiFilesystemCtx {
        self.mounts.clone()
    }
}
