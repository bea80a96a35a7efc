use std::io::Read as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Server, wsgi_wasm};

/// Serves an example as its users do: from its directory.
fn serve(name: &str, arguments: &[&str]) -> Server {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
    Server::spawn(wsgi_wasm().arg("serve").arg(example).args(["--bind", "127.0.0.1:0"]).args(arguments))
}

#[test]
fn each_example_is_listed() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let list = std::fs::read_to_string(examples.join("README.md")).unwrap();
    for entry in std::fs::read_dir(examples).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            assert!(list.contains(&format!("[`{name}`]({name})")), "{name}");
        }
    }
}

#[test]
fn the_demo_greets() {
    let server = serve("demo", &[]);
    let response = server.get("/some/path?query");
    assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
    let text = response.ok();
    assert!(text.starts_with("Hello world!\n\n"), "{text}");
    for line in ["PATH_INFO = '/some/path'", "QUERY_STRING = 'query'", "wsgi.version = (1, 0)"] {
        assert!(text.lines().any(|found| found == line), "no {line} in:\n{text}");
    }
    server.finish();
}

#[test]
fn the_report_reports() {
    let server = serve("report", &["--env", "MODE=<test>"]);
    let text = server.get("/?a=b").ok();
    for part in [
        "<td>version</td><td><code>3.14",
        "<td>platform</td><td><code>wasi",
        "<td>QUERY_STRING</td><td><code>a=b</code>",
        "<td>MODE</td><td><code>&lt;test&gt;</code>",
        "<code>/python</code>",
        "<td>sys</td><td><code>built in</code>",
        "<td>app</td><td><code>/0/app.py</code>",
    ] {
        assert!(text.contains(part), "no {part} in:\n{text}");
    }
    assert!(text.trim_end().ends_with("</table>"));
    server.finish();
}

#[test]
fn the_middleware_is_a_chain() {
    let server = serve("middleware", &["--env", "SECRET_KEY=test", "--env", "PASSWORD=sesame"]);
    // A session, and no way to make one up.
    let first = server.get("/");
    let cookie = first.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    assert_eq!(first.ok(), "YOU WERE HERE 1 TIMES\n");
    assert_eq!(server.request("GET", "/", &[("Cookie", &cookie)], b"").ok(), "YOU WERE HERE 2 TIMES\n");
    let forged = cookie.replace('.', "x.");
    assert_eq!(server.request("GET", "/", &[("Cookie", &forged)], b"").ok(), "YOU WERE HERE 1 TIMES\n");

    // Passwords: `alice:sesame`, `alice:wrong`, `bob:sesame`.
    let log_in = |text: &str| server.request("GET", "/vault", &[("Authorization", text)], b"");
    let refused = server.get("/vault");
    assert_eq!(
        (refused.status, refused.header("www-authenticate")),
        (401, Some("Basic realm=\"the vault\""))
    );
    assert_eq!(log_in("Basic YWxpY2U6c2VzYW1l").ok(), "WELCOME TO THE VAULT, ALICE\n");
    for wrong in ["Basic YWxpY2U6d3Jvbmc=", "Basic Ym9iOnNlc2FtZQ==", "Basic ???", "Bearer x"] {
        assert_eq!(log_in(wrong).status, 401, "{wrong}");
    }

    // A text that is changed, and compressed, while it streams.
    let mut connection = server.connect();
    connection.send_request("GET", "/stream", &[], b"");
    assert_eq!(connection.read_head().header("content-length"), None);
    for piece in ["ONE\n", "TWO\n", "THREE\n", ""] {
        assert_eq!(connection.read_chunk().unwrap(), piece.as_bytes());
    }
    let zipped = server.request("GET", "/stream", &[("Accept-Encoding", "br, gzip;q=0.8")], b"");
    assert_eq!(zipped.header("content-encoding"), Some("gzip"));
    assert_eq!(zipped.header("vary"), Some("Accept-Encoding"));
    assert_eq!(unpack(&zipped.body), "ONE\nTWO\nTHREE\n");
    let plain = server.request("GET", "/stream", &[("Accept-Encoding", "gzip;q=0.0")], b"");
    assert_eq!(plain.ok(), "ONE\nTWO\nTHREE\n");

    // Exceptions, before and after the head.
    let broken = server.get("/broken");
    assert_eq!(broken.status, 500);
    assert!(broken.text().contains("Something broke"), "{}", broken.text());
    let late = server.get("/broken-late");
    assert_eq!((late.status, late.text().as_str()), (200, "SO FAR SO GOOD\n"));
    assert!(late.cut);
    server.wait_for_log(&["RuntimeError: broken on purpose, late"]);
    assert_eq!(server.get("/nowhere").status, 404);
    server.finish();
}

