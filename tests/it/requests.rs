use crate::harness::Server;

#[test]
fn the_environ_follows_pep_3333() {
    let server = Server::start("behaviours", &["--env", "MODE=test"]);
    let address = server.address();
    let text = server
        .request(
            "GET",
            "/show-environ?a=%20b&c",
            &[
                ("X-Custom", "one"),
                ("X-Custom", "two"),
                ("Cookie", "a=1"),
                ("Cookie", "b=2"),
                ("X_Forged", "evil"),
                ("Proxy", "http://evil"),
                ("X-Latin", "caf\u{e9}"),
            ],
            b"",
        )
        .ok();
    let environ: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, value) in [
        ("REQUEST_METHOD", "GET"),
        ("SCRIPT_NAME", ""),
        ("PATH_INFO", "/show-environ"),
        ("QUERY_STRING", "a=%20b&c"),
        ("REQUEST_URI", "/show-environ?a=%20b&c"),
        ("SERVER_NAME", "127.0.0.1"),
        ("SERVER_PROTOCOL", "HTTP/1.1"),
        ("REMOTE_ADDR", "127.0.0.1"),
        ("HTTP_HOST", "test.example"),
        ("HTTP_X_CUSTOM", "one,two"),
        ("HTTP_COOKIE", "a=1; b=2"),
        // Sent as UTF-8, so two bytes, each of which is one latin-1 character.
        ("HTTP_X_LATIN", "caf\u{c3}\u{a9}"),
        ("wsgi.url_scheme", "http"),
    ] {
        assert_eq!(environ[name], value, "{name}");
    }
    assert_eq!(environ["SERVER_PORT"], address.port().to_string());
    assert_eq!(environ["wsgi.version"], serde_json::json!([1, 0]));
    assert_eq!(environ["wsgi.multithread"], false);
    assert_eq!(environ["wsgi.multiprocess"], true);
    assert_eq!(environ["wsgi.run_once"], false);
    assert_eq!(environ["wsgi.input_terminated"], true);
    for name in ["CONTENT_TYPE", "CONTENT_LENGTH", "HTTP_X_FORGED", "HTTP_PROXY", "PATH", "HOME", "MODE"] {
        assert!(environ.get(name).is_none(), "{name} is there");
    }
    server.finish();
}

#[test]
fn a_path_arrives_decoded() {
    let server = Server::start("behaviours", &[]);
    let environ: serde_json::Value = serde_json::from_str(&server.get("/show%2Denviron").ok()).unwrap();
    assert_eq!(environ["PATH_INFO"], "/show-environ");
    assert_eq!(environ["RAW_URI"], "/show%2Denviron");
    assert_eq!(server.get("/hello%00").status, 400);
    server.finish();
}

#[test]
fn bodies_are_read_to_their_end_and_no_further() {
    let server = Server::start("behaviours", &[]);
    assert_eq!(server.post("/echo", &[], b"hello").ok(), "hello");
    assert_eq!(server.post("/echo", &[], b"").ok(), "");
    assert_eq!(server.post("/lines", &[], b"a\nbcd\ne").ok(), r"[b'a\n', b'bc', [b'd\n', b'e'], b'']");
    // Two on one connection: the first one's body must not run into the second.
    let mut connection = server.connect();
    connection.send_request("POST", "/echo", &[], b"first");
    connection.send_request("POST", "/ignore-body", &[], b"second");
    connection.send_request("POST", "/echo", &[], b"third");
    assert_eq!(connection.read_response("POST").ok(), "first");
    assert_eq!(connection.read_response("POST").ok(), "ignored");
    assert_eq!(connection.read_response("POST").ok(), "third");
    // Chunked, with a length that nobody announced.
    let mut connection = server.connect();
    connection.send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    connection.send("3\r\nabc\r\n");
    connection.send("4\r\ndefg\r\n0\r\n\r\n");
    assert_eq!(connection.read_response("POST").ok(), "abcdefg");
    server.finish();
}

#[test]
fn responses_keep_what_the_app_said() {
    let server = Server::start("behaviours", &[]);
    let response = server.get("/cookies");
    let cookies: Vec<_> =
        response.headers.iter().filter(|(name, _)| name == "set-cookie").map(|(_, value)| &**value).collect();
    assert_eq!(cookies, ["a=1", "b=2; Path=/"]);
    assert_eq!(response.header("content-length"), Some("3"));

    let teapot = server.get("/status?418+I'm+short+and+stout");
    assert_eq!((teapot.status, &*teapot.reason), (418, "I'm short and stout"));
    let empty = server.get("/status?204+No+Content");
    assert_eq!((empty.status, empty.header("content-length")), (204, None));

    assert_eq!(server.get("/write-callable").ok(), "written, returned");
    server.finish();
}

#[test]
fn a_head_request_has_the_head_only() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    connection.send_request("HEAD", "/hello", &[], b"");
    connection.send_request("GET", "/hello", &[], b"");
    let head = connection.read_response("HEAD");
    assert_eq!(head.status, 200);
    let get = connection.read_response("GET");
    assert_eq!(head.header("content-type"), get.header("content-type"));
    assert_eq!(get.ok(), "Hello, world!\n");
    connection.send_request("HEAD", "/stream", &[], b"");
    connection.send_request("GET", "/hello", &[], b"");
    assert_eq!(connection.read_response("HEAD").status, 200);
    assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n");
    server.finish();
}

#[test]
fn http_1_0_and_close_are_honoured() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    connection.send("GET /stream HTTP/1.0\r\n\r\n");
    let response = connection.read_response("GET");
    assert_eq!(response.header("transfer-encoding"), None);
    assert_eq!(response.ok(), "piece 0\npiece 1\npiece 2\n");
    let mut connection = server.connect();
    connection.send("GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n");
    assert!(connection.is_closed());
    server.finish();
}
