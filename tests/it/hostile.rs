use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use serde_json::Value;

use crate::harness::{Connection, Finished, Response, Server, guest, run, wait_until, wsgi_wasm};
use crate::raw::{Calls, Script, handles, raw_guest, save};

const OK: &str = "Status: 200 OK\r\n\r\nfine";
const HEAD: &str = "Status: 200 OK\r\n\r\n";
const PAGE: u32 = 1 << 16;
const MIB: u64 = 1 << 20;

/// A server that several tenants share: a victim, which is the guest
/// `behaviours`, and attackers.
struct Arena {
    directory: tempfile::TempDir,
    server: Server,
}

impl Arena {
    /// `attackers` are raw guests, or `hostile` for the one in Python, each
    /// with more settings for it.
    fn start(attackers: &[(&str, &str)]) -> Arena {
        Arena::start_with("", attackers)
    }

    fn start_with(server: &str, attackers: &[(&str, &str)]) -> Arena {
        let directory = tempfile::tempdir().unwrap();
        write_config(directory.path(), server, attackers);
        let config = directory.path().join("wsgi-wasm.toml");
        let server =
            Server::spawn(wsgi_wasm().args(["serve", "--bind", "127.0.0.1:0", "--config"]).arg(config));
        Arena { directory, server }
    }

    /// Lets `attack` go on while the victim is asked again and again, and
    /// demands that each answer is right.
    #[track_caller]
    fn during<T>(&self, attack: impl FnOnce() -> T) -> T {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let victim = scope.spawn(|| {
                let mut last = false;
                while !last {
                    // No connection is kept open for ever.
                    let mut connection = self.server.connect();
                    for _ in 0..100 {
                        last = over.load(Ordering::Relaxed);
                        assert_eq!(
                            ask(&mut connection, "victim", "GET", "/hello", b"").ok(),
                            "Hello, world!\n"
                        );
                    }
                }
            });
            let end = Over(&over);
            let result = attack();
            drop(end);
            victim.join().expect("the victim was hurt");
            result
        })
    }

    /// Sends `body` to an attacker, on a new connection.
    #[track_caller]
    fn post(&self, name: &str, body: &[u8]) -> Response {
        ask(&mut self.server.connect(), name, "POST", "/", body)
    }

    /// Asks an attacker for `path`, on a new connection.
    #[track_caller]
    fn get(&self, name: &str, path: &str) -> Response {
        ask(&mut self.server.connect(), name, "GET", path, b"")
    }

    /// Asks an attacker for `path` so often at a time, and reads all answers.
    #[track_caller]
    fn storm(&self, name: &str, path: &str, at_a_time: usize) -> Vec<Response> {
        let mut connections: Vec<_> = (0..at_a_time).map(|_| self.server.connect()).collect();
        for connection in &mut connections {
            send(connection, name, "GET", path, b"");
        }
        connections.iter_mut().map(|connection| connection.read_response("GET")).collect()
    }

    /// Demands that the client learns nothing but `status`, and the operator
    /// the reason, as all of the texts in one line with the request's id.
    #[track_caller]
    fn assert_refused(&self, what: &str, response: &Response, status: u16, logged: &str) {
        let text = response.text();
        assert_eq!(response.status, status, "{what}: {text}");
        let id = text.lines().find_map(|line| line.strip_prefix("request ")).unwrap_or_else(|| {
            panic!("{what}: not a refusal of ours: {text:?}");
        });
        assert_eq!(text.lines().count(), 2, "{what}: {text}");
        assert!(response.headers.iter().all(|(name, _)| !name.starts_with("x-")), "{what}: {response:?}");
        self.server.wait_for_log(&[id, logged]);
    }

    fn ctl(&self, arguments: &[&str]) -> Finished {
        let control = format!("unix:{}", self.directory.path().join("control.sock").display());
        run(wsgi_wasm().args(["ctl", "--control", &control]).args(arguments))
    }

    /// A connection of a client that takes no byte of any body.
    async fn closed_window(&self) -> SendRequest<Bytes> {
        let stream = tokio::net::TcpStream::connect(self.server.address()).await.unwrap();
        let handshake = h2::client::Builder::new().initial_window_size(0).handshake(stream);
        let (sender, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// Waits until `reached` is true of the server.
    #[track_caller]
    fn wait_until(&self, what: &str, reached: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !reached() {
            assert!(Instant::now() < end, "{what}");
        }
    }

    /// What the tenant `name` holds of the server's memory.
    fn held(&self, name: &str) -> u64 {
        self.status(name)["memory"].as_u64().unwrap()
    }

    /// What `ctl list` says of the tenant `name`.
    fn status(&self, name: &str) -> Value {
        let list: Value = serde_json::from_str(&self.ctl(&["list", "--json"]).success().stdout).unwrap();
        list.as_array().unwrap().iter().find(|tenant| tenant["name"] == name).unwrap().clone()
    }

    /// The most memory that the server ever had, in bytes.
    fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.server.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    /// The descriptors that the server has open.
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.server.id())).unwrap().count()
    }

    /// Demands that the victim is served, the attackers' instances come to
    /// rest, and the server stops cleanly. Returns its log.
    #[track_caller]
    fn finish(self) -> String {
        assert_eq!(self.get("victim", "/hello").ok(), "Hello, world!\n");
        self.server.finish()
    }
}

/// Ends what others do meanwhile, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn write_config(directory: &Path, server: &str, attackers: &[(&str, &str)]) {
    let mut config = format!(
        "[server]\ncontrol = \"unix:control.sock\"\n{server}\n\
         [[tenant]]\nname = \"victim\"\napp = {:?}\nhosts = [\"victim\"]\n",
        guest("behaviours")
    );
    for (name, settings) in attackers {
        let app: PathBuf = match *name {
            "hostile" => guest("hostile"),
            raw => raw_guest(raw, directory),
        };
        config += &format!("[[tenant]]\nname = {name:?}\napp = {app:?}\nhosts = [{name:?}]\n{settings}\n");
    }
    std::fs::write(directory.join("wsgi-wasm.toml"), config).unwrap();
}

#[track_caller]
fn send(connection: &mut Connection, host: &str, method: &str, path: &str, body: &[u8]) {
    let length = body.len();
    let mut request =
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    request.extend_from_slice(body);
    connection.send(request);
}

/// Sends a request and reads the final response.
#[track_caller]
fn ask(connection: &mut Connection, host: &str, method: &str, path: &str, body: &[u8]) -> Response {
    send(connection, host, method, path, body);
    loop {
        let response = connection.read_response(method);
        if response.status != 103 {
            return response;
        }
    }
}

const PUPPET: (&str, &str) = (
    "puppet",
    "limits = { timeout = \"1s\", memory = \"64MiB\", response = \"1MiB\" }\ninstances = { max = 4 }",
);

