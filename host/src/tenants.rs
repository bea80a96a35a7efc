//! Many apps in one server: which one answers a request, and how they are
//! added, changed and removed while requests are in work.
//!
//! A [`Tenant`] never changes. A new version is loaded, started and asked its
//! health request beside the old one, and then takes its place in the
//! [`Table`]; the old one ends with its last request. One that fails takes no
//! place, and the old one goes on.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use wasmtime::Engine;

use crate::app;
use crate::cache::Cache;
use crate::code::{Loader, Sharing};
use crate::config::{HostPattern, TenantConfig};
use crate::environ::path_info;
use crate::failure::Failure;
use crate::footprint::Footprint;
use crate::guest_log::LineBudget;
use crate::handler::{self, App, RequestLimits};
use crate::pool::{Pool, PoolSettings, Pools};
use crate::request_id::RequestId;
use crate::scheduler::{Scheduler, Share, processors};
use crate::static_files;

/// Failures that are kept for `ctl errors`.
const KEPT_ERRORS: usize = 50;
/// Failures of a tenant that are logged in a second.
const LOGGED_FAILURES: u32 = 50;
/// Traps in a row after which a tenant has to wait.
const CRASHES_ALLOWED: u32 = 5;
/// The longest that it has to wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How often files are looked at for a change.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What all tenants share.
pub struct Shared {
    /// Runs their code.
    pub engine: Engine,
    /// Has their code and files.
    pub cache: Cache,
    /// Loads their code, of which they share most.
    pub loader: Loader,
    /// How much of it they share, if that is not left to the loader.
    pub sharing: Option<Sharing>,
    /// Divides the processors among them.
    pub scheduler: Arc<Scheduler>,
    /// Divides the room for instances among them.
    pub pools: Arc<Pools>,
    /// Time that a client may send or take no byte of a body.
    pub client_idle: Duration,
    /// Bytes of a body that a client must send in a second, on average.
    pub min_rate: u64,
}

impl Shared {
    /// What tenants on `engine` share.
    pub fn new(
        engine: Engine,
        cache: Cache,
        sharing: Option<Sharing>,
        client_idle: Duration,
        min_rate: u64,
    ) -> Shared {
        let loader = Loader::new(&engine, &cache);
        let (scheduler, pools) = (Scheduler::new(), Arc::default());
        Shared { engine, cache, loader, sharing, scheduler, pools, client_idle, min_rate }
    }
}

/// One version of one tenant.
pub struct Tenant {
    /// What the configuration says of it.
    pub config: TenantConfig,
    /// Its instances and limits.
    pub app: Arc<App>,
    /// Directories whose files are served without the app, below its path.
    mounts: Vec<static_files::Mount>,
    share: Arc<Share>,
    /// The app's file when it was loaded.
    stamp: Stamp,
    loaded_at: SystemTime,
    /// What outlives a version.
    record: Arc<Record>,
    rate: Option<RateLimit>,
    crashes: Crashes,
}

/// What is known of a tenant over all its versions.
pub struct Record {
    suspended: AtomicBool,
    requests: AtomicU64,
    failures: AtomicU64,
    errors: Mutex<VecDeque<ErrorRecord>>,
    /// How many failures are logged.
    log: LineBudget,
    /// The version before, for a rollback.
    previous: Mutex<Option<Arc<Tenant>>>,
    /// One change at a time. Not one for all tenants: a version that takes
    /// minutes to compile must not hold up the others'.
    changing: tokio::sync::Mutex<()>,
}

impl Default for Record {
    fn default() -> Record {
        Record {
            suspended: AtomicBool::default(),
            requests: AtomicU64::default(),
            failures: AtomicU64::default(),
            errors: Mutex::default(),
            log: LineBudget::new(LOGGED_FAILURES),
            previous: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }
}

/// A failure as `ctl errors` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorRecord {
    /// Seconds since 1970.
    pub time: u64,
    /// The request, if it was one.
    pub request: Option<String>,
    /// What happened.
    pub error: String,
}

/// Size and time of a file; changes when the file does.
type Stamp = Option<(u64, SystemTime)>;

