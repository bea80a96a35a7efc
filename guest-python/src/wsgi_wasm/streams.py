"""The streams of PEP 3333: `wsgi.input` and `wsgi.file_wrapper`.

A body that has arrived as a whole is a `BytesIO`, which costs nothing. Only a
body that is still on its way needs `RequestBody`, which asks the host for
more when the application reads more.

`wsgi.errors` is the interpreter's own `sys.stderr`, which the guest's
environment (PYTHONUNBUFFERED) makes write through.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Pull = Callable[[int], bytes]
"""Returns at least one and at most so many next bytes of the body, or none at its end."""

# One pull per 16 KiB of lines; a large `read(size)` bypasses the buffer.
_BUFFER = 16 * 1024
# The largest piece to pull at once when the whole rest is asked for.
_PIECE = 256 * 1024
# The least to read of a file at once.
_FILE_BLOCK = 64 * 1024


class BodyAborted(ConnectionResetError):
    """The client closed the connection, or fell silent, before its whole body arrived."""


class BodyTooLarge(OSError):
    """The body is larger than the host's limit; the host answers 413 by itself."""


def open_input(environ: dict[str, Any], body: bytes, pull: Pull) -> io.BufferedIOBase:
    """Returns `wsgi.input` for a request of which `body` has arrived.

    PEP 3333, "Input and Error Streams": a server "should not attempt to read
    past the Content-Length", and simulates an end of file there. A request
    of HTTP/1 with neither Content-Length nor Transfer-Encoding has no body
    (RFC 9112 section 6.3); one of HTTP/2 needs neither to have one (RFC 9113
    section 8.1.1). `pull` is called only for bytes that have not arrived.
    """
    declared = environ.get("CONTENT_LENGTH")
    if declared:
        length = int(declared)
        if len(body) < length:
            return io.BufferedReader(RequestBody(body, length, pull), _BUFFER)
        return BytesIO(body if len(body) == length else body[:length])
    if "HTTP_TRANSFER_ENCODING" in environ or environ.get("SERVER_PROTOCOL") == "HTTP/2.0":
        return io.BufferedReader(RequestBody(body, None, pull), _BUFFER)
    return BytesIO()


class RequestBody(io.RawIOBase):
    """The bytes of a body that is still arriving.

    `first` are those that are here; `length` is the length of the whole, or
    None if only `pull` knows where it ends. Meant to be read through an
    `io.BufferedReader`, which has `readline` and its kin.
    """

    def __init__(self, first: bytes, length: int | None, pull: Pull) -> None:
        self._first = memoryview(first)
        self._missing = None if length is None else length - len(first)
        self._pull = pull

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fills `buffer` with what comes next, as much as one pull gives."""
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Returns all the rest."""
        pieces = []
        while data := self._next(_PIECE):
            pieces.append(data)
        return b"".join(pieces)

    def _next(self, limit: int) -> bytes | memoryview:
        if self._first:
            data, self._first = self._first[:limit], self._first[limit:]
            return data
        missing = self._missing
        if missing is None:
            pulled = self._pull(limit) if limit else b""
            if limit and not pulled:
                # The end: the host need not be asked again.
                self._missing = 0
            return pulled
        if not missing or not limit:
            return b""
        pulled = self._pull(min(limit, missing))
        if not pulled:
            raise BodyAborted(f"the request body ended {missing} bytes before its Content-Length")
        self._missing = missing - len(pulled)
        return pulled


class Readable(Protocol):
    """What PEP 3333 asks of a file-like object for `wsgi.file_wrapper`."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes, none at the end."""
        ...


class FileWrapper:
    """Iterates over a file-like object in blocks (PEP 3333, "Optional Platform-Specific
    File Handling").

    If it is a file that the host can find, `wsgi.Response` has the host send
    it. It has a `close` only if the file-like object has one: the server calls
    it at the end of the request.
    """

    def __init__(self, filelike: Readable, block_size: int = 8192) -> None:
        self.filelike = filelike
        # The size is "a suggestion", and a call costs more than a long block.
        self.block_size = max(block_size, _FILE_BLOCK)
        # The number of bytes after which the iteration ends.
        self.room: int | None = None
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self) -> FileWrapper:
        return self

    def __next__(self) -> bytes:
        size = self.block_size
        if self.room is not None:
            size = min(size, self.room)
        if size > 0 and (block := self.filelike.read(size)):
            if self.room is not None:
                self.room -= len(block)
            return block
        raise StopIteration

    # What Werkzeug asks of a file wrapper to answer a range without reading
    # all that is before it.

    def seekable(self) -> bool:
        """Tells whether `seek` and `tell` work."""
        filelike: Any = self.filelike
        if hasattr(filelike, "seekable"):
            return bool(filelike.seekable())
        return hasattr(filelike, "seek")

    def seek(self, *args: int) -> None:
        """Moves the position of the file-like object."""
        filelike: Any = self.filelike
        filelike.seek(*args)

    def tell(self) -> int:
        """Returns the position of the file-like object."""
        filelike: Any = self.filelike
        return int(filelike.tell())

    def size(self) -> int | None:
        """Returns the number of bytes from the position to the end, if this is a real file."""
        raw = self._raw()
        if raw is None:
            return None
        try:
            found = os.fstat(raw.fileno())
            return max(found.st_size - self.tell(), 0) if stat.S_ISREG(found.st_mode) else None
        except (OSError, ValueError):
            return None

    def locate(self) -> tuple[str, int] | None:
        """Returns the absolute path of the file, and the position in it, for the host.

        None if it is no real file, or another one has its name by now.
        """
        raw = self._raw()
        if raw is None or not isinstance(raw.name, str):
            return None
        try:
            path = os.path.join(os.getcwd(), raw.name)
            if os.path.samestat(os.fstat(raw.fileno()), os.stat(path)):
                return path, self.tell()
        except (OSError, ValueError):
            pass
        return None

    def _raw(self) -> io.FileIO | None:
        """Returns the file whose bytes `read` of the file-like object returns as they are.

        Having a `fileno` is not enough: what a `GzipFile` reads is not what is
        in its file. So this asks whose method `read` is, which sees through
        the proxies of `tempfile` and Django.
        """
        read: Any = self.filelike.read
        owner = getattr(getattr(read, "__wrapped__", read), "__self__", None)
        if type(owner) is io.BufferedRandom:
            try:
                owner.flush()
            except (OSError, ValueError):
                return None
            owner = owner.raw
        elif type(owner) is io.BufferedReader:
            owner = owner.raw
        return owner if type(owner) is io.FileIO else None
