use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use crate::harness::{Server, guest, guest_sources, run, wsgi_wasm};

#[test]
fn each_address_is_announced_and_answers() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("app.sock");
    let mut server = Server::spawn(
        wsgi_wasm()
            .arg("serve")
            .arg(guest("behaviours"))
            .args(["--bind", "127.0.0.1:0", "--bind", "127.0.0.1:0"])
            .arg("--bind")
            .arg(format!("unix:{}", socket.display())),
    );
    let ask = |stream: &mut UnixStream| {
        stream.write_all(b"GET /show-environ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    };
    let response = ask(&mut UnixStream::connect(&socket).unwrap());
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(!response.contains("REMOTE_ADDR"), "{response}");
    assert_eq!(server.get("/hello").status, 200);
    let lines = server.announced(3);
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[2], format!("listening on unix:{}", socket.display()));

    // A server that was killed leaves its socket; the next one takes it over.
    server.signal("KILL");
    server.wait();
    assert!(socket.exists());
    let bind = format!("unix:{}", socket.display());
    let server = Server::spawn(wsgi_wasm().arg("serve").arg(guest("behaviours")).args(["--bind", &bind]));
    assert!(ask(&mut UnixStream::connect(&socket).unwrap()).starts_with("HTTP/1.1 200"));
    // One that is alive keeps it.
    run(wsgi_wasm().arg("serve").arg(guest("behaviours")).args(["--bind", &bind]))
        .refused(&["in use", "help:"]);
    server.finish();
    assert!(!socket.exists(), "a stopped server removes its socket");
}

#[test]
fn both_families_have_the_same_port() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6");
        return;
    }
    // Any port that is free for both.
    let (server, port) = (0..20)
        .find_map(|_| {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = free.local_addr().unwrap().port();
            std::net::TcpListener::bind(("::1", port)).ok()?;
            drop(free);
            let (four, six) = (format!("0.0.0.0:{port}"), format!("[::]:{port}"));
            let mut command = wsgi_wasm();
            command.arg("serve").arg(guest("behaviours")).args(["--bind", &four, "--bind", &six]);
            Some((Server::spawn(&mut command), port))
        })
        .unwrap();
    let lines = server.announced(2);
    assert_eq!(lines[1], format!("listening on http://[::]:{port}"));
    for address in ["127.0.0.1", "::1"] {
        let mut stream = std::net::TcpStream::connect((address, port)).unwrap();
        stream.write_all(b"GET /show-environ HTTP/1.0\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert!(response.contains(&format!("\"REMOTE_ADDR\": \"{address}\"")), "{response}");
    }
    server.finish();
}