#[test]
fn a_guest_that_breaks_the_contract_costs_one_request_and_one_instance() {
    let arena = Arena::start(&[PUPPET]);
    let new = Script::new;
    let deep = u64::MAX;
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        // What it returns.
        ("no list", new().return_pointer(0xffff_fff0), 500, "trapped"),
        ("no aligned list", new().return_pointer(9), 500, "trapped"),
        ("a list out of bounds", new().answer_raw(0xffff_fff0, 100), 500, "out of bounds"),
        ("a list of 4 GiB", new().answer_raw(8, u32::MAX), 500, "out of bounds"),
        ("a list that wraps", new().answer_raw(0x8000_0000, 0x8000_0000), 500, "out of bounds"),
        ("a huge list", new().grow_memory(800).answer_raw(0, 50 << 20), 500, "too much data"),
        ("an empty list", new().answer(""), 500, "the app failed"),
        // In which order it calls.
        ("two heads", new().start(HEAD).times(2).answer(""), 500, "sent twice"),
        ("no head", new().write("x").answer(""), 500, "without a head"),
        ("no head, and the end", new().finish().answer(""), 500, "without a head"),
        ("both ways", new().start(HEAD).answer(OK), 500, "both streamed and returned"),
        ("hints too late", new().start(HEAD).early_hints("Link: </>\r\n").answer(""), 500, "after the head"),
        ("a head, and a whole response", new().start(HEAD).send_whole(OK).answer(""), 500, "sent twice"),
        ("a whole response out of bounds", new().send_whole_raw(u32::MAX, 1).answer(""), 500, "trapped"),
        ("an empty whole response", new().send_whole("").answer(""), 500, "has no end"),
        ("bytes behind a head", new().start(OK).answer(""), 500, "bytes follow"),
        // What it passes.
        ("a head out of bounds", new().start_raw(u32::MAX, 1).answer(""), 500, "trapped"),
        (
            "a huge chunk",
            new().grow_memory(800).start(HEAD).write_raw(0, 50 << 20).answer(""),
            500,
            "trapped",
        ),
        ("a path that is no text", new().send_file(HEAD, b"/0/\xff\xfe", 0, 1).answer(OK), 500, "utf-8"),
        ("random bytes by the gigabyte", new().random(1 << 30).answer(OK), 500, "exceeds limit"),
        ("random bytes without end", new().random(u64::MAX).answer(OK), 500, "exceeds limit"),
        ("zeroes for the log", new().log_zeroes(u64::MAX).answer(OK), 500, "trapped"),
        ("a log line of 50 MB", new().grow_memory(800).log_raw(0, 50 << 20).answer(OK), 500, "too much data"),
        (
            "100,000 names of a pollable",
            new().grow_memory(100).timer(1).poll(PAGE * 2, 100_000).answer(OK),
            500,
            "trapped",
        ),
        (
            "a list of 60 MB of pollables",
            new().grow_memory(900).timer(1).poll(PAGE * 2, 14 << 20).answer(OK),
            500,
            "trapped",
        ),
        ("2,000 pollables", new().timer(deep).times(2000).answer(OK), 500, "table has no free keys"),
        // How it ends.
        ("an exit", new().exit().bytes(), 500, "Exited"),
        ("a trap", new().trap().bytes(), 500, "unreachable"),
        ("no end of the stack", new().recurse().bytes(), 500, "call stack exhausted"),
        ("no end", new().spin().bytes(), 504, "in time"),
        (
            "no end, in one instruction",
            new().grow_memory(900).fill(PAGE, 50 << 20, 1).times(1 << 30).bytes(),
            504,
            "in time",
        ),
        ("no end, in the host", new().random(1 << 20).times(1 << 30).bytes(), 504, "in time"),
        ("a timer for ever", new().timer(u64::MAX).wait().answer(OK), 504, "in time"),
        ("the time it takes to poll", new().timer(u64::MAX).poll(PAGE, 10).answer(OK), 504, "in time"),
    ];
    arena.during(|| {
        for (what, script, status, logged) in &cases {
            let response = arena.post("puppet", script);
            arena.assert_refused(what, &response, *status, logged);
            // It starts again, and is not held back for crashes in a row.
            assert_eq!(arena.post("puppet", &Script::new().answer(OK)).ok(), "fine", "after {what}");
        }
    });
    assert!(arena.peak() < 400 * MIB, "{} MiB", arena.peak() / MIB);
    // Four at a time, each with all of its stack in use.
    let before = arena.memory("VmRSS:");
    let deep = new().timer(200_000_000).wait().recurse().bytes();
    let mut connections: Vec<_> = (0..4).map(|_| arena.server.connect()).collect();
    connections.iter_mut().for_each(|connection| send(connection, "puppet", "POST", "/", &deep));
    for connection in &mut connections {
        assert_eq!(connection.read_response("POST").status, 500);
    }
    let grown = arena.memory("VmRSS:").saturating_sub(before);
    assert!(grown < 64 * MIB, "96 MiB of stacks were not given back: {} MiB more", grown / MIB);
    arena.finish();
}

#[test]
fn a_whole_response_stands_whatever_follows() {
    let arena = Arena::start(&[PUPPET]);
    let new = || Script::new().send_whole(OK);
    for (what, script, logged) in [
        ("an end", new().answer(""), None),
        ("a trap", new().trap().bytes(), Some("unreachable")),
        ("no end", new().spin().bytes(), Some("in time")),
        ("a second one", new().send_whole(OK).answer(""), Some("sent twice")),
        ("a head", new().start(HEAD).write("x").finish().answer(""), Some("sent twice")),
        ("a piece", new().write("x").answer(""), Some("without a head")),
        ("an answer", new().answer(OK), Some("both streamed and returned")),
        ("a trap, much later", new().timer(100_000_000).wait().trap().bytes(), Some("unreachable")),
    ] {
        let response = arena.post("puppet", &script);
        assert_eq!(response.ok(), "fine", "{what}");
        if let Some(text) = logged {
            arena.server.wait_for_log(&[text]);
        }
    }
    arena.finish();
}

#[test]
fn crashes_after_whole_responses_are_held_back_too() {
    let wait = |script: Script| script.timer(10_000_000).wait().trap().bytes();
    for (what, script) in [
        ("at once", Script::new().send_whole(OK).trap().bytes()),
        ("later", wait(Script::new().send_whole(OK))),
        (
            "after pieces",
            wait(Script::new().start("Status: 200 OK\r\nContent-Length: 4\r\n\r\n").write("fi").write("ne")),
        ),
    ] {
        let arena = Arena::start(&[("puppet", "instances = { max = 1 }")]);
        let answered = (0..20).filter(|_| arena.post("puppet", &script).status == 200).count();
        assert!(answered <= 8, "{what}: {answered}");
        assert_eq!(arena.status("puppet")["state"], "crashing", "{what}");
        arena.finish();
    }
}

#[test]
fn what_goes_beyond_a_limit_without_harm_is_refused_to_the_guest() {
    let arena = Arena::start(&[PUPPET]);
    let new = Script::new;
    arena.during(|| {
        for (what, script) in [
            ("memory, page by page", new().grow_memory(1).times(100_000).answer(OK)),
            ("memory at once", new().grow_memory(u32::MAX).answer(OK)),
            ("a table, bit by bit", new().grow_table(1000).times(1000).answer(OK)),
            ("a table at once", new().grow_table(u32::MAX).answer(OK)),
            ("a body that is not there", new().read(u32::MAX).times(1000).answer(OK)),
            ("a path outside", new().send_file(HEAD, "/0/../../etc/passwd", 0, 1).answer(OK)),
            ("a path of the host", new().send_file(HEAD, "/etc/passwd", 0, 1).answer(OK)),
            ("a path that is too long", new().send_file(HEAD, "/0/".repeat(20_000), 0, 1).answer(OK)),
            ("a part before the file", new().send_file(HEAD, "/tmp/x", u64::MAX, u64::MAX).answer(OK)),
            ("an end after the end", new().start(HEAD).write("fine").finish().times(3).answer("")),
        ] {
            assert_eq!(arena.post("puppet", &script).ok(), "fine", "{what}");
        }
    });
    assert!(arena.peak() < 400 * MIB, "{} MiB", arena.peak() / MIB);
    let log = arena.finish();
    assert!(!log.contains("trapped"), "{log}");
}

