"""Keeps a dictionary for each visitor, in a signed cookie.

Not in a variable: the requests of one visitor are answered by several
instances of the application, which share nothing.
"""

import base64
import hashlib
import hmac
import json
import os
from http.cookies import CookieError, SimpleCookie

NAME = "session"


def sign(text):
    # Looked up now, not at import, whose results are kept in the built app.
    key = os.environ.get("SECRET_KEY", "for development only").encode()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def dump(session):
    text = base64.urlsafe_b64encode(json.dumps(session).encode()).decode()
    return f"{text}.{sign(text)}"


def load(environ):
    """Returns the session, an empty one if there is none or if it was tampered with."""
    try:
        text, signature = SimpleCookie(environ.get("HTTP_COOKIE", ""))[NAME].value.split(".")
    except (CookieError, KeyError, ValueError):
        return {}
    if not hmac.compare_digest(signature, sign(text)):
        return {}
    return json.loads(base64.urlsafe_b64decode(text))


def with_sessions(app):
    """Gives `app` the dictionary `environ["session"]`; what it puts there is there next time."""

    def serve(environ, start_response):
        session = environ["session"] = load(environ)
        before = dump(session)

        def start(status, headers, exc_info=None):
            if dump(session) != before:
                cookie = f"{NAME}={dump(session)}; Path=/; HttpOnly; SameSite=Lax"
                headers = [*headers, ("Set-Cookie", cookie)]
            return start_response(status, headers, exc_info)

        return app(environ, start)

    return serve
