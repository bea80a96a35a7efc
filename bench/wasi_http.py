"""WSGI on wasi:http, for the comparison with `wasmtime serve`.

What a user of componentize-py would write: the imports and the first requests
are done at build time, and a small response costs few calls into the host.
"""

import io
import sys
from urllib.parse import unquote_to_bytes

from componentize_py_types import Err, Ok
from wit_world.imports import streams, types

METHODS = {
    types.Method_Get: "GET", types.Method_Head: "HEAD", types.Method_Post: "POST", types.Method_Put: "PUT",
    types.Method_Delete: "DELETE", types.Method_Options: "OPTIONS", types.Method_Patch: "PATCH",
}  # fmt: skip


class Body(io.RawIOBase):
    """A request's body."""

    def __init__(self, request):
        self.body = request.consume()
        self.stream = self.body.stream()

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            piece = self.stream.blocking_read(len(buffer))
        except Err as error:
            if isinstance(error.value, streams.StreamError_Closed):
                return 0
            raise OSError("the request body broke off") from None
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self):
        if not self.closed:
            # A stream has to go before the body that it belongs to.
            self.stream.__exit__(None, None, None)
            self.body.__exit__(None, None, None)
        super().close()


class Input:
    """`wsgi.input`, opened when it is needed: most requests have no body."""

    def __init__(self, request):
        self.request = request
        self.file = None

    def open(self):
        if self.file is None:
            self.file = io.BufferedReader(Body(self.request), 65536)
        return self.file

    def read(self, size=-1):
        return self.open().read(size)

    def readline(self, size=-1):
        return self.open().readline(size)

    def readlines(self, hint=-1):
        return self.open().readlines(hint)

    def __iter__(self):
        return iter(self.open())

    def close(self):
        if self.file is not None:
            self.file.close()


def environ_of(request, body):
    path, _, query = (request.path_with_query() or "/").partition("?")
    environ = {
        "REQUEST_METHOD": METHODS.get(type(request.method()), "GET"),
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1") if "%" in path else path,
        "QUERY_STRING": query,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": body,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    with request.headers() as fields:
        for name, value in fields.entries():
            key = name.upper().replace("-", "_")
            if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                key = "HTTP_" + key
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
    return environ


def send(stream, chunk):
    while chunk:
        room = stream.check_write()
        if room == 0:
            with stream.subscribe() as ready:
                ready.block()
            continue
        stream.write(chunk[:room])
        chunk = chunk[room:]


def incoming_handler(application, warmup):
    """The class to export, for an application that has answered `warmup` before."""
    for path in warmup:
        for _ in range(3):
            environ = {
                **dict.fromkeys(("SCRIPT_NAME", "QUERY_STRING"), ""),
                "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "localhost", "SERVER_PORT": "80",
                "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "localhost", "wsgi.version": (1, 0),
                "wsgi.url_scheme": "http", "wsgi.input": Input(None), "wsgi.errors": sys.stderr,
                "wsgi.multithread": False, "wsgi.multiprocess": True, "wsgi.run_once": False,
            }  # fmt: skip
            statuses = []
            body = application(environ, lambda status, headers, exc_info=None: statuses.append(status))
            b"".join(body)
            getattr(body, "close", lambda: None)()
            assert statuses[-1].startswith("200"), (path, statuses)

    class IncomingHandler:
        def handle(self, request, response_out):
            head = []

            def start_response(status, headers, exc_info=None):
                head[:] = status, headers

            body = Input(request)
            result = application(environ_of(request, body), start_response)
            chunks = iter(result)
            # An app may call `start_response` as late as with its first chunk.
            chunk = next(chunks, b"")
            status, headers = head
            fields = types.Fields.from_list(
                [(name.lower(), value.encode("latin-1")) for name, value in headers]
            )
            response = types.OutgoingResponse(fields)
            response.set_status_code(int(status[:3]))
            outgoing = response.body()
            types.ResponseOutparam.set(response_out, Ok(response))
            with outgoing.write() as stream:
                send(stream, chunk)
                for chunk in chunks:
                    send(stream, chunk)
            types.OutgoingBody.finish(outgoing, None)
            getattr(result, "close", lambda: None)()
            body.close()

    return IncomingHandler