#[test]
fn a_head_that_breaks_http_goes_nowhere() {
    let arena = Arena::start(&[PUPPET]);
    let many = format!("Status: 200 OK\r\n{}\r\n", "X-Many: y\r\n".repeat(2000));
    let garbage: Vec<u8> = (0..=255).cycle().take(4000).collect();
    let heads: Vec<(&[u8], &str)> = vec![
        (b"Status: 99 No\r\n\r\n", "not three digits"),
        (b"Status: 1000 No\r\n\r\n", "not three digits"),
        (b"Status: 100 Continue\r\n\r\n", "between 200 and 599"),
        (b"Status: 101 Switching Protocols\r\n\r\n", "between 200 and 599"),
        (b"Status: 600 No\r\n\r\n", "between 200 and 599"),
        (b"Status: 200 OK\x00\r\n\r\n", "control characters"),
        (b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\n", "Status"),
        (b"X-A: b\r\nStatus: 200 OK\r\n\r\n", "Status"),
        (b"Status: 200 OK\r\nX-A: b\nX-Evil: 1\r\n\r\n", "control characters"),
        (b"Status: 200 OK\r\nX-A: b\rX-Evil: 1\r\n\r\n", "control characters"),
        (b"Status: 200 OK\r\nX-A\x00: b\r\n\r\n", "not a token"),
        (b"Status: 200 OK\r\nX A: b\r\n\r\n", "not a token"),
        (b"Status: 200 OK\r\nX-A : b\r\n\r\n", "not a token"),
        (b"Status: 200 OK\r\n X-A: b\r\n\r\n", "not a token"),
        (b"Status: 200 OK\r\n: b\r\n\r\n", "not a token"),
        (b"Status: 200 OK\r\nX-A\r\n\r\n", "no colon"),
        (b"Status: 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "hop-by-hop"),
        (b"Status: 200 OK\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "hop-by-hop"),
        (b"Status: 200 OK\r\nTrailer: X-A\r\n\r\n", "hop-by-hop"),
        (b"Status: 200 OK\r\nContent-Length: 5\r\nContent-Length: 50\r\n\r\nfine!", "not one number"),
        (b"Status: 200 OK\r\nContent-Length: -1\r\n\r\n", "not one number"),
        (b"Status: 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", "not one number"),
        (b"Status: 200 OK\r\nContent-Length: 5\r\n\r\nnot five", "not as long"),
        (b"Status: 200 OK\r\nX-A: b", "has no end"),
        (many.as_bytes(), "too many headers"),
        (&garbage, "has no end"),
    ];
    arena.during(|| {
        for (head, rule) in &heads {
            let what = String::from_utf8_lossy(&head[..head.len().min(60)]).into_owned();
            let returned = arena.post("puppet", &Script::new().answer(head));
            arena.assert_refused(&what, &returned, 500, rule);
            let streamed = arena.post("puppet", &Script::new().start(head).finish().answer(""));
            assert_eq!(streamed.status, 500, "{what}");
            let whole = arena.post("puppet", &Script::new().send_whole(head).answer(""));
            arena.assert_refused(&what, &whole, 500, rule);
        }
        // Longer than what comes with the call: made by the guest itself.
        let body = Script::new().grow_memory(10).fill(PAGE * 2, 500_000, b'a').answer_raw(PAGE * 2, 500_000);
        arena.assert_refused("a long line", &arena.post("puppet", &body), 500, "too long");
        let hints = Script::new().early_hints("Link: </a>\r\nContent-Length: 5\r\n").answer("");
        arena.assert_refused("hints", &arena.post("puppet", &hints), 500, "Content-Length");
        let hints = Script::new().early_hints("Link: </a>\r\n\r\nHTTP/1.1 200 OK\r\n").answer("");
        arena.assert_refused("split hints", &arena.post("puppet", &hints), 500, "no colon");
    });
    // What looks like a second response is the body of the first.
    let split = b"Status: 200 OK\r\nX-A: b\r\n\r\nHTTP/1.1 200 OK\r\nX-Evil: 1\r\n\r\n";
    let response = arena.post("puppet", &Script::new().answer(split));
    assert_eq!((response.header("x-a"), response.header("x-evil")), (Some("b"), None));
    assert_eq!(response.ok(), "HTTP/1.1 200 OK\r\nX-Evil: 1\r\n\r\n");
    arena.finish();
}

#[test]
fn output_without_end_has_an_end() {
    let arena = Arena::start(&[(
        "puppet",
        "limits = { timeout = \"10s\", memory = \"64MiB\", response = \"64KiB\" }\ninstances = { max = 4 }",
    )]);
    arena.during(|| {
        let response =
            arena.post("puppet", &Script::new().start(HEAD).write("x").times(2_000_000).finish().answer(""));
        assert!(response.cut, "more than the limit");
        assert_eq!(response.body.len(), 64 << 10);
        arena.server.wait_for_log(&["puppet", "larger than the limit"]);
        let whole = [b"Status: 200 OK\r\n\r\n".to_vec(), vec![b'x'; 40 << 10]].concat();
        let hinted =
            Script::new().early_hints("Link: </a>\r\n".repeat(400)).times(7).send_whole(&whole).answer("");
        arena.assert_refused("a whole one", &arena.post("puppet", &hinted), 500, "body is larger");
        let hinted = Script::new().early_hints("Link: </a>\r\n".repeat(400)).times(7).answer(&whole);
        arena.assert_refused("a returned one", &arena.post("puppet", &hinted), 500, "body is larger");
        let hints = Script::new().early_hints("Link: </a>; rel=preload\r\n").times(100_000).answer("");
        arena.assert_refused("hints", &arena.post("puppet", &hints), 500, "early hints are larger");
        assert_eq!(
            arena
                .post("puppet", &Script::new().log("evil\r\nline \x1b[31m\n").times(100_000).answer(OK))
                .ok(),
            "fine"
        );
        arena.server.wait_for_log(&["puppet", "dropped"]);
        let no_end = Script::new().log("x".repeat(60_000)).times(1000).answer(OK);
        assert_eq!(arena.post("puppet", &no_end).ok(), "fine");
        arena.server.wait_for_log(&["puppet", "xxxx", "[cut]"]);
    });
    assert!(arena.peak() < 400 * MIB, "{} MiB", arena.peak() / MIB);
    let log = arena.finish();
    assert!(log.lines().count() < 20_000, "{} lines", log.lines().count());
    assert!(!log.contains('\x1b'));
    assert!(log.lines().all(|line| line.len() < 10_000));
}

#[test]
fn a_guest_that_lies_about_its_memory_costs_one_request() {
    let settings = "limits = { timeout = \"500ms\" }\ninstances = { max = 2 }";
    let arena =
        Arena::start(&[("realloc-spin", settings), ("realloc-wild", settings), ("realloc-calls", settings)]);
    arena.during(|| {
        for (name, status, logged) in [
            ("realloc-spin", 504, "in time"),
            ("realloc-wild", 500, "beyond end of memory"),
            ("realloc-calls", 500, "cannot leave component instance"),
        ] {
            for _ in 0..3 {
                arena.assert_refused(name, &arena.post(name, b"body"), status, logged);
            }
        }
    });
    arena.finish();
}

#[test]
fn names_in_a_trap_can_not_forge_the_log() {
    let arena = Arena::start(&[("forged-names", "")]);
    arena.assert_refused("a trap", &arena.post("forged-names", b""), 500, "unreachable");
    arena.server.wait_for_log(&["all is lost"]);
    let log = arena.finish();
    let forged = log.lines().find(|line| line.contains("all is lost")).unwrap();
    assert!(forged.contains("app=forged-names") && !forged.starts_with("2026-01-01"), "{forged}");
    assert!(!log.contains('\x1b'));
}

#[test]
fn an_app_that_never_starts_takes_no_place() {
    let settings = "env = { CALM = \"1\" }";
    let arena = Arena::start(&[("start-spin", settings)]);
    assert_eq!(arena.get("start-spin", "/").ok(), "fine");
    arena.during(|| {
        // The next version of the tenant spins.
        write_config(arena.directory.path(), "", &[("start-spin", "")]);
        arena.ctl(&["reload"]).success();
        arena.server.wait_for_log(&["start-spin", "not used", "time limit"]);
        assert_eq!(arena.get("start-spin", "/").ok(), "fine", "the version before goes on");
        // Others are changed as ever.
        arena.ctl(&["deploy", "victim", guest("behaviours").to_str().unwrap()]).success();
        let trap = raw_guest("start-trap", arena.directory.path());
        arena.ctl(&["deploy", "victim", trap.to_str().unwrap()]).refused(&["failed to start", "unreachable"]);
        let large = raw_guest("large-memory", arena.directory.path());
        arena.ctl(&["deploy", "victim", large.to_str().unwrap()]).refused(&["does not fit", "--memory"]);
    });
    arena.finish();
}

#[test]
fn what_is_no_app_is_refused_in_time_and_memory() {
    let arena = Arena::start(&[]);
    let directory = arena.directory.path();
    // A loop in a loop in a loop, and in each of them every variable changes:
    // a compiler has to keep track of all of them at all places.
    let (variables, loops) = (4000, 4000);
    let changes: String = (1..variables)
        .map(|local| {
            let other = local * 7 % variables;
            format!("(local.set {local} (i64.add (local.get {local}) (local.get {other})))")
        })
        .collect();
    let bomb = format!(
        "(component (core module (func (param i64) (local{}) {}{changes}{})))",
        " i64".repeat(variables),
        "(loop ".repeat(loops),
        "(br_if 0 (i64.eqz (local.get 1))))".repeat(loops)
    );
    let nested: String =
        (1..100).map(|at| format!("(type $t{at} (tuple {}))", format!("$t{} ", at - 1).repeat(10))).collect();
    let cases = [
        ("bomb", bomb, "compiling"),
        ("types", format!("(component (type $t0 (tuple u8 u8)){nested})"), "type size"),
        ("nothing", "(component)".into(), "not a WSGI app"),
        ("other", "(component (import \"wasi:http/types@0.2.0\" (instance)))".into(), "not a WSGI app"),
        ("module", "(module)".into(), "core WebAssembly module"),
    ];
    arena.during(|| {
        for (name, text, reason) in &cases {
            let app = save(directory, name, text);
            arena.ctl(&["deploy", "victim", app.to_str().unwrap()]).refused(&[reason]);
        }
    });
    arena.finish();
}

#[test]
fn python_that_attacks_is_stopped() {
    let settings = "limits = { timeout = \"3s\", memory = \"96MiB\", tmp = \"8MiB\", response = \"4MiB\" }\n\
                    instances = { max = 4 }";
    let arena = Arena::start(&[("hostile", settings)]);
    let before = arena.descriptors();
    arena.during(|| {
        for (path, status, logged) in [
            ("/spin", 504, "in time"),
            ("/stubborn", 504, "in time"),
            ("/regular-expression", 504, "in time"),
            ("/large-number", 504, "in time"),
            ("/derive-keys", 504, "in time"),
            ("/sleep", 504, "in time"),
            ("/hoard-random?100000", 504, "in time"),
            ("/allocate", 500, "MemoryError"),
            ("/recurse", 500, "RecursionError"),
            ("/recurse-in-c", 500, "call stack exhausted"),
            ("/trap", 500, "trapped"),
            ("/many-headers?100000", 500, "too many headers"),
            ("/long-header?1000000", 500, "too long"),
        ] {
            // In all its instances at a time.
            for response in arena.storm("hostile", path, 4) {
                arena.assert_refused(path, &response, status, logged);
            }
            assert_eq!(arena.get("hostile", "/hello").ok(), "hello", "after {path}");
        }
        for (path, answer) in [
            // 28 is ENOSPC, 29 EIO, and 51 what WASI makes of too many files.
            ("/fill-tmp?100000", " 29"),
            ("/fill-tmp?0", " 51"),
            ("/hoard-tmp", " 51"),
            ("/short-spin?100", "spun"),
            ("/send-when-full?900000", "filled, and refused"),
            ("/churn?40", "40"),
            ("/chatter?10000", "said"),
            ("/long-line?100000", "said"),
            ("/look-up?5", "5"),
        ] {
            for response in arena.storm("hostile", path, 4) {
                let text = response.ok();
                assert!(text.ends_with(answer), "{path}: {text}");
            }
        }
        let tiny = arena.get("hostile", "/tiny-writes?100000");
        assert_eq!(tiny.ok().len(), 100_000);
        assert!(arena.get("hostile", "/endless?10000").cut);
    });
    assert!(arena.peak() < 800 * MIB, "{} MiB", arena.peak() / MIB);
    arena.ctl(&["drain", "hostile"]).success();
    assert_eq!(arena.status("hostile")["in_work"], 0);
    assert!(arena.descriptors() <= before + 2, "{} descriptors, {before} before", arena.descriptors());
    arena.finish();
}

#[test]
fn crashes_in_a_row_are_held_back_whatever_comes_between() {
    let arena = Arena::start(&[("hostile", "limits = { body = \"1KiB\" }")]);
    arena.during(|| {
        let mut trapped = 0;
        for _ in 0..20 {
            trapped += usize::from(arena.get("hostile", "/trap").status == 500);
            // Answered without the app: it says nothing about it.
            let refused = ask(&mut arena.server.connect(), "hostile", "POST", "/read-slowly", &[b'x'; 2000]);
            assert!([413, 503].contains(&refused.status), "{}", refused.status);
        }
        assert!(trapped <= 7, "{trapped} traps");
    });
    assert_eq!(arena.status("hostile")["state"], "crashing");
    arena.finish();
}

#[test]
fn a_flood_of_failures_does_not_flood_the_log() {
    let arena = Arena::start(&[("hostile", "instances = { max = 1 }\nlimits = { queue = 0 }")]);
    let mut busy = arena.server.connect();
    send(&mut busy, "hostile", "GET", "/endless?100000", b"");
    assert_eq!(busy.read_head().status, 200);
    arena.during(|| {
        let refused = std::thread::scope(|scope| {
            let flood = || {
                let mut connection = arena.server.connect();
                let ask = |_| ask(&mut connection, "hostile", "GET", "/hello", b"").status;
                (0..2000).map(ask).filter(|status| *status == 503).count()
            };
            let clients: Vec<_> = (0..4).map(|_| scope.spawn(flood)).collect();
            clients.into_iter().map(|client| client.join().unwrap()).sum::<usize>()
        });
        assert_eq!(refused, 8000);
    });
    drop(busy);
    arena.ctl(&["drain", "hostile"]).success();
    let log = arena.finish();
    let said = log.matches("all instances are busy").count();
    assert!((100..2000).contains(&said), "{said}");
    assert!(log.contains("failures were not logged"), "{log}");
}

#[test]
fn a_flood_of_lines_does_not_drown_the_neighbours() {
    let arena = Arena::start(&[("hostile", "limits = { log_lines = 100 }\ninstances = { max = 4 }")]);
    arena.during(|| {
        for _ in 0..10 {
            for response in arena.storm("hostile", "/chatter?1000", 4) {
                response.ok();
            }
        }
    });
    arena.get("victim", "/log-lines").ok();
    arena.server.wait_for_log(&["app=victim", "to stderr"]);
    let log = arena.finish();
    let said = log.matches("chatter chatter").count();
    assert!((500..20_000).contains(&said), "{said} lines");
    assert!(log.contains("lines were dropped"), "{log}");
}

#[test]
fn clients_that_take_nothing_hold_only_their_own_tenant() {
    let arena =
        Arena::start(&[("hostile", "instances = { max = 4 }\nlimits = { queue = 4, queue_wait = \"1s\" }")]);
    arena.during(|| {
        let mut slow: Vec<_> = (0..4).map(|_| arena.server.connect()).collect();
        for connection in &mut slow {
            send(connection, "hostile", "GET", "/endless?100000", b"");
            assert_eq!(connection.read_head().status, 200);
        }
        for response in arena.storm("hostile", "/hello", 6) {
            arena.assert_refused("the queue", &response, 503, "busy");
        }
        assert!(arena.peak() < 400 * MIB, "{} MiB", arena.peak() / MIB);
        drop(slow);
        // Each notices that its client is gone.
        arena.ctl(&["drain", "hostile"]).success();
    });
    arena.finish();
}

#[test]
fn a_body_without_end_is_read_no_further_than_allowed() {
    let arena = Arena::start(&[("hostile", "limits = { body = \"100KiB\" }")]);
    arena.during(|| {
        let mut endless = arena.server.connect();
        endless.send("POST /read-slowly HTTP/1.1\r\nHost: hostile\r\nTransfer-Encoding: chunked\r\n\r\n");
        let piece = [b"2710\r\n".to_vec(), vec![b'x'; 10_000], b"\r\n".to_vec()].concat();
        let sent = (0..10_000).take_while(|_| endless.try_send(&piece).is_ok()).count();
        assert!(sent < 10_000, "100 MB were taken");
        let trailers = "X: y\r\n".repeat(100_000);
        let mut connection = arena.server.connect();
        connection
            .send("POST /read-slowly HTTP/1.1\r\nHost: hostile\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n");
        // Closed before all of it is sent, or answered with an error.
        let answered =
            connection.try_send(trailers + "\r\n").ok().and_then(|()| connection.try_read_response("POST"));
        assert!(answered.is_none_or(|response| response.status >= 400));
    });
    arena.finish();
}

#[test]
fn the_disk_is_filled_no_further_than_allowed() {
    let data = tempfile::tempdir().unwrap();
    let settings = format!(
        "data = {{ path = {:?}, quota = \"8MiB\", files = 1000 }}\ninstances = {{ max = 12 }}\n\
         limits = {{ timeout = \"20s\" }}",
        data.path()
    );
    let arena = Arena::start(&[("hostile", &settings)]);
    let before = arena.descriptors();
    arena.during(|| {
        let held: usize = arena
            .storm("hostile", "/hoard-data", 12)
            .into_iter()
            .map(|response| response.ok().split(' ').next().unwrap().parse::<usize>().unwrap())
            .sum();
        assert!((64..=512).contains(&held), "{held} open files");
        for path in ["/fill-data?0", "/fill-data?100000", "/churn-data?20"] {
            arena.storm("hostile", path, 8);
        }
    });
    let (mut files, mut bytes) = (0, 0);
    let mut directories = vec![data.path().to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            files += 1;
            if metadata.is_dir() {
                directories.push(entry.path());
            } else {
                bytes += metadata.len();
            }
        }
    }
    assert!(files <= 1000 && bytes <= 8 << 20, "{files} files with {bytes} bytes");
    arena.ctl(&["drain", "hostile"]).success();
    assert!(arena.descriptors() <= before + 2, "{} descriptors, {before} before", arena.descriptors());
    arena.finish();
}

#[test]
fn connections_and_lookups_are_bounded_for_a_whole_tenant() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().map(Result::unwrap).collect::<Vec<_>>());
    let settings = format!(
        "network = [\"127.0.0.1:{port}\", \"*.invalid:80\"]\nenv = {{ PORT = \"{port}\" }}\ninstances = {{ max = 8 }}"
    );
    let arena = Arena::start(&[("hostile", &settings)]);
    let before = arena.descriptors();
    arena.during(|| {
        arena.storm("hostile", "/look-up?3", 8);
        let held: usize = arena
            .storm("hostile", "/connect?100", 8)
            .into_iter()
            .map(|response| response.ok().split(' ').next().unwrap().parse::<usize>().unwrap())
            .sum();
        assert!((64..=256).contains(&held), "{held} connections");
    });
    arena.ctl(&["drain", "hostile"]).success();
    assert!(arena.descriptors() <= before + 2, "{} descriptors, {before} before", arena.descriptors());
    arena.finish();
}

