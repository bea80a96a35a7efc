//! From a component to machine code in memory: compiled once per content in a
//! process of its own, kept in the cache, mapped from there.
//!
//! All apps with the same interpreter and interfaces share one *skeleton*,
//! which holds the code; an app's own part is its memory. The crate
//! `wsgi-wasm-skeleton` takes components apart. What it refuses is compiled
//! whole, and a skeleton that it can not merge is compiled as it is.
//!
//! | cache entry           | key                          | content                           |
//! |-----------------------|------------------------------|-----------------------------------|
//! | `compiled/`*app*      | digest of the component      | `layout.json`, and `tenant.cwasm` |
//! |                       |                              | or `whole.cwasm`                  |
//! | `skeletons/`*skeleton*| digest of the skeleton       | a component's machine code        |
//! | `skeletons/`*another* | digest of the key above      | the same, optimized: see          |
//! |                       |                              | [`optimize`]                      |
//!
//! The settings of the engine are in each key, too.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash as _, Hasher};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, nice, setrlimit};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use wasmtime::component::Component;
use wasmtime::{Engine, Module};

use crate::artifact::{Artifact, Digests};
use crate::cache::{self, Bucket, CACHE_VARIABLE, Cache, Key};
use crate::engine;
use crate::error::UserError;
use crate::guest_log::Printable;
use crate::units::Size;

/// What compiling one component may take. An interpreter takes about half a
/// gigabyte and 15 seconds of processor time; a component of 35 kB that is made
/// for it could take all memory there is, and hours.
const COMPILE_MEMORY: u64 = 2 << 30;
const COMPILE_SECONDS: u64 = 180;
/// Bytes of the compiler's message that are passed on.
const MAX_MESSAGE: usize = 2000;

/// Files of an app's entry.
const LAYOUT: &str = "layout.json";
pub const TENANT: &str = "tenant.cwasm";
const WHOLE: &str = "whole.cwasm";

/// An app's machine code, ready to be linked.
pub struct Code {
    /// All code: the app's own component or a skeleton.
    pub component: Component,
    /// The app's memory, which a skeleton imports.
    pub tenant: Option<Module>,
    /// How the code is laid out.
    pub layout: Layout,
}

/// How much of an app's code is shared with other apps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// None: the component was compiled whole.
    Whole,
    /// All, in the core modules that it came in.
    Split,
    /// All, in one core module.
    Merged,
}

/// How an app's code is laid out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Layout {
    /// How much of it is shared.
    pub sharing: Sharing,
    /// Key of the skeleton, if it is shared.
    pub skeleton: Option<String>,
    /// Why it is not shared, or not merged.
    pub reason: Option<String>,
    /// Whether what is shared went through [`optimize`] on this host.
    #[serde(default)]
    pub optimized: bool,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sharing {
            Sharing::Whole => write!(f, "not shared with other apps")?,
            Sharing::Split | Sharing::Merged => write!(f, "shared by all apps with skeleton ")?,
        }
        if let Some(skeleton) = &self.skeleton {
            write!(f, "{}", skeleton.get(..12).unwrap_or(skeleton))?;
        }
        if self.optimized {
            write!(f, ", optimized")?;
        }
        match (self.sharing, &self.reason) {
            (Sharing::Split, Some(reason)) => write!(f, ", not merged: {reason}"),
            (_, Some(reason)) => write!(f, ": {reason}"),
            (_, None) => Ok(()),
        }
    }
}

/// Loads apps for one engine. Apps that share a skeleton share its mapping.
pub struct Loader {
    engine: Engine,
    cache: Cache,
    /// The skeletons that are mapped, by their keys.
    skeletons: Mutex<HashMap<String, Component>>,
}

impl Loader {
    /// A loader that has loaded nothing.
    pub fn new(engine: &Engine, cache: &Cache) -> Loader {
        Loader { engine: engine.clone(), cache: cache.clone(), skeletons: Mutex::default() }
    }

    /// Loads the machine code of `artifact` with these `digests`, which is compiled if the cache
    /// does not have it; `progress` hears about that, since it may take
    /// seconds. As much is shared as possible, or as `sharing` demands.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if the component is not valid.
    pub fn load(
        &self,
        artifact: &Artifact,
        digests: &Digests,
        sharing: Option<Sharing>,
        progress: &dyn Fn(&str),
    ) -> Result<Code> {
        let compile = |entry: &Path| {
            progress("compiling to machine code");
            compile_in_child(&self.cache, artifact, digests, sharing, entry)
        };
        let mut key = Key::new(Bucket::Compiled)
            .with(settings(&self.engine))
            .with(wsgi_wasm_skeleton::VERSION.to_le_bytes())
            .with(&digests.component);
        if let Some(sharing) = sharing {
            key.add([sharing as u8]);
        }
        let entry = self.cache.get_or_make(Bucket::Compiled, &key.finish(), compile)?;
        self.map(&entry, sharing, &compile)
    }

