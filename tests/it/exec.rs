use crate::harness::{Finished, guest, run, wsgi_wasm};

fn python(code: &str) -> Finished {
    run(wsgi_wasm().arg("exec").arg(guest("behaviours")).args(["--", "python", "-c", code]))
}

#[test]
fn a_command_that_leaves_at_once_has_its_status() {
    // That the app was compiled is said once.
    python("").success();
    for (code, status) in [
        ("import os; os._exit(0)", 0),
        ("import os; os._exit(3)", 3),
        ("import os, atexit; atexit.register(print, 'late'); os._exit(4)", 4),
        ("import os\ntry: os._exit(5)\nexcept BaseException: pass", 5),
        // The true one, of which nothing more is known.
        ("from wsgi_wasm import command; command._exit(0)", 0),
        ("from wsgi_wasm import command; command._exit(3)", 1),
    ] {
        let done = python(code);
        assert_eq!((done.status, &*done.stdout, &*done.stderr), (status, "", ""), "{code}");
    }
}

#[test]
fn a_trap_is_one_line() {
    let code = "import os; os.abort()";
    let done = python(code);
    assert_eq!(done.status, 1);
    let lines: Vec<_> = done.stderr.lines().filter(|line| !line.is_empty()).collect();
    assert!(lines.last().unwrap().starts_with("error: the command was stopped by a trap: "), "{lines:?}");
    assert!(!done.stderr.contains("backtrace"), "{}", done.stderr);
    let done = run(wsgi_wasm()
        .env("WSGI_WASM_LOG", "wsgi_wasm=debug")
        .arg("exec")
        .arg(guest("behaviours"))
        .args(["--", "python", "-c", code]));
    assert!(done.stderr.contains("wasm backtrace") || done.stderr.contains("abort"), "{}", done.stderr);
}
