use std::collections::HashSet;

use serde_json::Value;

use crate::harness::Server;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn two_instances_never_draw_the_same_random_values() {
    let server = Server::start("behaviours", &["--isolation", "request"]);
    let draws: Vec<_> = (0..4).map(|_| json(&server.get("/randomness").ok())).collect();
    for source in [
        "random",
        "Random",
        "frozen",
        "uuid4",
        "uuid1",
        "secrets",
        "urandom",
        "tempfile",
        "SystemRandom",
        "SQL random",
        "SQL randomblob",
    ] {
        let values: HashSet<_> = draws.iter().map(|draw| draw[source].to_string()).collect();
        assert_eq!(values.len(), draws.len(), "{source} repeats: {values:?}");
    }
    // Seeded by the app itself: reproducible, as on any other server.
    assert!(draws.iter().all(|draw| draw["seeded"] == draws[0]["seeded"]));
    server.finish();
}

/// An app that looks at `random` has its generator seeded then, this one never does.
#[test]
fn two_instances_never_draw_the_same_by_a_function_that_the_app_holds() {
    let server = Server::start("bottle", &["--isolation", "request"]);
    let draws: HashSet<_> = (0..4).map(|_| server.get("/drawn").ok()).collect();
    assert_eq!(draws.len(), 4, "{draws:?}");
    server.finish();
}

#[test]
fn a_fresh_instance_knows_nothing_of_an_earlier_one() {
    let server = Server::start("behaviours", &["--isolation", "request"]);
    for _ in 0..5 {
        assert_eq!(server.get("/served").ok(), "1");
        assert_eq!(server.get("/temporary-files").ok(), "[]");
    }
    server.finish();
    let server = Server::start("behaviours", &["--instances", "1"]);
    assert_eq!(server.get("/temporary-files").ok(), "[]");
    assert_eq!(server.get("/temporary-files").ok(), "[\"left-behind\"]");
    server.get("/abort");
    assert_eq!(server.get("/temporary-files").ok(), "[]");
    server.finish();
}

#[test]
fn an_instance_is_replaced_after_its_requests() {
    let server = Server::start("behaviours", &["--instances", "1", "--max-requests", "3"]);
    let served: Vec<_> = (0..7).map(|_| server.get("/served").ok()).collect();
    assert_eq!(served, ["1", "2", "3", "1", "2", "3", "1"]);
    server.finish();
}

/// The keys that a class shares with its objects are moved in the snapshot.
#[test]
fn classes_work_on_where_the_build_left_them() {
    let ask = |server: &Server, name: &str| server.get(&format!("/classes?{name}")).ok();
    let late = r#"[{"x": 1, "late": 3}, {"x": 0, "warm": 4, "late": 4}, {"value": 2}]"#;
    let server = Server::start("behaviours", &["--isolation", "request"]);
    for _ in 0..3 {
        assert_eq!(ask(&server, "late"), late);
    }
    server.finish();
    let server = Server::start("behaviours", &["--instances", "1"]);
    assert_eq!(ask(&server, "late"), late);
    let later = r#"[{"x": 1, "later": 3}, {"x": 0, "warm": 4, "late": 4, "later": 4}, {"value": 2}]"#;
    assert_eq!(ask(&server, "later"), later);
    // More than a class shares, and more objects than it counts.
    for number in 0..40 {
        ask(&server, &format!("n{number}"));
    }
    let many = json(&ask(&server, "late"));
    assert_eq!(many[0], serde_json::json!({"x": 1, "late": 3}));
    assert_eq!(many[1].as_object().unwrap().len(), 44);
    server.finish();
}

#[test]
fn the_environment_is_the_one_of_run_time() {
    let server = Server::start("behaviours", &["--env", "MODE=live", "--env", "EMPTY="]);
    let environment = json(&server.get("/environment").ok());
    assert_eq!(environment["MODE"], "live");
    assert_eq!(environment["EMPTY"], "");
    assert_eq!(environment["SET_AT_IMPORT"], "kept");
    for name in ["HOME", "USER", "CARGO_MANIFEST_DIR", "WSGI_WASM_CACHE", "PYTHONPATH"] {
        assert!(environment.get(name).is_none(), "{name} came from the host");
    }
    let before: f64 = server.get("/now").ok().parse().unwrap();
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((before - host).abs() < 30.0, "the guest's clock is off: {before} {host}");
    server.finish();
}

#[test]
fn files_are_there_at_run_time() {
    let server = Server::start("behaviours", &[]);
    let found = json(&server.get("/files").ok());
    assert_eq!(found["late"], "imported late");
    assert_eq!(found["resource"], "a note\n");
    assert_eq!(found["source"], "VALUE = 'imported late'");
    assert_eq!(found["codec"], "81");
    assert_eq!(found["zone"], "ok");
    assert_eq!(found["tzdata"], true);
    assert_eq!(found["relative"], true);
    server.finish();
}

#[test]
fn files_are_written_only_where_that_is_granted() {
    let server = Server::start("behaviours", &[]);
    let outcome = json(&server.get("/write-files").ok());
    assert_eq!(outcome["/tmp/x"], "written");
    assert_eq!(outcome["size"], 9);
    for path in ["/0/x", "/1/x", "/python/x", "/data/x", "/x", "/tmp/../0/y", "/tmp/../../etc/passwd"] {
        assert_ne!(outcome[path], "written", "{path}");
    }
    let outcome = json(&server.get("/escape").ok());
    for (path, found) in outcome.as_object().unwrap() {
        assert!(found.as_str().unwrap().ends_with("Error"), "{path} gave {found}");
    }
    server.finish();

    let data = tempfile::tempdir().unwrap();
    let server = Server::start("behaviours", &["--data", data.path().to_str().unwrap()]);
    let outcome = json(&server.get("/write-files").ok());
    assert_eq!(outcome["/data/x"], "written");
    assert_eq!(std::fs::read_to_string(data.path().join("x")).unwrap(), "x");
    server.finish();
}

#[test]
fn the_network_is_closed() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Server::start("behaviours", &["--instances", "1"]);
    let outcome = json(&server.get(&format!("/sockets?{port}")).ok());
    for attempt in ["connect", "listen", "lookup"] {
        let found = outcome[attempt].as_str().unwrap();
        assert!(found.ends_with("Error") || found == "gaierror", "{attempt} {found}");
    }
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    let log = server.finish();
    assert!(!log.contains("trapped"), "{log}");
}

#[test]
fn passwords_are_hashed_by_the_host() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    let hashes = json(&server.get("/passwords").ok());
    // RFC 7914 sections 11 and 12, RFC 6070 section 2.
    assert!(hashes["pbkdf2"].as_str().unwrap().starts_with("55ac046e56e3089fec1691c22544b605"));
    assert_eq!(hashes["sha1"], "4b007901b765489abead49d926f721d065a429c1");
    assert!(hashes["scrypt"].as_str().unwrap().starts_with("fdbabe1c9d3472007856e7190d01e9fe"));
    assert_eq!(hashes["sha512"].as_str().unwrap().len(), 128);
    for refused in ["too much", "too large", "wrong", "unknown"] {
        assert_eq!(hashes[refused], "ValueError", "{refused}");
    }
    server.finish();
}