    /// The same for once: the app's own part is not put into the cache but into the
    /// new `directory`, with its memory in the file [`TENANT`].
    ///
    /// # Errors
    ///
    /// As for [`Loader::load`].
    pub fn load_once(&self, artifact: &Artifact, digests: &Digests, directory: &Path) -> Result<Code> {
        let compile = |entry: &Path| compile_in_child(&self.cache, artifact, digests, None, entry);
        compile(directory)?;
        self.map(directory, None, &compile)
    }

    /// Maps what is in `entry`, the app's own part; what is shared is made again by
    /// `compile` if it is gone.
    fn map(
        &self,
        entry: &Path,
        sharing: Option<Sharing>,
        compile: &dyn Fn(&Path) -> Result<()>,
    ) -> Result<Code> {
        let layout_path = entry.join(LAYOUT);
        let layout = std::fs::read(&layout_path)
            .with_context(|| format!("failed to read `{}`", layout_path.display()))?;
        let layout: Layout = serde_json::from_slice(&layout)
            .with_context(|| format!("failed to read `{}`", layout_path.display()))?;
        let mut layout = layout;
        let Some(skeleton) = &layout.skeleton else {
            let component = self.map_component(&entry.join(WHOLE))?;
            return Ok(Code { component, tenant: None, layout });
        };
        let optimized = optimized_key(skeleton);
        if sharing.is_none() && self.cache.get(Bucket::Skeletons, &optimized).is_some() {
            let component = self.skeleton(&optimized)?;
            let tenant = Some(self.map_module(&entry.join(TENANT))?);
            layout.optimized = true;
            return Ok(Code { component, tenant, layout });
        }
        if self.cache.get(Bucket::Skeletons, skeleton).is_none() {
            // Removed from the cache while the app's own part was not.
            // Compiling the app again makes it; the app's part is there.
            let scratch = tempfile::tempdir_in(self.cache.root())?;
            compile(&scratch.path().join("entry"))?;
        }
        let component = self.skeleton(skeleton)?;
        let tenant = Some(self.map_module(&entry.join(TENANT))?);
        Ok(Code { component, tenant, layout })
    }

    /// The skeleton `key`, mapped once for all its apps.
    fn skeleton(&self, key: &str) -> Result<Component> {
        let mut skeletons = self.skeletons.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(skeleton) = skeletons.get(key) {
            return Ok(skeleton.clone());
        }
        let path = self
            .cache
            .get(Bucket::Skeletons, key)
            .with_context(|| format!("the skeleton `{key}` is not in the cache"))?;
        let skeleton = self.map_component(&path)?;
        skeletons.insert(key.to_owned(), skeleton.clone());
        Ok(skeleton)
    }

    fn map_component(&self, path: &Path) -> Result<Component> {
        // SAFETY: wasmtime trusts the file to be what its own compiler wrote.
        // The entry is named by the digest of what was compiled and of all
        // settings; only `compile` below writes it, by a rename when it is
        // complete; and the cache refuses a directory that another user owns
        // or may write. Whoever can still change it runs as this user and
        // needs no such detour.
        #[expect(unsafe_code, reason = "mapping precompiled code is what makes a start fast")]
        let component = unsafe { Component::deserialize_file(&self.engine, path) };
        component.map_err(anyhow::Error::from).with_context(|| failed_to_load(path))
    }

    fn map_module(&self, path: &Path) -> Result<Module> {
        // SAFETY: as in `map_component`.
        #[expect(unsafe_code, reason = "memory is copied on write from the mapped file")]
        let module = unsafe { Module::deserialize_file(&self.engine, path) };
        module.map_err(anyhow::Error::from).with_context(|| failed_to_load(path))
    }
}

fn failed_to_load(path: &Path) -> String {
    format!("failed to load the machine code `{}`", path.display())
}

