"""Arranges the memory that becomes the snapshot, so that requests write to little of it.

An instance shares the pages of the snapshot with all others until it writes to
them. A page that it writes to costs a fault and a copy, and with
`isolation = "request"` so does each of them again for every request. What an
interpreter writes to is all over its memory, for two reasons that have nothing
to do with the application:

- It counts references in the objects themselves, so merely looking at an
  object writes to it. CPython does not count those of "immortal" objects
  (PEP 683). Which objects there are is told to the host's build, which makes
  all of them immortal in the snapshot: from here, no count can be set.
- Its allocator takes what was freed before, wherever that is. So all that is
  free is filled, and what a request allocates lies together, above the rest.

What was made before the snapshot is therefore never freed in an instance. That
is no leak: it can not become more.
"""

from __future__ import annotations

import array
import gc
import os
import types
from typing import Any

# Names the objects to be made immortal, as 32-bit addresses.
OBJECTS = "objects.bin"

# What ends with what it stands for: code may wait for that.
_MORTAL = (
    types.FrameType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType,
    types.TracebackType,
)  # fmt: skip
# The collector does not know what code objects refer to.
_OF_CODE = (
    "co_consts", "co_names", "co_filename", "co_name", "co_qualname", "co_linetable",
    "co_exceptiontable",
)  # fmt: skip
# Above all that was ever allocated there is to be so much, all zero: zeros are
# not in the snapshot. Enough for what `settle` itself needed, and for the
# requests of most applications, so that they need not grow the memory.
_ROOM = 3 * 1024 * 1024
# None is so small that there is one object for all.
_SIZES = (*(1 << power for power in range(19, 12, -1)), *range(4096, 256, -64), *range(256, 0, -8))

# Nothing in here may be freed: its address is known outside.
_kept: list[Any] = []


def settle(scratch: str) -> None:
    """Arranges the memory, and writes `OBJECTS` to the directory `scratch`.

    Nothing should be freed after it. Call it last.
    """
    gc.unfreeze()
    # Empties the interpreter's own stores of freed objects, too.
    gc.collect()
    _keep_all()
    with open(os.path.join(scratch, OBJECTS), "wb") as file:
        for start in range(0, len(_kept), 1024):
            file.write(array.array("I", map(id, _kept[start : start + 1024])))
    del file, start
    gc.collect()
    gc.freeze()
    _fill_holes()


def _keep_all() -> None:
    """Puts all objects that stay into `_kept`."""
    # The objects made here are not among them, being newer.
    pending: list[Any] = gc.get_objects()
    # A bit for each place where one can be; a set would need megabytes.
    seen = bytearray(max(map(id, pending)) >> 5)
    while pending:
        value = pending.pop()
        place = id(value) >> 3
        bit = 1 << (place & 7)
        place >>= 3
        if place >= len(seen):
            seen.extend(bytes(place))
        if seen[place] & bit or isinstance(value, _MORTAL) or value is _kept:
            continue
        seen[place] |= bit
        if not hasattr(type(value), "__del__"):
            _kept.append(value)
        if type(value) is types.CodeType:
            pending += (getattr(value, name) for name in _OF_CODE)
        else:
            pending += gc.get_referents(value)


def _fill_holes() -> None:
    """Allocates all memory that was freed, but for what is above the rest."""
    top = id(bytes(_ROOM))
    for size in _SIZES:
        while id(block := bytes(size)) < top:
            _kept.append(block)
    while id(small := object()) < top:
        _kept.append(small)
    # What the list has moved out of, and other remains.
    bytes(_ROOM)
