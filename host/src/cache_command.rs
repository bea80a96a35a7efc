//! The `cache` command: what is in the cache, and clearing it.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::json;

use crate::artifact::Artifact;
use crate::build::Progress;
use crate::cache::{Cache, Entry};
use crate::cli::CacheCommand;
use crate::code;
use crate::units::approximate;

/// Entries used more recently than this stay, whatever the size: someone may
/// be at work with them.
const IN_USE: Duration = Duration::from_secs(3600);
/// What a process that died has left, as far as its lock does not tell, is
/// removed after this time.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// Does what `command` says. The exit code is 1 if something was damaged.
///
/// # Errors
///
/// If the cache can not be read, or an entry not removed.
pub fn run(command: &CacheCommand) -> Result<ExitCode> {
    let cache = Cache::open()?;
    match command {
        CacheCommand::List { json } => list(&cache, *json)?,
        CacheCommand::Prune { unused, max_size } => {
            prune(&cache, unused.0, max_size.map(|size| size.0))?;
        }
        CacheCommand::Verify => return verify(&cache),
        CacheCommand::Optimize { app, wasm_opt } => {
            let progress = Progress::new();
            let layout =
                code::optimize(&cache, &Artifact::open(app)?, wasm_opt, &|step| progress.step(step))?;
            progress.step(&format!("the code of `{}` is {layout}", app.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn list(cache: &Cache, as_json: bool) -> Result<()> {
    let entries = cache.entries()?;
    if as_json {
        let all: Vec<_> = entries
            .iter()
            .map(|entry| {
                let used = entry.used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                json!({
                    "kind": kind(entry),
                    "key": entry.key,
                    "path": entry.path,
                    "size": entry.size,
                    "used": used.as_secs(),
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{:<22} {:<12} {:>10} {:>10}", "KIND", "KEY", "SIZE", "UNUSED FOR");
    for entry in &entries {
        let (key, size) = (entry.key.get(..12).unwrap_or(&entry.key), approximate(entry.size));
        println!("{:<22} {key:<12} {size:>10} {:>10}", kind(entry), age(entry.used));
    }
    let total = entries.iter().map(|entry| entry.size).sum();
    println!("{} entries with {} in `{}`", entries.len(), approximate(total), cache.root().display());
    Ok(())
}

#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn prune(cache: &Cache, unused: Duration, max_size: Option<u64>) -> Result<()> {
    let entries = cache.entries()?;
    let mut left: u64 = entries.iter().map(|entry| entry.size).sum();
    let (mut removed, mut freed) = (0, 0);
    // The least recently used come first.
    for entry in &entries {
        let idle = entry.used.elapsed().unwrap_or_default();
        let is_old = idle >= unused;
        let is_too_much = max_size.is_some_and(|most| left > most) && idle >= IN_USE;
        let goes = match entry.bucket {
            _ if entry.is_scratch() => cache.is_abandoned(entry) || idle >= ABANDONED,
            None => true,
            Some(_) => is_old || is_too_much,
        };
        if goes {
            cache.remove(entry)?;
            (removed, freed, left) = (removed + 1, freed + entry.size, left - entry.size);
        }
    }
    println!("removed {removed} entries with {}; {} are left", approximate(freed), approximate(left));
    Ok(())
}

#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn verify(cache: &Cache) -> Result<ExitCode> {
    let (mut sound, mut damaged) = (0, 0);
    for entry in cache.entries()? {
        match cache.verify(&entry) {
            Some(true) => sound += 1,
            Some(false) => {
                damaged += 1;
                println!("{} {} is not as it was made, and is removed", kind(&entry), entry.key);
                cache.remove(&entry)?;
            }
            None => {}
        }
    }
    println!("{sound} entries are sound, {damaged} were damaged");
    Ok(if damaged == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kind(entry: &Entry) -> &str {
    match entry.bucket {
        _ if entry.is_scratch() => "unfinished",
        Some(bucket) => bucket.directory(),
        None => "another version",
    }
}

fn age(used: SystemTime) -> String {
    let seconds = used.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
