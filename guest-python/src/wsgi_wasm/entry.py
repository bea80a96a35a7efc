"""The module that componentize-py makes a component of. Importing it is the build."""

from __future__ import annotations

import sys
from typing import Any

from wsgi_wasm import image, library  # noqa: F401

with image.together():
    from wsgi_wasm import build, exports, interrupt
    from wsgi_wasm.exports import Command, Handler  # noqa: F401


class _Arguments(list[str]):
    """Stands for `sys.argv` until the snapshot is made.

    componentize-py imports this module, makes an object of each exported class, and last of
    all empties `sys.argv`. What all of that has held is free by then.
    """

    def __delitem__(self, index: Any) -> None:
        super().__delitem__(index)
        sys.argv = [""]
        interrupt.arm(exports.time_left)
        build.settle(exports.application, exports.AT_RUN_TIME)


exports.application = build.main(exports.Derivation(), exports.rehearse)
sys.argv = _Arguments(sys.argv)
