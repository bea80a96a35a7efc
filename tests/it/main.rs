//! Tests of the real binary with real guests.
//!
//! Guests are built by our own `build` at first use and kept in the target
//! directory, so only what changed is built again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and its log is for people"
)]

/// The adapter's own tests, on this machine's Python.
mod adapter;
/// `build`, `inspect` and what they refuse.
mod build;
mod cache;
/// The examples, as their readers run them.
mod examples;
/// One-off commands: how they end.
mod exec;
/// What an app may do wrong or slowly, and what the client then sees.
mod failures;
mod fairness;
/// The files of a guest: what holds, what is refused, what SQLite needs.
mod files;
/// Web frameworks as they are, doing what they are used for.
mod frameworks;
/// What stands around the apps: proxies, limits, logs, static files.
mod front;
/// Starts the binary, speaks HTTP with it, shows its log on failure.
mod harness;
/// Tenants that attack: the host stands, and their neighbours notice nothing.
mod hostile;
/// HTTP/2 frame by frame.
mod http2_conformance;
/// HTTP/2 and TLS, by clients of their own.
mod http2_tls;
/// What a guest can reach on the network.
mod network;
/// Components that break the contract, assembled from text.
mod raw;
/// Environ, bodies and headers as an app sees them.
mod requests;
/// The wall around the server's own process.
mod sandbox;
/// `serve` from start to stop.
mod serving;
/// Whole, split and merged code do the same.
mod sharing;
/// The heap that the app wakes up in: randomness, environment, files.
mod snapshot;
/// Bodies of any size in bounded memory.
mod streaming;
/// Many apps in one server, changed while it runs.
mod tenants;
/// Each guest with `wsgiref.validate` around its app.
mod validated;
/// Raw bytes in, responses out: the corpus in `tests/wire`.
mod wire;
/// PEP 3333 to the letter, and the extensions.
mod wsgi;
