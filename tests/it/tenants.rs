use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::harness::{Finished, Response, Server, guest, run, wait_until, wsgi_wasm};

/// A server of a configuration of its own.
struct Platform {
    directory: tempfile::TempDir,
    server: Server,
}

impl Platform {
    /// Serves `config`, in which `APP` stands for the guest `behaviours`.
    fn start(config: &str) -> Platform {
        let directory = tempfile::tempdir().unwrap();
        write_config(directory.path(), config);
        Platform::start_in(directory)
    }

    fn start_in(directory: tempfile::TempDir) -> Platform {
        let server = Server::spawn(
            wsgi_wasm().args(["serve", "--bind", "127.0.0.1:0", "--config"]).arg(path_in(&directory)),
        );
        Platform { directory, server }
    }

    /// Asks `host` for `path`.
    fn get(&self, host: &str, path: &str) -> Response {
        let mut connection = self.server.connect();
        connection.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        connection.read_response("GET")
    }

    fn ctl(&self, arguments: &[&str]) -> Finished {
        let control = format!("unix:{}", self.directory.path().join("control.sock").display());
        run(wsgi_wasm().args(["ctl", "--control", &control]).args(arguments))
    }

    /// Stops the server, and starts it again with what it left.
    fn restart(self) -> Platform {
        self.server.finish();
        Platform::start_in(self.directory)
    }

    /// What `ctl list` says of the tenant `name`.
    fn status(&self, name: &str) -> Value {
        let list: Value = serde_json::from_str(&self.ctl(&["list", "--json"]).success().stdout).unwrap();
        list.as_array().unwrap().iter().find(|tenant| tenant["name"] == name).unwrap().clone()
    }
}

fn path_in(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("wsgi-wasm.toml")
}

fn write_config(directory: &Path, config: &str) {
    let app = guest("behaviours");
    let config = config.replace("APP", app.to_str().unwrap());
    fs::write(directory.join("wsgi-wasm.toml"), format!("server.control = \"unix:control.sock\"\n{config}"))
        .unwrap();
}

fn environ(response: Response) -> Value {
    serde_json::from_str(&response.ok()).unwrap()
}

const TWO: &str = r#"
[[tenant]]
name = "one"
app = "APP"
hosts = ["one.example", "*.one.example"]
env = { WHO = "one" }
[[tenant]]
name = "shop"
app = "APP"
hosts = ["one.example"]
path = "/shop"
env = { WHO = "shop" }
[[tenant]]
name = "two"
app = "APP"
hosts = ["two.example"]
env = { WHO = "two" }
instances = { max = 1 }
"#;

#[test]
fn requests_go_to_the_tenant_of_their_host_and_path() {
    let platform = Platform::start(TWO);
    let who = |host, path| -> Value {
        let environment: Value = serde_json::from_str(&platform.get(host, path).ok()).unwrap();
        environment["WHO"].clone()
    };
    assert_eq!(who("one.example", "/environment"), "one");
    assert_eq!(who("ONE.example:80", "/environment"), "one");
    assert_eq!(who("deep.down.one.example", "/environment"), "one");
    assert_eq!(who("one.example", "/shop/environment"), "shop");
    assert_eq!(who("one.example", "/sh%6fp/environment"), "shop");
    assert_eq!(who("two.example", "/environment"), "two");
    let mounted = environ(platform.get("one.example", "/shop/show-environ"));
    assert_eq!((&mounted["SCRIPT_NAME"], &mounted["PATH_INFO"]), (&"/shop".into(), &"/show-environ".into()));
    assert_eq!(mounted["REQUEST_URI"], "/shop/show-environ");
    // Not below the mount, though it starts with the same letters.
    assert_eq!(platform.get("one.example", "/shopping").text(), "no such route");
    assert_eq!(platform.get("three.example", "/hello").status, 421);
    platform.server.finish();
}

#[test]
fn static_files_of_a_tenant_are_below_its_path() {
    let files = tempfile::tempdir().unwrap();
    fs::write(files.path().join("a.css"), "body {}").unwrap();
    let mount = format!("static = {{ \"/assets\" = \"{}\" }}", files.path().display());
    let platform = Platform::start(&TWO.replace("path = \"/shop\"", &format!("path = \"/shop\"\n{mount}")));
    let found = platform.get("one.example", "/shop/assets/a.css");
    assert_eq!(found.header("content-type"), Some("text/css; charset=utf-8"));
    assert_eq!(found.ok(), "body {}");
    assert_eq!(platform.get("one.example", "/sh%6fp/assets/a.css").ok(), "body {}");
    let absent = platform.get("one.example", "/shop/assets/b.css");
    assert!(absent.status == 404 && absent.text().contains("request "), "{}", absent.text());
    // Nobody else's.
    for (host, path) in [("one.example", "/assets/a.css"), ("two.example", "/shop/assets/a.css")] {
        assert_eq!(platform.get(host, path).text(), "no such route");
    }
    platform.ctl(&["suspend", "shop"]).success();
    assert_eq!(platform.get("one.example", "/shop/assets/a.css").status, 503);
    platform.server.finish();
}