fn stamp(path: &Path) -> Stamp {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.len(), metadata.modified().ok()?))
}

impl Tenant {
    /// Loads a version and makes sure that it answers. Blocks for as long as
    /// that takes, which is seconds if the code has to be compiled.
    fn load(shared: &Shared, config: TenantConfig, record: Arc<Record>) -> Result<Tenant> {
        let share = Share::new(config.weight, config.limits.cpu_per_minute);
        let stamp = stamp(&config.app);
        let footprint = Footprint::new(config.limits.total_memory);
        let app::Loaded { program, grants, mounts } =
            app::load_artifact(shared, &config, Arc::clone(&share), Arc::clone(&footprint))?;
        let settings = PoolSettings {
            instances: config.instances.max,
            spare: config.instances.min,
            queue: config.limits.queue,
            queue_wait: config.limits.queue_wait,
            isolation: config.isolation,
            max_requests: config.instances.requests,
        };
        let limits = RequestLimits {
            body: config.limits.body,
            response: config.limits.response,
            response_time: config.limits.response_time,
            timeout: config.limits.timeout,
            cpu: config.limits.cpu,
            client_idle: shared.client_idle,
            rate: shared.min_rate,
        };
        let app =
            Arc::new(App { pool: Pool::new(&shared.pools, program, grants, settings), limits, footprint });
        Ok(Tenant {
            rate: config.limits.requests_per_second.map(RateLimit::new),
            app,
            mounts,
            share,
            stamp,
            loaded_at: SystemTime::now(),
            record,
            crashes: Crashes::default(),
            config,
        })
    }

    /// Starts an instance and asks the health request, if there is one. The
    /// instance stays if requests are expected at once.
    async fn prove(&self, is_expected: bool) -> Result<()> {
        self.app
            .pool
            .warm()
            .await
            .map_err(|error| app::refuse_start(&self.config.name, self.config.limits.memory, &error))?;
        if let Some(path) = &self.config.health {
            let status = handler::probe(&self.app, path).await;
            match status {
                Ok(status) if status < 400 => {}
                Ok(status) => bail!("its health request `{path}` was answered with {status}"),
                Err(failure) => bail!("its health request `{path}` failed: {failure}"),
            }
        }
        if !is_expected {
            self.app.pool.trim(Duration::ZERO);
        }
        Ok(())
    }

    /// Whether the tenant takes a request now.
    ///
    /// # Errors
    ///
    /// Why it does not.
    pub fn admit(&self) -> Result<(), Failure> {
        if self.record.suspended.load(Ordering::Relaxed) {
            return Err(Failure::Suspended);
        }
        if let Some(seconds) = self.crashes.waits() {
            return Err(Failure::CrashLoop(seconds));
        }
        if let Some(seconds) = self.share.exhausted() {
            return Err(Failure::BudgetExhausted(seconds));
        }
        if self.rate.as_ref().is_some_and(|rate| !rate.take()) {
            return Err(Failure::TooManyRequests);
        }
        self.record.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The mount that has the file at a request's `path`, and the file's name there.
    pub fn static_file<'a>(&self, path: &'a str) -> Option<(&static_files::Mount, &'a str)> {
        if self.mounts.is_empty() {
            return None;
        }
        let path = path_info(path, &self.config.path)?;
        self.mounts.iter().find_map(|mount| Some((mount, mount.below(path)?)))
    }

    /// Notes how a request ended.
    pub fn note(&self, request: RequestId, outcome: Result<(), Failure>) {
        match outcome {
            Err(failure @ (Failure::Trap | Failure::CannotStart)) => {
                self.crashes.failed();
                self.record.fail(Some(request), failure.to_string());
            }
            Err(failure) if failure.is_servers_fault() => {
                self.record.fail(Some(request), failure.to_string());
            }
            // Says nothing of the app: it may not even have been asked.
            Err(_) => {}
            Ok(()) => self.crashes.succeeded(),
        }
    }

    /// Whether a failure may be logged, and how many before it were not. A
    /// client can provoke them as fast as it can ask.
    pub fn may_log(&self) -> Option<u64> {
        self.record.log.take()
    }

    fn has_changed(&self) -> bool {
        stamp(&self.config.app) != self.stamp
    }
}

