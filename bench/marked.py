"""Copies of the app `apps/marked`, each with a name of its own in its memory."""

import itertools
import subprocess

from measure import HERE

MARK = b"tenant-########"


def build(binary, directory, output, *warmup):
    """Builds the app in `directory`."""
    warm = itertools.chain.from_iterable(("--warmup", path) for path in warmup)
    subprocess.run([binary, "build", "--dir", directory, *warm, "-o", output], check=True, capture_output=True)
    return output


def build_marked(binary, output):
    """Builds the app of which copies are made."""
    build(binary, HERE / "apps/marked", output, "/")
    assert MARK in output.read_bytes(), "the name is not in the snapshot"
    return output


def name_of(number):
    """The name that copy `number` answers with."""
    return f"tenant-{number:08d}"


def copy(built, number, output):
    """Writes copy `number` of the app in the bytes `built`."""
    output.write_bytes(built.replace(MARK, name_of(number).encode()))
