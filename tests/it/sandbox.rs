use std::fs;

use crate::harness::{Server, guest, run, wsgi_wasm};

/// What the kernel says of each thread of the server.
fn thread_status(server: &Server) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.id())).unwrap();
    tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap()).collect()
}

#[test]
fn the_server_confines_itself_and_still_serves() {
    let data = tempfile::tempdir().unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}/app.sock", sockets.path().display());
    let arguments = ["--data", data.path().to_str().unwrap(), "--bind", &unix];
    let server = Server::start("behaviours", &arguments);
    server.wait_for_log(&["confined", "no new privileges", "seccomp"]);
    assert!(server.get("/write-files").ok().contains("\"/data/x\": \"written\""));
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    let threads = thread_status(&server);
    assert!(threads.len() > 1);
    for status in threads {
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    assert!(sockets.path().join("app.sock").exists());
    server.finish();
    assert!(!sockets.path().join("app.sock").exists(), "the socket was left");
}

#[test]
fn the_confinement_can_be_demanded_or_left_out() {
    let server = Server::start("behaviours", &["--sandbox", "off"]);
    server.wait_for_log(&["--sandbox off"]);
    assert!(thread_status(&server).iter().all(|status| !status.contains("Seccomp:\t2")));
    server.finish();
    run(wsgi_wasm().args(["serve", "app.wasm", "--sandbox", "maybe"])).refused(&["--sandbox", "auto"]);
}

#[test]
fn a_platform_reads_and_writes_what_its_configuration_names() {
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let inside = |name: &str| directory.path().join(name);
    fs::create_dir(inside("store")).unwrap();
    fs::write(
        inside("wsgi-wasm.toml"),
        format!(
            "[server]\ncontrol = \"unix:control.sock\"\nroots = [\"store\"]\n\
             [[tenant]]\nname = \"a\"\napp = {:?}\n",
            guest("behaviours")
        ),
    )
    .unwrap();
    let start = || {
        let config = inside("wsgi-wasm.toml");
        Server::spawn(wsgi_wasm().args(["serve", "--bind", "127.0.0.1:0", "--config"]).arg(config))
    };
    let ctl = |arguments: &[&str]| {
        let control = format!("unix:{}", inside("control.sock").display());
        run(wsgi_wasm().args(["ctl", "--control", &control]).args(arguments))
    };
    let server = start();
    let (later, outside) = (inside("store/later.wasm"), elsewhere.path().join("later.wasm"));
    for app in [&later, &outside] {
        fs::copy(guest("behaviours"), app).unwrap();
    }
    if !server.log().contains("not by landlock") {
        ctl(&["deploy", "a", outside.to_str().unwrap()]).refused(&["Permission denied"]);
    }
    ctl(&["deploy", "a", later.to_str().unwrap()]).success();
    ctl(&["suspend", "a"]).success();
    server.finish();
    // Nothing but the state was written, in a directory of its own.
    let mut names: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["control.sock", "state", "store", "wsgi-wasm.toml"]);
    assert!(fs::read_to_string(inside("state/wsgi-wasm.json")).unwrap().contains("later.wasm"));

    // The socket that was left is in nobody's way.
    let server = start();
    assert_eq!(server.get("/hello").status, 503, "suspended");
    ctl(&["resume", "a"]).success();
    assert_eq!(server.get("/hello").ok(), "Hello, world!\n");
    server.finish();
}
