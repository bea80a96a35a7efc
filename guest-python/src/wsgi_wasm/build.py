"""Everything that happens in the guest at build time.

The host says what to do in `build.json` and reads what came of it from
`report.json`, both in the scratch directory: the pipes for the guest's output
are small.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import py_compile
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import unquote_to_bytes

from wsgi_wasm import command, image, interrupt, kdf, loading, snapshot, sqlite, wsgi
from wsgi_wasm.streams import BodyAborted

# The guest's mounts.
APPLICATION = "/0"
SITE = "/1"
SCRATCH = "/2"
LIBRARY = "/python"
# The generated bindings, and componentize-py's own modules.
_TOOLCHAIN = ("/world", "/bundled")

# Of the standard library: no use in a sandbox without a terminal, a display
# and a package installer.
_UNUSED = frozenset({
    "__phello__", "__pycache__", "ensurepip", "idlelib", "idle_test", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "tkinter", "turtledemo", "turtle.py",
})  # fmt: skip

# Imported late by the standard library or by frameworks, in the first request
# that has a host name, a form, a date or an error. Where the files are not at
# hand (or slow to reach), such an import is a failed first request.
_LATE_IMPORTS = (
    "encodings.ascii", "encodings.idna", "encodings.latin_1", "encodings.utf_8_sig",
    "stringprep", "unicodedata", "base64", "binascii", "datetime", "_strptime", "email.message",
    "email.parser", "html", "http.cookies", "json", "mimetypes", "tempfile", "traceback",
    "urllib.parse", "uuid", "zlib",
)  # fmt: skip

# CPython specialises bytecode after a few runs, so one request is not enough.
_WARMUP_ROUNDS = 3
# It counts them where the code is, so code that is not specialised in the
# snapshot is written to in every instance. More of them where nobody else's
# code runs.
_REHEARSALS = 20


Rehearse = Callable[[wsgi.Application, wsgi.Host, bytes], None]
"""Answers a request, with this environ block, as the first one of an instance."""


class BuildFailed(Exception):
    """Ends the build after its report is written."""


def main(
    derivation: kdf.Derivation, rehearse: Rehearse, scratch: str = SCRATCH
) -> wsgi.Application:
    """Does the task in `build.json`; returns the application, if that was the task.

    Whatever happens, `report.json` tells it. Raises `BuildFailed`.
    """
    report: dict[str, Any] = {"python": sys.version.partition(" ")[0]}
    stages = _Stages()
    application: wsgi.Application = _no_application
    try:
        with open(os.path.join(scratch, "build.json"), encoding="utf-8") as file:
            task = json.load(file)
        match task["task"]:
            case "application":
                application = _build_application(task, derivation, rehearse, stages, report)
            case "compile":
                with stages.stage("compile"):
                    for root in task["compile"]:
                        compile_tree(root, root)
            case "stdlib":
                with stages.stage("stdlib"):
                    copy_library(LIBRARY, task["output"])
            case other:
                raise ValueError(f"unknown task {other!r}")
    except BaseException as error:
        _write_report(scratch, {"ok": False, **report, **_failure(error, stages.current)})
        # The whole story is in the report.
        raise BuildFailed(str(error)) from None
    _write_report(scratch, {"ok": True, **report, "seconds": stages.seconds})
    return application


def settle(application: wsgi.Application, more: Iterable[Any]) -> None:
    """Arranges the memory for the snapshot, which is made when this returns.

    Requests use the functions and classes in `more`, which were not used here.
    """
    if application is _no_application:
        return
    snapshot.seed_late()
    image.settle(SCRATCH, more)


def compile_tree(root: str, origin: str) -> None:
    """Compiles all modules under `root` in place, as if they lay under `origin`.

    The result is "unchecked hash" bytecode (PEP 552): an import need not look
    at the source, and a copy with other file times stays valid. A file that is
    not valid Python is left alone, for it may be a template.
    """
    for directory, directories, files in os.walk(root):
        # In a fixed order, so that two builds give the same bytes.
        directories[:] = sorted(name for name in directories if name != "__pycache__")
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = os.path.join(directory, name)
            try:
                py_compile.compile(
                    path,
                    cfile=importlib.util.cache_from_source(path),
                    dfile=os.path.join(origin, os.path.relpath(path, root)),
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
            except (py_compile.PyCompileError, ValueError, RecursionError):
                # ValueError: a NUL in the source, for one.
                continue


def copy_library(library: str, output: str) -> None:
    """Copies the useful part of the standard library to `output`, and compiles it there."""

    def unused(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name in _UNUSED or name.startswith("config-")]

    # copyfile: times and modes of the files are no part of the library.
    shutil.copytree(
        library, output, ignore=unused, copy_function=shutil.copyfile, dirs_exist_ok=True
    )
    compile_tree(output, library)


def _build_application(
    task: dict[str, Any],
    derivation: kdf.Derivation,
    rehearse: Rehearse,
    stages: _Stages,
    report: dict[str, Any],
) -> wsgi.Application:
    with stages.stage("compile"):
        if task.get("bytecode"):
            _copy_bytecode(task["bytecode"], LIBRARY)
        for root in task.get("compile", ()):
            compile_tree(root, root)
    with stages.stage("prepare"):
        sys.path[:] = _search_path(sys.path)
        os.chdir(APPLICATION)
        os.environ.update(task.get("environment") or {})
        snapshot.prepare()
        kdf.install(derivation)
        interrupt.install()
        sqlite.install()
        command.install()
    with stages.stage("import"):
        application: wsgi.Application
        application, report["application"] = loading.load(task["application"])
        for name in _LATE_IMPORTS:
            importlib.import_module(name)
    warnings: list[str] = []
    with stages.stage("warmup"):
        with image.watching():
            _rehearse(rehearse, 1)
        report["warmup"] = warm_up(application, task.get("warmup") or (), warnings)
    with stages.stage("freeze"):
        kdf.building = False
        report["warnings"] = warnings
        warnings += snapshot.freeze()
        _rehearse(rehearse, _REHEARSALS)
        wsgi.forget_shapes()
    return application


def warm_up(
    application: wsgi.Application, paths: list[str] | tuple[str, ...], warnings: list[str]
) -> list[dict[str, Any]]:
    """Sends GET requests to the application, so that what it does only once is in the snapshot.

    A request that fails is a warning: it may need what exists only at run time.
    """
    visits = [_Visit(application, path) for path in paths]
    for number in range(_WARMUP_ROUNDS):
        # Not the first one, which does what is done only once. All of them at a time: to
        # watch makes code that ran before older than the interpreter's events.
        with image.watching() if number == 1 else nullcontext():
            for visit in visits:
                visit.again()
    results = []
    for visit in visits:
        path, status = visit.path, visit.status
        results.append({"path": path, "status": status, "seconds": round(visit.seconds, 6)})
        if status is None or status >= 400:
            what = "failed" if status is None else f"was answered with status {status}"
            warnings.append(f"the warm-up request `{path}` {what}\n{visit.errors.text}".rstrip())
    return results


class _Visit:
    """A warm-up request, and what came of it the last time."""

    def __init__(self, application: wsgi.Application, path: str) -> None:
        self.path = path
        self.status: int | None = 0
        self.seconds = 0.0
        self.errors = _Tee()
        self._application = application
        self._host = _WarmupHost()

    def again(self) -> None:
        """Sends it, unless it failed: again would be no different, and as noisy."""
        if self.status is None or self.status >= 500:
            return
        with self.errors:
            begin = time.perf_counter()
            self.status = self._host.request(self._application, self.path)
            self.seconds = time.perf_counter() - begin


def _rehearse(rehearse: Rehearse, times: int) -> None:
    """Lets the adapter wake up and answer requests without the application.

    What an instance does first of all, it does once; so its code would be
    specialised by no number of warm-up requests.
    """

    def whole(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        return [b"ok"]

    def pieces(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"ok"

    for application in (whole, pieces):
        for number in range(times):
            # componentize-py does that in every instance.
            snapshot.seed_module()
            # Each with other headers, as other clients send.
            rehearse(application, _WarmupHost(), _environ_block("/", f"HTTP_X_{number}"))


class _WarmupHost:
    """The host for warm-up requests: nobody is there."""

    def request(self, application: wsgi.Application, path: str) -> int | None:
        """Returns the status of the answer to a GET, or None if the application failed."""
        self._head = b""
        self._finished = False
        answer = wsgi.run(application, _environ_block(path), b"", self)
        head = answer or (self._head if self._finished else b"")
        return int(head[len(b"Status: ") :][:3]) if head else None

    def read(self, limit: int) -> bytes:
        raise BodyAborted("a warm-up request has no body")

    def start(self, head: bytes) -> None:
        self._head = head

    def write(self, chunk: bytes) -> None:
        pass

    def finish(self) -> None:
        self._finished = True

    def send_whole(self, response: bytes) -> None:
        self._head = response
        self._finished = True

    def send_file(self, head: bytes, path: str, offset: int, length: int) -> bool:
        return False

    def early_hints(self, fields: bytes) -> None:
        pass

    def log(self, text: str) -> None:
        sys.stderr.write(text)


class _Tee:
    """Stands for `sys.stderr` in a `with` block, and keeps what is written.

    It passes everything on, for a logging handler that is made meanwhile
    holds it for ever.
    """

    def __init__(self) -> None:
        self.text = ""
        self._open = False
        self._stream = sys.stderr

    def __enter__(self) -> _Tee:
        self._open = True
        sys.stderr = self
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        sys.stderr = self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._open:
            self.text += text
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class _Stages:
    """How long each stage took, and which one is under way."""

    def __init__(self) -> None:
        self.current = "configuration"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block as the stage `name`."""
        self.current = name
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)


