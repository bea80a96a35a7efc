"""A Flask page: inheritance, a loop, links and escaping."""

from flask import Flask, render_template

application = Flask(__name__)
BOOKS = [(n, f"A book & its number {n}", f"Author {n % 7}", 10 + n / 4) for n in range(25)]


@application.get("/")
def index():
    return render_template("index.html", title="Books", books=BOOKS)


@application.get("/books/<int:number>")
def book(number):
    return render_template("index.html", title=BOOKS[number][1], books=BOOKS[number : number + 1])
