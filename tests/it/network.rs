use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::thread;

use serde_json::{Value, json};

use crate::harness::{Server, run, wsgi_wasm};

#[track_caller]
fn python(server: &Server, code: &str) -> Value {
    serde_json::from_str(&server.post("/run", &[], code.as_bytes()).ok()).unwrap()
}

/// A server that answers each line with itself in capitals.
fn shouter() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read].to_ascii_uppercase()).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

/// Defines `shout(host, port)` and `outcome(action)`.
const CLIENT: &str = r#"
import socket
def shout(host, port, text=b"hello", timeout=5):
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(text + b"\n")
        with connection.makefile("rb") as answer:
            return answer.readline().decode().strip()
def outcome(action):
    try:
        return action()
    except Exception as error:
        return type(error).__name__
"#;

#[test]
fn what_is_granted_can_be_reached_and_nothing_else() {
    let (granted, other) = (shouter(), shouter());
    let grants = [
        "--instances",
        "1",
        "--network",
        &granted.to_string(),
        "--network",
        &format!("localhost:{}", other.port()),
        "--network",
        "*.example.com:443",
    ];
    let server = Server::start("behaviours", &grants);
    let code = format!(
        r#"{CLIENT}
granted, other = {}, {}
result = {{
    "granted": outcome(lambda: shout("127.0.0.1", granted)),
    "other port": outcome(lambda: shout("127.0.0.1", other)),
    "other address": outcome(lambda: shout("127.0.0.2", granted)),
    "in disguise": outcome(lambda: shout("::ffff:127.0.0.1", other)),
    "lookup": outcome(lambda: socket.getaddrinfo("localhost", other, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]),
    "by name": outcome(lambda: shout("localhost", other)),
    "by name, other port": outcome(lambda: shout("localhost", 1)),
    "unknown name": outcome(lambda: shout("metadata.google.internal", 80)),
    "own listener": outcome(lambda: socket.create_server(("127.0.0.1", 0))),
    "own bind": outcome(lambda: socket.socket().bind(("127.0.0.1", 0))),
    "datagram": outcome(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", granted))),
}}
"#,
        granted.port(),
        other.port()
    );
    let told = python(&server, &code);
    assert_eq!(told["granted"], "HELLO");
    assert_eq!(told["lookup"], "127.0.0.1");
    assert_eq!(told["by name"], "HELLO");
    assert_eq!(told["other address"], "PermissionError");
    assert_eq!(told["by name, other port"], "PermissionError");
    assert_eq!(told["unknown name"], "PermissionError");
    for refused in ["in disguise", "own listener", "own bind", "datagram"] {
        assert!(told[refused].as_str().unwrap().ends_with("Error"), "{refused}: {told}");
    }
    server.wait_for_log(&["connecting to 127.0.0.2", "is not granted", "--network 127.0.0.2:"]);
    server
        .wait_for_log(&["looking up `metadata.google.internal`", "--network metadata.google.internal:PORT"]);
    server.finish();
}

#[test]
fn connections_and_bytes_are_bounded() {
    let address = shouter();
    let server = Server::start(
        "behaviours",
        &[
            "--instances",
            "1",
            "--network",
            &format!("127.0.0.0/8:{}", address.port()),
            "--network-quota",
            "1MiB",
        ],
    );
    let code = format!(
        r#"{CLIENT}
held = []
def hoard():
    while True:
        held.append(socket.create_connection(("127.0.0.1", {port}), 5))
result = [outcome(hoard), len(held)]
for connection in held:
    connection.close()
result.append(outcome(lambda: shout("127.0.0.1", {port})))
def flood():
    with socket.create_connection(("127.0.0.1", {port}), 5) as connection:
        for _ in range(1000):
            connection.sendall(bytes(4000))
            connection.recv(4000)
result.append(outcome(flood))
result.append(outcome(lambda: shout("127.0.0.1", {port})))
"#,
        port = address.port()
    );
    let told = python(&server, &code);
    assert_eq!(told[0], "OSError", "{told}");
    assert_eq!((&told[1], &told[2]), (&json!(64), &json!("HELLO")), "{told}");
    for refused in [&told[3], &told[4]] {
        assert!(refused.as_str().is_some_and(|error| error.ends_with("Error")), "{told}");
    }
    server.wait_for_log(&["network quota", "--network-quota"]);
    assert_eq!(server.get("/served").ok(), "1", "the instance was lost");
    server.finish();
}

#[test]
fn a_new_instance_has_no_new_quota() {
    let address = shouter();
    let grants = ["--isolation", "request", "--network", &address.to_string(), "--network-quota", "1MiB"];
    let server = Server::start("behaviours", &grants);
    let code = format!(
        r#"{CLIENT}
result = outcome(lambda: len(shout("127.0.0.1", {}, b"x" * 100_000)))
"#,
        address.port()
    );
    let mut granted = 0;
    while python(&server, &code) == json!(100_000) {
        granted += 1;
        assert!(granted <= 5, "{granted} times 200 kB");
    }
    assert_eq!(granted, 5);
    server.wait_for_log(&["network quota", "--network-quota"]);
    server.finish();
}

#[test]
fn all_of_the_internet_is_not_this_machine() {
    let address = shouter();
    let server = Server::start("behaviours", &["--network", "0.0.0.0/0:*", "--network", "[::]/0:*"]);
    let code = format!(
        r#"{CLIENT}
result = [outcome(lambda: shout(host, {}, timeout=1)) for host in ("127.0.0.1", "0.0.0.0", "169.254.169.254")]
"#,
        address.port()
    );
    assert_eq!(python(&server, &code), json!(["PermissionError", "PermissionError", "PermissionError"]));
    server.wait_for_log(&["connecting to 169.254.169.254", "--network 169.254.169.254:"]);
    server.finish();
}

#[test]
fn a_grant_that_means_nothing_is_refused_at_start() {
    let refused = run(wsgi_wasm().args(["serve", "app.wasm", "--network", "10.0.0.0/33:80"]));
    refused.refused(&["--network", "10.0.0.0/33:80", "bits"]);
}