impl Record {
    fn fail(&self, request: Option<RequestId>, error: String) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut errors = lock(&self.errors);
        if errors.len() == KEPT_ERRORS {
            errors.pop_front();
        }
        errors.push_back(ErrorRecord { time, request: request.map(|id| id.to_string()), error });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of requests for each second, with as many at once.
struct RateLimit {
    rate: f64,
    tokens: Mutex<(f64, Instant)>,
}

impl RateLimit {
    fn new(rate: u32) -> RateLimit {
        RateLimit { rate: rate.into(), tokens: Mutex::new((rate.into(), Instant::now())) }
    }

    fn take(&self) -> bool {
        let mut tokens = lock(&self.tokens);
        let now = Instant::now();
        let gained = now.duration_since(tokens.1).as_secs_f64() * self.rate;
        *tokens = ((tokens.0 + gained).min(self.rate), now);
        let granted = tokens.0 >= 1.0;
        if granted {
            tokens.0 -= 1.0;
        }
        granted
    }
}

/// Holds back an app that crashes again and again, each time for longer: each
/// crash costs a fresh instance and lines in the log.
#[derive(Default)]
struct Crashes {
    in_a_row: AtomicU32,
    until: Mutex<Option<Instant>>,
}

impl Crashes {
    fn failed(&self) {
        let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(excess) = in_a_row.checked_sub(CRASHES_ALLOWED) {
            let wait = Duration::from_millis(500) * 2u32.saturating_pow(excess.min(16));
            *lock(&self.until) = Some(Instant::now() + wait.min(LONGEST_WAIT));
        }
    }

    fn succeeded(&self) {
        if self.in_a_row.load(Ordering::Relaxed) != 0 {
            self.in_a_row.store(0, Ordering::Relaxed);
            *lock(&self.until) = None;
        }
    }

    /// The seconds until the next request may try, if it is not now.
    fn waits(&self) -> Option<u64> {
        if self.in_a_row.load(Ordering::Relaxed) < CRASHES_ALLOWED {
            return None;
        }
        let left = lock(&self.until).as_ref()?.checked_duration_since(Instant::now())?;
        Some(left.as_secs() + 1)
    }
}

/// A place in the [`Table`]: a path of a host.
#[derive(Clone)]
struct Mount {
    /// As SCRIPT_NAME has it.
    path: String,
    /// None if it could not be loaded.
    tenant: Option<Arc<Tenant>>,
}

/// A tenant that could not be loaded, and why.
#[derive(Clone)]
struct Unloaded {
    config: TenantConfig,
    /// The app's file at that time.
    stamp: Stamp,
    error: String,
}

/// Which tenant answers for which host and path.
#[derive(Default)]
struct Table {
    exact: HashMap<String, Mounts>,
    /// By the end of the host's name, longest first.
    below: Vec<(String, Mounts)>,
    /// For hosts that no tenant names.
    rest: Mounts,
}

/// The tenants of one host, longest path first.
type Mounts = Vec<Mount>;

impl Table {
    /// The places of `tenants`, and of those that could not be loaded: their
    /// requests are refused and not another tenant's.
    fn new(tenants: &BTreeMap<String, Arc<Tenant>>, unloaded: &BTreeMap<String, Unloaded>) -> Table {
        let mut table = Table::default();
        let loaded = tenants.values().map(|tenant| (&tenant.config, Some(tenant)));
        let others = unloaded.iter().filter(|(name, _)| !tenants.contains_key(*name));
        for (config, tenant) in loaded.chain(others.map(|(_, unloaded)| (&unloaded.config, None))) {
            let mount = Mount { path: config.path.clone(), tenant: tenant.cloned() };
            for host in &config.hosts {
                match host {
                    HostPattern::Exact(name) => {
                        table.exact.entry(name.clone()).or_default().push(mount.clone());
                    }
                    HostPattern::Below(end) => match table.below.iter_mut().find(|(known, _)| known == end) {
                        Some((_, mounts)) => mounts.push(mount.clone()),
                        None => table.below.push((end.clone(), vec![mount.clone()])),
                    },
                }
            }
            if config.hosts.is_empty() {
                table.rest.push(mount);
            }
        }
        table.below.sort_by_key(|(end, _)| std::cmp::Reverse(end.len()));
        let all = table.exact.values_mut().chain(table.below.iter_mut().map(|(_, mounts)| mounts));
        for mounts in all.chain([&mut table.rest]) {
            mounts.sort_by_key(|mount| std::cmp::Reverse(mount.path.len()));
        }
        table
    }

