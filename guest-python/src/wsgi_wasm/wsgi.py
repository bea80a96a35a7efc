"""One request: PEP 3333 between a WSGI application and the host.

The host checks all of this again, for it trusts no guest. The checks here
exist because only they can raise inside the application, at the line which
is at fault.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol

from wsgi_wasm.streams import BodyAborted, BodyTooLarge, FileWrapper, open_input

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
"""A WSGI application."""

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


class ClientGone(ConnectionAbortedError):
    """The client left before it had the whole response."""


class Refused(RuntimeError):
    """The host refused the response; its log tells why."""


class Host(Protocol):
    """What `run` needs of the host for one request."""

    def read(self, limit: int, /) -> bytes:
        """Returns the next bytes of the request body, none at its end.

        Raises `BodyAborted` or `BodyTooLarge`.
        """
        ...

    def start(self, head: bytes, /) -> None:
        """Sends a CGI response head. Raises `ClientGone` or `Refused`."""
        ...

    def write(self, chunk: bytes, /) -> None:
        """Sends bytes of the body. Raises `ClientGone` or `Refused`."""
        ...

    def finish(self) -> None:
        """Says that the body is complete. Raises `ClientGone` or `Refused`."""
        ...

    def send_whole(self, response: bytes, /) -> None:
        """Sends a whole CGI response. Raises `ClientGone` or `Refused`."""
        ...

    def send_file(self, head: bytes, path: str, offset: int, length: int, /) -> bool:
        """Sends a whole response with a part of a file as its body.

        Returns False, and has sent nothing, if it can not. Raises `ClientGone`
        or `Refused`.
        """
        ...

    def early_hints(self, fields: bytes, /) -> None:
        """Sends `103 Early Hints` with these lines. Raises `ClientGone` or `Refused`."""
        ...

    def log(self, text: str, /) -> None:
        """Writes lines to the application's log."""
        ...


# PEP 3333, "environ Variables": the part that is equal in all requests. An
# instance answers one request at a time, and the host runs several instances.
_ENVIRON: dict[str, Any] = {
    "wsgi.version": (1, 0),
    "wsgi.multithread": False,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
    "wsgi.input_terminated": True,
    "wsgi.file_wrapper": FileWrapper,
}

# Bytes handed to the host at once. A list that crosses the border is copied
# as a whole, so one large body would need several times its size in memory.
_PIECE = 1024 * 1024
# A file up to this size is read here, and its response returned as a whole.
_SMALL_FILE = 64 * 1024

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_STATUS = re.compile(r"[1-9][0-9]{2} [\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff][\t\x20]*")
# RFC 9110 section 5.5: visible characters, blanks and obs-text.
_BAD_IN_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")
# Digits of a length: so many fit into the 64 bits of the contract.
_MAX_DIGITS = 18

# PEP 3333, "Other HTTP Features": an application must not use hop-by-hop
# features. `Status` would be taken for the status line of the CGI response.
_RESERVED = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization",
    "proxy-connection", "te", "trailer", "trailers", "transfer-encoding", "upgrade", "status",
})  # fmt: skip

_FAILED = "the application failed"

# What was checked or taken apart before, since applications and clients use
# few of them over and over. Bounded, for a client may send any: the statuses,
# the names of headers with their lower case form, and what environs look like,
# by their names as in the block: none for what came once.
_statuses: set[str] = {"200 OK"}
_names: dict[str, str] = {name: name.lower() for name in ("Content-Type", "Content-Length")}
_shapes: dict[bytes, _Shape | None] = {}
_REMEMBERED = 256
_REMEMBERED_SHAPES = 32
_REMEMBERED_SHAPE_LENGTH = 2048


def run(application: Application, environ_block: bytes, body: bytes, host: Host) -> bytes:
    """Answers one request.

    `environ_block` and `body` are the arguments of `handler.handle`, and so is
    what it returns: a whole CGI response, or nothing if the response went
    through `host` or the application failed.
    """
    names, _, values = environ_block.partition(b"\0\0")
    fields = values.decode("latin-1").split("\0")
    shape = _shapes.get(names) or _shape(names)
    if shape is None:
        environ = {**dict(zip(names.decode("latin-1").split("\0"), fields)), **_ENVIRON}
    else:
        environ = shape.environ.copy()
        environ.update(zip(shape.names, fields))
    environ["wsgi.errors"] = sys.stderr
    response = Response(environ, host)
    if environ.get("SERVER_PROTOCOL") == "HTTP/1.1":
        environ["wsgi.early_hints"] = response.early_hints
    chunks: Any = None
    try:
        environ["wsgi.input"] = open_input(environ, body, host.read)
        chunks = application(environ, response.start_response)
        if type(chunks) is list or type(chunks) is tuple:
            # They have no `close`.
            return response.whole(chunks)
        response.stream(chunks)
    except BaseException as error:
        # Also SystemExit and its kin: what leaves an exported function is a
        # trap, which costs the instance.
        response.report(error)
    # PEP 3333, "Specification Details": `close` is called "whether the request
    # was completed normally, or terminated early". It is not part of the
    # response, which is on its way and stands if `close` fails.
    try:
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
    except BaseException as error:
        response.report(error, "close() failed")
    return b""


