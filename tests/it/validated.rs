//! `wsgiref.validate` stands between the server and each guest, and has
//! nothing to say.

use std::path::{Path, PathBuf};

use crate::harness::{Server, guest_sources, run, wsgi_wasm};

/// Serves the guest `name` with the validator around its app.
fn serve(name: &str, module: &str, callable: &str, arguments: &[&str]) -> (Server, PathBuf) {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("validated");
    let sources = directory.join(name);
    let _ = std::fs::remove_dir_all(&sources);
    copy(&guest_sources(name), &sources);
    let wrapper = format!(
        "from wsgiref.validate import validator\n\nfrom {module} import {callable} as plain\n\napp = validator(plain)\n"
    );
    std::fs::write(sources.join("validated.py"), wrapper).unwrap();
    let built = directory.join(format!("{name}.wasm"));
    let build = ["build", "validated:app", "--dir"];
    run(wsgi_wasm().args(build).arg(&sources).arg("--output").arg(&built)).success();
    let mut serve = wsgi_wasm();
    serve.arg("serve").arg(&built).args(["--bind", "127.0.0.1:0"]).args(arguments);
    (Server::spawn(&mut serve), built)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Demands that nobody broke a rule: neither the server nor the app.
#[track_caller]
fn assert_valid(server: Server) {
    let log = server.finish();
    for complaint in
        ["AssertionError", "Assertion", "WSGIWarning", "garbage collected", "Traceback", "client left"]
    {
        assert!(!log.contains(complaint), "{log}");
    }
}

/// A request and the status of its response. The body, if there is one, has
/// the content type.
type Exchange<'a> = (&'a str, &'a str, &'a str, &'a [u8], u16);

/// Makes the requests, each on the same connection, and demands their statuses.
#[track_caller]
fn exchange(server: &Server, exchanges: &[Exchange<'_>]) {
    let mut connection = server.connect();
    for (method, path, content_type, body, status) in exchanges {
        let headers = if body.is_empty() { &[][..] } else { &[("Content-Type", *content_type)][..] };
        connection.send_request(method, path, headers, body);
        let response = connection.read_response(method);
        assert_eq!(response.status, *status, "{method} {path}: {}", response.text());
        assert!(!response.cut, "{method} {path}");
    }
}

/// A form with a file of `length` bytes.
fn upload(length: usize) -> Vec<u8> {
    let head = "Content-Disposition: form-data; name=\"file\"; filename=\"x.bin\"\r\nContent-Type: image/png";
    let title = "--b\r\nContent-Disposition: form-data; name=\"title\"\r\n\r\nA title\r\n";
    let mut body = format!("{title}--b\r\n{head}\r\n\r\n").into_bytes();
    body.extend(std::iter::repeat_n(b'x', length));
    body.extend_from_slice(b"\r\n--b--\r\n");
    body
}

const MULTIPART: &str = "multipart/form-data; boundary=b";
const FORM: &str = "application/x-www-form-urlencoded";

#[test]
fn the_validator_itself_works() {
    // Else a log without complaints would mean nothing.
    let (server, _) = serve("behaviours", "app", "app", &[]);
    exchange(&server, &[("GET", "/status?200+OK", "", b"", 500)]);
    server.wait_for_log(&["AssertionError: No Content-Type header found in headers"]);
    // The same guest, asked for what it does right.
    exchange(
        &server,
        &[
            ("GET", "/hello", "", b"", 200),
            ("GET", "/nothing/here?a=b%20c", "", b"", 404),
            ("GET", "/stream", "", b"", 200),
            ("HEAD", "/stream", "", b"", 200),
            ("GET", "/large?3", "", b"", 200),
            ("GET", "/write-callable", "", b"", 200),
            ("GET", "/cookies", "", b"", 200),
            ("POST", "/count", "text/plain", b"some body", 200),
            ("PUT", "/count", "text/plain", &[b'x'; 200_000], 200),
            ("GET", "/send-file?/0/late.py", "", b"", 200),
            ("GET", "/send-file?/0/app.py;100", "", b"", 200),
            ("GET", "/status?204+No+Content", "", b"", 204),
            ("GET", "/status?304+Not+Modified", "", b"", 304),
        ],
    );
    let mut hinted = server.connect();
    hinted.send_request("GET", "/early-hints", &[], b"");
    assert_eq!([(); 3].map(|()| hinted.read_head().status), [103, 103, 200]);
    let mut chunked = server.connect();
    chunked
        .send("POST /count HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    assert!(chunked.read_response("POST").ok().starts_with("3 "));
    let log = server.finish();
    assert_eq!(log.matches("AssertionError: ").count(), 1, "{log}");
    assert!(!log.contains("garbage collected") && !log.contains("client"), "{log}");
}

#[test]
fn flask_is_valid() {
    let (server, _) = serve("flask", "app", "app", &[]);
    let upload = [upload(1000), upload(3_000_000)];
    exchange(
        &server,
        &[
            ("GET", "/", "", b"", 200),
            ("HEAD", "/", "", b"", 200),
            ("GET", "/late", "", b"", 200),
            ("GET", "/numbers?upto=3", "", b"", 200),
            ("POST", "/upload", MULTIPART, &upload[0], 200),
            ("POST", "/upload", MULTIPART, &upload[1], 200),
            ("GET", "/form?a=1&a=2", "", b"", 200),
            ("GET", "/stra%C3%9Fe/x", "", b"", 200),
            ("OPTIONS", "/form", "", b"", 200),
            ("DELETE", "/form", "", b"", 405),
            ("GET", "/download", "", b"", 200),
            ("GET", "/cookie", "", b"", 200),
            ("GET", "/moved", "", b"", 303),
            ("GET", "/refuse/418", "", b"", 418),
            ("GET", "/sold-out", "", b"", 409),
            ("GET", "/nothing", "", b"", 404),
            ("GET", "/static/numbers.txt", "", b"", 200),
        ],
    );
    let etag = server.get("/static/style.css").header("etag").unwrap().to_owned();
    let conditional = server.request("GET", "/static/style.css", &[("If-None-Match", &etag)], b"");
    assert_eq!(conditional.status, 304);
    let part = server.request("GET", "/static/numbers.txt", &[("Range", "bytes=100-109")], b"");
    assert_eq!((part.status, part.body.len()), (206, 10));
    assert_valid(server);
}

#[test]
fn django_is_valid() {
    let data = tempfile::tempdir().unwrap();
    let data_option = ["--data", data.path().to_str().unwrap()];
    let (server, built) = serve("django", "project.wsgi", "application", &data_option);
    let migrate = ["--", "python", "manage.py", "migrate"];
    run(wsgi_wasm().arg("exec").arg(built).args(data_option).args(migrate)).success();
    let token = "x".repeat(32);
    let csrf = ("Cookie", &*format!("csrftoken={token}"));
    let multipart = ("Content-Type", MULTIPART);
    let field = |name: &str, value: &str| {
        format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    };
    let form = field("csrfmiddlewaretoken", &token) + &field("text", "some text") + &field("tag_names", "a");
    let file = "Content-Disposition: form-data; name=\"attachment\"; filename=\"x.bin\"\r\n\r\n";
    let end = upload(3_000_000);
    let end =
        String::from_utf8(end).unwrap().replacen("name=\"file\"; filename", "name=\"other\"; filename", 1);
    let body = format!("{form}--b\r\n{file}{}\r\n{end}", "y".repeat(100_000));
    let created = server.request("POST", "/new/", &[csrf, multipart], body.as_bytes());
    assert_eq!(created.status, 302, "{}", created.text());
    exchange(
        &server,
        &[
            ("GET", "/", "", b"", 200),
            ("HEAD", "/", "", b"", 200),
            ("GET", "/1/", "", b"", 200),
            ("GET", "/media/attachments/x.bin", "", b"", 200),
            ("HEAD", "/media/attachments/x.bin", "", b"", 200),
            ("GET", "/about", "", b"", 301),
            ("GET", "/about/", "", b"", 200),
            ("GET", "/new/", "", b"", 200),
            ("POST", "/new/", FORM, b"title=without+a+token", 403),
            ("GET", "/admin/login/", "", b"", 200),
            ("GET", "/mine/", "", b"", 302),
            ("GET", "/statistics/", "", b"", 200),
            ("GET", "/stream/", "", b"", 200),
            ("GET", "/999/", "", b"", 404),
            ("GET", "/static/notes/style.css", "", b"", 200),
        ],
    );
    assert_valid(server);
}

#[test]
fn bottle_is_valid() {
    let (server, _) = serve("bottle", "app", "app", &[]);
    let upload = upload(200_000);
    exchange(
        &server,
        &[
            ("GET", "/", "", b"", 200),
            ("HEAD", "/", "", b"", 200),
            ("GET", "/greet/x?times=2", "", b"", 200),
            ("GET", "/json/5?item=1", "", b"", 200),
            ("POST", "/form", FORM, b"a=1&b=%C3%BC", 200),
            ("PUT", "/json", "application/json", b"[1]", 200),
            ("GET", "/count", "", b"", 200),
            ("POST", "/upload", MULTIPART, &upload, 200),
            ("GET", "/static/style.css", "", b"", 200),
            ("HEAD", "/static/style.css", "", b"", 200),
            ("GET", "/stream", "", b"", 200),
            ("GET", "/moved", "", b"", 301),
            ("GET", "/forbidden", "", b"", 403),
            ("GET", "/nothing", "", b"", 404),
        ],
    );
    assert_valid(server);
}

#[test]
fn falcon_is_valid() {
    let (server, _) = serve("falcon", "app", "app", &[]);
    let upload = upload(200_000);
    exchange(
        &server,
        &[
            ("GET", "/", "", b"", 200),
            ("HEAD", "/", "", b"", 405),
            ("OPTIONS", "/", "", b"", 200),
            ("GET", "/items/4?limit=3&tag=a", "", b"", 200),
            ("PUT", "/items/3", "application/json", b"{}", 201),
            ("DELETE", "/items/3", "", b"", 204),
            ("POST", "/form", FORM, b"a=1", 200),
            ("POST", "/upload", MULTIPART, &upload, 200),
            ("GET", "/cookies", "", b"", 200),
            ("GET", "/stream", "", b"", 200),
            ("POST", "/raw", "text/plain", &[b'x'; 200_000], 200),
            ("GET", "/moved", "", b"", 301),
            ("GET", "/static/digits.txt", "", b"", 200),
            ("HEAD", "/static/digits.txt", "", b"", 200),
            ("GET", "/names/x", "", b"", 200),
        ],
    );
    assert_valid(server);
}
