import copy
import functools
import gc
import importlib
import os
import pathlib
import pickle
import random
import socket
import sqlite3
import sys
import tempfile
import types
import unittest
import uuid
import weakref

from tests import support  # noqa: F401
from wsgi_wasm import snapshot

kept = []
"""Holds what a test's application would hold in its globals."""


class Case(unittest.TestCase):
    def setUp(self):
        saved = sys.dont_write_bytecode, sys.argv, dict(os.environ), random.getstate()

        def restore():
            if snapshot._building is not None:
                snapshot._building.undo()
                snapshot._building = None
            sys.dont_write_bytecode, sys.argv = saved[:2]
            os.environ.clear()
            os.environ.update(saved[2])
            random.setstate(saved[3])
            gc.unfreeze()
            kept.clear()
            snapshot.stale = False
            snapshot._generators.clear()
            snapshot._environment.clear()

        self.addCleanup(restore)
        snapshot.prepare()

    def instances(self, draw, count=3):
        """Returns what `draw` gives in instances that start from one snapshot."""
        snapshot.freeze()
        frozen = [generator.getstate() for generator in kept]
        generators = list(snapshot._generators)
        drawn = []
        for _ in range(count):
            for generator, state in zip(kept, frozen):
                random.Random.setstate(generator, state)
            snapshot._generators[:] = generators
            snapshot.stale = True
            snapshot.renew()
            drawn.append(draw())
        return drawn


class Generators(Case):
    def check(self, generator, renewed):
        kept.append(generator)
        drawn = self.instances(lambda: (generator.random(), generator.gauss(0, 1)))
        self.assertEqual(len(set(drawn)), 3 if renewed else 1)

    def test_seeded_from_entropy(self):
        self.check(random.Random(), True)

    def test_seeded_by_the_application(self):
        self.check(random.Random(7), False)

    def test_seeded_with_zero(self):
        self.check(random.Random(0), False)

    def test_seeded_later(self):
        generator = random.Random()
        generator.seed("x", version=2)
        self.check(generator, False)

    def test_seeded_by_keyword(self):
        generator = random.Random()
        generator.seed(a=5)
        self.check(generator, False)

    def test_seeded_from_entropy_again(self):
        generator = random.Random(7)
        generator.seed()
        self.check(generator, True)

    def test_pending_gauss_is_forgotten(self):
        generator = random.Random()
        generator.gauss(0, 1)
        kept.append(generator)
        self.assertEqual(len(set(self.instances(lambda: generator.gauss(0, 1)))), 3)

    def test_copies_are_as_their_origin(self):
        for duplicate in (copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))):
            entropic, explicit = duplicate(random.Random()), duplicate(random.Random(3))
            building = snapshot._building
            self.assertFalse(building.is_explicit(entropic))
            self.assertTrue(building.is_explicit(explicit))

    def test_state_set_by_the_application(self):
        state = random.Random(3).getstate()
        generator = random.Random()
        generator.setstate((state[0], tuple(state[1]), state[2]))
        self.check(generator, False)

    def test_created_before_prepare(self):
        snapshot._building.undo()
        generator = random.Random()
        snapshot.prepare()
        self.check(generator, True)

    def test_frozen_by_the_application(self):
        generator = random.Random()
        gc.freeze()
        self.check(generator, True)

    def test_subclass_that_is_not_hashable(self):
        class Odd(random.Random):
            def __eq__(self, other):
                return True

        self.check(Odd(), True)

    def test_subclass_with_its_own_seed(self):
        class Own(random.Random):
            def seed(self, first=None, *args):
                super().seed(first)

        self.check(Own(5), False)

    def test_a_reused_id_is_another_generator(self):
        seeded = random.Random(7)
        key = id(seeded)
        del seeded
        self.assertNotIn(key, snapshot._building._explicit)

    def test_system_random_needs_nothing(self):
        generator = random.SystemRandom()
        snapshot.freeze()
        self.assertFalse(any(each is generator for each in snapshot._generators))

    def test_the_module_generator_is_left_to_the_toolchain(self):
        snapshot.freeze()
        self.assertFalse(any(each is random._inst for each in snapshot._generators))

    def test_the_class_is_as_before(self):
        snapshot.freeze()
        for name in ("seed", "getstate", "setstate"):
            self.assertEqual(getattr(random.Random, name).__module__, "random")

    def test_a_kept_method_works_after_the_build(self):
        generator = random.Random()
        seed = generator.seed
        kept.append(generator)
        snapshot.freeze()
        seed(5)
        self.assertEqual(generator.random(), random.Random(5).random())


