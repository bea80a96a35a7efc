use std::io::Read as _;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Connection, Server};

/// The variables that an app sees for the request `head` and `body`.
#[track_caller]
fn environ(server: &Server, head: &str, body: &str) -> Value {
    let mut connection = server.connect();
    connection.send(format!("{head}\r\n\r\n{body}"));
    serde_json::from_str(&connection.read_response("GET").ok()).unwrap()
}

#[test]
fn a_body_of_one_chunk_gets_its_length() {
    let server = Server::start("behaviours", &[]);
    let response = server.get("/single");
    assert_eq!(response.header("content-length"), Some("12"));
    assert_eq!(response.ok(), "the only one");
    server.finish();
}

#[test]
fn each_variable_has_its_rule() {
    let server = Server::start("behaviours", &[]);
    let seen = environ(
        &server,
        "POST /show-environ HTTP/1.1\r\nHost: a.example:81\r\nContent-Type: text/x; y=z\r\nContent-Length: 3",
        "abc",
    );
    for (name, value) in [
        ("REQUEST_METHOD", "POST"),
        ("SERVER_PROTOCOL", "HTTP/1.1"),
        ("CONTENT_TYPE", "text/x; y=z"),
        ("CONTENT_LENGTH", "3"),
        ("HTTP_HOST", "a.example:81"),
        ("QUERY_STRING", ""),
        ("SCRIPT_NAME", ""),
        ("GATEWAY_INTERFACE", "CGI/1.1"),
    ] {
        assert_eq!(seen[name], value, "{name}");
    }
    assert_eq!(seen["SERVER_NAME"], "127.0.0.1", "the client's Host does not name the server");
    assert!(seen["SERVER_SOFTWARE"].as_str().unwrap().starts_with("wsgi-wasm/"));
    assert!(seen["REMOTE_PORT"].as_str().unwrap().parse::<u16>().is_ok());
    for name in ["HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING"] {
        assert!(seen.get(name).is_none(), "{name}");
    }
    // An old client, without a Host and with the absolute form.
    let seen = environ(&server, "GET http://b.example/show-environ?q HTTP/1.0", "");
    for (name, value) in [
        ("SERVER_PROTOCOL", "HTTP/1.0"),
        ("HTTP_HOST", "b.example"),
        ("PATH_INFO", "/show-environ"),
        ("REQUEST_URI", "/show-environ?q"),
        ("QUERY_STRING", "q"),
    ] {
        assert_eq!(seen[name], value, "{name}");
    }
    let seen = environ(&server, "GET /show-environ HTTP/1.0", "");
    assert!(seen.get("HTTP_HOST").is_none());
    // A chunked body has no length, and the app is told that it has an end.
    let seen = environ(
        &server,
        "PUT /show-environ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked",
        "3\r\nabc\r\n0\r\n\r\n",
    );
    assert!(seen.get("CONTENT_LENGTH").is_none());
    assert_eq!(seen["HTTP_TRANSFER_ENCODING"], "chunked");
    assert_eq!(seen["wsgi.input_terminated"], true);
    // The query is not touched, not even what is no valid encoding.
    let seen = environ(&server, "GET /show-environ?a=%zz&b=%C3%A9;+?/? HTTP/1.1\r\nHost: x", "");
    assert_eq!(seen["QUERY_STRING"], "a=%zz&b=%C3%A9;+?/?");
    // Requests with the same headers as one before, and with others.
    for number in 0..3 {
        let seen = environ(
            &server,
            &format!(
                "GET /show-environ?{number} HTTP/1.1\r\nHost: x\r\nX-{number}: {number}\r\nX-Same: {number}"
            ),
            "",
        );
        assert_eq!(seen["QUERY_STRING"], number.to_string());
        assert_eq!(seen[format!("HTTP_X_{number}")], number.to_string());
        assert_eq!(seen["HTTP_X_SAME"], number.to_string());
    }
    server.finish();
}

