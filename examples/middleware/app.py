"""A small site behind a chain of middleware."""

import os
import time

from catching import catching
from passwords import digest, guarded
from sessions import with_sessions
from squeezing import gzipped
from transform import shouting

TEXT = [("Content-Type", "text/plain; charset=utf-8")]


def front(environ, start_response):
    session = environ["session"]
    session["visits"] = session.get("visits", 0) + 1
    start_response("200 OK", TEXT)
    return [b"you were here %d times\n" % session["visits"]]


def stream(environ, start_response):
    start_response("200 OK", TEXT)
    for number in (b"one\n", b"two\n", b"three\n"):
        yield number
        time.sleep(0.05)


def broken(environ, start_response):
    start_response("200 OK", TEXT)
    raise RuntimeError("broken on purpose")


def broken_late(environ, start_response):
    start_response("200 OK", TEXT)
    yield b"so far so good\n"
    raise RuntimeError("broken on purpose, late")


def vault(environ, start_response):
    start_response("200 OK", TEXT)
    return [f"welcome to the vault, {environ['REMOTE_USER']}\n".encode()]


def not_found(environ, start_response):
    start_response("404 Not Found", TEXT)
    return [b"nothing here\n"]


PAGES = {"/": front, "/stream": stream, "/broken": broken, "/broken-late": broken_late, "/vault": vault}


def site(environ, start_response):
    return PAGES.get(environ["PATH_INFO"], not_found)(environ, start_response)


def users():
    return {"alice": digest(os.environ.get("PASSWORD", "open sesame").encode())}


# The first one here sees a request last.
app = with_sessions(site)
app = guarded(app, "/vault", users)
app = shouting(app)
app = gzipped(app)
app = catching(app)