#[test]
fn limits_are_each_tenants_own() {
    let platform = Platform::start(
        r#"
        [defaults.limits]
        timeout = "300ms"
        [[tenant]]
        name = "slow"
        app = "APP"
        hosts = ["slow"]
        limits = { timeout = "30s", cpu = "300ms", response = "1MiB" }
        [[tenant]]
        name = "quick"
        app = "APP"
        hosts = ["quick"]
        limits = { body = "1KiB", requests_per_second = 3 }
        [[tenant]]
        name = "poor"
        app = "APP"
        hosts = ["poor"]
        limits = { timeout = "30s", cpu_per_minute = "200ms" }
        "#,
    );
    assert_eq!(platform.get("quick", "/sleep?0.6").status, 504);
    assert_eq!(platform.get("slow", "/sleep?0.6").ok(), "slept");
    assert_eq!(platform.get("slow", "/spin").status, 504, "stopped by its processor time");
    assert_eq!(platform.get("slow", "/large-whole?1048576").status, 200);
    assert!(platform.get("slow", "/large?2").cut, "more than it may send");

    let statuses: Vec<u16> = (0..6).map(|_| platform.get("quick", "/hello").status).collect();
    assert!(statuses.contains(&429), "{statuses:?}");
    assert!(statuses.contains(&200), "{statuses:?}");

    let spent = platform.get("poor", "/compute?1");
    assert_eq!(spent.status, 200);
    let refused = platform.get("poor", "/hello");
    assert_eq!(refused.status, 503);
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    platform.server.finish();
}

#[test]
fn one_tenant_does_not_see_or_stop_another() {
    let platform = Platform::start(TWO);
    // All instances of `two` are taken, and it burns both processors.
    let mut busy: Vec<_> = (0..4).map(|_| platform.server.connect()).collect();
    for connection in &mut busy {
        connection.send("GET /compute?0.7 HTTP/1.1\r\nHost: two.example\r\n\r\n");
    }
    for _ in 0..10 {
        assert_eq!(platform.get("one.example", "/temporary-files").status, 200);
    }
    for mut connection in busy {
        connection.read_response("GET").ok();
    }
    assert_eq!(platform.get("two.example", "/temporary-files").ok(), "[]");
    platform.server.finish();
}

#[test]
fn a_tenant_that_crashes_again_and_again_is_held_back() {
    let platform = Platform::start(TWO);
    let statuses: Vec<u16> = (0..8).map(|_| platform.get("two.example", "/abort").status).collect();
    assert_eq!(statuses[..5], [500; 5]);
    assert_eq!(statuses[5..], [503; 3]);
    assert_eq!(platform.status("two")["state"], "crashing");
    assert!(platform.ctl(&["errors", "two"]).success().stdout.contains("the guest trapped"));
    assert_eq!(platform.get("one.example", "/hello").status, 200);
    platform.server.finish();
}

#[test]
fn tenants_are_suspended_and_resumed_and_it_lasts() {
    let platform = Platform::start(TWO);
    platform.ctl(&["suspend", "two"]).success();
    assert_eq!(platform.get("two.example", "/hello").status, 503);
    assert_eq!(platform.status("two")["state"], "suspended");
    platform.ctl(&["suspend", "nobody"]).refused(&["nobody"]);
    let platform = platform.restart();
    assert_eq!(platform.get("two.example", "/hello").status, 503, "also after a restart");
    platform.ctl(&["resume", "two"]).success();
    assert_eq!(platform.get("two.example", "/hello").ok(), "Hello, world!\n");
    let listed = platform.ctl(&["list"]).success().stdout;
    assert!(listed.contains("TENANT") && listed.contains("one") && listed.contains("serving"), "{listed}");
    platform.server.finish();
}