class Response:
    """The response to one request: what `start_response` and `write` do, and the sending.

    A list or a tuple, after which nothing runs, is returned to the host; else
    the head goes out with the first chunk that is not empty.
    """

    __slots__ = (
        "bodiless",
        "cut",
        "done",
        "gone",
        "head",
        "host",
        "length",
        "method",
        "path",
        "sent",
        "started",
    )

    def __init__(self, environ: dict[str, Any], host: Host) -> None:
        # Not the environ itself, which refers to this object: a circle is
        # freed late.
        self.method: str = environ.get("REQUEST_METHOD", "")
        self.path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        self.host = host
        # The head without its final empty line, as `start_response` got it.
        self.head: str | None = None
        # Whether the host has the head, and all of a whole response.
        self.started = False
        self.done = False
        # The Content-Length that the application declared.
        self.length: int | None = None
        self.bodiless = False
        self.sent = 0
        self.cut = False
        self.gone = False

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        """Takes status and headers, sends nothing, returns `write`.

        PEP 3333, "The start_response() Callable". Errors "should" be raised
        here, "while the application is still running".
        """
        if exc_info:
            try:
                if self.started:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # Breaks the circle through this frame.
        elif self.head is not None:
            raise RuntimeError("start_response was called a second time without exc_info")
        if type(status) is not str or status not in _statuses:
            _check_status(status)
        code = status[:3]
        without_length = code == "204" or code == "205" or code[0] == "1"
        lines, length = _header_lines(headers, without_length)
        self.head = f"Status: {status}\r\n{lines}"
        self.length = length
        # RFC 9110 sections 6.4.1 and 15.3.6.
        self.bodiless = without_length or code == "304" or self.method == "HEAD"
        return self.write

    def early_hints(self, headers: list[tuple[str, str]]) -> None:
        """Sends `103 Early Hints` with `headers`; `wsgi.early_hints` in the environ.

        Not a part of PEP 3333; other servers have it by the same name.
        """
        if self.started:
            raise RuntimeError("early hints must be sent before the response")
        lines, length = _header_lines(headers, False)
        if length is not None:
            raise ValueError("early hints have no Content-Length")
        try:
            self.host.early_hints(lines.encode("latin-1"))
        except ClientGone:
            self.gone = True
            raise

    def write(self, data: bytes) -> None:
        """Sends `data` before it returns (PEP 3333, "The write() Callable")."""
        if not isinstance(data, bytes):
            raise TypeError(f"write() takes bytes, not {_kind(data)}")
        self.send(data)

    def send(self, chunk: bytes) -> None:
        """Sends `chunk`, and before it the head if that is still here.

        PEP 3333, "The start_response() Callable": the head waits for the first
        chunk that is not empty, so that the application can still replace it.
        """
        if not chunk:
            return
        if self.bodiless:
            # It tells that the head is final; the rest is for nobody.
            if not self.started:
                self.send_whole(b"")
            return
        length = self.length
        if length is not None and len(chunk) > length - self.sent:
            chunk = self.cut_to(chunk, length - self.sent)
            # Nothing is left of it after the end; an empty body has only a head.
            if not chunk and self.started:
                return
        host = self.host
        try:
            if not self.started:
                if self.head is None:
                    raise RuntimeError("the application sent a body before start_response")
                if len(chunk) == length and length <= _PIECE:
                    self.send_whole(chunk)
                    return
                # Started before the attempt: a head may be half way out.
                self.started = True
                host.start(self.message(b""))
            if len(chunk) <= _PIECE:
                host.write(chunk)
            else:
                for start in range(0, len(chunk), _PIECE):
                    host.write(chunk[start : start + _PIECE])
        except ClientGone:
            self.gone = True
            raise
        self.sent += len(chunk)

    def send_whole(self, body: bytes) -> None:
        """Sends the response with the whole `body` in one."""
        self.started = self.done = True
        self.sent = len(body)
        try:
            self.host.send_whole(self.message(body))
        except ClientGone:
            self.gone = True
            raise

    def whole(self, chunks: list[bytes] | tuple[bytes, ...]) -> bytes:
        """Answers with a body that is known as a whole."""
        for chunk in chunks:
            if not isinstance(chunk, bytes):
                raise TypeError(f"a chunk of the body must be bytes, not {_kind(chunk)}")
        if self.started:  # by write()
            for chunk in chunks:
                self.send(chunk)
        else:
            body = self.fit(chunks[0] if len(chunks) == 1 else b"".join(chunks))
            if len(body) <= _PIECE:
                return self.message(body)
            self.send(body)
        self.end()
        return b""

    def stream(self, chunks: Iterable[bytes]) -> None:
        """Answers with chunks, each sent before the next is asked for.

        PEP 3333, "Buffering and Streaming". A chunk as long as the
        Content-Length is all there is: the client has the whole response
        before the application goes on.
        """
        if chunks is None or isinstance(chunks, (str, bytes)):
            raise TypeError(f"the application returned {_kind(chunks)}, not an iterable of bytes")
        if type(chunks) is FileWrapper and self.head is not None and self.send_file(chunks):
            return
        for chunk in chunks:
            if not isinstance(chunk, bytes):
                raise TypeError(f"a chunk of the body must be bytes, not {_kind(chunk)}")
            if self.length is None and chunk and self.is_single(chunks):
                self.add_length(len(chunk))
            self.send(chunk)
            if self.bodiless and chunk:
                break
        self.end()

    def is_single(self, chunks: Iterable[bytes]) -> bool:
        """Tells whether a first chunk of `chunks` is the whole body.

        PEP 3333, "Handling the Content-Length Header": if `len` can be called,
        it can be relied on.
        """
        if self.started or self.bodiless or self.head is None:
            return False
        try:
            return len(chunks) == 1  # type: ignore[arg-type]
        except TypeError:
            return False

    def send_file(self, wrapper: FileWrapper) -> bool:
        """Sends the file in `wrapper` if the host can do that, and tells whether it did.

        Else `wrapper` is prepared to be iterated. A file ends at the
        Content-Length, which is how applications send a part of one (PEP 3333,
        "Optional Platform-Specific File Handling").
        """
        if self.bodiless:
            # Nothing of it is sent, so nothing need be read.
            wrapper.room = 0
        size = None if self.started else wrapper.size()
        length = self.length
        if size is not None:
            if length is None:
                length = size
                self.add_length(size)
            elif length > size and not self.bodiless:
                raise self.too_short(size)
        if self.bodiless:
            return False
        if length is not None:
            wrapper.room = length - self.sent
        if size is None or length is None or length <= _SMALL_FILE:
            return False
        located = wrapper.locate()
        if located is None:
            return False
        try:
            sent = self.host.send_file(self.message(b""), located[0], located[1], length)
        except ClientGone:
            self.gone = True
            raise
        self.started = sent
        return sent

    def end(self) -> None:
        """Ends the response after the last chunk."""
        if not self.started:
            self.send_whole(self.fit(b""))
        if self.gone:
            # The application caught the exception and went on.
            raise ClientGone("the client is gone")
        if self.done:
            return
        if self.length is not None and self.sent < self.length:
            raise self.too_short(self.sent)
        self.host.finish()

    def fit(self, body: bytes) -> bytes:
        """Makes head and whole `body` fit each other, and returns the body.

        PEP 3333, "Handling the Content-Length Header": added if it is missing;
        a body that is longer is cut, one that is shorter is an error.
        """
        if self.head is None:
            raise RuntimeError("the application did not call start_response")
        if self.bodiless:
            return b""
        if self.length is None:
            self.add_length(len(body))
        elif len(body) > self.length:
            return self.cut_to(body, self.length)
        elif len(body) < self.length:
            raise self.too_short(len(body))
        return body

    def add_length(self, length: int) -> None:
        """Adds the Content-Length that the application did not declare."""
        self.length = length
        self.head = f"{self.head}Content-Length: {length}\r\n"

    def message(self, body: bytes) -> bytes:
        """Returns the CGI response with `body` behind the head."""
        return f"{self.head}\r\n".encode("latin-1") + body

    def cut_to(self, chunk: bytes, room: int) -> bytes:
        """Returns the part of `chunk` that the Content-Length has room for."""
        if not self.cut:
            self.cut = True
            self.log(f"the body is longer than its Content-Length of {self.length}, cut")
        return chunk[:room]

    def too_short(self, sent: int) -> ValueError:
        """Returns the error for a body that ends before its Content-Length."""
        return ValueError(f"the body has {sent} bytes, but Content-Length is {self.length}")

    def report(self, error: BaseException, what: str = _FAILED) -> None:
        """Logs `error`: with its traceback, unless the client is its cause. Never raises."""
        try:
            if isinstance(error, (ClientGone, BodyAborted, BodyTooLarge)):
                self.log(f"stopped: {error}")
            elif self.gone and what == _FAILED:
                # What an application makes of `ClientGone` is no news either.
                self.log(f"stopped: {_kind(error)} after the client was gone: {error}")
            else:
                trace = error.__traceback__
                # The frames of this module say nothing about the application.
                while trace is not None and trace.tb_frame.f_code.co_filename == _FILE:
                    trace = trace.tb_next
                lines = traceback.format_exception(type(error), error, trace)
                self.log(what, "".join(lines))
        except BaseException:
            # Out of memory, most likely. The empty answer still tells the host.
            return

    def log(self, message: str, details: str = "") -> None:
        """Writes one line that names the request, then `details`."""
        # The path comes from the client: `ascii` keeps its line breaks out of the log.
        self.host.log(f"{self.method} {ascii(self.path)[1:-1]}: {message}\n{details}")