    fn route(&self, host: &str, path: &str) -> Result<&Arc<Tenant>, Failure> {
        let host = host_name(host);
        let below =
            || self.below.iter().find(|(end, _)| host.ends_with(end.as_str())).map(|(_, mounts)| mounts);
        let mounts = self.exact.get(&*host).or_else(below).unwrap_or(&self.rest);
        if mounts.is_empty() {
            return Err(Failure::UnknownHost);
        }
        let mut mounts = mounts.iter();
        let mount = mounts.find(|mount| mount.path.is_empty() || path_info(path, &mount.path).is_some());
        mount.ok_or(Failure::NoTenant)?.tenant.as_ref().ok_or(Failure::NotLoaded)
    }
}

/// The name in a `Host` header: in lower case, without port and final dot.
fn host_name(host: &str) -> std::borrow::Cow<'_, str> {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => &host[..address.len() + 2],
        None => host.split(':').next().unwrap_or(host),
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        name.to_ascii_lowercase().into()
    } else {
        name.into()
    }
}

/// All tenants of a server.
pub struct Tenants {
    shared: Arc<Shared>,
    table: ArcSwap<Table>,
    all: Mutex<BTreeMap<String, Arc<Tenant>>>,
    /// Versions that were not taken into use, by their tenants' names.
    unloaded: Mutex<BTreeMap<String, Unloaded>>,
    /// The source is read by one at a time.
    reading: tokio::sync::Mutex<()>,
    source: Source,
    /// Whether `start` is done.
    started: AtomicBool,
    state_file: Option<PathBuf>,
    /// Held while the state's file is changed.
    saving: Mutex<()>,
}

/// Where the tenants come from, to be read again when it changes.
pub type Source = Box<dyn Fn() -> Result<Vec<TenantConfig>> + Send + Sync>;

/// What `ctl` has changed, kept over a restart.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct SavedState {
    suspended: Vec<String>,
    /// Apps that were deployed in place of the configured ones.
    apps: BTreeMap<String, PathBuf>,
}

