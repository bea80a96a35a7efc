"""Compresses a text while it streams."""

import zlib


def accepts_gzip(environ):
    for coding in environ.get("HTTP_ACCEPT_ENCODING", "").lower().split(","):
        name, _, weight = coding.replace(" ", "").partition(";q=")
        if name == "gzip":
            # `gzip;q=0` is a refusal.
            return weight.strip("0.") != "" or not weight
    return False


def gzipped(app):
    """Compresses the texts of `app` for clients that understand it.

    Each piece can be read by the client as soon as it is sent.
    """

    def compress(environ, start_response):
        if not accepts_gzip(environ) or environ["REQUEST_METHOD"] == "HEAD":
            return app(environ, start_response)
        compressor = None

        def squeeze(piece):
            if compressor is None or not piece:
                return piece
            return compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH)

        def start(status, headers, exc_info=None):
            nonlocal compressor
            found = {name.lower(): value for name, value in headers}
            is_text = found.get("content-type", "").startswith("text/")
            if is_text and "content-encoding" not in found and status[:3] not in ("204", "304"):
                compressor = zlib.compressobj(wbits=31)
                headers = [pair for pair in headers if pair[0].lower() != "content-length"]
                headers += [("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")]
            write = start_response(status, headers, exc_info)
            return lambda data: write(squeeze(data))

        def pieces(body):
            try:
                for piece in body:
                    yield squeeze(piece)
                if compressor is not None:
                    yield compressor.flush()
            finally:
                if hasattr(body, "close"):
                    body.close()

        return pieces(app(environ, start))

    return compress
