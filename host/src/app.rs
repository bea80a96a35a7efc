//! From what the user named (a file, a directory, a callable) to a program
//! that is linked and granted what it may use.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use crate::artifact::{Artifact, Digests, Layer};
use crate::build::{self, BuildOptions, Progress};
use crate::cache::{Cache, Key};
use crate::cli::{GrantArgs, SourceArgs};
use crate::code::Code;
use crate::config::{
    DEFAULT_INSTANCES, DEFAULT_LIMITS, DEFAULT_TEMPORARY, Environment, Limits, TenantConfig,
};
use crate::error::UserError;
use crate::files::granted::Quota;
use crate::files::image::Image;
use crate::files::{FileGrants, Files, memory};
use crate::instance::{self, Grants, Program};
use crate::pool::Isolation;
use crate::static_files::Mount;
use crate::tenants::{Books, Shared};
use crate::units::Size;

/// Directories of static files that an app can bring. Each request of it is
/// compared with all of them.
const MAX_MOUNTS: usize = 64;

/// What a tenant's app comes to.
pub struct Loaded {
    /// Its code.
    pub program: Program,
    /// What its instances may use.
    pub grants: Grants,
    /// The directories whose files are served without it.
    pub mounts: Vec<Mount>,
    /// Digest of its code and files.
    pub digest: String,
}

/// Loads the built app of a tenant.
///
/// # Errors
///
/// A [`UserError`] if it is not one of ours.
pub fn load_artifact(shared: &Shared, config: &TenantConfig, books: &Books) -> Result<Loaded> {
    let artifact = Artifact::open(&config.app)?;
    let digests = artifact.digests(&shared.cache)?;
    let code = shared.loader.load(&artifact, &digests, shared.sharing, &|step| {
        tracing::info!("{step}; later starts reuse the result");
    })?;
    link(shared, config, books, &artifact, &digests, &code)
}

/// Links the `code` of an artifact with what its tenant may use.
///
/// # Errors
///
/// As for [`load_artifact`].
pub fn link(
    shared: &Shared,
    config: &TenantConfig,
    books: &Books,
    artifact: &Artifact,
    digests: &Digests,
    code: &Code,
) -> Result<Loaded> {
    let program = Program::link(&shared.engine, code).map_err(|error| {
        UserError::new(format!("`{}` is not a WSGI app for this host: {error:#}", config.app.display()))
            .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
    })?;
    let layers = artifact.unpack_layers(&shared.cache, digests)?;
    let mounts = mounts(config, artifact, &layers)?;
    let mounts = mounts.into_iter().map(|mount| mount.of(&books.footprint)).collect();
    let files = Files::new(layers, &config.files)?;
    let mut environment =
        artifact.manifest().map(|manifest| manifest.environment.clone()).unwrap_or_default();
    environment.extend(config.environment.0.clone());
    let grants = Grants {
        name: Arc::from(&*config.name),
        memory: usize::try_from(config.limits.memory).unwrap_or(usize::MAX),
        environment: environment.into_iter().collect(),
        files,
        derivations: Arc::clone(&books.derivations),
        share: Arc::clone(&books.share),
        footprint: Arc::clone(&books.footprint),
        network: Arc::clone(&books.network),
        log: Arc::clone(&books.log),
    };
    let digest = Key::default()
        .with(serde_json::to_vec(digests)?)
        .with(serde_json::to_vec(&artifact.manifest())?)
        .finish();
    Ok(Loaded { program, grants, mounts, digest })
}

/// The directories that the configuration names, and then those that the app brings.
fn mounts(config: &TenantConfig, artifact: &Artifact, layers: &[(Layer, PathBuf)]) -> Result<Vec<Mount>> {
    let refuse = |prefix: &str, reason: String| {
        UserError::new(format!("can not serve static files under `{prefix}`: {reason}"))
    };
    let mut mounts = Vec::new();
    for (prefix, path) in &config.static_files {
        mounts.push(Mount::directory(prefix, path).map_err(|reason| refuse(prefix, reason))?);
    }
    let of_app = artifact.manifest().map(|manifest| &manifest.static_files);
    let Some(of_app) = of_app.filter(|of_app| !of_app.is_empty()) else { return Ok(mounts) };
    if of_app.len() > MAX_MOUNTS {
        let reason = format!("it is one of {}, and an app can have {MAX_MOUNTS}", of_app.len());
        return Err(refuse("/", reason).into());
    }
    let Some((_, path)) = layers.iter().find(|(layer, _)| *layer == Layer::App) else {
        let prefix = of_app.keys().next().map_or("/", String::as_str);
        return Err(refuse(prefix, "the file has no layer `app`, which they are in".into()).into());
    };
    let image = Image::open(path)?;
    // The cache names a layer by the digest of its content.
    let digest = Arc::from(path.file_name().unwrap_or_default().to_string_lossy());
    for (prefix, directory) in of_app {
        let mount = Mount::layer(prefix, &image, directory, &digest);
        mounts.push(mount.map_err(|reason| refuse(prefix, reason))?);
    }
    Ok(mounts)
}