#[test]
fn instances_that_rest_make_room_for_others() {
    let arena = Arena::start_with("instances = 4", &[("hostile", "instances = { max = 4 }")]);
    for response in arena.storm("hostile", "/short-spin?200", 4) {
        response.ok();
    }
    // Their owner keeps them for a while, unless somebody needs the room.
    assert_eq!(arena.get("victim", "/hello").ok(), "Hello, world!\n");
    // All are at work. Each tenant can have one more: requests wait for that
    // one in turn, and not for the attacker's.
    let mut busy: Vec<_> = (0..4).map(|_| arena.server.connect()).collect();
    for connection in &mut busy {
        send(connection, "hostile", "GET", "/endless?1000", b"");
        assert_eq!(connection.read_head().status, 200);
    }
    for _ in 0..10 {
        assert_eq!(arena.get("victim", "/hello").ok(), "Hello, world!\n");
    }
    for response in arena.storm("victim", "/served", 8) {
        response.ok();
    }
    let status = arena.status("victim");
    assert_eq!((&status["in_work"], &status["resting"]), (&0.into(), &1.into()));
    assert_eq!(arena.status("hostile")["in_work"], 4);
    // One that has its own has no other: that is nobody's crash.
    let mut last = arena.server.connect();
    send(&mut last, "victim", "GET", "/sleep?7", b"");
    wait_until(|| arena.status("victim")["in_work"] == 1);
    arena.assert_refused("full", &arena.get("victim", "/hello"), 503, "busy");
    last.read_response("GET").ok();
    assert_eq!(arena.status("victim")["state"], "serving");
    drop(busy);
    arena.ctl(&["drain", "hostile"]).success();
    arena.finish();
}

