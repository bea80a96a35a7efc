use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::harness::{Server, guest, run, wsgi_wasm};

/// Runs Python in an instance and returns its `result`.
#[track_caller]
fn python(server: &Server, code: &str) -> Value {
    serde_json::from_str(&server.post("/run", &[], code.as_bytes()).ok()).unwrap()
}

/// A server with the directory `data` granted.
fn serve(data: &Path, arguments: &[&str]) -> Server {
    let data = ["--data", data.to_str().unwrap()];
    Server::start("behaviours", &[&data[..], arguments].concat())
}

/// Defines `outcome(action)`: what it returns, or the name of its error. A
/// guest's C library turns some errors for a full disk into `EIO`.
const OUTCOME: &str = r#"
import errno, os, shutil
def outcome(action):
    try:
        return action()
    except OSError as error:
        name = errno.errorcode[error.errno]
        return "full" if name in ("ENOSPC", "EIO") else name
def write(name, content):
    with open(name, "wb") as file:
        file.write(content)
    return "written"
"#;

#[test]
fn files_do_what_they_do_elsewhere() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/it/files.py");
    let script = std::fs::read_to_string(script).unwrap();
    let native = tempfile::tempdir().unwrap();
    let code = format!("base = {:?}\n{script}", native.path().to_str().unwrap());
    let expected = run(std::process::Command::new("python3").args(["-c", &code])).success().stdout;
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "1"]);
    for base in ["/tmp/base", "/data/base"] {
        let code = format!("base = {base:?}\nimport os\nos.mkdir(base)\n{script}");
        let told = python(&server, &code);
        for (name, expected) in expected.as_object().unwrap() {
            assert_eq!(&told[name], expected, "{name} in {base}");
        }
    }
    server.finish();
}

#[test]
fn layers_can_be_read_and_not_changed() {
    let server = Server::start("behaviours", &["--instances", "1"]);
    let told = python(
        &server,
        &[
            OUTCOME,
            r#"
result = {}
for root in ("/0", "/1", "/python"):
    name = next(os.path.join(at, files[0]) for at, _, files in os.walk(root) if files)
    before = os.stat(name)
    for call, action in {
        "write": lambda: write(name, b"x"),
        "append": lambda: open(name, "ab"),
        "update": lambda: open(name, "r+b"),
        "create": lambda: write(root + "/new", b"x"),
        "mkdir": lambda: os.mkdir(root + "/new"),
        "unlink": lambda: os.unlink(name),
        "rename": lambda: os.rename(name, root + "/new"),
        "rename out": lambda: os.rename(name, "/tmp/new"),
        "rename in": lambda: (write("/tmp/x", b"x"), os.rename("/tmp/x", name)),
        "truncate": lambda: os.truncate(name, 0),
        "utime": lambda: os.utime(name),
        "link": lambda: os.link(name, root + "/new"),
        "symlink": lambda: os.symlink(name, root + "/new"),
        }.items():
        result[f"{call} {root}"] = outcome(action)
    for directory in [entry.path for entry in os.scandir(root) if entry.is_dir()][:1]:
        result[f"rmdir {root}"] = outcome(lambda: os.rmdir(directory))
    assert os.stat(name) == before
    assert not os.path.exists(root + "/new")
"#,
        ]
        .concat(),
    );
    for (call, outcome) in told.as_object().unwrap() {
        let outcome = outcome.as_str().unwrap_or_else(|| panic!("{call} worked"));
        assert!(
            ["EPERM", "EXDEV", "ENOSYS", "EEXIST", "ENOTSUP", "EACCES"].contains(&outcome),
            "{call}: {outcome}"
        );
    }
    server.finish();
}

