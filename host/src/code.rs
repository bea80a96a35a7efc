//! From a component to machine code in memory: compiled once per content in a
//! process of its own, kept in the cache, mapped from there.

use std::hash::{Hash as _, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::artifact::Artifact;
use crate::cache::{Bucket, Cache, Key};
use crate::engine;
use crate::error::UserError;

/// Loads the machine code of `artifact`, which is compiled if the cache does
/// not have it; `progress` hears about that, since it takes seconds.
///
/// # Errors
///
/// A [`UserError`] if the component is not valid.
pub fn load(
    engine: &Engine,
    cache: &Cache,
    artifact: &Artifact,
    progress: &dyn Fn(&str),
) -> Result<Component> {
    let path = compiled(engine, cache, artifact, progress)?;
    // SAFETY: wasmtime trusts the file to be what its own compiler wrote. The
    // entry is named by the digest of the component and of all settings; only
    // `compile` below writes it, by a rename when it is complete; and the
    // cache refuses a directory that another user owns or may write. Whoever
    // can still change it runs as this user and needs no such detour.
    #[expect(unsafe_code, reason = "mapping precompiled code is what makes a start fast")]
    let component = unsafe { Component::deserialize_file(engine, &path) };
    component
        .map_err(anyhow::Error::from)
        .with_context(|| format!("failed to load the machine code `{}`", path.display()))
}

/// The cache entry with the machine code of `artifact`.
///
/// # Errors
///
/// As for [`load`].
pub fn compiled(
    engine: &Engine,
    cache: &Cache,
    artifact: &Artifact,
    progress: &dyn Fn(&str),
) -> Result<PathBuf> {
    let mut settings = StableHasher::default();
    engine.precompile_compatibility_hash().hash(&mut settings);
    let key =
        Key::new(Bucket::Compiled).with(settings.0.finalize()).with(artifact.component_digest()).finish();
    cache.get_or_make(Bucket::Compiled, &key, |entry| {
        progress("compiling to machine code");
        compile_in_child(&artifact.component(), entry).map_err(|error| match error {
            CompileError::Invalid(reason) => {
                UserError::new(format!("`{}` is not a valid component: {reason}", artifact.path.display()))
                    .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
                    .into()
            }
            CompileError::Failed(error) => error,
        })
    })
}

/// Why a component was not compiled.
enum CompileError {
    /// The component's fault, in wasmtime's words.
    Invalid(String),
    /// Ours or the machine's.
    Failed(anyhow::Error),
}

/// Compiles in a child process of this binary: a compiler in the server would
/// leave some 200 MB of its memory behind, and a compiler bug that a hostile
/// component provokes should not end the server.
fn compile_in_child(component: &[u8], output: &Path) -> Result<(), CompileError> {
    let run = || -> Result<std::process::Output> {
        let binary = std::env::current_exe().context("failed to find our own binary")?;
        let input = output.with_extension("component");
        std::fs::write(&input, component)
            .with_context(|| format!("failed to write `{}`", input.display()))?;
        Command::new(binary)
            .arg("compile")
            .arg(&input)
            .arg(output)
            .stdin(Stdio::null())
            .output()
            .context("failed to start the compiler process")
    };
    let done = run().map_err(CompileError::Failed)?;
    let message = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    match done.status.code() {
        Some(0) => Ok(()),
        Some(status) if status == i32::from(crate::error::EXIT_USAGE) => {
            Err(CompileError::Invalid(message.trim_start_matches("error: ").to_owned()))
        }
        _ => Err(CompileError::Failed(anyhow::anyhow!(
            "the compiler process ended with {}: {message}",
            done.status
        ))),
    }
}

/// Compiles the component in the file `input` into the file `output`. The
/// child's side of [`compiled`].
///
/// # Errors
///
/// A [`UserError`] if the component is not valid.
pub fn compile(input: &Path, output: &Path) -> Result<()> {
    let component = std::fs::read(input).with_context(|| format!("failed to read `{}`", input.display()))?;
    let engine = engine::compiler().map_err(anyhow::Error::from)?;
    if component.len() < 8 {
        bail!("`{}` is empty", input.display());
    }
    let code =
        engine.precompile_component(&component).map_err(|error| UserError::new(format!("{error:#}")))?;
    std::fs::write(output, code).with_context(|| format!("failed to write `{}`", output.display()))
}

/// A hasher whose result means the same in every process, unlike the standard
/// library's.
#[derive(Default)]
struct StableHasher(Sha256);

impl Hasher for StableHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest = self.0.clone().finalize();
        digest.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}
