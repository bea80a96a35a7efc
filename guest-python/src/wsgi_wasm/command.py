"""One-off commands: what `python ...` would do, in the interpreter of the app's snapshot.

The application is imported already and the environment is that of run time,
so a migration sees what a request sees.
"""

from __future__ import annotations

import atexit
import operator
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TextIO

_exit = os._exit
# Whether a command is under way, and the status that it gave to `os._exit`.
_running = False
_left: int | None = None

USAGE = """\
usage: python [-u] [-B] (-m MODULE | -c CODE | FILE | -) [ARGUMENT ...]
       python -V
"""


class _Left(BaseException):
    """Ends a command that called `os._exit`."""


def install() -> None:
    """Lets `os._exit` end a command with its status.

    Of a true exit the host hears only whether the status was 0.
    """

    def leave(status: int) -> NoReturn:
        global _left
        if not _running:
            _exit(status)
        # A process has eight bits for it.
        _left = operator.index(status) & 0xFF
        raise _Left

    os._exit = leave


def run(arguments: list[str]) -> int:
    """Runs a command line that starts with `python`, returns its exit status.

    The rules are those of CPython's "Command line and environment" for
    `sys.argv`, `sys.path[0]` and the exit status. Raises nothing.
    """
    global _running, _left
    _running, _left = True, None
    try:
        program = os.path.basename(arguments[0]) if arguments else ""
        if program not in ("python", "python3", f"python3.{sys.version_info[1]}"):
            print(
                f"only `python` can be run here, not {program!r}; "
                "write `python FILE` or `python -m MODULE`",
                file=sys.stderr,
            )
            status = 127  # The shell's for a command that it does not find.
        else:
            status = _python(arguments[1:])
    except BaseException as error:
        status = _failed(error)
    _running = False
    # Also if the code caught what ends it.
    return _flush(status) if _left is None else _left


def _python(arguments: list[str]) -> int:
    # Always in effect here: nothing is buffered, and no bytecode is written.
    while arguments and arguments[0] in ("-u", "-B"):
        arguments = arguments[1:]
    option = arguments[0] if arguments else "-"
    if option in ("-V", "--version"):
        print("Python " + sys.version.partition(" ")[0])
        return 0
    if option in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if option[:2] in ("-m", "-c"):
        # Also in one word, as in `-mpdb`.
        rest = [option[2:], *arguments[1:]] if option[2:] else arguments[1:]
        if not rest:
            return _usage(f"argument expected for the {option} option")
        operand, *tail = rest
        if option[:2] == "-m":
            return _run(lambda: _module(operand), ["-m", *tail], os.getcwd())
        return _run(lambda: _source(operand, "<string>"), ["-c", *tail], "")
    if option == "-":
        return _run(lambda: _source(sys.stdin.read(), "<stdin>"), arguments or [""], "")
    if option.startswith("-"):
        return _usage(f"unknown option {option}")
    try:
        # CPython opens the script before anything else, and answers like this.
        if not os.path.isdir(option):
            with open(option, "rb"):
                pass
    except OSError as error:
        print(
            f"python: can't open file {os.path.abspath(option)!r}: "
            f"[Errno {error.errno}] {error.strerror}",
            file=sys.stderr,
        )
        return 2
    directory = os.path.dirname(os.path.realpath(option))
    return _run(lambda: _file(option), list(arguments), directory)


def _run(body: Callable[[], object], argv: list[str], directory: str) -> int:
    """Runs `body` with its arguments and its place for imports."""
    path, old_argv = list(sys.path), sys.argv
    sys.path.insert(0, directory)
    sys.argv = argv
    try:
        body()
        return 0
    except BaseException as error:
        return _failed(error)
    finally:
        # `logging.shutdown` and what else was registered: the interpreter
        # itself never ends in the sandbox.
        if _left is None:
            _run_exit_functions()
        sys.path[:] = path
        sys.argv = old_argv


def _module(name: str) -> None:
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except ImportError as error:
        # From the search, not from the module's own code.
        if _innermost(error.__traceback__) != runpy.run_module.__code__.co_filename:
            raise
        print(f"python: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _file(path: str) -> None:
    # run_path adds a directory or a zip file to sys.path by itself.
    if os.path.isdir(path):
        del sys.path[0]
    runpy.run_path(path, run_name="__main__")


def _source(code: str, name: str) -> None:
    # In the namespace of the real `__main__`, for `import __main__` and pickle.
    namespace = sys.modules["__main__"].__dict__
    exec(compile(code, name, "exec", dont_inherit=True), namespace)


def _failed(error: BaseException) -> int:
    """Returns the exit status for an exception, having printed what CPython prints."""
    try:
        if isinstance(error, _Left):
            return 0
        if isinstance(error, SystemExit):
            if error.code is None:
                return 0
            if isinstance(error.code, int):
                # A process has eight bits for it.
                return error.code & 0xFF
            print(error.code, file=sys.stderr)
            return 1
        trace = error.__traceback__
        while trace is not None and _is_ours(trace):
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace)
        sys.stderr.write("".join(lines))
        # 128 + SIGINT, as a shell shows it.
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    except BaseException:
        # No memory, or no stderr.
        return 1


def _flush(status: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        try:
            _flush_stream(stream)
        except BaseException:
            # CPython's status for output that could not be written.
            status = status or 120
    return status


def _flush_stream(stream: TextIO | None) -> None:
    if stream is not None and not stream.closed:
        stream.flush()


def _run_exit_functions() -> None:
    try:
        atexit._run_exitfuncs()
    except BaseException as error:
        _failed(error)


def _usage(message: str) -> int:
    print(f"{message}\n{USAGE}", end="", file=sys.stderr)
    return 2


def _innermost(trace: TracebackType | None) -> str:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename if trace is not None else ""


def _is_ours(trace: TracebackType) -> bool:
    file = trace.tb_frame.f_code.co_filename
    return file in (run.__code__.co_filename, runpy.run_module.__code__.co_filename)
