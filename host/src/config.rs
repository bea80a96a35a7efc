//! The configuration file: many tenants, each with its limits and grants.
//!
//! [`ConfigFile`] is what the user writes, and the source of the JSON schema
//! that `wsgi-wasm check --schema` prints. [`Config`] is what it means:
//! defaults filled in, paths made absolute, secrets read, conflicts found.
//! All mistakes are reported at once, each with its line.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use http::uri::PathAndQuery;
use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::artifact::Artifact;
use crate::bounds;
use crate::cli::parse_control;
use crate::environ::script_name;
use crate::error::UserError;
use crate::files::granted::Quota;
use crate::files::{FileGrants, memory};
use crate::listener::Address;
use crate::network::Rule;
use crate::pool::Isolation;
use crate::state::{Stamp, stamp};
use crate::static_files::Mount;
use crate::units::{self, Size, Time};

/// A configuration file, as written.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConfigFile {
    /// The server itself.
    pub server: ServerSection,
    /// What holds for every tenant that does not say otherwise.
    pub defaults: DefaultsSection,
    /// The tenants.
    pub tenant: Vec<TenantSection>,
}

/// The server itself.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSection {
    /// Where to listen: `ADDRESS:PORT` or `unix:PATH`.
    pub bind: Vec<String>,
    /// Where `wsgi-wasm ctl` reaches the server: `unix:PATH`.
    pub control: Option<String>,
    /// Where changes made by `ctl` are kept over a restart.
    pub state: Option<PathBuf>,
    /// Instances that all tenants together can have.
    pub instances: Option<u32>,
    /// Directories below which apps and data of tenants that come later may lie.
    pub roots: Vec<PathBuf>,
    /// Memory of all tenants together.
    pub memory: Option<Size>,
}

/// What holds for every tenant that does not say otherwise.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DefaultsSection {
    /// How far instances are shared.
    pub isolation: Option<Isolation>,
    /// How many instances there are, and for how long.
    pub instances: InstancesSection,
    /// Limits.
    pub limits: LimitsSection,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// A path that a healthy app answers with a status below 400.
    pub health: Option<String>,
}

/// One tenant.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantSection {
    /// Its name, unique, of letters, digits, `-`, `_` and `.`.
    #[serde(default)]
    pub name: Option<String>,
    /// The built app.
    #[serde(default)]
    pub app: Option<PathBuf>,
    /// The hosts it answers for: `shop.example`, or `*.shop.example` for all
    /// names below. None means every host that no other tenant names.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// The path it is mounted at, its `SCRIPT_NAME`.
    #[serde(default)]
    pub path: String,
    /// How far instances are shared.
    #[serde(default)]
    pub isolation: Option<Isolation>,
    /// How many instances there are, and for how long.
    #[serde(default)]
    pub instances: InstancesSection,
    /// Limits.
    #[serde(default)]
    pub limits: LimitsSection,
    /// Environment variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Environment variables that are not written here.
    #[serde(default)]
    pub secrets: BTreeMap<String, SecretSource>,
    /// A directory that the app sees as `/data`.
    #[serde(default)]
    pub data: Option<DataSection>,
    /// What the app may connect to by TCP: `HOST:PORT`, `*.DOMAIN:PORT`,
    /// `ADDRESS:PORT` or `ADDRESS/BITS:PORT`.
    #[serde(default)]
    pub network: Vec<String>,
    /// Directories whose files are served without the app: the URL's path
    /// below the app's, and the directory.
    #[serde(default, rename = "static")]
    pub static_files: BTreeMap<String, PathBuf>,
    /// A path that a healthy app answers with a status below 400.
    #[serde(default)]
    pub health: Option<String>,
    /// Share of the processors when they are all busy, relative to others.
    #[serde(default)]
    pub weight: Option<u32>,
}

/// How many instances there are, and for how long.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InstancesSection {
    /// Instances that stay when there is nothing to do.
    pub min: Option<u16>,
    /// Instances at most, which is also the number of requests in work.
    pub max: Option<u16>,
    /// Requests after which an instance is replaced.
    pub requests: Option<u64>,
    /// Time after which an instance without work is dropped.
    pub idle: Option<Time>,
}

/// Limits of a tenant.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Memory of one instance.
    pub memory: Option<Size>,
    /// Memory of all instances together, with what the host holds for them.
    pub total_memory: Option<Size>,
    /// Time until the response starts, and for each piece of it.
    pub timeout: Option<Time>,
    /// What an instance may keep in its `/tmp`.
    pub tmp: Option<Size>,
    /// What all instances may send and receive over their connections in an hour.
    pub network: Option<Size>,
    /// Processor time of one request.
    pub cpu: Option<Time>,
    /// Processor time of all requests together, in each minute.
    pub cpu_per_minute: Option<Time>,
    /// Largest request body.
    pub body: Option<Size>,
    /// Largest response body.
    pub response: Option<Size>,
    /// Requests in work at a time.
    pub concurrency: Option<u16>,
    /// Requests that may wait for an instance.
    pub queue: Option<u32>,
    /// Time that one may wait.
    pub queue_wait: Option<Time>,
    /// Requests in each second.
    pub requests_per_second: Option<u32>,
    /// Lines that the app may log in each second, on average over five.
    pub log_lines: Option<u32>,
    /// Time that a response may take from its first byte to its last.
    pub response_time: Option<Time>,
}