#[test]
fn the_input_has_all_methods_and_ends_with_the_body() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    // With the call, from the client while the app runs, and chunked.
    let filling = "x".repeat(100_000);
    for (calls, result) in [
        ("read", "[b'one\\ntwo\\n\\nthree']"),
        ("read:-1,read", "[b'one\\ntwo\\n\\nthree', b'']"),
        ("read:0,read:5,read:100,read:1", "[b'', b'one\\nt', b'wo\\n\\nthree', b'']"),
        ("readline,readline:2,readline:0,readline:-1", "[b'one\\n', b'tw', b'', b'o\\n']"),
        ("readline,readline,readline,readline,readline", "[b'one\\n', b'two\\n', b'\\n', b'three', b'']"),
        ("readlines,readlines", "[[b'one\\n', b'two\\n', b'\\n', b'three'], []]"),
        ("readlines:5,read", "[[b'one\\n', b'two\\n'], b'\\nthree']"),
        ("list,list", "[[b'one\\n', b'two\\n', b'\\n', b'three'], []]"),
        ("next,list", "[b'one\\n', [b'two\\n', b'\\n', b'three']]"),
        ("readinto:4,readinto:100", "[b'one\\n', b'two\\n\\nthree']"),
        ("read1:100", "[b'one\\ntwo\\n\\nthree']"),
    ] {
        let text = "one\ntwo\n\nthree";
        let path = format!("/use-input?{calls}");
        let mut connection = server.connect();
        connection.send_request("POST", &path, &[], text.as_bytes());
        assert_eq!(connection.read_response("POST").ok(), result, "{calls}");
        connection.send(format!("POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"));
        connection.send(format!("{:x}\r\n{text}\r\n0\r\n\r\n", text.len()));
        assert_eq!(connection.read_response("POST").ok(), result, "{calls}, chunked");
        // More than what goes with the call; the filling is read first.
        let path = format!("/use-input?read:100000,{calls}");
        connection.send_request("POST", &path, &[], format!("{filling}{text}").as_bytes());
        let read = connection.read_response("POST").ok();
        assert_eq!(read, format!("[b'{filling}', {}", &result[1..]), "{calls}, long");
        // The connection's next request was not touched.
        connection.send_request("POST", "/echo", &[], b"next");
        assert_eq!(connection.read_response("POST").ok(), "next");
    }
    server.finish();
}

#[test]
fn a_body_that_breaks_off_is_an_exception() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    for how in ["lines", "pieces", "whole"] {
        for head in ["Content-Length: 200000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n1000\r\n"] {
            let mut connection = server.connect();
            connection.send(format!("POST /read-and-tell?{how} HTTP/1.1\r\nHost: x\r\n{head}"));
            connection.send("the beginning\n");
            drop(connection);
            server.wait_for_log(&["reading failed with BodyAborted"]);
            assert_eq!(server.post(&format!("/read-and-tell?{how}"), &[], b"a\nb").ok(), "3");
        }
    }
    let log = server.finish();
    assert_eq!(log.matches("reading failed with BodyAborted").count(), 6);
    assert_eq!(log.matches("read a body of").count(), 6, "{log}");
}

#[test]
fn start_response_takes_nothing_that_is_wrong() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    for (case, logged) in [
        ("status-int", "TypeError: the status must be a str, not int"),
        ("status-bytes", "TypeError: the status must be a str, not bytes"),
        ("status-alone", "ValueError: the status must be like '200 OK', not '200'"),
        ("status-no-reason", "ValueError: the status must be like '200 OK', not '200 '"),
        ("status-words", "ValueError: the status must be like '200 OK', not 'OK 200'"),
        ("status-newline", "ValueError: the status must be like '200 OK', not '200 OK\\r\\nX: y'"),
        ("headers-tuple", "TypeError: the headers must be a list, not tuple"),
        ("headers-dict", "TypeError: the headers must be a list, not dict"),
        ("header-list", "TypeError: a header must be a tuple (name, value), not ['X', 'y']"),
        ("header-triple", "TypeError: a header must be a tuple (name, value), not ('X', 'y', 'z')"),
        ("name-bytes", "TypeError: the name and the value of a header must be str: (b'X', 'y')"),
        ("name-blank", "ValueError: not a header name: 'X Y'"),
        ("name-colon", "ValueError: not a header name: 'X:'"),
        ("name-newline", "ValueError: not a header name: 'X\\r\\nY'"),
        ("name-empty", "ValueError: not a header name: ''"),
        ("value-int", "TypeError: the name and the value of a header must be str: ('X', 1)"),
        ("value-bytes", "TypeError: the name and the value of a header must be str: ('X', b'y')"),
        ("value-none", "TypeError: the name and the value of a header must be str: ('X', None)"),
        ("value-cr", "ValueError: the value of header X contains '\\r'"),
        ("value-lf", "ValueError: the value of header X contains '\\n'"),
        ("value-nul", "ValueError: the value of header X contains '\\x00'"),
        ("value-not-latin", "ValueError: the value of header X contains '\u{20ac}'"),
        ("length-twice", "ValueError: the headers contain Content-Length twice"),
        ("length-word", "ValueError: Content-Length must be a number, not 'ten'"),
        ("hop-connection", "ValueError: header Connection is the server's business"),
        ("hop-keep-alive", "ValueError: header Keep-Alive is the server's business"),
        ("hop-te", "ValueError: header TE is the server's business"),
        ("hop-trailer", "ValueError: header Trailer is the server's business"),
        ("hop-upgrade", "ValueError: header Upgrade is the server's business"),
        ("hop-proxy", "ValueError: header Proxy-Authenticate is the server's business"),
    ] {
        let response = server.get(&format!("/wrong-start?{case}"));
        assert_eq!(response.status, 500, "{case}: {}", response.text());
        assert!(!response.text().contains("never"), "{case}");
        server.wait_for_log(&[logged]);
    }
    let log = server.finish();
    // Each traceback leads to the app's own call.
    assert_eq!(log.matches("start_response(status, headers)").count(), 30, "{log}");
}

