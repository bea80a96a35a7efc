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
  What it looks at costs little, but not nothing: for each page that is in an
  instance's memory, and the kernel maps sixteen at a time, it is asked whether it
  was written to. So what is free is filled, for the first time, before what all
  requests look at is made: the other modules of this package.

What was made before the snapshot is therefore never freed in an instance. That
is no leak: it can not become more.
"""

from __future__ import annotations

import array
import gc
import itertools
import opcode
import os
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# What the host's build is told, in files of 32-bit numbers.
# The addresses of the objects to be made immortal.
OBJECTS = "objects.bin"
# The instructions that load a constant, by the addresses of their opcodes. Before
# them come the opcodes of the instruction for any constant, and of those for one that is
# immortal and for one that is not.
CONSTANTS = "constants.bin"
# The code that `watching` made older than the interpreter's events, so that it would
# be looked through when it runs, by the addresses of its version. The first one is up to date.
VERSIONS = "versions.bin"
# The code to be copied, and what refers to it: the number of code objects; address and
# length of each; for each pointer to one, its address and which one it is.
CODE = "code.bin"
# The keys that the instances of a class share, to be copied: the number of classes; the
# addresses of their pointers; the addresses of the same pointers of dictionaries.
KEYS = "keys.bin"
# The address that all that is copied to follows, and how many bytes there are.
ROOM = "room.bin"

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
_ROOM = 4 * 1024 * 1024
# More than was ever freed in one place before there is an application.
_LARGEST_HOLE = 1024 * 1024
# Bytes of a block that is worth to be given back.
_LARGE = 4096
# None is so small that there is one object for all.
_SIZES = (*(1 << power for power in range(19, 12, -1)), *range(4096, 256, -64), *range(256, 0, -8))

# The allocator of other platforms has other habits.
_KNOWN = sys.platform == "wasi"

# The places of `func_code` in a function, of `_co_instrumentation_version` in code, of
# `ht_cached_keys` in a class and of `ma_keys` in a dictionary (CPython 3.14, with pointers
# of 32 bits).
_FUNC_CODE = 24
_CODE_VERSION = 108
_CLASS_KEYS = type.__basicsize__ - 28
_DICT_KEYS = dict.__basicsize__ - 8
# Bytes of shared keys: of a table for 30 of them.
_KEYS_SIZE = 420
# Classes whose instances have their values inline, and so share keys (`object.h`,
# `Py_TPFLAGS_INLINE_VALUES`).
_SHARES_KEYS = 1 << 2
# Objects have addresses that are multiples of this.
_ALIGNMENT = 16

# Nothing in here may be freed: its address is known outside.
_kept: list[Any] = []
# The code that requests run, by address, in the order in which they do.
_run: dict[int, types.CodeType] = {}
# The classes that they make instances of, by address.
_made: dict[int, type] = {}


@contextmanager
def watching() -> Iterator[None]:
    """Notes which code runs in the block, and for which classes: as requests do.

    Nor do their attributes find others, looked up before, in the interpreter's store of them.
    """
    getattr(sys, "_clear_internal_caches", int)()
    monitoring: Any = getattr(sys, "monitoring", None)
    free = (number for number in range(6) if monitoring and monitoring.get_tool(number) is None)
    tool = next(free, None)
    # The interpreter is older, or the application has taken all.
    if tool is None:
        yield
        return

    def begins(code: types.CodeType, _: int) -> Any:
        _run.setdefault(id(code), code)
        if code.co_name not in ("__init__", "__new__") or not code.co_argcount:
            return monitoring.DISABLE
        # Of all that is made here, for a class may have this from another one.
        first = sys._getframe(1).f_locals.get(code.co_varnames[0])
        kind = first if issubclass(type(first), type) else type(first)
        if type.__dict__["__flags__"].__get__(kind) & _SHARES_KEYS:
            _made.setdefault(id(kind), kind)
        return None

    monitoring.use_tool_id(tool, "wsgi-wasm build")
    monitoring.register_callback(tool, monitoring.events.PY_START, begins)
    monitoring.set_events(tool, monitoring.events.PY_START)
    try:
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.register_callback(tool, monitoring.events.PY_START, None)
        monitoring.free_tool_id(tool)


@contextmanager
def together() -> Iterator[None]:
    """Lets what is made in the block lie together."""
    if not _KNOWN:
        yield
        return
    gc.collect()
    blocks: list[Any] = []
    _fill_holes(blocks, _LARGEST_HOLE)
    yield
    # The others are for the application: an instance need not have more memory.
    _kept.extend(block for block in blocks if sys.getsizeof(block) < _LARGE)


def settle(scratch: str, more: Iterable[Any]) -> None:
    """Arranges the memory, and tells the host's build of it in the directory `scratch`.

    Requests use the functions and classes in `more` as well, and did not while `watching`.
    Nothing should be freed after it. Call it last.
    """
    if not _KNOWN:
        return
    functions = []
    for value in more:
        if type(value) is type:
            _made[id(value)] = value
            value = value.__init__
        functions.append(value)
    gc.unfreeze()
    # Empties the interpreter's own stores of freed objects, too.
    gc.collect()
    _keep_all()
    _tell(scratch, OBJECTS, map(id, _kept))
    _tell(scratch, CONSTANTS, _constants())
    _tell(scratch, VERSIONS, _versions(settle.__code__))
    needed = _tell_code(scratch, functions) + _tell_keys(scratch) + _ALIGNMENT
    gc.collect()
    _reserve()
    _fill_holes(_kept, _ROOM)
    # Not of zeros: those are not in the snapshot.
    room = b"\xff" * needed
    # The bytes begin where the size of an empty object ends, but for the final NUL.
    _tell(scratch, ROOM, (id(room) + bytes.__basicsize__ - 1, needed))
    _kept.append(room)
    del needed
    # What it uses itself in the first one is in store after it.
    _empty_stores()
    _empty_stores()
    # The remains of all that, and what it has taken of the room.
    bytes(_ROOM)
    gc.freeze()


def _tell(scratch: str, name: str, numbers: Iterable[int]) -> None:
    """Writes a file for the host's build."""
    numbers = iter(numbers)
    with open(os.path.join(scratch, name), "wb") as file:
        # All at once would need megabytes.
        while piece := array.array("I", itertools.islice(numbers, 1024)):
            file.write(piece)


