"""A small Flask app: pages, a form with a session, a stylesheet, and some JSON.

It runs unchanged under `flask run`, too.
"""

import os
import sys

from flask import Flask, redirect, render_template, request, session, url_for


class Shop(Flask):
    """A Flask app with a secret key that is looked up at run time."""

    @property
    def secret_key(self):
        # What is computed at import is kept in the built app, so the key is
        # not. All instances of the app need the same one, or a session would
        # be lost with the next request. Serve anything real with
        # `--env SECRET_KEY=...`.
        return os.environ.get("SECRET_KEY", "for development only")


app = Shop(__name__)


@app.get("/")
def index():
    return render_template("index.html", name=session.get("name"), items=session.get("items", []))


@app.post("/name")
def set_name():
    session["name"] = request.form["name"].strip() or "nobody"
    return redirect(url_for("index"))


@app.post("/items")
def add_item():
    session["items"] = [*session.get("items", []), request.form["item"]]
    return redirect(url_for("index"))


@app.post("/forget")
def forget():
    session.clear()
    return redirect(url_for("index"))


@app.get("/api/items")
def items():
    return {"name": session.get("name"), "items": session.get("items", [])}


@app.get("/about")
def about():
    return render_template("about.html", python=sys.version.split()[0], platform=sys.platform)


@app.errorhandler(404)
def not_found(error):
    return render_template("not_found.html", path=request.path), 404