#[test]
fn start_response_is_called_once_or_with_exc_info() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    assert_eq!(server.get("/start-twice").status, 500);
    server.wait_for_log(&["RuntimeError: start_response was called a second time without exc_info"]);

    let replaced = server.get("/replace-head");
    assert_eq!((replaced.status, &*replaced.reason), (503, "Not Now"));
    assert_eq!((replaced.header("x-first"), replaced.header("x-second")), (None, Some("2")));
    assert_eq!(replaced.text(), "replaced");

    let sent = server.get("/replace-sent-head");
    assert_eq!((sent.status, sent.header("x-first")), (200, Some("1")));
    assert_eq!(sent.body, b"sent");
    assert!(sent.cut, "a body that fails does not end");
    server.wait_for_log(&["KeyError: 'found out too late'"]);

    let late = server.get("/late-start");
    assert_eq!((late.status, late.header("x-late")), (202, Some("1")));
    assert_eq!(late.text(), "late");

    // An interim status is not a response.
    assert_eq!(server.get("/status?100+Continue").status, 500);
    assert_eq!(server.get("/status?101+Switching+Protocols").status, 500);
    server.finish();
}

#[test]
fn what_write_takes_is_sent_before_it_returns() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    connection.send_request("GET", "/write-slowly", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    for index in 0..5 {
        assert_eq!(connection.read_chunk().unwrap(), format!("written {index}\n").into_bytes());
    }
    // It has its time again with each piece.
    drop(connection);
    server.finish();
}

#[test]
fn a_body_has_the_length_that_was_announced() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    let mut connection = server.connect();
    for (path, body) in [("/stream-too-much", "0123456789"), ("/whole-too-much", "four")] {
        connection.send_request("GET", path, &[], b"");
        assert_eq!(connection.read_response("GET").ok(), body);
        server.wait_for_log(&[path, "longer than its Content-Length"]);
    }
    // Known before anything was sent, so there can be a proper answer.
    assert_eq!(server.get("/whole-too-little").status, 500);
    server.wait_for_log(&["the body has 14 bytes, but Content-Length is 40"]);
    // Bodies that must not be there would be taken for the next response.
    for (method, path) in [
        ("GET", "/close-how?no-content"),
        ("GET", "/status?204+No+Content"),
        ("GET", "/status?205+Reset+Content"),
        ("GET", "/status?304+Not+Modified"),
        ("HEAD", "/close-how?head"),
        ("HEAD", "/stream-exact"),
        ("HEAD", "/large?1"),
        ("HEAD", "/send-file?/0/late.py"),
    ] {
        connection.send_request(method, path, &[], b"");
        assert!(connection.read_response(method).status < 400, "{path}");
        connection.send_request("GET", "/hello", &[], b"");
        assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n", "after {method} {path}");
    }
    server.finish();
}