#[test]
fn the_temporary_directory_is_bounded() {
    let server = Server::start("behaviours", &["--instances", "1", "--tmp", "4MiB"]);
    let told = python(
        &server,
        &[
            OUTCOME,
            r#"
result = {}
result["too large"] = outcome(lambda: write("/tmp/a", bytes(5 << 20)))
result["kept"] = os.path.getsize("/tmp/a") <= 4 << 20
os.unlink("/tmp/a")
result["fits"] = outcome(lambda: write("/tmp/a", bytes(4 << 20)))
result["full"] = outcome(lambda: write("/tmp/b", b"x"))
with open("/tmp/a", "rb") as unlinked:
    os.unlink("/tmp/a")
    result["unlinked and open"] = outcome(lambda: write("/tmp/b", b"x"))
result["closed"] = outcome(lambda: write("/tmp/b", b"x"))
def hole():
    with open("/tmp/sparse", "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x")
    return "written"
result["hole"] = outcome(hole)
def many(number):
    for index in range(number):
        write(f"/tmp/many/{index}", b"")
os.mkdir("/tmp/many")
result["many"] = outcome(lambda: many(5000))
result["number"] = len(os.listdir("/tmp/many"))
shutil.rmtree("/tmp/many")
result["again"] = outcome(lambda: write("/tmp/c", bytes(3 << 20)))
def deep():
    os.chdir("/tmp")
    for _ in range(5000):
        os.mkdir("d")
        os.chdir("d")
result["deep"] = outcome(deep)
os.chdir("/0")
"#,
        ]
        .concat(),
    );
    assert_eq!(
        told,
        json!({
            "too large": "full", "kept": true, "fits": "written", "full": "full",
            "unlinked and open": "full", "closed": "written", "hole": "written", "many": "full",
            "number": 997, "again": "written", "deep": told["deep"],
        })
    );
    assert!(["full", "ENAMETOOLONG", "ENOENT"].contains(&told["deep"].as_str().unwrap()), "{told}");
    // The next instance starts empty.
    server.get("/abort");
    assert_eq!(python(&server, "import os\nresult = os.listdir('/tmp')"), json!([]));
    server.finish();
}

#[test]
fn the_data_directory_has_a_quota() {
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("before"), vec![0; 1 << 20]).unwrap();
    let quota = ["--data-quota", "4MiB", "--data-files", "50", "--instances", "1"];
    let server = serve(data.path(), &quota);
    let told = python(
        &server,
        &[
            OUTCOME,
            r#"
result = {}
result["too large"] = outcome(lambda: write("/data/a", bytes(4 << 20)))
result["kept"] = os.path.getsize("/data/a") <= 3 << 20
result["rest"] = outcome(lambda: write("/data/a", bytes(3 << 20)))
result["one more"] = outcome(lambda: write("/data/b", b"x"))
with open("/data/a", "r+b") as unlinked:
    result["same place"] = outcome(lambda: unlinked.write(bytes(1 << 20)) and unlinked.flush())
    os.unlink("/data/a")
    result["unlinked and open"] = outcome(lambda: write("/data/b", b"x"))
result["closed"] = outcome(lambda: write("/data/b", bytes(1 << 20)))
result["hole"] = outcome(lambda: os.truncate("/data/b", 1 << 40))
def far():
    with open("/data/b", "r+b", buffering=0) as file:
        file.seek(1 << 40)
        file.write(b"x")
result["far"] = outcome(far)
result["grow"] = outcome(lambda: os.truncate("/data/b", 3 << 20))
result["grown"] = outcome(lambda: write("/data/c", b"x"))
os.truncate("/data/b", 10)
result["shrunk"] = outcome(lambda: write("/data/c", bytes(2 << 20)))
os.replace("/data/b", "/data/c")
result["replaced"] = outcome(lambda: write("/data/d", bytes((3 << 20) - 10)))
result["full"] = outcome(lambda: write("/data/e", b"x"))
result["link"] = outcome(lambda: os.link("/data/d", "/data/f"))
result["symlink"] = outcome(lambda: os.symlink("d", "/data/f"))
os.unlink("/data/d")
os.unlink("/data/c")
os.unlink("/data/e")
def many():
    for index in range(100):
        (os.mkdir if index % 2 else lambda name: write(name, b""))(f"/data/many-{index}")
result["many"] = outcome(many)
result["number"] = len(os.listdir("/data"))
for name in os.listdir("/data"):
    if name.startswith("many"):
        (os.rmdir if os.path.isdir("/data/" + name) else os.unlink)("/data/" + name)
result["all again"] = outcome(lambda: write("/data/a", bytes(3 << 20)))
"#,
        ]
        .concat(),
    );
    assert_eq!(
        told,
        json!({
            "too large": "full", "kept": true, "rest": "written", "one more": "full",
            "same place": null, "unlinked and open": "full", "closed": "written", "hole": "full",
            "far": "full", "grow": null, "grown": "full", "shrunk": "written", "replaced": "written",
            "full": "full", "link": "EPERM", "symlink": "EPERM", "many": "full", "number": 50,
            "all again": "written",
        })
    );
    server.wait_for_log(&["quota of", "is used up", "--data-quota"]);
    server.finish();
    // What is there counts from the start.
    let server = serve(data.path(), &quota);
    let code = [OUTCOME, "result = outcome(lambda: write('/data/b', b'x'))"].concat();
    assert_eq!(python(&server, &code), json!("full"));
    server.finish();
}

