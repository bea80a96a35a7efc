use std::time::{Duration, Instant};

use crate::harness::{Response, Server, guest, wsgi_wasm};

/// A failure's response tells the client nothing but the status and the id.
#[track_caller]
fn assert_refusal(server: &Server, response: &Response, status: u16) -> String {
    assert_eq!(response.status, status, "{}", response.text());
    let text = response.text();
    let id = text.lines().find_map(|line| line.strip_prefix("request ")).expect("no request id").to_owned();
    assert_eq!(text.lines().count(), 2, "{text}");
    server.wait_for_log(&[&id, "app="]);
    id
}

#[test]
fn an_exception_is_a_500_and_a_traceback_in_the_log() {
    let server = Server::start("behaviours", &[]);
    let response = server.get("/fail");
    let id = assert_refusal(&server, &response, 500);
    server.wait_for_log(&[&id, "Traceback"]);
    server.wait_for_log(&[&id, "File \"/0/app.py\""]);
    server.wait_for_log(&[&id, "RuntimeError: a secret of the app"]);
    // The interpreter is sound: the same instance goes on.
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    assert!(!server.log().contains("trapped"));
    server.finish();
}

#[test]
fn what_breaks_pep_3333_is_a_500_and_never_a_trap() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    for (path, logged) in [
        ("/exit-app", "SystemExit"),
        ("/not-callable-result", "int"),
        ("/text-chunk", "bytes"),
        ("/no-start-response", "start_response"),
        ("/bad-header", "X-Bad"),
        ("/hop-by-hop", "Transfer-Encoding"),
        ("/bad-status", "status"),
        ("/recurse", "RecursionError"),
    ] {
        let response = server.get(path);
        let id = assert_refusal(&server, &response, 500);
        server.wait_for_log(&[&id, logged]);
        assert!(response.headers.iter().all(|(name, _)| name != "set-cookie"), "{path}");
    }
    // Deep in C code, which has other limits than Python code has.
    assert_eq!(server.get("/recurse-in-c").ok(), "[[[[[[[[[[");
    let log = server.finish();
    assert!(!log.contains("trapped"), "{log}");
}

#[test]
fn a_trap_costs_one_request_and_one_instance() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    assert_eq!(server.get("/served").ok(), "1");
    assert_eq!(server.get("/served").ok(), "2");
    let id = assert_refusal(&server, &server.get("/abort"), 500);
    server.wait_for_log(&[&id, "trapped"]);
    assert_eq!(server.get("/served").ok(), "1", "the next request has a fresh instance");
    server.finish();
}

#[test]
fn starting_instances_leaves_the_processor_free() {
    // On one processor, where a place that is not given back is missed.
    let mut command = std::process::Command::new("taskset");
    let plain = wsgi_wasm();
    command.args(["--cpu-list", "0"]).arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.arg("serve").arg(guest("behaviours")).args(["--bind", "127.0.0.1:0", "--isolation", "request"]);
    let server = Server::spawn(command.args(["--instances", "4", "--timeout", "10s"]));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut connection = server.connect();
                // Some of these starts and requests are interrupted by a tick.
                for _ in 0..200 {
                    connection.send_request("GET", "/hello", &[], b"");
                    assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n");
                }
            });
        }
    });
    assert_eq!(server.get("/compute?0.1").status, 200);
    server.finish();
}

#[test]
fn an_app_hears_that_its_time_is_up() {
    let server = Server::start("behaviours", &["--instances", "1", "--timeout", "2s"]);
    assert_eq!(server.get("/nap?0.01").ok(), "slept");
    for (path, line) in [("/collect-for-ever", "in collect_for_ever"), ("/nap?3600", "in nap")] {
        assert_eq!(server.get(path).status, 504, "{path}");
        server.wait_for_log(&["GET", path.split('?').next().unwrap(), "the application failed"]);
        server.wait_for_log(&["app.py", line]);
        server.wait_for_log(&["RequestTimeout: the request takes longer than the host allows"]);
    }
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    let log = server.finish();
    assert_eq!(log.matches("the app did not answer in time").count(), 2, "{log}");
}

