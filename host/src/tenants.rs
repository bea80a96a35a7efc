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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;
use serde::Serialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use wasmtime::Engine;

use crate::app;
use crate::cache::Cache;
use crate::code::{Loader, Sharing};
use crate::config::{HostPattern, TenantConfig};
use crate::environ::path_info;
use crate::failure::Failure;
use crate::footprint::{Footprint, Together};
use crate::guest_log::LineBudget;
use crate::handler::{self, App, RequestLimits};
use crate::instance::TenantFull;
use crate::key_derivation::Derivations;
use crate::network::NetworkGrants;
use crate::pool::{Pool, PoolSettings, Pools};
use crate::request_id::RequestId;
use crate::scheduler::{Scheduler, Share, processors};
use crate::state::{Rejected, Stamp, State, StateFile, stamp};
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
    /// What tenants on `engine` share, which has room for the instances of
    /// `pools`.
    pub fn new(
        engine: Engine,
        pools: Arc<Pools>,
        cache: Cache,
        sharing: Option<Sharing>,
        client_idle: Duration,
        min_rate: u64,
        scheduler: Arc<Scheduler>,
    ) -> Shared {
        let loader = Loader::new(&engine, &cache);
        Shared { engine, cache, loader, sharing, scheduler, pools, client_idle, min_rate }
    }

    /// The same for one app that no server serves, with room for so many instances: it
    /// has the machine for itself, and as much time as it takes.
    pub fn alone(engine: Engine, instances: u32, cache: Cache, sharing: Option<Sharing>) -> Shared {
        let pools = Pools::new(instances, 0, u64::MAX);
        Shared::new(engine, pools, cache, sharing, Duration::MAX, 0, Scheduler::new(None))
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
    books: Books,
    /// The app's file when it was loaded.
    stamp: Stamp,
    /// A copy of it that lasts.
    copy: Option<PathBuf>,
    loaded_at: SystemTime,
    /// What outlives a version.
    record: Arc<Record>,
    crashes: Crashes,
}

/// What is counted of a tenant against its limits. Versions of the same limits
/// share them: while one takes over from another a tenant has no more than at
/// other times, and no change fills its budgets up.
#[derive(Clone)]
pub struct Books {
    /// Its use of the processors.
    pub share: Arc<Share>,
    /// What it holds of the host's memory.
    pub footprint: Arc<Footprint>,
    /// What it may reach on the network, and how far it does.
    pub network: Arc<NetworkGrants>,
    /// What it may log.
    pub log: Arc<LineBudget>,
    /// Its part in the key derivations.
    pub derivations: Arc<Derivations>,
    rate: Option<Arc<RateLimit>>,
}

impl Books {
    /// Books for `config`: those of the version `before` as far as it had the
    /// same limits.
    pub fn new(
        config: &TenantConfig,
        scheduler: &Arc<Scheduler>,
        all: &Arc<Together>,
        before: Option<(&TenantConfig, &Books)>,
    ) -> Books {
        let kept = |same: fn(&TenantConfig, &TenantConfig) -> bool| {
            before.filter(|(before, _)| same(before, config)).map(|(_, books)| books.clone())
        };
        let limits = &config.limits;
        // What one of them counts is charged to another, so they stay together.
        let same = kept(|a, b| {
            a.weight == b.weight
                && a.limits.cpu_per_minute == b.limits.cpu_per_minute
                && a.limits.total_memory == b.limits.total_memory
        });
        let (share, footprint, derivations) = same.map_or_else(
            || {
                let share = Share::new(scheduler, config.weight, limits.cpu_per_minute);
                let footprint = Footprint::within(limits.total_memory, &share, all);
                let derivations = Derivations::new(Arc::clone(&share), Arc::clone(&footprint));
                (share, footprint, Arc::new(derivations))
            },
            |books| (books.share, books.footprint, books.derivations),
        );
        Books {
            share,
            footprint,
            derivations,
            network: kept(|a, b| a.network == b.network && a.traffic == b.traffic).map_or_else(
                || Arc::new(NetworkGrants::new(config.network.clone(), config.traffic)),
                |books| books.network,
            ),
            log: kept(|a, b| a.limits.log_lines == b.limits.log_lines)
                .map_or_else(|| Arc::new(LineBudget::new(limits.log_lines)), |books| books.log),
            rate: kept(|a, b| a.limits.requests_per_second == b.limits.requests_per_second).map_or_else(
                || limits.requests_per_second.map(|rate| Arc::new(RateLimit::new(rate))),
                |books| books.rate,
            ),
        }
    }
}

