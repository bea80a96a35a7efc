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
  Nor is an instruction that loads a constant, which is another one if it was
  immortal when the instruction first ran: the host's build replaces those, too.
- It notes in the code what it has seen there, to be faster the next time. So the code
  that requests run is copied to one place, and is run there: the host's build does that.
- Its allocator takes what was freed before, wherever that is. So all that is
  free is filled, and what a request allocates lies together, above the rest.

What was made before the snapshot is therefore never freed in an instance. That
is no leak: it can not become more.
"""

from __future__ import annotations

import array
import gc
import opcode
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Names the objects to be made immortal, as 32-bit addresses.
OBJECTS = "objects.bin"
# Names the instructions that load a constant, by the addresses of their opcodes. Before
# them come the opcodes of the instruction for any constant, and of those for one that is
# immortal and for one that is not.
CONSTANTS = "constants.bin"
# Tells where code is copied from and to, and what refers to it: the number of code
# objects; address and length of each; for each pointer to one, its address and which one
# it is; and last, the address that the first one is copied to, with the others behind it.
CODE = "code.bin"
# Names the code that `watching` made older than the interpreter's events, so that it would
# be looked through when it runs, by the addresses of its version. The first one is up to date.
VERSIONS = "versions.bin"

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

# The places of `func_code` in a function and of `_co_instrumentation_version` in code
# (CPython 3.14, `funcobject.h` and `code.h`, with pointers of 32 bits).
_FUNC_CODE = 24
_CODE_VERSION = 108
# Objects have addresses that are multiples of this.
_ALIGNMENT = 16

# Nothing in here may be freed: its address is known outside.
_kept: list[Any] = []
# The code that requests run, by address, in the order in which they do.
_run: dict[int, types.CodeType] = {}


@contextmanager
def watching() -> Iterator[None]:
    """Notes which code begins to run in the block: that of requests."""
    monitoring: Any = getattr(sys, "monitoring", None)
    free = (number for number in range(6) if monitoring and monitoring.get_tool(number) is None)
    tool = next(free, None)
    # The interpreter is older, or the application has taken all.
    if tool is None:
        yield
        return

    def begins(code: types.CodeType, _: int) -> Any:
        _run.setdefault(id(code), code)
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "wsgi-wasm build")
    monitoring.register_callback(tool, monitoring.events.PY_START, begins)
    monitoring.set_events(tool, monitoring.events.PY_START)
    try:
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.register_callback(tool, monitoring.events.PY_START, None)
        monitoring.free_tool_id(tool)


def settle(scratch: str) -> None:
    """Arranges the memory, and tells the host's build of it in the directory `scratch`.

    Nothing should be freed after it. Call it last.
    """
    gc.unfreeze()
    # Empties the interpreter's own stores of freed objects, too.
    gc.collect()
    _keep_all()
    with open(os.path.join(scratch, OBJECTS), "wb") as file:
        for start in range(0, len(_kept), 1024):
            file.write(array.array("I", map(id, _kept[start : start + 1024])))
    with open(os.path.join(scratch, CONSTANTS), "wb") as file:
        special: dict[str, int] = opcode._specialized_opmap  # type: ignore[attr-defined]
        file.write(array.array("I", [
            opcode.opmap["LOAD_CONST"],
            special["LOAD_CONST_IMMORTAL"],
            special["LOAD_CONST_MORTAL"],
        ]))  # fmt: skip
        numbers = (opcode.opmap["LOAD_CONST"], special["LOAD_CONST_MORTAL"])
        sizes = _cache_sizes()
        for value in _kept:
            if type(value) is types.CodeType:
                file.write(array.array("I", _constants(value, numbers, sizes)))
    del file, start, value, special, numbers, sizes
    with open(os.path.join(scratch, VERSIONS), "wb") as file:
        file.write(array.array("I", _versions(settle.__code__)))
    length = _list_code(os.path.join(scratch, CODE))
    gc.collect()
    gc.freeze()
    _fill_holes()
    # Not of zeros: those are not in the snapshot.
    _kept.append(room := b"\xff" * (length + 2 * _ALIGNMENT))
    # The bytes begin where the size of an empty object ends, but for the final NUL.
    start = id(room) + bytes.__basicsize__ - 1
    with open(os.path.join(scratch, CODE), "ab") as file:
        file.write(array.array("I", [start + -start % _ALIGNMENT]))


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
        # `type()`, for `isinstance` asks an object, and a lazy proxy answers by loading.
        kind = type(value)
        if seen[place] & bit or issubclass(kind, _MORTAL) or value is _kept:
            continue
        seen[place] |= bit
        if not hasattr(kind, "__del__"):
            _kept.append(value)
        if kind is types.CodeType:
            pending += (getattr(value, name) for name in _OF_CODE)
        else:
            pending += gc.get_referents(value)
            if issubclass(kind, dict):
                # The collector does not look at keys that are all strings.
                pending += dict.keys(value)


def _constants(code: types.CodeType, numbers: tuple[int, int], sizes: bytes) -> Iterator[int]:
    """Yields the addresses of the instructions of `code` that have one of the opcodes
    `numbers`. After one, so many units of its inline cache follow as `sizes` tells.
    """
    # They are the end of the object, and have two bytes each: opcode and argument. Not
    # from `co_code`, of which each code object that was asked for it keeps a copy.
    start = id(code) + types.CodeType.__basicsize__
    opcodes: bytes = code._co_code_adaptive[::2]  # type: ignore[attr-defined]
    if numbers[0] not in opcodes and numbers[1] not in opcodes:
        return
    place, end = 0, len(opcodes)
    while place < end:
        number = opcodes[place]
        if number in numbers:
            yield start + 2 * place
        place += 1 + sizes[number]


def _versions(current: types.CodeType) -> Iterator[int]:
    """Yields the addresses of the versions of `current` and of the code that did not run
    while `watching`: what did has run again since, or has to be looked through."""
    yield id(current) + _CODE_VERSION
    if any(map(sys.monitoring.get_tool, range(6))):
        # The application watches, too.
        return
    for value in _kept:
        if type(value) is types.CodeType and id(value) not in _run:
            yield id(value) + _CODE_VERSION


def _list_code(path: str) -> int:
    """Writes all but the end of `CODE` to `path`; returns how much room the code needs."""
    kept = set(map(id, filter(lambda value: type(value) is types.CodeType, _kept)))
    order: dict[int, int] = {}
    sizes = array.array("I")
    room = 0
    for address, code in _run.items():
        if address in kept:
            order[address] = len(order)
            size: int = types.CodeType.__basicsize__ + len(code._co_code_adaptive)  # type: ignore[attr-defined]
            sizes.extend((address, size))
            room += size + -size % _ALIGNMENT
    _run.clear()
    pointers = array.array("I")
    for value in _kept:
        if type(value) is types.FunctionType:
            place = order.get(id(value.__code__))
            if place is not None:
                pointers.extend((id(value) + _FUNC_CODE, place))
        elif type(value) is types.CodeType:
            constants = value.co_consts
            for index, constant in enumerate(constants):
                place = order.get(id(constant))
                if place is not None:
                    pointers.extend((id(constants) + tuple.__basicsize__ + 4 * index, place))
    with open(path, "wb") as file:
        file.write(array.array("I", [len(order)]))
        file.write(sizes)
        file.write(pointers)
    return room


def _cache_sizes() -> bytes:
    """Returns for each opcode how many units its inline cache has."""
    numbers = {**opcode.opmap, **opcode._specialized_opmap}  # type: ignore[attr-defined]
    sizes = bytearray(256)
    for name, size in opcode._inline_cache_entries.items():  # type: ignore[attr-defined]
        for each in (name, *opcode._specializations.get(name, ())):  # type: ignore[attr-defined]
            sizes[numbers[each]] = size
    return bytes(sizes)


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
