"""Finds the WSGI application that the build is asked for, and explains why if there is none."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import sys
from types import ModuleType, TracebackType
from typing import Any

from wsgi_wasm.snapshot import NETWORK_DENIED

# In this order, if the user names no callable.
_NAMES = ("app", "application")
_FACTORIES = ("create_app", "make_app")

# What CPython's build for WASI leaves out, with what needs it most often.
_NOT_IN_BUILD = {
    "ssl": "TLS", "_ssl": "TLS", "_hashlib": "OpenSSL's hash functions",
    "ctypes": "calling C libraries", "_ctypes": "calling C libraries",
    "bz2": "bzip2", "_bz2": "bzip2", "lzma": "xz", "_lzma": "xz", "_zstd": "Zstandard",
    "mmap": "memory-mapped files", "fcntl": "file locks", "pwd": "the user database",
    "grp": "the group database", "resource": "resource limits", "termios": "terminals",
    "readline": "terminals", "curses": "terminals", "_curses": "terminals", "tkinter": "windows",
    "_tkinter": "windows", "syslog": "the system log", "_multiprocessing": "processes",
    "_posixshmem": "shared memory", "_posixsubprocess": "processes", "_dbm": "dbm", "_gdbm": "gdbm",
    "_interpreters": "subinterpreters", "_testcapi": "CPython's own tests",
}  # fmt: skip

# Modules of well-known packages that need native code, with a way out.
_NATIVE = {
    "_cffi_backend": "",
    "asyncpg": "pg8000 is pure Python", "bcrypt": "hashlib.scrypt is there",
    "cryptography": "", "gevent": "", "greenlet": "", "grpc": "", "lxml": "xml.etree is available",
    "MySQLdb": "PyMySQL is pure Python", "numpy": "", "orjson": "json is available", "pandas": "",
    "PIL": "", "psycopg2": "pg8000 is pure Python", "psycopg_c": "pg8000 is pure Python",
    "pydantic_core": "pydantic 1.10 is pure Python", "rpds": "", "scipy": "", "tiktoken": "",
    "tokenizers": "", "torch": "", "ujson": "json is available", "uvloop": "", "zmq": "",
}  # fmt: skip

# Where the name to install is not the name to import.
_DISTRIBUTIONS = {
    "attr": "attrs", "bs4": "beautifulsoup4", "cgi": "legacy-cgi", "cgitb": "legacy-cgi",
    "dateutil": "python-dateutil", "dotenv": "python-dotenv", "environ": "django-environ",
    "flask_sqlalchemy": "Flask-SQLAlchemy", "jwt": "PyJWT", "pkg_resources": "setuptools<81",
    "pymysql": "PyMySQL", "rest_framework": "djangorestframework", "yaml": "PyYAML",
}  # fmt: skip


class LoadError(Exception):
    """There is no application; the message tells why.

    `stage` is "import" or "callable", `hint` the likely reason and remedy or
    None. An error of the application's own code is the `__cause__`.
    """

    def __init__(self, message: str, stage: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.stage = stage
        self.hint = hint


def load(wanted: dict[str, Any]) -> tuple[Any, str]:
    """Returns the application and its name.

    `wanted` is `{"module": .., "callable": ..}`, where the callable is None, a
    name, a path such as `site.app`, or a call with literals such as
    `create_app("production")`; or it is `{"django_settings": ..}`.
    """
    settings = wanted.get("django_settings")
    if settings is not None:
        return _load_django(settings)
    module = _import(wanted["module"])
    expression = wanted.get("callable")
    if expression is None:
        application, expression = _find(module)
    else:
        application = _evaluate(module, expression)
    name = f"{module.__name__}:{expression}"
    _check(application, name)
    return application, name


def hint(error: BaseException) -> str | None:
    """Returns the likely reason for `error` and a remedy, as far as the sandbox is the reason."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if text := _hint(cause):
            return text
        cause = cause.__cause__ or cause.__context__
    return None


def last_frame(trace: TracebackType | None) -> str:
    """Returns the file of the innermost frame of a traceback."""
    file = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
    return file


