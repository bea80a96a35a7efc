//! The cache as its owner sees it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Finished, Server, guest, run, wsgi_wasm};

fn cache(directory: &Path, arguments: &[&str]) -> Finished {
    run(wsgi_wasm().env("WSGI_WASM_CACHE", directory).arg("cache").args(arguments))
}

fn serve(directory: &Path) -> Server {
    let mut command = wsgi_wasm();
    command.env("WSGI_WASM_CACHE", directory).arg("serve").arg(guest("behaviours"));
    Server::spawn(command.args(["--bind", "127.0.0.1:0"]))
}

/// Where the entries of a kind are.
fn entries(directory: &Path, kind: &str) -> Vec<PathBuf> {
    let list: Value = serde_json::from_str(&cache(directory, &["list", "--json"]).success().stdout).unwrap();
    let of_kind =
        list.as_array().unwrap().iter().filter(|entry| entry["kind"].as_str().unwrap().starts_with(kind));
    of_kind.map(|entry| entry["path"].as_str().unwrap().into()).collect()
}

#[test]
fn what_is_in_the_cache_is_shown_checked_and_removed() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("cache");
    let server = serve(&directory);
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    let shown = cache(&directory, &["list"]).success().stdout;
    assert!(shown.contains("skeletons-v") && shown.contains(" entries with "), "{shown}");
    assert!(cache(&directory, &["verify"]).success().stdout.contains(", 0 were damaged"));

    // Machine code that somebody changed is not run.
    let code = &entries(&directory, "skeletons")[0];
    let mut bytes = std::fs::read(code).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(code, bytes).unwrap();
    let verified = cache(&directory, &["verify"]);
    assert_eq!(verified.status, 1);
    assert!(verified.stdout.contains("1 were damaged"), "{}", verified.stdout);
    assert!(!code.exists());

    // Who has it goes on, and who needs it makes it again.
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
    let again = serve(&directory);
    assert_eq!(again.get("/hello").ok(), "Hello, world!\n");
    assert!(code.exists());
    assert!(
        cache(&directory, &["prune", "--max-size", "1B"]).success().stdout.contains("removed 0"),
        "in use"
    );
    assert!(!cache(&directory, &["prune", "--unused", "0s"]).success().stdout.contains("removed 0"));
    assert!(entries(&directory, "").is_empty());
    assert_eq!(again.get("/hello").ok(), "Hello, world!\n");
    again.finish();
}

#[test]
fn what_a_dead_build_left_is_pruned_at_once() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("cache");
    cache(&directory, &["list"]).success();
    let apps = directory.join("apps-v2");
    std::fs::create_dir_all(apps.join(".locks")).unwrap();
    let lock = std::fs::File::create(apps.join(".locks/k")).unwrap();
    let left = apps.join(".tmp-k-123456");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("file"), "x").unwrap();
    lock.lock().unwrap();
    assert!(cache(&directory, &["prune"]).success().stdout.contains("removed 0"), "in use");
    assert!(left.exists());
    assert!(cache(&directory, &["list"]).success().stdout.contains("unfinished"));
    drop(lock);
    assert!(cache(&directory, &["prune"]).success().stdout.contains("removed 1"));
    assert!(!left.exists());
}
