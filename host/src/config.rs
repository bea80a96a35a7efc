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
use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::environ::script_name;
use crate::error::UserError;
use crate::files::granted::Quota;
use crate::files::{FileGrants, memory};
use crate::network::Rule;
use crate::pool::Isolation;
use crate::state::{Stamp, stamp};
use crate::static_files::Mount;
use crate::units::{Size, Time};

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
    /// What an instance may send and receive over its connections.
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
    /// Its `/tmp`, and the directory that it sees as `/data`.
    pub files: FileGrants,
    /// What it may connect to.
    pub network: Vec<Rule>,
    /// Bytes that an instance may send and receive over its connections.
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

/// Bytes that an instance may send and receive over its connections, where
/// nothing is said.
const DEFAULT_TRAFFIC: u64 = 4 << 30;

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
    let text = fs::read_to_string(path).map_err(|error| {
        UserError::new(format!("can not read the configuration `{}`: {error}", path.display()))
            .remedy("name a TOML file with `--config`")
    })?;
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut problems = Problems::new(path, &text);
    let config = parse(&text, directory, &mut problems);
    problems.finish()?;
    Ok(config)
}

/// Reads a directory in which each `NAME.wasm` is a tenant, with its settings
/// in `NAME.toml` if there is one.
///
/// # Errors
///
/// A [`UserError`] that lists every mistake of the first file that has some.
pub fn load_directory(directory: &Path) -> Result<Vec<TenantConfig>> {
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
    let mut tenants = Vec::new();
    for app in paths {
        let settings = app.with_extension("toml");
        let text = match fs::read_to_string(&settings) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                return Err(UserError::new(format!("can not read `{}`: {error}", settings.display())).into());
            }
        };
        let mut problems = Problems::new(&settings, &text);
        let section: Option<TenantSection> = read(&text, &mut problems);
        if let Some(mut section) = section {
            let stem = app.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            section.name.get_or_insert(stem);
            section.app.get_or_insert_with(|| app.clone());
            let defaults = DefaultsSection::default();
            tenants.extend(resolve_tenant(&section, &defaults, directory, None, &mut problems));
        }
        problems.finish()?;
    }
    check_mounts(&tenants).map_err(|(_, problem)| {
        UserError::new(format!("in the tenants' directory `{}`: {problem}", directory.display()))
            .remedy("give each a host or a path of its own, in the `.toml` file beside the app")
    })?;
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
    let spans = tenant_spans(text);
    let control = file.server.control.as_deref().and_then(|control| match control.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Some(directory.join(path)),
        _ => {
            problems.add(None, &format!("`control` is `{control}`, but has to be `unix:PATH`"));
            None
        }
    });
    let mut tenants = Vec::new();
    let mut sources = Vec::new();
    for (index, section) in file.tenant.iter().enumerate() {
        let span = spans.get(index);
        if let Some(tenant) = resolve_tenant(section, &file.defaults, directory, span, problems) {
            tenants.push(tenant);
            sources.push(index);
        }
    }
    if let Err((index, problem)) = check_mounts(&tenants) {
        problems.add(sources.get(index).and_then(|source| spans.get(*source)), &problem);
    }
    Config {
        bind: file.server.bind,
        control,
        state: file.server.state.map(|state| directory.join(state)),
        instances: file.server.instances.unwrap_or(DEFAULT_TOTAL_INSTANCES).max(1),
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
        problems.add(error.span().as_ref(), &with_suggestion(error.message()));
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

/// Where each `[[tenant]]` stands.
fn tenant_spans(text: &str) -> Vec<Range<usize>> {
    let (table, _) = DeTable::parse_recoverable(text);
    match table.get_ref().get("tenant").map(Spanned::get_ref) {
        Some(DeValue::Array(tenants)) => tenants.iter().map(Spanned::span).collect(),
        _ => Vec::new(),
    }
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
    span: Option<&Range<usize>>,
    problems: &mut Problems<'_>,
) -> Option<TenantConfig> {
    let before = problems.count();
    let label = section.name.clone().unwrap_or_else(|| "?".into());
    let mut note = |problem: String| problems.add(span, &format!("tenant `{label}`: {problem}"));
    let name = section.name.clone().unwrap_or_default();
    if section.name.is_none() {
        note("it has no `name`".into());
    } else if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        note("a name is made of letters, digits, `-`, `_` and `.`".into());
    }
    let app = section.app.as_ref().map(|app| directory.join(app)).unwrap_or_default();
    if section.app.is_none() {
        note("it has no `app`".into());
    } else if !app.is_file() {
        note(format!("there is no app `{}`", app.display()));
    }
    let mut hosts = Vec::new();
    for host in &section.hosts {
        match HostPattern::parse(host) {
            Ok(pattern) => hosts.push(pattern),
            Err(problem) => note(problem),
        }
    }
    let path = script_name(&section.path).map(str::to_owned);
    if path.is_none() {
        note(format!("the path `{}` has to start with `/` and be plain text", section.path));
    }
    let mut environment = defaults.env.clone();
    environment.extend(section.env.clone());
    for (key, source) in &section.secrets {
        match read_secret(source, directory) {
            Ok(value) => drop(environment.insert(key.clone(), value)),
            Err(problem) => note(format!("secret `{key}`: {problem}")),
        }
    }
    if let Some(key) = environment
        .iter()
        .find_map(|(key, value)| (key.is_empty() || key.contains('=') || value.contains('\0')).then_some(key))
    {
        note(format!("`{key}` can not be an environment variable"));
    }
    let data = section.data.as_ref().map(|data| {
        let quota = Quota {
            bytes: data.quota.map_or(DEFAULT_QUOTA.bytes, |quota| quota.0),
            files: data.files.unwrap_or(DEFAULT_QUOTA.files),
        };
        (directory.join(&data.path), quota)
    });
    if let Some((data, _)) = data.as_ref().filter(|(data, _)| !data.is_dir()) {
        note(format!("there is no data directory `{}`", data.display()));
    }
    let tmp = section.limits.tmp.or(defaults.limits.tmp);
    let temporary =
        memory::Limits { bytes: tmp.map_or(DEFAULT_TEMPORARY.bytes, |tmp| tmp.0), ..DEFAULT_TEMPORARY };
    let mut rules = Vec::new();
    for rule in &section.network {
        match rule.parse::<Rule>() {
            Ok(rule) => rules.push(rule),
            Err(problem) => note(problem.to_string()),
        }
    }
    let traffic = section.limits.network.or(defaults.limits.network);
    let traffic = traffic.map_or(DEFAULT_TRAFFIC, |traffic| traffic.0);
    let health = section.health.clone().or_else(|| defaults.health.clone());
    if let Some(health) = health.as_ref().filter(|health| !health.starts_with('/')) {
        note(format!("the health path `{health}` has to start with `/`"));
    }
    let mut static_files = BTreeMap::new();
    for (prefix, path) in &section.static_files {
        let path = directory.join(path);
        match Mount::directory(prefix, &path) {
            Ok(_) => drop(static_files.insert(prefix.clone(), path)),
            Err(problem) => note(format!("static files: {problem}")),
        }
    }
    let instances = &section.instances;
    let shared = &defaults.instances;
    let max = instances.max.or(section.limits.concurrency).or(shared.max).or(defaults.limits.concurrency);
    let instances = Instances {
        min: usize::from(instances.min.or(shared.min).unwrap_or(0)),
        max: max.map_or(DEFAULT_INSTANCES.max, usize::from),
        requests: instances.requests.or(shared.requests).unwrap_or(DEFAULT_INSTANCES.requests),
        idle: instances.idle.or(shared.idle).map_or(DEFAULT_INSTANCES.idle, |time| time.0),
    };
    if instances.max == 0 || instances.requests == 0 {
        note("it needs at least one instance, for at least one request".into());
    }
    if instances.min > instances.max {
        note(format!(
            "the least number of instances, {}, is above the most, {}",
            instances.min, instances.max
        ));
    }
    let weight = section.weight.unwrap_or(1);
    if weight == 0 || weight > 1000 {
        note("the weight has to be from 1 to 1000".into());
    }
    if problems.count() > before {
        return None;
    }
    Some(TenantConfig {
        name,
        app,
        hosts,
        path: path.unwrap_or_default(),
        isolation: section.isolation.or(defaults.isolation).unwrap_or_default(),
        limits: resolve_limits(&section.limits, &defaults.limits, instances.max),
        instances,
        environment: Environment(environment),
        files: FileGrants { temporary, data },
        network: rules,
        traffic,
        static_files,
        health,
        weight,
    })
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

fn read_secret(source: &SecretSource, directory: &Path) -> Result<String, String> {
    match source {
        SecretSource::File(path) => {
            let path = directory.join(path);
            let text = fs::read_to_string(&path)
                .map_err(|error| format!("can not read `{}`: {error}", path.display()))?;
            Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
        }
        SecretSource::Env(name) => {
            std::env::var(name).map_err(|_| format!("the server's environment has no text variable `{name}`"))
        }
    }
}

/// Finds two tenants of one name, or at one place: the later one's index.
fn check_mounts(tenants: &[TenantConfig]) -> Result<(), (usize, String)> {
    for (index, tenant) in tenants.iter().enumerate() {
        for earlier in &tenants[..index] {
            if earlier.name == tenant.name {
                return Err((index, format!("there are two tenants `{}`", tenant.name)));
            }
            let same_host = earlier.hosts.is_empty() && tenant.hosts.is_empty()
                || earlier.hosts.iter().any(|host| tenant.hosts.contains(host));
            if same_host && earlier.path == tenant.path {
                return Err((
                    index,
                    format!(
                        "the tenants `{}` and `{}` are mounted at the same host and path",
                        earlier.name, tenant.name
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Mistakes in a file, with their lines.
struct Problems<'a> {
    path: &'a Path,
    text: &'a str,
    found: Vec<(usize, String)>,
}

impl<'a> Problems<'a> {
    fn new(path: &'a Path, text: &'a str) -> Problems<'a> {
        Problems { path, text, found: Vec::new() }
    }

    fn count(&self) -> usize {
        self.found.len()
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

    fn finish(mut self) -> Result<(), UserError> {
        if self.found.is_empty() {
            return Ok(());
        }
        self.found.sort();
        let lines: Vec<String> = self
            .found
            .iter()
            .map(|(line, problem)| match line {
                0 => format!("{}: {problem}", self.path.display()),
                line => format!("{}:{line}: {problem}", self.path.display()),
            })
            .collect();
        let count = lines.len();
        let what = if count == 1 { "one mistake".to_owned() } else { format!("{count} mistakes") };
        Err(UserError::new(format!("{what} in the configuration\n{}", lines.join("\n")))
            .remedy("see docs/tenants.md, and try again with `wsgi-wasm check FILE`"))
    }
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
            "wsgi-wasm.toml:10: tenant `b b`: a name is made of",
            "tenant `b b`: there is no app",
            "tenant `b b`: `http://x` is not a host",
            "tenant `b b`: the path `no-slash`",
            "tenant `b b`: static files: the URL path `assets` does not begin with",
            "tenant `b b`: static files: can not open the directory",
        ] {
            assert!(error.contains(expected), "no `{expected}` in:\n{error}");
        }
        assert!(error.starts_with("10 mistakes"), "{error}");
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