#[test]
fn close_is_called_once_in_all_cases() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    for (method, how, status) in [
        ("GET", "whole", 200),
        ("GET", "fail", 200),
        ("GET", "text", 200),
        ("GET", "no-start", 500),
        ("GET", "no-content", 204),
        ("GET", "fail-in-close", 200),
        ("HEAD", "head", 200),
    ] {
        let mut connection = server.connect();
        connection.send_request(method, &format!("/close-how?{how}"), &[], b"");
        let response = connection.read_response(method);
        assert_eq!(response.status, status, "{how}");
        assert_eq!(response.cut, matches!(how, "fail" | "text"), "{how}");
        assert_eq!(server.get("/close-count").ok(), how);
    }
    server.wait_for_log(&["close() failed"]);
    // The client leaves before, while and after the body comes.
    let mut connection = server.connect();
    connection.send_request("GET", "/stream-for-ever", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    drop(connection);
    assert_eq!(server.get("/close-count").ok(), "pieces");
    server.finish();
}

#[test]
fn headers_keep_their_order() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    connection.send("GET /ordered-headers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let mut bytes = Vec::new();
    connection.reader().read_to_end(&mut bytes).unwrap();
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let lines: Vec<_> = head.split("\r\n").collect();
    assert_eq!(
        lines[..11],
        [
            "HTTP/1.1 200 OK",
            "X-Zebra: 0",
            "Etag: 1",
            "Content-Type: 2",
            "X-Lower: 3",
            "X-Apple: 4",
            "Set-Cookie: 5",
            "Set-Cookie: 6",
            "Www-Authenticate: 7",
            "X-Latin: caf\u{e9}",
            "X-Blank: ",
        ]
    );
    // Ours come last.
    assert!(lines[11..].iter().all(|line| {
        ["Content-Length: ", "Date: ", "Connection: "].iter().any(|name| line.starts_with(name))
    }));
    assert_eq!(body, "ordered");
    server.finish();
}

#[test]
fn files_are_sent_by_the_host() {
    let data = tempfile::tempdir().unwrap();
    let content: Vec<u8> =
        (0..300_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(data.path().join("file"), &content).unwrap();
    std::fs::write(data.path().join("small"), b"small").unwrap();
    std::fs::write(data.path().join("empty"), b"").unwrap();
    let secret = tempfile::tempdir().unwrap();
    std::fs::write(secret.path().join("secret"), vec![b's'; 300_000]).unwrap();
    std::os::unix::fs::symlink(secret.path().join("secret"), data.path().join("out")).unwrap();
    std::os::unix::fs::symlink("file", data.path().join("in")).unwrap();
    let server = Server::start("behaviours", &["--instances", "1", "--data", data.path().to_str().unwrap()]);
    let mut connection = server.connect();
    let mut get = |query: &str| {
        connection.send_request("GET", &format!("/send-file?{query}"), &[], b"");
        let response = connection.read_response("GET");
        assert!(!response.cut, "{query}");
        response
    };
    for (query, range) in [
        ("/data/file", 0..300_000),
        ("/data/in", 0..300_000),
        ("/data/file;1", 1..300_000),
        ("/data/file;100000", 100_000..300_000),
        ("/data/file;299999", 299_999..300_000),
        ("/data/file;300000", 300_000..300_000),
        ("/data/file;400000", 300_000..300_000),
        ("/data/file;5;250000", 5..250_005),
        ("/data/file;5;10", 5..15),
        ("/data/file;;300000", 0..300_000),
        ("/data/file;;0", 0..0),
        ("/data/../data/file", 0..0),
    ] {
        let response = get(query);
        if query.contains("..") {
            assert_eq!(response.status, 500, "{query}");
            continue;
        }
        assert_eq!(response.status, 200, "{query}");
        assert_eq!(response.header("content-length"), Some(&*range.len().to_string()), "{query}");
        assert!(response.body == content[range], "{query}");
    }
    assert_eq!(get("/data/small").text(), "small");
    assert_eq!(get("/data/empty").text(), "");
    assert_eq!(get("/data/out").status, 500, "a link that leads out of the directory");
    assert_eq!(get("/data/file;0;300001").status, 500, "too short for its Content-Length");
    // From a layer of the app and, by its relative name, from its directory.
    let source = std::fs::read(crate::harness::guest_sources("behaviours").join("app.py")).unwrap();
    for path in ["/0/app.py", "app.py", "./app.py"] {
        assert!(get(path).body == source, "{path}");
    }
    // The host has the file open: its removal changes nothing.
    let rest = format!("{:01023}\n", 7).repeat(299);
    assert_eq!(server.get("/send-temporary?").ok(), rest);
    assert_eq!(server.get("/send-temporary?unlinked").ok(), rest);
    // What looks like a file is read by Python.
    assert_eq!(server.get("/send-file-like?gzip").ok(), "unpacked ".repeat(100_000));
    assert_eq!(server.get("/send-file-like?memory").ok(), "in memory ".repeat(100_000));
    server.finish();
}

#[test]
fn a_slow_download_holds_no_instance() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start("behaviours", &["--instances", "1", "--data", data.path().to_str().unwrap()]);
    let mut slow = server.connect();
    slow.send_request("GET", "/big-file?64;wrapped", &[], b"");
    let head = slow.read_head();
    assert_eq!(head.header("content-length"), Some("67108864"));
    // The app has done its part, `close` included.
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    let mut body = vec![0; 64 << 20];
    slow.reader().read_exact(&mut body).unwrap();
    assert!(body.iter().enumerate().all(|(index, byte)| *byte == index as u8));
    let pieces = server.get("/big-file?2;pieces");
    assert_eq!(pieces.body.len(), 2 << 20);
    server.finish();
}