#[test]
fn a_tenants_memory_is_one_number_and_bounded() {
    let config = TWO.replace(
        "instances = { max = 1 }",
        "instances = { max = 4 }\nlimits = { memory = \"64MiB\", total_memory = \"52MiB\", queue_wait = \"60s\" }",
    );
    let platform = Platform::start(&config);
    let held = || platform.status("two")["memory"].as_u64().unwrap();
    assert_eq!(held(), 0, "no instance is kept before the first request");
    assert_eq!(platform.get("two.example", "/hello").ok(), "Hello, world!\n");
    let at_rest = held();
    assert!((10 << 20..40 << 20).contains(&at_rest), "{at_rest}");
    // What the guest allocates and what it has in `/tmp`.
    assert_eq!(platform.get("two.example", "/keep-temporary?5").ok(), "kept");
    let more = held() - at_rest;
    assert!((5 << 20..9 << 20).contains(&more), "{more}");

    // A second instance fits, and a third does not.
    let mut busy = [platform.server.connect(), platform.server.connect()];
    for connection in &mut busy {
        connection.send("GET /sleep?2 HTTP/1.1\r\nHost: two.example\r\n\r\n");
    }
    wait_until(|| platform.status("two")["in_work"] == 2);
    let refused = platform.get("two.example", "/hello");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    platform.server.wait_for_log(&["holds as much memory as it may"]);
    assert_eq!(platform.get("one.example", "/hello").ok(), "Hello, world!\n");
    for connection in &mut busy {
        assert_eq!(connection.read_response("GET").ok(), "slept");
    }
    // A piece of a response on its way counts, until the client takes it.
    let of_one = || platform.status("one")["memory"].as_u64().unwrap();
    let ask = "GET /large-whole?20000000 HTTP/1.1\r\nHost: one.example\r\n\r\n";
    let mut slow = platform.server.connect();
    slow.send(ask);
    assert_eq!(slow.read_response("GET").ok().len(), 20_000_000);
    let (before, other) = (of_one(), held());
    slow.send(ask);
    slow.read_head();
    assert!((0..500).any(|_| of_one() > before + 500_000), "{before} and then {}", of_one());
    slow.reader().read_exact(&mut vec![0; 20_000_000]).unwrap();
    assert!((0..500).any(|_| of_one() <= before), "{before} and then {}", of_one());
    assert_eq!(held(), other);
    platform.ctl(&["drain", "two"]).success();
    assert_eq!(held(), 0);
    platform.server.finish();
}

#[test]
fn one_app_too_has_a_bound_of_memory_and_a_control_socket() {
    let directory = tempfile::tempdir().unwrap();
    let control = format!("unix:{}", directory.path().join("control.sock").display());
    let options = ["--instances", "4", "--memory", "64MiB", "--total-memory", "48MiB", "--control", &control];
    let platform = Platform { server: Server::start("behaviours", &options), directory };
    let mut busy = [platform.server.connect(), platform.server.connect()];
    for connection in &mut busy {
        connection.send("GET /sleep?2 HTTP/1.1\r\nHost: x\r\n\r\n");
    }
    wait_until(|| platform.status("behaviours")["in_work"] == 2);
    assert_eq!(platform.get("x", "/hello").status, 503);
    platform.server.wait_for_log(&["holds as much memory as it may"]);
    for mut connection in busy {
        connection.read_response("GET").ok();
    }
    platform.ctl(&["suspend", "behaviours"]).success();
    assert_eq!(platform.get("x", "/hello").status, 503);
    platform.ctl(&["resume", "behaviours"]).success();
    assert_eq!(platform.get("x", "/hello").status, 200);
    platform.server.finish();
    run(wsgi_wasm().args(["serve", "app.wasm", "--control", "control.sock"]))
        .refused(&["has to be `unix:PATH`"]);
}

#[test]
fn a_tenant_is_drained() {
    let platform = Platform::start(TWO);
    let mut running = platform.server.connect();
    running.send("GET /sleep?1 HTTP/1.1\r\nHost: two.example\r\n\r\n");
    wait_until(|| platform.status("two")["in_work"] == 1);
    platform.ctl(&["drain", "two"]).success();
    // The response was complete before the command returned.
    let status = platform.status("two");
    assert_eq!((&status["in_work"], &status["resting"]), (&0.into(), &0.into()));
    assert_eq!(running.read_response("GET").ok(), "slept");
    assert_eq!(platform.get("two.example", "/hello").status, 503);
    assert_eq!(platform.get("one.example", "/hello").ok(), "Hello, world!\n");
    platform.ctl(&["resume", "two"]).success();
    assert_eq!(platform.get("two.example", "/hello").ok(), "Hello, world!\n");
    platform.server.finish();
}

