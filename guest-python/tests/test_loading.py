import json  # noqa: F401  (a package that is there, for the hints)
import os
import pathlib
import sys
import tempfile
import textwrap
import unittest
import zoneinfo
from unittest import mock

from tests import support  # noqa: F401
from wsgi_wasm.loading import LoadError, hint, load

MODULE = """
def app(environ, start_response): return []
def create_site(*args, **kwargs):
    def application(environ, start_response): return []
    application.arguments = args, kwargs
    return application
class site:
    class inner:
        @staticmethod
        def run(environ, start_response): return []
number = 5
async def asgi(scope, receive, send): pass
class Asgi:
    async def __call__(self, scope, receive, send): pass
asgi_object = Asgi()
def fail(): raise ValueError("inner failure")
def needs(config): return app
"""


class Case(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        path, modules, environ = list(sys.path), set(sys.modules), dict(os.environ)

        def restore():
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                del sys.modules[name]
            os.environ.clear()
            os.environ.update(environ)
            sys.path_importer_cache.pop(directory.name, None)

        self.addCleanup(restore)
        sys.path.insert(0, directory.name)
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        self.addCleanup(setattr, sys, "dont_write_bytecode", bytecode)

    def write(self, name, text=""):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def fails(self, wanted, stage, *words, hint=()):
        with self.assertRaises(LoadError) as caught:
            load(wanted)
        error = caught.exception
        self.assertEqual(error.stage, stage, error)
        for word in words:
            self.assertIn(word, str(error))
        for word in hint:
            self.assertIn(word, error.hint or "")
        return error


class Callables(Case):
    def setUp(self):
        super().setUp()
        self.write("mysite.py", MODULE)

    def load(self, expression):
        return load({"module": "mysite", "callable": expression})

    def test_name_and_path(self):
        self.assertEqual(self.load("app")[1], "mysite:app")
        self.assertEqual(self.load("site.inner.run")[1], "mysite:site.inner.run")

    def test_call_with_literals(self):
        application, name = self.load("create_site('x', [1], debug=True)")
        self.assertEqual(application.arguments, (("x", [1]), {"debug": True}))
        self.assertEqual(name, "mysite:create_site('x', [1], debug=True)")
        self.assertEqual(self.load("create_site()")[0].arguments, ((), {}))

    def test_only_literals(self):
        for bad in ("create_site(number)", "create_site(__import__('os'))", "create_site(**{})"):
            self.fails({"module": "mysite", "callable": bad}, "callable", "must be literals")

    def test_nothing_else_is_evaluated(self):
        for bad in ("app or app", "1", "[app]", "app[0]", "create_site()()", "lambda: 1", "", "a b",
                    "create_site().x", "\0"):  # fmt: skip
            self.fails({"module": "mysite", "callable": bad}, "callable", "neither a name nor")

    def test_missing_attribute(self):
        self.fails({"module": "mysite", "callable": "ap"}, "callable",
                   "`mysite` has no attribute `ap`", "did you mean `app`")  # fmt: skip
        self.fails({"module": "mysite", "callable": "site.iner.run"}, "callable",
                   "`mysite.site` has no attribute `iner`", "`inner`")  # fmt: skip

    def test_not_callable(self):
        self.fails(
            {"module": "mysite", "callable": "number"}, "callable", "`int`", "`mysite:number`"
        )
        self.fails({"module": "mysite", "callable": "number()"}, "callable", "`int`")

    def test_factory_with_the_wrong_arguments(self):
        self.fails({"module": "mysite", "callable": "needs()"}, "callable", "`needs(config)`",
                   "missing a required argument", hint=["needs('production')"])  # fmt: skip

    def test_failing_factory(self):
        error = self.fails({"module": "mysite", "callable": "fail()"}, "callable", "inner failure")
        self.assertIsInstance(error.__cause__, ValueError)

    def test_asgi(self):
        for name in ("asgi", "asgi_object"):
            self.fails({"module": "mysite", "callable": name}, "callable", "ASGI", hint=["a2wsgi"])


class UsualNames(Case):
    def find(self, text):
        self.write("mysite.py", text)
        return load({"module": "mysite", "callable": None})[1]

    def test_app_before_application(self):
        self.assertEqual(self.find("app = application = create_app = print"), "mysite:app")

    def test_application(self):
        self.assertEqual(self.find("app = 5; application = print"), "mysite:application")

    def test_factory(self):
        self.assertEqual(self.find("def create_app(): return print"), "mysite:create_app()")

    def test_other_factory(self):
        self.assertEqual(self.find("def make_app(a=1): return print"), "mysite:make_app()")

    def test_none(self):
        self.write("mysite.py", "def server(e, s): pass")
        self.fails({"module": "mysite"}, "callable", "`app`", "`make_app()`", "defines `server`",
                   hint=["mysite:name"])  # fmt: skip


class Modules(Case):
    def test_missing(self):
        self.write("main.py")
        error = self.fails({"module": "mian"}, "import", "no module `mian`", "did you mean `main`")
        self.assertIsNone(error.__cause__)
        self.fails({"module": "zzzzzz"}, "import", "there are `main`")

    def test_missing_in_a_package(self):
        self.write("pkg/__init__.py")
        self.write("pkg/main.py")
        self.fails({"module": "pkg.mian"}, "import", "no module `pkg.mian`", "`main`")
        self.fails({"module": "pgk.main"}, "import", "no module `pgk`", "`pkg`")

    def test_import_inside_fails(self):
        self.write("mysite.py", "import yaml_not_there")
        error = self.fails({"module": "mysite"}, "import", "`mysite` failed",
                           "No module named 'yaml_not_there'",
                           hint=["add `yaml_not_there` to requirements.txt"])  # fmt: skip
        self.assertIsInstance(error.__cause__, ModuleNotFoundError)

    def test_a_module_that_misses_itself(self):
        self.write("mysite.py", "raise ModuleNotFoundError('x', name='mysite')")
        self.fails({"module": "mysite"}, "import", "`mysite` failed")

    def test_distribution_with_another_name(self):
        self.write("mysite.py", "raise ModuleNotFoundError('No', name='yaml')")
        self.fails({"module": "mysite"}, "import", hint=["`PyYAML`"])

    def test_exit_at_import(self):
        self.write("mysite.py", "raise SystemExit(0)")
        self.fails({"module": "mysite"}, "import", "SystemExit", hint=["__main__"])

    def test_syntax_error(self):
        self.write("mysite.py", "def (")
        self.fails({"module": "mysite"}, "import", "SyntaxError", hint=["runs Python 3."])


class Hints(Case):
    def hint(self, error):
        """Returns the hint for an error that a module raises in its import."""
        self.write("mysite.py", "import builtins\nraise builtins.error_to_raise")
        sys.modules.pop("mysite", None)
        import builtins

        builtins.error_to_raise = error
        self.addCleanup(lambda: vars(builtins).pop("error_to_raise", None))
        return self.fails({"module": "mysite"}, "import").hint or ""

    def missing(self, name):
        return self.hint(ModuleNotFoundError(f"No module named {name!r}", name=name))

    def test_not_in_the_build(self):
        for name in ("ssl", "_ctypes", "bz2", "fcntl", "ctypes.util"):
            self.assertIn(f"`{name}` (", self.missing(name))
            self.assertIn("not in the WASI build of CPython", self.missing(name))
        self.assertIn("not in the WASI build of CPython", self.missing("winreg"))

    def test_native_code(self):
        for name in ("numpy", "pydantic_core._pydantic_core", "psycopg2._psycopg", "bcrypt"):
            self.assertIn("needs native code that can't run", self.missing(name))
        self.assertIn("pg8000", self.missing("psycopg2"))

    def test_native_file_of_an_unknown_package(self):
        self.write("fast/__init__.py")
        self.write("fast/_core.cpython-314-x86_64-linux-gnu.so")
        self.assertIn("needs native code", self.missing("fast._core"))

    def test_module_missing_in_a_package_that_is_there(self):
        self.assertIn("`json` is there", self.missing("json.nothing"))

    def test_removed_from_python(self):
        self.assertIn("legacy-cgi", self.missing("cgi"))

    def test_threads(self):
        self.assertIn("no threads", self.hint(RuntimeError("can't start new thread")))

    def test_network(self):
        error = PermissionError("network access while the app is being built is denied")
        self.assertIn("first request", self.hint(error))

    def test_file(self):
        self.assertIn("`/0/x.ini`", self.hint(FileNotFoundError(44, "No such file", "/0/x.ini")))

    def test_time_zone(self):
        with self.assertRaises(zoneinfo.ZoneInfoNotFoundError) as raised:
            zoneinfo.ZoneInfo("Europ/Berlin")
        with mock.patch("zoneinfo.available_timezones", lambda: {"Europe/Berlin", "Asia/Tokyo"}):
            self.assertEqual(
                self.hint(raised.exception),
                "there is no time zone of that name; did you mean `Europe/Berlin`?",
            )

    def test_environment_variable(self):
        self.write("mysite2.py", "import os\nos.environ['NOT_SET_ANYWHERE']")
        self.fails({"module": "mysite2"}, "import", hint=["'NOT_SET_ANYWHERE' is not set"])

    def test_the_cause_of_an_error_counts(self):
        error = RuntimeError("wrapped")
        error.__cause__ = ModuleNotFoundError("No module named 'ssl'", name="ssl")
        self.assertIn("WASI build", hint(error))

    def test_circular_causes_end(self):
        first, second = ValueError(1), ValueError(2)
        first.__cause__, second.__cause__ = second, first
        self.assertIsNone(hint(first))

    def test_missing_function_of_os(self):
        import posix

        self.assertIn("`os.fork`", self.hint(AttributeError("no", name="fork", obj=posix)))

    def test_no_hint_is_better_than_a_wrong_one(self):
        for error in (
            ValueError("x"),
            KeyError("x"),
            ImportError("cannot import name", name="json"),
        ):
            self.assertEqual(self.hint(error), "")


class Django(Case):
    """With a stand-in: what is tested is which application is taken."""

    def setUp(self):
        super().setUp()
        self.write("django/__init__.py")
        self.write(
            "django/conf.py",
            """
            import importlib, os
            class Settings:
                def __getattr__(self, name):
                    module = importlib.import_module(os.environ["DJANGO_SETTINGS_MODULE"])
                    return getattr(module, name, None)
            settings = Settings()
            """,
        )
        self.write("django/core/wsgi.py", "def get_wsgi_application(): return print")
        self.write("proj/wsgi.py", "application = len")
        os.environ.pop("DJANGO_SETTINGS_MODULE", None)

    def test_application_of_the_settings(self):
        self.write("proj/settings.py", "WSGI_APPLICATION = 'proj.wsgi.application'")
        self.assertEqual(load({"django_settings": "proj.settings"}),
                         (len, "proj.wsgi:application"))  # fmt: skip
        self.assertEqual(os.environ["DJANGO_SETTINGS_MODULE"], "proj.settings")

    def test_without_one(self):
        self.write("proj/settings.py", "")
        application, name = load({"django_settings": "proj.settings"})
        self.assertEqual((application, name), (print, "django.core.wsgi:get_wsgi_application()"))

    def test_missing_settings(self):
        self.write("proj/settings.py", "")
        self.fails({"django_settings": "proj.setings"}, "import", "did you mean `settings`")


if __name__ == "__main__":
    unittest.main()