/// Compiles in a child process of this binary: a compiler in the server would
/// leave some 200 MB of its memory behind, and a compiler bug that a hostile
/// component provokes should not end the server.
///
/// # Errors
///
/// A [`UserError`] if the component is not valid.
fn compile_in_child(
    cache: &Cache,
    artifact: &Artifact,
    digests: &Digests,
    sharing: Option<Sharing>,
    output: &Path,
) -> Result<()> {
    let binary = std::env::current_exe().context("failed to find our own binary")?;
    let input = output.with_extension("component");
    std::fs::write(&input, artifact.component(digests)?)
        .with_context(|| format!("failed to write `{}`", input.display()))?;
    let mut command = Command::new(binary);
    command.arg("compile").arg(&input).arg(output).env(CACHE_VARIABLE, cache.root()).stdin(Stdio::null());
    if let Some(value) = sharing.as_ref().and_then(clap::ValueEnum::to_possible_value) {
        command.arg("--code").arg(value.get_name());
    }
    let done = command.output().context("failed to start the compiler process")?;
    let message = String::from_utf8_lossy(&done.stderr);
    // The words of a hostile component may be in it.
    let message = Printable(message.trim(), MAX_MESSAGE).to_string();
    match done.status.code() {
        Some(0) => Ok(()),
        Some(status) if status == i32::from(crate::error::EXIT_USAGE) => {
            let reason = message.trim_start_matches("error: ");
            Err(UserError::new(format!("`{}` is not a valid component: {reason}", artifact.path.display()))
                .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
                .into())
        }
        Some(_) => bail!("the compiler process ended with {}: {message}", done.status),
        None => Err(UserError::new(format!(
            "compiling `{}` was stopped: {}; it may take {} of memory and {COMPILE_SECONDS} seconds of processor time",
            artifact.path.display(),
            done.status,
            Size(COMPILE_MEMORY)
        ))
        .remedy("build the app with `wsgi-wasm build MODULE:CALLABLE -o app.wasm`")
        .into()),
    }
}

/// Compiles the component in the file `input` into the new directory
/// `output`, and its skeleton into the cache, if it is not there. The child's
/// side of [`Loader::load`].
///
/// # Errors
///
/// A [`UserError`] if the component is not valid, or can not be shared as
/// `sharing` demands.
pub fn compile(input: &Path, output: &Path, sharing: Option<Sharing>) -> Result<()> {
    limit_compiler();
    let component = std::fs::read(input).with_context(|| format!("failed to read `{}`", input.display()))?;
    let compiler =
        Compiler { engine: engine::compiler().map_err(anyhow::Error::from)?, cache: Cache::open()?, output };
    std::fs::create_dir(output).with_context(|| format!("failed to create `{}`", output.display()))?;
    let shared = match sharing {
        Some(Sharing::Whole) => Err(Refused("it was asked for".into()).into()),
        _ => compiler.shared(&component, sharing),
    };
    let layout = match shared {
        Ok(layout) => layout,
        Err(error) => {
            let Refused(reason) = error.downcast()?;
            if matches!(sharing, Some(Sharing::Split | Sharing::Merged)) {
                return Err(UserError::new(reason).into());
            }
            let code = compiler
                .engine
                .precompile_component(&component)
                .map_err(|error| UserError::new(format!("{error:#}")))?;
            compiler.write(WHOLE, &code)?;
            Layout { sharing: Sharing::Whole, skeleton: None, reason: Some(reason), optimized: false }
        }
    };
    compiler.write(LAYOUT, &serde_json::to_vec(&layout)?)
}

/// Bounds what this process may take, and lets the server go before it.
fn limit_compiler() {
    for (resource, limit) in
        [(Resource::Data, COMPILE_MEMORY), (Resource::Cpu, COMPILE_SECONDS), (Resource::Core, 0)]
    {
        let maximum = getrlimit(resource).maximum.map_or(limit, |maximum| maximum.min(limit));
        // Lowering is always allowed, where the limit exists at all.
        let _ = setrlimit(resource, Rlimit { current: Some(maximum), maximum: Some(maximum) });
    }
    // Not by more: a new version should not wait for ever beside busy tenants.
    let _ = nice(3);
}

/// The state of the child process.
struct Compiler<'a> {
    engine: Engine,
    cache: Cache,
    output: &'a Path,
}