/// What `ctl list` shows of a tenant.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    name: String,
    state: &'static str,
    app: PathBuf,
    path: String,
    loaded_at: u64,
    requests: u64,
    failures: u64,
    in_work: usize,
    resting: usize,
    memory: u64,
    cpu_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Tenants {
    /// The tenants that `source` names. One that can not be loaded does not
    /// keep others from being served.
    ///
    /// # Errors
    ///
    /// If the source can not be read, or none of its tenants can be loaded.
    pub async fn start(
        shared: Arc<Shared>,
        source: Source,
        state_file: Option<PathBuf>,
    ) -> Result<Arc<Tenants>> {
        let tenants = Arc::new(Tenants {
            shared,
            table: ArcSwap::default(),
            all: Mutex::default(),
            unloaded: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
            source,
            started: AtomicBool::new(false),
            state_file,
            saving: Mutex::default(),
        });
        tenants.reload().await?;
        tenants.started.store(true, Ordering::Relaxed);
        let unloaded = lock(&tenants.unloaded).clone();
        if !lock(&tenants.all).is_empty() {
            return Ok(tenants);
        }
        let mut unloaded = unloaded.into_values();
        match (unloaded.next(), unloaded.len()) {
            (None, _) => Ok(tenants),
            (Some(only), 0) => Err(crate::error::UserError::new(only.error).into()),
            (Some(_), others) => {
                let text = format!("none of the {} tenants can be served: see above", others + 1);
                Err(crate::error::UserError::new(text).into())
            }
        }
    }

    /// The tenant that answers for `host` and `path`, both as the client sent them.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn route(&self, host: &str, path: &str) -> Result<Arc<Tenant>, Failure> {
        self.table.load().route(host, path).cloned()
    }

    /// Waits until no tenant has a request in work.
    pub async fn drained(&self) {
        let all: Vec<_> = lock(&self.all).values().cloned().collect();
        for tenant in all {
            tenant.app.pool.drained().await;
        }
    }

    /// Reads the source again, and loads what is new or has changed.
    ///
    /// # Errors
    ///
    /// If the source can not be read; then nothing changes.
    pub async fn reload(self: &Arc<Self>) -> Result<()> {
        let _one = self.reading.lock().await;
        let wanted = (self.source)()?;
        let names: BTreeSet<String> = wanted.iter().map(|config| config.name.clone()).collect();
        let is_only = wanted.len() == 1;
        let mut loading = JoinSet::new();
        for config in wanted {
            if loading.len() >= processors() {
                loading.join_next().await;
            }
            let tenants = Arc::clone(self);
            loading.spawn(async move { tenants.follow(config, is_only).await });
        }
        while loading.join_next().await.is_some() {}
        for (_, removed) in lock(&self.all).extract_if(.., |name, _| !names.contains(name)) {
            // The two refer to each other: neither would ever go.
            lock(&removed.record.previous).take();
            removed.app.pool.retire(true);
        }
        lock(&self.unloaded).retain(|name, _| names.contains(name));
        self.publish();
        Ok(())
    }

    /// Makes a tenant what `config` and what `ctl` has changed say.
    async fn follow(self: &Arc<Self>, mut config: TenantConfig, is_only: bool) {
        let record = lock(&self.all).get(&config.name).map(|known| Arc::clone(&known.record));
        let record = record.unwrap_or_default();
        let _one = record.changing.lock().await;
        let state = self.saved_state();
        if let Some(app) = state.apps.get(&config.name) {
            config.app.clone_from(app);
        }
        let known = lock(&self.all).get(&config.name).cloned();
        if known.is_some_and(|known| known.config == config && !known.has_changed()) {
            // What `ctl` tried in vain is not what is asked for here.
            if let Some(unloaded) = lock(&self.unloaded).get_mut(&config.name) {
                unloaded.stamp = stamp(&unloaded.config.app);
            }
            return;
        }
        let name = config.name.clone();
        let replaces = lock(&self.all).contains_key(&name);
        record.suspended.store(state.suspended.contains(&name), Ordering::Relaxed);
        if let Err(error) = self.replace(config, Arc::clone(&record), is_only).await {
            if replaces {
                tracing::error!(tenant = %name, "the new version is not used: {error:#}");
            } else if !is_only || self.started.load(Ordering::Relaxed) {
                // Else `start` fails with it.
                tracing::error!(tenant = %name, "the app is not served: {error:#}");
            }
        }
    }

    /// Loads `config`, proves it, and lets it take its tenant's place. If it
    /// `is_expected`, or replaces a version, requests will come at once.
    async fn replace(
        self: &Arc<Self>,
        config: TenantConfig,
        record: Arc<Record>,
        is_expected: bool,
    ) -> Result<()> {
        let name = config.name.clone();
        let is_expected = is_expected || lock(&self.all).contains_key(&name);
        let (attempt, stamp) = (config.clone(), stamp(&config.app));
        let shared = Arc::clone(&self.shared);
        let loading = Arc::clone(&record);
        // Loading reads and compiles; that must not hold up requests.
        let loaded = tokio::task::spawn_blocking(move || Tenant::load(&shared, config, loading))
            .await
            .context("loading ended with a panic")
            .and_then(std::convert::identity);
        let proved = match loaded {
            Ok(tenant) => tenant.prove(is_expected).await.map(|()| tenant),
            Err(error) => Err(error),
        };
        match proved {
            Ok(tenant) => {
                let tenant = Arc::new(tenant);
                let before = lock(&self.all).insert(name.clone(), Arc::clone(&tenant));
                lock(&self.unloaded).remove(&name);
                self.publish();
                if let Some(before) = &before {
                    before.app.pool.retire(true);
                }
                *lock(&tenant.record.previous) = before;
                tracing::info!(tenant = %name, "serving {}", tenant.config.app.display());
                Ok(())
            }
            Err(error) => {
                let text = format!("{error:#}");
                record.fail(None, text.clone());
                lock(&self.unloaded).insert(name, Unloaded { config: attempt, stamp, error: text });
                Err(error)
            }
        }
    }

    fn publish(&self) {
        self.table.store(Arc::new(Table::new(&lock(&self.all), &lock(&self.unloaded))));
    }

    fn get(&self, name: &str) -> Result<Arc<Tenant>> {
        match lock(&self.all).get(name) {
            Some(tenant) => Ok(Arc::clone(tenant)),
            None => bail!("there is no tenant `{name}`"),
        }
    }

    /// What there is to say of each tenant.
    pub fn list(&self) -> Vec<Status> {
        let unloaded = lock(&self.unloaded).clone();
        let mut list: Vec<Status> = lock(&self.all)
            .values()
            .map(|tenant| {
                let (in_work, resting) = tenant.app.pool.usage();
                let since = tenant.loaded_at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                Status {
                    name: tenant.config.name.clone(),
                    state: if tenant.record.suspended.load(Ordering::Relaxed) {
                        "suspended"
                    } else if tenant.crashes.waits().is_some() {
                        "crashing"
                    } else {
                        "serving"
                    },
                    app: tenant.config.app.clone(),
                    path: tenant.config.path.clone(),
                    loaded_at: since,
                    requests: tenant.record.requests.load(Ordering::Relaxed),
                    failures: tenant.record.failures.load(Ordering::Relaxed),
                    in_work,
                    resting,
                    memory: tenant.app.footprint.held(),
                    cpu_seconds: tenant.share.used().as_secs_f64(),
                    error: unloaded.get(&tenant.config.name).map(|unloaded| unloaded.error.clone()),
                }
            })
            .collect();
        for (name, Unloaded { config, error, .. }) in unloaded {
            if !list.iter().any(|status| status.name == name) {
                list.push(Status {
                    name,
                    state: "failed",
                    app: config.app,
                    path: config.path,
                    loaded_at: 0,
                    requests: 0,
                    failures: 0,
                    in_work: 0,
                    resting: 0,
                    memory: 0,
                    cpu_seconds: 0.0,
                    error: Some(error),
                });
            }
        }
        list
    }

    /// The last failures of a tenant, oldest first.
    ///
    /// # Errors
    ///
    /// If there is no such tenant.
    pub fn errors(&self, name: &str) -> Result<Vec<ErrorRecord>> {
        Ok(lock(&self.get(name)?.record.errors).iter().cloned().collect())
    }

    /// Refuses a tenant's requests, or takes them again.
    ///
    /// # Errors
    ///
    /// If there is no such tenant, or the state can not be saved.
    pub fn suspend(&self, name: &str, suspended: bool) -> Result<()> {
        let tenant = self.get(name)?;
        self.save_state(|state| {
            state.suspended.retain(|other| other != name);
            if suspended {
                state.suspended.push(name.to_owned());
            }
        })?;
        tenant.record.suspended.store(suspended, Ordering::Relaxed);
        Ok(())
    }

    /// Lets the app in `app` take the place of the tenant's.
    ///
    /// # Errors
    ///
    /// If there is no such tenant, or the new app does not start or answer.
    pub async fn deploy(self: &Arc<Self>, name: &str, app: &Path) -> Result<()> {
        let record = Arc::clone(&self.get(name)?.record);
        let _one = record.changing.lock().await;
        let tenant = self.get(name)?;
        if !app.is_file() {
            bail!("there is no app `{}`", app.display());
        }
        let config = TenantConfig { app: app.to_path_buf(), ..tenant.config.clone() };
        self.replace(config, Arc::clone(&record), true).await?;
        self.save_state(|state| drop(state.apps.insert(name.to_owned(), app.to_path_buf())))
    }

    /// Lets the version before take its place again.
    ///
    /// # Errors
    ///
    /// If there is no such tenant, or no version before.
    pub async fn roll_back(self: &Arc<Self>, name: &str) -> Result<()> {
        let record = Arc::clone(&self.get(name)?.record);
        let _one = record.changing.lock().await;
        let tenant = self.get(name)?;
        let Some(previous) = lock(&tenant.record.previous).clone() else {
            bail!("there is no version of `{name}` before this one");
        };
        self.save_state(|state| drop(state.apps.insert(name.to_owned(), previous.config.app.clone())))?;
        previous.app.pool.retire(false);
        lock(&self.all).insert(name.to_owned(), previous);
        self.publish();
        tenant.app.pool.retire(true);
        *lock(&record.previous) = Some(tenant);
        Ok(())
    }

    /// Refuses a tenant's requests from now on, and returns when those in work
    /// are done and its instances gone.
    ///
    /// # Errors
    ///
    /// As for [`Tenants::suspend`].
    pub async fn drain(&self, name: &str) -> Result<()> {
        self.suspend(name, true)?;
        let tenant = self.get(name)?;
        tenant.app.pool.drained().await;
        tenant.app.pool.clear();
        Ok(())
    }

    fn saved_state(&self) -> SavedState {
        let text = self.state_file.as_ref().and_then(|path| std::fs::read(path).ok());
        text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    fn save_state(&self, change: impl FnOnce(&mut SavedState)) -> Result<()> {
        let Some(path) = &self.state_file else { return Ok(()) };
        let _one = lock(&self.saving);
        let mut state = self.saved_state();
        change(&mut state);
        let directory = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(directory)
            .with_context(|| format!("failed to write in `{}`", directory.display()))?;
        std::io::Write::write_all(&mut file, &serde_json::to_vec_pretty(&state)?)?;
        file.as_file().sync_all()?;
        file.persist(path).with_context(|| format!("failed to write `{}`", path.display()))?;
        Ok(())
    }

    /// Looks after the tenants until the server ends: drops instances that
    /// have rested for too long, and reloads when an app or `watched` changes.
    pub async fn look_after(self: Arc<Self>, watched: Vec<PathBuf>) {
        let stamps = || watched.iter().map(|path| stamp(path)).collect::<Vec<_>>();
        let mut seen = stamps();
        let mut interval = tokio::time::interval(WATCH_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let all: Vec<_> = lock(&self.all).values().cloned().collect();
            for tenant in &all {
                tenant.app.pool.trim(tenant.config.instances.idle);
            }
            let changed = !watched.is_empty() && self.an_app_has_changed(&all);
            let now = stamps();
            if now != seen || changed {
                seen = now;
                self.reload_or_log().await;
            }
        }
    }

    /// Whether there is an app that has not been tried as it is now.
    fn an_app_has_changed(&self, all: &[Arc<Tenant>]) -> bool {
        let tried = lock(&self.unloaded).clone();
        let is_new = |unloaded: &Unloaded| stamp(&unloaded.config.app) != unloaded.stamp;
        tried.values().any(is_new)
            || all.iter().any(|tenant| !tried.contains_key(&tenant.config.name) && tenant.has_changed())
    }

    /// Reloads; a source that can not be read changes nothing but the log.
    pub async fn reload_or_log(self: &Arc<Self>) {
        if let Err(error) = self.reload().await {
            tracing::error!("the configuration was not reloaded: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_compared_without_port_and_case() {
        for (host, name) in [
            ("Shop.Example:8000", "shop.example"),
            ("shop.example.", "shop.example"),
            ("[::1]:80", "[::1]"),
            ("", ""),
        ] {
            assert_eq!(host_name(host), name);
        }
    }

    #[test]
    fn a_rate_is_kept() {
        let rate = RateLimit::new(5);
        assert_eq!((0..10).filter(|_| rate.take()).count(), 5);
    }

    #[test]
    fn crashes_in_a_row_lead_to_longer_waits() {
        let crashes = Crashes::default();
        for _ in 1..CRASHES_ALLOWED {
            crashes.failed();
        }
        assert_eq!(crashes.waits(), None);
        crashes.failed();
        assert_eq!(crashes.waits(), Some(1));
        for _ in 0..10 {
            crashes.failed();
        }
        assert_eq!(crashes.waits(), Some(LONGEST_WAIT.as_secs()));
        crashes.succeeded();
        assert_eq!(crashes.waits(), None);
    }
}