#[test]
fn all_tenants_together_hold_no_more_memory_than_the_server_has() {
    let attackers = [("hostile", "limits = { total_memory = \"10GiB\" }\ninstances = { max = 64 }"), PUPPET];
    let arena = Arena::start_with("memory = \"320MiB\"", &attackers);
    let held = |name: &str| arena.status(name)["memory"].as_u64().unwrap();
    // Instances that rest make room: each of these has another's in the way.
    for response in arena.storm("hostile", "/short-spin?200", 40) {
        assert!(matches!(response.status, 200 | 503), "{}", response.text());
        assert!(held("hostile") <= 320 * MIB);
    }
    let mut busy = Vec::new();
    let grow = Script::new().grow_memory(600).answer(OK);
    for _ in 0..4 {
        assert_eq!(arena.post("puppet", &grow).ok(), "fine");
        assert_eq!(arena.get("victim", "/hello").ok(), "Hello, world!\n");
    }
    // All are at work: who holds little still gets an instance.
    for _ in 0..40 {
        let mut connection = arena.server.connect();
        send(&mut connection, "hostile", "GET", "/endless?1000", b"");
        busy.push(connection);
    }
    let statuses: Vec<u16> = busy.iter_mut().map(|connection| connection.read_head().status).collect();
    assert!(statuses.contains(&200) && statuses.contains(&503), "{statuses:?}");
    // Instances hold no more than seven eighths. What answers hold on their way comes on top.
    let on_their_way = busy.len() as u64 * (16 << 10);
    assert!(held("hostile") <= 280 * MIB + on_their_way, "{}", held("hostile"));
    for _ in 0..5 {
        assert_eq!(arena.get("victim", "/hello").ok(), "Hello, world!\n");
    }
    arena.server.wait_for_log(&["no room for an instance"]);
    assert_eq!(arena.status("hostile")["state"], "serving");
    drop(busy);
    arena.wait_until("their instances hold more than seven eighths", || {
        arena.status("hostile")["in_work"] == 0 && held("hostile") <= 280 * MIB
    });
    arena.ctl(&["drain", "hostile"]).success();
    arena.finish();
}

#[test]
fn memory_that_is_given_back_goes_to_those_who_wait() {
    let attackers = [
        ("puppet", "limits = { memory = \"64MiB\" }"),
        ("hostile", "limits = { memory = \"64MiB\", queue_wait = \"300ms\" }"),
    ];
    let settings = "memory = \"64MiB\"\n[defaults]\nlimits = { memory = \"64MiB\", queue_wait = \"60s\" }";
    let arena = Arena::start_with(settings, &attackers);
    // It has most of what all may have, for as long as its client likes.
    let hold = Script::new().grow_memory(820).start(HEAD).write_raw(0, 1 << 20).times(1000).answer("");
    let mut holding = arena.server.connect();
    send(&mut holding, "puppet", "POST", "/", &hold);
    assert_eq!(holding.read_head().status, 200);
    let mut waiting: Vec<_> = (0..3).map(|_| arena.server.connect()).collect();
    for connection in &mut waiting {
        send(connection, "victim", "GET", "/hello", b"");
    }
    // Another one does not wait for so long.
    let asked = Instant::now();
    let refused = arena.get("hostile", "/hello");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert!(asked.elapsed() >= Duration::from_millis(300), "{:?}", asked.elapsed());
    arena.wait_until("they do not wait", || arena.status("victim")["in_work"] == 3);
    assert!(arena.held("victim") < MIB, "{}", arena.held("victim"));
    drop(holding);
    for connection in &mut waiting {
        assert_eq!(connection.read_response("GET").ok(), "Hello, world!\n");
    }
    arena.finish();
}

#[test]
fn who_has_several_instances_gives_one_up_for_those_who_have_none() {
    // Less than four instances of the one and one of the other have together.
    let settings = "memory = \"92MiB\"\n[defaults]\nlimits = { memory = \"64MiB\", queue_wait = \"60s\" }";
    let arena = Arena::start_with(settings, &[("puppet", "instances = { max = 4 }")]);
    let grow = Script::new().grow_memory(310).timer(500_000_000).wait().answer(OK);
    let mut growing: Vec<_> = (0..4).map(|_| arena.server.connect()).collect();
    growing.iter_mut().for_each(|connection| send(connection, "puppet", "POST", "/", &grow));
    growing.iter_mut().for_each(|connection| drop(connection.read_response("POST").ok()));
    assert!(arena.held("puppet") > 77 * MIB, "{}", arena.held("puppet"));
    let is_over = AtomicBool::new(false);
    let short = Script::new().timer(20_000_000).wait().answer(OK);
    std::thread::scope(|scope| {
        for _ in 0..24 {
            scope.spawn(|| {
                let mut connection = arena.server.connect();
                while !is_over.load(Ordering::Relaxed) {
                    assert_eq!(ask(&mut connection, "puppet", "POST", "/", &short).status, 200);
                }
            });
        }
        let _over = Over(&is_over);
        arena.wait_until("nobody waits", || arena.status("puppet")["in_work"] == 4);
        assert_eq!(arena.get("victim", "/hello").ok(), "Hello, world!\n");
    });
    arena.finish();
}

/// Runs clients of HTTP/2, but not for ever.
fn clients<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), work).await.unwrap() })
}

/// Asks the tenant `hostile`, and waits for nothing.
async fn begin(sender: &SendRequest<Bytes>, path: &str) -> ResponseFuture {
    let request = http::Request::get(format!("http://hostile{path}")).body(()).unwrap();
    sender.clone().ready().await.unwrap().send_request(request, true).unwrap().0
}

/// Asks for `path` a hundred times on each of so many connections, and takes
/// the heads only. Returns the connections and what came.
async fn hoard(
    arena: &Arena,
    path: &str,
    connections: usize,
) -> (Vec<SendRequest<Bytes>>, Vec<http::Response<h2::RecvStream>>) {
    let (mut senders, mut asked, mut responses) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..connections {
        let sender = arena.closed_window().await;
        for _ in 0..100 {
            asked.push(begin(&sender, path).await);
        }
        senders.push(sender);
    }
    for response in asked {
        responses.push(response.await.unwrap());
    }
    (senders, responses)
}

fn count(responses: &[http::Response<h2::RecvStream>], status: u16) -> usize {
    responses.iter().filter(|response| response.status() == status).count()
}

#[test]
fn whole_responses_that_nobody_takes_are_bounded() {
    let limits = "limits = { memory = \"64MiB\", total_memory = \"96MiB\" }\ninstances = { max = 4 }";
    let arena = Arena::start(&[("hostile", limits)]);
    arena.get("hostile", "/hello").ok();
    let before = arena.memory("RssAnon:");
    arena.during(|| {
        clients(async {
            let hoarded = hoard(&arena, "/whole?900000", 4).await;
            let (fine, refused) = (count(&hoarded.1, 200), count(&hoarded.1, 503));
            assert!(fine > 10 && refused > 100 && fine + refused == 400, "{fine} and {refused}");
            let held = arena.held("hostile");
            assert!((50 * MIB..97 * MIB).contains(&held), "{held}");
            let grown = arena.memory("RssAnon:").saturating_sub(before);
            assert!(grown < 160 * MIB, "{} MiB more", grown / MIB);
        });
        arena.server.wait_for_log(&["hostile", "holds as much memory as it may"]);
        arena.wait_until("nothing came free", || arena.get("hostile", "/whole?900000").status == 200);
    });
    arena.finish();
}