def _environ_block(target: str, *more: str) -> bytes:
    """Returns what the host would send for a browser's GET of `target` with `more` headers."""
    path, _, query = target.partition("?")
    environ = {
        b"REQUEST_METHOD": b"GET",
        b"SCRIPT_NAME": b"",
        b"PATH_INFO": unquote_to_bytes(path),
        b"QUERY_STRING": query.encode(),
        b"SERVER_NAME": b"localhost",
        b"SERVER_PORT": b"80",
        b"SERVER_PROTOCOL": b"HTTP/1.1",
        b"REMOTE_ADDR": b"127.0.0.1",
        b"wsgi.url_scheme": b"http",
        b"HTTP_HOST": b"localhost",
        b"HTTP_USER_AGENT": b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101",
        b"HTTP_ACCEPT": b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        b"HTTP_ACCEPT_LANGUAGE": b"en-US,en;q=0.5",
        b"HTTP_ACCEPT_ENCODING": b"gzip, deflate, br",
        b"HTTP_CONNECTION": b"keep-alive",
        b"HTTP_UPGRADE_INSECURE_REQUESTS": b"1",
        **{name.encode(): b"1" for name in more},
    }
    return b"\0".join([*environ, b"", *environ.values()])


def _search_path(path: list[str]) -> list[str]:
    """Returns `sys.path` for the application.

    Its own directory comes first, as under other servers; what it installed
    comes after the standard library, as in a virtual environment.
    """
    # Whatever else is there, componentize-py found on the build machine: it
    # mounts the `site-packages` of its own Python, which is none of ours.
    rest = [entry for entry in path if entry.startswith(f"{LIBRARY}/")]
    return [APPLICATION, LIBRARY, *rest, SITE, *_TOOLCHAIN]