/// Unpacks what Python's own gzip can read.
fn unpack(body: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("body.gz");
    std::fs::write(&path, body).unwrap();
    let output =
        std::process::Command::new("python3").args(["-m", "gzip", "-d"]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut text = String::new();
    std::fs::File::open(directory.path().join("body")).unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_dispatcher_moves_the_border() {
    let server = serve("dispatch", &[]);
    let base = "http://test.example";
    for (path, script_name, path_info) in [
        ("/where", "/where", ""),
        ("/where/", "/where", "/"),
        ("/where/to/go", "/where", "/to/go"),
        ("/a", "/a", ""),
        ("/a/x", "/a", "/x"),
        ("/a/b", "/a/b", ""),
        ("/a/b/c%20d", "/a/b", "/c d"),
        ("/a/bc", "/a", "/bc"),
        ("/inner/where/x", "/inner/where", "/x"),
    ] {
        let text = server.get(path).ok();
        let expected = format!("SCRIPT_NAME '{script_name}'\nPATH_INFO '{path_info}'\n");
        assert!(text.starts_with(&expected), "{path}: {text}");
        assert!(text.contains(&format!("request {base}{path}\n")), "{path}: {text}");
    }
    let index = server.get("/inner/").ok();
    assert!(index.contains(&format!("{base}/inner/dates/\n")), "{index}");
    let february = server.get("/dates/1900/2").ok();
    assert!(february.contains("February 1900") && february.contains(" 28") && !february.contains(" 29"));
    assert!(server.get("/inner/dates/2024").ok().contains("September"));
    for path in ["/dates/x", "/dates/1900/13", "/nowhere", "/ab", "/inner/nowhere"] {
        assert_eq!(server.get(path).status, 404, "{path}");
    }
    server.finish();
}

#[test]
fn the_framework_frames() {
    let server = serve("webob", &[]);
    let parse = |text: String| serde_json::from_str::<Value>(&text).unwrap();
    assert!(server.get("/?name=%3Cb%3E").ok().contains("<h1>Hello &lt;b&gt;!</h1>"));
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    let greeted = server.post("/greet", &form, b"name=Zoe");
    assert_eq!((greeted.status, greeted.header("location")), (303, Some("http://test.example/")));
    let cookie = greeted.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let seen = server.request("GET", "/whoami", &[("Cookie", &cookie), ("User-Agent", "test")], b"");
    assert_eq!(parse(seen.ok()), json!({"name": "Zoe", "agent": "test"}));
    assert_eq!(parse(server.get("/sum/40/-2").ok()), json!({"sum": 38}));
    let body = vec![b'x'; 200_000];
    let uploaded = server.request("PUT", "/upload", &[("Content-Type", "image/png")], &body);
    assert_eq!(uploaded.ok(), "200000 bytes of image/png\n");
    assert_eq!(server.get("/sum/1/x").status, 404);
    let wrong = server.get("/upload");
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("POST, PUT")));

    // A file, whole, in part, and not again.
    let source =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/webob/app.py")).unwrap();
    let whole = server.get("/source/app");
    assert_eq!(whole.header("content-length"), Some(&*source.len().to_string()));
    assert_eq!(whole.body, source);
    let part = server.request("GET", "/source/app", &[("Range", "bytes=3-9")], b"");
    assert_eq!((part.status, &part.body[..]), (206, &source[3..10]));
    let modified = whole.header("last-modified").unwrap();
    let again = server.request("GET", "/source/app", &[("If-Modified-Since", modified)], b"");
    assert_eq!((again.status, again.body.len()), (304, 0));
    server.finish();
}