/// Where a secret comes from.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum SecretSource {
    /// A file whose content, without a line end, is the value.
    File(PathBuf),
    /// A variable of the server's own environment.
    Env(String),
}

/// A directory that an app may write to.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// The directory.
    pub path: PathBuf,
    /// Bytes that it may hold.
    #[serde(default)]
    pub quota: Option<Size>,
    /// Files and directories that it may hold.
    #[serde(default)]
    pub files: Option<u64>,
}

/// What a configuration means.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub bind: Vec<String>,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// Where changes made by `ctl` are kept.
    pub state: Option<PathBuf>,
    /// Instances of all tenants together.
    pub instances: u32,
    /// Directories below which apps and data of later tenants may lie.
    pub roots: Vec<PathBuf>,
    /// Memory of all tenants together in bytes, if it is said.
    pub memory: Option<u64>,
    /// The tenants.
    pub tenants: Vec<TenantConfig>,
}

/// What the configuration says of one tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantConfig {
    /// Its name.
    pub name: String,
    /// The built app.
    pub app: PathBuf,
    /// The hosts it answers for; none means all that are left.
    pub hosts: Vec<HostPattern>,
    /// Where it is mounted: empty, or `/` and more, without a slash at the end.
    pub path: String,
    /// How far instances are shared.
    pub isolation: Isolation,
    /// How many instances there are, and for how long.
    pub instances: Instances,
    /// Limits.
    pub limits: Limits,
    /// Environment variables, secrets included.
    pub environment: Environment,
    /// The files with its secrets, which are read again at a reload.
    pub secrets: Vec<PathBuf>,
    /// Its `/tmp`, and the directory that it sees as `/data`.
    pub files: FileGrants,
    /// What it may connect to.
    pub network: Vec<Rule>,
    /// Bytes that all instances may send and receive over their connections in
    /// an hour.
    pub traffic: u64,
    /// Directories whose files are served without the app, by the path that
    /// they are under.
    pub static_files: BTreeMap<String, PathBuf>,
    /// A path that a healthy app answers with a status below 400.
    pub health: Option<String>,
    /// Share of the processors, relative to others.
    pub weight: u32,
}

/// Environment variables. Shows no values: some are secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(pub BTreeMap<String, String>);

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// How many instances a tenant has, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instances {
    /// Instances that stay when there is nothing to do.
    pub min: usize,
    /// Instances at most.
    pub max: usize,
    /// Requests after which an instance is replaced.
    pub requests: u64,
    /// Time after which an instance without work is dropped.
    pub idle: Duration,
}

/// The limits of a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory of one instance in bytes.
    pub memory: u64,
    /// Memory of all instances in bytes, with what the host holds for them.
    pub total_memory: Option<u64>,
    /// Time until the response starts, and for each piece of it.
    pub timeout: Duration,
    /// Processor time of one request.
    pub cpu: Option<Duration>,
    /// Processor time of all requests together, in each minute.
    pub cpu_per_minute: Option<Duration>,
    /// Bytes of a request body.
    pub body: u64,
    /// Bytes of a response body.
    pub response: u64,
    /// Requests that may wait for an instance.
    pub queue: usize,
    /// Time that one may wait.
    pub queue_wait: Duration,
    /// Requests in each second.
    pub requests_per_second: Option<u32>,
    /// Lines that the app may log in each second.
    pub log_lines: u32,
    /// Time that a response may take from its first byte to its last.
    pub response_time: Duration,
}

/// The limits that hold where nothing is said.
pub const DEFAULT_LIMITS: Limits = Limits {
    memory: 128 << 20,
    total_memory: Some(1 << 30),
    timeout: Duration::from_secs(30),
    cpu: None,
    cpu_per_minute: None,
    body: 16 << 20,
    response: 4 << 30,
    queue: 256,
    queue_wait: Duration::from_secs(5),
    requests_per_second: None,
    log_lines: 1000,
    response_time: Duration::from_secs(3600),
};

/// The memory of all instances together where nothing is said: half of what
/// `instances` of `memory` may have one by one, for few ever have that much,
/// but not less than the default.
pub fn default_total_memory(memory: u64, instances: usize) -> u64 {
    let together = memory.saturating_mul(instances as u64) / 2;
    // One instance alone may have its limit, with what the host holds for it.
    let alone = memory.saturating_add(memory / 4);
    together.max(alone).max(DEFAULT_LIMITS.total_memory.unwrap_or(0))
}

/// The instances that a tenant has where nothing is said.
pub const DEFAULT_INSTANCES: Instances =
    Instances { min: 0, max: 16, requests: 10_000, idle: Duration::from_secs(300) };

/// What an instance may keep in its `/tmp`, where nothing is said.
pub const DEFAULT_TEMPORARY: memory::Limits = memory::Limits { bytes: 64 << 20, files: 1000 };

/// Bytes that all instances may send and receive over their connections in an
/// hour, where nothing is said.
const DEFAULT_TRAFFIC: u64 = 64 << 30;

/// What a data directory may hold, where nothing is said.
const DEFAULT_QUOTA: Quota = Quota { bytes: 1 << 30, files: 10_000 };

/// Instances of all tenants together, where nothing is said.
pub const DEFAULT_TOTAL_INSTANCES: u32 = 1000;

/// A host name, or all below one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostPattern {
    /// This name only, in lower case.
    Exact(String),
    /// Every name that ends with this, which starts with a dot.
    Below(String),
}

