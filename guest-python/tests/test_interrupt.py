"""The soft stop, with a clock that the tests turn."""

import gc
import sys
import time
import unittest

from tests import support  # noqa: F401  (the path to the package)
from wsgi_wasm import interrupt


def arm(test, time_left):
    interrupt.arm(time_left)
    test.addCleanup(gc.callbacks.remove, gc.callbacks[-1])
    test.addCleanup(setattr, interrupt, "_time_left", None)


@unittest.skipIf(sys.version_info < (3, 12), "sys.monitoring came with Python 3.12, and the guest has 3.14")
class Loops(unittest.TestCase):
    def setUp(self):
        self.left = 10**9
        arm(self, lambda: self.left)

    def test_a_loop_that_creates_containers_ends(self):
        kept = []

        def work():
            for number in range(10**9):
                if number == 10_000:
                    self.left = 0
                kept.append([number])

        with self.assertRaises(interrupt.RequestTimeout):
            work()
        self.assertGreater(len(kept), 10_000)
        self.assertIsNone(sys.monitoring.get_tool(4))

    def test_one_who_goes_on_is_told_again(self):
        self.left = 0
        told = 0
        kept = []
        for _ in range(2):
            try:
                while True:
                    kept.append([])
            except interrupt.RequestTimeout:
                told += 1
        self.assertEqual(told, 2)

    def test_nothing_happens_in_time(self):
        self.assertEqual(len([[number] for number in range(100_000)]), 100_000)


class Sleep(unittest.TestCase):
    def test_it_is_the_plain_one_during_the_build(self):
        interrupt.sleep(0)
        with self.assertRaises(ValueError):
            interrupt.sleep(-1)

    def test_it_ends_in_time(self):
        end = time.monotonic() + 0.05
        arm(self, lambda: max(0, int((end - time.monotonic()) * 1_000_000)))
        interrupt.sleep(0.001)
        with self.assertRaises(ValueError):
            interrupt.sleep(-1)
        with self.assertRaises(interrupt.RequestTimeout):
            interrupt.sleep(3600)
        for wrong in ("x", None):
            with self.assertRaises(TypeError):
                interrupt.sleep(wrong)

    def test_it_lasts_though_no_processor_time_passes(self):
        arm(self, lambda: 5_000)
        start = time.monotonic()
        interrupt.sleep(0.02)
        self.assertGreaterEqual(time.monotonic() - start, 0.02)

    def test_it_takes_the_place_of_the_usual_one(self):
        original = time.sleep
        self.addCleanup(setattr, time, "sleep", original)
        interrupt.install()
        self.assertIs(time.sleep, interrupt.sleep)
