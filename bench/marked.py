"""Copies of the app `apps/marked`, each with a name of its own in its memory."""

import hashlib
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
    output.write_bytes(sealed(built, built.replace(MARK, name_of(number).encode())))


def sealed(built, changed):
    """The artifact `changed`, made from `built`, with the digest of its component in the manifest."""
    return changed.replace(digest(built).encode(), digest(changed).encode())


def digest(artifact):
    """SHA-256 of the component: all but the sections that `build` put behind it."""
    found = hashlib.sha256(artifact[:8])
    start = 8
    while start < len(artifact):
        length, content = leb128(artifact, start + 1)
        name_length, name = leb128(artifact, content)
        is_ours = artifact[start] == 0 and artifact[name : name + name_length].startswith(b"wsgi-wasm:")
        if not is_ours:
            found.update(memoryview(artifact)[start : content + length])
        start = content + length
    return found.hexdigest()


def leb128(artifact, at):
    """A number (core specification 5.2.2), and the place behind it."""
    number = shift = 0
    while True:
        byte = artifact[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
