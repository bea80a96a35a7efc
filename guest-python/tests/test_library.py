import pathlib
import subprocess
import sys
import unittest

from tests.support import SOURCE

# What they need is generated for the component.
GLUE = ("entry", "exports")


class Library(unittest.TestCase):
    def test_it_has_all_that_the_others_import(self):
        names = sorted(path.stem for path in pathlib.Path(SOURCE, "wsgi_wasm").glob("*.py"))
        names = [name for name in names if name not in GLUE]
        self.assertGreater(len(names), 10)
        code = f"""
import importlib, sys
sys.path.insert(0, {str(SOURCE)!r})
importlib.import_module("wsgi_wasm.library")
before = set(sys.modules)
for name in {names!r}:
    importlib.import_module("wsgi_wasm." + name)
print(*(name for name in set(sys.modules) - before if not name.startswith("wsgi_wasm.")))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        self.assertEqual(done.stdout.split(), [])


if __name__ == "__main__":
    unittest.main()
