use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::harness::{Finished, Response, Server, guest, guest_sources, run, wsgi_wasm};

/// A client that keeps cookies, as browsers do. It follows no redirect.
struct Browser<'a> {
    server: &'a Server,
    cookies: BTreeMap<String, String>,
}

impl<'a> Browser<'a> {
    fn new(server: &'a Server) -> Browser<'a> {
        Browser { server, cookies: BTreeMap::new() }
    }

    #[track_caller]
    fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let cookies: Vec<_> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let cookies = cookies.join("; ");
        let mut headers = headers.to_vec();
        if !cookies.is_empty() {
            headers.push(("Cookie", &cookies));
        }
        let response = self.server.request(method, path, &headers, body);
        for (_, cookie) in response.headers.iter().filter(|(name, _)| name == "set-cookie") {
            let (name, rest) = cookie.split_once('=').unwrap();
            let value = rest.split(';').next().unwrap();
            if value.is_empty() || value == "\"\"" || rest.contains("Max-Age=0") {
                self.cookies.remove(name);
            } else {
                self.cookies.insert(name.to_owned(), value.to_owned());
            }
        }
        response
    }

    #[track_caller]
    fn get(&mut self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    #[track_caller]
    fn post(&mut self, path: &str, fields: &[(&str, &str)]) -> Response {
        let body = form(fields);
        self.request("POST", path, &[("Content-Type", "application/x-www-form-urlencoded")], body.as_bytes())
    }

    #[track_caller]
    fn upload(&mut self, path: &str, fields: &[(&str, &str)], file: &File) -> Response {
        let (content_type, body) = multipart(fields, file);
        self.request("POST", path, &[("Content-Type", &content_type)], &body)
    }
}

/// A file in a form: the field, the file's name and type, and what is in it.
struct File<'a> {
    field: &'a str,
    name: &'a str,
    content_type: &'a str,
    content: &'a [u8],
}

fn form(fields: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        if !text.is_empty() {
            text.push('&');
        }
        quote(name, &mut text);
        text.push('=');
        quote(value, &mut text);
    }
    text
}

fn quote(value: &str, text: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").unwrap();
        }
    }
}

