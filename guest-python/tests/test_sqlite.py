import _sqlite3
import sqlite3
import types
import unittest
from unittest import mock

from tests import support  # noqa: F401
from wsgi_wasm import sqlite


class Case(unittest.TestCase):
    def setUp(self):
        # What `import sqlite3` would find; this one has it already.
        self.module = types.SimpleNamespace(
            Connection=_sqlite3.Connection, connect=_sqlite3.connect
        )
        sqlite.install(self.module)
        self.addCleanup(sqlite.forget)

    def connect(self, *args, **options):
        connection = self.module.connect(":memory:", *args, **options)
        self.addCleanup(connection.close)
        return connection

    def value(self, connection, expression, *parameters):
        return connection.execute(f"select {expression}", parameters).fetchone()[0]

    def assert_ours(self, connection):
        with mock.patch("os.urandom", lambda size: b"\1" * size):
            sqlite.forget()
            self.assertEqual(self.value(connection, "random()"), 0x0101010101010101)
            self.assertEqual(self.value(connection, "randomblob(3)"), b"\1\1\1")


class Connections(Case):
    def test_all_ways_to_connect(self):
        class Own(self.module.Connection):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.mine = True

            def create_function(self, *args, **options):
                raise AssertionError("the application's")

        self.assert_ours(self.connect())
        self.assert_ours(self.connect(timeout=1, isolation_level=None))
        self.assert_ours(self.connect(factory=Own))
        direct = self.module.Connection(":memory:")
        self.addCleanup(direct.close)
        self.assert_ours(direct)

    def test_a_connection_is_what_it_was(self):
        connection = self.connect()
        self.assertIs(type(connection), self.module.Connection)
        self.assertIsInstance(connection, _sqlite3.Connection)
        self.assertEqual(repr(self.module.Connection), "<class 'sqlite3.Connection'>")
        with self.assertRaises(AttributeError):
            connection.unknown = 1
        with self.assertRaises(sqlite3.OperationalError):
            self.module.connect("/nowhere/at/all")


class Values(Case):
    def test_random_is_a_signed_integer_of_64_bits(self):
        connection = self.connect()
        values = [self.value(connection, "random()") for _ in range(100)]
        self.assertEqual(len(set(values)), 100)
        self.assertTrue(all(-(2**63) <= value < 2**63 for value in values))
        self.assertTrue(min(values) < 0 < max(values))
        connection.execute("create table t (n)")
        connection.executemany("insert into t values (?)", [(n,) for n in range(50)])
        orders = {str(connection.execute("select n from t order by random()").fetchall())
                  for _ in range(5)}  # fmt: skip
        self.assertEqual(len(orders), 5)

    def test_sizes_of_blobs(self):
        connection = self.connect()
        for argument, size in ((16, 16), (0, 1), (-1, 1), (None, 1), ("5", 5), ("x", 1), (2.7, 2)):
            self.assertEqual(len(self.value(connection, "randomblob(?)", argument)), size)
        with self.assertRaisesRegex(sqlite3.DataError, "too big"):
            self.value(connection, "randomblob(2000000000)")

    def test_defaults_of_a_table(self):
        connection = self.connect()
        connection.execute("create table t (id text default (hex(randomblob(8))), n)")
        connection.execute("insert into t (n) values (1)")
        self.assertEqual(len(connection.execute("select id from t").fetchone()[0]), 16)

    def test_what_is_drawn_already_is_forgotten(self):
        self.value(self.connect(), "random()")
        self.assertTrue(sqlite._numbers.__length_hint__())
        sqlite.forget()
        self.assertFalse(sqlite._numbers.__length_hint__())


if __name__ == "__main__":
    unittest.main()
