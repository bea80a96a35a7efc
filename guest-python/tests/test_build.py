import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import unittest
from unittest import mock

from tests import support
from wsgi_wasm import build

# What the guest does, with directories in the place of its mounts. In a
# process of its own, for a build leaves nothing of an interpreter as it was.
MAIN = """
import sys
sys.path.insert(0, {source!r})
from wsgi_wasm import build, kdf, snapshot
root = {root!r}
build.APPLICATION, build.SITE, build.LIBRARY = root + "/0", root + "/1", root + "/python"
# The standard library of this process is not under `LIBRARY`.
build._search_path = lambda path: [root + "/0", *path]
try:
    application = build.main(None, lambda *_: None, root + "/2")
except build.BuildFailed as error:
    print("failed:", error)
    sys.exit(9)
print(kdf.building, snapshot.stale, sys.path[0], application.__name__)
"""


class Case(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        for name in ("0", "1", "2", "python"):
            (self.root / name).mkdir()

    def write(self, name, text=""):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def build(self, **task):
        """Returns the report and the finished process."""
        task = {"task": "application", "application": {"module": "app", "callable": None}, **task}
        self.write("2/build.json", json.dumps(task))
        code = MAIN.format(source=str(support.SOURCE), root=str(self.root))
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return json.loads((self.root / "2/report.json").read_text()), process


class Application(Case):
    APP = """
    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/boom":
            raise KeyError("culprit")
        status = {"/500": "500 Oops", "/404": "404 Not Found"}.get(path, "200 OK")
        start_response(status, [])
        return iter([b"x"]) if path == "/stream" else [environ["HTTP_HOST"].encode()]
    """

    def test_report(self):
        self.write("0/app.py", self.APP)
        report, process = self.build(warmup=["/", "/stream?a=b"], compile=[str(self.root / "0")])
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(process.stdout, f"False True {self.root}/0 app\n")
        self.assertIs(report["ok"], True)
        self.assertEqual(report["application"], "app:app")
        self.assertEqual(report["python"], sys.version.split()[0])
        self.assertEqual(report["warnings"], [])
        self.assertEqual(
            [(each["path"], each["status"]) for each in report["warmup"]],
            [("/", 200), ("/stream?a=b", 200)],
        )
        self.assertEqual(
            list(report["seconds"]), ["compile", "prepare", "import", "warmup", "freeze"]
        )
        self.assertEqual(
            [path.name for path in (self.root / "2").iterdir() if "new" in path.name], []
        )

    def test_warm_up_failures_are_warnings(self):
        self.write("0/app.py", self.APP)
        report, process = self.build(warmup=["/boom", "/500", "/404"])
        self.assertEqual(process.returncode, 0)
        self.assertEqual([each["status"] for each in report["warmup"]], [None, 500, 404])
        first, second, third = report["warnings"]
        self.assertTrue(first.startswith("the warm-up request `/boom` failed\nGET /boom:"), first)
        # One round of it is enough.
        self.assertEqual(first.count("KeyError: 'culprit'"), 1)
        self.assertIn("`/500` was answered with status 500", second)
        self.assertEqual(third, "the warm-up request `/404` was answered with status 404")

    def test_a_handler_made_in_the_warm_up_keeps_working(self):
        self.write(
            "0/app.py",
            """
            import logging
            def app(environ, start_response):
                logging.basicConfig()
                logging.error("line")
                start_response("200 OK", [])
                return []
            """,
        )
        _, process = self.build(warmup=["/"])
        self.assertEqual(process.stderr.count("ERROR:root:line"), 3)

    def test_environment_and_directory(self):
        self.write(
            "0/app.py",
            """
            import os
            assert os.environ["KEY"] == "value"
            assert os.path.exists("data.txt")
            def app(environ, start_response): pass
            """,
        )
        self.write("0/data.txt")
        report, _ = self.build(environment={"KEY": "value"})
        self.assertTrue(report["ok"], report)

    def test_failing_import(self):
        self.write("0/app.py", "import pkg\n")
        self.write("0/pkg/__init__.py", "def f():\n    import ssl_not_there\nf()\n")
        report, process = self.build()
        self.assertEqual(process.returncode, 9)
        self.assertEqual((report["ok"], report["stage"]), (False, "import"))
        self.assertIn("module `app` failed while it was imported", report["message"])
        self.assertIn("requirements.txt", report["hint"])
        lines = report["traceback"].splitlines()
        self.assertIn("0/app.py", lines[1])
        self.assertNotIn("importlib", report["traceback"])
        self.assertNotIn("wsgi_wasm", report["traceback"])
        self.assertEqual(lines[-1], "ModuleNotFoundError: No module named 'ssl_not_there'")

    def test_chained_errors_are_cleaned_too(self):
        self.write(
            "0/app.py",
            """
            try:
                import ssl_not_there
            except ImportError as error:
                raise RuntimeError("no TLS") from error
            """,
        )
        report, _ = self.build()
        self.assertIn("direct cause", report["traceback"])
        self.assertNotIn("importlib", report["traceback"])

    def test_missing_module_has_no_traceback(self):
        report, _ = self.build()
        self.assertIsNone(report["traceback"])
        self.assertIn("no module `app`", report["message"])

    def test_network_at_import(self):
        self.write("0/app.py", "import socket\nsocket.create_connection(('localhost', 1))")
        report, _ = self.build()
        self.assertIn("network access while the app is being built", report["message"])
        self.assertIn("first request", report["hint"])

    def test_exit_at_import(self):
        self.write("0/app.py", "raise SystemExit(0)")
        report, process = self.build()
        self.assertEqual((report["ok"], process.returncode), (False, 9))

    def test_unknown_task(self):
        report, _ = self.build(task="nonsense")
        self.assertEqual((report["ok"], report["stage"]), (False, "configuration"))

    def test_bytecode_is_put_beside_the_modules(self):
        self.write("0/app.py", self.APP)
        self.write("python/pkg/module.py")
        self.write("2/bytecode/pkg/__pycache__/module.pyc", "x")
        self.write("2/bytecode/pkg/module.txt", "x")
        self.write("2/bytecode/gone/__pycache__/module.pyc", "x")
        self.build(bytecode=str(self.root / "2/bytecode"))
        library = self.root / "python"
        self.assertEqual(
            sorted(str(path.relative_to(library)) for path in library.rglob("*.*")),
            ["pkg/__pycache__/module.pyc", "pkg/module.py"],
        )


class Compile(Case):
    def test_in_place(self):
        self.write("1/pkg/a.py", "def f(): pass")
        self.write("1/pkg/template.py", "{{ name }} = (")
        self.write("1/pkg/nul.py", "\0")
        self.write("1/pkg/__pycache__/b.py", "x = 1")
        root = self.root / "1"
        with mock.patch("sys.stderr") as errors:
            build.compile_tree(str(root), "/1")
        errors.write.assert_not_called()
        found = sorted(str(path.relative_to(root)) for path in root.rglob("*.pyc"))
        tag = sys.implementation.cache_tag
        self.assertEqual(found, [f"pkg/__pycache__/a.{tag}.pyc"])
        content = (root / found[0]).read_bytes()
        # PEP 552: bit 0 for a hash, bit 1 for a check.
        self.assertEqual(content[4:8], (1).to_bytes(4, "little"))
        self.assertEqual(content[8:16], importlib.util.source_hash(b"def f(): pass"))
        self.assertIn(b"/1/pkg/a.py", content)

    def test_library(self):
        for name in ("json/__init__.py", "test/x.py", "json/tests/x.py", "idlelib/x.py",
                     "turtle.py", "ensurepip/x.py", "config-3.14-wasm32/x.py", "pydoc_data/x.py",
                     "site-packages/x.py", "__pycache__/json.pyc"):  # fmt: skip
            self.write(f"python/{name}", "x = 1")
        outputs = [self.root / "2/first", self.root / "2/second"]
        for output in outputs:
            build.copy_library(str(self.root / "python"), str(output))
        tag = sys.implementation.cache_tag
        contents = [
            {str(path.relative_to(output)): path.read_bytes()
             for path in output.rglob("*") if path.is_file()}
            for output in outputs
        ]  # fmt: skip
        self.assertEqual(sorted(contents[0]),
                         ["json/__init__.py", f"json/__pycache__/__init__.{tag}.pyc"])  # fmt: skip
        self.assertEqual(contents[0], contents[1])
        self.assertIn(str(self.root / "python/json/__init__.py").encode(),
                      contents[0][f"json/__pycache__/__init__.{tag}.pyc"])  # fmt: skip

    def test_tasks(self):
        self.write("1/a.py")
        report, process = self.build(task="compile", compile=[str(self.root / "1")])
        self.assertEqual((report["ok"], process.returncode), (True, 0), report)
        self.assertTrue(list((self.root / "1").rglob("*.pyc")))
        self.write("python/b.py")
        report, _ = self.build(task="stdlib", output=str(self.root / "2/python"))
        self.assertTrue(report["ok"], report)
        self.assertTrue((self.root / "2/python/b.py").exists())


class SearchPath(unittest.TestCase):
    def test_order_and_nothing_of_the_build_machine(self):
        given = ["/python", "/world", "/0", "/1", "/2", "/3", "/bundled",
                 "/python/lib/python314.zip", "/python/lib/python3.14"]  # fmt: skip
        self.assertEqual(
            build._search_path(given),
            ["/0", "/python", "/python/lib/python314.zip", "/python/lib/python3.14", "/1", "/world",
             "/bundled"],
        )  # fmt: skip


class WarmUp(unittest.TestCase):
    def test_each_path_runs_often_enough_for_the_interpreter(self):
        seen = []

        def application(environ, start_response):
            seen.append(
                (environ["PATH_INFO"], environ["QUERY_STRING"], environ["wsgi.input"].read())
            )
            start_response("200 OK", [])
            return []

        build.warm_up(application, ["/%C3%A4?x=%20"], [])
        self.assertEqual(seen, [("/\xc3\xa4", "x=%20", b"")] * 3)


if __name__ == "__main__":
    unittest.main()