#[test]
fn a_listener_without_clients_keeps_no_place() {
    let mut command = wsgi_wasm();
    command.arg("serve").arg(guest("behaviours")).args([
        "--bind",
        "127.0.0.1:0",
        "--bind",
        "127.0.0.1:0",
        "--max-connections",
        "1",
        "--keep-alive",
        "20s",
    ]);
    let server = Server::spawn(&mut command);
    let lines = server.announced(2);
    let second = lines[1].strip_prefix("listening on http://").unwrap();
    for address in [second, &server.address().to_string(), second] {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        stream.write_all(b"GET /hello HTTP/1.0\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert!(response.starts_with("HTTP/1.0 200"), "{address}: {response}");
    }
    // The one place is taken: the next client gets its answer afterwards.
    let mut first = server.connect();
    first.send_request("GET", "/hello", &[], b"");
    first.read_response("GET").ok();
    let mut next = server.connect();
    next.send_request("GET", "/hello", &[], b"");
    assert!(!next.has_answer(std::time::Duration::from_millis(200)), "more connections than allowed");
    drop(first);
    assert_eq!(next.read_response("GET").ok(), "Hello, world!\n");
    drop(next);
    server.finish();
}

#[test]
fn a_stop_serves_those_that_wait_already() {
    let mut server = Server::start("behaviours", &["--max-connections", "1"]);
    let mut running = server.connect();
    running.send_request("GET", "/nap?0.3", &[], b"");
    // The only place is taken: these wait, most of them in the kernel's queue.
    let mut waiting: Vec<_> = (0..5)
        .map(|_| {
            let mut connection = server.connect();
            connection.send_request("GET", "/hello", &[], b"");
            connection
        })
        .collect();
    server.signal("TERM");
    server.wait_for_log(&["stopping"]);
    assert_eq!(running.read_response("GET").ok(), "slept");
    for connection in &mut waiting {
        let response = connection.read_response("GET");
        assert_eq!(response.header("connection"), Some("close"));
        assert_eq!(response.ok(), "Hello, world!\n");
        assert!(connection.is_closed());
    }
    assert_eq!(server.wait(), Some(0));
}

#[test]
fn a_directory_is_built_and_served() {
    // The same inputs as the built guest, so it comes from the cache.
    guest("behaviours");
    let server = Server::spawn(wsgi_wasm().arg("serve").arg(guest_sources("behaviours")).args([
        "--warmup",
        "/hello",
        "--warmup",
        "/classes",
        "--bind",
        "127.0.0.1:0",
    ]));
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    assert!(server.log().contains("nothing has changed"));
    server.finish();
    let server = Server::spawn(
        wsgi_wasm()
            .args(["serve", "app:app", "--bind", "127.0.0.1:0"])
            .args(["--warmup", "/hello", "--warmup", "/classes", "--dir"])
            .arg(guest_sources("behaviours")),
    );
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn a_stop_finishes_what_runs_and_takes_nothing_new() {
    let mut server = Server::start("behaviours", &[]);
    let mut running = server.connect();
    running.send_request("GET", "/sleep?1", &[], b"");
    let mut streaming = server.connect();
    streaming.send_request("GET", "/large?64", &[], b"");
    assert_eq!(streaming.read_head().status, 200);
    let mut idle = server.connect();
    idle.send_request("GET", "/hello", &[], b"");
    idle.read_response("GET").ok();
    server.signal("TERM");
    server.wait_for_log(&["stopping"]);
    assert!(idle.is_closed(), "a connection without a request is closed");
    let response = running.read_response("GET");
    assert_eq!(response.header("connection"), Some("close"));
    assert_eq!(response.ok(), "slept");
    let mut received = 0;
    while let Some(chunk) = streaming.read_chunk().filter(|chunk| !chunk.is_empty()) {
        received += chunk.len();
    }
    assert_eq!(received, 64 << 20, "the stream was cut");
    assert!(std::net::TcpStream::connect(server.address()).is_err(), "still listening");
    assert_eq!(server.wait(), Some(0));
}

#[test]
fn a_stop_waits_no_longer_than_the_grace_time() {
    let mut server = Server::start("behaviours", &["--grace", "300ms"]);
    let mut connection = server.connect();
    connection.send_request("GET", "/stream-for-ever", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    server.signal("INT");
    assert_eq!(server.wait(), Some(1), "the exit status tells that not all has finished");
    assert!(server.log().contains("still open after the grace time"), "{}", server.log());
    // And the port is free at once.
    let bind = server.address().to_string();
    let again = Server::spawn(wsgi_wasm().arg("serve").arg(guest("behaviours")).args(["--bind", &bind]));
    again.finish();
}

#[test]
fn bad_input_is_refused_before_anything_listens() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let app = guest("behaviours");
    let whole = std::fs::read(&app).unwrap();
    let app = app.to_str().unwrap();
    let serve = |arguments: &[&str]| run(wsgi_wasm().arg("serve").args(arguments));

    serve(&["missing.wasm"]).refused(&["missing.wasm", "No such file", "help:"]);
    serve(&["no/such/directory"]).refused(&["no/such/directory", "help:"]);
    let mistaken = format!("{}:app", guest_sources("behaviours").display());
    serve(&[&mistaken]).refused(&["behaviours:app", "write `behaviours:app --dir "]);
    let sources = guest_sources("behaviours");
    run(wsgi_wasm().arg("inspect").arg(&sources)).refused(&["it is a directory", "help:"]);
    serve(&[&file("text.wasm", b"hello")]).refused(&["text.wasm", "not a WebAssembly component", "help:"]);
    serve(&[&file("core.wasm", b"\0asm\x01\0\0\0")]).refused(&["core WebAssembly module", "help:"]);
    serve(&[&file("other.wasm", b"\0asm\x0d\0\x01\0")]).refused(&["not a WSGI app for this host", "help:"]);
    serve(&[&file("cut.wasm", &whole[..whole.len() / 2])]).refused(&["cut off", "help:"]);
    // Of one tenant the reason is the error; of many, each reason is said with its name, once.
    let tenants = tempfile::tempdir().unwrap();
    std::fs::write(tenants.path().join("one.wasm"), b"hello").unwrap();
    let among = tenants.path().to_str().unwrap();
    let only = serve(&["--tenants", among]).refused(&["one.wasm", "not a WebAssembly component"]);
    assert_eq!(only.stderr.matches("one.wasm").count(), 1, "{}", only.stderr);
    std::fs::write(tenants.path().join("two.wasm"), b"hello").unwrap();
    std::fs::write(tenants.path().join("two.toml"), "path = '/two'").unwrap();
    let both = serve(&["--tenants", among]).refused(&["none of the 2 tenants"]);
    for file in ["one.wasm", "two.wasm"] {
        assert_eq!(both.stderr.matches(file).count(), 1, "{}", both.stderr);
    }
    let garbled = [&b"\0asm\x0d\0\x01\0"[..], &[7, 3, 0xff, 0xff, 0x01]].concat();
    serve(&[&file("garbled.wasm", &garbled)]).refused(&["not a valid component", "help:"]);
    serve(&[app, "--bind", "localhost"]).refused(&["localhost", "port is missing", "help:"]);
    serve(&[app, "--bind", "192.0.2.1:80"]).refused(&["192.0.2.1:80", "help:"]);
    serve(&[app, "--data", "/no/such/data"]).refused(&["/no/such/data", "mkdir", "help:"]);
    let text = file("notes.txt", b"");
    serve(&[app, "--data", &text]).refused(&["notes.txt", "not a directory", "help:"]);
    let pipe = directory.path().join("pipe.wasm").display().to_string();
    run(std::process::Command::new("mkfifo").arg(&pipe)).success();
    serve(&[&pipe]).refused(&["pipe.wasm", "not a regular file", "help:"]);
    serve(&[app, "--memory", "1MiB"]).refused(&["does not fit in 1MiB", "--memory", "help:"]);
    serve(&[app, "--warmup", "/"]).refused(&["--warmup", "built already", "help:"]);
    for (option, value) in [
        ("--memory", "lots"),
        ("--memory", "0"),
        ("--memory", "4097MiB"),
        ("--timeout", "30"),
        ("--timeout", "0s"),
        ("--timeout", "18446744073709551615ms"),
        ("--cpu", "0s"),
        ("--header-timeout", "0ms"),
        ("--max-uri", "0"),
        ("--max-uri", "1MiB"),
        ("--max-header-size", "0"),
        ("--max-header-size", "2MiB"),
        ("--instances", "0"),
        ("--isolation", "none"),
        ("--env", "NOVALUE"),
        ("--frobnicate", "1"),
    ] {
        serve(&[app, option, value]).refused(&[option]);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    serve(&[app, "--bind", &address]).refused(&[&address, "in use", "--bind"]);
    // Also when another address was fine: nothing may be announced.
    serve(&[app, "--bind", "127.0.0.1:0", "--bind", &address]).refused(&[&address]);
}

#[test]
fn commands_run_in_the_sandbox() {
    let app = guest("behaviours");
    let exec = |arguments: &[&str]| run(wsgi_wasm().arg("exec").arg(&app).args(arguments));

    let done = exec(&[
        "--env",
        "MODE=x",
        "--",
        "python",
        "-c",
        "import os, sys; print(os.environ['MODE'], sys.argv)",
        "a",
        "b",
    ])
    .success();
    assert_eq!(done.stdout, "x ['-c', 'a', 'b']\n");
    let done = exec(&["--", "python", "late.py"]).success();
    assert_eq!(done.stdout, "");
    let done = exec(&["--", "python", "-m", "json.tool", "--help"]).success();
    assert!(done.stdout.contains("usage"), "{}", done.stdout);
    let done = exec(&["--", "python", "-c", "import sys; print('err', file=sys.stderr); sys.exit(7)"]);
    assert_eq!((done.status, &*done.stderr), (7, "err\n"));
    let done = exec(&["--", "python", "-c", "1/0"]);
    assert_eq!(done.status, 1);
    assert!(done.stderr.contains("ZeroDivisionError"), "{}", done.stderr);
    let done = exec(&["--", "perl", "-e", "1"]);
    assert_eq!(done.status, 127);
    assert!(done.stderr.contains("python"), "{}", done.stderr);
    exec(&["--timeout", "300ms", "--", "python", "-c", "while True: pass"])
        .refused(&["stopped after 300ms", "help:"]);
    exec(&["--timeout", "300ms", "--", "python", "-c", "import time; time.sleep(60)"])
        .refused(&["stopped after"]);
    let done = exec(&["--", "python", "-c", "open('/0/x', 'w')"]);
    assert_eq!(done.status, 1);

    let mut child = wsgi_wasm()
        .arg("exec")
        .arg(&app)
        .args(["--", "python", "-c", "import sys; print(sys.stdin.read().upper())"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"from stdin").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "FROM STDIN\n");
}

#[test]
fn errors_cost_no_backtraces_whatever_the_environment_says() {
    let environment = |server: &Server| {
        let text = std::fs::read_to_string(format!("/proc/{}/environ", server.id())).unwrap();
        text.split('\0').map(str::to_owned).collect::<Vec<_>>()
    };
    let start = |backtraces: Option<&str>| {
        let mut command = wsgi_wasm();
        command.arg("serve").arg(guest("behaviours")).args(["--bind", "127.0.0.1:0"]);
        command.env("RUST_BACKTRACE", "1").env_remove("RUST_LIB_BACKTRACE");
        command.envs(backtraces.map(|value| ("RUST_LIB_BACKTRACE", value)));
        let server = Server::spawn(&mut command);
        assert_eq!(server.get("/hello").status, 200);
        server
    };
    let server = start(None);
    assert!(environment(&server).contains(&"RUST_LIB_BACKTRACE=0".to_owned()));
    server.finish();
    // Who wants them has them.
    let server = start(Some("1"));
    assert!(environment(&server).contains(&"RUST_LIB_BACKTRACE=1".to_owned()));
    server.finish();
}
