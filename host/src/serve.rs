//! The `serve` command: load the app, bind, accept, and drain on a signal.
//!
//! Everything that can be wrong is found before the first socket is bound.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::access_log::AccessLog;
use crate::app;
use crate::cache::Cache;
use crate::cli::{CheckArgs, HttpArgs, ServeArgs};
use crate::config::{self, Instances, Limits, TenantConfig};
use crate::connection::{ConnectionLimits, Peers, Server, converse};
use crate::control;
use crate::engine::{self, EpochTicker};
use crate::error::UserError;
use crate::forwarded::Proxies;
use crate::front::Front;
use crate::listener::{self, Address, Inherited, Listener};
use crate::machine;
use crate::pool::Pools;
use crate::sandbox::{self, Paths};
use crate::scheduler::processors;
use crate::state::StateFile;
use crate::static_files::Mount;
use crate::tenants::{Shared, Source, Tenants};
use crate::tls::{Tls, TlsFiles};
use crate::units::Size;
use crate::wire::HeadLimits;

/// Where we listen if nothing else is said.
const DEFAULT_ADDRESS: &str = "127.0.0.1:8000";
/// No limit for heads goes beyond this: each is held in memory.
const MAX_HEAD: usize = 1 << 20;
/// And none for targets goes beyond what a `Uri` can hold.
const MAX_TARGET: usize = u16::MAX as usize - 1;
/// Instances in reserve at most: each takes some GiB of addresses.
const MAX_RESERVE: u32 = 8192;

