"""What the tests share: the package on `sys.path`, and a host that records."""

import pathlib
import sys

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "src"
if str(SOURCE) not in sys.path:
    sys.path.insert(0, str(SOURCE))

from wsgi_wasm import wsgi

REQUEST = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/",
    "QUERY_STRING": "",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "wsgi.url_scheme": "http",
}


def block(**variables):
    """Returns the environ block for a GET of `/`, with variables added or (None) taken away."""
    environ = {name: value for name, value in {**REQUEST, **variables}.items() if value is not None}
    return "\0".join([*environ, "", *environ.values()]).encode("latin-1")


class Host:
    """Records what `wsgi.run` does; `events` holds it in order."""

    def __init__(self, pulls=(), gone_after=None, sends_files=True):
        self.pulls = list(pulls)
        self.sends_files = sends_files
        self.gone_after = gone_after
        self.events = []
        self.logged = ""

    def read(self, limit):
        self.events.append(("read", limit))
        piece = self.pulls.pop(0) if self.pulls else b""
        if isinstance(piece, BaseException):
            raise piece
        assert len(piece) <= limit
        return piece

    def start(self, head):
        self._event("start", head)

    def write(self, chunk):
        assert type(chunk) is bytes and chunk
        self._event("write", chunk)

    def finish(self):
        self._event("finish", None)

    def send_whole(self, response):
        self._event("whole", response)

    def send_file(self, head, path, offset, length):
        if not self.sends_files:
            return False
        self._event("send_file", (head, path, offset, length))
        return True

    def early_hints(self, fields):
        self._event("early_hints", fields)

    def log(self, text):
        self.logged += text

    def _event(self, kind, data):
        if self.gone_after is not None and len(self.events) >= self.gone_after:
            raise wsgi.ClientGone("the client left")
        self.events.append((kind, data))

    @property
    def kinds(self):
        return [kind for kind, _ in self.events]

    @property
    def head(self):
        head = next(data for kind, data in self.events if kind in ("start", "whole"))
        return head[: head.index(b"\r\n\r\n") + 4]

    @property
    def body(self):
        pieces = []
        for kind, data in self.events:
            if kind == "whole":
                pieces.append(data[data.index(b"\r\n\r\n") + 4 :])
            elif kind == "write":
                pieces.append(data)
        return b"".join(pieces)
