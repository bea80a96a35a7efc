"""What is measured: the apps, the servers, and the tools that have to be there first."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# All that is made here; not part of the repository.
WORK = ROOT / "target/bench"
BINARY = ROOT / "target/release/wsgi-wasm"
COMPONENTIZE = ROOT / "host/src/build/requirements-componentize.txt"
# Without interruption, which `wasmtime serve` does not do by default, and with
# room for CPython in the pools.
WASMTIME_OPTIONS = [
    "-S", "cli",
    "-O", "pooling-allocator=y,pooling-table-elements=30000,pooling-max-core-instance-size=4194304,"
          "pooling-max-component-instance-size=4194304,pooling-total-core-instances=10000",
    "-W", "max-wasm-stack=8388608,async-stack-size=16777216",
]  # fmt: skip
WASMTIME_FEATURES = (
    "run,serve,compile,component-model-async,pooling-allocator,cache,cranelift,parallel-compilation"
)


@dataclass(frozen=True)
class App:
    """A directory in `apps`, whose module `app` has the callable `application`."""

    name: str
    # Requests to make before a snapshot.
    warmup: tuple[str, ...]
    # Whether it reads the database.
    data: bool = False

    @property
    def directory(self):
        return HERE / "apps" / self.name


PLAIN = App("plain", ("/hello", "/json", "/page"))
FLASK = App("flask", ("/", "/books/3"))
DJANGO = App("django", ("/warm",), data=True)
INTERPRETER = App("interpreter", ("/calls",))
APPS = (PLAIN, FLASK, DJANGO, INTERPRETER)


@dataclass(frozen=True)
class Workload:
    """What one request is."""

    name: str
    title: str
    app: App
    path: str
    # Bytes of the request's body; with some it is a POST.
    upload: int = 0
    connections: int | None = None
    # Seconds under load, unless the driver is told more: where requests take long and all
    # are answered at a time, many are half done at the end.
    seconds: int = 0

    @property
    def method(self):
        return "POST" if self.upload else "GET"


WORKLOADS = [
    Workload("hello", "Hello, world", PLAIN, "/hello"),
    Workload("json", "JSON, 1.4 kB", PLAIN, "/json"),
    Workload("page", "A page of 10 kB", PLAIN, "/page"),
    Workload("flask", "Flask with a template", FLASK, "/"),
    Workload("django", "Django with a read from SQLite", DJANGO, "/"),
    Workload("sleep", "Sleep for 100 ms", PLAIN, "/sleep"),
    Workload("cpu", "20 ms of computing", PLAIN, "/cpu", seconds=8),
    Workload("upload", "Upload of 1 MB", PLAIN, "/upload", upload=1_000_000),
    Workload("download", "Download of 10 MB", PLAIN, "/download"),
    Workload("stream", "Stream of 100 pieces of 1 kB", PLAIN, "/stream"),
    Workload("single", "Hello, world, one connection", PLAIN, "/hello", connections=1),
]


@dataclass(frozen=True)
class Peer:
    """A server as a user would set it up for one processor core or more."""

    name: str
    title: str
    # Its settings, for the reader.
    setting: str
    family: str


WSGI_WASM = Peer("wsgi-wasm", "wsgi-wasm", "`serve`, instances reused within the app", "wsgi-wasm")
WSGI_WASM_FRESH = Peer(
    "wsgi-wasm-fresh", "wsgi-wasm, fresh", "`serve --isolation request`, a new instance for each request", "wsgi-wasm"
)
GUNICORN = Peer("gunicorn-sync", "gunicorn sync", "one process per core, no keep-alive", "native")
GTHREAD = Peer("gunicorn-gthread", "gunicorn gthread", "one process per core, 4 threads", "native")
WAITRESS = Peer("waitress", "waitress", "one process, 4 threads", "native")
GRANIAN = Peer("granian", "Granian", "one WSGI worker per core, defaults", "native")
WASMTIME = Peer(
    "wasmtime-reuse", "wasmtime serve", "`--max-instance-reuse-count 10000`, pooling, precompiled", "wasmtime"
)
WASMTIME_FRESH = Peer(
    "wasmtime-fresh", "wasmtime serve, fresh", "`--max-instance-reuse-count 1`, pooling, precompiled", "wasmtime"
)
PEERS = [WSGI_WASM, WSGI_WASM_FRESH, GRANIAN, WAITRESS, GTHREAD, GUNICORN, WASMTIME, WASMTIME_FRESH]


class Unavailable(Exception):
    """A tool that is needed for a figure does not do its work."""


def run(command, **options):
    """Runs a command that has to succeed, and returns what it prints."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()[-20:]
        raise Unavailable("\n".join([f"{Path(command[0]).name} failed", *lines]))
    return done.stdout


