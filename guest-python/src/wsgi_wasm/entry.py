"""The module that componentize-py makes a component of: glue, and nothing else.

Importing it is the build. The classes are the world's exports. An exception
that leaves one of their methods is a trap, so none does.
"""

from __future__ import annotations

import sys

from componentize_py_types import Err
from wit_world.imports import deadline, key_derivation, request_body, response

from wsgi_wasm import build, command, interrupt, snapshot, wsgi
from wsgi_wasm.streams import BodyAborted, BodyTooLarge


class _Host:
    """The host's functions for `wsgi.run`, with exceptions for the contract's errors."""

    @staticmethod
    def read(limit: int) -> bytes:
        try:
            data: bytes = request_body.read(limit)
            return data
        except Err as error:
            match error.value:
                case request_body.ReadError.TOO_LARGE:
                    raise BodyTooLarge("the request body is larger than the host allows") from None
                case request_body.ReadError.CLIENT_GONE:
                    raise BodyAborted(
                        "the client left before its whole request body arrived"
                    ) from None
                case _:
                    raise BodyAborted("no request body can be read (any more)") from None

    @staticmethod
    def start(head: bytes) -> None:
        try:
            response.start(head)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def write(chunk: bytes) -> None:
        try:
            response.write(chunk)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def finish() -> None:
        try:
            response.finish()
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def send_whole(whole: bytes) -> None:
        try:
            response.send_whole(whole)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def send_file(head: bytes, path: str, offset: int, length: int) -> bool:
        try:
            sent: bool = response.send_file(head, path, offset, length)
            return sent
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def early_hints(fields: bytes) -> None:
        try:
            response.early_hints(fields)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def log(text: str) -> None:
        sys.stderr.write(text)


class _Derivation:
    """The host's functions for `kdf`."""

    @staticmethod
    def pbkdf2_hmac(
        digest: str, password: bytes, salt: bytes, iterations: int, length: int
    ) -> bytes:
        try:
            derived: bytes = key_derivation.pbkdf2_hmac(
                key_derivation.Digest[digest.upper()], password, salt, iterations, length
            )
            return derived
        except Err as error:
            raise ValueError(error.value.value) from None

    @staticmethod
    def scrypt(password: bytes, salt: bytes, n: int, r: int, p: int, length: int) -> bytes:
        try:
            derived: bytes = key_derivation.scrypt(password, salt, n, r, p, length)
            return derived
        except Err as error:
            raise ValueError(error.value.value) from None


def _write_error(error: Err) -> OSError | RuntimeError:
    if error.value is response.WriteError.CLIENT_GONE:
        return wsgi.ClientGone("the client left before it had the whole response")
    return wsgi.Refused("the host refused the response; its log tells why")


class Handler:
    """The exported interface `handler`."""

    def __init__(self) -> None:
        _made("Handler")

    def handle(self, environ: bytes, body: bytes) -> bytes:
        """Answers one request."""
        try:
            if snapshot.stale:
                _wake()
            return wsgi.run(_application, environ, body, _host)
        except BaseException as error:
            # Out of memory before the application was called, say.
            _report(error)
            return b""


class Command:
    """The exported interface `command`."""

    def __init__(self) -> None:
        _made("Command")

    def run(self, arguments: list[str]) -> int:
        """Runs a command line that starts with `python`."""
        try:
            if snapshot.stale:
                _wake()
            return command.run(arguments)
        except BaseException as error:
            _report(error)
            return 1


# The exported objects that are not there yet.
_unmade = {"Handler", "Command"}


def _made(name: str) -> None:
    """Ends the build with the last of the exported objects.

    componentize-py makes one of each after the import of this module, right before the
    snapshot. What the import itself has held is free by then.
    """
    if name in _unmade:
        _unmade.discard(name)
        if not _unmade:
            build.settle(_application)


def _wake() -> None:
    snapshot.renew()
    interrupt.arm(deadline.time_left)


def _rehearse(application: wsgi.Application, host: wsgi.Host, environ: bytes) -> None:
    """Answers a request as the first one of an instance; see `build`."""
    global _application, _host
    real, (_application, _host) = _host, (application, host)
    with snapshot.rehearsal():
        Handler().handle(environ, b"")
    interrupt.disarm()
    _host = real


def _report(error: BaseException) -> None:
    try:
        sys.stderr.write(f"wsgi-wasm: {type(error).__name__}: {error}\n")
    except BaseException:
        return


_host: wsgi.Host = _Host()
_application: wsgi.Application
_application = build.main(_Derivation(), _rehearse)