#[test]
fn what_is_over_a_quota_can_become_smaller() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "1"]);
    let code = [
        DATABASE,
        "
import os
with open('/data/a', 'wb') as file:
    file.write(bytes(3 << 20))
database.execute('CREATE TABLE item (text)')
database.execute('BEGIN')
database.executemany('INSERT INTO item VALUES (?)', [('x' * 500,) for _ in range(2000)])
database.execute('COMMIT')
database.execute('PRAGMA cache_size = 2')
database.execute('BEGIN IMMEDIATE')
database.execute('UPDATE item SET text = text || text')
os.abort()",
    ]
    .concat();
    assert_eq!(server.post("/run", &[], code.as_bytes()).status, 500);
    assert!(data.path().join("shop.db-journal").exists());
    server.finish();
    // The operator has made it smaller.
    let server = serve(data.path(), &["--instances", "1", "--data-quota", "1MiB"]);
    server.wait_for_log(&["more than its quota"]);
    let told = python(
        &server,
        &[
            OUTCOME,
            DATABASE,
            r#"
result = list(database.execute("SELECT count(*), max(length(text)) FROM item").fetchone())
result.append(outcome(lambda: write("/data/b", b"x")))
result.append(outcome(lambda: os.truncate("/data/a", 1 << 20)))
result.append(os.path.getsize("/data/a"))
result.append(outcome(lambda: open("/data/a", "wb").close()))
result.append(os.path.getsize("/data/a"))
"#,
        ]
        .concat(),
    );
    assert_eq!(told, json!([2000, 500, "full", null, 1 << 20, null, 0]));
    assert!(!data.path().join("shop.db-journal").exists(), "it was not rolled back");
    server.finish();
}

#[test]
fn locks_of_sqlite_cost_no_descriptors() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "1"]);
    assert_eq!(server.get("/served").ok(), "1");
    let open = || std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap().count();
    let before = open();
    let code = r#"
import os
made = 0
for number in range(200):
    name = f"/data/d{number}/e"
    os.makedirs(name)
    with open(f"{name}/x.db", "w"):
        pass
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
    os.mkdir("x.db.lock", dir_fd=directory)
    os.close(directory)
result = [number for number in range(200) if os.path.exists(f"/data/d{number}/e/x.db.lock")]
"#;
    assert_eq!(python(&server, code).as_array().unwrap().len(), 200);
    assert!(open() < before + 20, "{} descriptors, {before} before", open());
    // They go with their instance, wherever they are.
    server.get("/abort");
    server.wait_for_log(&["released 200 locks"]);
    assert!(!data.path().join("d7/e/x.db.lock").exists());
    server.finish();
}

#[test]
fn the_quota_holds_under_concurrent_writers() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--data-quota", "8MiB", "--instances", "6", "--isolation", "request"]);
    // Each fills its own file and one that all share, deletes and renames.
    let code = [
        OUTCOME,
        r#"
def fill():
    me = os.urandom(4).hex()
    for round in range(3):
        with open(f"/data/{me}", "wb", buffering=0) as mine, open("/data/shared", "ab", buffering=0) as shared:
            for _ in range(200):
                mine.write(bytes(50_000))
                shared.write(bytes(10_000))
        os.replace(f"/data/{me}", "/data/replaced")
result = [outcome(fill) for _ in range(4)]
"#,
    ]
    .concat();
    let stop = AtomicBool::new(false);
    let size = || {
        let entries = std::fs::read_dir(data.path()).unwrap().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum::<u64>()
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..6).map(|_| scope.spawn(|| python(&server, &code))).collect();
        let watch = scope.spawn(|| {
            let (mut most, end) = (0, std::time::Instant::now() + std::time::Duration::from_secs(60));
            while std::time::Instant::now() < end && !stop.load(Ordering::Relaxed) {
                most = most.max(size());
            }
            most
        });
        for writer in writers {
            assert!(writer.join().unwrap().as_array().unwrap().contains(&json!("full")));
        }
        stop.store(true, Ordering::Relaxed);
        // The watcher is not atomic: it may see a file under both of its names.
        assert!(watch.join().unwrap() <= 16 << 20);
    });
    assert!(size() <= 8 << 20, "{} bytes", size());
    // Nothing leaked: without the files, all of the quota is there again.
    let code = [
        OUTCOME,
        r#"
for name in os.listdir("/data"):
    os.unlink("/data/" + name)
result = [outcome(lambda: write("/data/all", bytes(8 << 20))), outcome(lambda: write("/data/more", b"x"))]
"#,
    ]
    .concat();
    assert_eq!(python(&server, &code), json!(["written", "full"]));
    server.finish();
}

