//! From what the user named (a file, a directory, a callable) to a program
//! that is linked and granted what it may use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use wasmtime::Engine;

use crate::artifact::Artifact;
use crate::build::{self, BuildOptions, Progress};
use crate::cache::Cache;
use crate::cli::{GrantArgs, ProjectArgs};
use crate::code;
use crate::error::UserError;
use crate::files::granted::Quota;
use crate::files::memory::Limits;
use crate::files::{FileGrants, Files};
use crate::instance::{Grants, Program};
use crate::network::NetworkGrants;
use crate::units::Size;

/// Files and directories that an instance may keep in its `/tmp`.
const TEMPORARY_FILES: u64 = 1000;

/// An app ready to be instantiated.
pub struct LoadedApp {
    /// Its code.
    pub program: Program,
    /// What its instances may use.
    pub grants: Grants,
}

/// Loads the app that `name` stands for, which is built first if it is a
/// directory or a callable.
///
/// # Errors
///
/// A [`UserError`] if there is no such app, it does not build, or it is not
/// one of ours.
pub fn load(engine: &Engine, name: &str, project: &ProjectArgs, grants: &GrantArgs) -> Result<LoadedApp> {
    let cache = Cache::open()?;
    let path = locate(&cache, name, project, grants)?;
    let artifact = Artifact::open(&path)?;
    let component = code::load(engine, &cache, &artifact, &|step| {
        tracing::info!("{step}; later starts reuse the result");
    })?;
    let program = Program::link(engine, &component).map_err(|error| {
        UserError::new(format!("`{}` is not a WSGI app for this host: {error:#}", path.display()))
            .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
    })?;
    let files = Files::new(artifact.unpack_layers(&cache)?, &file_grants(grants))?;
    let mut environment =
        artifact.manifest().map(|manifest| manifest.environment.clone()).unwrap_or_default();
    environment.extend(grants.env.iter().cloned());
    let stem = Path::new(name).file_stem().map_or(name.into(), |stem| stem.to_string_lossy());
    let name = if stem.is_empty() { "app".into() } else { stem };
    let grants = Grants {
        name: Arc::from(&*name),
        memory: usize::try_from(grants.memory.0).unwrap_or(usize::MAX),
        environment: environment.into_iter().collect(),
        files,
        network: Arc::new(NetworkGrants::new(grants.network.clone(), grants.network_quota.0)),
    };
    Ok(LoadedApp { program, grants })
}

/// What the options say about files.
fn file_grants(grants: &GrantArgs) -> FileGrants {
    let quota = Quota { bytes: grants.data_quota.0, files: grants.data_files };
    FileGrants {
        temporary: Limits { bytes: grants.tmp.0, files: TEMPORARY_FILES },
        data: grants.data.clone().map(|path| (path, quota)),
    }
}

/// The artifact that `name` stands for.
fn locate(cache: &Cache, name: &str, project: &ProjectArgs, grants: &GrantArgs) -> Result<PathBuf> {
    let path = Path::new(name);
    let looks_like_a_file = path.is_file() || path.extension().is_some_and(|extension| extension == "wasm");
    if looks_like_a_file {
        if let Some(option) = project.given() {
            return Err(UserError::new(format!(
                "`{option}` has no effect on `{name}`, which is built already"
            ))
            .remedy("name the project's directory or `MODULE:CALLABLE` to build it first")
            .into());
        }
        return Ok(path.to_path_buf());
    }
    let (application, directory) = if path.is_dir() {
        if project.dir.is_some() {
            return Err(UserError::new(format!("`{name}` is a directory, and `--dir` names another one"))
                .remedy("give one of the two")
                .into());
        }
        (None, path)
    } else if name.contains('/') {
        return Err(UserError::new(format!("there is no file or directory `{name}`"))
            .remedy("build an app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
            .into());
    } else {
        (Some(name), project.dir.as_deref().unwrap_or(Path::new(".")))
    };
    let options = BuildOptions { application, directory, project, environment: &grants.env };
    build::build(cache, &options, &Progress::new())
}

/// Why the first instance could not be made, for the user.
pub fn refuse_start(name: &str, memory: Size, error: wasmtime::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    if text.contains("memory") && text.contains("limit") || text.contains("minimum size") {
        return UserError::new(format!("the app `{}` does not fit in {memory}: {text}", name))
            .remedy("raise the limit with `--memory`, for example `--memory 256MiB`")
            .into();
    }
    anyhow::Error::from(error).context(format!("failed to start the app `{}`", name))
}