impl HostPattern {
    /// Reads `shop.example` or `*.shop.example`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<HostPattern, String> {
        let text = text.to_ascii_lowercase();
        let (name, below) = match text.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (text.as_str(), false),
        };
        let valid = !name.is_empty()
            && name.len() <= 253
            && name.split('.').all(|label| {
                !label.is_empty() && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
            });
        // An IPv6 address stands in brackets, as in a Host header.
        let address = name.starts_with('[') && name.ends_with(']');
        if !valid && (below || !address) {
            return Err(format!(
                "`{text}` is not a host; write `shop.example` or `*.shop.example`, without scheme and port"
            ));
        }
        Ok(if below { HostPattern::Below(format!(".{name}")) } else { HostPattern::Exact(name.into()) })
    }
}

/// Reads the configuration in `path`.
///
/// # Errors
///
/// A [`UserError`] that lists every mistake with its line.
pub fn load(path: &Path) -> Result<Config> {
    load_config(path, false)
}

/// Reads the configuration in `path`, or all in a directory of tenants, and
/// looks into the apps too: what only keeps its own tenant from being served
/// is a mistake here. Returns the number of tenants.
///
/// # Errors
///
/// As for [`load`] and [`load_directory`].
pub fn check(path: &Path) -> Result<usize> {
    if path.is_dir() {
        return Ok(load_tenants(path, true)?.len());
    }
    Ok(load_config(path, true)?.tenants.len())
}

fn load_config(path: &Path, opens_apps: bool) -> Result<Config> {
    let text = fs::read_to_string(path).map_err(|error| {
        UserError::new(format!("can not read the configuration `{}`: {error}", path.display()))
            .remedy("name a TOML file with `--config`")
    })?;
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut problems = Problems::new(path, &text, opens_apps);
    let config = parse(&text, directory, &mut problems);
    refuse(&problems.lines())?;
    Ok(config)
}

/// Reads a directory in which each `NAME.wasm` is a tenant, with its settings
/// in `NAME.toml` if there is one.
///
/// # Errors
///
/// A [`UserError`] that lists every mistake with its file and line.
pub fn load_directory(directory: &Path) -> Result<Vec<TenantConfig>> {
    load_tenants(directory, false)
}

fn load_tenants(directory: &Path, opens_apps: bool) -> Result<Vec<TenantConfig>> {
    let names = || -> std::io::Result<Vec<PathBuf>> {
        let mut paths: Vec<_> = fs::read_dir(directory)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "wasm"));
        paths.sort();
        Ok(paths)
    };
    let paths = names().map_err(|error| {
        UserError::new(format!("can not read the tenants' directory `{}`: {error}", directory.display()))
            .remedy("name a directory with built apps with `--tenants`")
    })?;
    let (mut tenants, mut files, mut mistakes) = (Vec::new(), Vec::new(), Vec::new());
    for app in paths {
        let settings = app.with_extension("toml");
        let text = match fs::read_to_string(&settings) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                mistakes.push(format!("{}: can not be read: {error}", settings.display()));
                continue;
            }
        };
        let mut problems = Problems::new(&settings, &text, opens_apps);
        let section: Option<TenantSection> = read(&text, &mut problems);
        if let Some(mut section) = section {
            let stem = app.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            section.name.get_or_insert(stem);
            section.app.get_or_insert_with(|| app.clone());
            let defaults = DefaultsSection::default();
            if let Some(tenant) = resolve_tenant(&section, &defaults, directory, None, &mut problems) {
                tenants.push(tenant);
                files.push(settings.clone());
            }
        }
        mistakes.extend(problems.lines());
    }
    for Conflict { index, problem, .. } in conflicts(&tenants) {
        let file = files.get(index).map_or(directory, PathBuf::as_path);
        mistakes.push(format!("{}: {problem}; give each a host or a path of its own", file.display()));
    }
    refuse(&mistakes)?;
    Ok(tenants)
}

/// What the tenants in `path`, a configuration or a directory, are read from,
/// as it is now. Without the apps, which are looked at one by one.
pub fn stamps(path: &Path) -> Vec<(PathBuf, Stamp)> {
    let Ok(entries) = fs::read_dir(path) else { return vec![(path.to_path_buf(), stamp(path))] };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            match path.extension()?.to_str()? {
                "wasm" => Some((path, None)),
                "toml" => Some((path.clone(), stamp(&path))),
                _ => None,
            }
        })
        .collect();
    found.sort();
    found
}

/// The JSON schema of a configuration file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(ConfigFile).to_value()
}