#[test]
fn a_tenant_that_can_not_be_loaded_keeps_no_other_from_being_served() {
    let broken = tempfile::NamedTempFile::new().unwrap();
    fs::write(broken.path(), "no component").unwrap();
    let third = format!(
        "{TWO}\n[[tenant]]\nname = \"three\"\napp = \"{}\"\nhosts = [\"three.example\"]\n",
        broken.path().display()
    );
    let platform = Platform::start(&third);
    assert_eq!(platform.get("one.example", "/hello").ok(), "Hello, world!\n");
    let refused = platform.get("three.example", "/hello");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("60")));
    let status = platform.status("three");
    assert_eq!(status["state"], "failed");
    assert!(status["error"].as_str().unwrap().contains("is not a WebAssembly component"), "{status}");
    // It is tried again when its file changes.
    fs::copy(guest("behaviours"), broken.path()).unwrap();
    platform.ctl(&["reload"]).success();
    assert_eq!(platform.get("three.example", "/hello").ok(), "Hello, world!\n");
    platform.server.finish();
}

#[test]
fn a_new_version_takes_over_only_if_it_answers() {
    let platform = Platform::start(
        "[[tenant]]\nname = \"app\"\napp = \"APP\"\nhealth = \"/hello\"\ninstances = { max = 2 }\n",
    );
    let bottle = guest("bottle");
    // It has no such route.
    platform.ctl(&["deploy", "app", bottle.to_str().unwrap()]).refused(&["/hello", "404"]);
    assert_eq!(platform.get("x", "/hello").ok(), "Hello, world!\n");
    assert!(platform.status("app")["error"].as_str().unwrap().contains("404"));

    let copy = platform.directory.path().join("copy.wasm");
    fs::copy(guest("behaviours"), &copy).unwrap();
    // A request that runs through the change is not cut.
    let mut running = platform.server.connect();
    running.send("GET /sleep?1 HTTP/1.1\r\nHost: x\r\n\r\n");
    platform.ctl(&["deploy", "app", copy.to_str().unwrap()]).success();
    assert_eq!(platform.status("app")["app"], copy.to_str().unwrap());
    assert_eq!(running.read_response("GET").ok(), "slept");
    assert_eq!(platform.get("x", "/hello").ok(), "Hello, world!\n");
    platform.ctl(&["rollback", "app"]).success();
    assert_eq!(platform.status("app")["app"], guest("behaviours").to_str().unwrap());
    assert_eq!(platform.get("x", "/hello").ok(), "Hello, world!\n");
    platform.server.finish();
}

#[test]
fn what_was_rolled_back_from_stays_away_until_it_changes() {
    let config = "[[tenant]]\nname = \"app\"\napp = \"app.wasm\"\nhosts = [\"x\"]\n\
                  [[tenant]]\nname = \"other\"\napp = \"APP\"\nhosts = [\"y\"]\n";
    let directory = tempfile::tempdir().unwrap();
    let app = directory.path().join("app.wasm");
    fs::copy(guest("behaviours"), &app).unwrap();
    write_config(directory.path(), config);
    let platform = Platform::start_in(directory);
    let hello = |platform: &Platform| platform.get("x", "/hello").status;
    let replacements: [fn(&Path); 2] = [
        // In place, and by another file.
        |app| assert!(fs::copy(guest("bottle"), app).is_ok()),
        |app| {
            fs::copy(guest("bottle"), app.with_extension("new")).unwrap();
            fs::rename(app.with_extension("new"), app).unwrap();
        },
    ];
    let mut platform = platform;
    for (round, replace) in replacements.into_iter().enumerate() {
        assert_eq!(hello(&platform), 200);
        replace(&app);
        platform.ctl(&["reload"]).success();
        assert_eq!(hello(&platform), 404, "the new version has no such route");
        platform.ctl(&["rollback", "app"]).success();
        assert_eq!(hello(&platform), 200);
        // The file is looked at again, by the watch too: it sees another change.
        platform.ctl(&["reload"]).success();
        let late = format!("{config}[[tenant]]\nname = \"late-{round}\"\napp = \"APP\"\nhosts = [\"z\"]\n");
        write_config(platform.directory.path(), &late);
        platform.server.wait_for_log(&[&format!("late-{round}"), "serving"]);
        assert_eq!(hello(&platform), 200);
        // It is no version to be had again, and no other: a restart keeps that.
        platform = platform.restart();
        assert_eq!(hello(&platform), 200);
        // A file that has changed since is loaded.
        fs::copy(guest("behaviours"), &app).unwrap();
        platform.ctl(&["reload"]).success();
        assert_eq!(platform.status("app")["app"], app.to_str().unwrap());
    }
    // What was not rolled back from is one rollback away, and back again.
    fs::copy(guest("bottle"), &app).unwrap();
    platform.ctl(&["reload"]).success();
    for status in [200, 404, 200] {
        platform.ctl(&["rollback", "app"]).success();
        assert_eq!(hello(&platform), status);
    }
    let copies = || fs::read_dir(platform.directory.path().join("state/wsgi-wasm.apps")).unwrap().count();
    platform.ctl(&["reload"]).success();
    assert_eq!(copies(), 2, "copies of what is not needed any more");
    platform.server.finish();
}

