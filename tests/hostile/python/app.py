"""What a hostile tenant does in Python, one route for each attack.

Most take the query as a number: how much of it.
"""

import functools
import hashlib
import os
import re
import socket
import sys
import tempfile
import time

CHATTER = "chatter " * 10


def reply(start_response, text, headers=()):
    start_response("200 OK", [("Content-Type", "text/plain"), *headers])
    return [str(text).encode()]


def hello(number, start_response):
    return reply(start_response, "hello")


# === Time ===


def spin(number, start_response):
    while True:
        pass


def short_spin(number, start_response):
    """Computes for so many milliseconds and answers: nothing to be stopped for."""
    end = time.monotonic() + number / 1000
    while time.monotonic() < end:
        pass
    return reply(start_response, "spun")


def stubborn(number, start_response):
    """Takes no for an answer from nobody."""
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass


def regular_expression(number, start_response):
    return reply(start_response, re.match(r"(a|aa|a?a)*$", "a" * 60 + "b"))


def large_number(number, start_response):
    """One instruction of the interpreter that takes minutes."""
    return reply(start_response, (3 ** (3**17)) % 7)


def derive_keys(number, start_response):
    while True:
        hashlib.pbkdf2_hmac("sha512", b"p", b"s", 5_000_000)


def sleep(number, start_response):
    time.sleep(3600)


# === Memory and stack ===


def allocate(number, start_response):
    hoard = []
    while True:
        hoard.append(bytearray(b"x" * (1 << 20)))


def churn(number, start_response):
    """Dirties so many mebibytes, and gives them back."""
    hoard = [bytearray(b"x" * (1 << 20)) for _ in range(number)]
    return reply(start_response, len(hoard))


def send_when_full(number, start_response):
    """Has no memory left for a copy of so many bytes, which it sends."""
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    write(b"filled, ")
    body = b"x" * number
    hoard = []
    try:
        while True:
            hoard.append(bytearray(b"x" * (60 << 10)))
    except MemoryError:
        pass
    try:
        write(body)
    except MemoryError:
        hoard.clear()
        write(b"and refused")
    return []


def recurse(number, start_response):
    def down():
        return down()

    return reply(start_response, down())


def recurse_in_c(number, start_response):
    """Frees what is nested so deeply that the C stack ends."""
    nested = ()
    for _ in range(400_000):
        nested = (nested,)
    del nested
    return reply(start_response, "freed")


def trap(number, start_response):
    os.abort()


# === Output ===


def tiny_writes(number, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    for _ in range(number):
        write(b"x")
    return []


def endless(number, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    piece = b"x" * number
    while True:
        yield piece


def whole(number, start_response):
    """So many bytes at once: the instance is done before the client has one."""
    return reply(start_response, "x" * number)


def many_headers(number, start_response):
    return reply(start_response, "many", [("X-Header", "x")] * number)


def long_header(number, start_response):
    return reply(start_response, "long", [("X-Header", "x" * number)])


def chatter(number, start_response):
    for index in range(number):
        print(CHATTER, index, file=sys.stderr)
    return reply(start_response, "said")


def long_line(number, start_response):
    for _ in range(1000):
        sys.stderr.write("x" * number)
    return reply(start_response, "said")


def read_slowly(number, start_response, body):
    """Takes the request's body one byte at a time."""
    length = 0
    while body.read(1):
        length += 1
    return reply(start_response, length)


# === Files and handles ===


def fill(directory, number, start_response):
    """Writes files of so many bytes until that fails."""
    written = 0
    try:
        # An earlier request of the instance may have filled it up.
        path = tempfile.mkdtemp(dir=directory)
        while True:
            with open(f"{path}/{written}", "wb") as file:
                file.write(b"x" * number)
            written += 1
    except OSError as error:
        return reply(start_response, f"{written} {error.errno}")


def fill_tmp(number, start_response):
    return fill("/tmp", number, start_response)


def fill_data(number, start_response):
    return fill("/data", number, start_response)


def churn_data(number, start_response):
    """Makes and removes files and directories, and syncs them, as fast as it can."""
    path = tempfile.mkdtemp(dir="/data")
    for _ in range(number):
        os.mkdir(f"{path}/d")
        with open(f"{path}/d/f", "wb") as file:
            file.write(b"x" * 100_000)
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{path}/d/f", f"{path}/f")
        os.unlink(f"{path}/f")
        os.rmdir(f"{path}/d")
    return reply(start_response, "churned")


def send_data(number, start_response, environ):
    """Has the host send a file of so many bytes."""
    path = f"/data/{number}"
    if not os.path.exists(path):
        with open(path, "wb") as file:
            file.write(b"x" * number)
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return environ["wsgi.file_wrapper"](open(path, "rb"))


@functools.cache
def large_file():
    return max((entry.path for entry in os.scandir("/python") if entry.is_file()), key=os.path.getsize)


def send_own(number, start_response, environ):
    """Has the host send a file of a layer."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return environ["wsgi.file_wrapper"](open(large_file(), "rb"))


def remove_data(number, start_response):
    names = os.listdir("/data")
    for name in names:
        os.unlink(f"/data/{name}")
    return reply(start_response, len(names))


def hoard_handles(directory, start_response):
    """Opens files until that fails, and keeps them open for a while."""
    held = []
    try:
        while True:
            # Without a buffer: those of so many are more memory than there may be.
            held.append(open(f"{directory}/{len(held)}", "wb", buffering=0))
    except OSError as error:
        time.sleep(0.5)
        return reply(start_response, f"{len(held)} {error.errno}")


def hoard_tmp(number, start_response):
    return hoard_handles("/tmp", start_response)


def hoard_data(number, start_response):
    return hoard_handles(tempfile.mkdtemp(dir="/data"), start_response)


def hoard_random(number, start_response):
    length = 0
    for _ in range(number):
        length += len(os.urandom(1 << 20))
    return reply(start_response, length)


# === Network ===


def look_up(number, start_response):
    failed = 0
    for index in range(number):
        try:
            socket.getaddrinfo(f"name-{index}.invalid", 80)
        except OSError:
            failed += 1
    return reply(start_response, failed)


def connect(number, start_response):
    """Connects so often to the port that it may reach, and keeps what it gets for a while."""
    held, failed = [], 0
    for _ in range(number):
        try:
            held.append(socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 1))
        except OSError:
            failed += 1
    time.sleep(0.5)
    return reply(start_response, f"{len(held)} {failed}")


ROUTES = {
    "/" + function.__name__.replace("_", "-"): function
    for function in (
        hello, spin, short_spin, stubborn, regular_expression, large_number, derive_keys, sleep, allocate, churn,
        send_when_full, recurse, recurse_in_c, trap, tiny_writes, endless, whole, many_headers, long_header, chatter,
        long_line, fill_tmp, fill_data, churn_data, remove_data, hoard_tmp, hoard_data, hoard_random, look_up, connect,
    )
}  # fmt: skip
SENDERS = {"/send-data": send_data, "/send-own": send_own}


def app(environ, start_response):
    number = int(environ["QUERY_STRING"] or 0)
    if environ["PATH_INFO"] == "/read-slowly":
        return read_slowly(number, start_response, environ["wsgi.input"])
    if sender := SENDERS.get(environ["PATH_INFO"]):
        return sender(number, start_response, environ)
    return ROUTES[environ["PATH_INFO"]](number, start_response)