impl Compiler<'_> {
    /// Compiles the parts of `component`.
    ///
    /// # Errors
    ///
    /// [`Refused`] if it has none or they are not valid.
    fn shared(&self, component: &[u8], sharing: Option<Sharing>) -> Result<Layout> {
        let parts = wsgi_wasm_skeleton::split(component).map_err(|error| Refused(format!("{error:#}")))?;
        let tenant = self.engine.precompile_module(&parts.tenant).map_err(|error| refused(&error))?;
        self.write(TENANT, &tenant)?;
        let merged = match sharing {
            Some(Sharing::Split) => Err(Refused("it was asked for".into()).into()),
            _ => self.skeleton(&parts.skeleton, Sharing::Merged),
        };
        match merged {
            Ok(key) => {
                Ok(Layout { sharing: Sharing::Merged, skeleton: Some(key), reason: None, optimized: false })
            }
            Err(error) if sharing == Some(Sharing::Merged) => Err(error),
            Err(error) => {
                let Refused(reason) = error.downcast()?;
                let key = self.skeleton(&parts.skeleton, Sharing::Split)?;
                Ok(Layout {
                    sharing: Sharing::Split,
                    skeleton: Some(key),
                    reason: Some(reason),
                    optimized: false,
                })
            }
        }
    }

    /// Compiles `skeleton`, merged or as it is, if the cache does not have it,
    /// and returns its key.
    fn skeleton(&self, skeleton: &[u8], sharing: Sharing) -> Result<String> {
        let key = skeleton_key(&self.engine, skeleton, sharing);
        self.cache.get_or_make(Bucket::Skeletons, &key, |entry| {
            let merged;
            let skeleton = match sharing {
                Sharing::Merged => {
                    merged =
                        wsgi_wasm_skeleton::merge(skeleton).map_err(|error| Refused(format!("{error:#}")))?;
                    &merged
                }
                _ => skeleton,
            };
            let code = self.engine.precompile_component(skeleton).map_err(|error| refused(&error))?;
            write(entry, &code)
        })?;
        Ok(key)
    }

    /// Writes a file of the app's entry.
    fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        write(&self.output.join(name), content)
    }
}

fn skeleton_key(engine: &Engine, skeleton: &[u8], sharing: Sharing) -> String {
    Key::new(Bucket::Skeletons)
        .with(settings(engine))
        .with(wsgi_wasm_skeleton::VERSION.to_le_bytes())
        .with([sharing as u8])
        .with(cache::sha256(skeleton))
        .finish()
}

/// Where the optimized form of the skeleton `key` is, if there is one.
fn optimized_key(key: &str) -> String {
    Key::new(Bucket::Skeletons).with("optimized").with(key).finish()
}

/// Options of `wasm-opt`: what the guests' code uses and nothing newer, and
/// the names of functions stay, for backtraces.
const WASM_OPT: &[&str] = &[
    "-O3",
    "--debuginfo",
    "--mvp-features",
    "--enable-bulk-memory",
    "--enable-multivalue",
    "--enable-mutable-globals",
    "--enable-nontrapping-float-to-int",
    "--enable-reference-types",
    "--enable-sign-ext",
    "--enable-simd",
];

/// Compiles the code that `artifact` shares with other apps once more, after
/// Binaryen's `wasm-opt` went over it, and keeps it in the cache, where a
/// [`Loader`] prefers it. Takes minutes, once for each interpreter; so it is
/// never done while an app is loaded.
///
/// # Errors
///
/// A [`UserError`] if nothing of the app is shared, or `wasm_opt` fails.
pub fn optimize(
    cache: &Cache,
    artifact: &Artifact,
    wasm_opt: &Path,
    progress: &dyn Fn(&str),
) -> Result<Layout> {
    let component = artifact.component(&artifact.digests(cache)?)?;
    let parts = wsgi_wasm_skeleton::split(&component)
        .map_err(|error| UserError::new(format!("the app shares no code with others: {error:#}")))?;
    let engine = engine::compiler().map_err(anyhow::Error::from)?;
    let skeleton = skeleton_key(&engine, &parts.skeleton, Sharing::Merged);
    cache.get_or_make(Bucket::Skeletons, &optimized_key(&skeleton), |entry| {
        progress("optimizing, which takes some minutes");
        let optimized =
            wsgi_wasm_skeleton::merge_with(&parts.skeleton, |module| run_wasm_opt(wasm_opt, &module))
                .map_err(|error| UserError::new(format!("the app's code was not optimized: {error:#}")))?;
        progress("compiling to machine code");
        let code = engine.precompile_component(&optimized).map_err(anyhow::Error::from)?;
        write(entry, &code)
    })?;
    Ok(Layout { sharing: Sharing::Merged, skeleton: Some(skeleton), reason: None, optimized: true })
}

