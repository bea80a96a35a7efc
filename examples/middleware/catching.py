"""Makes a page of an exception."""

import sys
import traceback

HEADERS = [("Content-Type", "text/html; charset=utf-8")]
PAGE = b"<!doctype html>\n<title>Sorry</title>\n<p>Something broke. We have written down what.\n"


def catching(app):
    """Answers with a page if `app` fails; the traceback goes to the log."""

    def catch(environ, start_response):
        body = ()
        try:
            body = app(environ, start_response)
            yield from body
        except Exception:
            traceback.print_exc(file=environ["wsgi.errors"])
            # Raises again if the head is out: then only the server can tell
            # the client that this is not all, by cutting the connection.
            start_response("500 Internal Server Error", HEADERS, sys.exc_info())
            yield PAGE
        finally:
            if hasattr(body, "close"):
                body.close()

    return catch
