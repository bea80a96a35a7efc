"""The soft stop: an exception in the application shortly before the host's hard stop.

The host ends an instance whose time is up, which leaves no traceback. So the
application gets `RequestTimeout` a little earlier, where that is possible:

- In `time.sleep`.
- In Python code that creates containers: the garbage collector runs now and
  then, and its callback asks the host for the time that is left. When there is
  none, `sys.monitoring` raises the exception at the next line of the
  application. Asking costs nothing in between, unlike a trace function.

A loop over plain numbers, a regular expression or a call that waits for the
network meets only the hard stop.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from types import CodeType
from typing import Any


class RequestTimeout(BaseException):
    """The request takes too long; its instance will be stopped in a moment.

    Not an `Exception`, so that a handler for any error does not swallow it.
    """


_MESSAGE = "the request takes longer than the host allows"
# One of the numbers that PEP 669 leaves without a meaning.
_TOOL = 4
_OWN = os.path.dirname(__file__) + os.sep

# Returns the microseconds that are left. None while the app is built.
_time_left: Callable[[], int] | None = None
_sleep = time.sleep


def install() -> None:
    """Puts a `time.sleep` in place that ends in time; the application may import its name."""
    time.sleep = sleep


def arm(time_left: Callable[[], int]) -> None:
    """Begins to ask `time_left` for the microseconds that are left."""
    global _time_left
    _time_left = time_left
    gc.callbacks.append(_collected)


def sleep(seconds: Any, /) -> None:
    """Sleeps, but no longer than the request may take."""
    if _time_left is None or not isinstance(seconds, int | float):
        _sleep(seconds)
        return
    left = _time_left() / 1_000_000
    end = time.monotonic() + seconds
    # What is left may be processor time, of which sleep takes none.
    while seconds > left > 0:
        _sleep(left)
        seconds = max(0.0, end - time.monotonic())
        left = _time_left() / 1_000_000
    if left == 0:
        raise RequestTimeout(_MESSAGE)
    _sleep(seconds)


def _collected(phase: str, _info: dict[str, int]) -> None:
    if phase == "stop" and _time_left is not None and _time_left() == 0:
        _watch()


def _watch() -> None:
    """Has `_raise` called at the next line of whatever runs."""
    monitoring = sys.monitoring
    if monitoring.get_tool(_TOOL) is not None:
        # The application's own, or ours already.
        return
    events = monitoring.events
    monitoring.use_tool_id(_TOOL, "wsgi-wasm")
    for event in (events.LINE, events.JUMP, events.PY_START):
        monitoring.register_callback(_TOOL, event, _raise)
    monitoring.set_events(_TOOL, events.LINE | events.JUMP | events.PY_START)


def _raise(code: CodeType, *_: Any) -> None:
    if code.co_filename.startswith(_OWN):
        # The adapter cleans up after the application.
        return
    _stop_watching()
    raise RequestTimeout(_MESSAGE)


def _stop_watching() -> None:
    if sys.monitoring.get_tool(_TOOL) == "wsgi-wasm":
        sys.monitoring.set_events(_TOOL, 0)
        sys.monitoring.free_tool_id(_TOOL)