fn parse(text: &str, directory: &Path, problems: &mut Problems<'_>) -> Config {
    let file: ConfigFile = read(text, problems).unwrap_or_default();
    let server = &file.server;
    let control = server.control.as_deref().and_then(|control| match parse_control(control) {
        Ok(path) => Some(directory.join(path)),
        Err(problem) => {
            let span = problems.span(&["server", "control"]);
            problems.add(span.as_ref(), &format!("`control`: {problem}"));
            None
        }
    });
    for (index, address) in server.bind.iter().enumerate() {
        if let Err(problem) = Address::parse(address) {
            let span = problems.span(&["server", "bind", &index.to_string()]);
            problems.add(span.as_ref(), &problem.to_string());
        }
    }
    for (key, checked) in [
        ("instances", server.instances.map(|instances| units::check(&instances, &bounds::SOME))),
        ("memory", server.memory.map(|memory| units::check(&memory, &bounds::TOTAL_MEMORY))),
    ] {
        if let Some(Err(problem)) = checked {
            let span = problems.span(&["server", key]);
            problems.add(span.as_ref(), &format!("`{key}`: {problem}"));
        }
    }
    let mut tenants = Vec::new();
    let mut sources = Vec::new();
    for (index, section) in file.tenant.iter().enumerate() {
        if let Some(tenant) = resolve_tenant(section, &file.defaults, directory, Some(index), problems) {
            tenants.push(tenant);
            sources.push(index);
        }
    }
    for Conflict { index, key, problem } in conflicts(&tenants) {
        let span = sources.get(index).and_then(|source| problems.tenant_span(Some(*source), &[key]));
        problems.add(span.as_ref(), &problem);
    }
    Config {
        bind: file.server.bind,
        control,
        state: file.server.state.map(|state| directory.join(state)),
        instances: file.server.instances.unwrap_or(DEFAULT_TOTAL_INSTANCES).max(1),
        roots: file.server.roots.iter().map(|root| directory.join(root)).collect(),
        memory: file.server.memory.map(|size| size.0),
        tenants,
    }
}

/// Deserializes `text`. What is wrong is noted and left out, and the rest read
/// again, until nothing is wrong.
fn read<T: for<'de> Deserialize<'de>>(text: &str, problems: &mut Problems<'_>) -> Option<T> {
    let (mut table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        problems.add(error.span().as_ref(), error.message());
    }
    // Each turn removes one entry, so this ends.
    loop {
        let error = match T::deserialize(toml::Deserializer::from(table.clone())) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let is_secret = error.span().is_some_and(|span| is_below_secrets(table.get_ref(), &span, false));
        // serde shows what it found.
        let message = if is_secret { SECRET_FORM.to_owned() } else { with_suggestion(error.message()) };
        problems.add(error.span().as_ref(), &message);
        let removed = error.span().is_some_and(|span| remove_innermost(table.get_mut(), &span));
        if !removed {
            return None;
        }
    }
}

/// Removes the innermost entry that `span` lies in.
fn remove_innermost(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    let covers = |outer: &Range<usize>| outer.start <= span.start && span.end <= outer.end;
    let mut found = None;
    for (key, value) in table.iter_mut() {
        if covers(&key.span()) || covers(&value.span()) {
            found = Some(key.clone());
            if removed_within(value, span) {
                return true;
            }
        }
        // The span of `[[tenant]]` is its header only; its entries lie outside.
        if let DeValue::Array(items) = value.get_mut() {
            for item in items.iter_mut() {
                if let DeValue::Table(inner) = item.get_mut()
                    && remove_innermost(inner, span)
                {
                    return true;
                }
            }
        }
        if let DeValue::Table(inner) = value.get_mut()
            && remove_innermost(inner, span)
        {
            return true;
        }
    }
    found.is_some_and(|key| table.remove(&key).is_some())
}

fn removed_within(value: &mut Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    match value.get_mut() {
        DeValue::Table(inner) => remove_innermost(inner, span),
        _ => false,
    }
}

/// What is said of all mistakes in secrets: nothing that stands there is shown.
const SECRET_FORM: &str =
    "a secret is written as `NAME = { file = \"PATH\" }` or `NAME = { env = \"VARIABLE\" }`";

/// Whether `span` lies in a table `secrets`, or `is_below` one already.
fn is_below_secrets(table: &DeTable<'_>, span: &Range<usize>, is_below: bool) -> bool {
    let covers = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    table.iter().any(|(key, value)| {
        let is_below = is_below || key.get_ref() == "secrets";
        (is_below && (covers(key.span()) || covers(value.span()))) || is_secret_value(value, span, is_below)
    })
}

fn is_secret_value(value: &Spanned<DeValue<'_>>, span: &Range<usize>, is_below: bool) -> bool {
    match value.get_ref() {
        DeValue::Table(inner) => is_below_secrets(inner, span, is_below),
        DeValue::Array(items) => items.iter().any(|item| is_secret_value(item, span, is_below)),
        _ => false,
    }
}

/// Where the entry with these `keys` stands below `table`, one of an array by
/// its number; none if there is no such entry.
fn find(table: &DeTable<'_>, keys: &[&str]) -> Option<Range<usize>> {
    let (first, rest) = keys.split_first()?;
    let (key, mut value) = table.iter().find(|(key, _)| key.get_ref() == first)?;
    let mut span = key.span();
    for (index, key) in rest.iter().enumerate() {
        match value.get_ref() {
            DeValue::Table(inner) => return find(inner, &rest[index..]),
            DeValue::Array(items) => {
                value = items.get(key.parse::<usize>().ok()?)?;
                span = value.span();
            }
            _ => return None,
        }
    }
    Some(span)
}

/// serde's words for an unknown name, with the name that was meant.
fn with_suggestion(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown ") else { return message.to_owned() };
    let names: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    let Some((unknown, known)) = names.split_first() else { return message.to_owned() };
    let near = known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(unknown, name), *name))
        .min()
        .filter(|(distance, name)| *distance <= name.len().max(unknown.len()) / 3 + 1);
    match near {
        Some((_, name)) => format!("unknown name `{unknown}`; did you mean `{name}`?"),
        None => format!("unknown name `{unknown}`; known are {}", known.join(", ")),
    }
}