def _keep_all() -> None:
    """Puts all objects that stay into `_kept`."""
    # The objects made here are not among them, being newer.
    pending: list[Any] = gc.get_objects()
    streams = {id(sys.stdin), id(sys.stdout), id(sys.stderr)}
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
        # Nobody ends an interpreter here, so nobody closes the standard streams.
        if not hasattr(kind, "__del__") or id(value) in streams:
            _kept.append(value)
        if kind is types.CodeType:
            pending += (getattr(value, name) for name in _OF_CODE)
        else:
            pending += gc.get_referents(value)
            if issubclass(kind, dict):
                # The collector does not look at keys that are all strings.
                pending += dict.keys(value)


def _constants() -> Iterator[int]:
    """Yields the numbers for `CONSTANTS`."""
    special: dict[str, int] = opcode._specialized_opmap  # type: ignore[attr-defined]
    load, mortal = opcode.opmap["LOAD_CONST"], special["LOAD_CONST_MORTAL"]
    yield from (load, special["LOAD_CONST_IMMORTAL"], mortal)
    sizes = _cache_sizes()
    for code in _kept_of(types.CodeType):
        # They are the end of the object, and have two bytes each: opcode and argument. Not
        # from `co_code`, of which each code object that was asked for it keeps a copy.
        start = id(code) + types.CodeType.__basicsize__
        opcodes: bytes = code._co_code_adaptive[::2]
        if load not in opcodes and mortal not in opcodes:
            continue
        place, end = 0, len(opcodes)
        while place < end:
            number = opcodes[place]
            if number in (load, mortal):
                yield start + 2 * place
            place += 1 + sizes[number]


def _versions(current: types.CodeType) -> Iterator[int]:
    """Yields the addresses of the versions of `current` and of the code that did not run
    while `watching`: what did has run again since, or has to be looked through."""
    yield id(current) + _CODE_VERSION
    if any(map(sys.monitoring.get_tool, range(6))):
        # The application watches, too.
        return
    for code in _kept_of(types.CodeType):
        if id(code) not in _run:
            yield id(code) + _CODE_VERSION


