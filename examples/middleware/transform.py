"""Changes a text while it streams."""


def is_plain_text(headers):
    return any(name.lower() == "content-type" and value.startswith("text/plain") for name, value in headers)


def shouting(app):
    """Puts all plain text of `app` in capital letters, piece by piece."""

    def shout(environ, start_response):
        change = bytes

        def start(status, headers, exc_info=None):
            nonlocal change
            # Capital letters need as much room, so that a Content-Length stays right.
            change = bytes.upper if is_plain_text(headers) else bytes
            write = start_response(status, headers, exc_info)
            return lambda data: write(change(data))

        body = app(environ, start)
        try:
            for piece in body:
                yield change(piece)
        finally:
            if hasattr(body, "close"):
                body.close()

    return shout
