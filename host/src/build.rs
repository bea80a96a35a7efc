//! The `build` command: from a Python project to one file.
//!
//! 1. `target` finds the WSGI callable, `vendor` the requirements.
//! 2. The digest of everything that goes in names the result in the cache. If
//!    it is there, that is all.
//! 3. `toolchain` has the pinned componentize-py. It runs the adapter inside
//!    the guest, which imports the app, makes the warm-up requests, and leaves
//!    a heap that becomes the snapshot.
//! 4. The files that the guest will want at run time are packed behind it.
//! 5. `written_pages` finds which memory a request writes to.
//!
//! The bytes of two builds of the same inputs differ: the interpreter draws
//! its hash seed before the snapshot, and a seed that everybody knows would
//! invite hash flooding. On one machine the cache gives the same file.

mod adapter;
mod owned_lists;
mod patch;
mod target;
mod toolchain;
mod vendor;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use crate::artifact::{self, Layer, MANIFEST_FORMAT, Manifest, Package, PackedLayer};
use crate::cache::{self, Bucket, Cache, Key, Links, walk};
use crate::cli::{BuildArgs, ProjectArgs};
use crate::error::UserError;
use crate::static_files;
use crate::units;
use crate::written_pages;

use patch::Snapshot;
use target::Target;
use toolchain::Toolchain;
use vendor::Requirements;

/// More files than this are no project but, say, a home directory.
const MAX_FILES: usize = 100_000;
/// So are more bytes.
const MAX_BYTES: u64 = 1 << 30;

/// Rises when the same project gives another file.
const STEPS: u32 = 4;

/// The program that is at work for us.
static RUNNING: Mutex<Option<Pid>> = Mutex::new(None);

/// Such a program, as long as this lives: a signal that ends us ends it too.
struct Tool;

impl Tool {
    fn watch(program: &Child) -> Tool {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = Some(Pid::from_child(program));
        Tool
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What to build.
pub struct BuildOptions<'a> {
    /// `module` or `module:callable`, else it is looked for.
    pub application: Option<&'a str>,
    /// The project's directory.
    pub directory: &'a Path,
    /// Requirements, warm-up and what is left out.
    pub project: &'a ProjectArgs,
    /// Variables for the build.
    pub environment: &'a [(String, String)],
    /// Directories whose files the host is to serve itself, by the URL's path.
    pub static_files: BTreeMap<String, String>,
}

/// Builds and writes the file that the user asked for. A signal ends it with
/// nothing left behind.
///
/// # Errors
///
/// A [`UserError`] if the project can not be built.
pub fn run(args: BuildArgs) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let done: Result<ExitCode> = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;
        let ended_by = tokio::select! {
            done = tokio::task::spawn_blocking(move || build_and_write(&args)) => {
                done.context("the build ended with a panic")??;
                return Ok(ExitCode::SUCCESS);
            }
            _ = terminate.recv() => SignalKind::terminate(),
            _ = interrupt.recv() => SignalKind::interrupt(),
        };
        // It would go on writing.
        if let Some(tool) = *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = kill_process(tool, Signal::KILL);
        }
        cache::abandon();
        // As a shell shows it.
        Ok(ExitCode::from(128 + u8::try_from(ended_by.as_raw_value()).unwrap_or(0)))
    });
    // What was interrupted ends with the process.
    runtime.shutdown_background();
    done
}

fn build_and_write(args: &BuildArgs) -> Result<()> {
    let cache = Cache::open()?;
    let progress = Progress::new();
    let (application, directory) = match (args.application.as_deref(), args.project.dir.as_deref()) {
        (Some(named), None) if Path::new(named).is_dir() => (None, Path::new(named)),
        (application, directory) => (application, directory.unwrap_or(Path::new("."))),
    };
    let mut static_files = BTreeMap::new();
    for text in &args.static_files {
        let (prefix, path) = static_files::split(text)?;
        static_files.insert(prefix.to_owned(), path.trim_end_matches('/').to_owned());
    }
    let options =
        BuildOptions { application, directory, project: &args.project, environment: &args.env, static_files };
    output_directory(&args.output)?;
    let built = build(&cache, &options, &progress)?;
    write_output(&built, &args.output)?;
    let size = fs::metadata(&args.output).map_or(0, |metadata| metadata.len());
    progress.step(&format!("wrote {} ({})", args.output.display(), units::approximate(size)));
    Ok(())
}