/// Reads an interim response.
#[track_caller]
fn read_hints(connection: &mut Connection) -> Vec<String> {
    let interim = connection.read_head();
    assert_eq!((interim.status, &*interim.reason), (103, "Early Hints"));
    assert!(interim.headers.iter().all(|(name, _)| name == "link"), "{interim:?}");
    interim.headers.into_iter().map(|(_, value)| value).collect()
}

#[test]
fn early_hints_come_before_the_response() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    let mut connection = server.connect();
    // Also in a pipeline, where they follow an earlier response.
    for _ in 0..2 {
        connection.send_request("GET", "/large-whole?100000", &[], b"");
        connection.send_request("GET", "/early-hints", &[], b"");
        connection.send_request("GET", "/hello", &[], b"");
    }
    for _ in 0..2 {
        assert_eq!(connection.read_response("GET").ok().len(), 100_000);
        assert_eq!(read_hints(&mut connection), ["</style.css>; rel=preload; as=style"]);
        assert_eq!(read_hints(&mut connection), ["</a.js>; rel=preload", "</b.js>; rel=preload"]);
        assert_eq!(connection.read_response("GET").ok(), "hinted");
        assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n");
    }
    // A client of HTTP/1.0 would take them for the response.
    let mut old = server.connect();
    old.send("GET /early-hints HTTP/1.0\r\n\r\n");
    assert_eq!(old.read_response("GET").ok(), "not possible");
    let late = server.get("/late-early-hints");
    assert!(late.cut);
    server.wait_for_log(&["RuntimeError: early hints must be sent before the response"]);
    server.finish();
}

/// Such a request goes on in the background, where it must still wake the task of
/// its connection.
#[test]
fn each_step_of_a_request_that_computes_for_long_reaches_its_client() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    let expect = [("Content-Length", "3"), ("Expect", "100-continue")];
    for _ in 0..5 {
        connection.send_request("POST", "/stream-slowly", &expect, b"");
        assert_eq!(read_hints(&mut connection), ["</a.js>"]);
        assert_eq!(connection.read_head().status, 100);
        connection.send("abc");
        assert_eq!(connection.read_head().status, 200);
        for piece in ["a", "b", "c", ""] {
            assert_eq!(connection.read_chunk().unwrap(), piece.as_bytes());
        }
    }
    server.finish();
}

/// How long downloads take, by the host and through Python. A figure, not a test.
#[test]
#[ignore = "measures"]
fn downloads_are_measured() {
    let data = tempfile::tempdir().unwrap();
    let data = ["--timeout", "60s", "--data", data.path().to_str().unwrap()];
    let server = Server::start("behaviours", &data);
    server.get("/big-file?100;wrapped");
    let mut body = vec![0; 100 << 20];
    for how in ["wrapped", "pieces"] {
        let mut best = Duration::MAX;
        for _ in 0..5 {
            let mut connection = server.connect();
            let start = Instant::now();
            connection.send_request("GET", &format!("/big-file?100;{how}"), &[], b"");
            let head = connection.read_head();
            if head.header("content-length").is_some() {
                connection.reader().read_exact(&mut body).unwrap();
            } else {
                while connection.read_chunk().is_some_and(|chunk| !chunk.is_empty()) {}
            }
            best = best.min(start.elapsed());
        }
        eprintln!("100 MiB {how}: {best:?}");
    }
    server.finish();
}
