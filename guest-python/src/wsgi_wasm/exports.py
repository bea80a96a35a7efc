"""The world's exports, and its imports as the other modules use them: glue, and nothing else.

An exception that leaves a method of an exported class is a trap, so none does.
"""

from __future__ import annotations

import sys

from componentize_py_types import Err, Ok
from wit_world.imports import deadline, key_derivation, request_body, response

from wsgi_wasm import command, snapshot, wsgi
from wsgi_wasm.streams import BodyAborted, BodyTooLarge

# Bytes for which there is no room where an allocation has just failed.
_MUCH = 64 * 1024


class Host:
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
        _need_room(len(head))
        try:
            response.start(head)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def write(chunk: bytes) -> None:
        _need_room(len(chunk))
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
        _need_room(len(whole))
        try:
            response.send_whole(whole)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def send_file(head: bytes, path: str, offset: int, length: int) -> bool:
        _need_room(len(head))
        try:
            sent: bool = response.send_file(head, path, offset, length)
            return sent
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def early_hints(fields: bytes) -> None:
        _need_room(len(fields))
        try:
            response.early_hints(fields)
        except Err as error:
            raise _write_error(error) from None

    @staticmethod
    def log(text: str) -> None:
        sys.stderr.write(text)


class Derivation:
    """The host's functions for `kdf`."""

    @staticmethod
    def pbkdf2_hmac(
        digest: str, password: bytes, salt: bytes, iterations: int, length: int
    ) -> bytes:
        _need_room(len(password) + len(salt))
        try:
            derived: bytes = key_derivation.pbkdf2_hmac(
                key_derivation.Digest[digest.upper()], password, salt, iterations, length
            )
            return derived
        except Err as error:
            raise ValueError(error.value.value) from None

    @staticmethod
    def scrypt(password: bytes, salt: bytes, n: int, r: int, p: int, length: int) -> bytes:
        _need_room(len(password) + len(salt))
        try:
            derived: bytes = key_derivation.scrypt(password, salt, n, r, p, length)
            return derived
        except Err as error:
            raise ValueError(error.value.value) from None


def _need_room(size: int) -> None:
    """Raises `MemoryError` if there is no memory for a copy of `size` bytes.

    The bindings make one of all that crosses the border. Without memory for it they trap,
    which costs the instance.
    """
    if size > _MUCH:
        bytes(size)


def _write_error(error: Err) -> OSError | RuntimeError:
    if error.value is response.WriteError.CLIENT_GONE:
        return wsgi.ClientGone("the client left before it had the whole response")
    return wsgi.Refused("the host refused the response; its log tells why")


class Handler:
    """The exported interface `handler`."""

    def handle(self, environ: bytes, body: bytes) -> bytes:
        """Answers one request."""
        try:
            if snapshot.stale:
                snapshot.renew()
            answer = wsgi.run(application, environ, body, host)
            _need_room(len(answer))
            return answer
        except BaseException as error:
            # Out of memory before the application was called, say.
            _report(error)
            return b""


class Command:
    """The exported interface `command`."""

    def run(self, arguments: list[str]) -> int:
        """Runs a command line that starts with `python`."""
        try:
            if snapshot.stale:
                snapshot.renew()
            return command.run(arguments)
        except BaseException as error:
            _report(error)
            return 1


def _report(error: BaseException) -> None:
    try:
        sys.stderr.write(f"wsgi-wasm: {type(error).__name__}: {error}\n")
    except BaseException:
        return


def rehearse(with_application: wsgi.Application, with_host: wsgi.Host, environ: bytes) -> None:
    """Answers a request as the first one of an instance; see `build`."""
    global application, host
    real, (application, host) = host, (with_application, with_host)
    with snapshot.rehearsal():
        Handler().handle(environ, b"")
    host = real


def time_left() -> int:
    """Microseconds until the host wants the guest to stop by itself; see `interrupt`."""
    # The collector may run before the first call, when there is no host to ask.
    left: int = sys.maxsize if snapshot.stale else deadline.time_left()
    return left


# What requests use: `entry` sets the application.
host: wsgi.Host = Host()
application: wsgi.Application

# What they use as well, and no build can: the host is not there.
AT_RUN_TIME = (
    Host.read, Host.start, Host.write, Host.finish, Host.send_whole, deadline.time_left,
    request_body.read, response.start, response.write, response.finish, response.send_whole,
    Ok,
)  # fmt: skip
