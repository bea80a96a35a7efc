"""Random values in SQL.

The SQLite of the WASI build has no source of entropy: its generator starts
from zeros, so the first `random()` is the same number in every instance of
every app. It can not be seeded through SQL, and one that was used at import
is in the snapshot. So every connection gets `random()` and `randomblob()` from
here.

What SQLite draws for itself (names of temporary files, the nonces of journals)
stays as it is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

# As many as cost one call of the host.
_AT_ONCE = 32
# SQLite's own limit for a value.
_MAX_BLOB = 1_000_000_000

_numbers: Iterator[int] = iter(())


def install(module: Any = None) -> None:
    """Replaces the connections of `module`, which is `_sqlite3`.

    It must come before `sqlite3` is imported, which copies the names.
    """
    if module is None:
        try:
            import _sqlite3 as module
        except ImportError:
            return
    original = module.Connection
    connect_original = module.connect

    class Connection(original):  # type: ignore[misc]
        __doc__ = original.__doc__
        # As many attributes as the original has.
        __slots__ = ()

        def __init__(self, *args: Any, **options: Any) -> None:
            original.__init__(self, *args, **options)
            # The original's: a subclass may have its own idea of it.
            original.create_function(self, "random", 0, _random)
            original.create_function(self, "randomblob", 1, _randomblob)

    Connection.__module__ = original.__module__
    Connection.__qualname__ = original.__qualname__

    def connect(*args: Any, **options: Any) -> Any:
        # The sixth by position, which is deprecated.
        if len(args) < 6:
            options.setdefault("factory", Connection)
        return connect_original(*args, **options)

    connect.__doc__ = connect_original.__doc__
    connect.__module__ = connect_original.__module__
    module.Connection = Connection
    module.connect = connect


def forget() -> None:
    """Drops what is drawn already, before the snapshot."""
    global _numbers
    _numbers = iter(())


def _random() -> int:
    global _numbers
    for number in _numbers:
        return number
    _numbers = iter(struct.unpack(f"{_AT_ONCE}q", os.urandom(_AT_ONCE * 8)))
    return next(_numbers)


def _randomblob(size: Any) -> bytes:
    try:
        size = int(size or 0)
    except ValueError:
        size = 0
    if size > _MAX_BLOB:
        # Becomes "string or blob too big".
        raise OverflowError
    return os.urandom(max(size, 1))