#[test]
fn a_rollback_of_settings_is_not_undone_by_other_changes() {
    let platform = Platform::start(TWO);
    let who = |platform: &Platform| -> Value {
        let text = platform.get("two.example", "/environment").ok();
        serde_json::from_str::<Value>(&text).unwrap()["WHO"].clone()
    };
    let change = |platform: &Platform, config: &str| {
        write_config(platform.directory.path(), config);
        platform.ctl(&["reload"]).success();
    };
    let second = TWO.replace("WHO = \"two\"", "WHO = \"second\"");
    change(&platform, &second);
    assert_eq!(who(&platform), "second");
    platform.ctl(&["rollback", "two"]).success();
    assert_eq!(who(&platform), "two");
    change(&platform, &second.replace("WHO = \"shop\"", "WHO = \"other\""));
    assert_eq!(environ_of(&platform, "one.example", "/shop")["WHO"], "other");
    assert_eq!(who(&platform), "two", "another tenant was changed");
    change(&platform, &TWO.replace("WHO = \"two\"", "WHO = \"third\""));
    assert_eq!(who(&platform), "third");
    platform.server.finish();
}

#[test]
fn a_deployed_app_lasts_over_a_restart_and_so_does_a_rollback() {
    let platform = Platform::start("[[tenant]]\nname = \"app\"\napp = \"APP\"\n");
    let copy = platform.directory.path().join("copy.wasm");
    fs::copy(guest("behaviours"), &copy).unwrap();
    platform.ctl(&["deploy", "app", copy.to_str().unwrap()]).success();
    let platform = platform.restart();
    assert_eq!(platform.status("app")["app"], copy.to_str().unwrap());
    assert_eq!(platform.get("x", "/hello").ok(), "Hello, world!\n");
    let bottle = guest("bottle");
    platform.ctl(&["deploy", "app", bottle.to_str().unwrap()]).success();
    platform.ctl(&["rollback", "app"]).success();
    let platform = platform.restart();
    assert_eq!(platform.status("app")["app"], copy.to_str().unwrap());
    platform.server.finish();
}

#[test]
fn a_drain_that_waits_holds_no_one_up_after_resume() {
    let platform = Platform::start(&TWO.replace("max = 1", "max = 2"));
    let mut slow = platform.server.connect();
    slow.send("GET /stream-for-ever HTTP/1.1\r\nHost: two.example\r\n\r\n");
    assert_eq!(slow.read_head().status, 200);
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| platform.ctl(&["drain", "two"]));
        wait_until(|| platform.status("two")["state"] == "suspended");
        platform.ctl(&["resume", "two"]).success();
        for _ in 0..3 {
            assert_eq!(platform.get("two.example", "/hello").ok(), "Hello, world!\n");
        }
        drain.join().unwrap().refused(&["`two` was resumed"]);
    });
    drop(slow);
    platform.ctl(&["drain", "two"]).success();
    platform.server.finish();
}

#[test]
fn a_state_file_that_is_broken_is_not_an_empty_one() {
    let platform = Platform::start(TWO);
    let state = platform.directory.path().join("state/wsgi-wasm.json");
    platform.ctl(&["suspend", "two"]).success();
    // What is known goes on, and is written again.
    fs::write(&state, "{").unwrap();
    platform.ctl(&["reload"]).success();
    assert_eq!(platform.get("two.example", "/hello").status, 503);
    platform.ctl(&["suspend", "shop"]).success();
    let platform = platform.restart();
    assert_eq!(platform.get("two.example", "/hello").status, 503);
    platform.server.finish();
    fs::write(&state, "{\"suspended\": [").unwrap();
    run(wsgi_wasm().args(["serve", "--bind", "127.0.0.1:0", "--config"]).arg(path_in(&platform.directory)))
        .refused(&["state/wsgi-wasm.json", "help:"]);
}