/// What `section` means, or none after noting why not.
fn resolve_tenant(
    section: &TenantSection,
    defaults: &DefaultsSection,
    directory: &Path,
    index: Option<usize>,
    problems: &mut Problems<'_>,
) -> Option<TenantConfig> {
    let (before, opens_apps) = (problems.count(), problems.opens_apps);
    let label = section.name.clone().unwrap_or_else(|| "?".into());
    let mut note = |keys: &[&str], problem: String| {
        let span = problems.tenant_span(index, keys);
        problems.add(span.as_ref(), &format!("tenant `{label}`: {problem}"));
    };
    let name = section.name.clone().unwrap_or_default();
    if section.name.is_none() {
        note(&[], "it has no `name`".into());
    } else if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        note(&["name"], "a name is made of letters, digits, `-`, `_` and `.`".into());
    }
    let app = section.app.as_ref().map(|app| directory.join(app)).unwrap_or_default();
    if section.app.is_none() {
        note(&[], "it has no `app`".into());
    } else if !app.is_file() {
        note(&["app"], format!("there is no app `{}`", app.display()));
    } else if opens_apps && let Err(problem) = Artifact::open(&app) {
        note(&["app"], problem.to_string());
    }
    let mut hosts = Vec::new();
    for (index, host) in section.hosts.iter().enumerate() {
        match HostPattern::parse(host) {
            Ok(pattern) => hosts.push(pattern),
            Err(problem) => note(&["hosts", &index.to_string()], problem),
        }
    }
    let path = script_name(&section.path).map(str::to_owned);
    if path.is_none() {
        note(&["path"], format!("the path `{}` has to start with `/` and be plain text", section.path));
    }
    let mut environment = defaults.env.clone();
    environment.extend(section.env.clone());
    for (key, source) in &section.secrets {
        match read_secret(source, directory) {
            Ok(value) => drop(environment.insert(key.clone(), value)),
            Err(problem) => note(&["secrets", key], format!("secret `{key}`: {problem}")),
        }
    }
    if let Some(key) = environment
        .iter()
        .find_map(|(key, value)| (key.is_empty() || key.contains('=') || value.contains('\0')).then_some(key))
    {
        let key = key.clone();
        note(&["env", &key], format!("`{key}` can not be an environment variable"));
    }
    let data = section.data.as_ref().map(|data| {
        let quota = Quota {
            bytes: data.quota.map_or(DEFAULT_QUOTA.bytes, |quota| quota.0),
            files: data.files.unwrap_or(DEFAULT_QUOTA.files),
        };
        (directory.join(&data.path), quota)
    });
    if let Some((data, _)) = data.as_ref().filter(|(data, _)| !data.is_dir()) {
        note(&["data", "path"], format!("there is no data directory `{}`", data.display()));
    }
    let tmp = section.limits.tmp.or(defaults.limits.tmp);
    let temporary =
        memory::Limits { bytes: tmp.map_or(DEFAULT_TEMPORARY.bytes, |tmp| tmp.0), ..DEFAULT_TEMPORARY };
    let mut rules = Vec::new();
    for (index, rule) in section.network.iter().enumerate() {
        match rule.parse::<Rule>() {
            Ok(rule) => rules.push(rule),
            Err(problem) => note(&["network", &index.to_string()], problem.to_string()),
        }
    }
    let traffic = section.limits.network.or(defaults.limits.network);
    let traffic = traffic.map_or(DEFAULT_TRAFFIC, |traffic| traffic.0);
    let health = section.health.clone().or_else(|| defaults.health.clone());
    if let Some(health) = &health {
        let is_path = PathAndQuery::try_from(health.as_str()).is_ok_and(|path| path.as_str() == health);
        if !health.starts_with('/') {
            note(&["health"], format!("the health path `{health}` has to start with `/`"));
        } else if !is_path {
            note(&["health"], format!("the health path `{health}` is not the path of a URL; encode it"));
        }
    }
    let mut static_files = BTreeMap::new();
    for (prefix, path) in &section.static_files {
        let path = directory.join(path);
        match Mount::directory(prefix, &path) {
            Ok(_) => drop(static_files.insert(prefix.clone(), path)),
            Err(problem) => note(&["static", prefix], format!("static files: {problem}")),
        }
    }
    let instances = &section.instances;
    let shared = &defaults.instances;
    let max = instances.max.or(section.limits.concurrency).or(shared.max).or(defaults.limits.concurrency);
    let checked = max.map_or(Ok(()), |max| units::check(&max, &bounds::INSTANCES));
    let instances = Instances {
        min: usize::from(instances.min.or(shared.min).unwrap_or(0)),
        max: max.map_or(DEFAULT_INSTANCES.max, usize::from),
        requests: instances.requests.or(shared.requests).unwrap_or(DEFAULT_INSTANCES.requests),
        idle: instances.idle.or(shared.idle).map_or(DEFAULT_INSTANCES.idle, |time| time.0),
    };
    if let Err(problem) = checked {
        note(&["instances", "max"], format!("`max` instances: {problem}"));
    }
    if let Err(problem) = units::check(&instances.requests, &bounds::REQUESTS) {
        note(&["instances", "requests"], format!("`requests` of an instance: {problem}"));
    }
    if instances.min > instances.max {
        let (min, max) = (instances.min, instances.max);
        let problem = format!("the least number of instances, {min}, is above the most, {max}");
        note(&["instances", "min"], problem);
    }
    let limits = resolve_limits(&section.limits, &defaults.limits, instances.max);
    for (key, checked) in limits.check() {
        if let Err(problem) = checked {
            note(&["limits", key], format!("`{key}`: {problem}"));
        }
    }
    let weight = section.weight.unwrap_or(1);
    if let Err(problem) = units::check(&weight, &bounds::WEIGHT) {
        note(&["weight"], format!("`weight`: {problem}"));
    }
    if problems.count() > before {
        return None;
    }
    let secrets = section.secrets.values().filter_map(|source| match source {
        SecretSource::File(path) => Some(directory.join(path)),
        SecretSource::Env(_) => None,
    });
    Some(TenantConfig {
        name,
        app,
        hosts,
        path: path.unwrap_or_default(),
        isolation: section.isolation.or(defaults.isolation).unwrap_or_default(),
        instances,
        limits,
        environment: Environment(environment),
        secrets: secrets.collect(),
        files: FileGrants { temporary, data },
        network: rules,
        traffic,
        static_files,
        health,
        weight,
    })
}

