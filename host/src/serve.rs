//! The `serve` command: load the app, bind, accept, and drain on a signal.
//!
//! Everything that can be wrong is found before the first socket is bound.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::app::{self, LoadedApp};
use crate::cli::ServeArgs;
use crate::connection::{Server, converse};
use crate::engine::{self, EpochTicker};
use crate::handler::{App, RequestLimits};
use crate::listener::{Address, Listener};
use crate::pool::{Pool, PoolSettings};
use crate::scheduler::processors;

/// Runs the server until a signal ends it.
///
/// # Errors
///
/// A [`UserError`] if the app or an option is not usable, else what failed.
pub fn run(args: &ServeArgs) -> Result<()> {
    let addresses = args.bind.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>>>()?;
    let settings = PoolSettings {
        instances: usize::from(args.instances),
        queue: args.queue as usize,
        queue_wait: args.queue_wait.0,
        isolation: args.isolation,
        max_requests: args.max_requests,
    };
    let engine = engine::runner(u32::try_from(settings.capacity()).unwrap_or(u32::MAX))
        .map_err(anyhow::Error::from)
        .context("failed to reserve memory for the instances")?;
    let _ticker = EpochTicker::start(&engine).context("failed to start the epoch thread")?;
    let LoadedApp { program, grants } = app::load(&engine, args.app.as_deref(), &args.project, &args.grants)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Twice as many threads as guests may compute on for long: see `scheduler`.
        .worker_threads(2 * processors())
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let served = runtime.block_on(async {
        let pool = Pool::new(program, grants, settings);
        pool.warm().await.map_err(|error| app::refuse_start(pool.name(), args.grants.memory, error))?;
        let limits = RequestLimits {
            body: args.max_body.0,
            timeout: args.timeout.0,
            cpu: args.cpu.map(|time| time.0),
            client_idle: args.client_timeout.0,
        };
        let server = Server {
            app: Arc::new(App { pool, limits }),
            header_timeout: args.header_timeout.0,
            client_idle: args.client_timeout.0,
            connections: Arc::new(Semaphore::new(args.max_connections as usize)),
        };
        serve(server, &addresses, args.grace.0).await
    });
    // Whatever is left had its grace.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
}

async fn serve(server: Server, addresses: &[Address], grace: Duration) -> Result<()> {
    let mut listeners = Vec::new();
    for address in addresses {
        listeners.push(address.listen().await?);
    }
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;
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

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
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
        () = async { stop.closed().await; server.app.pool.drained().await } => Ok(()),
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
