"""`entry` and `exports`, with stand-ins for the modules that componentize-py generates."""

import enum
import gc
import importlib
import sys
import types
import unittest
from unittest import mock

import wsgi_wasm
from tests.support import block
from wsgi_wasm import build, interrupt, kdf, snapshot, wsgi
from wsgi_wasm.streams import BodyAborted, BodyTooLarge


class Err(Exception):
    def __init__(self, value):
        self.value = value


class Ok:
    def __init__(self, value):
        self.value = value


class ReadError(enum.Enum):
    CLIENT_GONE = 0
    TOO_LARGE = 1
    UNAVAILABLE = 2


class WriteError(enum.Enum):
    CLIENT_GONE = 0
    REFUSED = 1


class Digest(enum.Enum):
    SHA256 = 3
    SHA3_512 = 9


def failing(error):
    def function(*arguments):
        raise Err(error)

    return function


class Entry(unittest.TestCase):
    def setUp(self):
        self.application = lambda environ, start_response: None
        self.calls = []
        types_module = types.ModuleType("componentize_py_types")
        types_module.Err = Err
        types_module.Ok = Ok
        imports = types.ModuleType("wit_world.imports")
        imports.request_body = types.SimpleNamespace(ReadError=ReadError, read=lambda limit: b"")
        imports.response = types.SimpleNamespace(
            WriteError=WriteError,
            start=lambda head: self.calls.append(head),
            write=lambda chunk: self.calls.append(chunk),
            finish=lambda: self.calls.append("finish"),
            send_whole=lambda whole: self.calls.append(whole),
        )
        imports.key_derivation = types.SimpleNamespace(
            Digest=Digest,
            pbkdf2_hmac=lambda *arguments: arguments,
            scrypt=lambda *arguments: arguments,
        )
        imports.deadline = types.SimpleNamespace(time_left=lambda: 2**64 - 1)
        self.imports = imports
        world = types.ModuleType("wit_world")
        modules = {
            "componentize_py_types": types_module,
            "wit_world": world,
            "wit_world.imports": imports,
        }
        for patch in (
            mock.patch.dict(sys.modules, modules),
            mock.patch.object(sys, "argv", [""]),
            mock.patch.object(gc, "callbacks", []),
            mock.patch.object(interrupt, "_time_left", None),
            mock.patch.object(build, "main", lambda *_: lambda *call: self.application(*call)),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        for name in ("entry", "exports"):
            sys.modules.pop(f"wsgi_wasm.{name}", None)
            vars(wsgi_wasm).pop(name, None)
        self.entry = importlib.import_module("wsgi_wasm.entry")
        self.exports = self.entry.exports

    def test_handle(self):
        def application(environ, start_response):
            start_response("200 OK", [])
            return [environ["PATH_INFO"].encode()]

        self.application = application
        answer = self.entry.Handler().handle(block(PATH_INFO="/x"), b"")
        self.assertEqual(answer, b"Status: 200 OK\r\nContent-Length: 2\r\n\r\n/x")

    def test_stream(self):
        def application(environ, start_response):
            start_response("200 OK", [])
            yield b"a"

        self.application = application
        self.assertEqual(self.entry.Handler().handle(block(), b""), b"")
        self.assertEqual(self.calls, [b"Status: 200 OK\r\n\r\n", b"a", "finish"])

    def test_the_first_call_renews(self):
        for call in (
            lambda: self.entry.Handler().handle(block(), b""),
            lambda: self.entry.Command().run(["python", "-c", ""]),
        ):
            with (
                mock.patch.object(snapshot, "stale", True),
                mock.patch.object(snapshot, "renew") as renew,
                mock.patch("sys.stderr"),
                mock.patch("atexit._run_exitfuncs"),
            ):
                call()
                renew.assert_called_once()

    def test_the_memory_is_settled_when_the_arguments_go(self):
        with (
            mock.patch.object(snapshot, "stale", True),
            mock.patch.object(build, "settle") as settle,
        ):
            del sys.argv[0]
            settle.assert_called_once()
            self.assertEqual(interrupt._time_left(), sys.maxsize)
        self.assertEqual(interrupt._time_left(), 2**64 - 1)
        self.assertEqual(sys.argv, [""])

    def test_nothing_escapes(self):
        for error in (SystemExit, KeyboardInterrupt, MemoryError, RecursionError):
            with (
                mock.patch("sys.stderr") as stderr,
                mock.patch.object(wsgi, "run", side_effect=error),
                mock.patch.object(self.exports.command, "run", side_effect=error),
            ):
                self.assertEqual(self.entry.Handler().handle(b"", b""), b"")
                self.assertEqual(self.entry.Command().run([]), 1)
                stderr.write.side_effect = error
                self.assertEqual(self.entry.Handler().handle(b"", b""), b"")

    def test_errors_of_the_host(self):
        host = self.exports.host
        for error, expected in ((WriteError.CLIENT_GONE, wsgi.ClientGone),
                                (WriteError.REFUSED, wsgi.Refused)):  # fmt: skip
            for name, arguments in (("start", (b"",)), ("write", (b"",)), ("finish", ())):
                with mock.patch.object(self.imports.response, name, failing(error)):
                    self.assertRaises(expected, getattr(host, name), *arguments)
        for error, expected in ((ReadError.CLIENT_GONE, BodyAborted),
                                (ReadError.UNAVAILABLE, BodyAborted),
                                (ReadError.TOO_LARGE, BodyTooLarge)):  # fmt: skip
            with mock.patch.object(self.imports.request_body, "read", failing(error)):
                self.assertRaises(expected, host.read, 1)

    def test_what_has_no_room_for_its_copy_does_not_reach_the_host(self):
        much, derivation = bytes(100_000), self.exports.Derivation()
        calls = (
            lambda: self.exports.host.start(much),
            lambda: self.exports.host.write(much),
            lambda: self.exports.host.send_whole(much),
            lambda: self.exports.host.send_file(much, "/f", 0, 1),
            lambda: self.exports.host.early_hints(much),
            lambda: derivation.pbkdf2_hmac("sha256", much, b"s", 1, 1),
            lambda: derivation.pbkdf2_hmac("sha256", b"p", much, 1, 1),
            lambda: derivation.scrypt(much, b"s", 2, 1, 1, 1),
            lambda: derivation.scrypt(b"p", much, 2, 1, 1, 1),
        )
        with mock.patch.object(self.exports, "bytes", side_effect=MemoryError, create=True):
            for call in calls:
                self.assertRaises(MemoryError, call)
        self.assertEqual(self.calls, [])

    def test_key_derivation(self):
        derivation = self.exports.Derivation()
        self.assertEqual(derivation.pbkdf2_hmac("sha3_512", b"p", b"s", 1, 2)[0], Digest.SHA3_512)
        self.assertEqual(derivation.scrypt(b"p", b"s", 2, 1, 1, 5), (b"p", b"s", 2, 1, 1, 5))
        error = failing(types.SimpleNamespace(value="too much"))
        for name in ("pbkdf2_hmac", "scrypt"):
            arguments = {
                "pbkdf2_hmac": ("sha256", b"", b"", 1, 1),
                "scrypt": (b"", b"", 2, 1, 1, 1),
            }
            with (
                mock.patch.object(self.imports.key_derivation, name, error),
                self.assertRaisesRegex(ValueError, "too much"),
            ):
                getattr(derivation, name)(*arguments[name])

    def test_all_digests_are_in_the_contract(self):
        wit = (build.__file__.rpartition("/guest-python/")[0]) + "/wit/gateway.wit"
        with open(wit, encoding="utf-8") as file:
            line = next(line for line in file if "enum digest" in line)
        names = line[line.index("{") + 1 : line.index("}")].replace("-", "_").split(",")
        self.assertEqual({name.strip() for name in names}, kdf.DIGESTS)


if __name__ == "__main__":
    unittest.main()
