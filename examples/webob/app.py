"""A small site on the framework next door."""

from html import escape

from framework import Framework
from webob import Response, exc
from webob.static import FileApp

app = Framework()


@app.route("/")
def index(request):
    name = request.params.get("name", "stranger")
    return f"""<!doctype html>
<title>Hello</title>
<h1>Hello {escape(name)}!</h1>
<form method="post" action="{request.application_url}/greet"><input name="name"><button>Greet</button></form>
"""


@app.route("/greet", "POST")
def greet(request):
    response = exc.HTTPSeeOther(location=f"{request.application_url}/")
    response.set_cookie("name", request.POST.get("name", ""), max_age=60, httponly=True)
    return response


@app.route("/whoami")
def whoami(request):
    return {"name": request.cookies.get("name"), "agent": request.user_agent}


@app.route("/sum/{a:-?[0-9]+}/{b:-?[0-9]+}")
def add(request, a, b):
    return {"sum": int(a) + int(b)}


@app.route("/upload", "PUT", "POST")
def upload(request):
    return Response(text=f"{len(request.body)} bytes of {request.content_type}\n", content_type="text/plain")


@app.route("/source/{name:[a-z]+}")
def source(request, name):
    """The files of this example, with ranges and conditions, as WebOb has them."""
    if name not in ("app", "framework"):
        raise exc.HTTPNotFound(f"there is no {name}")
    return request.get_response(FileApp(f"{name}.py", content_type="text/plain"))
