"""A report about where it runs, to see at a glance whether a server works."""

import os
import platform
import sys
import sysconfig
from html import escape

STYLE = "body { font-family: sans-serif } td { vertical-align: top; padding-right: 1em }"


def sections(environ):
    """Yields (title, rows) for each part of the report."""
    yield "Python", [
        ("version", sys.version),
        ("implementation", platform.python_implementation()),
        ("platform", sysconfig.get_platform()),
        ("executable", sys.executable or "none"),
        ("byte order", sys.byteorder),
        ("file system encoding", sys.getfilesystemencoding()),
        ("recursion limit", sys.getrecursionlimit()),
        ("current directory", os.getcwd()),
    ]
    yield "sys.path", list(enumerate(sys.path))
    yield "WSGI environ", sorted(environ.items())
    yield "os.environ", sorted(os.environ.items())
    yield (
        "Modules",
        [(name, getattr(module, "__file__", None) or "built in") for name, module in sorted(sys.modules.items())],
    )


def table(title, rows):
    yield f"<h2>{escape(title)}</h2>\n<table>\n"
    for name, value in rows:
        text = value if isinstance(value, str) else repr(value)
        yield f"<tr><td>{escape(str(name))}</td><td><code>{escape(text)}</code></td></tr>\n"
    yield "</table>\n"


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
    yield f"<!doctype html>\n<title>Report</title>\n<style>{STYLE}</style>\n<h1>Report</h1>\n".encode()
    for title, rows in sections(environ):
        yield "".join(table(title, rows)).encode()
