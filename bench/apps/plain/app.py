"""WSGI without a framework, so that servers are compared and nothing else."""

import json
import time

ROW = "<tr><td>%04d</td><td>a row of a table that is long enough</td></tr>\n"
PAGE = ("<!doctype html>\n<table>\n" + "".join(ROW % n for n in range(148)) + "</table>\n").encode()
ITEMS = [{"id": n, "name": f"item {n}", "price": n * 1.25, "tags": ["new", "blue"]} for n in range(20)]
PIECE = bytes(range(256)) * 256
PIECES = 160
LINE = b"data: " + b"x" * 1016 + b"\n\n"


def hello(environ):
    return "text/plain", b"Hello, world!\n"


def encode(environ):
    return "application/json", json.dumps({"items": ITEMS, "total": len(ITEMS)}).encode()


def page(environ):
    return "text/html; charset=utf-8", PAGE


def sleep(environ):
    time.sleep(0.1)
    return "text/plain", b"slept\n"


def compute(environ):
    """Collatz chains: some 20 ms of one core of today, with native CPython 3.11."""
    longest = 0
    for start in range(1, 6300):
        number, steps = start, 0
        while number != 1:
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            steps += 1
        if steps > longest:
            longest = steps
    return "text/plain", b"%d\n" % longest


def upload(environ):
    body, length = environ["wsgi.input"], 0
    while piece := body.read(65536):
        length += len(piece)
    return "text/plain", b"%d\n" % length


ROUTES = {
    "/hello": hello, "/json": encode, "/page": page, "/sleep": sleep, "/cpu": compute, "/upload": upload,
}


def application(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/download":
        length = str(len(PIECE) * PIECES)
        start_response("200 OK", [("Content-Type", "application/octet-stream"), ("Content-Length", length)])
        return (PIECE for _ in range(PIECES))
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return (LINE for _ in range(100))
    if path not in ROUTES:
        start_response("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", "0")])
        return [b""]
    kind, body = ROUTES[path](environ)
    start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]