#[test]
fn heads_that_nobody_takes_are_counted() {
    let arena = Arena::start(&[("hostile", "instances = { max = 1 }")]);
    arena.get("hostile", "/hello").ok();
    let before = arena.held("hostile");
    // Bodies of four bytes, or of none.
    for method in ["GET", "HEAD"] {
        // A client that asks a hundred times and reads no byte. By hand (RFC 9113
        // section 4.1, RFC 7541 section 6), for a library reads whatever comes.
        let field = |name: u8, value: &str| [&[name, value.len() as u8], value.as_bytes()].concat();
        let head =
            [field(2, method), vec![0x86], field(4, "/long-header?110000"), field(1, "hostile")].concat();
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
        for stream in (1..200u32).step_by(2) {
            sent.extend_from_slice(&[0, 0, head.len() as u8, 1, 5]);
            sent.extend_from_slice(&stream.to_be_bytes());
            sent.extend_from_slice(&head);
        }
        let answered = arena.status("hostile")["requests"].as_u64().unwrap();
        let mut connection = arena.server.connect();
        connection.send(sent);
        arena.wait_until("they are not counted", || {
            let status = arena.status("hostile");
            status["requests"].as_u64().unwrap() == answered + 100
                && status["in_work"] == 0
                && status["memory"].as_u64().unwrap() > before + 2 * MIB
        });
        drop(connection);
        arena.wait_until("they are still counted", || arena.held("hostile") < before + MIB);
    }
    arena.finish();
}

#[test]
fn requests_that_wait_are_counted() {
    let limits = "limits = { queue = 100, queue_wait = \"60s\" }\ninstances = { max = 1 }";
    let arena = Arena::start(&[("hostile", limits)]);
    let mut busy = arena.server.connect();
    send(&mut busy, "hostile", "GET", "/endless?100000", b"");
    assert_eq!(busy.read_head().status, 200);
    let before = arena.held("hostile");
    let path = format!("/hello?{}", "x".repeat(4000));
    let mut waiting: Vec<_> = (0..30).map(|_| arena.server.connect()).collect();
    for (index, connection) in waiting.iter_mut().enumerate() {
        let length = 60_000;
        connection.send(format!("POST {path} HTTP/1.1\r\nHost: hostile\r\nContent-Length: {length}\r\n\r\n"));
        // Some of them do not even send their body.
        if index % 2 == 0 {
            connection.send(vec![b'x'; length]);
        }
    }
    arena.wait_until("they are not counted", || arena.held("hostile") > before + 30 * 64_000);
    drop((waiting, busy));
    arena.wait_until("they are still counted", || arena.held("hostile") <= before);
    arena.finish();
}

#[test]
fn files_that_nobody_takes_are_bounded() {
    let data = tempfile::tempdir().unwrap();
    let settings = format!(
        "data = {{ path = {:?} }}\ninstances = {{ max = 4 }}\nlimits = {{ queue = 1000, queue_wait = \"8s\" }}",
        data.path()
    );
    let arena = Arena::start(&[("hostile", &settings)]);
    arena.get("hostile", "/send-data?100000").ok();
    arena.get("victim", "/hello").ok();
    let before = arena.descriptors();
    arena.during(|| {
        clients(async {
            // Those of the app are parts of one.
            let own = hoard(&arena, "/send-own", 1).await;
            assert_eq!(count(&own.1, 200), 100);
            assert!(
                arena.descriptors() < before + 20,
                "{} descriptors, {before} before",
                arena.descriptors()
            );
            drop(own);
            arena.wait_until("the connections stay", || arena.descriptors() <= before + 3);
            let hoarded = hoard(&arena, "/send-data?100000", 5).await;
            assert!(count(&hoarded.1, 200) >= 200, "{}", count(&hoarded.1, 200));
            let open = arena.descriptors() - before;
            assert!((150..290).contains(&open), "{open} descriptors");
        });
        arena.ctl(&["drain", "hostile"]).success();
        arena.wait_until("files stay open", || arena.descriptors() <= before + 3);
    });
    arena.finish();
}

#[test]
fn a_file_counts_for_the_quota_until_it_is_sent() {
    let data = tempfile::tempdir().unwrap();
    let settings =
        format!("data = {{ path = {:?}, quota = \"30MiB\" }}\ninstances = {{ max = 1 }}", data.path());
    let arena = Arena::start(&[("hostile", &settings)]);
    let mut slow = arena.server.connect();
    send(&mut slow, "hostile", "GET", "/send-data?20000000", b"");
    assert_eq!(slow.read_head().status, 200);
    assert_eq!(arena.get("hostile", "/remove-data").ok(), "1");
    assert_eq!(arena.get("hostile", "/send-data?20000001").status, 500, "there is no room for both");
    assert!(arena.get("hostile", "/remove-data").status == 200);
    drop(slow);
    arena.wait_until("it still counts", || {
        arena.get("hostile", "/remove-data").ok();
        arena.get("hostile", "/send-data?20000002").status == 200
    });
    arena.finish();
}

#[test]
fn the_time_of_a_response_is_bounded_whatever_its_kind() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(files.path().join("file"), vec![b'x'; 1_000_000]).unwrap();
    let settings = format!(
        "data = {{ path = {:?} }}\nstatic = {{ \"/files\" = {:?} }}\nlimits = {{ response_time = \"1s\" }}",
        data.path(),
        files.path()
    );
    let arena = Arena::start(&[("hostile", &settings)]);
    clients(async {
        for path in ["/whole?900000", "/endless?1000", "/send-data?1000000", "/files/file"] {
            let sender = arena.closed_window().await;
            let response = begin(&sender, path).await.await.unwrap();
            assert_eq!(response.status(), 200, "{path}");
            let ended = response.into_body().data().await;
            assert!(ended.unwrap().unwrap_err().is_reset(), "{path}");
            // The connection goes on.
            assert_eq!(begin(&sender, "/hello").await.await.unwrap().status(), 200, "{path}");
        }
    });
    arena.ctl(&["drain", "hostile"]).success();
    arena.ctl(&["resume", "hostile"]).success();
    // More than the sockets' buffers take.
    for path in ["/endless?100000", "/send-data?40000000"] {
        arena.wait_until("nothing comes to rest", || arena.status("hostile")["in_work"] == 0);
        let before = arena.descriptors();
        let mut slow = arena.server.connect();
        send(&mut slow, "hostile", "GET", path, b"");
        assert_eq!(slow.read_head().status, 200);
        assert!(arena.descriptors() > before);
        arena.wait_until("the connection stays", || arena.descriptors() <= before);
    }
    // One that is taken in time is whole.
    assert_eq!(arena.get("hostile", "/send-data?1000000").ok().len(), 1_000_000);
    arena.finish();
}

#[test]
fn key_derivations_of_others_hold_up_nobodys_login() {
    let directory = tempfile::tempdir().unwrap();
    let app = guest("behaviours");
    let mut config = String::from("[server]\ncontrol = \"unix:control.sock\"\n");
    for name in ["victim", "one", "two"] {
        config += &format!(
            "[[tenant]]\nname = {name:?}\napp = {app:?}\nhosts = [{name:?}]\nlimits = {{ timeout = \"8s\" }}\n"
        );
    }
    let path = directory.path().join("wsgi-wasm.toml");
    std::fs::write(&path, config).unwrap();
    let server = Server::spawn(wsgi_wasm().args(["serve", "--bind", "127.0.0.1:0", "--config"]).arg(path));
    let arena = Arena { directory, server };
    // A cost of some ten milliseconds, and one of some scrypt passes.
    let login = "import hashlib\nresult = [hashlib.pbkdf2_hmac('sha256', b'p', b's', 20_000).hex(), \
                 hashlib.scrypt(b'p', salt=b's', n=1 << 12, r=8, p=1).hex()]";
    let hash = || ask(&mut arena.server.connect(), "victim", "POST", "/run", login.as_bytes()).ok();
    let expected = hash();
    // The most that one call may ask for, again and again, in many instances.
    let attacks = [
        "pbkdf2_hmac('sha512', b'p', b's', 5_000_000)",
        "pbkdf2_hmac('sha3_512', b'p', b's', 5_000_000)",
        "pbkdf2_hmac('sha224', b'p', bytes(1 << 16), 1, 65_536)",
        "scrypt(b'p', salt=b's', n=1 << 17, r=8, p=1, maxmem=1 << 30)",
    ];
    let mut busy = Vec::new();
    for name in ["one", "two"] {
        for attack in attacks {
            let code = format!("import hashlib\nwhile True:\n    hashlib.{attack}");
            let mut connection = arena.server.connect();
            send(&mut connection, name, "POST", "/run", code.as_bytes());
            busy.push(connection);
        }
    }
    let at_work = |name| arena.status(name)["in_work"] == attacks.len();
    wait_until(|| at_work("one") && at_work("two"));
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(hash(), expected);
        assert!(start.elapsed().as_secs() < 4, "a login took {:?}", start.elapsed());
    }
    for mut connection in busy {
        assert_eq!(connection.read_response("POST").status, 504);
    }
    // What costs more than it seems to is refused.
    for attack in [
        "hashlib.pbkdf2_hmac('sha224', b'p', bytes(4_000_000), 1, 65_536)",
        "kdf._derivation.pbkdf2_hmac('sha224', b'p', bytes(4_000_000), 1, 65_536)",
        "hashlib.pbkdf2_hmac('sha224', b'p', bytes(1 << 16), 3000, 65_536)",
        "hashlib.scrypt(b'p', salt=bytes(1 << 16), n=2, r=1 << 17, p=1, maxmem=1 << 30)",
    ] {
        let code = [
            "import hashlib\nfrom wsgi_wasm import kdf\ntry:\n    ",
            attack,
            "\nexcept ValueError:\n    result = 'refused'",
        ];
        let refused = ask(&mut arena.server.connect(), "one", "POST", "/run", code.concat().as_bytes());
        assert_eq!(refused.ok(), "\"refused\"", "{attack}");
    }
    assert_eq!(hash(), expected);
    arena.server.finish();
}