#[test]
fn a_tenant_that_never_loaded_can_be_mended_by_ctl() {
    let broken = tempfile::NamedTempFile::new().unwrap();
    // A component by its head, so that `check` takes it for one.
    fs::write(broken.path(), b"\0asm\x0d\0\x01\0broken").unwrap();
    let platform = Platform::start(&format!(
        "{TWO}\n[[tenant]]\nname = \"three\"\napp = \"{}\"\nhosts = [\"three.example\"]\n",
        broken.path().display()
    ));
    assert!(platform.ctl(&["errors", "three"]).success().stdout.contains("cut off"));
    platform.ctl(&["suspend", "three"]).success();
    platform.ctl(&["drain", "three"]).success();
    platform.ctl(&["rollback", "three"]).refused(&["no version"]);
    platform.ctl(&["deploy", "three", guest("behaviours").to_str().unwrap()]).success();
    assert_eq!(platform.get("three.example", "/hello").status, 503, "still suspended");
    platform.ctl(&["resume", "three"]).success();
    assert_eq!(platform.get("three.example", "/hello").ok(), "Hello, world!\n");
    platform.server.finish();
}

#[test]
fn what_a_reload_waits_for_holds_up_neither_requests_nor_the_end() {
    let platform = Platform::start(TWO);
    // Reading it takes until somebody writes.
    let pipe = platform.directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let secrets = "secrets = { KEY = { file = \"pipe\" } }";
    write_config(platform.directory.path(), &format!("{TWO}{secrets}\n"));
    platform.server.signal("HUP");
    let writer = fs::File::options().write(true).open(&pipe).unwrap();
    for _ in 0..10 {
        assert_eq!(platform.get("two.example", "/hello").ok(), "Hello, world!\n");
    }
    assert_eq!(platform.status("two")["state"], "serving");
    platform.server.finish();
    drop(writer);
}

#[test]
fn budgets_are_a_tenants_and_not_a_versions() {
    let config = TWO.replace("instances = { max = 1 }", "limits = { cpu_per_minute = \"300ms\" }");
    let platform = Platform::start(&config);
    assert_eq!(platform.get("two.example", "/compute?1").status, 200);
    assert_eq!(platform.get("two.example", "/hello").status, 503);
    let copy = platform.directory.path().join("copy.wasm");
    fs::copy(guest("behaviours"), &copy).unwrap();
    platform.ctl(&["deploy", "two", copy.to_str().unwrap()]).success();
    assert_eq!(platform.get("two.example", "/hello").status, 503, "a new version has no new budget");
    // Another limit is another budget.
    write_config(platform.directory.path(), &config.replace("300ms", "30s"));
    platform.ctl(&["reload"]).success();
    assert_eq!(platform.get("two.example", "/hello").status, 200);
    platform.server.finish();
}

#[test]
fn secrets_reach_the_app_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("key"), "hunter2\n").unwrap();
    let config =
        format!("{TWO}secrets = {{ KEY = {{ file = \"key\" }}, TOKEN = {{ env = \"IT_TOKEN\" }} }}\n");
    write_config(directory.path(), &config);
    let server = Server::spawn(
        wsgi_wasm()
            .env("IT_TOKEN", "hunter3")
            .env("WSGI_WASM_LOG", "debug")
            .args(["serve", "--bind", "127.0.0.1:0", "--config"])
            .arg(path_in(&directory)),
    );
    let platform = Platform { directory, server };
    let environment = environ_of(&platform, "two.example", "");
    assert_eq!((&environment["KEY"], &environment["TOKEN"]), (&"hunter2".into(), &"hunter3".into()));
    assert!(environ_of(&platform, "one.example", "").get("KEY").is_none());
    platform.ctl(&["suspend", "two"]).success();
    let listed = platform.ctl(&["list", "--json"]).success().stdout;
    let state = fs::read_to_string(platform.directory.path().join("state/wsgi-wasm.json")).unwrap();
    // Written in the wrong place, one is not shown either.
    for wrong in [
        "secrets = { KEY = \"hunter2\" }",
        "secrets = { KEY = { file = \"hunter2\" } }",
        "secrets = { KEY = { env = \"hunter2\" } }",
        "secrets = { KEY = { hunter2 = 1 } }",
        "secrets = { KEY = hunter2 }",
        "secrets = [\"hunter2\"]",
        "secrets = \"hunter2\"",
        "[tenant.secrets]\nKEY = \"hunter2\"",
        "[tenant.secrets.KEY]\nfile = [\"hunter2\"]",
    ] {
        write_config(platform.directory.path(), &format!("{TWO}{wrong}\n"));
        let checked =
            run(wsgi_wasm().arg("check").arg(path_in(&platform.directory))).refused(&["wsgi-wasm.toml:"]);
        assert!(!checked.stderr.contains("hunter"), "{wrong}: {}", checked.stderr);
        let reloaded = platform.ctl(&["reload"]).refused(&["wsgi-wasm.toml:"]);
        assert!(!reloaded.stderr.contains("hunter"), "{wrong}: {}", reloaded.stderr);
    }
    let log = platform.server.finish();
    for text in [listed, state, log] {
        assert!(!text.contains("hunter"), "{text}");
    }
}

