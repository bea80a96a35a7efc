//! Tests with a small component of the shape that componentize-py gives its
//! own, run by the engine that the host uses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

/// Whole, split and merged code do the same.
mod equivalence;
/// What is not as expected is refused, and nothing panics.
mod refusals;
/// The small component.
mod sample;