def digest(*parts):
    """A name for what is made of these files, directories and texts."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(part.rglob("*")) if part.is_dir() else [part]
            for file in files:
                if file.is_file() and "__pycache__" not in file.parts:
                    sha.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
        else:
            sha.update(str(part).encode() + b"\0")
    return sha.hexdigest()[:16]


def system_python():
    """The interpreter for the native servers.

    That of the distribution is the one with all optimisations; a Python that
    was built by hand may be slower.
    """
    path = "/usr/bin/python3"
    try:
        version = run([path, "-c", "import sys, venv; print(sys.version_info >= (3, 11))"])
        if version.strip() == "True":
            return path
    except (OSError, Unavailable):
        pass
    return sys.executable


class Tools:
    """What has to be there before something can be measured. Made once."""

    def __init__(self, python, say):
        self.say = say
        self.python = python
        WORK.mkdir(parents=True, exist_ok=True)
        if not BINARY.exists():
            raise SystemExit("the release build is missing: run `cargo build --release`")
        lock = (ROOT / "Cargo.lock").read_text()
        self.wasmtime_version = re.search(r'name = "wasmtime"\nversion = "([^"]+)"', lock)[1]
        self.wasmtime_root = WORK / f"wasmtime-{self.wasmtime_version}"
        self.wasmtime = self.wasmtime_root / "bin/wasmtime"
        # The server's own cache of built apps and compiled code.
        self.cache = WORK / "cache"
        self._built = set()
        self.venv = self._make_venv()

    def _make_venv(self):
        requirements = [HERE / "requirements.txt", COMPONENTIZE]
        venv = WORK / f"venv-{digest(self.python, *requirements)}"
        if not (venv / "done").exists():
            self.say("installing the native servers")
            run([self.python, "-m", "venv", "--clear", venv])
            options = [option for file in requirements for option in ("-r", file)]
            run([venv / "bin/pip", "install", "--require-hashes", "--only-binary", ":all:", *options])
            (venv / "done").touch()
        return venv

    def install_wasmtime(self):
        """Compiles the command line tool of our version of wasmtime, if it is not there."""
        if not self.wasmtime.exists():
            self.say(f"compiling wasmtime-cli {self.wasmtime_version}; this takes ten minutes on two cores")
            subprocess.run(
                ["cargo", "install", "wasmtime-cli", "--version", f"={self.wasmtime_version}", "--locked",
                 "--root", self.wasmtime_root, "--no-default-features", "--features", WASMTIME_FEATURES],
                check=True,
            )  # fmt: skip

    def versions(self):
        """What is measured, by name."""
        packages = json.loads(run([self.venv / "bin/pip", "list", "--format", "json"]))
        wanted = ("gunicorn", "waitress", "granian", "Flask", "Django", "componentize-py")
        build = "import platform, sys, sysconfig; print(platform.python_version(), 'from', sys.base_prefix)"
        return {
            "wsgi-wasm": run([BINARY, "--version"]).split()[-1],
            "commit": run(["git", "describe", "--always", "--dirty"], cwd=ROOT).strip(),
            "CPython, native": run([self.venv / "bin/python", "-c", build]).strip(),
            **{package["name"]: package["version"] for package in packages if package["name"] in wanted},
            "wasmtime": self.wasmtime_version,
        }

    def artifact(self, app):
        """The app as a file for `wsgi-wasm serve`."""
        path = WORK / "apps" / f"{app.name}.wasm"
        if app not in self._built:
            path.parent.mkdir(exist_ok=True)
            warmup = [option for warm in app.warmup for option in ("--warmup", warm)]
            # It knows by itself whether there is anything to do.
            run([BINARY, "build", "app:application", "--dir", app.directory, *warmup, "--output", path],
                env={**os.environ, "WSGI_WASM_CACHE": str(self.cache)})  # fmt: skip
            self._built.add(app)
        return path

    def component(self, app):
        """The app as a compiled component for `wasmtime serve`."""
        requirements = app.directory / "requirements.txt"
        key = digest(app.directory, HERE / "wasi_http.py", COMPONENTIZE, self.wasmtime_version,
                     app.warmup, WASMTIME_OPTIONS)  # fmt: skip
        directory = WORK / "components" / f"{app.name}-{key}"
        compiled = directory / "app.cwasm"
        if compiled.exists():
            return compiled
        self.say(f"building {app.name} as a component of wasi:http")
        shutil.rmtree(directory, ignore_errors=True)
        packages = directory / "packages"
        packages.mkdir(parents=True)
        if requirements.exists():
            # With the pinned versions, but what is native in them can not be used.
            run([self.venv / "bin/pip", "install", "--no-deps", "--target", packages, "-r", requirements])
            for native in packages.rglob("*.so"):
                native.unlink()
        (directory / "entry.py").write_text(
            "import app, wasi_http\n"
            f"IncomingHandler = wasi_http.incoming_handler(app.application, {app.warmup})\n"
        )
        home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
        wit = next(home.glob(f"registry/src/*/wasmtime-wasi-http-{self.wasmtime_version}/wit"), None)
        if wit is None:
            raise Unavailable(f"the sources of wasmtime-wasi-http {self.wasmtime_version} are not in {home}")
        paths = [option for path in (directory, HERE, app.directory, packages) for option in ("-p", path)]
        component = directory / "app.wasm"
        run([self.venv / "bin/componentize-py", "-d", wit, "-w", "wasi:http/proxy",
             "componentize", *paths, "entry", "-o", component])  # fmt: skip
        run([self.wasmtime, "compile", *WASMTIME_OPTIONS[2:], component, "-o", directory / "new"])
        (directory / "new").rename(compiled)
        return compiled

    def data(self):
        """A directory with the database of the Django app."""
        directory = WORK / "data"
        database = directory / "shelf.sqlite3"
        if not database.exists():
            directory.mkdir(exist_ok=True)
            connection = sqlite3.connect(database)
            connection.execute(
                "CREATE TABLE shelf_book (id integer PRIMARY KEY AUTOINCREMENT, name varchar(100) NOT NULL,"
                " author varchar(100) NOT NULL, price decimal NOT NULL)"
            )
            connection.execute("CREATE INDEX shelf_book_name ON shelf_book (name)")
            rows = [(f"Book {n * 7919 % 1000:03} & more", f"Author {n % 17}", n % 90 + 0.5) for n in range(1000)]
            connection.executemany("INSERT INTO shelf_book (name, author, price) VALUES (?, ?, ?)", rows)
            connection.commit()
            connection.close()
        return directory

    def prepare(self, peer, app):
        """Makes what `command` needs, so that it does not count as the server's start.

        Raises `Unavailable`.
        """
        if peer.family == "wsgi-wasm":
            self.artifact(app)
        elif peer.family == "wasmtime":
            if not self.wasmtime.exists():
                version = self.wasmtime_version
                raise Unavailable(f"wasmtime {version} is not installed; run `bench.py --install-wasmtime`")
            self.component(app)

    def command(self, peer, app, port, workers):
        """Command, environment and directory of a server with one worker per core."""
        address = f"127.0.0.1:{port}"
        if peer.family == "wsgi-wasm":
            command = [BINARY, "serve", self.artifact(app), "--bind", address]
            if peer is WSGI_WASM_FRESH:
                command += ["--isolation", "request"]
            if app.data:
                command += ["--data", self.data()]
            return command, {"WSGI_WASM_CACHE": str(self.cache)}, None
        if peer.family == "wasmtime":
            reuse = "10000" if peer is WASMTIME else "1"
            command = [self.wasmtime, "serve", "--allow-precompiled", *WASMTIME_OPTIONS,
                       "--max-instance-reuse-count", reuse, "--addr", address]  # fmt: skip
            if app.data:
                command += ["--dir", f"{self.data()}::/data"]
            return [*command, self.component(app)], {}, None
        tools = self.venv / "bin"
        gunicorn = [tools / "gunicorn", "--no-control-socket", "--bind", address, "--workers", workers]
        commands = {
            GUNICORN: [*gunicorn, "--worker-class", "sync", "app:application"],
            GTHREAD: [*gunicorn, "--worker-class", "gthread", "--threads", 4, "app:application"],
            WAITRESS: [tools / "waitress-serve", f"--listen={address}", "--threads=4", "app:application"],
            GRANIAN: [tools / "granian", "--interface", "wsgi", "--host", "127.0.0.1", "--port", port,
                      "--workers", workers, "app:application"],
        }  # fmt: skip
        return commands[peer], {"DATA": str(self.data())}, app.directory