#[test]
fn the_data_directory_can_not_be_left() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "of the host").unwrap();
    let data = tempfile::tempdir().unwrap();
    let inside = data.path();
    std::fs::create_dir(inside.join("d")).unwrap();
    std::fs::write(inside.join("d/file"), "inside").unwrap();
    symlink(outside.path(), inside.join("absolute")).unwrap();
    symlink(outside.path().join("secret"), inside.join("absolute-file")).unwrap();
    symlink(format!("../{}", outside.path().file_name().unwrap().to_str().unwrap()), inside.join("relative"))
        .unwrap();
    symlink("/proc/self/root", inside.join("magic")).unwrap();
    symlink("loop", inside.join("loop")).unwrap();
    symlink("d", inside.join("allowed")).unwrap();
    let fifo = run(std::process::Command::new("mkfifo").arg(inside.join("fifo")));
    assert_eq!(fifo.status, 0);
    let server = serve(inside, &["--instances", "2"]);
    let told = python(
        &server,
        &[
            OUTCOME,
            r#"
def read(name):
    with open(name) as file:
        return file.read()
result = {}
for name in (
    "absolute/secret", "absolute-file", "relative/secret", "magic/etc/passwd", "loop", "fifo",
    "../secret", "d/../../secret", "allowed/../../secret", "d/../absolute/secret",
):
    result["read " + name] = outcome(lambda: read("/data/" + name))
    result["write " + name] = outcome(lambda: write("/data/" + name, b"x"))
    result["unlink below " + name] = outcome(lambda: os.unlink(f"/data/{name}/secret"))
result["list absolute"] = outcome(lambda: os.listdir("/data/absolute"))
result["mkdir"] = outcome(lambda: os.mkdir("/data/relative/new"))
result["rename out"] = outcome(lambda: os.rename("/data/d/file", "/data/relative/file"))
result["rename in"] = outcome(lambda: os.rename("/data/relative/secret", "/data/stolen"))
result["truncate"] = outcome(lambda: os.truncate("/data/absolute-file", 0))
result["utime"] = outcome(lambda: os.utime("/data/absolute-file", (0, 0)))
assert read("/data/allowed/file") == "inside"
"#,
        ]
        .concat(),
    );
    for (call, outcome) in told.as_object().unwrap() {
        let refused = outcome.as_str().is_some_and(|outcome| {
            ["EPERM", "ENOENT", "ELOOP", "ENOTDIR", "ENXIO", "EINVAL", "EACCES", "ENOTCAPABLE"]
                .contains(&outcome)
        });
        assert!(refused, "{call}: {outcome}");
    }
    let left: Vec<_> =
        std::fs::read_dir(outside.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["secret"]);
    assert_eq!(std::fs::read_to_string(outside.path().join("secret")).unwrap(), "of the host");

    // Nor by a race: the directory becomes a link while the guest uses it.
    std::fs::write(inside.join("d/secret"), "inside").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::fs::rename(inside.join("d"), inside.join("away")).unwrap();
                symlink(outside.path(), inside.join("d")).unwrap();
                std::fs::remove_file(inside.join("d")).unwrap();
                std::fs::rename(inside.join("away"), inside.join("d")).unwrap();
            }
        });
        let told = python(
            &server,
            r#"
import os, time
seen, end = set(), time.monotonic() + 3
while time.monotonic() < end:
    try:
        with open("/data/d/secret") as file:
            seen.add(file.read())
        with open("/data/d/secret", "a") as file:
            pass
        os.stat("/data/d/secret")
        os.rename("/data/d/secret", "/data/d/moved")
        os.rename("/data/d/moved", "/data/d/secret")
    except OSError as error:
        seen.add(type(error).__name__)
result = sorted(seen)
"#,
        );
        stop.store(true, Ordering::Relaxed);
        assert!(!told.as_array().unwrap().contains(&json!("of the host")), "{told}");
    });
    assert_eq!(std::fs::read_to_string(outside.path().join("secret")).unwrap(), "of the host");
    server.finish();
}