impl Limits {
    /// Whether the limits without which there is no answer are within their bounds.
    fn check(&self) -> [(&'static str, Result<(), String>); 7] {
        let size = |size: Option<u64>, range| size.map_or(Ok(()), |size| units::check(&Size(size), &range));
        let time =
            |time: Option<Duration>| time.map_or(Ok(()), |time| units::check(&Time(time), &bounds::TIME));
        let some = |number: Option<u32>| number.map_or(Ok(()), |number| units::check(&number, &bounds::SOME));
        [
            ("memory", size(Some(self.memory), bounds::MEMORY)),
            ("total_memory", size(self.total_memory, bounds::TOTAL_MEMORY)),
            ("timeout", time(Some(self.timeout))),
            ("cpu", time(self.cpu)),
            ("cpu_per_minute", time(self.cpu_per_minute)),
            ("requests_per_second", some(self.requests_per_second)),
            ("response_time", time(Some(self.response_time))),
        ]
    }
}

fn resolve_limits(own: &LimitsSection, shared: &LimitsSection, instances: usize) -> Limits {
    let size =
        |own: Option<Size>, shared: Option<Size>, default| own.or(shared).map_or(default, |size| size.0);
    let time =
        |own: Option<Time>, shared: Option<Time>, default| own.or(shared).map_or(default, |time| time.0);
    let optional = |own: Option<Time>, shared: Option<Time>| own.or(shared).map(|time| time.0);
    let memory = size(own.memory, shared.memory, DEFAULT_LIMITS.memory);
    Limits {
        memory,
        total_memory: Some(
            own.total_memory
                .or(shared.total_memory)
                .map_or_else(|| default_total_memory(memory, instances), |size| size.0),
        ),
        timeout: time(own.timeout, shared.timeout, DEFAULT_LIMITS.timeout),
        cpu: optional(own.cpu, shared.cpu),
        cpu_per_minute: optional(own.cpu_per_minute, shared.cpu_per_minute),
        body: size(own.body, shared.body, DEFAULT_LIMITS.body),
        response: size(own.response, shared.response, DEFAULT_LIMITS.response),
        queue: own.queue.or(shared.queue).map_or(DEFAULT_LIMITS.queue, |queue| queue as usize),
        queue_wait: time(own.queue_wait, shared.queue_wait, DEFAULT_LIMITS.queue_wait),
        requests_per_second: own.requests_per_second.or(shared.requests_per_second),
        log_lines: own.log_lines.or(shared.log_lines).unwrap_or(DEFAULT_LIMITS.log_lines),
        response_time: time(own.response_time, shared.response_time, DEFAULT_LIMITS.response_time),
    }
}

/// The secret. What stands in the configuration is not in the error: it may be
/// the secret itself, written in the wrong place.
fn read_secret(source: &SecretSource, directory: &Path) -> Result<String, String> {
    match source {
        SecretSource::File(path) => {
            let text = fs::read_to_string(directory.join(path))
                .map_err(|error| format!("its file can not be read: {error}"))?;
            Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
        }
        SecretSource::Env(name) => {
            std::env::var(name).map_err(|_| "the server's environment has no such variable with text".into())
        }
    }
}

/// Two tenants of one name, or at one place.
struct Conflict {
    /// The later one.
    index: usize,
    key: &'static str,
    problem: String,
}

/// Each tenant's first conflicts with one before it.
fn conflicts(tenants: &[TenantConfig]) -> Vec<Conflict> {
    let mut found = Vec::new();
    for (index, tenant) in tenants.iter().enumerate() {
        let before = &tenants[..index];
        if before.iter().any(|earlier| earlier.name == tenant.name) {
            let problem = format!("there are two tenants `{}`", tenant.name);
            found.push(Conflict { index, key: "name", problem });
        }
        let is_at_same_place = |earlier: &&TenantConfig| {
            let same_host = earlier.hosts.is_empty() && tenant.hosts.is_empty()
                || earlier.hosts.iter().any(|host| tenant.hosts.contains(host));
            same_host && earlier.path == tenant.path
        };
        if let Some(earlier) = before.iter().find(is_at_same_place) {
            let (key, names) = ("hosts", (&earlier.name, &tenant.name));
            let problem =
                format!("the tenants `{}` and `{}` are mounted at the same host and path", names.0, names.1);
            found.push(Conflict { index, key, problem });
        }
    }
    found
}

/// Mistakes in a file, with their lines.
struct Problems<'a> {
    path: &'a Path,
    text: &'a str,
    table: Spanned<DeTable<'a>>,
    /// Whether an app that is none is a mistake.
    opens_apps: bool,
    found: Vec<(usize, String)>,
}