/// Puts the built file where the user wants it. It appears whole or not at
/// all: a server may be reading the one that is replaced.
fn write_output(built: &Path, output: &Path) -> Result<()> {
    let directory = output_directory(output)?;
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(".wsgi-wasm-").tempfile_in(directory)?;
        std::io::copy(&mut fs::File::open(built)?, &mut file)?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        }
        file.persist(output).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|error| unwritable(output, &error.to_string()).into())
}

/// The directory of the file to write.
///
/// # Errors
///
/// A [`UserError`] if it is not there, or the file is a directory.
fn output_directory(output: &Path) -> Result<&Path> {
    let directory = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if output.is_dir() {
        return Err(unwritable(output, "it is a directory").into());
    }
    if !directory.is_dir() {
        return Err(unwritable(output, &format!("there is no directory `{}`", directory.display())).into());
    }
    Ok(directory)
}

fn unwritable(output: &Path, reason: &str) -> UserError {
    UserError::new(format!("can not write `{}`: {reason}", output.display()))
        .remedy("choose a file in a directory that exists and can be written with `--output`")
}

/// Builds an app, or finds it built, and returns the file in the cache.
///
/// # Errors
///
/// A [`UserError`] if the project can not be built.
pub fn build(cache: &Cache, options: &BuildOptions<'_>, progress: &Progress) -> Result<PathBuf> {
    let directory = options.directory;
    if !directory.is_dir() {
        return Err(UserError::new(format!("there is no directory `{}`", directory.display()))
            .remedy("name the project's directory with `--dir`")
            .into());
    }
    let requirements = find_requirements(directory, options.project.requirements.as_deref())?;
    let target = Target::find(options.application, directory, requirements.packages())?;
    let files = project_files(directory, &options.project.exclude)?;

    let mut key = Key::new(Bucket::Apps)
        .with(env!("CARGO_PKG_VERSION"))
        .with(STEPS.to_le_bytes())
        .with(toolchain::identity())
        .with(adapter::digest())
        .with(serde_json::to_vec(&target)?)
        .with(requirements.key())
        .with(serde_json::to_vec(&options.project.warmup)?)
        .with(serde_json::to_vec(options.environment)?)
        .with(serde_json::to_vec(&options.static_files)?);
    for file in &files {
        let path = directory.join(file);
        let content = fs::read(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
        key.add(file.as_os_str().as_encoded_bytes());
        key.add(content);
    }
    let key = key.finish();
    if let Some(built) = cache.get(Bucket::Apps, &key) {
        progress.step("nothing has changed since the last build");
        return Ok(built);
    }
    let work = Work { cache, options, target, requirements, files, inputs: &key, progress };
    cache.get_or_make(Bucket::Apps, &key, |entry| work.build(entry))
}

/// The requirements file that was named, or what the project has.
fn find_requirements(directory: &Path, named: Option<&Path>) -> Result<Requirements> {
    if let Some(path) = named {
        return if path.file_name() == Some(OsStr::new("pyproject.toml")) {
            Requirements::from_pyproject(path)
        } else {
            Requirements::from_requirements(path)
        };
    }
    let requirements = directory.join("requirements.txt");
    if requirements.is_file() {
        return Requirements::from_requirements(&requirements);
    }
    let pyproject = directory.join("pyproject.toml");
    if pyproject.is_file() {
        return Requirements::from_pyproject(&pyproject);
    }
    Ok(Requirements::none())
}

/// The project's files that go into the app.
fn project_files(directory: &Path, exclude: &[String]) -> Result<Vec<PathBuf>> {
    let (mut count, mut bytes) = (0, 0);
    let files = walk(directory, Links::Follow, &mut |relative, metadata| {
        if count > MAX_FILES || bytes > MAX_BYTES {
            return false;
        }
        let name = relative.file_name().map(OsStr::to_string_lossy).unwrap_or_default();
        // Dot files hold secrets (`.env`) and histories (`.git`) more often
        // than something that an app reads.
        let left_out = name.starts_with('.')
            || matches!(&*name, "__pycache__" | "node_modules")
            || name.ends_with(".pyc")
            || name.ends_with(".wasm")
            // A virtual environment is for another platform.
            || metadata.is_dir() && directory.join(relative).join("pyvenv.cfg").exists()
            || exclude.iter().any(|pattern| {
                let pattern = pattern.trim_end_matches('/');
                matches_pattern(pattern, &name) || matches_pattern(pattern, &relative.to_string_lossy())
            });
        if !left_out && metadata.is_file() {
            count += 1;
            bytes += metadata.len();
        }
        !left_out
    })?;
    if count > MAX_FILES || bytes > MAX_BYTES {
        return Err(UserError::new(format!(
            "`{}` holds more than an app may have: {MAX_FILES} files with {}",
            directory.display(),
            units::approximate(MAX_BYTES)
        ))
        .remedy("name the project's own directory with `--dir`, or leave things out with `--exclude`")
        .into());
    }
    Ok(files)
}

/// Whether `text` is `pattern`, in which each `*` stands for any text.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// A build under way.
struct Work<'a> {
    cache: &'a Cache,
    options: &'a BuildOptions<'a>,
    target: Target,
    requirements: Requirements,
    files: Vec<PathBuf>,
    inputs: &'a str,
    progress: &'a Progress,
}

