use crate::harness::{Server, run, wsgi_wasm};

/// What the kernel says of each thread of the server.
fn thread_status(server: &Server) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.id())).unwrap();
    tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()).collect()
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
