"""The Python side of wsgi-wasm: it runs one WSGI application inside the sandbox.

At build time, once: `entry` is imported by componentize-py and calls
`build.main`. That prepares the interpreter (`snapshot.prepare`), imports the
application (`loading`), answers the warm-up requests, and leaves a heap that
is fit to be copied (`snapshot.freeze`). The memory is then written to the
artifact.

At run time, in every instance: the first exported call renews what must not
be equal in two instances (`snapshot.renew`). Each request is one call of
`wsgi.run`, with its body from `streams`; a one-off command is one call of
`command.run`. Passwords are hashed by the host (`kdf`).

All modules but `entry` and `exports`, the exported functions, run on an ordinary
CPython, which is where they are tested.
"""
