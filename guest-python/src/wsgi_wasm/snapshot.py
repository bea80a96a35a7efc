"""What must not be frozen in a snapshot that a thousand instances start from.

Security rests on this module: state that is secret or unique in an ordinary
process, and is in the snapshot, is equal in all instances and readable in the
artifact. `prepare` runs before the application is imported, `freeze` after its
warm-up, `seed_late` right before the snapshot, `renew` on the first call into
every instance.

Renewed: generators of the class `random.Random` that were seeded from the
system's entropy (those with a seed of their own keep it, for the application
wants their sequence), the names of temporary files, the state of `uuid`, and
the environment that the application set. componentize-py itself renews the
host's part of the environment, and has `seed_module` renew the module-level
generator of `random`; `sqlite` replaces the random values of SQL.

Not renewed: the seed of `hash(str)`, so each build has another one; values
that the application computed from entropy at import, such as
`SECRET_KEY = os.urandom(32)` or `Random(os.urandom(8))`.
"""

from __future__ import annotations

import gc
import importlib
import io
import linecache
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from wsgi_wasm import sqlite

stale = False
"""Whether this is an instance that `renew` has not been called in."""

NETWORK_DENIED = "network access while the app is being built"
"""What the message of the PermissionError for a socket at build time starts with."""

# The generators to renew; held until then only.
_generators: list[random.Random] = []
# What the application set in `os.environ` while it was imported.
_environment: dict[str, str] = {}

_seed = random.Random.seed
# The one of the functions of `random`.
_module_generator: random.Random = random._inst  # type: ignore[attr-defined]
_building: _Building | None = None


def prepare() -> None:
    """Begins to watch what the application does while it is imported."""
    global _building
    _building = _Building()
    random.seed = seed_module
    # The layers are read-only at run time; at build time `build` compiles.
    sys.dont_write_bytecode = True


def freeze() -> list[str]:
    """Makes the interpreter fit for the snapshot; returns warnings.

    Right after it the memory is copied.
    """
    global _building, stale
    assert _building is not None
    watched, _building = _building, None
    watched.undo()
    # Or what the application froze is found by nobody below.
    gc.unfreeze()

    _environment.clear()
    _environment.update({
        name: value
        for name, value in os.environ.items()
        if watched.environment.get(name) != value
    })  # fmt: skip
    _reset_modules()
    sqlite.forget()
    linecache.clearcache()
    # The finders remember listings and times of directories that are other
    # file systems at run time.
    importlib.invalidate_caches()
    sys.path_importer_cache.clear()
    # `do_init` of componentize-py fails if there is more than one argument.
    sys.argv = [""]

    gc.collect()
    _generators[:] = [
        value for value in _instances(random.Random)
        # SystemRandom has no state.
        if not isinstance(value, random.SystemRandom) and not watched.is_explicit(value)
        # That is for `seed_module`.
        and value is not _module_generator
    ]  # fmt: skip
    warnings = watched.leftovers()
    del watched
    stale = True
    # Everything alive is in the snapshot for good. A collector that need not
    # look at it does not touch its pages, which instances share until they do.
    gc.collect()
    gc.freeze()
    return warnings


def renew() -> None:
    """Makes this instance differ from all others; the first exported call needs it."""
    global stale
    stale = False
    # Most have none of either, and in a fresh instance each function that is called for
    # the first time costs as much as a hundred others.
    if _generators:
        for generator in _generators:
            _seed(generator, _entropy())
        _generators.clear()
    if _environment:
        for name, value in _environment.items():
            # The operator's word counts more than the application's default.
            os.environ.setdefault(name, value)


def seed_late() -> None:
    """Lets `seed_module` seed only when somebody looks at `random`, if that is soon enough.

    After `freeze`, when nobody looks at it any more before the snapshot.
    """
    # Or what is frozen is found by nobody.
    gc.unfreeze()
    if not _is_held():
        random.__class__ = _Unseeded


def seed_module(a: Any = None, version: int = 2) -> None:
    """Stands for `random.seed`, which componentize-py calls before the first call."""
    # To look at the module seeds it.
    if a is None and type(random) is _Unseeded:
        return
    _seed(_module_generator, _entropy() if a is None else a, version)


class _Unseeded(types.ModuleType):
    """What `random` is until somebody looks at it in an instance.

    To seed a generator takes as long as a third of a small request, and few draw from
    this one.
    """

    def __getattribute__(self, name: str) -> Any:
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        seed_module()
        return getattr(self, name)


def _is_held() -> bool:
    """Tells whether the module-level generator can be drawn from without a look at `random`.

    As by what was imported from there by name.
    """
    namespace = vars(random)
    methods = (
        value
        for value in namespace.values()
        if getattr(value, "__self__", None) is _module_generator
    )
    all_of_it = (_module_generator, *methods)
    ours = {id(value) for value in (namespace, globals(), all_of_it, *all_of_it)}
    return (
        any(id(holder) not in ours for holder in gc.get_referrers(*all_of_it))
        or any(map(weakref.getweakrefcount, all_of_it))
        # Or `vars(random)`, which is the globals of its functions.
        or any(
            holder is not random and type(holder) is not types.FunctionType
            for holder in gc.get_referrers(namespace)
        )
    )


def _entropy() -> int:
    # Without a seed a generator fetches 2.5 kB of it, which takes twice the time.
    return int.from_bytes(os.urandom(32), "little")


@contextmanager
def rehearsal() -> Iterator[None]:
    """Lets `renew` be called in the block, and forgets that it was."""
    global stale
    was_stale, stale = stale, True
    generators = _generators[:]
    yield
    _generators[:] = generators
    stale = was_stale