#[test]
fn idle_instances_go_but_for_those_that_are_to_stay() {
    let settings = |min| format!("instances = {{ min = {min}, max = 4, idle = \"1s\" }}");
    let config = TWO
        .replace("instances = { max = 1 }", &settings(0))
        .replace("path = \"/shop\"", &format!("path = \"/shop\"\n{}", settings(1)));
    let platform = Platform::start(&config);
    for _ in 0..2 {
        for (host, path) in [("two.example", "/sleep?0.2"), ("one.example", "/shop/sleep?0.2")] {
            let mut busy: Vec<_> = (0..3).map(|_| platform.server.connect()).collect();
            for connection in &mut busy {
                connection.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            }
            for mut connection in busy {
                assert_eq!(connection.read_response("GET").ok(), "slept");
            }
        }
        // To nothing, and the next request wakes it.
        wait_until(|| platform.status("two")["resting"] == 0);
        assert_eq!(platform.status("two")["memory"], 0);
        wait_until(|| platform.status("shop")["resting"] == 1);
    }
    // One stays, however long it rests: here as long as another takes to go.
    assert_eq!(platform.get("two.example", "/hello").status, 200);
    wait_until(|| platform.status("two")["resting"] == 0);
    assert_eq!(platform.status("shop")["resting"], 1);
    platform.server.finish();
}

#[test]
fn a_tenant_without_hosts_answers_for_the_rest() {
    let platform = Platform::start(&format!(
        "{TWO}\n[[tenant]]\nname = \"rest\"\napp = \"APP\"\nenv = {{ WHO = \"rest\" }}\n\
         [[tenant]]\nname = \"rest-shop\"\napp = \"APP\"\npath = \"/shop\"\nenv = {{ WHO = \"rest-shop\" }}\n"
    ));
    for (host, path, who) in [
        ("one.example", "", "one"),
        ("two.example", "", "two"),
        ("nobody.example", "", "rest"),
        ("127.0.0.1", "", "rest"),
        ("nobody.example", "/shop", "rest-shop"),
        ("one.example", "/shop", "shop"),
    ] {
        assert_eq!(environ_of(&platform, host, path)["WHO"], who, "{host}{path}");
    }
    // Its path is that host's own, not the rest's.
    assert_eq!(platform.get("two.example", "/shop/hello").text(), "no such route");
    platform.server.finish();
}

#[test]
fn isolation_by_request_is_a_tenants_choice() {
    let config = TWO.replace("instances = { max = 1 }", "isolation = \"request\"");
    let platform = Platform::start(&config);
    for (host, kept) in [("one.example", true), ("two.example", false)] {
        assert_eq!(platform.get(host, "/temporary-files").ok(), "[]");
        for _ in 0..3 {
            let names = platform.get(host, "/temporary-files").ok();
            assert_eq!(names.contains("left-behind"), kept, "{host}: {names}");
        }
    }
    platform.server.finish();
}

fn environ_of(platform: &Platform, host: &str, path: &str) -> Value {
    environ(platform.get(host, &format!("{path}/environment")))
}

#[test]
fn the_configuration_is_read_again_when_it_changes() {
    let platform = Platform::start(TWO);
    assert_eq!(platform.get("four.example", "/hello").status, 421);
    let four = TWO.replace("two.example", "four.example").replace("WHO = \"one\"", "WHO = \"other\"");
    write_config(platform.directory.path(), &four);
    platform.ctl(&["reload"]).success();
    assert_eq!(platform.get("four.example", "/hello").status, 200);
    assert_eq!(platform.get("two.example", "/hello").status, 421);
    let environment: Value = serde_json::from_str(&platform.get("one.example", "/environment").ok()).unwrap();
    assert_eq!(environment["WHO"], "other");

    // A broken one changes nothing, and the reason is said and logged.
    write_config(platform.directory.path(), "[[tennant]]\n");
    platform.ctl(&["reload"]).refused(&["unknown name `tennant`; did you mean `tenant`?"]);
    platform.server.signal("HUP");
    platform.server.wait_for_log(&["not reloaded"]);
    assert_eq!(platform.get("four.example", "/hello").status, 200);

    // The file is watched: no word from anybody.
    let late = TWO.replace("\"two\"", "\"late\"");
    write_config(platform.directory.path(), &late);
    platform.server.wait_for_log(&["tenant=late", "serving"]);
    assert_eq!(platform.get("two.example", "/hello").status, 200);
    platform.server.finish();
}

