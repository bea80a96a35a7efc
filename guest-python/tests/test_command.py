import io
import os
import pathlib
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from tests import support  # noqa: F401
from wsgi_wasm import command


class Case(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(os.path.realpath(directory.name))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.root)
        modules = set(sys.modules)
        self.addCleanup(lambda: [sys.modules.pop(name) for name in set(sys.modules) - modules])
        self.addCleanup(setattr, sys, "dont_write_bytecode", sys.dont_write_bytecode)
        sys.dont_write_bytecode = True
        main = dict(vars(sys.modules["__main__"]))
        self.addCleanup(
            lambda: (
                vars(sys.modules["__main__"]).clear(),
                vars(sys.modules["__main__"]).update(main),
            )
        )
        # Those of the test runner are not this test's to run.
        patch = mock.patch.object(command.atexit, "_run_exitfuncs")
        self.exit_functions = patch.start()
        self.addCleanup(patch.stop)

    def run_(self, *arguments, stdin=""):
        """Returns (status, stdout, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            mock.patch("sys.stdin", io.StringIO(stdin)),
        ):
            status = command.run(list(arguments))
        return status, out.getvalue(), err.getvalue()


class Forms(Case):
    def test_code(self):
        code = "import sys; print(sys.argv, repr(sys.path[0]), __name__)"
        self.assertEqual(self.run_("python", "-c", code, "a", "-b"),
                         (0, "['-c', 'a', '-b'] '' __main__\n", ""))  # fmt: skip
        self.assertEqual(self.run_("python3", "-cprint(1)")[1], "1\n")

    def test_stdin(self):
        code = "import sys; print(sys.argv, repr(sys.path[0]), __name__)"
        self.assertEqual(self.run_("python", "-", "a", stdin=code)[1], "['-', 'a'] '' __main__\n")
        self.assertEqual(self.run_("python", stdin=code)[1], "[''] '' __main__\n")

    def test_file(self):
        (self.root / "sub").mkdir()
        (self.root / "sub" / "other.py").write_text("value = 5")
        (self.root / "sub" / "script.py").write_text(
            "import sys, other; print(sys.argv, sys.path[0], __name__, __file__, other.value)"
        )
        status, out, err = self.run_("python3", "sub/script.py", "a")
        expected = f"['sub/script.py', 'a'] {self.root / 'sub'} __main__ sub/script.py 5\n"
        self.assertEqual((status, out, err), (0, expected, ""))

    def test_module(self):
        (self.root / "tool.py").write_text("import sys; print(sys.argv, sys.path[0], __name__)")
        status, out, err = self.run_("python", "-m", "tool", "a")
        expected = f"['{self.root / 'tool.py'}', 'a'] {self.root} __main__\n"
        self.assertEqual((status, out, err), (0, expected, ""))

    def test_package(self):
        (self.root / "pkg").mkdir()
        (self.root / "pkg" / "__init__.py").write_text("")
        (self.root / "pkg" / "__main__.py").write_text("print(__package__)")
        self.assertEqual(self.run_("python", "-m", "pkg"), (0, "pkg\n", ""))

    def test_directory(self):
        (self.root / "dir").mkdir()
        (self.root / "dir" / "__main__.py").write_text("import sys; print(sys.path[0])")
        self.assertEqual(self.run_("python", "dir")[1], "dir\n")

    def test_version(self):
        version = "Python " + sys.version.split()[0] + "\n"
        for option in ("-V", "--version"):
            self.assertEqual(self.run_("python", option), (0, version, ""))

    def test_options_without_effect(self):
        self.assertEqual(self.run_("python", "-u", "-B", "-c", "print(1)")[1], "1\n")

    def test_path_of_the_program(self):
        self.assertEqual(self.run_("/usr/bin/python3", "-c", "print(1)")[0], 0)

    def test_state_is_restored_and_exit_functions_run(self):
        path, argv = list(sys.path), sys.argv
        self.run_("python", "-c", "import sys; sys.path.append('x'); sys.argv.append('y')")
        self.assertEqual((sys.path, sys.argv), (path, argv))
        self.exit_functions.assert_called_once()


class Status(Case):
    def status(self, code):
        return self.run_("python", "-c", code)

    def test_system_exit(self):
        for value, expected in (("", 0), ("None", 0), ("0", 0), ("3", 3), ("256", 0), ("-1", 255),
                                ("True", 1)):  # fmt: skip
            status, _, err = self.status(f"raise SystemExit({value})")
            self.assertEqual((status, err), (expected, ""), value)

    def test_system_exit_with_a_message(self):
        self.assertEqual(self.status("import sys; sys.exit('sorry')"), (1, "", "sorry\n"))

    def test_exceptions(self):
        status, _, err = self.status("def f(): 1/0\nf()")
        self.assertEqual(status, 1)
        self.assertTrue(
            err.startswith('Traceback (most recent call last):\n  File "<string>", line 2'), err
        )
        self.assertTrue(err.endswith("ZeroDivisionError: division by zero\n"))
        for error, expected in (("MemoryError", 1), ("GeneratorExit", 1), ("RecursionError", 1),
                                ("KeyboardInterrupt", 130)):  # fmt: skip
            status, _, err = self.status(f"raise {error}")
            self.assertEqual(status, expected)
            self.assertIn(error, err)

    def test_traceback_of_a_file_starts_there(self):
        (self.root / "script.py").write_text("1/0")
        status, _, err = self.run_("python", "script.py")
        self.assertEqual(status, 1)
        self.assertIn("script.py", err.splitlines()[1])

    def test_syntax_error(self):
        status, _, err = self.status("def (")
        self.assertEqual(status, 1)
        self.assertIn("SyntaxError", err)

    def test_missing_file(self):
        status, _, err = self.run_("python", "nothing.py")
        self.assertEqual(status, 2)
        self.assertIn(f"can't open file '{self.root}/nothing.py': [Errno 2] No such file", err)

    def test_missing_module(self):
        self.assertEqual(self.run_("python", "-m", "nothing_here"),
                         (1, "", "python: No module named nothing_here\n"))  # fmt: skip

    def test_import_error_of_the_module_itself(self):
        (self.root / "broken.py").write_text("import nothing_here")
        status, _, err = self.run_("python", "-m", "broken")
        self.assertEqual(status, 1)
        self.assertIn("Traceback", err)

    def test_usage(self):
        for arguments in (("-x",), ("--nothing",), ("-m",), ("-c",)):
            status, _, err = self.run_("python", *arguments)
            self.assertEqual(status, 2)
            self.assertIn("usage: python", err)

    def test_another_program(self):
        for arguments in ((), ("sh", "-c", "x"), ("",), ("python2",)):
            self.assertEqual(self.run_(*arguments)[0], 127)

    def test_leaving_at_once(self):
        self.addCleanup(setattr, os, "_exit", os._exit)
        command.install()
        code = "import os; os._exit({})"
        for status, expected in ((0, 0), (3, 3), (256 + 7, 7), (-1, 255)):
            self.assertEqual(self.status(code.format(status)), (expected, "", ""))
        self.exit_functions.assert_not_called()
        # Code that catches everything does not keep it.
        caught = "import os\ntry: os._exit(5)\nexcept BaseException: 1/0"
        self.assertEqual(self.status(caught)[0], 5)
        self.assertEqual(self.status("raise SystemExit(1)")[0], 1)
        self.exit_functions.assert_called()

    def test_output_that_can_not_be_written(self):
        class Broken(io.StringIO):
            def flush(self):
                raise OSError("full")

        with mock.patch("sys.stdout", Broken()):
            self.assertEqual(command.run(["python", "-c", "pass"]), 120)
            with mock.patch("sys.stderr", io.StringIO()):
                self.assertEqual(command.run(["python", "-c", "raise SystemExit(3)"]), 3)


if __name__ == "__main__":
    unittest.main()
