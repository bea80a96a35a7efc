//! The `serve` command: load the app, bind, accept, and drain on a signal.
//!
//! Everything that can be wrong is found before the first socket is bound.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::app;
use crate::cache::Cache;
use crate::cli::{CheckArgs, ServeArgs};
use crate::config::{self, Instances, Limits, TenantConfig};
use crate::connection::{Server, converse};
use crate::control;
use crate::engine::{self, EpochTicker};
use crate::error::UserError;
use crate::listener::{Address, Listener};
use crate::scheduler::processors;
use crate::tenants::{Shared, Source, Tenants};

/// Where to listen if nothing is said.
const DEFAULT_ADDRESS: &str = "127.0.0.1:8000";

/// Runs the server until a signal ends it.
///
/// # Errors
///
/// A [`UserError`] if an app or an option is not usable, else what failed.
pub fn run(args: &ServeArgs) -> Result<()> {
    let cache = Cache::open()?;
    let plan = Plan::new(args, &cache)?;
    let addresses = plan.bind.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>>>()?;
    let engine = engine::runner(plan.instances)
        .map_err(anyhow::Error::from)
        .context("failed to reserve memory for the instances")?;
    let _ticker = EpochTicker::start(&engine).context("failed to start the epoch thread")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Twice as many threads as guests may compute on for long: see `scheduler`.
        .worker_threads(2 * processors())
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let client_idle = args.client_timeout.0;
    let shared = Arc::new(Shared::new(engine, cache, args.grants.code, client_idle));
    let served = runtime.block_on(async {
        let tenants = Tenants::start(shared, plan.source, plan.state).await?;
        let server = Server {
            tenants: Arc::clone(&tenants),
            header_timeout: args.header_timeout.0,
            client_idle,
            connections: Arc::new(Semaphore::new(args.max_connections as usize)),
        };
        serve(server, &addresses, plan.control.as_deref(), plan.watched, args.grace.0).await
    });
    // Whatever is left had its grace.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
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
    let config = config::load(file)?;
    println!("{} is fine: {} tenants", file.display(), config.tenants.len());
    Ok(())
}

/// What the options and the configuration file come to.
struct Plan {
    bind: Vec<String>,
    control: Option<PathBuf>,
    state: Option<PathBuf>,
    /// Instances that there is room for.
    instances: u32,
    source: Source,
    /// Files whose change means that the source has to be read again.
    watched: Vec<PathBuf>,
}

impl Plan {
    fn new(args: &ServeArgs, cache: &Cache) -> Result<Plan> {
        let bind = |configured: Vec<String>| {
            let given = if args.bind.is_empty() { configured } else { args.bind.clone() };
            if given.is_empty() { vec![DEFAULT_ADDRESS.to_owned()] } else { given }
        };
        if let Some(path) = args.config.clone() {
            let config = config::load(&path)?;
            let state = config.state.unwrap_or_else(|| path.with_extension("state.json"));
            return Ok(Plan {
                bind: bind(config.bind),
                control: config.control,
                state: Some(state),
                instances: config.instances,
                watched: vec![path.clone()],
                source: Box::new(move || Ok(config::load(&path)?.tenants)),
            });
        }
        if let Some(directory) = args.tenants.clone() {
            config::load_directory(&directory)?;
            return Ok(Plan {
                bind: bind(Vec::new()),
                control: None,
                state: None,
                instances: config::DEFAULT_TOTAL_INSTANCES,
                watched: vec![directory.clone()],
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
                queue: args.queue as usize,
                queue_wait: args.queue_wait.0,
                ..tenant.limits
            },
            ..tenant
        };
        Ok(Plan {
            bind: bind(Vec::new()),
            control: None,
            state: None,
            // As many again may stand prepared: see `Pool::prepare`.
            instances: u32::from(args.instances) * 2,
            watched: Vec::new(),
            source: Box::new(move || Ok(vec![tenant.clone()])),
        })
    }
}

async fn serve(
    server: Server,
    addresses: &[Address],
    control: Option<&Path>,
    watched: Vec<PathBuf>,
    grace: Duration,
) -> Result<()> {
    let mut listeners = Vec::new();
    for address in addresses {
        listeners.push(address.listen().await?);
    }
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;
    let mut reload = signal(SignalKind::hangup()).context("failed to watch for SIGHUP")?;
    if let Some(path) = control {
        control::start(Arc::clone(&server.tenants), path)?;
    }
    tokio::spawn(Arc::clone(&server.tenants).look_after(watched));
    for listener in &listeners {
        announce(&format!("listening on {}", listener.url()));
    }
    let server = Arc::new(server);
    let (stop, stopping) = watch::channel(false);
    let accepting: Vec<_> = listeners
        .into_iter()
        .map(|listener| tokio::spawn(accept(Arc::clone(&server), listener, stopping.clone())))
        .collect();
    drop(stopping);

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reload.recv() => server.tenants.reload_or_log().await,
        }
    }
    tracing::info!("stopping: finishing what is running");
    // The receivers are gone only if every task has ended already.
    let _ = stop.send(true);
    for task in accepting {
        // Drops the listener, so that no new connection is taken.
        let _ = task.await;
    }
    tokio::select! {
        // Each connection holds a receiver until it is closed. Then only
        // guests that clean up after a client that left are still at work.
        () = async { stop.closed().await; server.tenants.drained().await } => Ok(()),
        () = tokio::time::sleep(grace) => {
            let open = stop.receiver_count();
            tracing::warn!("{open} connections were still open after the grace time and are cut");
            Ok(())
        }
        _ = terminate.recv() => { tracing::warn!("second signal: stopping at once"); Ok(()) }
        _ = interrupt.recv() => { tracing::warn!("second signal: stopping at once"); Ok(()) }
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
            (Ok(permit), Ok((stream, connection))) => {
                tokio::spawn(converse(Arc::clone(&server), stream, connection, permit, stopping.clone()));
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
