//! The `exec` command: one command inside an app's sandbox.

use anyhow::{Context as _, Result, bail};
use wasmtime_wasi::I32Exit;

use crate::app;
use crate::cache::Cache;
use crate::cli::ExecArgs;
use crate::clock::Elapsed;
use crate::engine::{self, EpochTicker};
use crate::error::UserError;
use crate::instance::{self, Instance, Streams};
use crate::tenants::{Books, Shared};

/// Runs the command and returns its exit status.
///
/// # Errors
///
/// A [`UserError`] if the app or an option is not usable, or the time ran out.
pub fn run(args: &ExecArgs) -> Result<u8> {
    let engine = engine::runner(1)
        .map_err(anyhow::Error::from)
        .context("failed to reserve memory for the instance")?;
    let _ticker = EpochTicker::start(&engine, 1, || false).context("failed to start the epoch thread")?;
    let cache = Cache::open()?;
    let config = app::only_tenant(&cache, Some(&args.app), &args.project, &args.grants)?;
    let shared = Shared::alone(engine, 1, cache, args.grants.code);
    let books = Books::new(&config, &shared.scheduler, shared.pools.memory(), None);
    let app::Loaded { program, grants, .. } = app::load_artifact(&shared, &config, &books)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    runtime.block_on(async {
        let mut instance = Instance::new(&program, &grants, Streams::Inherit)
            .await
            .map_err(|error| app::refuse_start(&grants.name, args.grants.memory.0, &error))?;
        match instance.run_command(&args.command, args.timeout.map(|time| time.0)).await {
            Ok(status) => Ok(status),
            Err(error) if error.is::<Elapsed>() => {
                let limit = args.timeout.map(|time| time.to_string()).unwrap_or_default();
                Err(UserError::new(format!("the command was stopped after {limit}"))
                    .remedy("raise `--timeout` or leave it out")
                    .into())
            }
            Err(error) => match error.downcast_ref::<I32Exit>() {
                // By code that is not Python's, or of an app without our adapter.
                Some(exit) => Ok(u8::try_from(exit.0).unwrap_or(1)),
                None => {
                    let (reason, frames) = instance::explain(&error);
                    tracing::debug!("{frames}");
                    bail!("the command was stopped by a trap: {reason}")
                }
            },
        }
    })
}