def _load_django(settings: str) -> tuple[Any, str]:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", settings)
    _import(settings)
    try:
        configured = importlib.import_module("django.conf").settings

        # Django's own rule, see django.core.servers.basehttp.
        path = configured.WSGI_APPLICATION
        if path is None:
            name = "django.core.wsgi:get_wsgi_application()"
        else:
            module_name, _, attribute = path.rpartition(".")
            name = f"{module_name}:{attribute}"
    except Exception as error:
        raise LoadError(
            f"Django settings `{settings}` failed: {_describe(error)}", "import", hint(error)
        ) from error
    module_name, _, attribute = name.partition(":")
    application = _evaluate(_import(module_name), attribute)
    _check(application, name)
    return application, name


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # The module itself, not one that it imports.
        itself = missing and f"{name}.".startswith(f"{missing}.")
        if itself and last_frame(error.__traceback__).startswith("<frozen importlib"):
            raise LoadError(
                f"there is no module `{missing}`{_near_modules(missing)}",
                "import",
                _hint_wanted(missing),
            ) from None
        raise _import_failed(name, error) from error
    except BaseException as error:
        # SystemExit as well: a script that ends when it is imported.
        raise _import_failed(name, error) from error


def _import_failed(name: str, error: BaseException) -> LoadError:
    return LoadError(
        f"module `{name}` failed while it was imported: {_describe(error)}", "import", hint(error)
    )


def _find(module: ModuleType) -> tuple[Any, str]:
    """Returns the application of a module by the usual names."""
    for name in _NAMES:
        application = getattr(module, name, None)
        # A submodule can have that name.
        if callable(application):
            return application, name
    for name in _FACTORIES:
        factory = getattr(module, name, None)
        if callable(factory):
            return _call(factory, name, (), {}), f"{name}()"
    tried = ", ".join(f"`{name}`" for name in (*_NAMES, *(f"{name}()" for name in _FACTORIES)))
    found = [
        name for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]  # fmt: skip
    have = f"; it defines {', '.join(f'`{name}`' for name in found[:8])}" if found else ""
    for name in _NAMES:
        value = getattr(module, name, None)
        if value is not None and not isinstance(value, ModuleType):
            have += f"; its `{name}` is not callable but {type(value).__name__}"
    raise LoadError(
        f"module `{module.__name__}` has none of {tried}{have}",
        "callable",
        f"name the callable, as in `{module.__name__}:name`",
    )


def _evaluate(module: ModuleType, expression: str) -> Any:
    """Returns what an attribute path, or a call of one with literals, stands for."""
    try:
        node: ast.expr = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _bad_expression(expression) from None
    call = node if isinstance(node, ast.Call) else None
    value: Any = module
    names = _path(call.func if call else node, expression)
    for done, name in enumerate(names):
        owner, value = value, getattr(value, name, _MISSING)
        if value is _MISSING:
            where = ".".join((module.__name__, *names[:done]))
            near = difflib.get_close_matches(name, [n for n in dir(owner) if n[:2] != "__"])
            raise LoadError(f"`{where}` has no attribute `{name}`{_near(near)}", "callable")
    if call is None:
        return value
    try:
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        if len(keywords) != len(call.keywords):
            raise ValueError("**")
    except (ValueError, TypeError, SyntaxError):
        raise LoadError(f"the arguments in `{expression}` must be literals", "callable") from None
    return _call(value, ".".join(names), arguments, keywords)


def _path(node: ast.expr, expression: str) -> list[str]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise _bad_expression(expression)
    return [node.id, *names]


def _call(factory: Any, name: str, arguments: Any, keywords: dict[str, Any]) -> Any:
    if not callable(factory):
        raise LoadError(f"`{name}` is of type `{_kind(factory)}` and can not be called", "callable")
    try:
        inspect.signature(factory).bind(*arguments, **keywords)
    except TypeError as error:
        signature = inspect.signature(factory)
        raise LoadError(
            f"the factory `{name}{signature}` can not be called like that: {error}",
            "callable",
            f"give its arguments, as in `{name}('production')`",
        ) from None
    except ValueError:
        pass  # A callable without a signature.
    try:
        return factory(*arguments, **keywords)
    except BaseException as error:
        raise LoadError(
            f"the factory `{name}` failed: {_describe(error)}", "callable", hint(error)
        ) from error


def _check(application: Any, name: str) -> None:
    if not callable(application):
        raise LoadError(
            f"`{name}` is of type `{_kind(application)}` and can not be called", "callable"
        )
    target = application if inspect.isroutine(application) else type(application).__call__
    if inspect.iscoroutinefunction(target):
        raise LoadError(
            f"`{name}` is an ASGI application, and this host runs WSGI",
            "callable",
            "use the framework's WSGI application, or wrap it, as with `a2wsgi.ASGIMiddleware`",
        )