fn multipart(fields: &[(&str, &str)], file: &File) -> (String, Vec<u8>) {
    let boundary = "----a-boundary";
    let mut head = String::new();
    for (name, value) in fields {
        write!(head, "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
            .unwrap();
    }
    write!(
        head,
        "--{boundary}\r\nContent-Disposition: form-data; name=\"{}\"; filename=\"{}\"\r\n\
         Content-Type: {}\r\n\r\n",
        file.field, file.name, file.content_type
    )
    .unwrap();
    let body = [head.as_bytes(), file.content, format!("\r\n--{boundary}--\r\n").as_bytes()].concat();
    (format!("multipart/form-data; boundary={boundary}"), body)
}

/// So many bytes that do not compress and hold all values.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn sha256(data: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[track_caller]
fn parse(response: &Response) -> Value {
    assert_eq!(response.header("content-type"), Some("application/json"), "{}", response.text());
    assert!(!response.cut, "the body was cut off");
    serde_json::from_str(&response.text()).unwrap()
}

#[track_caller]
fn assert_redirect(response: &Response, status: u16, location: &str) {
    assert_eq!((response.status, response.header("location")), (status, Some(location)));
}

/// A static file with what caches and players ask of one.
#[track_caller]
fn assert_static(server: &Server, path: &str, content: &[u8]) -> String {
    let whole = server.get(path);
    assert_eq!((whole.status, &*whole.body), (200, content), "{path}");
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    let etag = whole.header("etag").unwrap().to_owned();
    let modified = whole.header("last-modified").unwrap();

    let head = server.request("HEAD", path, &[], b"");
    assert_eq!(head.header("content-length"), Some(&*content.len().to_string()));
    assert_eq!(head.header("etag"), Some(&*etag));
    for (name, value) in [("If-None-Match", &*etag), ("If-Modified-Since", modified)] {
        let unchanged = server.request("GET", path, &[(name, value)], b"");
        assert_eq!(unchanged.status, 304, "{name}");
        assert_eq!(unchanged.header("etag"), Some(&*etag), "{name}");
    }
    assert_eq!(server.request("GET", path, &[("If-None-Match", "\"other\"")], b"").status, 200);

    let end = content.len() - 1;
    for (range, from, to) in [("bytes=5-8", 5, 8), ("bytes=-4", end - 3, end), ("bytes=9-", 9, end)] {
        let part = server.request("GET", path, &[("Range", range)], b"");
        assert_eq!((part.status, &*part.body), (206, &content[from..=to]), "{range}");
        let described = format!("bytes {from}-{to}/{}", content.len());
        assert_eq!(part.header("content-range"), Some(&*described));
    }
    assert_eq!(server.request("GET", path, &[("Range", "bytes=99999-")], b"").status, 416);
    etag
}

// Flask.

#[test]
fn flask_renders_templates() {
    let server = Server::start("flask", &["--instances", "1"]);
    let response = server.get("/");
    assert_eq!(response.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(response.header("x-steps"), Some("before index after"));
    assert_eq!(response.ok(), "<title>Test index</title>\n<h1>Hello, NOBODY!</h1>\n");
    // Loaded for the first time now, and what it imports.
    assert_eq!(
        server.get("/late").ok(),
        "<title>Test</title>\n\
         <tr><td>one</td><td>001</td></tr><tr><td>&lt;two&gt;</td><td>002</td></tr>"
    );
    server.finish();
}

#[test]
fn flask_routes_by_method_converter_and_unicode() {
    let server = Server::start("flask", &[]);
    let street = parse(&server.get("/stra%C3%9Fe/%C3%A4b%20c"));
    assert_eq!(street["name"], "äb c");
    assert_eq!(street["url"], "/stra%C3%9Fe/gr%C3%BCn%20&%20blau?nummer=9%C2%BD");
    let fields = form(&[("b", "ü & €"), ("a", "1"), ("a", "")]);
    let expected = json!({"a": ["1", ""], "b": ["ü & €"]});
    assert_eq!(parse(&server.get(&format!("/form?{fields}"))), expected);
    assert_eq!(
        parse(&Browser::new(&server).post("/form", &[("b", "ü & €"), ("a", "1"), ("a", "")])),
        expected
    );
    assert_eq!(server.get("/square/9").ok(), "81");
    assert_eq!(server.get("/rest/a/%C3%BC%20b//c%2F").ok(), "a/ü b//c/");
    let missing = server.get("/square/101");
    assert_eq!((missing.status, &*missing.text()), (404, "<title>Not here: /square/101</title>"));
    assert_redirect(&server.get("/with-slash"), 308, "http://test.example/with-slash/");
    assert_eq!(server.get("/with-slash/").ok(), "slash");

    let refused = server.request("DELETE", "/form", &[], b"");
    assert_eq!(refused.status, 405);
    let mut allowed: Vec<_> = refused.header("allow").unwrap().split(", ").collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["GET", "HEAD", "OPTIONS", "POST"]);
    let options = server.request("OPTIONS", "/square/1", &[], b"");
    assert_eq!((options.status, &*options.body), (200, &b""[..]));
    server.finish();
}

#[test]
fn flask_speaks_json() {
    let server = Server::start("flask", &[]);
    let send = |content_type: &str, body: &str| {
        let response = server.post("/api/sum", &[("Content-Type", content_type)], body.as_bytes());
        (response.status, parse(&response))
    };
    let expected = json!({"sum": 3.5, "text": "½"});
    assert_eq!(send("application/json", r#"{"numbers": [1, 2, 0.5]}"#), (200, expected));
    let expected = json!({"code": 400, "error": "Bad Request"});
    assert_eq!(send("application/json", r#"{"numbers": [1"#), (400, expected));
    let expected = json!({"code": 415, "error": "Unsupported Media Type"});
    assert_eq!(send("text/plain", r#"{"numbers": []}"#), (415, expected));
    let expected = json!({"code": 405, "error": "Method Not Allowed"});
    assert_eq!(parse(&server.get("/api/sum")), expected);
    server.finish();
}

#[test]
fn flask_sets_headers_cookies_and_redirects() {
    let server = Server::start("flask", &[]);
    let download = server.get("/download");
    assert_eq!(
        download.header("content-disposition"),
        Some("attachment; filename=table.csv; filename*=UTF-8''t%C3%A0ble.csv")
    );
    assert_eq!(download.header("content-type"), Some("text/csv; charset=utf-8"));
    assert_eq!(download.ok(), "a,b\n1,2\n");

    let mut browser = Browser::new(&server);
    let first = browser.get("/cookie");
    assert_eq!(first.header("last-modified"), Some("Sat, 29 Feb 2020 12:00:00 GMT"));
    let cookie = first.header("set-cookie").unwrap();
    assert!(cookie.starts_with("flavour=lemon; Expires="), "{cookie}");
    assert!(cookie.ends_with(" GMT; Max-Age=3600; Path=/cookie; SameSite=Lax"), "{cookie}");
    assert_eq!(first.ok(), "none");
    assert_eq!(browser.get("/cookie").ok(), "lemon");

    assert_redirect(&browser.get("/moved"), 303, "/#here");
    assert_eq!(
        browser.get("/").ok(),
        "<title>Test index</title>\n<p class=\"message\">You were moved.</p>\n<h1>Hello, NOBODY!</h1>\n"
    );
    assert_eq!(browser.get("/").ok(), "<title>Test index</title>\n<h1>Hello, NOBODY!</h1>\n");
    server.finish();
}

#[test]
fn flask_handles_its_errors_and_logs_them() {
    let server = Server::start("flask", &["--instances", "1"]);
    let teapot = server.get("/refuse/418");
    assert_eq!((teapot.status, &*teapot.reason), (418, "I'M A TEAPOT"));
    assert_eq!(
        teapot.text(),
        "<!doctype html>\n<html lang=en>\n<title>418 I&#39;m a teapot</title>\n\
         <h1>I&#39;m a teapot</h1>\n<p>No.</p>\n"
    );
    let missing = server.get("/refuse/404");
    assert_eq!((missing.status, &*missing.text()), (404, "<title>Not here: /refuse/404</title>"));
    let sold_out = server.get("/sold-out");
    assert_eq!(sold_out.status, 409);
    assert_eq!(parse(&sold_out), json!({"error": "no more lemons"}));

    let failed = server.get("/fail");
    assert_eq!((failed.status, failed.header("x-steps")), (500, Some("before after")));
    assert!(failed.text().contains("<h1>Internal Server Error</h1>"), "{}", failed.text());
    assert!(!failed.text().contains("secret") && !failed.text().contains("Traceback"), "{}", failed.text());
    let line = server.wait_for_log(&["Exception on /fail [GET]"]);
    let id = line.split_once("request=").unwrap().1;
    for part in ["Traceback", "File \"/0/app.py\"", "RuntimeError: a secret of the app"] {
        server.wait_for_log(&[id, part]);
    }
    server.wait_for_log(&[id, "teardown /fail RuntimeError"]);
    assert_eq!(server.get("/log?what=%C3%BC").ok(), "logged");
    server.wait_for_log(&["WARNING in app: careful with ü"]);
    server.wait_for_log(&["teardown /log NoneType"]);
    server.finish();
}

#[test]
fn flask_logs_people_in_on_every_instance() {
    let data = tempfile::tempdir().unwrap();
    // Made by Werkzeug on CPython with OpenSSL.
    let users = json!({
        "old": "scrypt:32768:8:1$HPPVziCwRD6Osx7w$4a950a2c4751150d8aa0b6e9cb6020eb8b00b719871325d813e103\
                ad3fec454a70bf6d9fd5c7b9568e0fda0ae63519e5275af2a7829e08a7f94b90b56ae8ade8",
        "older": "pbkdf2:sha256:1000000$QwORVhBUWhbZAA9T$4e0068741f307297f03479cce4050aac34d09b8c0358fb4\
                  eb5650c66a17e9b1d",
    });
    let file = data.path().join("users.json");
    std::fs::write(&file, users.to_string()).unwrap();
    let data = data.path().to_str().unwrap();
    let arguments = ["--isolation", "request", "--data", data, "--env", "SECRET_KEY=one"];
    let server = Server::start("flask", &arguments);

    for name in ["old", "older"] {
        let mut browser = Browser::new(&server);
        let response = browser.post("/members/login", &[("name", name), ("password", "correct horse")]);
        assert_redirect(&response, 302, "/");
    }
    let mut browser = Browser::new(&server);
    let new = [("name", "Zoë"), ("password", "pässword")];
    assert_redirect(&browser.post("/members/register", &new), 302, "/members/login");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert!(kept["Zoë"].as_str().unwrap().starts_with("scrypt:32768:8:1$"), "{kept}");
    let form =
        "<form method=\"post\"><input name=\"name\"><input name=\"password\" type=\"password\"></form>";
    assert_eq!(
        browser.get("/members/login").ok(),
        format!("<title>Test</title>\n<p class=\"good\">You are registered.</p>\n{form}\n")
    );
    let wrong = browser.post("/members/login", &[("name", "Zoë"), ("password", "password")]);
    assert_eq!(wrong.status, 401);
    assert!(wrong.text().contains("<p class=\"bad\">Wrong name or password.</p>"), "{}", wrong.text());
    assert_eq!(browser.post("/members/login", &[("name", "nobody"), ("password", "")]).status, 401);

    let response = browser.post("/members/login", &new);
    assert_redirect(&response, 302, "/");
    let cookie = response.header("set-cookie").unwrap();
    assert!(cookie.ends_with("; HttpOnly; Path=/"), "{cookie}");
    let greeting = "<title>Test index</title>\n<p class=\"good\">Welcome, Zoë.</p>\n<h1>Hello, ZOË!</h1>\n";
    assert_eq!(browser.get("/").ok(), greeting);
    assert_eq!(browser.get("/").ok(), "<title>Test index</title>\n<h1>Hello, ZOË!</h1>\n");
    let session = browser.cookies.clone();
    assert_redirect(&browser.post("/members/logout", &[]), 302, "/");
    assert_eq!(browser.get("/").ok(), "<title>Test index</title>\n<h1>Hello, NOBODY!</h1>\n");
    server.finish();

    // The key is the one of run time: the same one, and another.
    for (key, name) in [("SECRET_KEY=one", "ZOË"), ("SECRET_KEY=two", "NOBODY")] {
        let server = Server::start("flask", &["--env", key]);
        let mut browser = Browser { server: &server, cookies: session.clone() };
        assert_eq!(browser.get("/").ok(), format!("<title>Test index</title>\n<h1>Hello, {name}!</h1>\n"));
        server.finish();
    }
}

#[test]
fn flask_takes_uploads_in_memory_and_through_a_file() {
    let server = Server::start("flask", &["--instances", "1"]);
    // Werkzeug keeps what is larger than 500 kB in a temporary file.
    for (length, on_disk) in [(1000, false), (3_000_000, true), (0, false)] {
        let content = noise(length);
        let file = File { field: "file", name: "größe.bin", content_type: "image/png", content: &content };
        let response = Browser::new(&server).upload("/upload", &[("title", "ü €")], &file);
        assert_eq!(
            parse(&response),
            json!({
                "name": "größe.bin", "type": "image/png", "size": length, "sha256": sha256(&content),
                "on_disk": on_disk, "title": "ü €",
            })
        );
    }
    let missing = Browser::new(&server).post("/upload", &[("title", "alone")]);
    assert_eq!(missing.status, 400);
    server.finish();
}

#[test]
fn flask_sends_files_whole_and_in_part() {
    let server = Server::start("flask", &["--instances", "1"]);
    let content = noise(1_000_000);
    let file = File { field: "file", name: "x", content_type: "image/png", content: &content };
    Browser::new(&server).upload("/upload", &[("title", "x")], &file).ok();
    let get = |headers: &[(&str, &str)]| server.request("GET", "/copy", headers, b"");
    let whole = get(&[]);
    assert_eq!(whole.header("content-length"), Some("1000000"));
    assert!(whole.body == content);
    let etag = whole.header("etag").unwrap();
    assert_eq!(get(&[("If-None-Match", etag)]).status, 304);
    for (range, bytes) in [
        ("bytes=0-0", 0..1),
        ("bytes=500000-", 500_000..1_000_000),
        ("bytes=100-899999", 100..900_000),
        ("bytes=-70000", 930_000..1_000_000),
    ] {
        let part = get(&[("Range", range), ("If-Range", etag)]);
        let described = format!("bytes {}-{}/1000000", bytes.start, bytes.end - 1);
        assert_eq!((part.status, part.header("content-range")), (206, Some(&*described)));
        assert_eq!(part.header("content-length"), Some(&*bytes.len().to_string()));
        assert!(part.body == content[bytes], "{range}");
    }
    assert_eq!(get(&[("Range", "bytes=1000000-")]).status, 416);
    assert!(get(&[("Range", "bytes=0-9"), ("If-Range", "\"other\"")]).body == content);
    let head = server.request("HEAD", "/copy", &[], b"");
    assert_eq!((head.status, head.header("content-length")), (200, Some("1000000")));
    server.finish();
}

#[test]
fn flask_streams_with_its_context() {
    let server = Server::start("flask", &["--instances", "1"]);
    let mut connection = server.connect();
    connection.send_request("GET", "/numbers?upto=3", &[], b"");
    let head = connection.read_head();
    assert_eq!((head.status, head.header("transfer-encoding")), (200, Some("chunked")));
    for number in 0..3 {
        let chunk = connection.read_chunk().unwrap();
        assert_eq!(String::from_utf8(chunk).unwrap(), format!("{number} /numbers before\n"));
    }
    assert_eq!(connection.read_chunk(), Some(Vec::new()));
    server.wait_for_log(&["teardown /numbers NoneType"]);
    // One that nobody reads to its end leaves a sound app behind.
    let mut connection = server.connect();
    connection.send_request("GET", "/numbers?upto=1000000000", &[], b"");
    connection.read_head();
    assert_eq!(connection.read_chunk().unwrap(), b"0 /numbers before\n");
    drop(connection);
    assert_eq!(server.get("/square/3").ok(), "9");
    let log = server.finish();
    assert!(!log.contains("Traceback") && !log.contains("trapped"), "{log}");
}

#[test]
fn flask_serves_static_files() {
    let numbers: String = (1..=4000).map(|number| format!("{number}\n")).collect();
    let server = Server::start("flask", &[]);
    let etag = assert_static(&server, "/static/numbers.txt", numbers.as_bytes());
    let style = server.get("/static/style.css");
    assert_eq!(style.header("content-type"), Some("text/css; charset=utf-8"));
    assert_eq!(style.ok(), "h1 { color: teal }\n");
    for path in ["/static/../app.py", "/static/%2e%2e/app.py", "/static//0/app.py", "/static/none.css"] {
        assert_ne!(server.get(path).status, 200, "{path}");
    }
    server.finish();
    // What a client has cached outlives the server.
    let server = Server::start("flask", &[]);
    assert_eq!(server.get("/static/numbers.txt").header("etag"), Some(&*etag));
    server.finish();
}

#[test]
fn flask_commands_run() {
    let exec = |command: &[&str]| run(wsgi_wasm().arg("exec").arg(guest("flask")).arg("--").args(command));
    let routes = exec(&["python", "-m", "flask", "--app", "app", "routes"]).success().stdout;
    assert!(routes.contains("/straße/<name>") && routes.contains("members.login"), "{routes}");
    let script = "import app; print(app.app.test_client().get('/square/7').text)";
    assert_eq!(exec(&["python", "-c", script]).success().stdout, "49\n");
    let unknown = exec(&["python", "-m", "flask", "--app", "app", "nothing"]);
    assert_eq!(unknown.status, 2);
    assert!(unknown.stderr.contains("No such command 'nothing'"), "{}", unknown.stderr);
}

#[test]
fn the_example_runs() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/flask");
    let serve = |arguments: &[&str]| {
        Server::spawn(wsgi_wasm().arg("serve").arg(&example).args(["--bind", "127.0.0.1:0"]).args(arguments))
    };
    let server = serve(&["--isolation", "request"]);
    let mut browser = Browser::new(&server);
    assert!(browser.get("/").ok().contains("<h1>Hello!</h1>"));
    assert_redirect(&browser.post("/name", &[("name", " Zoë ")]), 302, "/");
    assert_redirect(&browser.post("/items", &[("item", "<lemons>")]), 302, "/");
    assert_redirect(&browser.post("/items", &[("item", "ginger")]), 302, "/");
    let page = browser.get("/").ok();
    assert!(page.starts_with("<!doctype html>\n") && page.ends_with("</html>"), "{page}");
    for part in [
        "<title>Shopping list</title>",
        "<link rel=\"stylesheet\" href=\"/static/style.css\">",
        "<h1>Zoë's shopping list</h1>",
        "<li>&lt;lemons&gt;</li>",
        "<li>ginger</li>",
    ] {
        assert!(page.contains(part), "no {part} in:\n{page}");
    }
    assert_eq!(parse(&browser.get("/api/items")), json!({"name": "Zoë", "items": ["<lemons>", "ginger"]}));
    let about = browser.get("/about").ok();
    assert!(about.contains("Python 3.14") && about.contains("on wasi"), "{about}");
    assert_redirect(&browser.post("/forget", &[]), 302, "/");
    assert_eq!(parse(&browser.get("/api/items")), json!({"name": null, "items": []}));

    let style = browser.get("/static/style.css");
    assert_eq!(style.header("content-type"), Some("text/css; charset=utf-8"));
    assert_eq!(style.body, std::fs::read(example.join("static/style.css")).unwrap());
    let missing = browser.get("/not/here");
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains("<p>There is no page /not/here.</p>"), "{}", missing.text());
    server.finish();
}

// Django.

/// Runs `python manage.py COMMAND` in the Django guest.
fn manage(data: &Path, arguments: &[&str], command: &[&str]) -> Finished {
    run(wsgi_wasm()
        .arg("exec")
        .arg(guest("django"))
        .arg("--data")
        .arg(data)
        .args(arguments)
        .args(["--", "python", "manage.py"])
        .args(command))
}

const CREATE_SUPERUSER: [&str; 6] = [
    "--env",
    "DJANGO_SUPERUSER_USERNAME=admin",
    "--env",
    "DJANGO_SUPERUSER_EMAIL=admin@test.example",
    "--env",
    "DJANGO_SUPERUSER_PASSWORD=correct horse",
];

/// A data directory with a migrated database and the user `admin`.
fn django_data() -> tempfile::TempDir {
    static DATABASE: OnceLock<Vec<u8>> = OnceLock::new();
    let database = DATABASE.get_or_init(|| {
        let data = tempfile::tempdir().unwrap();
        manage(data.path(), &[], &["migrate"]).success();
        manage(data.path(), &CREATE_SUPERUSER, &["createsuperuser", "--noinput"]).success();
        std::fs::read(data.path().join("db.sqlite3")).unwrap()
    });
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("db.sqlite3"), database).unwrap();
    data
}

fn serve_django(data: &tempfile::TempDir, arguments: &[&str]) -> Server {
    let data = data.path().to_str().unwrap();
    Server::start("django", &[&["--data", data], arguments].concat())
}

impl Browser<'_> {
    /// Posts a form of Django's with the token of its page, as people do.
    #[track_caller]
    fn submit(&mut self, path: &str, fields: &[(&str, &str)]) -> Response {
        let token = token(&self.get(path).ok());
        self.post(path, &[&[("csrfmiddlewaretoken", &*token)], fields].concat())
    }

    #[track_caller]
    fn log_in(&mut self) {
        let response = self.submit(
            "/admin/login/?next=/admin/",
            &[("username", "admin"), ("password", "correct horse"), ("next", "/admin/")],
        );
        assert_redirect(&response, 302, "/admin/");
    }
}

/// The CSRF token in a page.
#[track_caller]
fn token(page: &str) -> String {
    let (_, rest) = page.split_once("name=\"csrfmiddlewaretoken\" value=\"").expect("no token in the page");
    rest.split('"').next().unwrap().to_owned()
}

#[test]
fn django_commands_keep_their_database() {
    let data = tempfile::tempdir().unwrap();
    let unapplied = manage(data.path(), &[], &["migrate", "--check"]);
    assert_eq!(unapplied.status, 1, "{}", unapplied.stderr);
    let migrated = manage(data.path(), &[], &["migrate"]).success().stdout;
    assert!(migrated.contains("  Applying notes.0001_initial... OK\n"), "{migrated}");
    assert!(data.path().join("db.sqlite3").exists());
    let again = manage(data.path(), &[], &["migrate"]).success().stdout;
    assert!(again.ends_with("  No migrations to apply.\n"), "{again}");
    manage(data.path(), &[], &["makemigrations", "--check", "--dry-run"]).success();

    let created = manage(data.path(), &CREATE_SUPERUSER, &["createsuperuser", "--noinput"]);
    assert_eq!(created.success().stdout, "Superuser created successfully.\n");
    let taken = manage(data.path(), &CREATE_SUPERUSER, &["createsuperuser", "--noinput"]);
    assert_eq!(taken.status, 1);
    assert_eq!(taken.stderr, "CommandError: Error: That username is already taken.\n");
    let users = manage(data.path(), &[], &["dumpdata", "auth.user"]).success().stdout;
    let users: Value = serde_json::from_str(&users).unwrap();
    assert_eq!(users[0]["fields"]["username"], "admin");
    let password = users[0]["fields"]["password"].as_str().unwrap();
    assert!(password.starts_with("pbkdf2_sha256$1000000$"), "{password}");

    let collected = manage(data.path(), &[], &["collectstatic", "--noinput"]).success().stdout;
    assert!(collected.ends_with("static files copied to '/data/static'.\n"), "{collected}");
    assert_eq!(
        std::fs::read(data.path().join("static/notes/style.css")).unwrap(),
        std::fs::read(guest_sources("django").join("notes/static/notes/style.css")).unwrap()
    );
    manage(data.path(), &["--env", "SECRET_KEY=another"], &["check"]).success();
}

#[test]
fn django_renders_pages() {
    let data = django_data();
    let server = serve_django(&data, &["--instances", "1"]);
    let response = server.get("/");
    assert_eq!(response.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(response.header("x-frame-options"), Some("DENY"));
    let head = "<title>Notes</title>\n<link rel=\"stylesheet\" href=\"/static/notes/style.css\">\n";
    assert_eq!(response.ok(), format!("{head}<p>No notes.</p>\n<p>Page 1 of 1, 0 notes</p>\n\n"));
    assert_redirect(&server.get("/about"), 301, "/about/");
    // The language comes from a catalogue of messages, the zone from tzdata.
    let about = server.get("/about/").ok();
    assert!(about.contains("<p>Yes: CET</p>") || about.contains("<p>Yes: CEST</p>"), "{about}");
    assert_eq!(server.get("/stream/").ok(), "piece 0\npiece 1\npiece 2\n");
    let missing = server.get("/999/");
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains("<h1>Not Found</h1>"), "{}", missing.text());
    let mut connection = server.connect();
    connection.send("GET /new/ HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert_eq!(connection.read_response("GET").status, 400);
    server.wait_for_log(&["Invalid HTTP_HOST header: 'evil.example'"]);

    let failed = server.get("/fail/");
    assert_eq!(failed.status, 500);
    assert!(failed.text().contains("<h1>Server Error (500)</h1>"), "{}", failed.text());
    assert!(!failed.text().contains("secret"), "{}", failed.text());
    let line = server.wait_for_log(&["Internal Server Error: /fail/"]);
    let id = line.split_once("request=").unwrap().1;
    for part in ["Traceback", "File \"/0/notes/views.py\"", "RuntimeError: a secret of the app"] {
        server.wait_for_log(&[id, part]);
    }
    server.finish();
}

#[test]
fn django_logs_in_through_its_admin() {
    let data = django_data();
    let server = serve_django(&data, &["--isolation", "request", "--env", "SECRET_KEY=one"]);
    let mut browser = Browser::new(&server);
    assert_redirect(&browser.get("/admin/notes/note/"), 302, "/admin/login/?next=/admin/notes/note/");
    assert_redirect(&browser.get("/mine/"), 302, "/admin/login/?next=/mine/");
    let wrong = browser.submit("/admin/login/", &[("username", "admin"), ("password", "wrong")]);
    assert!(wrong.ok().contains("Please enter the correct username and password for a staff account"));
    assert_eq!(browser.post("/admin/login/", &[("username", "admin")]).status, 403);

    browser.log_in();
    assert!(browser.cookies.contains_key("sessionid"));
    let page = browser.get("/admin/").ok();
    assert!(page.contains("<title>Site administration | Django site admin</title>"), "{page}");
    assert!(page.contains("<a href=\"/admin/notes/note/\">Notes</a>"), "{page}");

    let response = browser.submit("/admin/notes/tag/add/", &[("name", "red")]);
    assert_redirect(&response, 302, "/admin/notes/tag/");
    let page = browser.get("/admin/notes/tag/").ok();
    let message = "The tag “<a href=\"/admin/notes/tag/1/change/\">red</a>” was added successfully.";
    assert!(page.contains(message), "{page}");
    let fields = [("title", "Ölfarbe"), ("text", "é"), ("tags", "1"), ("attributes", "{\"length\": 1}")];
    let response = browser.submit("/admin/notes/note/add/", &fields);
    assert_redirect(&response, 302, "/admin/notes/note/");
    assert!(browser.get("/admin/notes/note/").ok().contains(">Ölfarbe</a>” was added successfully."));
    for (query, found) in [("", 1), ("?q=%C3%B6lfarbe", 0), ("?q=%C3%96lf", 1), ("?tags__id__exact=1", 1)] {
        let page = browser.get(&format!("/admin/notes/note/{query}")).ok();
        assert_eq!(page.matches("/admin/notes/note/1/change/").count(), found, "{query}:\n{page}");
    }
    let response = browser.submit("/admin/notes/note/1/change/", &[("title", ""), ("attributes", "{}")]);
    assert!(response.ok().contains("This field is required."));
    let response = browser.submit("/admin/notes/note/1/delete/", &[("post", "yes")]);
    assert_redirect(&response, 302, "/admin/notes/note/");
    assert!(browser.get("/").ok().contains("<p>No notes.</p>"));

    // The session is in the database, for whichever instance comes next.
    assert_eq!(browser.get("/mine/").ok(), "admin 1");
    assert_eq!(browser.get("/mine/").ok(), "admin 2");
    let session = browser.cookies.clone();
    server.finish();
    let server = serve_django(&data, &["--env", "SECRET_KEY=one"]);
    let mut browser = Browser { server: &server, cookies: session.clone() };
    assert_eq!(browser.get("/mine/").ok(), "admin 3");
    server.finish();
    // The key of run time, not the one of the build, is behind the session.
    let server = serve_django(&data, &["--env", "SECRET_KEY=two"]);
    let mut browser = Browser { server: &server, cookies: session };
    assert_redirect(&browser.get("/mine/"), 302, "/admin/login/?next=/mine/");
    server.finish();
}

#[test]
fn django_keeps_what_forms_send() {
    let data = django_data();
    let server = serve_django(&data, &[]);
    let mut browser = Browser::new(&server);
    let fields = [("title", "Größe"), ("text", "one\r\n\r\ntwo <b>"), ("tag_names", "red blue")];
    assert_redirect(&browser.submit("/new/", &fields), 302, "/1/");
    let page = browser.get("/1/").ok();
    assert_eq!(
        page,
        "<title>Größe</title>\n<link rel=\"stylesheet\" href=\"/static/notes/style.css\">\n\
         <p class=\"success\">“Größe” is kept.</p>\n<h1>Größe</h1>\n\
         <p>one</p>\n\n<p>two &lt;b&gt;</p>\n<p>red, blue</p>\n\n"
    );
    let refused = browser.submit("/new/", &[("title", "lower"), ("tag_names", "red")]).ok();
    assert!(refused.contains("A title starts with a capital letter."), "{refused}");
    assert!(refused.contains("value=\"lower\""), "{refused}");
    let forged = Browser::new(&server).post("/new/", &[("title", "Forged")]);
    assert_eq!(forged.status, 403);
    assert!(forged.text().contains("CSRF verification failed"), "{}", forged.text());

    for number in 2..=11 {
        let fields = [("title", &*format!("Note {number}")), ("tag_names", "blue")];
        assert_redirect(&browser.submit("/new/", &fields), 302, &format!("/{number}/"));
    }
    let page = Browser::new(&server).get("/?page=3").ok();
    assert!(page.contains("<li><a href=\"/11/\">Note 11</a></li>"), "{page}");
    assert!(page.contains("<p>Page 3 of 3, 11 notes</p>"), "{page}");
    let statistics = parse(&server.get("/statistics/"));
    assert_eq!(statistics["tags"], json!([["blue", 11], ["red", 1]]));
    assert_eq!((&statistics["long"], &statistics["recent"]), (&json!(["Größe"]), &json!(11)));
    assert_eq!(statistics["asked"], 1);
    assert_eq!(browser.request("POST", "/rolled-back/", &[], b"").status, 403);
    let token = browser.cookies["csrftoken"].clone();
    let rolled_back = browser.request("POST", "/rolled-back/", &[("X-CSRFToken", &token)], b"");
    assert_eq!(rolled_back.ok(), "1 0");
    server.finish();
}

#[test]
fn django_keeps_uploads() {
    let data = django_data();
    let server = serve_django(&data, &[]);
    let mut browser = Browser::new(&server);
    let token = token(&browser.get("/new/").ok());
    // Django keeps what is larger than 2.5 MB in a temporary file.
    for (number, length, size) in [(1, 5, "5\u{a0}bytes"), (2, 3_000_000, "2.9\u{a0}MB")] {
        let content = noise(length);
        let name = format!("größe-{number}.bin");
        let file = File { field: "attachment", name: &name, content_type: "image/png", content: &content };
        let fields = [("csrfmiddlewaretoken", &*token), ("title", "A file")];
        assert_redirect(&browser.upload("/new/", &fields, &file), 302, &format!("/{number}/"));
        let page = browser.get(&format!("/{number}/")).ok();
        assert!(page.contains(&format!("<p>attachments/{name}: {size}</p>")), "{page}");
        assert!(std::fs::read(data.path().join("media/attachments").join(&name)).unwrap() == content);
        let file = server.get(&format!("/media/attachments/gr%C3%B6%C3%9Fe-{number}.bin"));
        assert_eq!(file.header("content-length"), Some(&*length.to_string()));
        assert!(file.body == content, "not the file that was sent");
    }
    // Of the same name, once more.
    let file =
        File { field: "attachment", name: "größe-1.bin", content_type: "text/plain", content: b"other" };
    let fields = [("csrfmiddlewaretoken", &*token), ("title", "Another file")];
    assert_redirect(&browser.upload("/new/", &fields, &file), 302, "/3/");
    assert_eq!(std::fs::read_dir(data.path().join("media/attachments")).unwrap().count(), 3);
    assert_eq!(server.get("/media/attachments/gr%C3%B6%C3%9Fe-1.bin").body, noise(5));
    assert_eq!(server.get("/media/../db.sqlite3").status, 400);
    server.finish();
}

#[test]
fn django_serves_static_files_with_whitenoise() {
    let data = tempfile::tempdir().unwrap();
    let server = serve_django(&data, &[]);
    let style = server.get("/static/admin/css/base.css");
    assert_eq!(style.header("content-type"), Some("text/css; charset=\"utf-8\""));
    assert!(style.ok().starts_with("/*\n    DJANGO Admin styles\n*/\n"));
    let own = server.get("/static/notes/style.css");
    let etag = own.header("etag").unwrap();
    let unchanged = server.request("GET", "/static/notes/style.css", &[("If-None-Match", etag)], b"");
    assert_eq!(unchanged.status, 304);
    let part = server.request("GET", "/static/notes/style.css", &[("Range", "bytes=0-1")], b"");
    assert_eq!((part.status, &*part.body), (206, &b"h1"[..]));
    assert_eq!(own.ok(), "h1 { color: olive }\n");
    assert_eq!(server.get("/static/notes/none.css").status, 404);
    server.finish();
}

#[test]
fn django_shows_its_debug_pages() {
    // Settings are read during the build, so this is a build of its own.
    let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join("django-debug.wasm");
    run(wsgi_wasm()
        .args(["build", "--env", "DEBUG=1", "--dir"])
        .arg(guest_sources("django"))
        .arg("--output")
        .arg(&path))
    .success();
    let data = django_data();
    let server = Server::spawn(
        wsgi_wasm().arg("serve").arg(&path).args(["--bind", "127.0.0.1:0", "--data"]).arg(data.path()),
    );
    let page = server.request("GET", "/fail/", &[("Accept", "text/html")], b"");
    assert_eq!(page.status, 500);
    let page = page.text();
    for part in [
        "<h1>RuntimeError",
        "a secret of the app",
        // Source lines, of the app and of a package.
        "# the line that fails",
        "response = wrapped_callback(request, *callback_args, **callback_kwargs)",
        // A local variable.
        "<td>secret</td>",
        "/0/notes/views.py",
    ] {
        assert!(page.contains(part), "no {part} in:\n{page}");
    }
    let missing = server.get("/no/such/page");
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains("Using the URLconf defined in <code>project.urls</code>"));
    assert_eq!(server.get("/static/notes/style.css").ok(), "h1 { color: olive }\n");
    let missing = server.get("/1/");
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains("No note found matching the query"), "{}", missing.text());
    server.finish();
}

#[test]
fn django_instances_share_one_database() {
    const CLIENTS: usize = 8;
    const REQUESTS: usize = 10;
    let data = django_data();
    let server = serve_django(&data, &["--instances", "4"]);
    let counts = std::thread::scope(|scope| {
        let count = |client: usize| {
            let mut browser = Browser::new(&server);
            browser.get("/new/").ok();
            let token = browser.cookies["csrftoken"].clone();
            let mut seen = Vec::new();
            for number in 0..REQUESTS {
                let title = format!("Note {client}-{number}");
                let response = browser.post("/count/", &[("csrfmiddlewaretoken", &token), ("title", &title)]);
                seen.push(response.ok().parse::<usize>().unwrap());
                // Readers are in the way of writers, too.
                assert!(browser.get("/").ok().contains("<p>Page 1 of "));
            }
            seen
        };
        let clients: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(move || count(client))).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    // Each update saw the one before it, and none was lost.
    let mut sorted = counts;
    sorted.sort_unstable();
    assert_eq!(sorted, (1..=CLIENTS * REQUESTS).collect::<Vec<_>>());
    let page = server.get("/?page=last").ok();
    assert!(page.contains("<p>Page 16 of 16, 80 notes</p>"), "{page}");
    let log = server.finish();
    assert!(!log.contains("Traceback"), "{log}");
    // Nobody holds the database any more.
    let left: Vec<_> =
        std::fs::read_dir(data.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["db.sqlite3"]);
    let titles = manage(data.path(), &[], &["dumpdata", "notes.note"]).success().stdout;
    let titles: Value = serde_json::from_str(&titles).unwrap();
    for client in 0..CLIENTS {
        for number in 0..REQUESTS {
            let title = format!("Note {client}-{number}");
            let kept = titles.as_array().unwrap().iter().filter(|note| note["fields"]["title"] == title);
            assert_eq!(kept.count(), 1, "{title}");
        }
    }
}

// Bottle.

#[test]
fn bottle_answers() {
    let server = Server::start("bottle", &["--instances", "1"]);
    let index = server.get("/");
    assert_eq!(index.header("content-type"), Some("text/html; charset=UTF-8"));
    assert_eq!(index.header("x-hook"), Some("ran"));
    assert_eq!(index.ok(), "Hello from Bottle");
    assert_eq!(
        server.get("/greet/%C3%BC%3Cb%3E?times=2").ok(),
        "<title>Greetings</title>\n<main><p>1: Hello, ü&lt;b&gt;!</p>\n<p>2: Hello, ü&lt;b&gt;!</p>\n</main>\n"
    );
    assert_eq!(parse(&server.get("/json/4?item=a&item=%26")), json!({"number": 4, "list": ["a", "&"]}));
    let sent = Browser::new(&server).post("/form", &[("a", "ü €"), ("a", "2"), ("b", "")]);
    assert_eq!(parse(&sent), json!({"a": ["ü €", "2"], "b": [""]}));
    let put = |body: &[u8]| server.request("PUT", "/json", &[("Content-Type", "application/json")], body);
    assert_eq!(parse(&put(br#"{"a": [1]}"#)), json!({"got": {"a": [1]}}));
    assert_eq!(put(br#"{"a": [1"#).status, 400);
    assert_eq!(server.get("/stream").ok(), "piece 0\npiece 1\npiece 2\n");
    assert_redirect(&server.get("/moved"), 301, "http://test.example/json/1");

    let refused = server.get("/forbidden");
    assert_eq!((refused.status, &*refused.text()), (403, "403: not for you"));
    let missing = server.get("/nope");
    assert_eq!((missing.status, &*missing.text()), (404, "404: Not found: '/nope'"));
    let wrong = server.post("/", &[], b"");
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("GET")));
    let failed = server.get("/fail");
    assert_eq!(failed.status, 500);
    assert!(!failed.text().contains("secret"), "{}", failed.text());
    server.wait_for_log(&["File \"/0/app.py\""]);
    server.wait_for_log(&["RuntimeError: a secret of the app"]);
    server.finish();
}

#[test]
fn bottle_signs_cookies_takes_uploads_and_serves_files() {
    let server = Server::start("bottle", &["--isolation", "request", "--env", "SECRET_KEY=one"]);
    let mut browser = Browser::new(&server);
    for number in 0..3 {
        assert_eq!(browser.get("/count").ok(), format!("{number} before"));
    }
    let cookies = browser.cookies.clone();
    let content = noise(2_000_000);
    let file = File { field: "file", name: "größe.bin", content_type: "image/png", content: &content };
    assert_eq!(
        parse(&browser.upload("/upload", &[], &file)),
        json!({"name": "größe.bin", "size": content.len(), "sha256": sha256(&content)})
    );
    assert_static(&server, "/static/style.css", b"body { margin: 0 }\n");
    let outside = server.get("/static/../app.py");
    assert_eq!((outside.status, &*outside.text()), (403, "403: Access denied."));
    server.finish();

    let server = Server::start("bottle", &["--env", "SECRET_KEY=two"]);
    assert_eq!(Browser { server: &server, cookies }.get("/count").ok(), "0 before");
    server.finish();
}

// Falcon.

#[test]
fn falcon_answers() {
    let server = Server::start("falcon", &["--instances", "1"]);
    let index = server.request("GET", "/", &[("X-Trace", "mine")], b"");
    assert_eq!(index.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(index.header("x-trace"), Some("mine"));
    assert_eq!(index.ok(), "Hello from Falcon");
    assert_eq!(
        parse(&server.get("/items/4?limit=3&tag=a&tag=%C3%BC")),
        json!({"number": 4, "limit": 3, "tags": ["a", "ü"]})
    );
    let title = |response: Response, status: u16| {
        assert_eq!(response.status, status, "{}", response.text());
        parse(&response)["title"].as_str().unwrap().to_owned()
    };
    assert_eq!(title(server.get("/items/4?limit=11"), 400), "Invalid parameter");
    assert_eq!(title(server.get("/items/4"), 400), "Missing parameter");
    assert_eq!(title(server.get("/items/0"), 404), "404 Not Found");
    assert_eq!(title(server.get("/nope"), 404), "404 Not Found");
    let put = |body: &[u8]| server.request("PUT", "/items/3", &[("Content-Type", "application/json")], body);
    let created = put(br#"{"a": ["\u00fc"]}"#);
    assert_eq!((created.status, created.header("location")), (201, Some("/items/3")));
    assert_eq!(parse(&created), json!({"number": 3, "got": {"a": ["ü"]}}));
    assert_eq!(title(put(br#"{"a": "#), 400), "Invalid JSON");
    let gone = server.request("DELETE", "/items/3", &[], b"");
    assert_eq!((gone.status, gone.header("content-length")), (204, None));
    let wrong = server.post("/", &[], b"");
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("GET, OPTIONS")));
    assert_eq!(server.get("/stream").ok(), "piece 0\npiece 1\npiece 2\n");
    assert_redirect(&server.get("/moved"), 301, "/");
    assert_eq!(parse(&server.get("/names/a%20%C3%BC/b")), json!({"path": "/names/a ü/b", "name": "a ü/b"}));

    let conflict = server.get("/fails?known=yes");
    assert_eq!(conflict.status, 409);
    assert_eq!(parse(&conflict), json!({"title": "Out of stock", "description": "no more of these"}));
    assert_eq!(title(server.get("/fails"), 500), "500 Internal Server Error");
    server.wait_for_log(&["[FALCON] [ERROR] GET /fails => Traceback"]);
    server.wait_for_log(&["RuntimeError: a secret of the app"]);
    server.wait_for_log(&["GET /fails?known=yes => not served"]);
    server.finish();
}

#[test]
fn falcon_takes_bodies_and_cookies_and_serves_files() {
    let server = Server::start("falcon", &["--instances", "1"]);
    let mut browser = Browser::new(&server);
    assert_eq!(
        parse(&browser.post("/form", &[("a", "ü €"), ("a", "2"), ("b", "")])),
        json!({"a": ["ü €", "2"], "b": ""})
    );
    let content = noise(2_000_000);
    let file = File { field: "file", name: "größe.bin", content_type: "image/png", content: &content };
    assert_eq!(
        parse(&browser.upload("/upload", &[("a", "b")], &file)),
        json!([["a", null, 1, sha256(b"b")], ["file", "größe.bin", content.len(), sha256(&content)],])
    );
    assert_eq!(server.post("/raw", &[], &content).ok(), "2000000");

    browser.cookies.insert("old".to_owned(), "1".to_owned());
    assert_eq!(browser.get("/cookies").ok(), "0");
    assert_eq!(browser.get("/cookies").ok(), "1");
    assert_eq!(browser.cookies.keys().collect::<Vec<_>>(), ["seen"]);

    let digits = assert_static(&server, "/static/digits.txt", b"0123456789\n");
    assert!(digits.ends_with("-b\""), "{digits}");
    assert_eq!(server.get("/static/../app.py").status, 404);
    server.finish();
}