/// What the adapter is told, in `build.json` of its scratch directory.
#[derive(Serialize)]
#[serde(tag = "task", rename_all = "lowercase")]
enum Task<'a> {
    /// Copy and compile the standard library.
    Stdlib { output: &'a str },
    /// Compile directories.
    Compile { compile: &'a [&'a str] },
    /// Import the app, warm it up, and get ready for the snapshot.
    Application {
        application: &'a Target,
        warmup: &'a [String],
        environment: BTreeMap<&'a str, &'a str>,
        compile: &'a [&'a str],
        bytecode: &'a str,
    },
}

/// What the adapter tells, in `report.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Report {
    ok: bool,
    application: String,
    python: String,
    warmup: Vec<WarmupReport>,
    warnings: Vec<String>,
    stage: String,
    message: String,
    traceback: Option<String>,
    hint: Option<String>,
}

/// How one warm-up request went.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WarmupReport {
    path: String,
    status: Option<u16>,
    seconds: f64,
}

impl Work<'_> {
    fn build(&self, entry: &Path) -> Result<()> {
        let toolchain = Toolchain::ensure(self.cache, &|step| self.progress.step(step))?;
        let python = self.standard_library(&toolchain)?;
        let site = self.site(&toolchain)?;

        // The guest may write into what it is shown, and it runs the app's
        // code: it gets copies.
        if !self.target.may_be_in(self.options.directory) && !self.target.may_be_in(&site.join("files")) {
            return Err(self.target.missing(self.options.directory).into());
        }
        let scratch = Scratch::new(entry)?;
        copy_files(self.options.directory, &self.files, &scratch.app())?;
        copy_tree(&site.join("files"), &scratch.site())?;
        copy_tree(&python.join("files"), &scratch.work().join("bytecode"))?;
        self.progress.step("importing the app and taking the snapshot");
        let environment = self.options.environment.iter().map(|(key, value)| (&**key, &**value)).collect();
        let (component, report) = self.run_guest(
            &toolchain,
            &scratch,
            &Task::Application {
                application: &self.target,
                warmup: &self.options.project.warmup,
                environment,
                compile: &[Layer::App.guest_path()],
                bytecode: "/2/bytecode",
            },
        )?;
        let component = owned_lists::free_lowered_lists(&component)
            .context("failed to patch the bindings that componentize-py made")?;
        let mut component =
            patch_snapshot(component, &scratch.work()).context("failed to patch the snapshot")?;
        for request in &report.warmup {
            let status = request.status.map_or("no response".into(), |status| status.to_string());
            self.progress.step(&format!(
                "warmed up {}: {status} in {:.0} ms",
                request.path,
                request.seconds * 1000.0
            ));
        }
        for warning in &report.warnings {
            self.progress.warn(warning);
        }

        // Only now: the app may have collected them while it was imported.
        for (prefix, path) in &self.options.static_files {
            if !is_directory_below(&scratch.app(), Path::new(path)) {
                return Err(UserError::new(format!(
                    "can not serve static files under `{prefix}`: the app has no directory `{path}`"
                ))
                .remedy("name a directory in the project's, as in `--static /static=public`")
                .into());
            }
        }

        self.progress.step("packing");
        let read_packed = |directory: &Path| -> Result<PackedLayer> {
            let path = directory.join("layer.json");
            let text = fs::read(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
            let stored: StoredLayer = serde_json::from_slice(&text)?;
            let bytes = fs::read(directory.join("layer.tar.zst"))?;
            Ok(PackedLayer { layer: stored.layer, bytes, files: stored.files, size: stored.size })
        };
        let layers =
            [read_packed(&python)?, read_packed(&site)?, PackedLayer::pack(Layer::App, &scratch.app())?];
        let packages: Vec<Package> = serde_json::from_slice(&fs::read(site.join("packages.json"))?)?;
        let mut manifest = Manifest {
            // When it is complete.
            component: None,
            format: MANIFEST_FORMAT,
            application: report.application,
            python: report.python,
            tools: BTreeMap::from([
                ("wsgi-wasm".into(), env!("CARGO_PKG_VERSION").into()),
                ("componentize-py".into(), toolchain::COMPONENTIZE_PY_VERSION.into()),
            ]),
            packages,
            warmup: self.options.project.warmup.clone(),
            environment: self.options.environment.iter().cloned().collect(),
            static_files: self.options.static_files.clone(),
            inputs: self.inputs.to_owned(),
            layers: layers.iter().map(PackedLayer::summary).collect(),
        };
        self.list_written_pages(&mut component, &manifest, &layers, &scratch)?;
        manifest.component = Some(cache::sha256(&component));
        let app = artifact::assemble(component, &manifest, &layers)?;
        fs::write(entry, app).with_context(|| format!("failed to write `{}`", entry.display()))
    }

    /// Lists in `component` which pages of its memory the app writes to when it is asked
    /// for what it was warmed up with, or for `/`.
    fn list_written_pages(
        &self,
        component: &mut Vec<u8>,
        manifest: &Manifest,
        layers: &[PackedLayer],
        scratch: &Scratch,
    ) -> Result<()> {
        self.progress.step("looking which memory a request writes to");
        let path = scratch.root().join("app.wasm");
        fs::write(&path, artifact::assemble(component.clone(), manifest, layers)?)
            .with_context(|| format!("failed to write `{}`", path.display()))?;
        let root = ["/".to_owned()];
        let paths = if manifest.warmup.is_empty() { &root[..] } else { &manifest.warmup };
        match written_pages::find(self.cache, &path, paths) {
            Ok(pages) => wsgi_wasm_skeleton::list_written_pages(component, &pages),
            // A fresh instance is a little slower without.
            Err(error) => tracing::debug!("the pages that a request writes to are not known: {error:#}"),
        }
        Ok(())
    }

    /// The guest's standard library: `files`, and the packed layer beside it.
    fn standard_library(&self, toolchain: &Toolchain) -> Result<PathBuf> {
        let key =
            Key::new(Bucket::StandardLibraries).with(toolchain::identity()).with(adapter::digest()).finish();
        self.cache.get_or_make(Bucket::StandardLibraries, &key, |entry| {
            self.progress.step("compiling the guest's standard library, once for this machine");
            let scratch = Scratch::new(entry)?;
            adapter::write(&scratch.site())?;
            self.run_guest(toolchain, &scratch, &Task::Stdlib { output: "/2/python" })?;
            fs::create_dir(entry)?;
            copy_tree(&scratch.work().join("python"), &entry.join("files"))?;
            store_layer(Layer::Python, entry)
        })
    }

    /// The vendored requirements with the adapter: `files`, the packed layer,
    /// and the list of packages.
    fn site(&self, toolchain: &Toolchain) -> Result<PathBuf> {
        let key = Key::new(Bucket::Sites)
            .with(toolchain::identity())
            .with(adapter::digest())
            .with(self.requirements.key())
            .finish();
        self.cache.get_or_make(Bucket::Sites, &key, |entry| {
            let scratch = Scratch::new(entry)?;
            let packages = vendor::vendor(toolchain, &self.requirements, &scratch.site(), &|step| {
                self.progress.step(step);
            })?;
            adapter::write(&scratch.site())?;
            self.progress.step("compiling the packages");
            self.run_guest(toolchain, &scratch, &Task::Compile { compile: &[Layer::Site.guest_path()] })?;
            fs::create_dir(entry)?;
            copy_tree(&scratch.site(), &entry.join("files"))?;
            fs::write(entry.join("packages.json"), serde_json::to_vec(&packages)?)?;
            store_layer(Layer::Site, entry)
        })
    }

    /// Runs `task` in the guest and returns the component with the snapshot
    /// that it leaves, and its report.
    fn run_guest(
        &self,
        toolchain: &Toolchain,
        scratch: &Scratch,
        task: &Task<'_>,
    ) -> Result<(Vec<u8>, Report)> {
        let (wit, output) = (scratch.root().join("gateway.wit"), scratch.root().join("component.wasm"));
        fs::write(&wit, adapter::WIT)?;
        fs::write(scratch.work().join("build.json"), serde_json::to_vec(task)?)?;
        let mut command = toolchain.componentize();
        // The order decides the guest paths: `/0`, `/1`, `/2`.
        command
            .args(["--wit-path".as_ref(), wit.as_os_str()])
            .args(["--world", "application", "componentize"])
            .args(["--python-path".as_ref(), scratch.app().as_os_str()])
            .args(["--python-path".as_ref(), scratch.site().as_os_str()])
            .args(["--python-path".as_ref(), scratch.work().as_os_str()])
            .args(["--output".as_ref(), output.as_os_str()])
            .arg(adapter::ENTRY)
            // So that what it leaves when it is stopped goes with the rest.
            .env("TMPDIR", scratch.root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let tool = command.spawn().context("failed to start componentize-py")?;
        let watched = Tool::watch(&tool);
        let done = tool.wait_with_output().context("failed to wait for componentize-py")?;
        drop(watched);
        let report = scratch.work().join("report.json");
        let report: Option<Report> =
            fs::read(report).ok().and_then(|text| serde_json::from_slice(&text).ok());
        match report {
            Some(report) if report.ok && done.status.success() => {
                let component = fs::read(&output).context("failed to read what componentize-py made")?;
                Ok((component, report))
            }
            Some(report) if !report.ok && !report.message.is_empty() => Err(failed_build(&report).into()),
            _ => Err(anyhow!(
                "componentize-py ended with {}:\n{}{}",
                done.status,
                String::from_utf8_lossy(&done.stdout),
                String::from_utf8_lossy(&done.stderr)
            )),
        }
    }
}

/// Why the app did not get as far as a snapshot.
fn failed_build(report: &Report) -> UserError {
    let traceback = report.traceback.as_deref().unwrap_or_default().trim_end();
    let error = if traceback.is_empty() {
        UserError::new(report.message.clone())
    } else {
        // It ends with the message.
        UserError::new(format!("the app failed while it was being built ({})\n{traceback}", report.stage))
    };
    match &report.hint {
        Some(hint) if !hint.is_empty() => error.remedy(hint.clone()),
        _ => error,
    }
}

/// What is known of a packed layer in the cache.
#[derive(Serialize, Deserialize)]
struct StoredLayer {
    layer: Layer,
    files: u64,
    size: u64,
}

/// Packs the directory `files` of a cache entry beside it.
fn store_layer(layer: Layer, entry: &Path) -> Result<()> {
    let packed = PackedLayer::pack(layer, &entry.join("files"))?;
    let stored = StoredLayer { layer, files: packed.files, size: packed.size };
    fs::write(entry.join("layer.json"), serde_json::to_vec(&stored)?)?;
    fs::write(entry.join("layer.tar.zst"), packed.bytes)?;
    Ok(())
}

/// The directories that the guest sees during a build.
struct Scratch(PathBuf);

impl Scratch {
    /// Makes them beside the cache entry that is being made, to be removed with
    /// what else lies there.
    fn new(entry: &Path) -> Result<Scratch> {
        let scratch = Scratch(entry.with_file_name("guest"));
        for directory in [scratch.root(), &scratch.app(), &scratch.site(), &scratch.work()] {
            fs::create_dir(directory)
                .with_context(|| format!("failed to create `{}` for the build", directory.display()))?;
        }
        Ok(scratch)
    }

    fn root(&self) -> &Path {
        &self.0
    }

    /// The app's files, `/0` in the guest.
    fn app(&self) -> PathBuf {
        self.0.join("app")
    }

    /// Packages and the adapter, `/1` in the guest.
    fn site(&self) -> PathBuf {
        self.0.join("site")
    }

    /// What the adapter reads and writes besides, `/2` in the guest.
    fn work(&self) -> PathBuf {
        self.0.join("work")
    }
}

/// Whether `path` is a directory below `root`, and leads nowhere else.
fn is_directory_below(root: &Path, path: &Path) -> bool {
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    is_plain && root.join(path).is_dir()
}

/// Arranges the snapshot in `component` as the adapter says, which has left its lists in
/// the directory `told`.
fn patch_snapshot(component: Vec<u8>, told: &Path) -> Result<Vec<u8>> {
    let list =
        |name: &str| fs::read(told.join(name)).with_context(|| format!("the guest has written no `{name}`"));
    let mut snapshot = Snapshot::find(component)?;
    snapshot.make_immortal(&list("objects.bin")?)?;
    snapshot.borrow_constants(&list("constants.bin")?)?;
    snapshot.renew_code(&list("versions.bin")?)?;
    snapshot.gather(&list("code.bin")?, &list("keys.bin")?, &list("room.bin")?)?;
    Ok(snapshot.into_component())
}

/// Copies `files`, paths relative to `from`, to the same places below `to`.
fn copy_files(from: &Path, files: &[PathBuf], to: &Path) -> Result<()> {
    for file in files {
        let (source, target) = (from.join(file), to.join(file));
        let copy = || -> std::io::Result<()> {
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::copy(&source, &target).map(|_| ())
        };
        copy().with_context(|| format!("failed to copy `{}`", source.display()))?;
    }
    Ok(())
}

/// Copies all plain files below `from` to below `to`.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    copy_files(from, &walk(from, Links::Skip, &mut |_, _| true)?, to)
}

