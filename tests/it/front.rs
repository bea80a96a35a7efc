use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use crate::harness::{Response, Server, guest, run, wait_until, wsgi_wasm};

fn environ(response: Response) -> serde_json::Value {
    serde_json::from_str(&response.ok()).unwrap()
}

#[test]
fn headers_about_the_client_are_removed_unless_a_proxy_is_trusted() {
    let headers: &[(&str, &str)] = &[
        ("X-Forwarded-For", "203.0.113.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil.example"),
        ("X-Forwarded-Prefix", "/evil"),
        ("X-Forwarded-Anything", "x"),
        ("X-Real-IP", "203.0.113.7"),
        ("Forwarded", "for=203.0.113.8;proto=https;host=other.example"),
        ("X-Request-Id", "from-outside"),
    ];
    let ask = |server: &Server| environ(server.request("GET", "/show-environ", headers, b""));
    for options in [&[][..], &["--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "unix"]] {
        let server = Server::start("behaviours", options);
        let environ = ask(&server);
        assert_eq!(environ["REMOTE_ADDR"], "127.0.0.1");
        assert_eq!(environ["HTTP_HOST"], "test.example");
        assert_eq!((&environ["SCRIPT_NAME"], &environ["wsgi.url_scheme"]), (&"".into(), &"http".into()));
        for name in environ.as_object().unwrap().keys() {
            assert!(!name.starts_with("HTTP_X_FORWARDED") && name != "HTTP_FORWARDED", "{name} is there");
            assert_ne!(name, "HTTP_X_REAL_IP");
        }
        server.finish();
    }

    let server = Server::start("behaviours", &["--trusted-proxy", "127.0.0.0/8"]);
    let seen = ask(&server);
    assert_eq!(seen["REMOTE_ADDR"], "203.0.113.7");
    assert!(seen.get("REMOTE_PORT").is_none(), "the client's port is not known");
    assert_eq!(seen["HTTP_HOST"], "evil.example");
    assert_eq!(seen["SCRIPT_NAME"], "/evil");
    assert_eq!((&seen["wsgi.url_scheme"], &seen["HTTPS"]), (&"https".into(), &"on".into()));
    assert!(seen.get("HTTP_FORWARDED").is_none(), "the proxy does not set it");
    assert_eq!(server.request("GET", "/hello", &[("X-Forwarded-Host", "a b")], b"").status, 400);
    assert_eq!(server.request("GET", "/hello", &[("X-Forwarded-Prefix", "/../x")], b"").status, 400);
    server.finish();

    // Only what the trusted proxies have added reaches the app.
    let chain = [
        ("X-Forwarded-For", "6.6.6.6, 203.0.113.7"),
        ("X-Forwarded-For", "10.0.0.1"),
        ("X-Forwarded-Proto", "http, https, http"),
        ("X-Forwarded-Host", "evil.example"),
    ];
    let expected = [
        ("1", "10.0.0.1", "10.0.0.1", Some("http"), Some("evil.example")),
        ("2", "203.0.113.7", "203.0.113.7, 10.0.0.1", Some("https, http"), None),
        ("4", "127.0.0.1", "", None, None),
    ];
    for (hops, client, left, proto, host) in expected {
        let server = Server::start("behaviours", &["--trusted-proxy", "127.0.0.1", "--forwarded-hops", hops]);
        let seen = environ(server.request("GET", "/show-environ", &chain, b""));
        assert_eq!(seen["REMOTE_ADDR"], client, "{hops} hops");
        assert_eq!(seen["HTTP_X_FORWARDED_FOR"].as_str().unwrap_or_default(), left, "{hops} hops");
        assert_eq!(seen["HTTP_X_FORWARDED_PROTO"].as_str(), proto, "{hops} hops");
        assert_eq!(seen["HTTP_X_FORWARDED_HOST"].as_str(), host, "{hops} hops");
        assert_eq!(seen["wsgi.url_scheme"], if hops == "2" { "https" } else { "http" });
        assert_eq!(seen["HTTP_HOST"], host.unwrap_or("test.example"), "{hops} hops");
        server.finish();
    }

    let options = ["--trusted-proxy", "127.0.0.1", "--forwarded", "forwarded", "--forwarded-hops", "2"];
    let server = Server::start("behaviours", &options);
    let chain = [("Forwarded", "for=6.6.6.6, for=\"[2001:db8::1]:99\";proto=https, for=10.0.0.1")];
    let environ = environ(server.request("GET", "/show-environ", &chain, b""));
    assert_eq!((&environ["REMOTE_ADDR"], &environ["REMOTE_PORT"]), (&"2001:db8::1".into(), &"99".into()));
    assert_eq!(environ["wsgi.url_scheme"], "https");
    assert_eq!(environ["HTTP_FORWARDED"], "for=\"[2001:db8::1]:99\";proto=https, for=10.0.0.1");
    server.finish();
}

#[test]
fn the_proxy_protocol_names_the_client() {
    let server = Server::start("behaviours", &["--proxy-protocol"]);
    let request = "GET /show-environ HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut connection = server.connect();
    connection.send(format!("PROXY TCP4 203.0.113.7 192.0.2.1 5000 443\r\n{request}"));
    let environ: serde_json::Value = serde_json::from_str(&connection.read_response("GET").ok()).unwrap();
    assert_eq!((&environ["REMOTE_ADDR"], &environ["REMOTE_PORT"]), (&"203.0.113.7".into(), &"5000".into()));
    assert_eq!((&environ["SERVER_NAME"], &environ["SERVER_PORT"]), (&"192.0.2.1".into(), &"443".into()));
    // Version 2: PROXY, TCP over IPv6, and an extension that is skipped.
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x29".to_vec();
    for address in ["2001:db8::7", "2001:db8::1"] {
        header.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    header.extend([0x13, 0x88, 0x01, 0xbb]);
    header.extend([0x04, 0, 2, 0, 0]);
    let mut connection = server.connect();
    connection.send([&header, request.as_bytes()].concat());
    let environ: serde_json::Value = serde_json::from_str(&connection.read_response("GET").ok()).unwrap();
    assert_eq!((&environ["REMOTE_ADDR"], &environ["REMOTE_PORT"]), (&"2001:db8::7".into(), &"5000".into()));
    assert_eq!((&environ["SERVER_NAME"], &environ["SERVER_PORT"]), (&"2001:db8::1".into(), &"443".into()));
    let mut connection = server.connect();
    connection.send(request);
    assert!(connection.is_closed(), "a connection without the header is served");
    server.finish();
}

#[test]
fn connections_are_counted_by_the_client_that_the_balancer_names() {
    let server = Server::start("behaviours", &["--proxy-protocol", "--max-connections-per-client", "2"]);
    let connect = |client: &str| {
        let mut connection = server.connect();
        let header = format!("PROXY TCP4 {client} 192.0.2.1 5000 80\r\n");
        connection.send(header + "GET /hello HTTP/1.1\r\nHost: x\r\n\r\n");
        connection
    };
    let mut open: Vec<_> = ["203.0.113.7", "203.0.113.8", "203.0.113.7", "203.0.113.9"]
        .into_iter()
        .map(|client| {
            let mut connection = connect(client);
            assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n", "{client}");
            connection
        })
        .collect();
    assert!(connect("203.0.113.7").is_closed(), "one more than allowed is served");
    let mut other = connect("203.0.113.8");
    assert_eq!(other.read_response("GET").status, 200);
    open.push(other);
    server.finish();
}

#[test]
fn sockets_are_taken_over_from_the_service_manager() {
    use std::os::fd::OwnedFd;
    let serve = |socket: OwnedFd| {
        // Descriptors that are passed begin with 3.
        let mut command = std::process::Command::new("sh");
        command
            .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve \"$1\" 3<&0 0</dev/null"])
            .arg(env!("CARGO_BIN_EXE_wsgi-wasm"))
            .arg(guest("behaviours"))
            .env("WSGI_WASM_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
            .stdin(socket);
        Server::spawn(&mut command)
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = serve(std::os::unix::net::UnixListener::bind(&path).unwrap().into());
    assert_eq!(server.announced(1), ["listening on unix"]);
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /hello HTTP/1.0\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.ends_with("\r\n\r\nHello, world!\n"), "{response}");
    server.finish();
    assert!(path.exists(), "the socket is the service manager's to remove");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = serve(listener.into());
    assert_eq!(server.address(), address);
    let lines = server.announced(1);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn connections_are_closed_when_idle_spent_or_too_many() {
    let server = Server::start(
        "behaviours",
        &["--keep-alive", "300ms", "--keep-alive-requests", "2", "--max-connections-per-client", "3"],
    );
    let mut idle = server.connect();
    idle.send_request("GET", "/hello", &[], b"");
    assert_eq!(idle.read_response("GET").ok(), "Hello, world!\n");
    assert!(idle.is_closed(), "an idle connection stays open");
    let mut spent = server.connect();
    spent.send_request("GET", "/hello", &[], b"");
    assert_eq!(spent.read_response("GET").header("connection"), None);
    spent.send_request("GET", "/hello", &[], b"");
    let last = spent.read_response("GET");
    assert_eq!(last.header("connection"), Some("close"));
    assert!(spent.is_closed());
    // A response that takes longer than the idle time is not cut.
    assert_eq!(server.get("/sleep?0.6").ok(), "slept");

    let mut streams: Vec<_> = (0..3)
        .map(|_| {
            let mut connection = server.connect();
            connection.send_request("GET", "/stream-for-ever", &[], b"");
            assert_eq!(connection.read_head().status, 200);
            connection
        })
        .collect();
    assert!(server.connect().is_closed(), "one more than allowed is served");
    streams.pop();
    server.wait_for_log(&["closed pieces"]);
    // The server notices the close before it ends the app's iterator.
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
}

#[test]
fn the_access_log_tells_what_happened() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("access.log");
    let name = file.to_str().unwrap();
    let options = ["--access-log", "json", "--access-log-file", name, "--trusted-proxy", "127.0.0.1"];
    let server = Server::start("behaviours", &options);
    let headers = [("X-Request-Id", "given-1"), ("X-Forwarded-For", "203.0.113.7"), ("User-Agent", "a\"b")];
    server.request("GET", "/hello?q", &headers, b"").ok();
    let failed = server.request("GET", "/fail", &[("X-Request-Id", "given-2")], b"");
    assert!(failed.text().contains("request given-2"), "{}", failed.text());
    server.wait_for_log(&["given-2", "Traceback"]);
    let unfit = server.request("GET", "/fail", &[("X-Request-Id", "two words")], b"");
    assert!(!unfit.text().contains("two words"));
    server.get("/stream").ok();
    assert!(server.get("/stream-too-little").cut);
    let mut bad = server.connect();
    bad.send("GET / HTTP/1.1\r\nBad : x\r\n\r\n");
    let refused = bad.read_response("GET");
    assert_eq!(refused.status, 400);
    server.finish();
    let log = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 6, "{log}");
    let first = &lines[0];
    for (key, value) in [
        ("client", "203.0.113.7"),
        ("method", "GET"),
        ("target", "/hello?q"),
        ("protocol", "HTTP/1.1"),
        ("host", "test.example"),
        ("user_agent", "a\"b"),
        ("app", "behaviours"),
        ("request", "given-1"),
    ] {
        assert_eq!(first[key], value, "{key}");
    }
    assert_eq!((first["status"].as_u64(), first["bytes"].as_u64()), (Some(200), Some(14)));
    assert_eq!(first["whole"], true);
    let seconds = |key: &str| first[key].as_f64().unwrap();
    assert!(seconds("guest") > 0.0 && seconds("guest") + seconds("queue") <= seconds("total"), "{first}");
    assert_eq!((&lines[1]["status"], &lines[1]["request"]), (&500.into(), &"given-2".into()));
    assert_eq!((&lines[3]["bytes"], &lines[3]["whole"]), (&24.into(), &true.into()));
    assert_eq!((&lines[4]["status"], &lines[4]["whole"]), (&200.into(), &false.into()));
    assert_eq!((&lines[5]["status"], &lines[5]["method"]), (&400.into(), &serde_json::Value::Null));
    assert!(refused.text().contains(lines[5]["request"].as_str().unwrap()));

    let server = Server::start("behaviours", &["--access-log", "combined"]);
    server.request("GET", "/hello", &[("User-Agent", "a\"b\\c")], b"").ok();
    let line = server.wait_for_log(&["\"GET /hello HTTP/1.1\" 200 14 \"-\""]);
    assert!(line.starts_with("127.0.0.1 - - ["), "{line}");
    assert!(line.contains(r#""a\"b\\c" app=behaviours request="#), "{line}");
    server.finish();
}

#[test]
fn the_access_log_tells_of_clients_that_leave() {
    let server = Server::start("behaviours", &["--access-log", "json", "--instances", "1"]);
    let line = |parts: &[&str]| -> serde_json::Value {
        serde_json::from_str(&server.wait_for_log(&[&["{", "\"status\":499"][..], parts].concat())).unwrap()
    };
    // In the middle of the guest's work.
    let mut left = server.connect();
    let work = b"import sys, time\nprint('at work', file=sys.stderr, flush=True)\ntime.sleep(1)\nresult = 1";
    left.send_request("POST", "/run", &[], work);
    server.wait_for_log(&["at work"]);
    drop(left);
    let seen = line(&["/run"]);
    assert_eq!((&seen["app"], &seen["whole"]), (&"behaviours".into(), &false.into()));
    assert!(seen["guest"].as_f64().unwrap() > 0.0, "{seen}");
    // In the middle of a body: one that is read ahead, and one that the guest reads.
    for (length, path) in [(10, "/echo?small"), (1_000_000, "/echo?large")] {
        let mut left = server.connect();
        left.send(format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nabc"));
        drop(left);
        let seen = line(&[path]);
        assert_eq!((&seen["app"], &seen["whole"]), (&"behaviours".into(), &false.into()), "{seen}");
    }
    server.finish();
}

#[test]
fn the_access_log_is_opened_anew_at_a_hangup() {
    let directory = tempfile::tempdir().unwrap();
    let (file, old) = (directory.path().join("access.log"), directory.path().join("access.log.1"));
    let options = ["--access-log", "combined", "--access-log-file", file.to_str().unwrap()];
    let server = Server::start("behaviours", &options);
    server.get("/hello?first").ok();
    std::fs::rename(&file, &old).unwrap();
    server.get("/hello?second").ok();
    wait_until(|| std::fs::read_to_string(&old).unwrap().contains("?second"));
    server.signal("HUP");
    wait_until(|| file.exists());
    server.get("/hello?third").ok();
    server.finish();
    let (old, new) = (std::fs::read_to_string(old).unwrap(), std::fs::read_to_string(file).unwrap());
    assert!(old.contains("?first") && old.contains("?second") && !old.contains("?third"), "{old}");
    assert!(!new.contains("?second") && new.contains("?third"), "{new}");
}

#[test]
fn a_response_says_when_the_connection_ends_with_it() {
    let server = Server::start("behaviours", &["--client-timeout", "30s"]);
    let ask = |path: &str| {
        let mut connection = server.connect();
        connection.send(format!("GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"));
        let response = connection.read_response("GET");
        (response.header("connection").map(str::to_owned), response.ok(), connection)
    };
    // HTTP/1.0 has no chunks: the body ends with the connection.
    let (connection, body, mut client) = ask("/stream");
    assert_eq!((connection.as_deref(), body.len()), (Some("close"), 24));
    assert!(client.is_closed());
    for path in ["/stream-exact", "/hello"] {
        let (connection, _, mut client) = ask(path);
        assert_eq!(connection.as_deref(), Some("keep-alive"), "{path}");
        client.send("GET /hello HTTP/1.0\r\n\r\n");
        assert_eq!(client.read_response("GET").ok(), "Hello, world!\n");
    }
    // A body that is still under way, and that nobody reads.
    let mut unread = server.connect();
    unread.send("POST /ignore-body HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc");
    let response = unread.read_response("POST");
    assert_eq!(response.header("connection"), Some("close"));
    assert_eq!(response.ok(), "ignored");
    assert!(unread.is_closed());
    // 205 has a length, but no body (RFC 9110 section 15.3.6).
    let mut reset = server.connect();
    reset.send_request("GET", "/status?205+Reset+Content", &[], b"");
    let response = reset.read_response("GET");
    assert_eq!((response.status, response.header("content-length")), (205, Some("0")));
    reset.send_request("GET", "/hello", &[], b"");
    assert_eq!(reset.read_response("GET").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn a_client_that_closes_its_half_has_left() {
    let server = Server::start("behaviours", &[]);
    let mut half = std::net::TcpStream::connect(server.address()).unwrap();
    half.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    half.write_all(b"GET /stream-for-ever HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    half.read_exact(&mut [0; 12]).unwrap();
    half.shutdown(std::net::Shutdown::Write).unwrap();
    // The app's iterator is closed, as for any client that leaves.
    server.wait_for_log(&["closed pieces"]);
    let mut answer = Vec::new();
    // A reset is an end, too.
    let _ = half.read_to_end(&mut answer);
    assert!(!answer.ends_with(b"0\r\n\r\n"), "an endless body ends");
    server.finish();
}

#[test]
fn a_body_that_comes_too_slowly_is_a_408() {
    let server = Server::start("behaviours", &["--min-rate", "1MiB", "--client-timeout", "60s"]);
    let start = std::time::Instant::now();
    let mut slow = server.connect();
    slow.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n");
    // A byte now and then is not silence, and yet not enough.
    while slow.try_send(b"x").is_ok() && !slow.has_answer(Duration::from_millis(200)) {}
    let response = slow.read_response("POST");
    assert_eq!((response.status, response.header("connection")), (408, Some("close")));
    assert!(start.elapsed() < Duration::from_secs(50), "the rate is not looked at");
    server.finish();
}

#[test]
fn static_files_are_served_without_the_app() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("public");
    std::fs::create_dir_all(root.join("css")).unwrap();
    std::fs::create_dir_all(root.join(".git")).unwrap();
    std::fs::write(directory.path().join("secret"), "secret").unwrap();
    std::fs::write(root.join("css/a b.css"), "body {}").unwrap();
    std::fs::write(root.join("css/a b.css.gz"), "not really gzip").unwrap();
    std::fs::write(root.join(".env"), "SECRET=1").unwrap();
    std::fs::write(root.join(".git/config"), "secret").unwrap();
    let large: Vec<u8> = (0..3_000_000u32).map(|index| ((index * 7) >> 5) as u8).collect();
    std::fs::write(root.join("large.bin"), &large).unwrap();
    std::os::unix::fs::symlink("../secret", root.join("link")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("absolute")).unwrap();
    let option = format!("/static/={}", root.display());
    let server = Server::start("behaviours", &["--static", &option]);

    let found = server.get("/static/css/a%20b.css");
    assert_eq!(found.header("content-type"), Some("text/css; charset=utf-8"));
    assert_eq!(found.header("x-content-type-options"), Some("nosniff"));
    let tag = found.header("etag").unwrap().to_owned();
    let date = found.header("last-modified").unwrap().to_owned();
    assert_eq!(found.ok(), "body {}");
    let ask = |path: &str, headers: &[(&str, &str)]| server.request("GET", path, headers, b"");
    let css = "/static/css/a%20b.css";
    assert_eq!(ask(css, &[("If-None-Match", &tag)]).status, 304);
    assert_eq!(ask(css, &[("If-None-Match", "\"other\"")]).status, 200);
    assert_eq!(ask(css, &[("If-None-Match", "\"other\""), ("If-None-Match", &tag)]).status, 304);
    assert_eq!(ask(css, &[("If-Match", "\"other\""), ("If-Match", &tag)]).status, 200);
    assert_eq!(ask(css, &[("If-Modified-Since", &date)]).status, 304);
    assert_eq!(ask(css, &[("If-None-Match", "\"other\""), ("If-Modified-Since", &date)]).status, 200);
    assert_eq!(ask(css, &[("If-Match", "\"other\"")]).status, 412);
    let packed = ask(css, &[("Accept-Encoding", "gzip, br")]);
    assert_eq!(packed.header("content-encoding"), Some("gzip"));
    assert_ne!(packed.header("etag"), Some(&*tag));
    assert_eq!(packed.ok(), "not really gzip");
    assert_eq!(ask(css, &[("Accept-Encoding", "gzip;q=0")]).ok(), "body {}");
    std::fs::write(root.join("css/a b.css.br"), "not really brotli").unwrap();
    let packed = ask(css, &[("Accept-Encoding", "gzip, br")]);
    assert_eq!(packed.header("content-encoding"), Some("br"));
    assert_eq!(packed.header("content-type"), Some("text/css; charset=utf-8"));
    assert_eq!(packed.ok(), "not really brotli");
    // One that is older than its source was made of another.
    let old = std::fs::File::options().write(true).open(root.join("css/a b.css.br")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(ask(css, &[("Accept-Encoding", "br")]).ok(), "body {}");

    let whole = server.get("/static/large.bin");
    assert!(whole.body == large && !whole.cut);
    let part = ask("/static/large.bin", &[("Range", "bytes=1000000-1999999")]);
    assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 1000000-1999999/3000000")));
    assert!(part.body == large[1_000_000..2_000_000]);
    let beyond = ask("/static/large.bin", &[("Range", "bytes=3000000-")]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */3000000")));
    let stale = ask("/static/large.bin", &[("Range", "bytes=0-9"), ("If-Range", "\"other\"")]);
    assert_eq!(stale.status, 200);
    let head = server.request("HEAD", "/static/large.bin", &[], b"");
    assert_eq!((head.status, head.header("content-length")), (200, Some("3000000")));
    let post = server.post("/static/large.bin", &[], b"x");
    assert_eq!((post.status, post.header("allow")), (405, Some("GET, HEAD")));

    for path in [
        "/static/none",
        "/static/",
        "/static/css",
        "/static/css/",
        "/static/.env",
        "/static/.git/config",
        "/static/../secret",
        "/static/%2e%2e/secret",
        "/static/..%2fsecret",
        "/static//etc/passwd",
        "/static/css/../large.bin",
        "/static/link",
        "/static/absolute",
        "/static/large.bin%00.css",
    ] {
        let response = server.get(path);
        assert_eq!(response.status, 404, "{path}");
        assert!(response.text().starts_with("404 Not Found\nrequest "), "{path}: {}", response.text());
    }
    assert_eq!(server.get("/staticfile").text(), "no such route");
    assert_eq!(server.get("/static").text(), "no such route");
    server.finish();

    // The innermost mount counts, and a 304 names what was sent.
    let inner = directory.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(inner.join("text.txt"), "text ".repeat(100)).unwrap();
    let inner = format!("/static/css={}", inner.display());
    let server = Server::start("behaviours", &["--compress", "--static", &option, "--static", &inner]);
    let coding = ("Accept-Encoding", "gzip");
    let ask = |headers: &[(&str, &str)]| server.request("GET", "/static/css/text.txt", headers, b"");
    let packed = ask(&[coding]);
    assert_eq!((packed.status, packed.header("content-encoding")), (200, Some("gzip")));
    let tag = packed.header("etag").unwrap();
    assert!(tag.starts_with("W/"), "{tag}");
    let known = ask(&[coding, ("If-None-Match", tag)]);
    assert_eq!((known.status, known.header("etag")), (304, Some(tag)));
    server.finish();
}

#[test]
fn an_app_brings_static_files_that_are_served_without_it() {
    let numbers = std::fs::read(crate::harness::guest_sources("flask").join("static/numbers.txt")).unwrap();
    let server = Server::start("flask", &[]);
    let found = server.get("/assets/numbers.txt");
    assert_eq!(found.header("content-type"), Some("text/plain; charset=utf-8"));
    // What a build packs has no time.
    assert_eq!(found.header("last-modified"), None);
    let tag = found.header("etag").unwrap().to_owned();
    assert!(found.body == numbers && !found.cut);
    let ask = |headers: &[(&str, &str)]| server.request("GET", "/assets/numbers.txt", headers, b"");
    assert_eq!(ask(&[("If-None-Match", &tag)]).status, 304);
    let since = "Fri, 31 Dec 2100 23:59:59 GMT";
    assert_eq!(ask(&[("If-Modified-Since", since)]).status, 200);
    let part = ask(&[("Range", "bytes=100-199"), ("If-Range", &tag)]);
    assert_eq!((part.status, &part.body[..]), (206, &numbers[100..200]));
    assert_ne!(server.get("/pages/base.html").header("etag").unwrap(), tag);
    for path in
        ["/assets/none", "/assets/", "/assets/../app.py", "/assets/%2e%2e/app.py", "/assets/..%2fapp.py"]
    {
        let response = server.get(path);
        assert_eq!(response.status, 404, "{path}");
        assert!(response.text().starts_with("404 Not Found\nrequest "), "{path}: {}", response.text());
    }
    server.finish();
    let described = run(wsgi_wasm().arg("inspect").arg(guest("flask"))).success().stdout;
    assert!(described.contains("static       /assets from static\n"), "{described}");
}

#[test]
fn responses_are_compressed_where_they_may_be() {
    let server = Server::start("behaviours", &["--compress"]);
    let mut connection = server.connect();
    let ask = |path: &str, coding: &str| server.request("GET", path, &[("Accept-Encoding", coding)], b"");
    let plain = ask("/show-environ", "identity");
    assert_eq!((plain.header("content-encoding"), plain.header("vary")), (None, Some("accept-encoding")));
    let packed = ask("/show-environ", "gzip");
    assert_eq!((packed.header("content-encoding"), packed.header("content-length")), (Some("gzip"), None));
    let mut text = String::new();
    flate2::read::GzDecoder::new(&*packed.body).read_to_string(&mut text).unwrap();
    assert!(text.contains("\"PATH_INFO\": \"/show-environ\""), "{text}");
    let packed = ask("/show-environ", "gzip, br");
    assert_eq!(packed.header("content-encoding"), Some("br"));
    let mut text = String::new();
    brotli::Decompressor::new(&*packed.body, 4096).read_to_string(&mut text).unwrap();
    assert!(text.contains("\"PATH_INFO\": \"/show-environ\""), "{text}");
    // Too short, and no text.
    for path in ["/hello", "/large?1"] {
        assert_eq!(ask(path, "gzip").header("content-encoding"), None, "{path}");
    }
    // Each piece can be read when it was sent, though the app has not ended.
    connection.send_request("GET", "/stream-for-ever", &[("Accept-Encoding", "gzip")], b"");
    assert_eq!(connection.read_head().header("content-encoding"), Some("gzip"));
    let mut decoder = flate2::write::GzDecoder::new(Vec::new());
    while !decoder.get_ref().ends_with(b"piece 3\n") {
        let chunk = connection.read_chunk().unwrap();
        decoder.write_all(&chunk).unwrap();
        decoder.flush().unwrap();
    }
    drop(connection);
    // What breaks off does so compressed, too.
    let broken = ask("/stream-then-fail", "br");
    assert!(broken.cut);
    server.finish();
}

#[test]
fn a_head_that_trickles_in_is_a_408() {
    let server = Server::start("behaviours", &["--header-timeout", "400ms"]);
    let mut slow = server.connect();
    // Each byte comes in time; the head as a whole does not.
    while slow.try_send(b"G").is_ok() && !slow.has_answer(Duration::from_millis(20)) {}
    assert_eq!(slow.read_response("GET").status, 408);
    server.finish();
}

/// On the command line and in a configuration file the same values are refused,
/// in the same words.
#[test]
fn values_that_can_not_work_are_refused_with_their_bound() {
    let app = guest("behaviours");
    let app = app.to_str().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("wsgi-wasm.toml");
    let table: &[(&str, &str, &str, &str)] = &[
        ("--memory", "limits.memory", "0", "`0B` is too little: the least is 1MiB"),
        ("--memory", "limits.memory", "1023KiB", "`1023KiB` is too little: the least is 1MiB"),
        ("--memory", "limits.memory", "5GiB", "`5GiB` is too much: the most is 4GiB"),
        ("--memory", "limits.memory", "99999999999TiB", "`99999999999TiB` is too large"),
        ("--total-memory", "limits.total_memory", "0", "`0B` is too little: the least is 1MiB"),
        ("--timeout", "limits.timeout", "0s", "`0s` is too little: the least is 1ms"),
        ("--timeout", "limits.timeout", "40000d", "`40000d` is too long"),
        ("--cpu", "limits.cpu", "0ms", "`0s` is too little: the least is 1ms"),
        ("--response-time", "limits.response_time", "0h", "`0s` is too little: the least is 1ms"),
        ("--instances", "instances.max", "0", "`0` is too little: the least is 1"),
        ("--instances", "instances.max", "4097", "`4097` is too much: the most is 4096"),
        ("--max-requests", "instances.requests", "0", "`0` is too little: the least is 1"),
        ("--data-quota", "data.quota", "-1", "`-1` is not a size"),
        ("--tmp", "limits.tmp", "much", "`much` is not a size"),
        ("--queue-wait", "limits.queue_wait", "5", "`5` is not a time"),
        ("--client-timeout", "", "0s", "`0s` is too little: the least is 1ms"),
        ("--header-timeout", "", "0s", "`0s` is too little: the least is 1ms"),
        ("--max-headers", "", "0", "`0` is too little: the least is 1"),
        ("--max-headers", "", "10001", "`10001` is too much: the most is 10000"),
        ("--max-connections", "", "0", "`0` is too little: the least is 1"),
        ("--http2-resets", "", "0", "`0` is too little: the least is 1"),
        ("--forwarded-hops", "", "0", "`0` is too little: the least is 1"),
        ("--keep-alive-requests", "", "0", "`0` is too little: the least is 1"),
    ];
    for (option, key, value, problem) in table {
        let argument = format!("{option}={value}");
        run(wsgi_wasm().args(["serve", app, &argument])).refused(&[option, problem]);
        if ["--memory", "--timeout", "--tmp", "--data-quota"].contains(option) {
            let arguments = ["exec", app, &argument, "--", "python", "-c", "1"];
            run(wsgi_wasm().args(arguments)).refused(&[option, problem]);
        }
        let Some((table, name)) = key.rsplit_once('.') else { continue };
        let number = if table == "instances" { (*value).to_owned() } else { format!("\"{value}\"") };
        let path = if table == "data" { "path = \".\"\n" } else { "" };
        let tenant =
            format!("[[tenant]]\nname = \"a\"\napp = \"{app}\"\n[tenant.{table}]\n{path}{name} = {number}\n");
        std::fs::write(&file, &tenant).unwrap();
        run(wsgi_wasm().arg("check").arg(&file)).refused(&["wsgi-wasm.toml:", problem]);
        if table != "data" {
            let defaults = format!("[defaults.{table}]\n{name} = {number}\n");
            std::fs::write(&file, format!("{defaults}[[tenant]]\nname = \"a\"\napp = \"{app}\"\n")).unwrap();
            run(wsgi_wasm().arg("check").arg(&file)).refused(&["wsgi-wasm.toml:2: ", problem]);
        }
    }
}

#[test]
fn bad_options_of_the_front_are_refused_before_anything_listens() {
    let app = guest("behaviours");
    let app = app.to_str().unwrap();
    let serve = |arguments: &[&str]| run(wsgi_wasm().arg("serve").arg(app).args(arguments));
    serve(&["--trusted-proxy", "10.0.0.0/99"]).refused(&["10.0.0.0/99", "help:"]);
    serve(&["--static", "nothing"]).refused(&["nothing", "--static /static=public", "help:"]);
    serve(&["--static", "/x=/no/such/directory"]).refused(&["/no/such/directory", "No such file", "help:"]);
    serve(&["--tls-cert", "a.pem"]).refused(&["1 certificates and 0 keys", "--tls-key", "help:"]);
    serve(&["--tls-cert", "/none.pem", "--tls-key", "/none.key"]).refused(&["/none.pem", "help:"]);
    serve(&["--tls-client-ca", "a.pem"]).refused(&["--tls-cert"]);
    serve(&["--access-log", "json", "--access-log-file", "/no/such/dir/log"])
        .refused(&["/no/such/dir/log", "help:"]);
    serve(&["--access-log", "xml"]).refused(&["--access-log"]);
    let help = run(wsgi_wasm().args(["serve", "--help"])).success().stdout;
    for limit in [
        "--max-header-size",
        "--max-headers",
        "--max-uri",
        "--header-timeout",
        "--min-rate",
        "--client-timeout",
        "--keep-alive",
        "--keep-alive-requests",
        "--max-connections",
        "--max-connections-per-client",
        "--http2-streams",
        "--http2-resets",
    ] {
        let start = help.find(&format!("{limit} <")).unwrap_or_else(|| panic!("no {limit} in the help"));
        let rest = &help[start..];
        let end = rest[2..].find("\n      --").map_or(rest.len(), |end| end + 2);
        assert!(rest[..end].contains("[default: "), "{limit} states no default");
    }
}
