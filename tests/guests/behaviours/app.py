"""One route for each small behaviour that the tests ask about."""

import gc
import gzip
import hashlib
import io
import json
import os
import random
import secrets
import sqlite3
import sys
import tempfile
import time
import uuid

# Made at import, so they are in the snapshot. Only `seeded` may repeat.
unseeded = random.Random()
seeded = random.Random(42)
frozen = random.Random()
# As an app does that knows of servers which fork.
gc.freeze()
database = sqlite3.connect(":memory:")
database.execute("SELECT random(), randomblob(16)").fetchone()
database.close()
del database
os.environ["SET_AT_IMPORT"] = "kept"
requests_served = 0
closed = []


def reply(start_response, text, status="200 OK", headers=()):
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [text.encode()]


def hello(environ, start_response):
    return reply(start_response, "Hello, world!\n")


def show_environ(environ, start_response):
    shown = {key: value for key, value in environ.items() if isinstance(value, (str, bool, tuple))}
    return reply(start_response, json.dumps(shown))


def echo(environ, start_response):
    return reply(start_response, environ["wsgi.input"].read().decode("latin-1"))


def count(environ, start_response):
    """Reads the body in pieces and tells its length and digest."""
    digest, length = hashlib.sha256(), 0
    while piece := environ["wsgi.input"].read(65536):
        digest.update(piece)
        length += len(piece)
    return reply(start_response, f"{length} {digest.hexdigest()}")


def count_only(environ, start_response):
    length = 0
    while piece := environ["wsgi.input"].read(1 << 20):
        length += len(piece)
    return reply(start_response, str(length))


def lines(environ, start_response):
    stream = environ["wsgi.input"]
    return reply(start_response, repr([stream.readline(), stream.read(2), stream.readlines(), stream.read()]))


def use_input(environ, start_response):
    """Calls the methods of the input that the query names, as `read:3,readline,list`."""
    stream = environ["wsgi.input"]
    results = []
    for call in environ["QUERY_STRING"].split(","):
        name, *arguments = call.split(":")
        if name == "list":
            results.append(list(stream))
        elif name == "next":
            results.append(next(stream))
        elif name == "readinto":
            buffer = bytearray(int(arguments[0]))
            results.append(bytes(buffer[: stream.readinto(buffer)]))
        else:
            results.append(getattr(stream, name)(*map(int, arguments)))
    return reply(start_response, repr(results))


def read_and_tell(environ, start_response):
    """Reads the body as the query says, and logs how that went."""
    stream = environ["wsgi.input"]
    try:
        if environ["QUERY_STRING"] == "lines":
            length = sum(map(len, stream))
        elif environ["QUERY_STRING"] == "pieces":
            length = 0
            while piece := stream.read(1000):
                length += len(piece)
        else:
            length = len(stream.read())
    except OSError as error:
        print("reading failed with", type(error).__name__, file=sys.stderr)
        raise
    print("read a body of", length, file=sys.stderr)
    return reply(start_response, str(length))


def ignore_body(environ, start_response):
    return reply(start_response, "ignored")


def large(environ, start_response):
    """As many mebibytes as the query says, one at a time."""
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    piece = bytes(range(256)) * 4096
    return (piece for _ in range(int(environ["QUERY_STRING"])))


