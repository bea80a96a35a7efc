"""A Bottle app with what such apps are made of."""

import hashlib
import os
from random import getrandbits

import bottle

app = bottle.Bottle()
HERE = os.path.dirname(os.path.abspath(__file__))
bottle.TEMPLATE_PATH[:] = [os.path.join(HERE, "views")]


def secret():
    """The key for signed cookies; at import it would be the build's."""
    return os.environ.get("SECRET_KEY", "not a secret")


@app.get("/")
def index():
    return "Hello from Bottle"


@app.get("/drawn")
def drawn():
    return str(getrandbits(64))


@app.get("/greet/<name>")
def greet(name):
    return bottle.template("greet", name=name, times=int(bottle.request.query.times or 1))


@app.get("/json/<number:int>")
def as_json(number):
    return {"number": number, "list": bottle.request.query.getall("item")}


@app.post("/form")
def form():
    fields = bottle.request.forms.decode("utf-8")
    return {name: fields.getall(name) for name in fields}


@app.put("/json")
def json_body():
    return {"got": bottle.request.json}


@app.get("/count")
def count():
    seen = int(bottle.request.get_cookie("count", default=0, secret=secret()))
    bottle.response.set_cookie("count", str(seen + 1), secret=secret(), path="/", httponly=True)
    return f"{seen} before"


@app.post("/upload")
def upload():
    sent = bottle.request.files.get("file")
    digest, path = hashlib.sha256(), os.path.join("/tmp", sent.filename)
    sent.save(path, overwrite=True)
    with open(path, "rb") as file:
        while piece := file.read(65536):
            digest.update(piece)
    return {"name": sent.raw_filename, "size": os.path.getsize(path), "sha256": digest.hexdigest()}


@app.get("/static/<path:path>")
def static(path):
    return bottle.static_file(path, root=os.path.join(HERE, "static"))


@app.get("/stream")
def stream():
    bottle.response.content_type = "text/plain; charset=utf-8"
    for number in range(3):
        yield f"piece {number}\n"


@app.get("/moved")
def moved():
    bottle.redirect("/json/1", 301)


@app.get("/forbidden")
def forbidden():
    bottle.abort(403, "not for you")


@app.get("/fail")
def fail():
    raise RuntimeError("a secret of the app")


@app.error(403)
@app.error(404)
def refused(error):
    bottle.response.content_type = "text/plain; charset=utf-8"
    return f"{error.status_code}: {error.body}"


@app.hook("after_request")
def mark():
    bottle.response.set_header("X-Hook", "ran")