/// A server with the raw guest `handles`, which has `/tmp`, `/data` and a
/// connection to a port, and what that is.
fn arena_with_handles(data: &Path) -> (Arena, u32) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().map(Result::unwrap).collect::<Vec<_>>());
    let settings = format!(
        "data = {{ path = {data:?}, quota = \"8MiB\", files = 1000 }}\nisolation = \"request\"\n\
         network = [\"127.0.0.1:{port}\", \"localhost:{port}\"]\n\
         limits = {{ timeout = \"4s\", memory = \"64MiB\", tmp = \"8MiB\" }}"
    );
    (Arena::start(&[("handles", &settings)]), port.into())
}

/// What became of the calls: `+` or `-` for each.
#[track_caller]
fn signs(arena: &Arena, what: &str, calls: &Calls) -> String {
    let response = arena.post("handles", &calls.bytes());
    assert_eq!(response.status, 200, "{what}: {}", response.text());
    response.text().chars().step_by(2).collect()
}

#[test]
fn names_by_hand_lead_nowhere() {
    let outer = tempfile::tempdir().unwrap();
    std::fs::write(outer.path().join("secret"), "x").unwrap();
    let data = outer.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let (arena, _) = arena_with_handles(&data);
    let (long, deep, up) = ("x".repeat(60_000), "x/".repeat(20_000), "../".repeat(10_000));
    arena.during(|| {
        for name in [
            "..",
            "../secret",
            "../data/../secret",
            "d/../../secret",
            "/",
            "/etc/passwd",
            "//etc/passwd",
            "",
            "\0",
            "a\0b",
            "../secret\0",
            &long,
            &deep,
            &up,
            &format!("{up}etc/passwd"),
        ] {
            let mut calls = Calls::with_directories();
            for directory in [0, 1] {
                calls = calls.open(directory, name);
                for operation in [
                    handles::MAKE_DIRECTORY,
                    handles::REMOVE_DIRECTORY,
                    handles::UNLINK,
                    handles::READ_LINK,
                    handles::SYMLINK,
                    handles::LINK,
                ] {
                    calls = calls.on(operation, directory).bytes_at(1, name).bytes_at(3, "new");
                }
                calls = calls.on(handles::RENAME, directory).bytes_at(1, name).register(3, 1 - directory);
            }
            let shown: String = name.chars().take(30).collect();
            assert_eq!(signs(&arena, &shown, &calls), "-".repeat(16), "{shown:?}");
        }
        // No way leads from one mount to the other, or is a link.
        let calls = Calls::with_directories().open(0, "f").open(1, "g").on(handles::RENAME, 0);
        let calls = calls.bytes_at(1, "f").register(3, 1).on(handles::SYMLINK, 1).bytes_at(1, "../secret");
        let calls = calls.bytes_at(3, "s").on(handles::LINK, 1).bytes_at(1, "g").bytes_at(3, "h");
        assert_eq!(signs(&arena, "links", &calls), "++---");
        let name = arena
            .post("handles", &Calls::with_directories().on(handles::UNLINK, 1).bytes_at(1, b"\xff").bytes());
        arena.assert_refused("no text", &name, 500, "utf-8");
    });
    let names: Vec<_> =
        std::fs::read_dir(outer.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 1);
    arena.finish();
}

#[test]
fn files_by_hand_take_no_number_too_far() {
    let data = tempfile::tempdir().unwrap();
    let (arena, _) = arena_with_handles(data.path());
    let far = [u64::MAX, u64::MAX - 3, 1 << 63, (1 << 63) - 1, 1 << 48];
    arena.during(|| {
        for directory in [0, 1] {
            let start = || Calls::with_directories().open(directory, "f").keep(2);
            for number in far {
                let what = format!("{number} in {directory}");
                let calls = start().on(handles::SET_SIZE, 2).numbers(number, 0);
                let calls = calls.on(handles::WRITE, 2).bytes_at(1, "xxxxxx").numbers(number, 0);
                // In memory a hole costs nothing, and has to be no burden either.
                let holes = directory == 0 && number < 1 << 63;
                let expected = if holes { ["++-", "+++"] } else { ["+--"; 2] };
                assert!(expected.contains(&&*signs(&arena, &what, &calls)), "{what}");
                let calls =
                    calls.on(handles::READ, 2).numbers(u64::MAX, 0).on(handles::READ_STREAM, 2).keep(3);
                let calls = calls.on(handles::WAIT_AND_TAKE, 3).numbers(u64::MAX, 0);
                let calls = calls.on(handles::SKIP, 3).numbers(u64::MAX, 0);
                assert!(signs(&arena, &what, &calls)[3..].starts_with("++"), "{what}");
                // An end, or an error: but an answer.
                let calls = start().on(handles::READ, 2).numbers(number, number);
                let calls =
                    calls.on(handles::READ, 2).numbers(number, 0).on(handles::READ, 2).numbers(1, number);
                let calls = calls.on(handles::ADVISE, 2).numbers(number, number).on(handles::SYNC, 2);
                let calls = calls.on(handles::READ_STREAM, 2).numbers(number, 0).keep(3);
                let calls = calls.on(handles::TAKE, 3).numbers(number, 0).on(handles::WAIT_AND_TAKE, 3);
                let calls = calls.numbers(number, 0).on(handles::SKIP, 3).numbers(number, 0);
                assert!(signs(&arena, &what, &calls).starts_with('+'));
                let calls = start().on(handles::WRITE_STREAM, 2).numbers(number, 0).keep(3);
                let calls = calls.on(handles::CHECK_WRITE, 3).on(handles::PUT, 3).bytes_at(1, "xxxxxx");
                let calls = calls.on(handles::FLUSH, 3).on(handles::CHECK_WRITE, 3);
                let written = if holes { "++++" } else { "++++-" };
                assert!(signs(&arena, &what, &calls).starts_with(written), "{what}");
                let calls = start().on(handles::READ_STREAM, 2).keep(3).on(handles::APPEND_STREAM, 2).keep(4);
                let calls = calls.on(handles::SPLICE, 4).register(1, 3).numbers(number, 0);
                let calls = calls.on(handles::SPLICE_AND_WAIT, 4).register(1, 3).numbers(number, 0);
                assert!(signs(&arena, &what, &calls).starts_with("+++"));
            }
        }
        for (what, calls, logged) in [
            (
                "more than may be written",
                Calls::with_directories()
                    .open(0, "f")
                    .keep(2)
                    .on(handles::WRITE_STREAM, 2)
                    .keep(3)
                    .on(handles::PUT, 3)
                    .bytes_at(1, "xxx")
                    .times(1000),
                "trapped",
            ),
            (
                "zeroes without end",
                Calls::with_directories()
                    .open(0, "f")
                    .keep(2)
                    .on(handles::WRITE_STREAM, 2)
                    .keep(3)
                    .on(handles::ZEROES, 3)
                    .numbers(u64::MAX, 0),
                "trapped",
            ),
        ] {
            let response = arena.post("handles", &calls.bytes());
            if response.status != 200 {
                arena.assert_refused(what, &response, 500, logged);
            }
        }
        // A stream without end is one until there is no room.
        for directory in [0, 1] {
            let calls =
                Calls::with_directories().open(directory, "g").keep(2).on(handles::APPEND_STREAM, 2).keep(3);
            let calls = calls.on(handles::PUT_AND_WAIT, 3).bytes_at(1, vec![b'x'; 4000]).times(3000);
            assert_eq!(signs(&arena, "no end", &calls), "++-");
        }
    });
    assert!(arena.peak() < 400 * MIB, "{} MiB", arena.peak() / MIB);
    arena.finish();
}