class ModuleGenerator(Case):
    """The generator behind the functions of `random`."""

    def setUp(self):
        super().setUp()
        # The interpreter holds the one it made, for `fork`, which there is not in a guest.
        first, before = random._inst, dict(vars(random))
        self.addCleanup(lambda: vars(random).update(before))
        self.addCleanup(setattr, snapshot, "_module_generator", first)
        snapshot._module_generator = random._inst = random.Random()
        for name, value in before.items():
            if getattr(value, "__self__", None) is first:
                setattr(random, name, getattr(random._inst, name))

    def seeded(self):
        """Returns whether it is another one than in the snapshot."""
        return snapshot._module_generator.getstate() != self.frozen

    def freeze(self):
        if snapshot._building is None:
            snapshot.prepare()
        snapshot.freeze()
        snapshot.seed_late()
        self.frozen = snapshot._module_generator.getstate()
        # As componentize-py does, which kept the function.
        snapshot.seed_module()

    def test_it_is_seeded_when_it_is_looked_at(self):
        for look in (
            lambda: random.random(),
            lambda: random._inst,
            lambda: random.seed(),
            lambda: vars(random)["choice"],
            lambda: importlib.import_module("random").choice,
            lambda: getattr(random, "no_such_name", None),
        ):
            self.freeze()
            self.assertFalse(self.seeded())
            look()
            self.assertTrue(self.seeded())
            self.assertIs(type(random), types.ModuleType)

    def test_a_seed_of_the_application_counts(self):
        self.freeze()
        random.seed(5)
        self.assertEqual(random.random(), random.Random(5).random())

    def test_it_is_seeded_at_once_if_it_is_held(self):
        holder = types.SimpleNamespace()
        for hold in (
            lambda: random.choice,
            lambda: random.random,
            lambda: random._inst,
            lambda: (1, random.randint),
            lambda: vars(random),
            lambda: functools.partial(random.shuffle, []),
            lambda: lambda draw=random.random: draw(),
            lambda: (draw for draw in [random.random]),
            lambda: weakref.ref(random.random),
            lambda: weakref.ref(random._inst),
        ):
            holder.held = hold()
            self.freeze()
            self.assertTrue(self.seeded())
            holder.held = None

    def test_it_is_seeded_at_once_if_it_was_looked_at_since(self):
        snapshot.freeze()
        snapshot.seed_late()
        random.random()
        state = snapshot._module_generator.getstate()
        snapshot.seed_module()
        self.assertNotEqual(snapshot._module_generator.getstate(), state)


class Network(Case):
    def test_no_socket(self):
        for create in (socket.socket, lambda: socket.create_connection(("127.0.0.1", 9)),
                       lambda: socket.create_server(("127.0.0.1", 0))):  # fmt: skip
            with self.assertRaisesRegex(PermissionError, "while the app is being built"):
                create()

    def test_no_lookup(self):
        for lookup in (socket.gethostbyname, lambda name: socket.getaddrinfo(name, 80)):
            with self.assertRaisesRegex(PermissionError, "while the app is being built"):
                lookup("localhost")

    def test_names_that_were_kept_work_after_the_build(self):
        from socket import getaddrinfo, gethostbyname
        from socket import socket as kept_class

        snapshot.freeze()
        self.assertTrue(getaddrinfo("127.0.0.1", 80))
        self.assertEqual(gethostbyname("127.0.0.1"), "127.0.0.1")
        kept_class().close()

    def test_the_module_is_as_before(self):
        import _socket

        snapshot.freeze()
        socket.socket().close()
        self.assertIs(socket.gethostbyname, _socket.gethostbyname)
        self.assertEqual(type(_socket.getaddrinfo).__name__, "builtin_function_or_method")


class Environment(Case):
    def test_what_the_application_set_comes_back(self):
        os.environ["SET_BY_APP"] = "app"
        os.environ["PATH"] = "changed"
        snapshot.freeze()
        self.assertEqual(snapshot._environment, {"SET_BY_APP": "app", "PATH": "changed"})
        # What componentize-py does before the first call.
        os.environ.clear()
        os.environ["PATH"] = "of the operator"
        snapshot.renew()
        self.assertEqual(dict(os.environ), {"SET_BY_APP": "app", "PATH": "of the operator"})

    def test_the_build_environment_does_not(self):
        snapshot._building.undo()
        os.environ["BUILD_SECRET"] = "x"
        snapshot.prepare()
        snapshot.freeze()
        self.assertNotIn("BUILD_SECRET", snapshot._environment)


class Modules(Case):
    def test_temporary_names(self):
        saved = tempfile.tempdir
        self.addCleanup(setattr, tempfile, "tempdir", saved)
        tempfile.tempdir = None
        tempfile.gettempdir()
        next(tempfile._get_candidate_names())
        snapshot.freeze()
        self.assertIsNone(tempfile.tempdir)
        self.assertIsNone(tempfile._name_sequence)

    def test_a_chosen_temporary_directory_is_kept(self):
        saved = tempfile.tempdir
        self.addCleanup(setattr, tempfile, "tempdir", saved)
        tempfile.tempdir = "/data/tmp"
        snapshot.freeze()
        self.assertEqual(tempfile.tempdir, "/data/tmp")

    def test_uuid(self):
        uuid.uuid1()
        uuid.getnode()
        uuid._last_timestamp = 5
        snapshot.freeze()
        self.assertIsNone(uuid._last_timestamp)
        self.assertIsNone(uuid._node)
        uuid.uuid1()

    def test_finders(self):
        snapshot.freeze()
        self.assertEqual(sys.path_importer_cache, {})

    def test_no_bytecode_and_no_arguments(self):
        self.assertTrue(sys.dont_write_bytecode)
        snapshot.freeze()
        self.assertEqual(sys.argv, [""])

    def test_objects_are_frozen(self):
        snapshot.freeze()
        self.assertGreater(gc.get_freeze_count(), 1000)

    def test_stale_once(self):
        snapshot.freeze()
        self.assertTrue(snapshot.stale)
        snapshot.renew()
        self.assertFalse(snapshot.stale)
        self.assertEqual(snapshot._generators, [])


class Leftovers(Case):
    def test_nothing(self):
        self.assertEqual(snapshot.freeze(), [])

    def test_open_file(self):
        with open(__file__, encoding="utf-8"):
            (warning,) = snapshot.freeze()
        self.assertIn(f"`{__file__}` is open", warning)

    def test_open_descriptor(self):
        number = os.open(__file__, os.O_RDONLY)
        self.addCleanup(os.close, number)
        (warning,) = snapshot.freeze()
        self.assertIn("1 file descriptors", warning)

    def test_sqlite(self):
        with tempfile.TemporaryDirectory() as directory:
            connection = sqlite3.connect(pathlib.Path(directory, "db"))
            warnings = snapshot.freeze()
            connection.close()
        self.assertIn("SQLite", "".join(warnings))


if __name__ == "__main__":
    unittest.main()
