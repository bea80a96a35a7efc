//! The `serve` command: load the app, bind, accept, and drain on a signal.
//!
//! Everything that can be wrong is found before the first socket is bound.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
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
use crate::connection::{self, ConnectionLimits, Peers, Server, converse};
use crate::control;
use crate::engine::{self, EpochTicker};
use crate::error::UserError;
use crate::forwarded::Proxies;
use crate::front::Front;
use crate::listener::{self, Address, Inherited, Listener};
use crate::machine;
use crate::pool::Pools;
use crate::sandbox::{self, Paths, Sandbox};
use crate::scheduler::{self, Background, Scheduler};
use crate::state::{State, StateFile};
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
    without_backtraces();
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
    sandbox::apply(args.sandbox, &paths_in_use(args, &plan, &state.get(), &cache, &addresses)?)?;
    // What computes for long does so elsewhere: see `scheduler`.
    let background = Background::start().context("failed to start the threads for guests")?;
    let scheduler = Scheduler::new(Some(&background));
    let (guests, epoch) = (Arc::clone(&scheduler), engine.clone());
    let parks = move || {
        if guests.is_computing() {
            epoch.increment_epoch();
        }
    };
    let runtime = scheduler::foreground(parks).context("failed to start the runtime")?;
    let guests = Arc::clone(&scheduler);
    let _ticker = EpochTicker::start(&engine, scheduler::processors().min(2), move || guests.is_computing())
        .context("failed to start the threads of the epoch")?;
    let (idle, rate) = (http.client_timeout.0, http.min_rate.0);
    let pools = Pools::new(plan.instances, reserve, plan.memory);
    let shared = Arc::new(Shared::new(engine, pools, cache, args.grants.code, idle, rate, scheduler));
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
    // Whatever is left had its grace. The background first: its tasks use the
    // timers and sockets of the other one.
    background.shutdown(Duration::from_millis(100));
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
        lingerers: connection::lingerers(),
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
    /// Directories below which apps and data of later tenants may lie.
    roots: Vec<PathBuf>,
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
                roots: config.roots,
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
                roots: Vec::new(),
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
            roots: Vec::new(),
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

/// The paths that the server uses while it serves. What it may write to never
/// has the configuration in it: whoever can write that grants himself all.
fn paths_in_use(
    args: &ServeArgs,
    plan: &Plan,
    state: &State,
    cache: &Cache,
    addresses: &[Address],
) -> Result<Paths> {
    let mut configured = Vec::new();
    if let Some(path) = &plan.watched {
        // Also where a link to it leads.
        for path in [Some(path.clone()), path.canonicalize().ok()].into_iter().flatten() {
            configured.push(if path.is_dir() { path } else { parent(&path) });
        }
    }
    let has_configuration = |path: &Path| {
        let path = path.canonicalize();
        path.is_ok_and(|path| {
            configured.iter().any(|own| own.canonicalize().is_ok_and(|own| own.starts_with(&path)))
        })
    };
    let mut paths = Paths { write: vec![cache.root().to_path_buf()], ..Paths::default() };
    let mut write = |what: &str, path: PathBuf| {
        if args.sandbox != Sandbox::Off && has_configuration(&path) {
            return Err(UserError::new(format!(
                "{what} in `{}` would let the server write to its own configuration",
                path.display()
            ))
            .remedy("choose a directory beside the configuration or below, or give `--sandbox off`"));
        }
        paths.write.push(path);
        Ok(())
    };
    for tenant in (plan.source)()? {
        paths.read.push(parent(&tenant.app));
        paths.read.extend(tenant.static_files.into_values());
        paths.read.extend(tenant.secrets.iter().map(|path| parent(path)));
        if let Some((path, _)) = tenant.files.data {
            write(&format!("the data of `{}`", tenant.name), path)?;
        }
    }
    // Tenants come while the server runs.
    for root in &plan.roots {
        write("a root", root.clone())?;
    }
    for directory in &configured {
        write("data", directory.join("data"))?;
    }
    // What `ctl` has deployed before.
    paths.read.extend(state.apps.values().map(|app| parent(app)));
    if let Some(state) = &plan.state {
        // Nobody else changes it.
        if plan.control.is_some() {
            let directory = parent(state);
            if let Err(error) = std::fs::create_dir_all(&directory) {
                tracing::warn!("failed to create `{}` for the state: {error}", directory.display());
            }
            write("the state", directory)?;
        }
    }
    let sockets = addresses.iter().filter_map(|address| match address {
        Address::Unix(path) => Some(path.as_path()),
        Address::Tcp(..) => None,
    });
    for socket in sockets.chain(plan.control.as_deref()) {
        let directory = parent(socket);
        if has_configuration(&directory) {
            // While it still can.
            listener::remove_stale_socket(socket);
            paths.lasting_sockets.push(directory);
        } else {
            paths.sockets.push(directory);
        }
    }
    let http = &args.http;
    if let Some(log) = &http.access_log_file {
        // Beside the configuration it can be written, but not made anew.
        let directory = parent(log);
        paths.write.push(if has_configuration(&directory) { log.clone() } else { directory });
    }
    let statics = http.static_files.iter().filter_map(|text| text.split_once('='));
    paths.read.extend(statics.map(|(_, directory)| directory.into()));
    let certificates = http.tls_cert.iter().chain(&http.tls_key).chain(&http.tls_client_ca);
    paths.read.extend(certificates.map(|path| parent(path)));
    paths.read.extend(configured);
    Ok(paths)
}

