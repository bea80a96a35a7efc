"""Asks for a name and a password."""

import base64
import binascii
import hashlib
import hmac
import os

SALT = b"one for each user, in a real application"


def digest(password):
    return hashlib.scrypt(password, salt=SALT, n=1024, r=8, p=1)


def user_of(environ, users):
    """Returns the name of the user that a request comes from, or None."""
    scheme, _, text = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, _, password = base64.b64decode(text, validate=True).partition(b":")
    except binascii.Error:
        return None
    name = name.decode("utf-8", "replace")
    # As much work for a name that does not exist, so that nobody can find out.
    expected = users().get(name, os.urandom(64))
    return name if hmac.compare_digest(digest(password), expected) else None


def guarded(app, prefix, users):
    """Lets only `users()` (digests by name) see what is below `prefix` in `app`."""

    def guard(environ, start_response):
        path = environ["PATH_INFO"]
        if path != prefix and not path.startswith(prefix + "/"):
            return app(environ, start_response)
        user = user_of(environ, users)
        if user is None:
            headers = [("Content-Type", "text/plain"), ("WWW-Authenticate", 'Basic realm="the vault"')]
            start_response("401 Unauthorized", headers)
            return [b"who are you?\n"]
        environ["REMOTE_USER"] = user
        return app(environ, start_response)

    return guard
