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
    optimized_code_takes_the_place_of_the_other(&directory, home.path());
    assert!(
        cache(&directory, &["prune", "--max-size", "1B"]).success().stdout.contains("removed 0"),
        "in use"
    );
    assert!(!cache(&directory, &["prune", "--unused", "0s"]).success().stdout.contains("removed 0"));
    assert!(entries(&directory, "").is_empty());
    assert_eq!(again.get("/hello").ok(), "Hello, world!\n");
    again.finish();
}

/// With a program in the place of Binaryen's that changes nothing: that one may
/// not be here, and takes minutes.
fn optimized_code_takes_the_place_of_the_other(directory: &Path, home: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let app = guest("behaviours");
    let optimize =
        |program: &str| cache(directory, &["optimize", app.to_str().unwrap(), "--wasm-opt", program]);
    optimize("/no/such/wasm-opt").refused(&["/no/such/wasm-opt", "install Binaryen", "help:"]);
    optimize("false").refused(&["was not optimized", "`false` failed"]);
    optimize("true").refused(&["was not optimized", "`true` wrote nothing"]);
    let script = |text: &str| {
        let program = home.join("wasm-opt");
        std::fs::write(&program, text).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program.to_str().unwrap().to_owned()
    };
    let what_is_not_wasm = script("#!/bin/sh\nwhile [ \"$1\" != -o ]; do shift; done; echo > \"$2\"\n");
    optimize(&what_is_not_wasm).refused(&["was not optimized"]);
    let copy = script("#!/bin/sh\nwhile [ \"$2\" != -o ]; do shift; done; cp \"$1\" \"$3\"\n");
    let done = optimize(&copy).success().stderr;
    assert!(done.contains(", optimized\n"), "{done}");
    assert!(!optimize(&copy).success().stderr.contains("optimizing"), "it is done once");
    let described =
        run(wsgi_wasm().env("WSGI_WASM_CACHE", directory).arg("inspect").arg(&app)).success().stdout;
    assert!(described.contains(", optimized\n"), "{described}");
    let server = serve(directory);
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
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
