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
/// What an app may do wrong or slowly, and what the client then sees.
mod failures;
/// Web frameworks as they are, doing what they are used for.
mod frameworks;
/// What stands around the apps: proxies, limits, logs, static files.
mod front;
/// Starts the binary, speaks HTTP with it, shows its log on failure.
mod harness;
/// HTTP/2 and TLS, by clients of their own.
mod http2_tls;
/// Environ, bodies and headers as an app sees them.
mod requests;
/// `serve` from start to stop.
mod serving;
/// The heap that the app wakes up in: randomness, environment, files.
mod snapshot;
/// Bodies of any size in bounded memory.
mod streaming;
/// Raw bytes in, responses out: the corpus in `tests/wire`.
mod wire;