class _Shape:
    """What environs with the same names have in common."""

    __slots__ = ("environ", "names")

    def __init__(self, names: list[str]) -> None:
        self.names = names
        # Large enough, so that it need not grow with each value.
        self.environ: dict[str, Any] = {**dict.fromkeys(names), **_ENVIRON}


def _shape(names: bytes) -> _Shape | None:
    """Returns what environs look like whose block starts with `names`; none for the first one,
    since it may be the only one of an instance."""
    if names in _shapes:
        shape = _shapes[names] = _Shape(names.decode("latin-1").split("\0"))
        return shape
    if len(_shapes) < _REMEMBERED_SHAPES and len(names) <= _REMEMBERED_SHAPE_LENGTH:
        _shapes[names] = None
    return None


def forget_shapes() -> None:
    """Forgets what environs looked like, which is that of no client's."""
    _shapes.clear()


def _check_status(status: str) -> None:
    """Raises unless an application may send `status`."""
    if type(status) is not str:
        raise TypeError(f"the status must be a str, not {_kind(status)}: {status!r}")
    if not _STATUS.fullmatch(status):
        raise ValueError(f"the status must be like '200 OK', not {status!r}")
    if len(_statuses) < _REMEMBERED:
        _statuses.add(status)


def _header_lines(
    headers: list[tuple[str, str]], without_length: bool
) -> tuple[str, int | None]:
    """Returns the lines for `headers`, and the Content-Length among them.

    With `without_length` there is no line for it. Raises if an application
    may not send them.
    """
    if type(headers) is not list:
        raise TypeError(f"the headers must be a list, not {_kind(headers)}")
    lines = ""
    length = None
    for header in headers:
        if type(header) is not tuple or len(header) != 2:
            raise TypeError(f"a header must be a tuple (name, value), not {header!r}")
        name, value = header
        if type(name) is not str or type(value) is not str:
            raise TypeError(f"the name and the value of a header must be str: {header!r}")
        lower = _names.get(name) or _check_name(name)
        # The first two are quick and true for nearly all values.
        if not (value.isascii() and value.isprintable()) and (bad := _BAD_IN_VALUE.search(value)):
            raise ValueError(f"the value of header {name} contains {bad[0]!r}: {value!r}")
        if lower == "content-length":
            if length is not None:
                raise ValueError("the headers contain Content-Length twice")
            # `isdigit` alone takes those of all scripts.
            if not (value.isascii() and value.isdigit()) or len(value) > _MAX_DIGITS:
                raise ValueError(f"Content-Length must be a number, not {value!r}")
            length = int(value)
            if without_length:
                # RFC 9110 section 8.6 forbids it there.
                continue
        lines += f"{name}: {value}\r\n"
    return lines, length


def _check_name(name: str) -> str:
    """Returns `name` in lower case if an application may send such a header."""
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"not a header name: {name!r}")
    lower = name.lower()
    if lower in _RESERVED:
        raise ValueError(f"header {name} is the server's business, not the application's")
    if len(_names) < _REMEMBERED:
        _names[name] = lower
    return lower


def _kind(value: object) -> str:
    return type(value).__name__


_FILE = run.__code__.co_filename