#[test]
fn open_files_and_strange_requests_are_bounded() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "1"]);
    let told = python(
        &server,
        &[
            OUTCOME,
            r#"
def hoard(name):
    held = []
    try:
        for _ in range(5000):
            held.append(os.open(name, os.O_RDWR | os.O_CREAT))
    finally:
        for fd in held:
            os.close(fd)
        result["held " + name] = len(held)
def listings(name):
    held = []
    for _ in range(5000):
        held.append(os.scandir(name))
        next(held[-1])
result = {}
for name in ("/tmp/x", "/data/x"):
    result["open " + name] = outcome(lambda: hoard(name))
for name in ("/tmp", "/data", "/python"):
    result["list " + name] = outcome(lambda: listings(name))
result["after"] = outcome(lambda: write("/data/x", b"x"))
fd = os.open("/data/x", os.O_RDWR)
for name, action in {
    "read": lambda: len(os.read(fd, 1 << 24)),
    "far": lambda: len(os.pread(fd, 10, 2**63 - 1)),
    "write far": lambda: os.pwrite(fd, b"x", 2**63 - 1),
    "size": lambda: os.ftruncate(fd, 2**63 - 1),
    "deep": lambda: os.makedirs("/data/" + "d/" * 100),
    "long": lambda: os.stat("/data/" + "d/" * 5000),
    "random": lambda: len(os.urandom(8 << 20)),
    "not text": lambda: os.stat(b"/tmp/\xff"),
}.items():
    result[name] = outcome(action)
"#,
        ]
        .concat(),
    );
    let told = told.as_object().unwrap();
    for name in ["open /tmp/x", "open /data/x", "list /tmp", "list /data", "list /python"] {
        assert!(told[name].as_str().is_some_and(|error| error.starts_with('E')), "{name}: {told:?}");
    }
    assert!(told["held /tmp/x"].as_u64().unwrap() > 500, "{told:?}");
    assert_eq!(told["held /data/x"], 64);
    assert_eq!(told["after"], "written");
    assert_eq!((&told["read"], &told["far"]), (&json!(1), &json!(0)));
    for name in ["write far", "size", "deep", "long", "not text"] {
        assert!(told[name].is_string(), "{name}: {told:?}");
    }
    assert_eq!(server.get("/served").ok(), "1", "the instance was lost");
    // The host has closed all that.
    let open = || std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap().count();
    server.get("/abort");
    server.get("/served").ok();
    assert!(open() < 40, "{} descriptors", open());
    server.finish();
}

#[test]
fn a_list_that_is_too_large_ends_its_guest_only() {
    let server = Server::start("behaviours", &["--instances", "1", "--memory", "512MiB"]);
    let code =
        "from wsgi_wasm import kdf\nkdf._derivation.pbkdf2_hmac('sha256', b'p', bytes(40 << 20), 1, 32)";
    assert_eq!(server.post("/run", &[], code.as_bytes()).status, 500);
    server.wait_for_log(&["the guest trapped"]);
    assert_eq!(server.get("/served").ok(), "1");
    server.finish();
}

/// Opens the database; a transaction then waits for others up to 10 s.
const DATABASE: &str = "
import sqlite3
database = sqlite3.connect('/data/shop.db', timeout=10, isolation_level=None)
";

