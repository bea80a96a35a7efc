//! `wsgi-wasm`: hosts Python WSGI apps in WebAssembly sandboxes.
//!
//! The modules in the order in which a request meets them: `serve` accepts,
//! `connection` speaks HTTP, `front` and `handler` answer, with `tenants`,
//! `environ`, `pool`, `instance` and `exchange` as steps. `build` makes what is
//! served. ARCHITECTURE.md has them all.

mod access_log;
mod app;
mod artifact;
mod bounds;
mod build;
mod cache;
mod cache_command;
mod cli;
mod clock;
mod code;
mod compress;
mod config;
mod connection;
mod control;
mod disk;
mod early_hints;
mod engine;
mod environ;
mod error;
mod exchange;
mod exec;
mod failure;
mod file_part;
mod files;
mod footprint;
mod forwarded;
mod front;
#[cfg(test)]
mod fuzz;
mod guest_log;
mod handler;
mod inspect;
mod instance;
mod key_derivation;
mod listener;
mod machine;
mod network;
mod pool;
mod proxy_protocol;
mod random;
mod request_id;
mod sandbox;
mod scheduler;
mod serve;
mod stall;
mod state;
mod static_files;
mod tenants;
mod tls;
mod units;
mod wire;
mod written_pages;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging();
    let done = match cli.command {
        Command::Build(args) => build::run(args),
        Command::Serve(args) => serve::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Exec(args) => exec::run(&args).map(ExitCode::from),
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Check(args) => serve::check(&args).map(|()| ExitCode::SUCCESS),
        Command::Ctl(args) => control::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Cache { command } => cache_command::run(&command),
        Command::Compile { input, output, code } => {
            code::compile(&input, &output, code).map(|()| ExitCode::SUCCESS)
        }
        Command::WrittenPages(args) => written_pages::run(&args).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        report(&error);
        ExitCode::from(error::exit_status(&error))
    })
}

/// Prints why the command failed. A [`error::UserError`] says all there is to
/// say; what led to it is our own affair.
#[expect(clippy::print_stderr, reason = "the one place where an error is printed")]
fn report(error: &anyhow::Error) {
    match error.chain().find_map(|cause| cause.downcast_ref::<error::UserError>()) {
        Some(user_error) => eprintln!("error: {user_error}"),
        None => eprintln!("error: {error:#}"),
    }
}

/// Logs go to standard error; without h2's warnings, which any client can cause.
/// `WSGI_WASM_LOG` filters them, as in
/// `WSGI_WASM_LOG=debug` or `WSGI_WASM_LOG=warn,app=info`.
fn start_logging() {
    let filter = EnvFilter::try_from_env("WSGI_WASM_LOG").unwrap_or_else(|_| EnvFilter::new("info,h2=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
