//! Starts the binary under test and speaks HTTP with it.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything may take before a test fails rather than hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for a start, in which an interpreter may be compiled.
const START_PATIENCE: Duration = Duration::from_secs(180);

/// The binary under test, with a cache of the tests' own.
///
/// In a session of its own, as a service is. Within one, threads in the background are
/// nicer than whatever else computes there: other tests, and their builds of guests.
pub fn wsgi_wasm() -> Command {
    let mut command = Command::new("setsid");
    command.arg(env!("CARGO_BIN_EXE_wsgi-wasm"));
    set_up(command)
}

fn set_up(mut command: Command) -> Command {
    command
        .env("WSGI_WASM_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
        .env_remove("WSGI_WASM_LOG")
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end and returns its output; the exit status is the
/// caller's to judge.
pub fn run(command: &mut Command) -> Finished {
    let output = command.output().expect("failed to start the binary");
    Finished::new(&output)
}

/// What a command that has ended left.
#[derive(Debug)]
pub struct Finished {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// What it left, from its output.
    pub fn new(output: &Output) -> Finished {
        Finished {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Demands exit status 0.
    #[track_caller]
    pub fn success(self) -> Finished {
        assert_eq!(self.status, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Demands exit status 2, no output, and a message with all of `texts`,
    /// said once.
    #[track_caller]
    pub fn refused(self, texts: &[&str]) -> Finished {
        assert_eq!(self.status, 2, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        for text in texts {
            assert!(self.stderr.contains(text), "no `{text}` in:\n{}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let reason = self.stderr.lines().find_map(|line| line.strip_prefix("error: "));
        let reason = reason.unwrap_or_else(|| panic!("no error in:\n{}", self.stderr));
        assert_eq!(self.stderr.matches(reason).count(), 1, "{}", self.stderr);
        self
    }
}

/// Directory of the guest `name`'s sources.
pub fn guest_sources(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
    if name == "hostile" { tests.join("hostile/python") } else { tests.join("guests").join(name) }
}

/// The built guest `name`. Built once, however many tests ask.
pub fn guest(name: &str) -> PathBuf {
    static BUILT: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);
    // Held while building: cargo runs tests in parallel, and two builds at a
    // time take longer than one after the other.
    let mut built = BUILT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(path) = built.get(name) {
        return path.clone();
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join(format!("{name}.wasm"));
    let options = guest_sources(name).join("build-options");
    let options = std::fs::read_to_string(options).unwrap_or_default();
    // Nicer than guests that compute: the servers of other tests are to be in time.
    let mut command = Command::new("nice");
    command.args(["-n", "15", env!("CARGO_BIN_EXE_wsgi-wasm")]);
    run(set_up(command)
        .arg("build")
        .arg("--dir")
        .arg(guest_sources(name))
        .args(options.split_whitespace())
        .arg("--output")
        .arg(&path))
    .success();
    built.insert(name.to_owned(), path.clone());
    path
}

/// Lines that a process wrote, as they come.
#[derive(Default)]
struct Lines {
    text: Mutex<String>,
    ended: AtomicBool,
    changed: Condvar,
}

impl Lines {
    fn collect(self: &Arc<Self>, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = Arc::clone(self);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                lines.text.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                lines.changed.notify_all();
                line.clear();
            }
            let _text = lines.text.lock().unwrap();
            lines.ended.store(true, Ordering::Relaxed);
            lines.changed.notify_all();
        })
    }

    /// Waits until `found` finds something in what has come so far.
    fn wait_for<T>(&self, found: impl FnMut(&str) -> Option<T>) -> Option<T> {
        self.wait_within(PATIENCE, found)
    }

    fn wait_within<T>(&self, patience: Duration, mut found: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let end = Instant::now() + patience;
        let mut text = self.text.lock().unwrap();
        loop {
            if let Some(found) = found(&text) {
                return Some(found);
            }
            if self.ended.load(Ordering::Relaxed) {
                return None;
            }
            let left = end.checked_duration_since(Instant::now())?;
            text = self.changed.wait_timeout(text, left).unwrap().0;
        }
    }
}

/// Waits for what will be so in a while.
#[track_caller]
pub fn wait_until(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "it never came to be");
    }
}

/// A server under test. Killed when dropped; its log is then shown if the
/// test failed.
pub struct Server {
    child: Child,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
    readers: Vec<JoinHandle<()>>,
    address: Option<SocketAddr>,
}

impl Server {
    /// Serves the guest `name` on a free port.
    pub fn start(name: &str, arguments: &[&str]) -> Server {
        let app = guest(name);
        Server::spawn(wsgi_wasm().arg("serve").arg(app).args(["--bind", "127.0.0.1:0"]).args(arguments))
    }

    /// Runs `command` and waits until it listens.
    pub fn spawn(command: &mut Command) -> Server {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("failed to start the binary");
        let (stdout, stderr) = (Arc::<Lines>::default(), Arc::<Lines>::default());
        let readers =
            vec![stdout.collect(child.stdout.take().unwrap()), stderr.collect(child.stderr.take().unwrap())];
        let mut server = Server { child, stdout, stderr, readers, address: None };
        let line = server.stdout.wait_within(START_PATIENCE, |text| {
            text.lines().find_map(|line| line.strip_prefix("listening on ").map(str::to_owned))
        });
        let line = line.expect("the server did not say where it listens");
        let address = line.strip_prefix("http://").or(line.strip_prefix("https://"));
        server.address = address.map(|address| address.parse().unwrap());
        server
    }

    /// The address of the first socket.
    pub fn address(&self) -> SocketAddr {
        self.address.expect("the server listens on no TCP port")
    }

    /// The first `count` lines on standard output.
    pub fn announced(&self, count: usize) -> Vec<String> {
        let lines = self.stdout.wait_for(|text| {
            let lines: Vec<_> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count && text.ends_with('\n')).then_some(lines)
        });
        lines.expect("the server says less")
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.stderr.text.lock().unwrap().clone()
    }

    /// Waits for a line of the log that has all of `parts`, and returns it.
    #[track_caller]
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        self.stderr
            .wait_for(|text| {
                text.lines().find(|line| parts.iter().all(|part| line.contains(part))).map(str::to_owned)
            })
            .unwrap_or_else(|| panic!("no line with {parts:?} in the log:\n{}", self.log()))
    }

    /// A connection of its own.
    pub fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Connection { reader: BufReader::new(stream) }
    }

    /// Asks for `path` on a new connection.
    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    /// Sends `body` to `path` on a new connection.
    #[track_caller]
    pub fn post(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.request("POST", path, headers, body)
    }

    /// Sends a request on a new connection and reads the response.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let mut connection = self.connect();
        connection.send_request(method, path, headers, body);
        connection.read_response(method)
    }

    /// Sends `signal` to the server.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// The server's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks the server to stop, demands exit status 0, and returns its log.
    #[track_caller]
    pub fn finish(mut self) -> String {
        self.signal("TERM");
        let status = self.wait();
        assert_eq!(status, Some(0), "the server's exit status");
        self.log()
    }

    /// Waits for the server's end and returns its exit status.
    pub fn wait(&mut self) -> Option<i32> {
        // Its output ends when it does.
        for lines in [&self.stdout, &self.stderr] {
            let ended = lines.wait_for(|_| lines.ended.load(Ordering::Relaxed).then_some(()));
            assert!(ended.is_some(), "the server does not stop");
        }
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let log = self.log();
        assert!(!log.contains("panicked at"), "the host panicked:\n{log}");
        if std::thread::panicking() {
            eprintln!("--- log of the server ---\n{log}---");
        }
    }
}