def _hint(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, ImportError) and error.name:
        return _hint_import(error, error.name)
    if isinstance(error, PermissionError) and NETWORK_DENIED in text:
        return "move the connection from import time into the first request that needs it"
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "there are no threads in the sandbox: start none at import"
    kind = type(error).__name__
    if kind == "ZoneInfoNotFoundError":
        # Whoever raised it has loaded this.
        import zoneinfo

        key = text.rpartition(" ")[2].strip("'\"")
        near = difflib.get_close_matches(key, zoneinfo.available_timezones())
        return f"there is no time zone of that name{_near(near)}"
    if isinstance(error, AttributeError):
        missing = _missing_attribute(error)
        if missing in ("fork", "getuid", "geteuid", "getgid", "umask", "pipe", "statvfs", "kill"):
            return f"`os.{missing}` does not exist in the sandbox"
    if isinstance(error, KeyError) and last_frame(error.__traceback__).endswith(
        ("/os.py", "<frozen os>")
    ):
        return (
            f"the environment variable {text} is not set while the app is being built: "
            "set one for the build, or read it with os.environ.get"
        )
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return (
            f"`{error.filename}` is not among the app's files: is it excluded, "
            "or outside the app's directory?"
        )
    if isinstance(error, SyntaxError):
        return "the sandbox runs Python {}.{}".format(*sys.version_info)
    if isinstance(error, SystemExit):
        return (
            "the module ends the process when it is imported: "
            "put that under `if __name__ == '__main__':`"
        )
    if isinstance(error, OSError) and "subprocess" in last_frame(error.__traceback__):
        return "there are no other processes in the sandbox: start none at import"
    return None


def _hint_import(error: ImportError, name: str) -> str | None:
    root = name.partition(".")[0]
    if root in _NOT_IN_BUILD:
        return f"`{name}` ({_NOT_IN_BUILD[root]}) is not in the WASI build of CPython"
    if root in ("cgi", "cgitb"):
        return f"`{name}` is no longer part of Python: add `legacy-cgi` to requirements.txt"
    leaf = name.rpartition(".")[2]
    native = next((known for known in (root, leaf) if known in _NATIVE), None)
    if native is None and _has_native_file(name):
        native = name
    if native is not None:
        way = _NATIVE.get(native)
        return f"`{name}` needs native code that can't run in the sandbox" + (
            f"; {way}" if way else ""
        )
    if not isinstance(error, ModuleNotFoundError):
        return None
    if root in sys.stdlib_module_names and root not in sys.modules:
        return f"`{name}` is not in the WASI build of CPython"
    return _hint_wanted(name)


def _hint_wanted(name: str) -> str:
    """Returns the hint for a module that is nowhere."""
    root = name.partition(".")[0]
    if root != name and root in sys.modules:
        return f"`{root}` is there, but it has no `{name}`: is the file excluded?"
    distribution = _DISTRIBUTIONS.get(root, root)
    return (
        f"add `{distribution}` to requirements.txt, or, if it is a module of the app, "
        "check the app's directory"
    )


def _has_native_file(name: str) -> bool:
    """Tells whether an extension module for another platform lies where `name` is looked for."""
    *packages, leaf = name.split(".")
    for entry in sys.path:
        try:
            files = os.listdir(os.path.join(entry, *packages))
        except OSError:
            continue
        if any(file.startswith(f"{leaf}.") and file.endswith((".so", ".pyd")) for file in files):
            return True
    return False


def _missing_attribute(error: AttributeError) -> str | None:
    owner: Any = error.obj
    return error.name if getattr(owner, "__name__", None) in ("os", "posix") else None


def _near_modules(name: str) -> str:
    """Returns the app's modules that have a name like `name`, in words."""
    *packages, leaf = name.split(".")
    directory = os.path.join(sys.path[0] or ".", *packages)
    try:
        files = sorted(os.listdir(directory))
    except OSError:
        return ""
    modules = []
    for file in files:
        stem, extension = os.path.splitext(file)
        if extension == ".py" or os.path.isfile(os.path.join(directory, file, "__init__.py")):
            modules.append(stem)
    near = difflib.get_close_matches(leaf, modules)
    if near or not modules:
        return _near(near)
    return f"; there are {', '.join(f'`{module}`' for module in modules[:8])}"


def _near(names: list[str]) -> str:
    return f"; did you mean {' or '.join(f'`{name}`' for name in names)}?" if names else ""


def _bad_expression(expression: str) -> LoadError:
    return LoadError(
        f"`{expression}` is neither a name nor a call with literals",
        "callable",
        "write `app`, `package.app` or `create_app('production')`",
    )


def _describe(error: BaseException) -> str:
    text = str(error)
    return f"{_kind(error)}: {text}" if text else _kind(error)


def _kind(value: object) -> str:
    return type(value).__name__


_MISSING = object()