/// What the options of a command say of the app that it names, which is built
/// first if it is a directory or a callable.
///
/// # Errors
///
/// A [`UserError`] if there is no such app, or it does not build.
pub fn only_tenant(
    cache: &Cache,
    name: Option<&str>,
    source: &SourceArgs,
    grants: &GrantArgs,
) -> Result<TenantConfig> {
    let app = locate(cache, name, source)?;
    let name =
        name.map(Path::new).and_then(Path::file_stem).map_or("app".into(), |stem| stem.to_string_lossy());
    Ok(TenantConfig {
        name: name.into_owned(),
        app,
        hosts: Vec::new(),
        path: String::new(),
        isolation: Isolation::default(),
        instances: DEFAULT_INSTANCES,
        limits: Limits { memory: grants.memory.0, total_memory: None, ..DEFAULT_LIMITS },
        environment: Environment(grants.env.iter().cloned().collect()),
        secrets: Vec::new(),
        files: FileGrants {
            temporary: memory::Limits { bytes: grants.tmp.0, files: DEFAULT_TEMPORARY.files },
            data: grants
                .data
                .clone()
                .map(|path| (path, Quota { bytes: grants.data_quota.0, files: grants.data_files })),
        },
        network: grants.network.clone(),
        traffic: grants.network_quota.0,
        static_files: BTreeMap::new(),
        health: None,
        weight: 1,
    })
}

/// The artifact that `name` stands for.
fn locate(cache: &Cache, name: Option<&str>, source: &SourceArgs) -> Result<PathBuf> {
    let named_directory = source.build.dir.as_deref();
    let build = |application, directory| {
        let options = BuildOptions {
            application,
            directory,
            project: &source.build,
            environment: &source.build_env,
            static_files: BTreeMap::new(),
        };
        build::build(cache, &options, &Progress::new())
    };
    let Some(name) = name else {
        return build(None, named_directory.unwrap_or(Path::new(".")));
    };
    let path = Path::new(name);
    if path.is_file() || path.extension().is_some_and(|extension| extension == "wasm") {
        if let Some(option) = source.given() {
            return Err(UserError::new(format!(
                "`{option}` has no effect on `{name}`, which is built already"
            ))
            .remedy("name the project's directory or `MODULE:CALLABLE` to build it first")
            .into());
        }
        return Ok(path.to_path_buf());
    }
    if path.is_dir() {
        if named_directory.is_some() {
            return Err(UserError::new(format!("`{name}` is a directory, and `--dir` names another one"))
                .remedy("give one of the two")
                .into());
        }
        return build(None, path);
    }
    if let Some((directory, module)) = name.rsplit_once('/') {
        let remedy = if Path::new(directory).is_dir() {
            format!("write `{module} --dir {directory}`")
        } else {
            "build an app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`".into()
        };
        return Err(UserError::new(format!("there is no file or directory `{name}`")).remedy(remedy).into());
    }
    build(Some(name), named_directory.unwrap_or(Path::new(".")))
}

/// Why the first instance could not be made, for the user.
pub fn refuse_start(name: &str, memory: u64, error: &wasmtime::Error) -> anyhow::Error {
    let text = instance::explain(error).0;
    if text.contains("memory") && text.contains("limit") || text.contains("minimum size") {
        return UserError::new(format!("the app `{}` does not fit in {}: {text}", name, Size(memory)))
            .remedy("raise the limit with `--memory`, for example `--memory 256MiB`")
            .into();
    }
    UserError::new(format!("failed to start the app `{name}`: {text}")).into()
}