fn run_wasm_opt(wasm_opt: &Path, module: &[u8]) -> Result<Vec<u8>> {
    let scratch = tempfile::tempdir()?;
    let (input, output) = (scratch.path().join("in.wasm"), scratch.path().join("out.wasm"));
    write(&input, module)?;
    let mut command = Command::new(wasm_opt);
    command.args(WASM_OPT).arg(&input).arg("-o").arg(&output).stdin(Stdio::null());
    let done = command.output().map_err(|error| {
        UserError::new(format!("can not start `{}`: {error}", wasm_opt.display()))
            .remedy("install Binaryen, for example by `apt install binaryen`, or name it with `--wasm-opt`")
    })?;
    if !done.status.success() {
        let message = String::from_utf8_lossy(&done.stderr);
        bail!("`{}` failed: {}", wasm_opt.display(), Printable(message.trim(), MAX_MESSAGE));
    }
    std::fs::read(&output).with_context(|| format!("`{}` wrote nothing", wasm_opt.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    std::fs::write(path, content).with_context(|| format!("failed to write `{}`", path.display()))
}

/// A component can not be shared, for this reason, or can not be merged. All
/// other failures are the machine's.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

fn refused(error: &wasmtime::Error) -> Refused {
    Refused(format!("{error:#}"))
}

/// A digest of all settings that machine code depends on.
fn settings(engine: &Engine) -> [u8; 32] {
    let mut settings = StableHasher::default();
    engine.precompile_compatibility_hash().hash(&mut settings);
    settings.0.finalize().into()
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use clap::ValueEnum as _;

    use super::*;
    use std::sync::Arc;

    use crate::files::{FileGrants, Files};
    use crate::instance::{Grants, Instance, Program, Streams};
    use crate::network::NetworkGrants;
    use crate::scheduler::{Scheduler, Share};

    /// See `bench/sharing.py`, which fills the cache and runs this.
    #[test]
    #[ignore = "a measurement, run by bench/sharing.py"]
    #[expect(clippy::print_stdout, reason = "the figures are for the script")]
    fn time_and_memory_of_many_apps() {
        let variable = |name: &str| std::env::var(name).unwrap();
        let sharing = Sharing::from_str(&variable("MEASURE_CODE"), false).unwrap();
        let apps = variable("MEASURE_APPS");
        let apps = apps.split(':').collect::<Vec<_>>();
        let engine = engine::runner(u32::try_from(apps.len()).unwrap() + 1).unwrap();
        let loader = Loader::new(&engine, &Cache::open().unwrap());
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
            };
            (field("VmRSS:"), field("RssAnon:"))
        };
        let before = resident();
        let mut programs = Vec::new();
        let mut load = Vec::new();
        for app in &apps {
            let artifact = Artifact::open(Path::new(app)).unwrap();
            let start = Instant::now();
            let digests = artifact.digests(&loader.cache).unwrap();
            let code =
                loader.load(&artifact, &digests, Some(sharing), &|_| panic!("not in the cache")).unwrap();
            programs.push(Program::link(&engine, &code).unwrap());
            load.push(start.elapsed());
        }
        let loaded = resident();
        let share = Share::new(&Scheduler::new(None), 1, None);
        let grants = Grants {
            name: "app".into(),
            memory: 128 << 20,
            environment: Vec::new(),
            files: Files::new(
                Vec::new(),
                &FileGrants { temporary: crate::config::DEFAULT_TEMPORARY, data: None },
            )
            .unwrap(),
            network: Arc::new(NetworkGrants::new(Vec::new(), 0)),
            log: Arc::new(crate::guest_log::LineBudget::new(0)),
            footprint: crate::footprint::Footprint::new(None),
            derivations: Arc::new(crate::key_derivation::Derivations::new(
                Arc::clone(&share),
                crate::footprint::Footprint::new(None),
            )),
            share,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut instances = Vec::new();
            for program in &programs {
                instances.push(Instance::new(program, &grants, Streams::Log).await.unwrap());
            }
            let live = resident();
            let mut times = Vec::new();
            for _ in 0..500 {
                let start = Instant::now();
                drop(Instance::new(&programs[0], &grants, Streams::Log).await.unwrap());
                times.push(start.elapsed());
            }
            times.sort();
            load.sort();
            println!(
                "load_us={} instantiate_us={} loaded_kb={} live_kb={} live_anonymous_kb={}",
                load[load.len() / 2].as_micros(),
                times[times.len() / 2].as_micros(),
                loaded.0 - before.0,
                live.0 - before.0,
                live.1 - before.1,
            );
        });
    }
}