/// Tells the user what is being done, and since when.
pub struct Progress(Instant);

impl Progress {
    /// Starts the clock.
    pub fn new() -> Progress {
        Progress(Instant::now())
    }

    /// Says what is done now.
    #[expect(clippy::print_stderr, reason = "progress is for whoever started the command")]
    pub fn step(&self, text: &str) {
        eprintln!("[{:5.1} s] {text}", self.0.elapsed().as_secs_f64());
    }

    /// Says what the user should look at.
    pub fn warn(&self, text: &str) {
        self.step(&format!("warning: {text}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, text, expected) in [
            ("tests", "tests", true),
            ("tests", "mytests", false),
            ("*.sqlite3", "db.sqlite3", true),
            ("*.sqlite3", "db.sqlite3.bak", false),
            ("docs/*", "docs/a/b.md", true),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxc", false),
            ("*", "anything", true),
        ] {
            assert_eq!(matches_pattern(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn what_is_not_the_projects_own_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        for file in [
            "app.py",
            "pkg/__init__.py",
            "pkg/__pycache__/x.cpython-314.pyc",
            ".env",
            ".git/config",
            "venv/pyvenv.cfg",
            "venv/lib/x.py",
            "node_modules/a.js",
            "app.wasm",
            "notes/secret.txt",
            "templates/index.html",
        ] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let files = project_files(root.path(), &["notes".into()]).unwrap();
        let names: Vec<_> = files.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(names, ["app.py", "pkg/__init__.py", "templates/index.html"]);
    }
}