/// What is known of a tenant over all its versions, and before the first.
pub struct Record {
    suspended: AtomicBool,
    /// Told when it takes requests again.
    resumed: Notify,
    requests: AtomicU64,
    failures: AtomicU64,
    errors: Mutex<VecDeque<ErrorRecord>>,
    /// How many failures are logged.
    log: LineBudget,
    /// What the source asked for last.
    asked: Mutex<Option<Asked>>,
    /// The version before, for a rollback.
    previous: Mutex<Option<Arc<Tenant>>>,
    /// The instances of all versions that there still are.
    pools: Mutex<Vec<Weak<Pool>>>,
    /// One change at a time. Not one for all tenants: a version that takes
    /// minutes to compile must not hold up the others'.
    changing: tokio::sync::Mutex<()>,
}

/// What the source asked for. It is tried once, and again only when it is
/// something else: what was rolled back from does not come back by itself.
#[derive(Clone)]
struct Asked {
    /// What the configuration says.
    config: TenantConfig,
    /// The app: that of the configuration, or one that was deployed.
    app: PathBuf,
    /// The app's file at that time.
    stamp: Stamp,
    /// Whether it was tried in vain.
    has_failed: bool,
}

impl Record {
    fn new(is_suspended: bool) -> Record {
        Record {
            suspended: AtomicBool::new(is_suspended),
            resumed: Notify::new(),
            requests: AtomicU64::default(),
            failures: AtomicU64::default(),
            errors: Mutex::default(),
            log: LineBudget::new(LOGGED_FAILURES),
            asked: Mutex::default(),
            previous: Mutex::default(),
            pools: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// The instances of all versions.
    fn pools(&self) -> Vec<Arc<Pool>> {
        let mut pools = lock(&self.pools);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.iter().filter_map(Weak::upgrade).collect()
    }

    fn requests_in_work(&self) -> usize {
        self.pools().iter().map(|pool| pool.usage().0).sum()
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

impl Tenant {
    /// Loads a version and makes sure that it answers. Blocks for as long as
    /// that takes, which is seconds if the code has to be compiled.
    fn load(
        shared: &Shared,
        state: &StateFile,
        config: TenantConfig,
        books: Books,
        record: Arc<Record>,
    ) -> Result<Tenant> {
        let stamp = stamp(&config.app);
        let app::Loaded { program, grants, mounts, digest } = app::load_artifact(shared, &config, &books)?;
        let copy = if state.is_copy(&config.app) {
            Some(config.app.clone())
        } else {
            state.keep(&config.app, &digest, stamp).unwrap_or_else(|error| {
                tracing::warn!(tenant = %config.name, "a rollback to this version would not last: {error:#}");
                None
            })
        };
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
        let pool = Pool::new(&shared.pools, program, grants, settings);
        lock(&record.pools).push(Arc::downgrade(&pool));
        let (share, footprint) = (Arc::clone(&books.share), Arc::clone(&books.footprint));
        Ok(Tenant {
            app: Arc::new(App { pool, limits, share, footprint }),
            mounts,
            books,
            stamp,
            copy,
            loaded_at: SystemTime::now(),
            record,
            crashes: Crashes::default(),
            config,
        })
    }

    /// Starts an instance and asks the health request, if there is one. The
    /// instance stays if requests are expected at once.
    async fn prove(&self, is_expected: bool) -> Result<()> {
        let warm = match self.app.pool.warm().await {
            // Versions share one number. Those that rest of the one before go
            // at once, and not only when this one has taken its place.
            Err(error) if error.is::<TenantFull>() => {
                for pool in self.record.pools() {
                    pool.clear();
                }
                self.app.pool.warm().await
            }
            warm => warm,
        };
        warm.map_err(|error| app::refuse_start(&self.config.name, self.config.limits.memory, &error))?;
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
        if let Some(seconds) = self.books.share.exhausted() {
            return Err(Failure::BudgetExhausted(seconds));
        }
        if self.books.rate.as_ref().is_some_and(|rate| !rate.take()) {
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
        static_files::Mount::find(&self.mounts, path)
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
    /// All that the source names, loaded or not.
    records: Mutex<BTreeMap<String, Arc<Record>>>,
    all: Mutex<BTreeMap<String, Arc<Tenant>>>,
    /// Versions that were not taken into use, by their tenants' names.
    unloaded: Mutex<BTreeMap<String, Unloaded>>,
    /// The source is read by one at a time.
    reading: tokio::sync::Mutex<()>,
    source: Source,
    /// Whether `start` is done.
    started: AtomicBool,
    state: StateFile,
    /// Held by all who make copies of apps, and by the one who removes some.
    copying: tokio::sync::RwLock<()>,
}

/// What the source is read from, as it is now.
pub type Watch = Box<dyn Fn() -> Vec<(PathBuf, Stamp)> + Send + Sync>;

fn interval() -> tokio::time::Interval {
    let mut interval = tokio::time::interval(WATCH_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

/// Where the tenants come from, to be read again when it changes.
pub type Source = Box<dyn Fn() -> Result<Vec<TenantConfig>> + Send + Sync>;

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
    /// The tenants that `source` names, as far as `state` does not say
    /// otherwise. One that can not be loaded does not keep others from being
    /// served.
    ///
    /// # Errors
    ///
    /// If the source can not be read, or none of its tenants can be loaded.
    pub async fn start(shared: Arc<Shared>, source: Source, state: StateFile) -> Result<Arc<Tenants>> {
        let tenants = Arc::new(Tenants {
            shared,
            table: ArcSwap::default(),
            records: Mutex::default(),
            all: Mutex::default(),
            unloaded: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
            source,
            started: AtomicBool::new(false),
            state,
            copying: tokio::sync::RwLock::default(),
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
        let records: Vec<_> = lock(&self.records).values().cloned().collect();
        for pool in records.iter().flat_map(|record| record.pools()) {
            pool.drained().await;
        }
    }

    /// Does what may wait for a disk off the runtime's threads.
    async fn off_thread<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Tenants) -> T + Send + 'static,
    ) -> Result<T> {
        let tenants = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&tenants)).await.context("ended with a panic")
    }

    /// Reads the source again, and loads what is new or has changed.
    ///
    /// # Errors
    ///
    /// If the source can not be read; then nothing changes.
    pub async fn reload(self: &Arc<Self>) -> Result<()> {
        let _one = self.reading.lock().await;
        let wanted = self.off_thread(|tenants| (tenants.source)()).await??;
        let names: BTreeSet<String> = wanted.iter().map(|config| config.name.clone()).collect();
        let is_only = wanted.len() == 1;
        let suspended = self.state.get().suspended;
        for name in &names {
            let new = || Arc::new(Record::new(suspended.contains(name)));
            lock(&self.records).entry(name.clone()).or_insert_with(new);
        }
        let mut loading = JoinSet::new();
        for config in wanted {
            if loading.len() >= processors() {
                loading.join_next().await;
            }
            let tenants = Arc::clone(self);
            loading.spawn(async move { tenants.follow(config, is_only).await });
        }
        while loading.join_next().await.is_some() {}
        lock(&self.records).retain(|name, _| names.contains(name));
        for (_, removed) in lock(&self.all).extract_if(.., |name, _| !names.contains(name)) {
            // The two refer to each other: neither would ever go.
            lock(&removed.record.previous).take();
            removed.app.pool.retire(true);
        }
        lock(&self.unloaded).retain(|name, _| names.contains(name));
        self.publish();
        self.sweep().await;
        Ok(())
    }

    /// Makes a tenant what `config` and what `ctl` has changed say.
    async fn follow(self: &Arc<Self>, config: TenantConfig, is_only: bool) {
        let name = config.name.clone();
        let Ok(record) = self.record(&name) else { return };
        let _one = record.changing.lock().await;
        let state = self.state.get();
        let app = state.apps.get(&name).unwrap_or(&config.app).clone();
        let looked_at = app.clone();
        let Ok(stamp) = self.off_thread(move |_| stamp(&looked_at)).await else { return };
        let before = lock(&record.asked).clone();
        if before.is_some_and(|before| {
            !before.has_failed && before.config == config && before.app == app && before.stamp == stamp
        }) {
            return;
        }
        let mut asked = Asked { config: config.clone(), app: app.clone(), stamp, has_failed: false };
        let rejected = state.rejected.get(&name);
        let is_rejected = rejected.is_some_and(|rejected| rejected.app == app && rejected.stamp == stamp);
        let app = rejected.filter(|_| is_rejected).map_or(app, |rejected| rejected.instead.clone());
        let replaces = lock(&self.all).contains_key(&name);
        let replaced = self.replace(TenantConfig { app, ..config }, Arc::clone(&record), is_only).await;
        asked.has_failed = replaced.is_err();
        *lock(&record.asked) = Some(asked);
        if let Err(error) = replaced {
            if replaces {
                tracing::error!(tenant = %name, "the new version is not used: {error:#}");
            } else if !is_only || self.started.load(Ordering::Relaxed) {
                // Else `start` fails with it.
                tracing::error!(tenant = %name, "the app is not served: {error:#}");
            }
        } else if rejected.is_some() && !is_rejected {
            let forgotten = name.clone();
            let saved = self.save(move |state| drop(state.rejected.remove(&forgotten))).await;
            if let Err(error) = saved {
                tracing::warn!(tenant = %name, "{error:#}");
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
    ) -> Result<Arc<Tenant>> {
        let _copying = self.copying.read().await;
        let name = config.name.clone();
        let before = lock(&self.all).get(&name).cloned();
        let is_expected = is_expected || before.is_some();
        let known = before.as_ref().map(|before| (&before.config, &before.books));
        let books = Books::new(&config, &self.shared.scheduler, self.shared.pools.memory(), known);
        let attempt = config.clone();
        let loading = Arc::clone(&record);
        // Loading reads and compiles; that must not hold up requests.
        let loaded = self
            .off_thread(move |tenants| Tenant::load(&tenants.shared, &tenants.state, config, books, loading))
            .await
            .and_then(std::convert::identity);
        let proved = match loaded {
            Ok(tenant) => tenant.prove(is_expected).await.map(|()| tenant),
            Err(error) => Err(error),
        };
        match proved {
            Ok(_) if !self.record(&name).is_ok_and(|known| Arc::ptr_eq(&known, &record)) => {
                bail!("the tenant is not there any more")
            }
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
                Ok(tenant)
            }
            Err(error) => {
                let text = format!("{error:#}");
                record.fail(None, text.clone());
                lock(&self.unloaded).insert(name, Unloaded { config: attempt, error: text });
                Err(error)
            }
        }
    }

    /// Changes the state, and returns when that lasts.
    async fn save(self: &Arc<Self>, change: impl FnOnce(&mut State) + Send + 'static) -> Result<()> {
        self.off_thread(|tenants| tenants.state.change(change)).await?
    }

    /// Removes the copies of apps that no rollback can return to any more.
    async fn sweep(self: &Arc<Self>) {
        // Those who make copies now will see to it.
        let Ok(_copying) = self.copying.try_write() else { return };
        let all: Vec<_> = lock(&self.all).values().cloned().collect();
        let previous = all.iter().filter_map(|tenant| lock(&tenant.record.previous).clone());
        let in_use = all.iter().cloned().chain(previous).filter_map(|tenant| tenant.copy.clone()).collect();
        let _ = self.off_thread(move |tenants| tenants.state.sweep(&in_use)).await;
    }

    fn publish(&self) {
        self.table.store(Arc::new(Table::new(&lock(&self.all), &lock(&self.unloaded))));
    }

    /// What is known of the tenant `name`, loaded or not.
    fn record(&self, name: &str) -> Result<Arc<Record>> {
        match lock(&self.records).get(name) {
            Some(record) => Ok(Arc::clone(record)),
            None => bail!("there is no tenant `{name}`"),
        }
    }

    fn serving(&self, name: &str) -> Option<Arc<Tenant>> {
        lock(&self.all).get(name).cloned()
    }

    /// What there is to say of each tenant.
    pub fn list(&self) -> Vec<Status> {
        let unloaded = lock(&self.unloaded).clone();
        let mut list: Vec<Status> = lock(&self.all)
            .values()
            .map(|tenant| {
                let (_, resting) = tenant.app.pool.usage();
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
                    in_work: tenant.record.requests_in_work(),
                    resting,
                    memory: tenant.app.footprint.held(),
                    cpu_seconds: tenant.books.share.used().as_secs_f64(),
                    error: unloaded.get(&tenant.config.name).map(|unloaded| unloaded.error.clone()),
                }
            })
            .collect();
        for (name, Unloaded { config, error, .. }) in unloaded {
            if !list.iter().any(|status| status.name == name) {
                let record = self.record(&name).ok();
                let count = |of: fn(&Record) -> &AtomicU64| {
                    record.as_ref().map_or(0, |record| of(record).load(Ordering::Relaxed))
                };
                list.push(Status {
                    name,
                    state: "failed",
                    app: config.app,
                    path: config.path,
                    loaded_at: 0,
                    requests: count(|record| &record.requests),
                    failures: count(|record| &record.failures),
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
        Ok(lock(&self.record(name)?.errors).iter().cloned().collect())
    }

    /// Refuses a tenant's requests, or takes them again.
    ///
    /// # Errors
    ///
    /// If there is no such tenant, or the state can not be saved.
    pub async fn suspend(self: &Arc<Self>, name: &str, suspended: bool) -> Result<()> {
        let record = self.record(name)?;
        let tenant = name.to_owned();
        self.save(move |state| {
            state.suspended.retain(|other| *other != tenant);
            if suspended {
                state.suspended.push(tenant);
            }
        })
        .await?;
        record.suspended.store(suspended, Ordering::Relaxed);
        if !suspended {
            record.resumed.notify_waiters();
        }
        Ok(())
    }

    /// Lets the app in `app` take the place of the tenant's, also of one that
    /// could not be loaded.
    ///
    /// # Errors
    ///
    /// If there is no such tenant, or the new app does not start or answer.
    pub async fn deploy(self: &Arc<Self>, name: &str, app: &Path) -> Result<()> {
        let record = self.record(name)?;
        let _one = record.changing.lock().await;
        let asked = lock(&record.asked).clone();
        let config = match (self.serving(name), &asked) {
            (Some(tenant), _) => tenant.config.clone(),
            (None, Some(asked)) => asked.config.clone(),
            (None, None) => bail!("there is no tenant `{name}`"),
        };
        let path = app.to_path_buf();
        if !self.off_thread(move |_| path.is_file()).await? {
            bail!("there is no app `{}`", app.display());
        }
        let config = TenantConfig { app: app.to_path_buf(), ..config };
        let tenant = self.replace(config, Arc::clone(&record), true).await?;
        let (app, stamp) = (app.to_path_buf(), tenant.stamp);
        *lock(&record.asked) =
            asked.map(|asked| Asked { app: app.clone(), stamp, has_failed: false, ..asked });
        let name = name.to_owned();
        self.save(move |state| {
            state.rejected.remove(&name);
            state.apps.insert(name, app);
        })
        .await?;
        self.sweep().await;
        Ok(())
    }

    /// Lets the version before take its place again. What the source asks for
    /// is not tried again until it is something else.
    ///
    /// # Errors
    ///
    /// If there is no such tenant, or no version before.
    pub async fn roll_back(self: &Arc<Self>, name: &str) -> Result<()> {
        let record = self.record(name)?;
        let _one = record.changing.lock().await;
        let previous = lock(&record.previous).clone();
        let (Some(tenant), Some(previous), Some(asked)) =
            (self.serving(name), previous, lock(&record.asked).clone())
        else {
            bail!("there is no version of `{name}` before this one");
        };
        let back = Arc::clone(&previous);
        let asked = self.off_thread(move |tenants| tenants.reject(asked, &back)).await??;
        *lock(&record.asked) = Some(asked);
        previous.app.pool.retire(false);
        lock(&self.all).insert(name.to_owned(), previous);
        self.publish();
        tenant.app.pool.retire(true);
        *lock(&record.previous) = Some(tenant);
        Ok(())
    }

    /// Notes that `previous` is wanted in place of what is asked for, and
    /// returns what is asked for then. Blocks on the disk.
    fn reject(&self, asked: Asked, previous: &Tenant) -> Result<Asked> {
        let (name, app) = (&previous.config.name, &previous.config.app);
        let is_deployed = *app != asked.config.app && !self.state.is_copy(app);
        let mut asked = Asked { has_failed: false, ..asked };
        self.state.change(|state| {
            // A deployment is undone; what the configuration names is not.
            if let Some(deployed) = state.apps.get_mut(name).filter(|_| is_deployed) {
                deployed.clone_from(app);
            } else {
                state.apps.remove(name);
            }
            asked.app.clone_from(state.apps.get(name).unwrap_or(&asked.config.app));
            asked.stamp = stamp(&asked.app);
            let is_another = *app != asked.app || previous.stamp != asked.stamp;
            let instead = previous.copy.as_ref().or(Some(app).filter(|app| **app != asked.app));
            match instead.filter(|_| is_another) {
                Some(instead) => {
                    let instead = instead.clone();
                    let rejected = Rejected { app: asked.app.clone(), stamp: asked.stamp, instead };
                    state.rejected.insert(name.clone(), rejected);
                }
                None => drop(state.rejected.remove(name)),
            }
        })?;
        Ok(asked)
    }

    /// Refuses a tenant's requests from now on, and returns when those in work
    /// are done and its instances gone.
    ///
    /// # Errors
    ///
    /// As for [`Tenants::suspend`], or if it is resumed meanwhile.
    pub async fn drain(self: &Arc<Self>, name: &str) -> Result<()> {
        let record = self.record(name)?;
        let mut resumed = std::pin::pin!(record.resumed.notified());
        resumed.as_mut().enable();
        self.suspend(name, true).await?;
        for pool in record.pools() {
            tokio::select! {
                () = pool.drained() => pool.clear(),
                () = &mut resumed => bail!("`{name}` was resumed before it was drained"),
            }
        }
        Ok(())
    }

    /// Looks after the tenants until the server ends: drops instances that
    /// have rested for too long.
    pub async fn look_after(self: Arc<Self>) {
        let mut interval = interval();
        loop {
            interval.tick().await;
            let all: Vec<_> = lock(&self.all).values().cloned().collect();
            for tenant in &all {
                tenant.app.pool.trim(tenant.config.instances.idle);
            }
        }
    }

    /// Reloads when an app or what `seen` looks at changes, until the server
    /// ends.
    pub async fn watch(self: Arc<Self>, seen: Watch) {
        let seen = Arc::new(seen);
        let mut before = None;
        let mut interval = interval();
        loop {
            interval.tick().await;
            let look = Arc::clone(&seen);
            let Ok((now, an_app_has_changed)) =
                self.off_thread(move |tenants| (look(), tenants.an_app_has_changed())).await
            else {
                continue;
            };
            let is_same = before.replace(now.clone()).is_none_or(|before| before == now);
            if !is_same || an_app_has_changed {
                self.reload_or_log().await;
            }
        }
    }

    /// Whether there is an app that has not been tried as it is now. Blocks on
    /// the disk.
    fn an_app_has_changed(&self) -> bool {
        let records: Vec<_> = lock(&self.records).values().cloned().collect();
        records
            .iter()
            .filter_map(|record| lock(&record.asked).clone())
            .any(|asked| stamp(&asked.app) != asked.stamp)
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
