"""A Falcon app with what such apps are made of."""

import hashlib
import os

import falcon


class Marked:
    """Middleware: a header in each response, a line in the log for each that fails."""

    def process_request(self, req, resp):
        req.context.trace = req.get_header("X-Trace") or "none"

    def process_response(self, req, resp, resource, req_succeeded):
        resp.set_header("X-Trace", req.context.trace)
        if not req_succeeded:
            req.log_error("not served")


class Index:
    def on_get(self, req, resp):
        resp.content_type = falcon.MEDIA_TEXT
        resp.text = "Hello from Falcon"


class Item:
    def on_get(self, req, resp, number):
        resp.media = {
            "number": number,
            "limit": req.get_param_as_int("limit", required=True, max_value=10),
            "tags": req.get_param_as_list("tag") or [],
        }

    def on_put(self, req, resp, number):
        resp.status = falcon.HTTP_201
        resp.location = f"/items/{number}"
        resp.media = {"number": number, "got": req.get_media()}

    def on_delete(self, req, resp, number):
        resp.status = falcon.HTTP_204


class Form:
    def on_post(self, req, resp):
        resp.media = req.get_media()


class Upload:
    def on_post(self, req, resp):
        parts = []
        for part in req.get_media():
            digest, size = hashlib.sha256(), 0
            while piece := part.stream.read(65536):
                digest.update(piece)
                size += len(piece)
            parts.append([part.name, part.filename, size, digest.hexdigest()])
        resp.media = parts


class Cookies:
    def on_get(self, req, resp):
        seen = int(req.cookies.get("seen", 0))
        resp.set_cookie("seen", str(seen + 1), path="/", secure=False)
        resp.unset_cookie("old", path="/")
        resp.media = seen


class Stream:
    def on_get(self, req, resp):
        resp.content_type = falcon.MEDIA_TEXT
        resp.stream = (f"piece {number}\n".encode() for number in range(3))


class Raw:
    def on_post(self, req, resp):
        resp.content_type = falcon.MEDIA_TEXT
        resp.text = str(len(req.bounded_stream.read()))


class OutOfStock(Exception):
    @staticmethod
    def handle(req, resp, error, params):
        raise falcon.HTTPConflict(title="Out of stock", description=str(error))


class Fails:
    def on_get(self, req, resp):
        if req.get_param_as_bool("known"):
            raise OutOfStock("no more of these")
        raise RuntimeError("a secret of the app")


class Redirects:
    def on_get(self, req, resp):
        raise falcon.HTTPMovedPermanently("/")


def names(req, resp, name):
    resp.media = {"path": req.path, "name": name}


app = falcon.App(middleware=[Marked()])
app.add_error_handler(OutOfStock)
app.add_route("/", Index())
app.add_route("/items/{number:int(min=1)}", Item())
app.add_route("/form", Form())
app.add_route("/upload", Upload())
app.add_route("/cookies", Cookies())
app.add_route("/stream", Stream())
app.add_route("/raw", Raw())
app.add_route("/fails", Fails())
app.add_route("/moved", Redirects())
app.add_static_route("/static", os.path.join(os.path.dirname(os.path.abspath(__file__)), "static"))
app.add_sink(names, "/names/(?P<name>.+)")
