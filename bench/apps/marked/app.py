"""A Flask app of which copies can be made that differ in what they hold in memory."""

import sqlite3

from flask import Flask, render_template_string, request

application = Flask(__name__)
# Copies are made by writing another name over this one, in the snapshot. Not a
# constant of a function, of which the snapshot may have more than one.
NAME = "".join(["tenant-", "#" * 8])
PAGE = "<!doctype html><title>{{ name }}</title><ul>{% for n in range(25) %}<li>{{ n }} of {{ name }}{% endfor %}</ul>"


@application.get("/")
def index():
    return render_template_string(PAGE, name=NAME)


@application.post("/count")
def count():
    length = 0
    while piece := request.stream.read(65536):
        length += len(piece)
    return f"{NAME} {length}"


@application.get("/stream")
def stream():
    return (f"{NAME} {n}\n" for n in range(100)), {"Content-Type": "text/plain"}


@application.post("/note")
def note():
    """Writes to a database, and tells how much is in it."""
    with sqlite3.connect("/data/notes.db", timeout=20) as database:
        database.execute("create table if not exists notes (id integer primary key, text)")
        database.execute("insert into notes (text) values (?)", (request.get_data(as_text=True),))
        database.execute("delete from notes where id < (select max(id) from notes) - 100")
        (number,) = database.execute("select count(*) from notes").fetchone()
    database.close()
    return f"{NAME} {number}"
