//! Finds the pages of an app's memory that a request writes to, when it is built.
//!
//! Instances that are told of them have these pages for themselves before a
//! request comes; see `list_written_pages` of the skeleton. The app answers requests
//! here as it does in a server, each in a fresh instance, and the kernel is asked
//! which pages are not those of the snapshot any more. Those count that half of the
//! requests write to.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use http::Method;
use tokio::sync::mpsc;

use crate::app;
use crate::artifact::Artifact;
use crate::cache::{CACHE_VARIABLE, Cache};
use crate::cli::WrittenPagesArgs;
use crate::code;
use crate::engine::{self, EpochTicker};
use crate::environ;
use crate::exchange::{Exchange, RequestBody};
use crate::guest_log::Printable;
use crate::handler::RequestLimits;
use crate::instance::{Grants, Instance, Streams};
use crate::request_id::RequestId;
use crate::tenants::{Books, Shared};

/// Bytes of a page; on machines where pages are larger, nothing is found.
const PAGE: u64 = 4096;

/// Pieces of memory that are written to. When an instance is gone, the first 32 pieces that
/// have changed are copied back, and the rest is unmapped; a page costs less to copy than to
/// be mapped again. A request may change some more than those that are known.
const MAX_PIECES: usize = 28;

/// Pages between two pieces that may become a part of them, so that there are fewer.
const MAX_GAP: u32 = 16;

/// Requests that are looked at.
const MAX_PATHS: usize = 16;

/// Time that a request may take, and that is waited for one.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of a message that are passed on.
const MAX_MESSAGE: usize = 500;

/// The pages that the app in the file `app` writes to when it is asked for `paths`,
/// found by a process of its own.
///
/// # Errors
///
/// Why they are not known. The app is no worse for it.
pub fn find(cache: &Cache, app: &Path, paths: &[String]) -> Result<BTreeSet<u32>> {
    let binary = std::env::current_exe().context("failed to find our own binary")?;
    let mut command = Command::new(binary);
    command.arg("written-pages").arg(app).args(paths).env(CACHE_VARIABLE, cache.root()).stdin(Stdio::null());
    let done = command.output().context("failed to start a process for it")?;
    let message = String::from_utf8_lossy(&done.stderr);
    let message = message.trim().lines().last().unwrap_or_default();
    ensure!(done.status.success(), "{}: {}", done.status, Printable(message, MAX_MESSAGE));
    let pages = String::from_utf8_lossy(&done.stdout);
    pages.split_whitespace().map(|page| Ok(page.parse()?)).collect()
}

/// Prints the pages. The process's own side of [`find`].
///
/// # Errors
///
/// If the app does not start, or the kernel does not tell.
#[expect(clippy::print_stdout, reason = "the parent reads it")]
pub fn run(args: &WrittenPagesArgs) -> Result<()> {
    let paths = &args.paths[..args.paths.len().min(MAX_PATHS)];
    let instances = u32::try_from(paths.len())?;
    let engine = engine::runner(instances).map_err(anyhow::Error::from)?;
    let _ticker = EpochTicker::start(&engine, 1, || false).context("failed to start the epoch thread")?;
    let cache = Cache::open()?;
    let config = app::only_tenant(&cache, Some(&args.app), &args.project, &args.grants)?;
    let shared = Shared::alone(engine, instances, cache, None);
    let books = Books::new(&config, &shared.scheduler, shared.pools.memory(), None);
    let artifact = Artifact::open(&config.app)?;
    let digests = artifact.digests(&shared.cache)?;
    let component = artifact.component(&digests)?;
    let first_page = wsgi_wasm_skeleton::split(&component)?.first_page;
    drop(component);
    let scratch = tempfile::tempdir_in(shared.cache.root())?;
    let directory = scratch.path().canonicalize()?.join("code");
    let code = shared.loader.load_once(&artifact, &digests, &directory)?;
    let app::Loaded { program, grants, .. } =
        app::link(&shared, &config, &books, &artifact, &digests, &code)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // They stay until the end, so that each has memory that no other had before.
    let mut live = Vec::new();
    for path in paths {
        let mut instance = runtime.block_on(Instance::new(&program, &grants, Streams::Log))?;
        runtime.block_on(ask(&mut instance, &grants, path))?;
        live.push(instance);
    }
    let mut times = BTreeMap::new();
    for page in changed_pages(&directory.join(code::TENANT))? {
        *times.entry(first_page.saturating_add(page)).or_insert(0) += 1;
    }
    drop(live);
    // What few requests write to would be copied for nothing by the others.
    let is_usual = |times: usize| times * 2 >= paths.len();
    let pages = times.into_iter().filter(|(_, times)| is_usual(*times)).map(|(page, _)| page).collect();
    for page in with_gaps(&pages) {
        println!("{page}");
    }
    Ok(())
}

