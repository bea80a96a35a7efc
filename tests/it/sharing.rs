use std::time::{Duration, Instant};

use crate::harness::{Server, guest, run, wsgi_wasm};

/// The ways to lay out an app's code, the plainest first.
const WAYS: [&str; 3] = ["whole", "split", "merged"];

/// What tells one response from another, without the request's id.
type Seen = (u16, Option<String>, Vec<u8>);

/// The responses of `guest` to `paths`, with its code laid out as `way` says.
fn responses(guest: &str, way: &str, paths: &[&str]) -> Vec<Seen> {
    let server = Server::start(guest, &["--code", way, "--instances", "1"]);
    let responses = paths.iter().map(|path| {
        let response = server.get(path);
        let header = response.header("content-type").map(str::to_owned);
        let body = if response.status == 500 { Vec::new() } else { response.body };
        (response.status, header, body)
    });
    let responses = responses.collect();
    server.finish();
    responses
}

#[test]
fn each_app_answers_the_same_however_its_code_is_laid_out() {
    let behaviours = [
        "/hello",
        "/count-only",
        "/large?3",
        "/large-whole?100000",
        "/stream?3",
        "/write-callable",
        "/cookies",
        "/recurse",
        "/recurse-in-c",
        "/text-chunk",
        "/passwords",
        "/allocate-and-catch",
        "/served",
    ];
    let flask = ["/", "/square/9", "/rest/a/%C3%BC", "/api/sum", "/download", "/refuse/418", "/fail"];
    let django = ["/about/", "/stream/", "/999/", "/static/notes/style.css", "/fail/"];
    for (guest, paths) in [
        ("behaviours", &behaviours[..]),
        ("flask", &flask),
        ("django", &django),
        ("bottle", &["/", "/square/3", "/static/style.css"]),
        ("falcon", &["/", "/api/items", "/about", "/static/style.css"]),
    ] {
        let whole = responses(guest, WAYS[0], paths);
        assert!(whole.iter().any(|(status, ..)| *status == 200), "{guest} answers nothing");
        for way in &WAYS[1..] {
            for (path, (seen, expected)) in paths.iter().zip(responses(guest, way, paths).iter().zip(&whole))
            {
                assert!(seen == expected, "{guest} {way} {path}: {} instead of {}", seen.0, expected.0);
            }
        }
    }
}

#[test]
fn limits_and_traps_are_the_same_however_the_code_is_laid_out() {
    for way in WAYS {
        let server = Server::start("behaviours", &["--code", way, "--instances", "1", "--timeout", "500ms"]);
        assert_eq!(server.get("/abort").status, 500, "{way}");
        // The backtrace names the functions of C.
        server.wait_for_log(&["!abort"]);
        server.wait_for_log(&["!os_abort"]);
        server.wait_for_log(&["!_PyEval_EvalFrameDefault"]);
        server.wait_for_log(&["`unreachable` instruction executed"]);
        let start = Instant::now();
        assert_eq!(server.get("/spin").status, 504, "{way}");
        assert!(start.elapsed() >= Duration::from_millis(500), "{way}");
        assert_eq!(server.get("/served").ok(), "1", "{way}");
        assert_eq!(server.get("/recurse").status, 500, "{way}");
        server.wait_for_log(&["RecursionError"]);
        assert_eq!(server.get("/served").ok(), "2", "{way}: recursion costs no instance");
        server.finish();
    }
}

#[test]
fn inspect_tells_how_the_code_is_laid_out() {
    let described = |guest_name: &str| {
        let output = run(wsgi_wasm().arg("inspect").arg("--json").arg(guest(guest_name))).success();
        let description: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
        description["component"]["code"].clone()
    };
    let (flask, django) = (described("flask"), described("django"));
    assert_eq!(flask["sharing"], "merged");
    assert_eq!(flask, django, "both have the same skeleton");
    let text = run(wsgi_wasm().arg("inspect").arg(guest("flask"))).success().stdout;
    assert!(text.contains("shared by all apps with skeleton"), "{text}");

    // A shim that calls the wrong slot is valid, and only its author's affair.
    // Without the manifest, which knows the digest of what was built.
    let mut forged = std::fs::read(guest("bottle")).unwrap();
    let name = forged.windows(19).position(|bytes| bytes == b"\x12wsgi-wasm:manifest").unwrap();
    // Before the name are its section's size, in which all bytes but the last have the high bit, and its id.
    let size = forged[..name - 1].iter().rposition(|byte| byte & 0x80 == 0).unwrap();
    forged.truncate(size);
    let call_slot_5 = [0x41, 5, 0x11]; // i32.const 5, call_indirect
    let shim = forged.windows(8).rposition(|bytes| bytes == b"$imports").unwrap();
    let place = forged[..shim].windows(3).rposition(|bytes| bytes == call_slot_5).unwrap();
    forged[place + 1] = 6;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("forged.wasm");
    std::fs::write(&path, forged).unwrap();
    let text = run(wsgi_wasm().arg("inspect").arg(&path)).success().stdout;
    assert!(text.contains("not merged: the shim is not as expected"), "{text}");

    // An empty component, which every other tool can make.
    let empty = directory.path().join("empty.wasm");
    std::fs::write(&empty, b"\0asm\x0d\0\x01\0").unwrap();
    let text = run(wsgi_wasm().arg("inspect").arg(&empty)).success().stdout;
    assert!(text.contains("not shared with other apps: it is not linked from shared libraries"), "{text}");
    run(wsgi_wasm().args(["serve", "--code", "merged"]).arg(&empty)).refused(&["shared libraries"]);
}

#[test]
fn a_request_writes_to_little_of_the_memory_that_instances_share() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    for _ in 0..3 {
        assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", server.id())).unwrap();
    let (mut is_memory, mut written) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next().unwrap_or_default() {
            // Copied on write. Dirty are also those that the disk does not have yet.
            "Anonymous:" if is_memory => {
                written += words.next().unwrap().parse::<u64>().unwrap();
            }
            first if !first.ends_with(':') => {
                is_memory = line.ends_with("/tenant.cwasm") && line.contains(" rw")
            }
            _ => {}
        }
    }
    // In kB. More than twice as much where the objects' references are counted.
    assert!((100..450).contains(&written), "{written} kB");
    server.finish();
}