/// The directory that `path` is in.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
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
                server.front.access_log.iter().for_each(|log| log.reopen());
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

/// Starts this program anew if the environment asks for backtraces of errors: an app
/// that fails all the time would have us make one each time, which takes longer than
/// most requests, and under a lock. Those of panics stay.
fn without_backtraces() {
    let asks = |name| std::env::var_os(name).is_some_and(|value| value != "0");
    if std::env::var_os("RUST_LIB_BACKTRACE").is_some() || !asks("RUST_BACKTRACE") {
        return;
    }
    let error = std::env::current_exe().map(|binary| {
        Command::new(binary).args(std::env::args_os().skip(1)).env("RUST_LIB_BACKTRACE", "0").exec()
    });
    let (Ok(error) | Err(error)) = error;
    tracing::warn!("errors are slow with RUST_BACKTRACE, and we can not start without: {error}");
}

/// The line that says where we listen: the one thing on standard output.
#[expect(clippy::print_stdout, reason = "a program that starts us reads the port from here")]
fn announce(line: &str) {
    println!("{line}");
}

/// Takes connections until told to stop, and then those that wait already.
async fn accept(server: Arc<Server>, listener: Listener, mut stopping: watch::Receiver<bool>) {
    let place = || Arc::clone(&server.connections).acquire_owned();
    loop {
        // Clients too many wait in the kernel's queue, where they cost us
        // nothing, but one for each listener: a place is taken only when there
        // is a client, else a listener without clients would keep one.
        let accepted = tokio::select! {
            accepted = async { drop(place().await); listener.accept().await } => accepted,
            () = connection::stopped(&mut stopping) => break,
        };
        match accepted {
            Ok(accepted) => tokio::select! {
                Ok(permit) = place() => {
                    tokio::spawn(converse(Arc::clone(&server), accepted, permit, stopping.clone()));
                    // One at a time: a flood of them waits in the kernel's queue,
                    // not in ours before other requests.
                    tokio::task::yield_now().await;
                }
                () = connection::stopped(&mut stopping) => {
                    converse_later(&server, accepted, &stopping);
                    break;
                }
            },
            Err(error) => {
                // EMFILE and its like last a while; an aborted connection does
                // not, but a short rest hurts nobody.
                tracing::warn!("failed to accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    // For their clients, connections in the kernel's queue are open already.
    for _ in 0..listener::BACKLOG {
        let Ok(Some(accepted)) = listener.accept_waiting().await else { break };
        converse_later(&server, accepted, &stopping);
    }
}

/// Speaks HTTP on a connection when there is a place for it.
fn converse_later(server: &Arc<Server>, accepted: listener::Accepted, stopping: &watch::Receiver<bool>) {
    let (server, stopping) = (Arc::clone(server), stopping.clone());
    tokio::spawn(async move {
        if let Ok(permit) = Arc::clone(&server.connections).acquire_owned().await {
            converse(server, accepted, permit, stopping).await;
        }
    });
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser as _;

    fn paths(arguments: &[&str], path: &Path) -> Result<Paths> {
        let path = path.to_str().unwrap();
        let cli = Cli::try_parse_from(["wsgi-wasm", "serve"].iter().chain(arguments).chain(&[path])).unwrap();
        let Command::Serve(args) = cli.command else { panic!("another command") };
        let cache = Cache::open()?;
        let plan = Plan::new(&args, &cache)?;
        let addresses = plan.bind.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>>>()?;
        let state = StateFile::open(plan.state.clone(), false)?.get();
        paths_in_use(&args, &plan, &state, &cache, &addresses)
    }

    /// A configuration with a tenant and `server`, in a directory of its own
    /// that is in the one returned.
    fn platform(server: &str) -> (tempfile::TempDir, PathBuf) {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("platform");
        for directory in ["apps", "secrets", "data/a", "store/later"] {
            std::fs::create_dir_all(inner.join(directory)).unwrap();
        }
        for file in ["apps/a.wasm", "secrets/a", "../other"] {
            std::fs::write(inner.join(file), "x").unwrap();
        }
        let config = format!(
            "[server]\n{server}\n[[tenant]]\nname = \"a\"\napp = \"apps/a.wasm\"\n\
             secrets = {{ KEY = {{ file = \"secrets/a\" }} }}\ndata = {{ path = \"data/a\" }}\n"
        );
        std::fs::write(inner.join("wsgi-wasm.toml"), config).unwrap();
        (outer, inner)
    }

    #[test]
    fn a_server_can_not_write_its_own_configuration() {
        let (_outer, inner) = platform("control = \"unix:control.sock\"\nroots = [\"store\"]");
        let stale = std::os::unix::net::UnixListener::bind(inner.join("control.sock")).unwrap();
        drop(stale);
        let paths = paths(&["--config"], &inner.join("wsgi-wasm.toml")).unwrap();
        sandbox::confined(&paths, move || {
            let config = inner.join("wsgi-wasm.toml");
            assert!(config::load(&config).is_ok());
            assert!(std::fs::write(&config, "").is_err());
            assert!(std::fs::remove_file(&config).is_err());
            assert!(std::fs::rename(inner.join("data"), &config).is_err());
            for file in ["wsgi-wasm.toml2", "apps/a.wasm", "apps/b.wasm", "secrets/a"] {
                assert!(std::fs::write(inner.join(file), "evil").is_err(), "{file}");
            }
            assert!(std::fs::read(inner.join("../other")).is_err());
            assert!(std::fs::read_dir("/").is_err());
            // What it needs.
            for file in ["data/a/x", "data/new", "store/later/app.wasm", "state/wsgi-wasm.json"] {
                std::fs::write(inner.join(file), "x").unwrap();
                std::fs::remove_file(inner.join(file)).unwrap();
            }
            assert!(std::os::unix::net::UnixListener::bind(inner.join("control.sock")).is_ok());
            assert!(std::fs::read(inner.join("apps/a.wasm")).is_ok());
        });
    }

    #[test]
    fn a_directory_of_tenants_can_not_be_written() {
        let (_outer, inner) = platform("");
        let apps = inner.join("apps");
        std::fs::create_dir(apps.join("data")).unwrap();
        std::fs::write(apps.join("a.toml"), "secrets = { KEY = { file = \"../secrets/a\" } }").unwrap();
        let paths = paths(&["--tenants"], &apps).unwrap();
        sandbox::confined(&paths, move || {
            assert!(config::load_directory(&apps).is_ok());
            assert!(std::fs::write(apps.join("a.toml"), "").is_err());
            assert!(std::fs::write(apps.join("b.wasm"), "").is_err());
            std::fs::write(apps.join("data/x"), "").unwrap();
        });
    }

    #[test]
    fn what_would_have_the_configuration_written_is_refused() {
        for server in ["roots = [\".\"]", "roots = [\"..\"]", "control = \"unix:c\"\nstate = \"s.json\""] {
            let (_outer, inner) = platform(server);
            let refused = paths(&["--config"], &inner.join("wsgi-wasm.toml")).unwrap_err();
            assert!(refused.to_string().contains("write to its own configuration"), "{refused}");
            assert!(paths(&["--sandbox", "off", "--config"], &inner.join("wsgi-wasm.toml")).is_ok());
        }
    }
}