/// Lets the instance answer a request. What it answers does not matter.
async fn ask(instance: &mut Instance, grants: &Grants, path: &str) -> Result<()> {
    let environ = environ::of_our_own(path).map_err(|failure| anyhow::anyhow!("{failure}"))?;
    let limits = RequestLimits {
        body: 0,
        response: u64::MAX,
        response_time: TIMEOUT,
        timeout: TIMEOUT,
        cpu: None,
        client_idle: TIMEOUT,
        rate: 0,
    };
    let (sender, mut events) = mpsc::channel(1);
    let exchange = Exchange::new(RequestBody::empty(), sender, Method::GET, &limits, &grants.footprint);
    let mut call =
        std::pin::pin!(instance.handle(RequestId::next(), &environ, b"", exchange, (TIMEOUT, None)));
    loop {
        tokio::select! {
            _ = &mut call => return Ok(()),
            Some(_) = events.recv() => {}
        }
    }
}

/// The pages of the file `image` that are not the file's any more, once for each place
/// that it is mapped to.
fn changed_pages(image: &Path) -> Result<Vec<u32>> {
    let maps = fs::read_to_string("/proc/self/maps").context("failed to read the list of mappings")?;
    let pagemap = File::open("/proc/self/pagemap").context("failed to open the list of pages")?;
    let mut changed = Vec::new();
    for (start, end) in maps.lines().filter_map(|line| mapping(line, image.as_os_str())) {
        let mut entries = vec![0; usize::try_from((end - start) / PAGE)? * 8];
        pagemap.read_exact_at(&mut entries, start / PAGE * 8).context("failed to read the list of pages")?;
        let (entries, _) = entries.as_chunks::<8>();
        let pages = entries.iter().zip(0..).filter(|(entry, _)| is_changed(u64::from_ne_bytes(**entry)));
        changed.extend(pages.map(|(_, page)| page));
    }
    Ok(changed)
}

/// Where `file` is mapped as memory that can be written to, if `line` of a process's
/// list of mappings says that (proc_pid_maps(5)).
fn mapping(line: &str, file: &OsStr) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let name = line.split_once('/').map(|(_, name)| name)?;
    if permissions != "rw-p" || OsStr::new(&format!("/{name}")) != file {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some((address(start)?, address(end)?))
}

/// Whether a page is in memory and not a file's (proc_pid_pagemap(5)).
fn is_changed(entry: u64) -> bool {
    let (is_present, is_file) = (entry >> 63 & 1 == 1, entry >> 61 & 1 == 1);
    is_present && !is_file
}

/// `pages`, and as many of those in the smallest gaps between them as it takes to have
/// [`MAX_PIECES`].
fn with_gaps(pages: &BTreeSet<u32>) -> BTreeSet<u32> {
    let pairs = pages.iter().zip(pages.iter().skip(1));
    let mut gaps: Vec<_> = pairs.map(|(page, next)| page + 1..*next).filter(|gap| !gap.is_empty()).collect();
    gaps.sort_by_key(ExactSizeIterator::len);
    let excess = (gaps.len() + 1).saturating_sub(MAX_PIECES);
    let closed = gaps.into_iter().take(excess).filter(|gap| gap.len() <= MAX_GAP as usize);
    pages.iter().copied().chain(closed.flatten()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_gaps_are_closed() {
        assert_eq!(with_gaps(&BTreeSet::new()), BTreeSet::new());
        // As few pieces as they should be, with gaps of 1.
        let few: BTreeSet<u32> = (0..28).map(|piece| 2 * piece).collect();
        assert_eq!(with_gaps(&few), few);
        // Two too many: gaps of 40, but for three of 5 and one of 4, and a piece of two pages.
        let mut page = 0;
        let many: BTreeSet<u32> = (0..30)
            .map(|piece| {
                page += match piece {
                    3 | 4 | 20 => 6,
                    11 => 5,
                    29 => 1,
                    _ => 41,
                };
                page
            })
            .collect();
        let added: Vec<_> = with_gaps(&many).difference(&many).copied().collect();
        let piece = |number: usize| *many.iter().nth(number).unwrap();
        assert_eq!(added, (piece(10) + 1..piece(11)).collect::<Vec<_>>());
        // Nothing is done about gaps that are too large.
        let far: BTreeSet<u32> = (0..40).map(|piece| 18 * piece).collect();
        assert_eq!(with_gaps(&far), far);
    }

    #[test]
    fn a_mapping_is_known_by_its_file_and_rights() {
        let line = "7f00a000-7f00c000 rw-p 00001000 fe:00 17    /cache/a b/tenant.cwasm";
        let file = OsStr::new("/cache/a b/tenant.cwasm");
        assert_eq!(mapping(line, file), Some((0x7f00_a000, 0x7f00_c000)));
        assert_eq!(mapping(&line.replace("rw-p", "r--p"), file), None);
        assert_eq!(mapping(line, OsStr::new("/cache/b/tenant.cwasm")), None);
        assert_eq!(mapping("7f00a000-7f00c000 rw-p 00000000 00:00 0", file), None);
    }
}