def large_whole(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return [b"x" * int(environ["QUERY_STRING"])]


def work_slowly(environ, start_response):
    """Computes for so many seconds before each of so many pieces, and then for ever if asked to."""
    number, seconds, ending = environ["QUERY_STRING"].split(";")
    start_response("200 OK", [("Content-Type", "text/plain")])
    for index in range(int(number)):
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            pass
        yield b"%d\n" % index
    if ending == "sleep":
        time.sleep(3600)
    while ending == "spin":
        pass


class Pieces:
    """Yields numbered pieces and remembers how it ended."""

    def __init__(self, number, pause=0.0):
        self.number, self.pause, self.name = number, pause, "pieces"

    def __iter__(self):
        for index in range(self.number):
            time.sleep(self.pause)
            yield f"piece {index}\n".encode()

    def close(self):
        closed.append(self.name)
        print("closed", self.name, file=sys.stderr)


def stream(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return Pieces(3)


def stream_exact(environ, start_response):
    start_response("200 OK", [("Content-Length", "24")])
    return Pieces(3)


class Whole:
    """A whole body of which the app gives so many chunks, and that goes on after it."""

    def __init__(self, chunks, then):
        self.chunks, self.then = chunks, then

    def __iter__(self):
        yield from self.chunks
        self.go_on("next")

    def close(self):
        self.go_on("close")

    def go_on(self, place):
        where, how = self.then
        if place == where:
            print("goes on", place, how, file=sys.stderr)
            if how == "sleep":
                time.sleep(3600)
            while how == "spin":
                pass
            raise RuntimeError(f"failed in {place} after the whole body")


def whole_then(environ, start_response):
    """Goes on after a whole body as the query says: `STATUS;CHUNKS;next,spin`."""
    status, chunks, then = environ["QUERY_STRING"].split(";")
    start_response(status + " Fine", [("Content-Length", "9")])
    chunks = {"1": [b"all of it"], "2": [b"all ", b"of it"]}[chunks]
    return Whole(chunks, then.split(","))


def single(environ, start_response):
    """A body of one chunk that is no plain list."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return type("Chunks", (list,), {})([b"the only one"])


def stream_for_ever(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return Pieces(1_000_000, 0.01)


def stream_then_fail(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"the beginning"
    raise RuntimeError("failed after the head")


def stream_too_little(environ, start_response):
    start_response("200 OK", [("Content-Length", "100")])
    yield b"only this"


def stream_slowly(environ, start_response):
    """Computes before each step, for longer than a request does where it begins."""

    def compute():
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    compute()
    environ["wsgi.early_hints"]([("Link", "</a.js>")])
    compute()
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    for byte in body:
        compute()
        yield bytes([byte])


def stream_then_spin(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"the beginning"
    while True:
        pass


def stream_too_much(environ, start_response):
    start_response("200 OK", [("Content-Length", "10")])
    yield b"0123456"
    yield b"789too much"
    yield b"and more"


def whole_too_much(environ, start_response):
    start_response("200 OK", [("Content-Length", "4")])
    return [b"four, ", b"not more"]


def whole_too_little(environ, start_response):
    start_response("200 OK", [("Content-Length", "40")])
    return [b"less than that"]


def late_start(environ, start_response):
    """Starts the response in the iteration, after empty chunks."""
    yield b""
    start_response("202 Accepted", [("X-Late", "1")])
    yield b""
    yield b"late"


def replace_head(environ, start_response):
    """Fails after `start_response`, and says so while the head is still here."""
    start_response("200 OK", [("X-First", "1")])
    yield b""
    try:
        raise KeyError("found out late")
    except KeyError:
        start_response("503 Not Now", [("X-Second", "2")], sys.exc_info())
    yield b"replaced"


def replace_sent_head(environ, start_response):
    """The same once the head is out: the exception comes back."""
    start_response("200 OK", [("X-First", "1")])
    yield b"sent"
    try:
        raise KeyError("found out too late")
    except KeyError:
        start_response("503 Not Now", [], sys.exc_info())
    yield b"never"


def start_twice(environ, start_response):
    start_response("200 OK", [])
    start_response("200 OK", [])
    return [b"never"]


# What no application may pass to `start_response`.
WRONG_STARTS = {
    "status-int": (200, []),
    "status-bytes": (b"200 OK", []),
    "status-alone": ("200", []),
    "status-no-reason": ("200 ", []),
    "status-words": ("OK 200", []),
    "status-newline": ("200 OK\r\nX: y", []),
    "headers-tuple": ("200 OK", ()),
    "headers-dict": ("200 OK", {"X": "y"}),
    "header-list": ("200 OK", [["X", "y"]]),
    "header-triple": ("200 OK", [("X", "y", "z")]),
    "name-bytes": ("200 OK", [(b"X", "y")]),
    "name-blank": ("200 OK", [("X Y", "z")]),
    "name-colon": ("200 OK", [("X:", "z")]),
    "name-newline": ("200 OK", [("X\r\nY", "z")]),
    "name-empty": ("200 OK", [("", "z")]),
    "value-int": ("200 OK", [("X", 1)]),
    "value-bytes": ("200 OK", [("X", b"y")]),
    "value-none": ("200 OK", [("X", None)]),
    "value-cr": ("200 OK", [("X", "a\rb")]),
    "value-lf": ("200 OK", [("X", "a\nb")]),
    "value-nul": ("200 OK", [("X", "a\0b")]),
    "value-not-latin": ("200 OK", [("X", "\u20ac")]),
    "length-twice": ("200 OK", [("Content-Length", "0"), ("content-length", "0")]),
    "length-word": ("200 OK", [("Content-Length", "ten")]),
    "hop-connection": ("200 OK", [("Connection", "close")]),
    "hop-keep-alive": ("200 OK", [("Keep-Alive", "timeout=5")]),
    "hop-te": ("200 OK", [("TE", "trailers")]),
    "hop-trailer": ("200 OK", [("Trailer", "X")]),
    "hop-upgrade": ("200 OK", [("Upgrade", "websocket")]),
    "hop-proxy": ("200 OK", [("Proxy-Authenticate", "Basic")]),
}


def wrong_start(environ, start_response):
    status, headers = WRONG_STARTS[environ["QUERY_STRING"]]
    start_response(status, headers)
    return [b"never"]


def ordered_headers(environ, start_response):
    names = ["X-Zebra", "ETag", "Content-Type", "x-lower", "X-Apple", "Set-Cookie", "Set-Cookie", "WWW-Authenticate"]
    headers = [(name, str(number)) for number, name in enumerate(names)]
    start_response("200 OK", [*headers, ("X-Latin", "caf\xe9"), ("X-Blank", "")])
    return [b"ordered"]


def write_slowly(environ, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    for index in range(1_000_000):
        write(b"written %d\n" % index)
        time.sleep(0.01)
    return []


class Closing:
    """An iterable that counts how often it is closed, and ends as the query says."""

    def __init__(self, how):
        self.how = how

    def __iter__(self):
        yield b"one"
        if self.how == "fail":
            raise RuntimeError("failed in the iteration")
        if self.how == "text":
            yield "text"
        yield b"two"

    def close(self):
        closed.append(self.how)
        if self.how == "fail-in-close":
            raise RuntimeError("failed in close")


def close_how(environ, start_response):
    how = environ["QUERY_STRING"]
    if how != "no-start":
        start_response("204 No Content" if how == "no-content" else "200 OK", [])
    return Closing(how)


def close_count(environ, start_response):
    counted = ",".join(closed)
    closed.clear()
    return reply(start_response, counted)


def send_file(environ, start_response):
    """The file that the query names; `;` before a position and a Content-Length."""
    path, position, length = (environ["QUERY_STRING"] + ";;").split(";")[:3]
    headers = [("Content-Type", "application/octet-stream")]
    if length:
        headers.append(("Content-Length", length))
    file = open(path, "rb")
    file.seek(int(position or 0))
    start_response("200 OK", headers)
    return environ["wsgi.file_wrapper"](file)


def send_temporary(environ, start_response):
    """A file that is gone once the response is closed, or before."""
    file = tempfile.NamedTemporaryFile()
    for _ in range(300):
        file.write(b"%01023d\n" % 7)
    if environ["QUERY_STRING"] == "unlinked":
        os.unlink(file.name)
    file.seek(1024)
    start_response("200 OK", [])
    return environ["wsgi.file_wrapper"](file, 4096)


def send_file_like(environ, start_response):
    """What has a `fileno` and a name, and yet is not what is in the file."""
    with gzip.open("/tmp/text.gz", "wb") as file:
        file.write(b"unpacked " * 100_000)
    start_response("200 OK", [])
    if environ["QUERY_STRING"] == "gzip":
        return environ["wsgi.file_wrapper"](gzip.open("/tmp/text.gz"))
    return environ["wsgi.file_wrapper"](io.BytesIO(b"in memory " * 100_000))


def big_file(environ, start_response):
    """A file in `/data` with as many mebibytes as the query says, sent in the way it says."""
    size, how = environ["QUERY_STRING"].split(";")
    path = f"/data/big-{size}"
    if not os.path.exists(path):
        with open(path, "wb") as file:
            for _ in range(int(size)):
                file.write(bytes(range(256)) * 4096)
    file = open(path, "rb")
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    if how == "wrapped":
        return environ["wsgi.file_wrapper"](file)
    return iter(lambda: file.read(8192), b"")


def collect_for_ever(environ, start_response):
    """Collects sums, at a pace that memory bears, and that has the collector run often."""
    kept = []
    while True:
        kept.append([sum(range(500))])


class Point:
    def __init__(self, x):
        self.x = x


# It has a dictionary in the snapshot.
ORIGIN = Point(0)
vars(ORIGIN)


def classes(environ, start_response):
    """Makes objects of a class that is there and of a new one, with an attribute more."""

    class Local:
        def __init__(self, value):
            self.value = value

    point, local = Point(1), Local(2)
    name = environ["QUERY_STRING"] or "warm"
    setattr(point, name, 3)
    setattr(ORIGIN, name, 4)
    return reply(start_response, json.dumps([vars(point), vars(ORIGIN), vars(local)]))


def nap(environ, start_response):
    """Sleeps for as long as the query says, or as it may."""
    time.sleep(float(environ["QUERY_STRING"]))
    return reply(start_response, "slept")


def keep_temporary(environ, start_response):
    """Leaves as many mebibytes as the query says in `/tmp`."""
    with open("/tmp/kept", "wb") as file:
        for _ in range(int(environ["QUERY_STRING"])):
            file.write(bytes(1 << 20))
    return reply(start_response, "kept")


def early_hints(environ, start_response):
    if "wsgi.early_hints" not in environ:
        return reply(start_response, "not possible")
    environ["wsgi.early_hints"]([("Link", "</style.css>; rel=preload; as=style")])
    environ["wsgi.early_hints"]([("Link", "</a.js>; rel=preload"), ("Link", "</b.js>; rel=preload")])
    return reply(start_response, "hinted")


def late_early_hints(environ, start_response):
    start_response("200 OK", [])(b"sent")
    environ["wsgi.early_hints"]([("Link", "</style.css>")])
    return []


def write_callable(environ, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    write(b"written, ")
    return [b"returned"]


def cookies(environ, start_response):
    return reply(start_response, "two", headers=[("Set-Cookie", "a=1"), ("Set-Cookie", "b=2; Path=/")])


def status(environ, start_response):
    """Any status line: the query, percent-decoded by nobody."""
    code = environ["QUERY_STRING"]
    start_response(code.replace("+", " "), [])
    return [b"" if code[:3] in ("204", "304") else b"body"]


def fail(environ, start_response):
    raise RuntimeError("a secret of the app")


def exit_app(environ, start_response):
    sys.exit(3)


def not_callable_result(environ, start_response):
    start_response("200 OK", [])
    return 42


def text_chunk(environ, start_response):
    start_response("200 OK", [])
    return ["text, not bytes"]


def no_start_response(environ, start_response):
    return [b"no head"]


def bad_header(environ, start_response):
    start_response("200 OK", [("X-Bad", "a\r\nSet-Cookie: evil=1")])
    return [b""]


def hop_by_hop(environ, start_response):
    start_response("200 OK", [("Transfer-Encoding", "chunked")])
    return [b""]


def bad_status(environ, start_response):
    start_response("OK", [])
    return [b""]


def recurse(environ, start_response):
    def down():
        return down()

    return down()


def recurse_in_c(environ, start_response):
    nested = []
    for _ in range(20_000):
        nested = [nested]
    return reply(start_response, repr(nested)[:10])


def spin(environ, start_response):
    while True:
        pass


def sleep(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"]))
    return reply(start_response, "slept")


def sleep_for_ever(environ, start_response):
    time.sleep(3600)


def compute(environ, start_response):
    end = time.monotonic() + float(environ["QUERY_STRING"])
    while time.monotonic() < end:
        sum(range(1000))
    return reply(start_response, "computed")


def allocate(environ, start_response):
    hoard = []
    while True:
        hoard.append(bytearray(1 << 20))


def allocate_and_catch(environ, start_response):
    hoard = []
    try:
        while True:
            hoard.append(bytearray(1 << 20))
    except MemoryError:
        held = len(hoard)
        hoard.clear()
        return reply(start_response, f"MemoryError after {held} MiB")


def abort(environ, start_response):
    os.abort()


def log_lines(environ, start_response):
    print("to stdout")
    print("to stderr", file=sys.stderr)
    environ["wsgi.errors"].write("to wsgi.errors\n")
    sys.stderr.write("forged\x1b[31m line\rand more\n")
    sys.stderr.write("no end")
    return reply(start_response, "logged")


def log_flood(environ, start_response):
    for number in range(5000):
        print("flood", number, file=sys.stderr)
    return reply(start_response, "logged")


def served(environ, start_response):
    """How many requests this instance has answered."""
    global requests_served
    requests_served += 1
    return reply(start_response, str(requests_served))


def was_closed(environ, start_response):
    return reply(start_response, " ".join(closed))


def drawn():
    return random.random()


# So often that the interpreter remembers where the module has its function.
for _ in range(100):
    drawn()


def randomness(environ, start_response):
    """One value from each source that two instances must not share."""
    name = tempfile.mktemp()
    database = sqlite3.connect(":memory:")
    number, blob = database.execute("SELECT random(), hex(randomblob(16))").fetchone()
    database.close()
    return reply(
        start_response,
        json.dumps(
            {
                "random": drawn(),
                "Random": unseeded.random(),
                "frozen": frozen.random(),
                "seeded": seeded.random(),
                "SQL random": number,
                "SQL randomblob": blob,
                "uuid4": str(uuid.uuid4()),
                "uuid1": str(uuid.uuid1()),
                "secrets": secrets.token_hex(),
                "urandom": os.urandom(16).hex(),
                "tempfile": name,
                "SystemRandom": random.SystemRandom().random(),
            }
        ),
    )


def environment(environ, start_response):
    return reply(start_response, json.dumps(dict(os.environ)))


def now(environ, start_response):
    return reply(start_response, str(time.time()))


def files(environ, start_response):
    """Everything that needs the files layer at run time."""
    import encodings.cp500  # noqa: F401  # a codec that nothing loads early
    import zoneinfo
    from importlib.metadata import version

    import late
    import package

    with open(os.path.join(os.path.dirname(__file__), "late.py")) as source:
        first_line = source.readline().strip()
    return reply(
        start_response,
        json.dumps(
            {
                "late": late.VALUE,
                "resource": package.TEXT,
                "source": first_line,
                "codec": "a".encode("cp500").hex(),
                "zone": str(zoneinfo.ZoneInfo("Europe/Berlin").utcoffset(None) or "ok"),
                "tzdata": bool(version("tzdata")),
                "cwd": os.getcwd(),
                "relative": os.path.exists("late.py"),
            }
        ),
    )


def write_files(environ, start_response):
    """What may be written where."""
    outcome = {}
    for path in ("/tmp/x", "/0/x", "/1/x", "/python/x", "/data/x", "/x", "/tmp/../0/y", "/tmp/../../etc/passwd"):
        try:
            with open(path, "a") as file:
                file.write("x")
            outcome[path] = "written"
        except OSError as error:
            outcome[path] = type(error).__name__
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"temporary")
        file.flush()
        outcome["size"] = os.path.getsize(file.name)
    return reply(start_response, json.dumps(outcome))


def temporary_files(environ, start_response):
    """Names in /tmp before this request leaves one there."""
    names = sorted(os.listdir("/tmp"))
    with open("/tmp/left-behind", "w") as file:
        file.write("secret of an earlier instance")
    return reply(start_response, json.dumps(names))


def escape(environ, start_response):
    """Tries to leave the mounts."""
    outcome = {}
    for path in ("/etc/passwd", "/0/../../etc/passwd", "/proc/self/environ", "../../../etc/passwd"):
        try:
            with open(path) as file:
                outcome[path] = file.read()
        except OSError as error:
            outcome[path] = type(error).__name__
    for target in ("/etc/passwd", "../../../../../../../../../../etc/passwd"):
        try:
            if os.path.lexists("/tmp/link"):
                os.unlink("/tmp/link")
            os.symlink(target, "/tmp/link")
            with open("/tmp/link") as file:
                outcome["link to " + target] = file.read()
        except OSError as error:
            outcome["link to " + target] = type(error).__name__
    return reply(start_response, json.dumps(outcome))


def sockets(environ, start_response):
    import socket

    outcome = {}
    for name, attempt in {
        "connect": lambda: socket.create_connection(("127.0.0.1", int(environ["QUERY_STRING"])), 1),
        "listen": lambda: socket.create_server(("127.0.0.1", 0)),
        "lookup": lambda: socket.getaddrinfo("localhost", 80),
    }.items():
        try:
            attempt()
            outcome[name] = "worked"
        except OSError as error:
            outcome[name] = type(error).__name__
    return reply(start_response, json.dumps(outcome))


def passwords(environ, start_response):
    return reply(
        start_response,
        json.dumps(
            {
                "pbkdf2": hashlib.pbkdf2_hmac("sha256", b"passwd", b"salt", 1, 64).hex(),
                "sha1": hashlib.pbkdf2_hmac("sha1", b"password", b"salt", 4096).hex(),
                "scrypt": hashlib.scrypt(b"password", salt=b"NaCl", n=1024, r=8, p=16).hex(),
                "sha512": hashlib.pbkdf2_hmac("sha512", b"p", b"s", 1_000_000, 64).hex(),
                "too much": attempt(lambda: hashlib.pbkdf2_hmac("sha256", b"p", b"s", 2**31 - 1)),
                "too large": attempt(lambda: hashlib.scrypt(b"p", salt=b"s", n=2**24, r=8, p=1)),
                "wrong": attempt(lambda: hashlib.scrypt(b"p", salt=b"s", n=3, r=8, p=1)),
                "unknown": attempt(lambda: hashlib.pbkdf2_hmac("nope", b"p", b"s", 1)),
            }
        ),
    )


def attempt(action):
    try:
        return repr(action())
    except Exception as error:
        return type(error).__name__


def cpu_hash(environ, start_response):
    """A derivation that takes a core for a while."""
    hashlib.pbkdf2_hmac("sha512", b"p", b"s", 3_000_000)
    return reply(start_response, "derived")


def run(environ, start_response):
    """Runs the Python in the body and answers with what it leaves in `result`."""
    scope = {}
    exec(environ["wsgi.input"].read(), scope)
    return reply(start_response, json.dumps(scope["result"]))


ROUTES = {
    "/" + function.__name__.replace("_", "-"): function
    for function in (
        hello, show_environ, echo, count, count_only, lines, use_input, read_and_tell, ignore_body, stream_too_much,
        whole_too_much, whole_too_little, late_start, replace_head, replace_sent_head, start_twice, wrong_start,
        ordered_headers, write_slowly, close_how, close_count, send_file, send_temporary, send_file_like, big_file, collect_for_ever, classes, work_slowly, nap, keep_temporary,
        early_hints, late_early_hints, large, large_whole, stream, stream_exact, whole_then, single,
        stream_for_ever, stream_then_fail, stream_too_little, stream_slowly, stream_then_spin, write_callable, cookies,
        status, fail, exit_app, not_callable_result, text_chunk, no_start_response, bad_header,
        hop_by_hop, bad_status, recurse, recurse_in_c, spin, sleep, sleep_for_ever, compute, allocate,
        allocate_and_catch, abort, log_lines, log_flood, served, was_closed, randomness, environment,
        now, files, write_files, temporary_files, escape, sockets, passwords, cpu_hash, run,
    )
}  # fmt: skip


def app(environ, start_response):
    route = ROUTES.get(environ["PATH_INFO"])
    if route is None:
        return reply(start_response, "no such route", "404 Not Found")
    return route(environ, start_response)