class _Building:
    """What is watched and changed while the application is imported."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.descriptors = _open_descriptors()
        # Generators with a seed of their own, by id: a subclass need not be hashable.
        self._explicit: dict[int, weakref.ref[random.Random]] = {}
        # States taken from generators without one. A copy made of such a
        # state is as secret as its origin.
        self._entropic_states: set[int] = set()
        self._undo: list[Callable[[], None]] = []
        self._watch_random()
        self._deny_network()

    def undo(self) -> None:
        """Takes all changes back."""
        while self._undo:
            self._undo.pop()()

    def is_explicit(self, generator: random.Random) -> bool:
        """Tells whether `generator` got its present seed or state from the application."""
        return id(generator) in self._explicit

    def leftovers(self) -> list[str]:
        """Returns warnings for what does not survive the snapshot."""
        warnings = []
        left = _open_descriptors() - self.descriptors
        for file in _instances(io.FileIO):
            if not file.closed and file.fileno() in left:
                left.discard(file.fileno())
                warnings.append(
                    f"the file `{file.name}` is open at the end of the build; "
                    "it is closed at run time: open it when it is needed"
                )
        sqlite3 = sys.modules.get("_sqlite3")
        if sqlite3 is not None and any(_instances(sqlite3.Connection)):
            left.clear()
            warnings.append(
                "an SQLite connection is alive at the end of the build; if it is "
                "open, it is broken at run time: connect when it is needed"
            )
        if left:
            warnings.append(
                f"{len(left)} file descriptors are open at the end of the build; "
                "they are closed at run time"
            )
        return warnings

    def _watch_random(self) -> None:
        seed, getstate, setstate = _seed, random.Random.getstate, random.Random.setstate

        def mark(generator: random.Random, explicit: bool) -> None:
            key = id(generator)
            if explicit:
                forget = self._explicit.pop
                self._explicit[key] = weakref.ref(generator, lambda _: forget(key, None))
            else:
                self._explicit.pop(key, None)

        # Every constructor comes to `seed`, and every copy to both others.
        def watched_seed(
            generator: random.Random, a: Any = None, *args: Any, **options: Any
        ) -> None:
            seed(generator, a, *args, **options)
            mark(generator, a is not None)

        def watched_getstate(generator: random.Random) -> tuple[Any, ...]:
            state: tuple[Any, ...] = getstate(generator)
            if not self.is_explicit(generator):
                self._entropic_states.add(hash(state))
            return state

        def watched_setstate(generator: random.Random, state: tuple[Any, ...]) -> None:
            setstate(generator, state)
            # A state read back from JSON holds lists; what CPython makes of it counts.
            mark(generator, hash(getstate(generator)) not in self._entropic_states)

        self._replace(random.Random, "seed", watched_seed)
        self._replace(random.Random, "getstate", watched_getstate)
        self._replace(random.Random, "setstate", watched_setstate)

    def _deny_network(self) -> None:
        """Lets no handle of the build's network get into the snapshot.

        The first use of the network at run time would take such a handle for
        its own, and trap.
        """
        import _socket
        import socket

        def denied(what: str) -> PermissionError:
            return PermissionError(
                f"{NETWORK_DENIED} is denied ({what}); connect on the first request, not at import"
            )

        create = socket.socket.__init__

        def no_socket(sock: socket.socket, *args: Any, **options: Any) -> None:
            if self._undo:
                raise denied("creating a socket")
            create(sock, *args, **options)

        self._replace(socket.socket, "__init__", no_socket)
        for name in (
            "getaddrinfo", "getnameinfo", "gethostbyname", "gethostbyname_ex",
            "gethostbyaddr", "socketpair",
        ):  # fmt: skip
            original = getattr(_socket, name, None)
            if original is None:
                continue

            def no_lookup(
                *args: Any, _original: Any = original, _name: str = name, **options: Any
            ) -> Any:
                # After the build for one who kept it: `from socket import ..`.
                if self._undo:
                    raise denied(_name)
                return _original(*args, **options)

            # The Python functions of `socket` look these up at each call.
            self._replace(_socket, name, no_lookup)
            if getattr(socket, name, None) is original:
                self._replace(socket, name, no_lookup)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        inherited = name not in vars(owner)
        original = getattr(owner, name)
        setattr(owner, name, value)
        if inherited:
            self._undo.append(lambda: delattr(owner, name))
        else:
            self._undo.append(lambda: setattr(owner, name, original))


def _reset_modules() -> None:
    """Forgets what modules of the standard library remember about process and machine."""
    tempfile: Any = sys.modules.get("tempfile")
    if tempfile is not None:
        # The directory is another one at run time, unless the application chose it.
        if tempfile.tempdir in tempfile._candidate_tempdir_list():
            tempfile.tempdir = None
        tempfile._name_sequence = None
    uuid: Any = sys.modules.get("uuid")
    if uuid is not None:
        for name in vars(uuid):
            if name == "_node" or name.startswith(("_last_timestamp", "_last_counter")):
                setattr(uuid, name, 0 if name.startswith("_last_counter") else None)


def _instances(cls: type) -> Iterator[Any]:
    """Yields the live objects of `cls` that the collector knows."""
    for value in gc.get_objects():
        # `type()`, for `isinstance` asks an object, and a lazy proxy answers by loading.
        if issubclass(type(value), cls):
            yield value


def _open_descriptors() -> set[int]:
    """Returns the numbers of open files, up to a bound that a build does not reach."""
    numbers = set()
    for number in range(3, 256):
        try:
            os.fstat(number)
        except OSError:
            continue
        numbers.add(number)
    return numbers
