"""A blueprint with templates of its own: people who log in."""

import json

from flask import Blueprint, flash, redirect, render_template, request, session, url_for
from werkzeug.security import check_password_hash, generate_password_hash

members = Blueprint("members", __name__, template_folder="templates")
USERS = "/data/users.json"


def users():
    try:
        with open(USERS) as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


@members.post("/register")
def register():
    everybody = users()
    everybody[request.form["name"]] = generate_password_hash(request.form["password"])
    with open(USERS, "w") as file:
        json.dump(everybody, file)
    flash("You are registered.", "good")
    return redirect(url_for(".login"))


@members.route("/login", methods=["GET", "POST"])
def login():
    if request.method == "POST":
        name = request.form["name"]
        if check_password_hash(users().get(name, ""), request.form["password"]):
            session.clear()
            session["name"] = name
            flash(f"Welcome, {name}.", "good")
            return redirect(url_for("index"))
        flash("Wrong name or password.", "bad")
        return render_template("members/login.html"), 401
    return render_template("members/login.html")


@members.post("/logout")
def logout():
    session.pop("name")
    return redirect(url_for("index"))