def _copy_bytecode(source: str, library: str) -> None:
    """Puts the bytecode from an earlier `stdlib` task beside the modules.

    Compiling leaves its litter in the heap, and so in the snapshot.
    """
    for directory, _, files in os.walk(source):
        if os.path.basename(directory) != "__pycache__":
            continue
        target = os.path.join(library, os.path.relpath(directory, source))
        # Only beside modules that this library has.
        if not os.path.isdir(os.path.dirname(target)):
            continue
        os.makedirs(target, exist_ok=True)
        for name in files:
            if name.endswith(".pyc"):
                shutil.copyfile(os.path.join(directory, name), os.path.join(target, name))


def _failure(error: BaseException, stage: str) -> dict[str, Any]:
    """Returns the part of the report about what ended the build."""
    if isinstance(error, loading.LoadError):
        cause = error.__cause__
        return {
            "stage": error.stage,
            "message": str(error),
            "traceback": _traceback(cause) if cause else None,
            "hint": error.hint,
        }
    return {
        "stage": stage,
        "message": f"{type(error).__name__}: {error}",
        "traceback": _traceback(error, keep_own=True),
        "hint": loading.hint(error),
    }


def _traceback(error: BaseException, keep_own: bool = False) -> str:
    """Returns the traceback without the frames of import machinery and of this package."""
    own = os.path.dirname(_no_application.__code__.co_filename)
    seen = set()
    exception: traceback.TracebackException | None
    pending = [traceback.TracebackException.from_exception(error)]
    for exception in pending:
        seen.add(id(exception))
        exception.stack[:] = [
            frame for frame in exception.stack
            if keep_own or not (
                frame.filename.startswith("<frozen importlib")
                or frame.filename.endswith(("importlib/__init__.py", "importlib\\__init__.py"))
                or os.path.dirname(frame.filename) == own
            )
        ]  # fmt: skip
        for linked in (exception.__cause__, exception.__context__):
            if linked is not None and id(linked) not in seen:
                pending.append(linked)
    return "".join(pending[0].format())


def _write_report(scratch: str, report: dict[str, Any]) -> None:
    path = os.path.join(scratch, "report.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(report, file)
    os.replace(f"{path}.new", path)


def _no_application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Stands for the application in a component that was only made for its task."""
    raise RuntimeError("this component has no application")