def _tell_code(scratch: str, functions: Iterable[Any]) -> int:
    """Writes `CODE`; returns how much room the code needs."""
    kept = set(map(id, _kept_of(types.CodeType)))
    order: dict[int, int] = {}
    sizes = array.array("I")
    room = 0
    for code in (*_run.values(), *(function.__code__ for function in functions)):
        address = id(code)
        if address in kept and address not in order:
            order[address] = len(order)
            size: int = types.CodeType.__basicsize__ + len(code._co_code_adaptive)  # type: ignore[attr-defined]
            sizes.extend((address, size))
            room += size + -size % _ALIGNMENT
    _run.clear()
    pointers = array.array("I")
    for function in _kept_of(types.FunctionType):
        place = order.get(id(function.__code__))
        if place is not None:
            pointers.extend((id(function) + _FUNC_CODE, place))
    for code in _kept_of(types.CodeType):
        constants = code.co_consts
        for index, constant in enumerate(constants):
            place = order.get(id(constant))
            if place is not None:
                pointers.extend((id(constants) + tuple.__basicsize__ + 4 * index, place))
    _tell(scratch, CODE, itertools.chain([len(order)], sizes, pointers))
    return room


def _tell_keys(scratch: str) -> int:
    """Writes `KEYS`; returns how much room the keys need."""
    classes = array.array("I", (address + _CLASS_KEYS for address in _made))
    count = len(classes)
    # One of a request's own would be gone.
    _kept.extend(_made.values())
    _made.clear()
    # Of an instance's dictionary: which those are, only the host can see.
    dictionaries = (id(value) + _DICT_KEYS for value in _kept_of(dict))
    _tell(scratch, KEYS, itertools.chain([count], classes, dictionaries))
    return count * (_KEYS_SIZE + -_KEYS_SIZE % _ALIGNMENT)


def _kept_of(kind: type) -> Iterator[Any]:
    return (value for value in _kept if type(value) is kind)


def _cache_sizes() -> bytes:
    """Returns for each opcode how many units its inline cache has."""
    numbers = {**opcode.opmap, **opcode._specialized_opmap}  # type: ignore[attr-defined]
    sizes = bytearray(256)
    for name, size in opcode._inline_cache_entries.items():  # type: ignore[attr-defined]
        for each in (name, *opcode._specializations.get(name, ())):  # type: ignore[attr-defined]
            sizes[numbers[each]] = size
    return bytes(sizes)


def _fill_holes(blocks: list[Any], above: int) -> None:
    """Puts blocks into all memory that was freed, but for what is above the rest.

    There is to be so much; more than is free in one place below.
    """
    top = id(bytes(above))
    for size in _SIZES:
        while id(block := bytes(size)) < top:
            blocks.append(block)
    while id(small := object()) < top:
        blocks.append(small)


def _reserve() -> None:
    """Lets `_kept` have room for what comes, for it leaves a hole when it moves."""
    count = len(_kept)
    _kept.extend(itertools.repeat(None, count // 4))
    # A list keeps its memory as long as half of it is in use.
    del _kept[count:]


def _empty_stores() -> None:
    """Uses up the freed objects that the interpreter has in store for the next ones of
    their kind: those are what has been used to fill the holes."""
    numbers = range(1000, 1100)
    # A type that is called allocates; what is asked for an object takes from the store.
    from_keys = dict.fromkeys
    _kept.append(from_keys)
    for made in (
        map(int.__add__, numbers, numbers),
        map(float, numbers),
        map(list.copy, itertools.repeat([], 100)),
        map(dict.copy, itertools.repeat({"k": None}, 100)),
        map(from_keys, itertools.repeat("k", 100)),
        map(iter, itertools.repeat([], 20)),
        map(iter, itertools.repeat((0,), 20)),
        map(slice, numbers),
        map(getattr, itertools.repeat([], 20), itertools.repeat("append")),
        map(getattr, itertools.repeat(dict, 20), itertools.repeat("fromkeys")),
        map(_empty_stores.__get__, numbers),
    ):
        _kept.extend(made)
    for length in range(1, 20):
        _kept.extend(map(tuple, itertools.repeat(range(length), 20)))