#[test]
fn a_directory_of_apps_is_a_platform() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::copy(guest("behaviours"), directory.path().join(format!("{name}.wasm"))).unwrap();
        let settings = format!("hosts = [\"{name}.example\"]\nenv = {{ WHO = \"{name}\" }}\n");
        fs::write(directory.path().join(format!("{name}.toml")), settings).unwrap();
    }
    let start = |directory: &tempfile::TempDir| {
        let control = format!("unix:{}", directory.path().join("control.sock").display());
        Server::spawn(
            wsgi_wasm()
                .args(["serve", "--bind", "127.0.0.1:0", "--control", &control, "--tenants"])
                .arg(directory.path()),
        )
    };
    let platform = Platform { server: start(&directory), directory };
    for name in ["a", "b"] {
        assert_eq!(environ_of(&platform, &format!("{name}.example"), "")["WHO"], name);
    }
    // Settings that are edited in place are seen, and tenants that come and go.
    let settings = platform.directory.path().join("a.toml");
    fs::write(&settings, "hosts = [\"a.example\"]\nenv = { WHO = \"another\" }\n").unwrap();
    wait_until(|| environ_of(&platform, "a.example", "")["WHO"] == "another");
    fs::copy(guest("behaviours"), platform.directory.path().join("c.wasm")).unwrap();
    wait_until(|| platform.get("c.example", "/hello").status == 200);
    fs::remove_file(platform.directory.path().join("c.wasm")).unwrap();
    wait_until(|| platform.get("c.example", "/hello").status == 421);
    // And `ctl` works as with a configuration.
    platform.ctl(&["suspend", "b"]).success();
    let (directory, server) = (platform.directory, platform.server);
    server.finish();
    let platform = Platform { server: start(&directory), directory };
    assert_eq!(platform.get("b.example", "/hello").status, 503);
    platform.ctl(&["resume", "b"]).success();
    assert_eq!(platform.get("b.example", "/hello").status, 200);
    platform.server.finish();
}

#[test]
fn a_wrong_configuration_is_refused_with_every_mistake() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("wsgi-wasm.toml");
    fs::write(&file, "[sever]\n[[tenant]]\nname = \"a\"\nlimits = { memory = \"lots\" }\n").unwrap();
    let expected = ["3 mistakes", "toml:1: unknown name `sever`", "toml:4: `lots` is not a size", "no `app`"];
    run(wsgi_wasm().arg("check").arg(&file)).refused(&expected);
    run(wsgi_wasm().args(["serve", "--config"]).arg(&file)).refused(&expected);
    run(wsgi_wasm().args(["serve", "--tenants", "/no/such"])).refused(&["/no/such", "help:"]);
    run(wsgi_wasm().args(["ctl", "--control", "unix:/no/such", "list"])).refused(&["/no/such", "help:"]);

    // `check` looks into the apps.
    let script = directory.path().join("app.py");
    fs::write(&script, "app = None\n").unwrap();
    fs::write(&file, "[[tenant]]\nname = \"a\"\napp = \"app.py\"\n").unwrap();
    run(wsgi_wasm().arg("check").arg(&file))
        .refused(&["toml:3: tenant `a`", "app.py` is not a WebAssembly component"]);
    // Of a directory, the mistakes in all files.
    let tenants = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::write(tenants.path().join(format!("{name}.wasm")), "").unwrap();
        fs::write(tenants.path().join(format!("{name}.toml")), "\nweight = 0\nhost = \"x\"\n").unwrap();
    }
    let expected = ["a.toml:2: ", "a.toml:3: unknown name `host`", "b.toml:2: ", "b.toml:3: ", "4 mistakes"];
    run(wsgi_wasm().args(["serve", "--tenants"]).arg(tenants.path())).refused(&expected);
    run(wsgi_wasm().arg("check").arg(tenants.path()))
        .refused(&["a.toml:2: ", "b.wasm` is not a WebAssembly component"]);

    let app = guest("behaviours");
    fs::write(&file, format!("[[tenant]]\nname = \"a\"\napp = \"{}\"\n", app.display())).unwrap();
    let checked = run(wsgi_wasm().arg("check").arg(&file)).success();
    assert!(checked.stdout.contains("is fine: 1 tenants"), "{}", checked.stdout);
    let schema = run(wsgi_wasm().args(["check", "--schema"])).success();
    assert!(serde_json::from_str::<Value>(&schema.stdout).unwrap()["properties"]["tenant"].is_object());
}
