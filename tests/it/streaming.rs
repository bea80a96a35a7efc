use std::io::Read as _;

use crate::harness::{Connection, Server};

const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// Anonymous memory of the server in bytes: what it holds itself, without
/// mapped code.
fn memory(server: &Server) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn a_gigabyte_comes_in_and_goes_out_in_bounded_memory() {
    let server = Server::start("behaviours", &["--max-body", "2GiB", "--instances", "1", "--timeout", "60s"]);
    server.get("/hello").ok();
    let before = memory(&server);
    let mut most = 0;

    let mut upload = server.connect();
    upload.send(format!("POST /count-only HTTP/1.1\r\nHost: x\r\nContent-Length: {GIB}\r\n\r\n"));
    let piece = vec![b'x'; MIB];
    for _ in 0..GIB / MIB {
        upload.send(&piece);
        most = most.max(memory(&server));
    }
    assert_eq!(upload.read_response("POST").ok(), GIB.to_string());

    let mut download = server.connect();
    download.send_request("GET", "/large?1024", &[], b"");
    assert_eq!(download.read_head().status, 200);
    let mut received = 0;
    loop {
        let chunk = download.read_chunk().expect("the body was cut off");
        if chunk.is_empty() {
            break;
        }
        received += chunk.len();
        most = most.max(memory(&server));
    }
    assert_eq!(received, GIB);
    let grown = most.saturating_sub(before);
    assert!(grown < 64 * MIB, "the server grew by {} MiB", grown / MIB);
    server.finish();
}

#[test]
fn large_bodies_arrive_unchanged() {
    let server = Server::start("behaviours", &["--max-body", "64MiB"]);
    let body: Vec<u8> = (0..20 * MIB).map(|index| ((index * 31) >> 3) as u8).collect();
    use sha2::Digest as _;
    let digest: String = sha2::Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(server.post("/count", &[], &body).ok(), format!("{} {digest}", body.len()));

    let response = server.get("/large?3");
    assert_eq!(response.body.len(), 3 * MIB);
    assert!(response.body.iter().enumerate().all(|(index, byte)| *byte == index as u8));
    for length in [0, 1, 65_535, 1_048_576, 40_000_000] {
        let response = server.get(&format!("/large-whole?{length}"));
        assert_eq!(response.header("content-length"), Some(&*length.to_string()));
        assert_eq!(response.ok().len(), length);
    }
    server.finish();
}

#[test]
fn bodies_leave_no_memory_behind() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    assert_eq!(server.get("/served").ok(), "1");
    let mut connection = server.connect();
    for _ in 0..300 {
        connection.send_request("GET", "/large-whole?900000", &[], b"");
        assert_eq!(connection.read_response("GET").body.len(), 900_000);
    }
    assert_eq!(server.get("/served").ok(), "2", "the instance was replaced because it had grown");
    server.finish();
}

#[test]
fn each_piece_is_sent_before_the_next_is_made() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    connection.send_request("GET", "/stream-for-ever", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    // The app would never end, so these come while it runs.
    for index in 0..5 {
        assert_eq!(connection.read_chunk().unwrap(), format!("piece {index}\n").into_bytes());
    }
    drop(connection);
    server.wait_for_log(&["closed pieces"]);
    server.finish();
}

#[test]
fn a_client_that_leaves_ends_the_app_cleanly() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    // While it sends the body.
    let mut connection = server.connect();
    connection.send("POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\nbeginning");
    drop(connection);
    // Before the response starts.
    let mut connection = server.connect();
    connection.send_request("GET", "/sleep?0.3", &[], b"");
    drop(connection);
    // While the app streams, and the client never reads.
    let mut connection = server.connect();
    connection.send_request("GET", "/stream-for-ever", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    drop(connection);
    server.wait_for_log(&["closed pieces"]);
    assert_eq!(server.get("/was-closed").ok(), "pieces", "close() ran once, in the instance that goes on");
    server.finish();
}

#[test]
fn close_runs_once_after_a_whole_body() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    assert_eq!(server.get("/stream").ok(), "piece 0\npiece 1\npiece 2\n");
    assert_eq!(server.get("/was-closed").ok(), "pieces");
    // With a length, hyper is done before the app says so.
    for _ in 0..20 {
        assert_eq!(server.get("/stream-exact").ok(), "piece 0\npiece 1\npiece 2\n");
    }
    assert_eq!(server.get("/was-closed").ok(), ["pieces"; 21].join(" "));
    let log = server.finish();
    assert!(!log.contains("client"), "{log}");
}

