"""A Flask app with what such apps are made of."""

import hashlib
import io
import os
import sys
from datetime import datetime, timedelta, timezone

from flask import (
    Flask,
    abort,
    flash,
    g,
    jsonify,
    make_response,
    redirect,
    render_template,
    request,
    send_file,
    session,
    stream_with_context,
    url_for,
)
from werkzeug.exceptions import HTTPException

from members import members


class App(Flask):
    @property
    def secret_key(self):
        """Looked up at run time: at import it would be the build's."""
        return os.environ.get("SECRET_KEY", "not a secret")


app = App(__name__)
app.register_blueprint(members, url_prefix="/members")


@app.before_request
def begin():
    g.steps = ["before"]


@app.after_request
def mark(response):
    if "steps" in g:
        response.headers["X-Steps"] = " ".join([*g.steps, "after"])
    return response


@app.teardown_request
def end(error):
    print("teardown", request.path, type(error).__name__, file=sys.stderr)


@app.context_processor
def site():
    return {"site": "Test"}


@app.template_filter("shout")
def shout(text):
    return text.upper() + "!"


@app.get("/")
def index():
    g.steps.append("index")
    return render_template("index.html", name=session.get("name"))


@app.get("/late")
def late():
    """A template, a macro of it and a module, all for the first time."""
    return render_template("late.html", rows=[("one", 1), ("<two>", 2)])


@app.get("/numbers")
def numbers():
    def generate():
        for number in range(int(request.args["upto"])):
            yield f"{number} {request.path} {' '.join(g.steps)}\n"

    return stream_with_context(generate()), {"Content-Type": "text/plain; charset=utf-8"}


@app.post("/upload")
def upload():
    sent = request.files["file"]
    digest = hashlib.sha256()
    while piece := sent.stream.read(65536):
        digest.update(piece)
    on_disk = isinstance(getattr(sent.stream, "_file", sent.stream), io.BytesIO) is False
    sent.stream.seek(0)
    sent.save("/tmp/copy")
    return {
        "name": sent.filename,
        "type": sent.mimetype,
        "size": os.path.getsize("/tmp/copy"),
        "sha256": digest.hexdigest(),
        "on_disk": on_disk,
        "title": request.form["title"],
    }


@app.get("/copy")
def copy():
    return send_file("/tmp/copy", mimetype="image/png")


@app.route("/form", methods=["GET", "POST"])
def form():
    values = request.values
    return jsonify({name: values.getlist(name) for name in sorted(values)})


@app.get("/straße/<name>")
def street(name):
    return jsonify(name=name, url=url_for("street", name="grün & blau", nummer="9½"))


@app.get("/square/<int(max=100):number>")
def square(number):
    return str(number * number)


@app.get("/rest/<path:rest>")
def rest(rest):
    return rest


@app.get("/with-slash/")
def with_slash():
    return "slash"


@app.post("/api/sum")
def api_sum():
    numbers = request.get_json()["numbers"]
    return jsonify(sum=sum(numbers), text="½")


@app.get("/download")
def download():
    return send_file(
        io.BytesIO(b"a,b\n1,2\n"), mimetype="text/csv", as_attachment=True, download_name="tàble.csv"
    )


@app.get("/cookie")
def cookie():
    response = make_response(request.cookies.get("flavour", "none"))
    response.set_cookie("flavour", "lemon", max_age=timedelta(hours=1), samesite="Lax", path="/cookie")
    response.last_modified = datetime(2020, 2, 29, 12, tzinfo=timezone.utc)
    return response


@app.get("/moved")
def moved():
    flash("You were moved.")
    return redirect(url_for("index", _anchor="here"), 303)


@app.get("/refuse/<int:code>")
def refuse(code):
    abort(code, description="No.")


@app.get("/fail")
def fail():
    raise RuntimeError("a secret of the app")


@app.get("/log")
def log():
    app.logger.warning("careful with %s", request.args["what"])
    return "logged"


class OutOfStock(Exception):
    pass


@app.get("/sold-out")
def sold_out():
    raise OutOfStock("no more lemons")


@app.errorhandler(OutOfStock)
def out_of_stock(error):
    return {"error": str(error)}, 409


@app.errorhandler(HTTPException)
def failed(error):
    if request.path.startswith("/api/"):
        return {"code": error.code, "error": error.name}, error.code
    return error


@app.errorhandler(404)
def not_found(error):
    return render_template("not_found.html"), 404