/// One HTTP connection, spoken to by hand: tests send what no client would.
pub struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    /// Sends bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).expect("failed to send");
    }

    /// Sends bytes to a server that may have closed the connection.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.reader.get_mut().write_all(bytes.as_ref())
    }

    /// Sends a request with a body of known length.
    #[track_caller]
    pub fn send_request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: test.example\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            request += &format!("Content-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        self.send(bytes);
    }

    /// Reads a whole response to a request with `method`.
    #[track_caller]
    pub fn read_response(&mut self, method: &str) -> Response {
        self.try_read_response(method).expect("no response")
    }

    /// Reads a whole response; none if the connection ends before it.
    pub fn try_read_response(&mut self, method: &str) -> Option<Response> {
        let mut response = self.try_read_head()?;
        let bodiless = method == "HEAD" || matches!(response.status, 100..=199 | 204 | 304);
        if bodiless {
            return Some(response);
        }
        if let Some(length) = response.header("content-length") {
            let mut body = vec![0; length.parse().unwrap()];
            response.cut = self.reader.read_exact(&mut body).is_err();
            response.body = body;
        } else if response.header("transfer-encoding") == Some("chunked") {
            loop {
                match self.read_chunk() {
                    Some(chunk) if chunk.is_empty() => break,
                    Some(chunk) => response.body.extend_from_slice(&chunk),
                    None => {
                        response.cut = true;
                        break;
                    }
                }
            }
        } else {
            response.cut = self.reader.read_to_end(&mut response.body).is_err();
        }
        Some(response)
    }

    /// Reads the head of a response only.
    #[track_caller]
    pub fn read_head(&mut self) -> Response {
        self.try_read_head().expect("no response")
    }

    fn try_read_head(&mut self) -> Option<Response> {
        let status_line = self.read_line()?;
        let mut parts = status_line.splitn(3, ' ');
        let version = parts.next().unwrap();
        assert!(version.starts_with("HTTP/1."), "not a response: {status_line:?}");
        let status = parts.next().unwrap().parse().unwrap();
        let reason = parts.next().unwrap_or_default().to_owned();
        let mut headers = Vec::new();
        loop {
            let line = self.read_line().expect("the head has no end");
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').unwrap();
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Some(Response { status, reason, headers, body: Vec::new(), cut: false })
    }

    /// Reads one chunk of a chunked body; none if the connection broke.
    pub fn read_chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(&self.read_line()?, 16).ok()?;
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).ok()?;
        chunk.truncate(size);
        Some(chunk)
    }

    /// Whether the server has closed the connection, with nothing left to read.
    pub fn is_closed(&mut self) -> bool {
        !matches!(self.reader.read(&mut [0]), Ok(1..))
    }

    /// Whether the server has sent something, or does so in this time.
    pub fn has_answer(&mut self, time: Duration) -> bool {
        let stream = self.reader.get_ref();
        stream.set_read_timeout(Some(time)).unwrap();
        let answered = !self.reader.buffer().is_empty() || stream.peek(&mut [0]).is_ok();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        answered
    }

    /// The connection as a reader, for bodies that are too large to keep.
    pub fn reader(&mut self) -> &mut impl Read {
        &mut self.reader
    }

    fn read_line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line).ok()?;
        line.pop().filter(|end| *end == b'\n')?;
        line.pop_if(|end| *end == b'\r');
        Some(line.iter().map(|byte| char::from(*byte)).collect())
    }
}

/// A response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub reason: String,
    /// Names in lower case, in order.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The connection broke before the body was complete.
    pub cut: bool,
}

impl Response {
    /// The value of a header that must not be there twice.
    #[track_caller]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(key, _)| key == name);
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "header {name} twice");
        value
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Demands a whole response with status 200 and returns its text.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 200, "{}", self.text());
        assert!(!self.cut, "the body was cut off");
        self.text()
    }
}