impl<'a> Problems<'a> {
    fn new(path: &'a Path, text: &'a str, opens_apps: bool) -> Problems<'a> {
        let (table, _) = DeTable::parse_recoverable(text);
        Problems { path, text, table, opens_apps, found: Vec::new() }
    }

    fn count(&self) -> usize {
        self.found.len()
    }

    /// Where the entry with these keys stands.
    fn span(&self, keys: &[&str]) -> Option<Range<usize>> {
        find(self.table.get_ref(), keys)
    }

    /// Where the entry of a tenant stands, or the default in its place, or else
    /// the tenant. The tenant is that with the number `index`, or all of the file.
    fn tenant_span(&self, index: Option<usize>, keys: &[&str]) -> Option<Range<usize>> {
        let Some(index) = index else { return self.span(keys) };
        let index = index.to_string();
        let tenant = ["tenant", index.as_str()];
        self.entry_of(&tenant, keys)
            .or_else(|| self.span(&[&["defaults"], keys].concat()))
            .or_else(|| self.span(&tenant))
    }

    fn entry_of(&self, tenant: &[&str], keys: &[&str]) -> Option<Range<usize>> {
        if keys.is_empty() { None } else { self.span(&[tenant, keys].concat()) }
    }

    fn add(&mut self, span: Option<&Range<usize>>, problem: &str) {
        let line = span.map_or(0, |span| {
            self.text.get(..span.start).map_or(0, |before| before.matches('\n').count() + 1)
        });
        let problem = (line, problem.lines().next().unwrap_or_default().to_owned());
        if !self.found.contains(&problem) {
            self.found.push(problem);
        }
    }

    /// Each mistake as a line for the user, in the order of the file.
    fn lines(mut self) -> Vec<String> {
        self.found.sort();
        let path = self.path.display();
        let line = |(line, problem)| match line {
            0 => format!("{path}: {problem}"),
            line => format!("{path}:{line}: {problem}"),
        };
        self.found.into_iter().map(line).collect()
    }
}

