"""The application that comes with Python: it greets, and shows its environ."""

from wsgiref.simple_server import demo_app

app = demo_app