/// Runs the server until a signal ends it.
///
/// # Errors
///
/// A [`UserError`] if an app or an option is not usable, else what failed.
pub fn run(args: &ServeArgs) -> Result<()> {
    // First of all, since it changes the environment.
    let inherited = listener::inherited()?;
    let cache = Cache::open()?;
    let http = &args.http;
    let tls = tls(http)?;
    let proxies = Proxies::new(&http.trusted_proxy, http.forwarded, http.forwarded_hops.into())?;
    let mounts = http.static_files.iter().map(|text| Mount::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let access_log = AccessLog::open(http.access_log, http.access_log_file.as_deref())?.map(Arc::new);
    let plan = Plan::new(args, &cache)?;
    let state = StateFile::open(plan.state.clone(), plan.control.is_some())?;
    let mut addresses = plan.bind.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>>>()?;
    if addresses.is_empty() && inherited.is_empty() {
        addresses.push(Address::parse(DEFAULT_ADDRESS)?);
    }
    let connections = connections_that_fit(http.max_connections);
    let reserve = plan.reserve;
    let engine = engine::runner(plan.instances.saturating_add(reserve))
        .map_err(anyhow::Error::from)
        .context("failed to reserve memory for the instances")?;
    // Before the first thread: not all of it reaches those that run already.
    sandbox::apply(args.sandbox, &paths_in_use(args, &plan, &cache, &addresses)?)?;
    let _ticker = EpochTicker::start(&engine).context("failed to start the epoch thread")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Twice as many threads as guests may compute on for long: see `scheduler`.
        .worker_threads(2 * processors())
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let (idle, rate) = (http.client_timeout.0, http.min_rate.0);
    let pools = Pools::new(plan.instances, reserve, plan.memory);
    let shared = Arc::new(Shared::new(engine, pools, cache, args.grants.code, idle, rate));
    let served = runtime.block_on(async {
        let tenants = Tenants::start(shared, plan.source, state).await?;
        let server = Server {
            limits: connection_limits(http),
            tls,
            proxy_protocol: http.proxy_protocol,
            connections: Arc::new(Semaphore::new(connections)),
            peers: Peers::new(http.max_connections_per_client, {
                let proxies = proxies.clone();
                move |peer| proxies.trusts(Some(peer))
            }),
            front: Front { tenants, proxies, mounts, compress: http.compress, access_log },
        };
        let work = Work { control: plan.control, watched: plan.watched, grace: args.grace.0 };
        serve(server, &addresses, inherited, work).await
    });
    // Whatever is left had its grace.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
}

/// Takes as many descriptors as the process may have. Returns how many
/// connections may be open: so many as `wanted`, but some descriptors stay for
/// the apps' files and connections, and for ourselves, whoever holds the rest.
fn connections_that_fit(wanted: u32) -> usize {
    let limit = getrlimit(Resource::Nofile);
    // Where it is refused, what there was stays.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let Some(descriptors) = getrlimit(Resource::Nofile).current else { return wanted as usize };
    let fit = usize::try_from(descriptors - descriptors / 4).unwrap_or(usize::MAX);
    if fit < wanted as usize {
        tracing::warn!(
            "the process may have {descriptors} descriptors, so it takes {fit} connections at a time \
             and not {wanted}; raise the limit with `ulimit -n` or `LimitNOFILE`"
        );
    }
    fit.min(wanted as usize)
}

/// The certificates that the options name, loaded.
fn tls(http: &HttpArgs) -> Result<Option<Arc<Tls>>> {
    if http.tls_cert.len() != http.tls_key.len() {
        let (certificates, keys) = (http.tls_cert.len(), http.tls_key.len());
        return Err(UserError::new(format!("{certificates} certificates and {keys} keys were given"))
            .remedy("give one `--tls-key` for each `--tls-cert`, in the same order")
            .into());
    }
    if http.tls_cert.is_empty() {
        return Ok(None);
    }
    let pairs = http.tls_cert.iter().cloned().zip(http.tls_key.iter().cloned()).collect();
    Ok(Some(Arc::new(Tls::new(TlsFiles { pairs, client_ca: http.tls_client_ca.clone() })?)))
}

fn connection_limits(http: &HttpArgs) -> ConnectionLimits {
    let bytes = |size: Size| usize::try_from(size.0).unwrap_or(usize::MAX).min(MAX_HEAD);
    ConnectionLimits {
        header_timeout: http.header_timeout.0,
        keep_alive: http.keep_alive.0,
        requests: http.keep_alive_requests,
        client_idle: http.client_timeout.0,
        head: HeadLimits {
            bytes: bytes(http.max_header_size),
            fields: http.max_headers.into(),
            target: bytes(http.max_uri).min(MAX_TARGET),
        },
        streams: http.http2_streams,
        resets: http.http2_resets.into(),
    }
}

/// The `check` command: reads a configuration and says what is wrong with it.
///
/// # Errors
///
/// A [`UserError`] with all that is wrong.
#[expect(clippy::print_stdout, reason = "this is the command's output")]
pub fn check(args: &CheckArgs) -> Result<()> {
    if args.schema {
        println!("{}", serde_json::to_string_pretty(&config::schema())?);
        return Ok(());
    }
    let Some(file) = &args.file else {
        return Err(UserError::new("no configuration to check")
            .remedy("name a file, or give `--schema`")
            .into());
    };
    println!("{} is fine: {} tenants", file.display(), config::check(file)?);
    Ok(())
}

/// What the options and the configuration file come to.
struct Plan {
    bind: Vec<String>,
    control: Option<PathBuf>,
    state: Option<PathBuf>,
    /// Instances that there is room for.
    instances: u32,
    /// Further ones, for tenants that have none.
    reserve: u32,
    /// Memory of all tenants together.
    memory: u64,
    source: Source,
    /// What the source reads, and whose change means that it has to be read again.
    watched: Option<PathBuf>,
}

impl Plan {
    fn new(args: &ServeArgs, cache: &Cache) -> Result<Plan> {
        let bind = |configured: Vec<String>| {
            if args.bind.is_empty() { configured } else { args.bind.clone() }
        };
        let (control, state) = (args.control.clone(), args.state.clone());
        // Some for tenants that come later, and for versions that take over.
        let reserve =
            |tenants: usize| u32::try_from(tenants).unwrap_or(u32::MAX).saturating_add(64).min(MAX_RESERVE);
        if let Some(path) = args.config.clone() {
            let config = config::load(&path)?;
            // In a directory of its own: the server may write there.
            let beside = || {
                let name = path.with_extension("json");
                path.with_file_name("state").join(name.file_name().unwrap_or_default())
            };
            return Ok(Plan {
                bind: bind(config.bind),
                control: control.or(config.control),
                state: Some(state.or(config.state).unwrap_or_else(beside)),
                instances: config.instances,
                reserve: reserve(config.tenants.len()),
                memory: config.memory.unwrap_or_else(machine::memory_for_tenants),
                watched: Some(path.clone()),
                source: Box::new(move || Ok(config::load(&path)?.tenants)),
            });
        }
        if let Some(directory) = args.tenants.clone() {
            let tenants = config::load_directory(&directory)?;
            return Ok(Plan {
                bind: bind(Vec::new()),
                control,
                state: Some(state.unwrap_or_else(|| directory.join("state/wsgi-wasm.json"))),
                instances: config::DEFAULT_TOTAL_INSTANCES,
                reserve: reserve(tenants.len()),
                memory: machine::memory_for_tenants(),
                watched: Some(directory.clone()),
                source: Box::new(move || config::load_directory(&directory)),
            });
        }
        let tenant = app::only_tenant(cache, args.app.as_deref(), &args.project, &args.grants)?;
        let tenant = TenantConfig {
            isolation: args.isolation,
            instances: Instances {
                max: usize::from(args.instances),
                requests: args.max_requests,
                ..tenant.instances
            },
            limits: Limits {
                timeout: args.timeout.0,
                cpu: args.cpu.map(|time| time.0),
                body: args.max_body.0,
                response_time: args.response_time.0,
                log_lines: args.log_lines,
                queue: args.queue as usize,
                queue_wait: args.queue_wait.0,
                total_memory: Some(args.total_memory.map_or_else(
                    || config::default_total_memory(tenant.limits.memory, args.instances.into()),
                    |size| size.0,
                )),
                ..tenant.limits
            },
            ..tenant
        };
        Ok(Plan {
            bind: bind(Vec::new()),
            control,
            state,
            // As many again may stand prepared: see `Pool::prepare`.
            instances: u32::from(args.instances) * 2,
            reserve: 0,
            // The app's own limit is what the user may have said otherwise.
            memory: u64::MAX,
            watched: None,
            source: Box::new(move || Ok(vec![tenant.clone()])),
        })
    }
}

/// The paths that the server uses while it serves.
fn paths_in_use(args: &ServeArgs, plan: &Plan, cache: &Cache, addresses: &[Address]) -> Result<Paths> {
    let parent = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut write = vec![cache.root().to_path_buf()];
    let statics = args.http.static_files.iter().filter_map(|text| text.split_once('='));
    let mut read: Vec<PathBuf> = statics.map(|(_, directory)| directory.into()).collect();
    for tenant in (plan.source)()? {
        read.push(parent(&tenant.app));
        read.extend(tenant.static_files.into_values());
        write.extend(tenant.files.data.map(|(path, _)| path));
    }
    write.extend(addresses.iter().filter_map(|address| match address {
        Address::Unix(path) => Some(parent(path)),
        Address::Tcp(..) => None,
    }));
    write.extend(plan.control.as_deref().map(parent));
    if let Some(state) = &plan.state {
        let directory = parent(state);
        if plan.control.is_some()
            && let Err(error) = std::fs::create_dir_all(&directory)
        {
            tracing::warn!("failed to create `{}` for the state: {error}", directory.display());
        }
        write.push(directory);
    }
    let http = &args.http;
    let certificates = http.tls_cert.iter().chain(&http.tls_key).chain(&http.tls_client_ca);
    read.extend(certificates.map(|path| parent(path)));
    if let Some(path) = &plan.watched {
        // Tenants come while the server runs: their apps from anywhere, their
        // data directories below the one with the configuration.
        read.push("/".into());
        write.push(if path.is_dir() { path.clone() } else { parent(path) });
    }
    Ok(Paths { read, write })
}

/// What the server does besides answering.
struct Work {
    control: Option<PathBuf>,
    watched: Option<PathBuf>,
    /// Time to finish what is running at the end.
    grace: Duration,
}

async fn serve(server: Server, addresses: &[Address], inherited: Vec<Inherited>, work: Work) -> Result<()> {
    let with_tls = server.tls.is_some();
    let mut listeners = Vec::new();
    for socket in inherited {
        listeners.push(socket.listen(with_tls).context("failed to take over a socket")?);
    }
    for address in addresses {
        listeners.push(address.listen(with_tls).await?);
    }
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;
    let mut reload = signal(SignalKind::hangup()).context("failed to watch for SIGHUP")?;
    if let Some(path) = &work.control {
        control::start(Arc::clone(&server.front.tenants), path)?;
    }
    tokio::spawn(Arc::clone(&server.front.tenants).look_after());
    if let Some(path) = work.watched {
        let look = Box::new(move || config::stamps(&path));
        tokio::spawn(Arc::clone(&server.front.tenants).watch(look));
    }
    for listener in &listeners {
        announce(&format!("listening on {}", listener.url()));
    }
    let server = Arc::new(server);
    let (stop, stopping) = watch::channel(false);
    if let Some(tls) = &server.tls {
        tokio::spawn(Arc::clone(tls).renew(stopping.clone()));
    }
    let accepting: Vec<_> = listeners
        .into_iter()
        .map(|listener| tokio::spawn(accept(Arc::clone(&server), listener, stopping.clone())))
        .collect();
    drop(stopping);

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // Not awaited: it may compile for longer than a signal to stop can wait.
            _ = reload.recv() => {
                let tenants = Arc::clone(&server.front.tenants);
                tokio::spawn(async move { tenants.reload_or_log().await });
            }
        }
    }
    tracing::info!("stopping: finishing what is running");
    // The receivers are gone only if every task has ended already.
    let _ = stop.send(true);
    for task in accepting {
        // Drops the listener, so that no new connection is taken.
        let _ = task.await;
    }
    let cut = tokio::select! {
        // Each connection holds a receiver until it is closed. Then only
        // guests that clean up after a client that left are still at work.
        () = async { stop.closed().await; server.front.tenants.drained().await } => return Ok(()),
        () = tokio::time::sleep(work.grace) => "after the grace time",
        _ = terminate.recv() => "at the second signal",
        _ = interrupt.recv() => "at the second signal",
    };
    match stop.receiver_count() {
        0 => bail!("an app was still at work {cut} and is stopped"),
        open => bail!("{open} connections were still open {cut} and are cut"),
    }
}

/// The line that says where we listen: the one thing on standard output.
#[expect(clippy::print_stdout, reason = "a program that starts us reads the port from here")]
fn announce(line: &str) {
    println!("{line}");
}

/// Takes connections until told to stop.
async fn accept(server: Arc<Server>, listener: Listener, mut stopping: watch::Receiver<bool>) {
    loop {
        // Waiting for a free place first leaves further clients in the
        // kernel's queue, where they cost us nothing.
        let accepted = tokio::select! {
            accepted = async {
                let permit = Arc::clone(&server.connections).acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
            _ = stopping.changed() => return,
        };
        match accepted {
            (Ok(permit), Ok(accepted)) => {
                tokio::spawn(converse(Arc::clone(&server), accepted, permit, stopping.clone()));
            }
            (_, Err(error)) => {
                // EMFILE and its like last a while; an aborted connection does
                // not, but a short rest hurts nobody.
                tracing::warn!("failed to accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            (Err(_), _) => return,
        }
    }
}