#[test]
fn sqlite_survives_an_instance_that_is_stopped_in_a_transaction() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "2", "--timeout", "4s"]);
    let query = |code: &str| python(&server, &[DATABASE, code].concat());
    query(
        "
database.execute('CREATE TABLE item (text)')
database.execute('BEGIN')
database.executemany('INSERT INTO item VALUES (?)', [('x' * 500,) for _ in range(2000)])
database.execute('COMMIT')
result = None",
    );
    for ending in ["while True: pass", "import time; time.sleep(60)", "import os; os.abort()"] {
        // A small cache: pages go to the file before the transaction ends.
        let code = [
            DATABASE,
            "
database.execute('PRAGMA cache_size = 2')
database.execute('BEGIN IMMEDIATE')
database.execute('UPDATE item SET text = text || text')
",
            ending,
        ]
        .concat();
        assert!(server.post("/run", &[], code.as_bytes()).status >= 500, "{ending}");
        assert!(data.path().join("shop.db-journal").exists(), "{ending}");
        let found = query(
            "
count = database.execute('SELECT count(*), max(length(text)) FROM item').fetchone()
database.execute('INSERT INTO item VALUES (?)', ['new'])
database.execute('DELETE FROM item WHERE text = ?', ['new'])
result = [*count, *database.execute('PRAGMA integrity_check').fetchone()]",
        );
        assert_eq!(found, json!([2000, 500, "ok"]), "{ending}");
        assert!(!data.path().join("shop.db-journal").exists(), "{ending}");
    }
    server.wait_for_log(&["released the lock", "shop.db.lock"]);
    // The host dies: the next one removes the lock.
    drop(server);
    std::fs::create_dir(data.path().join("shop.db.lock")).unwrap();
    std::fs::create_dir(data.path().join("other.lock")).unwrap();
    let server = serve(data.path(), &[]);
    let found = python(
        &server,
        &[DATABASE, "result = database.execute('SELECT count(*) FROM item').fetchone()"].concat(),
    );
    assert_eq!(found, json!([2000]));
    assert!(data.path().join("other.lock").exists(), "no lock of a database");
    // But not while somebody else may hold it.
    std::fs::create_dir(data.path().join("shop.db.lock")).unwrap();
    let data_option = data.path().to_str().unwrap();
    let code = "import os; print(os.listdir('/data'))";
    let other = run(wsgi_wasm().arg("exec").arg(guest("behaviours")).args([
        "--data",
        data_option,
        "--",
        "python",
        "-c",
        code,
    ]))
    .success();
    assert!(other.stdout.contains("shop.db.lock"), "{}", other.stdout);
    server.finish();
}

#[test]
fn sqlite_survives_a_full_quota() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "1", "--data-quota", "1MiB"]);
    let told = python(
        &server,
        &[
            DATABASE,
            "
database.execute('CREATE TABLE item (text)')
database.execute('INSERT INTO item VALUES (?)', ['kept'])
try:
    database.execute('INSERT INTO item VALUES (?)', ['x' * 2_000_000])
except sqlite3.Error as error:
    told = str(error)
result = [told, *database.execute('SELECT text FROM item').fetchall()]",
        ]
        .concat(),
    );
    let error = told[0].as_str().unwrap();
    assert!(["database or disk is full", "disk I/O error"].contains(&error), "{error}");
    assert_eq!(told[1], json!(["kept"]));
    server.finish();
}

#[test]
fn sqlite_finds_a_database_that_another_instance_made_after_it_was_opened() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "2"]);
    let meet = "
import os, sqlite3, time
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
";
    let (early, late) = (
        [
            meet,
            "
database = sqlite3.connect('/data/shop.db')
open('/data/opened', 'w').close()
wait_for('/data/made')
result = database.execute('SELECT text FROM item').fetchone()",
        ],
        [
            meet,
            "
wait_for('/data/opened')
with sqlite3.connect('/data/shop.db') as database:
    database.execute('CREATE TABLE item (text)')
    database.execute('INSERT INTO item VALUES (?)', ['found'])
open('/data/made', 'w').close()
result = None",
        ],
    );
    std::thread::scope(|scope| {
        let early = scope.spawn(|| python(&server, &early.concat()));
        python(&server, &late.concat());
        assert_eq!(early.join().unwrap(), json!(["found"]));
    });
    server.finish();
}

#[test]
fn sqlite_is_created_and_written_by_many_instances_at_once() {
    let data = tempfile::tempdir().unwrap();
    let server = serve(data.path(), &["--instances", "6", "--isolation", "request", "--timeout", "60s"]);
    for round in 0..10 {
        let code = format!(
            "
import sqlite3
database = sqlite3.connect('/data/{round}.db', timeout=50)
database.execute('CREATE TABLE IF NOT EXISTS item (text)')
for number in range(5):
    with database:
        database.execute('INSERT INTO item VALUES (?)', [number])
result = 'done'"
        );
        std::thread::scope(|scope| {
            for writer in (0..6).map(|_| scope.spawn(|| python(&server, &code))).collect::<Vec<_>>() {
                assert_eq!(writer.join().unwrap(), json!("done"));
            }
        });
        let code = format!(
            "
import sqlite3
database = sqlite3.connect('/data/{round}.db')
result = database.execute('SELECT count(*) FROM item').fetchone()"
        );
        assert_eq!(python(&server, &code), json!([30]), "round {round}");
    }
    server.finish();
}