#[test]
fn handles_without_end_or_order_cost_one_instance() {
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("f"), vec![b'x'; 1 << 20]).unwrap();
    let (arena, _) = arena_with_handles(data.path());
    let before = arena.descriptors();
    let start = |directory| Calls::with_directories().open(directory, "f").keep(2);
    let polled = |directory| {
        let calls = start(directory).on(handles::READ_STREAM, 2).keep(3);
        calls.on(handles::POLL_INPUT, 3).keep(4)
    };
    arena.during(|| {
        for directory in [0, 1] {
            for (what, calls, expected) in [
                ("listings", start(directory).on(handles::LIST, directory).times(1500), "+-"),
                ("files", start(directory).open(directory, "f").times(1500), "+-"),
                ("streams", start(directory).on(handles::READ_STREAM, 2).times(1500), "+-"),
                ("writers", start(directory).on(handles::WRITE_STREAM, 2).times(1500), "+-"),
                (
                    "a listing that is asked on and on",
                    start(directory)
                        .on(handles::LIST, directory)
                        .keep(3)
                        .on(handles::NEXT_ENTRY, 3)
                        .times(5000),
                    "+++",
                ),
                (
                    "a stream after its file",
                    start(directory)
                        .on(handles::READ_STREAM, 2)
                        .keep(3)
                        .on(handles::DROP_DESCRIPTOR, 2)
                        .on(handles::WAIT_AND_TAKE, 3)
                        .numbers(0, 0)
                        .on(handles::DROP_INPUT, 3),
                    "+++++",
                ),
            ] {
                assert_eq!(signs(&arena, what, &calls), expected, "{what} in {directory}");
            }
            for (what, calls, status, logged) in [
                ("pollables", polled(directory).on(handles::POLL_INPUT, 3).times(1500), 500, "trapped"),
                ("a parent before its child", polled(directory).on(handles::DROP_INPUT, 3), 500, "children"),
                (
                    "a writer before its pollable",
                    start(directory)
                        .on(handles::WRITE_STREAM, 2)
                        .keep(3)
                        .on(handles::POLL_OUTPUT, 3)
                        .on(handles::DROP_OUTPUT, 3),
                    500,
                    "children",
                ),
                (
                    "a pollable twice",
                    polled(directory).on(handles::DROP_POLLABLE, 4).times(2),
                    500,
                    "trapped",
                ),
                (
                    "a file after its end",
                    start(directory).on(handles::DROP_DESCRIPTOR, 2).on(handles::SYNC, 2),
                    500,
                    "trapped",
                ),
                ("one kind for another", start(directory).on(handles::TAKE, 2), 500, "trapped"),
                ("a listing that is a file", start(directory).on(handles::DROP_LISTING, 2), 500, "trapped"),
                ("a handle of nobody", Calls::new().call(handles::SYNC).number(0, u32::MAX), 500, "trapped"),
                (
                    "polls without end",
                    polled(directory).on(handles::POLL, 4).number(2, 2000).times(1 << 30),
                    504,
                    "in time",
                ),
                ("waits without end", polled(directory).on(handles::BLOCK, 4).times(1 << 30), 504, "in time"),
                ("looks without end", polled(directory).on(handles::READY, 4).times(1 << 30), 504, "in time"),
                (
                    "reads without end",
                    start(directory).on(handles::READ, 2).numbers(1 << 16, 0).times(1 << 30),
                    504,
                    "in time",
                ),
                (
                    "listings without end",
                    start(directory).on(handles::NEXT_ENTRY, 2).times(1),
                    500,
                    "trapped",
                ),
            ] {
                let response = arena.post("handles", &calls.bytes());
                arena.assert_refused(what, &response, status, logged);
                assert_eq!(signs(&arena, what, &start(directory)), "+", "after {what}");
            }
        }
    });
    assert!(arena.peak() < 400 * MIB, "{} MiB", arena.peak() / MIB);
    arena.ctl(&["drain", "handles"]).success();
    assert!(arena.descriptors() <= before + 2, "{} descriptors, {before} before", arena.descriptors());
    arena.finish();
}

#[test]
fn sockets_by_hand_come_to_an_end() {
    let data = tempfile::tempdir().unwrap();
    let (arena, port) = arena_with_handles(data.path());
    let before = arena.descriptors();
    const LOOPBACK: u32 = 0x7f00_0001;
    // A socket in register 2, the network in 1.
    let start = || Calls::new().call(handles::NETWORK).keep(1).call(handles::TCP).keep(2);
    let to = |calls: Calls, operation, address, port| {
        calls.on(operation, 2).register(1, 1).number(2, port).number(3, address)
    };
    let connected = || {
        let calls = to(start(), handles::CONNECT, LOOPBACK, port).on(handles::POLL_TCP, 2).keep(5);
        let calls = calls.on(handles::BLOCK, 5).on(handles::DROP_POLLABLE, 5);
        calls.on(handles::FINISH_CONNECT, 2).keep_at(3, 8).on(handles::CHECK_WRITE, 3)
    };
    arena.during(|| {
        for (what, calls, expected) in [
            ("its own end", to(start(), handles::BIND, LOOPBACK, 0).on(handles::FINISH_BIND, 2), "++--"),
            ("a listener", start().on(handles::LISTEN, 2).on(handles::FINISH_LISTEN, 2), "++--"),
            ("clients of nobody", start().on(handles::ACCEPT, 2).on(handles::SHUT_DOWN, 2), "++--"),
            ("nothing begun", start().on(handles::FINISH_CONNECT, 2), "++-"),
            ("another port", to(start(), handles::CONNECT, LOOPBACK, 1), "++-"),
            ("another address", to(start(), handles::CONNECT, 0xa9fe_a9fe, port), "++-"),
            ("this machine by another name", to(start(), handles::CONNECT, 0, port), "++-"),
            ("sockets", start().call(handles::TCP).times(500), "++-"),
            ("another name", start().on(handles::LOOK_UP, 1).bytes_at(1, "metadata.google.internal"), "++-"),
            ("no name", start().on(handles::LOOK_UP, 1).bytes_at(1, "\0".repeat(60_000)), "++-"),
        ] {
            assert_eq!(signs(&arena, what, &calls), expected, "{what}");
        }
        // No limit is so far that it would be a harm to ask for it.
        let calls = start().on(handles::BACKLOG, 2).numbers(u64::MAX, 0).on(handles::KEEP_ALIVE, 2);
        let calls = calls.numbers(u64::MAX, 0).on(handles::BUFFER, 2).numbers(u64::MAX, 0);
        assert!(signs(&arena, "limits", &calls).starts_with("++"));
        // Datagrams: a socket, perhaps, but no way for it.
        let calls = Calls::new().call(handles::NETWORK).keep(1).call(handles::UDP).keep(2);
        let calls = to(calls, handles::UDP_BIND, LOOPBACK, 0).on(handles::UDP_FINISH_BIND, 2);
        let bound = arena.post("handles", &calls.on(handles::DROP_UDP, 2).bytes());
        let calls = Calls::new().call(handles::UDP).keep(2).on(handles::UDP_STREAM, 2);
        let sent = arena.post("handles", &calls.number(2, port).number(3, LOOPBACK).bytes());
        for udp in [bound, sent] {
            assert!(udp.status == 500 || udp.text().contains('-'), "{}", udp.text());
        }
        // Begun and left, in all places that there are.
        let mut calls = Calls::new().call(handles::NETWORK).keep(1);
        for _ in 0..60 {
            calls = to(calls.call(handles::TCP).keep(2), handles::CONNECT, LOOPBACK, port);
        }
        for _ in 0..4 {
            arena.post("handles", &calls.bytes());
        }
        let look_up = start().on(handles::LOOK_UP, 1).bytes_at(1, "localhost").times(100);
        assert!(signs(&arena, "lookups", &look_up).starts_with("++"));
        let calls = start().on(handles::LOOK_UP, 1).bytes_at(1, "localhost").keep(3);
        let calls = calls.on(handles::POLL_ADDRESSES, 3).keep(4).on(handles::BLOCK, 4);
        let calls = calls.on(handles::DROP_POLLABLE, 4).on(handles::NEXT_ADDRESS, 3).times(100);
        let calls = calls.on(handles::DROP_ADDRESSES, 3);
        assert_eq!(signs(&arena, "addresses", &calls), "++++++++");
        for (what, calls, logged) in [
            ("a socket before its streams", connected().on(handles::DROP_TCP, 2), "children"),
            (
                "a socket before its pollable",
                start().on(handles::POLL_TCP, 2).on(handles::DROP_TCP, 2),
                "children",
            ),
            ("a socket twice", start().on(handles::DROP_TCP, 2).times(2), "trapped"),
            (
                "a network that is gone",
                to(start().on(handles::DROP_NETWORK, 1), handles::CONNECT, LOOPBACK, port),
                "trapped",
            ),
        ] {
            arena.assert_refused(what, &arena.post("handles", &calls.bytes()), 500, logged);
        }
    });
    arena.ctl(&["drain", "handles"]).success();
    assert!(arena.descriptors() <= before + 2, "{} descriptors, {before} before", arena.descriptors());
    arena.finish();
}