/// Refuses a configuration with these mistakes, if there are any.
fn refuse(mistakes: &[String]) -> Result<(), UserError> {
    let what = match mistakes.len() {
        0 => return Ok(()),
        1 => "one mistake".to_owned(),
        count => format!("{count} mistakes"),
    };
    Err(UserError::new(format!("{what} in the configuration\n{}", mistakes.join("\n")))
        .remedy("see docs/tenants.md, and try again with `wsgi-wasm check FILE`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str) -> Result<Config> {
        let directory = tempfile::tempdir()?;
        fs::create_dir(directory.path().join("data"))?;
        fs::write(directory.path().join("a.wasm"), "")?;
        fs::write(directory.path().join("secret"), "hidden\n")?;
        let path = directory.path().join("wsgi-wasm.toml");
        fs::write(&path, text)?;
        load(&path)
    }

    #[test]
    fn everything_that_can_be_said_is_understood() {
        let config = load_text(
            r#"
            [server]
            bind = ["127.0.0.1:0"]
            control = "unix:control.sock"
            [defaults.limits]
            memory = "64MiB"
            timeout = "10s"
            concurrency = 4
            [[tenant]]
            name = "acme"
            app = "a.wasm"
            hosts = ["ACME.example", "*.acme.example"]
            path = "/shop/"
            isolation = "request"
            instances = { min = 1, max = 8, requests = 100, idle = "60s" }
            limits = { memory = "256MiB", cpu_per_minute = "20s", requests_per_second = 5 }
            env = { MODE = "live" }
            secrets = { KEY = { file = "secret" } }
            data = { path = "data", quota = "1MiB", files = 5 }
            network = ["db.internal:5432", "10.0.0.0/8:*"]
            static = { "/assets" = "data" }
            health = "/healthz"
            weight = 2
            [[tenant]]
            name = "other"
            app = "a.wasm"
            "#,
        )
        .unwrap();
        assert!(config.control.unwrap().ends_with("control.sock"));
        let [acme, other] = &config.tenants[..] else { panic!() };
        assert_eq!(
            acme.hosts,
            [HostPattern::Exact("acme.example".into()), HostPattern::Below(".acme.example".into())]
        );
        assert_eq!((&*acme.path, acme.weight, acme.isolation), ("/shop", 2, Isolation::Request));
        assert_eq!(acme.limits.memory, 256 << 20);
        assert!(acme.static_files["/assets"].ends_with("data"));
        assert_eq!(acme.limits.timeout, Duration::from_secs(10));
        assert_eq!(
            acme.instances,
            Instances { min: 1, max: 8, requests: 100, idle: Duration::from_secs(60) }
        );
        assert_eq!(acme.environment.0["KEY"], "hidden");
        assert!(!format!("{acme:?}").contains("hidden"), "a secret is shown");
        assert_eq!((other.limits.memory, other.instances.max), (64 << 20, 4));
        assert_eq!(other.limits.total_memory, Some(1 << 30));
        assert_eq!(default_total_memory(256 << 20, 64), 8 << 30, "half of what they may have");
        assert_eq!(default_total_memory(4 << 30, 1), 5 << 30, "one may have all of its own");
    }

    #[test]
    fn all_mistakes_are_reported_at_once_with_their_lines() {
        let error = load_text(
            r#"[server]
bnd = ["127.0.0.1:0"]
[defaults.limits]
memroy = "64MiB"
timeout = 30
[[tenant]]
name = "a"
app = "a.wasm"
limits = { memory = "lots", cpu = "1s" }
[[tenant]]
name = "b b"
app = "missing.wasm"
hosts = ["http://x"]
path = "no-slash"
static = { assets = "missing", "/assets" = "missing" }
"#,
        )
        .unwrap_err()
        .to_string();
        for expected in [
            "wsgi-wasm.toml:2: unknown name `bnd`; did you mean `bind`?",
            "wsgi-wasm.toml:4: unknown name `memroy`; did you mean `memory`?",
            "wsgi-wasm.toml:5: ",
            "wsgi-wasm.toml:9: `lots` is not a size",
            "wsgi-wasm.toml:11: tenant `b b`: a name is made of",
            "toml:12: tenant `b b`: there is no app",
            "toml:13: tenant `b b`: `http://x` is not a host",
            "toml:14: tenant `b b`: the path `no-slash`",
            "toml:15: tenant `b b`: static files: the URL path `assets` does not begin with",
            "toml:15: tenant `b b`: static files: can not open the directory",
        ] {
            assert!(error.contains(expected), "no `{expected}` in:\n{error}");
        }
        assert!(error.starts_with("10 mistakes"), "{error}");
    }

    #[test]
    fn what_can_not_work_is_a_mistake_at_its_key() {
        let error = load_text(
            r#"[server]
bind = ["127.0.0.1:0",
  "nonsense:port"]
control = "here"
instances = 0
[defaults]
health = "/a b"
[defaults.limits]
timeout = "0s"
[[tenant]]
name = "a"
app = "a.wasm"
hosts = ["x", "y z"]
limits.memory = "0B"
[[tenant]]
name = "b"
app = "a.wasm"
health = "/#top"
network = [
  "nowhere",
]
[tenant.limits]
timeout = "1s"
requests_per_second = 0
[tenant.instances]
min = 20
requests = 0
[tenant.secrets]
KEY = { file = "hunter2" }
TOKEN = { env = "hunter2" }
OTHER = "hunter2"
"#,
        )
        .unwrap_err()
        .to_string();
        for expected in [
            "toml:3: can not listen on `nonsense:port`: the port is not a number",
            "toml:4: `control`: `here` has to be `unix:PATH`",
            "toml:5: `instances`: `0` is too little: the least is 1",
            "toml:7: tenant `a`: the health path `/a b` is not the path of a URL",
            "toml:9: tenant `a`: `timeout`: `0s` is too little: the least is 1ms",
            "toml:13: tenant `a`: `y z` is not a host",
            "toml:14: tenant `a`: `memory`: `0B` is too little: the least is 1MiB",
            "toml:18: tenant `b`: the health path `/#top` is not",
            "toml:20: tenant `b`: ",
            "toml:24: tenant `b`: `requests_per_second`: `0` is too little",
            "toml:26: tenant `b`: the least number of instances, 20",
            "toml:27: tenant `b`: `requests` of an instance: `0` is too little",
            "toml:29: tenant `b`: secret `KEY`: its file can not be read",
            "toml:30: tenant `b`: secret `TOKEN`: the server's environment",
            "toml:31: a secret is written as",
        ] {
            assert!(error.contains(expected), "no `{expected}` in:\n{error}");
        }
        assert!(error.starts_with("15 mistakes"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn of_many_conflicts_all_are_shown() {
        let tenant = |name: &str, host: &str| {
            format!("[[tenant]]\nname = \"{name}\"\napp = \"a.wasm\"\nhosts = [\"{host}\"]\n")
        };
        let all = [tenant("a", "x"), tenant("a", "y"), tenant("b", "x"), tenant("c", "Y")].concat();
        let error = load_text(&all).unwrap_err().to_string();
        for expected in [
            "toml:6: there are two tenants `a`",
            "toml:12: the tenants `a` and `b` are mounted",
            "toml:16: the tenants `a` and `c` are mounted",
        ] {
            assert!(error.contains(expected), "no `{expected}` in:\n{error}");
        }
    }

    #[test]
    fn two_tenants_can_not_share_a_place() {
        let two = |first: &str, second: &str| {
            load_text(&format!(
                "[[tenant]]\nname = \"a\"\napp = \"a.wasm\"\n{first}\n[[tenant]]\nname = \"b\"\napp = \"a.wasm\"\n{second}\n"
            ))
        };
        assert!(two("", "").unwrap_err().to_string().contains("same host and path"));
        assert!(two("hosts = [\"x\"]", "hosts = [\"y\", \"X\"]").is_err());
        assert!(two("hosts = [\"x\"]", "hosts = [\"x\"]\npath = \"/b\"").is_ok());
        assert!(two("hosts = [\"x\"]", "").is_ok());
    }

    #[test]
    fn the_schema_knows_every_name() {
        let schema = schema().to_string();
        for name in ["requests_per_second", "cpu_per_minute", "secrets", "isolation", "control"] {
            assert!(schema.contains(name), "{name}");
        }
    }
}
