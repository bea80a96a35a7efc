//! From what the user named (a file, a directory, a callable) to a program
//! that is linked and granted what it may use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use crate::artifact::Artifact;
use crate::build::{self, BuildOptions, Progress};
use crate::cache::Cache;
use crate::cli::{GrantArgs, SourceArgs};
use crate::config::{
    DEFAULT_INSTANCES, DEFAULT_LIMITS, DEFAULT_TEMPORARY, Environment, Limits, TenantConfig,
};
use crate::error::UserError;
use crate::files::granted::Quota;
use crate::files::{FileGrants, Files, memory};
use crate::footprint::Footprint;
use crate::guest_log::LineBudget;
use crate::instance::{self, Grants, Program};
use crate::key_derivation::Derivations;
use crate::network::NetworkGrants;
use crate::pool::Isolation;
use crate::scheduler::Share;
use crate::tenants::Shared;
use crate::units::Size;

/// Loads the built app of a tenant.
///
/// # Errors
///
/// A [`UserError`] if it is not one of ours.
pub fn load_artifact(
    shared: &Shared,
    config: &TenantConfig,
    share: Arc<Share>,
    footprint: Arc<Footprint>,
) -> Result<(Program, Grants)> {
    let artifact = Artifact::open(&config.app)?;
    let digests = artifact.digests(&shared.cache)?;
    let code = shared.loader.load(&artifact, &digests, shared.sharing, &|step| {
        tracing::info!("{step}; later starts reuse the result");
    })?;
    let program = Program::link(&shared.engine, &code).map_err(|error| {
        UserError::new(format!("`{}` is not a WSGI app for this host: {error:#}", config.app.display()))
            .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
    })?;
    let files = Files::new(artifact.unpack_layers(&shared.cache, &digests)?, &config.files)?;
    let mut environment =
        artifact.manifest().map(|manifest| manifest.environment.clone()).unwrap_or_default();
    environment.extend(config.environment.0.clone());
    let grants = Grants {
        name: Arc::from(&*config.name),
        memory: usize::try_from(config.limits.memory).unwrap_or(usize::MAX),
        environment: environment.into_iter().collect(),
        files,
        derivations: Arc::new(Derivations::new(Arc::clone(&share))),
        share,
        scheduler: Arc::clone(&shared.scheduler),
        footprint,
        network: Arc::new(NetworkGrants::new(config.network.clone(), config.traffic)),
        log: Arc::new(LineBudget::new(config.limits.log_lines)),
    };
    Ok((program, grants))
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
        limits: Limits { memory: grants.memory.0, ..DEFAULT_LIMITS },
        environment: Environment(grants.env.iter().cloned().collect()),
        files: FileGrants {
            temporary: memory::Limits { bytes: grants.tmp.0, files: DEFAULT_TEMPORARY.files },
            data: grants
                .data
                .clone()
                .map(|path| (path, Quota { bytes: grants.data_quota.0, files: grants.data_files })),
        },
        network: grants.network.clone(),
        traffic: grants.network_quota.0,
        health: None,
        weight: 1,
    })
}

/// The artifact that `name` stands for.
fn locate(cache: &Cache, name: Option<&str>, source: &SourceArgs) -> Result<PathBuf> {
    let named_directory = source.build.dir.as_deref();
    let build = |application, directory| {
        let options =
            BuildOptions { application, directory, project: &source.build, environment: &source.build_env };
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
