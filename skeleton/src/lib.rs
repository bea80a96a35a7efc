//! Separates what all apps share from what one app has of its own.
//!
//! A component that componentize-py makes holds an interpreter and its
//! libraries, some fifteen core modules that are equal for all apps, and the
//! heap of one app as it was when the snapshot was taken. Compiled whole, each
//! app costs seconds and tens of megabytes. So a host takes it apart:
//!
//! ```text
//!               split                            merge
//! component ───┬──► skeleton: all code ────────────────► skeleton with one core module
//!              └──► tenant: memory and start values      instead of fifteen
//! ```
//!
//! - [`split()`] is cheap and is done for each app. Two apps with the same
//!   libraries and interfaces give the same skeleton, byte for byte, so a host
//!   knows a skeleton by its digest and compiles it once.
//! - [`merge`] is done once per skeleton. Without the thousands of functions
//!   that the libraries import from one another, an instance is made in a
//!   fiftieth of the time, and the interpreter is a little faster.
//!
//! Either skeleton is a component that imports the core module [`TENANT`] and
//! else has the same imports and exports as the original. Either takes the
//! same tenant module. Instantiated with it, it behaves as the original does.
//!
//! Everything here is a pure function of its bytes, and those are not trusted:
//! whatever has another shape than expected is refused with the reason, to be
//! compiled whole. In particular a skeleton depends on nothing of the tenant
//! module that was split off with it: no app can prepare a skeleton for others
//! but the one that they would get anyway.

mod assemble;
mod constants;
mod core_module;
mod emit;
mod graph;
mod hollow;
mod link;
mod names;
mod sections;
mod shim;
mod split;
mod written;

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};

pub use split::{Split, split};

/// Name under which a skeleton imports the tenant's core module.
pub const TENANT: &str = "tenant";

/// Rises when the same input gives another output, to be part of the name
/// under which a host keeps what it has compiled.
pub const VERSION: u32 = 2;

/// The skeleton that [`split()`] made, with all its code in one core module.
///
/// # Errors
///
/// Why it can not be merged: its modules use something that no shared library
/// of componentize-py does, such as a start function or a second memory.
pub fn merge(skeleton: &[u8]) -> Result<Vec<u8>> {
    merge_with(skeleton, Ok)
}

/// As [`merge`], with `optimize` between the merging of the core modules and the
/// writing of the component around the result. It gets a core module and returns
/// one with the same imports and exports.
///
/// # Errors
///
/// As for [`merge`], and what `optimize` returns, or that what it made does not fit.
pub fn merge_with(skeleton: &[u8], optimize: impl FnOnce(Vec<u8>) -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    // What follows relies on indices and types that fit.
    validate(skeleton).context("the skeleton is not valid")?;
    let graph = graph::Graph::read(skeleton)?;
    let merged = assemble::assemble(&graph, optimize)?;
    validate(&merged).context("the merged skeleton is not valid")?;
    Ok(merged)
}

/// Adds to `component` which `pages` of its memory a usual request writes to. A page has
/// 4096 bytes, and the first one is 0. Instances that are made from its parts have
/// these pages for themselves from the start, which costs less than when they are
/// written to later, and disturbs others less.
pub fn list_written_pages(component: &mut Vec<u8>, pages: &BTreeSet<u32>) {
    written::append(component, pages);
}

/// Bytes of the pages that [`list_written_pages`] has listed in `component`; none if it
/// has not, or the list is not valid.
pub fn written_size(component: &[u8]) -> Option<usize> {
    let pages = written::read(&sections::sections(component).ok()?).ok()?;
    (!pages.is_empty()).then(|| pages.len() * written::PAGE as usize)
}

fn validate(component: &[u8]) -> Result<()> {
    wasmparser::Validator::new().validate_all(component)?;
    Ok(())
}