#[test]
fn a_busy_guest_and_a_waiting_one_are_stopped_in_time() {
    let server = Server::start("behaviours", &["--instances", "1", "--timeout", "500ms"]);
    for path in ["/spin", "/sleep-for-ever"] {
        let start = Instant::now();
        let response = server.get(path);
        let id = assert_refusal(&server, &response, 504);
        // What sleeps is told a little earlier.
        assert!(start.elapsed() >= Duration::from_millis(450), "{path}");
        server.wait_for_log(&[&id, "in time"]);
        assert_eq!(server.get("/served").ok(), "1", "the next request has a fresh instance");
    }
    server.finish();
}

#[test]
fn memory_ends_with_a_memory_error_and_the_next_request_has_its_own() {
    let server = Server::start("behaviours", &["--instances", "1", "--memory", "96MiB"]);
    let caught = server.get("/allocate-and-catch").ok();
    assert!(caught.starts_with("MemoryError after"), "{caught}");
    let id = assert_refusal(&server, &server.get("/allocate"), 500);
    server.wait_for_log(&[&id, "MemoryError"]);
    assert_eq!(server.get("/served").ok(), "1", "a blown-up instance is not used again");
    server.finish();
}

#[test]
fn one_request_does_not_stop_another() {
    // As many that compute and wait as would fill a thread pool. They have time: other
    // tests' servers and builds may come before guests that compute for long.
    let server = Server::start("behaviours", &["--instances", "12", "--timeout", "60s"]);
    let mut busy = Vec::new();
    for path in ["/compute?8", "/compute?8", "/compute?8", "/sleep?8", "/sleep?8", "/cpu-hash", "/cpu-hash"] {
        let mut connection = server.connect();
        connection.send_request("GET", path, &[], b"");
        busy.push(connection);
    }
    for _ in 0..20 {
        let start = Instant::now();
        assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
        // Far from the 8 seconds that the others take.
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    }
    for mut connection in busy {
        connection.read_response("GET").ok();
    }
    server.finish();
}

#[test]
fn more_requests_than_instances_wait_or_are_refused() {
    let server = Server::start("behaviours", &["--instances", "1", "--queue", "1", "--queue-wait", "200ms"]);
    let mut busy = server.connect();
    busy.send_request("GET", "/stream-for-ever", &[], b"");
    assert_eq!(busy.read_head().status, 200);
    // The only instance is taken until the stream ends.
    let refused = server.get("/hello");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_refusal(&server, &refused, 503);
    drop(busy);
    server.wait_for_log(&["closed pieces"]);
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn a_body_over_the_limit_is_a_413() {
    let server = Server::start("behaviours", &["--max-body", "1MiB"]);
    let announced = server.request("POST", "/count", &[("Content-Length", "1048577")], b"");
    assert_refusal(&server, &announced, 413);
    let mut connection = server.connect();
    connection.send("POST /count HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = [b"10000\r\n".to_vec(), vec![b'x'; 0x10000], b"\r\n".to_vec()].concat();
    for _ in 0..17 {
        if connection.try_send(&chunk).is_err() {
            break;
        }
    }
    let response = connection.read_response("POST");
    assert_refusal(&server, &response, 413);
    let exact = vec![b'x'; 1 << 20];
    assert!(server.post("/count", &[], &exact).ok().starts_with("1048576 "));
    server.finish();
}

#[test]
fn a_body_that_breaks_is_cut_and_never_ended() {
    let server = Server::start("behaviours", &["--timeout", "500ms"]);
    for (path, logged) in [
        ("/stream-then-fail", "failed after the head"),
        ("/stream-too-little", "Content-Length"),
        ("/stream-then-spin", "in time"),
    ] {
        let response = server.get(path);
        assert_eq!(response.status, 200);
        assert!(response.cut, "{path} ended as if it were whole: {response:?}");
        server.wait_for_log(&[logged]);
    }
    server.finish();
}

#[test]
fn a_guests_output_is_in_the_log_and_can_not_forge_lines() {
    let server = Server::start("behaviours", &[]);
    server.get("/log-lines").ok();
    for line in ["to stdout", "to stderr", "to wsgi.errors", "no end"] {
        server.wait_for_log(&["app=behaviours", "request=", line]);
    }
    let forged = server.wait_for_log(&["forged"]);
    assert!(!forged.contains('\x1b') && !forged.contains('\r'), "{forged:?}");
    server.get("/log-flood").ok();
    server.wait_for_log(&["more lines of this request are dropped"]);
    let log = server.finish();
    assert!(!log.contains("flood 4999"));
}