#[test]
fn a_whole_body_is_sent_before_the_app_goes_on() {
    let server = Server::start("behaviours", &["--instances", "16", "--timeout", "5s", "--compress"]);
    for then in ["next,sleep", "next,spin", "close,sleep", "close,spin"] {
        for (method, status, chunks, body) in [
            ("GET", 200, 1, "all of it"),
            ("GET", 200, 2, "all of it"),
            ("HEAD", 200, 1, ""),
            ("GET", 304, 1, ""),
        ] {
            let path = format!("/whole-then?{status};{chunks};{then}");
            let response = server.request(method, &path, &[], b"");
            assert_eq!(
                (response.status, response.text(), response.cut),
                (status, body.into(), false),
                "{path}"
            );
        }
    }
    // The apps never end, and none was stopped yet.
    assert!(!server.log().contains("in time"));
    server.wait_for_log(&["RequestTimeout"]);
    server.wait_for_log(&["in time"]);
    server.finish();
}

#[test]
fn a_failure_after_a_whole_body_is_only_logged() {
    let server = Server::start("behaviours", &["--instances", "1", "--access-log", "json"]);
    for chunks in [1, 2] {
        for place in ["next", "close"] {
            assert_eq!(server.get(&format!("/whole-then?200;{chunks};{place},fail")).ok(), "all of it");
            server.wait_for_log(&[&format!("failed in {place} after the whole body")]);
        }
    }
    let log = server.finish();
    assert_eq!(log.matches("\"whole\":true").count(), 4, "{log}");
}

#[test]
fn a_client_that_takes_nothing_is_cut_off() {
    let server = Server::start("behaviours", &["--instances", "1", "--client-timeout", "500ms"]);
    let mut connection = server.connect();
    connection.send_request("GET", "/large?512", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    // Reads nothing more; the instance must come free all the same.
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    let mut rest = 0;
    let mut buffer = vec![0; MIB];
    while let Ok(read @ 1..) = connection.reader().read(&mut buffer) {
        rest += read;
    }
    assert!(rest < 512 * MIB);
    server.finish();
}

#[test]
fn a_client_that_sends_nothing_is_cut_off() {
    let server = Server::start("behaviours", &["--client-timeout", "300ms", "--header-timeout", "300ms"]);
    let mut silent_body = server.connect();
    silent_body.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc");
    assert_eq!(silent_body.read_response("POST").status, 408);
    let mut silent_head = server.connect();
    silent_head.send("GET /hello HTTP/1.1\r\nHost: x\r\n");
    assert!(closed_or_timeout(&mut silent_head));
    server.finish();
}

/// Whether the server ends the connection, with or without a 408 before it.
fn closed_or_timeout(connection: &mut Connection) -> bool {
    let mut rest = Vec::new();
    let _ = connection.reader().read_to_end(&mut rest);
    rest.is_empty() || rest.starts_with(b"HTTP/1.1 408")
}

#[test]
fn expect_continue_is_answered_when_the_app_reads() {
    let server = Server::start("behaviours", &[]);
    let mut connection = server.connect();
    let head = "Host: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    connection.send(format!("POST /echo HTTP/1.1\r\n{head}"));
    assert_eq!(connection.read_head().status, 100);
    connection.send("hello");
    assert_eq!(connection.read_response("POST").ok(), "hello");
    let mut connection = server.connect();
    connection.send(format!("POST /ignore-body HTTP/1.1\r\n{head}"));
    assert_eq!(connection.read_head().status, 200, "an app that does not read wants no body");
    server.finish();
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a client that takes its time is what is tested")]
fn the_time_of_a_client_is_not_the_guests() {
    let server = Server::start("behaviours", &["--timeout", "500ms", "--instances", "1"]);
    let mut connection = server.connect();
    connection.send_request("GET", "/large?24", &[], b"");
    assert_eq!(connection.read_head().status, 200);
    let mut length = 0;
    while let Some(chunk) = connection.read_chunk().filter(|chunk| !chunk.is_empty()) {
        length += chunk.len();
        // Longer than a piece may take, several times: sockets hold some pieces.
        if length % (4 << 20) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(800));
        }
    }
    assert_eq!(length, 24 << 20);
    server.finish();
}

#[test]
fn each_piece_has_its_time() {
    let server = Server::start("behaviours", &["--timeout", "3s", "--instances", "1"]);
    // Longer in all than one piece may take.
    assert_eq!(server.get("/work-slowly?5;1;").ok(), "0\n1\n2\n3\n4\n");
    // One that takes longer is the end, and the app hears of it where it can.
    for ending in ["spin", "sleep"] {
        let response = server.get(&format!("/work-slowly?4;1;{ending}"));
        assert!(response.cut, "{response:?}");
        assert_eq!(response.text(), "0\n1\n2\n3\n");
    }
    server.wait_for_log(&["RequestTimeout"]);
    server.finish();
}
