"""A web framework in sixty lines, on WebOb's requests and responses."""

import re

from webob import Request, Response, exc

# `{name}` stands for a segment of a path, `{name:regex}` for what matches.
VARIABLE = re.compile(r"\{(\w+)(?::([^}]+))?\}")


def pattern_of(template):
    """Returns the regular expression for a path such as `/users/{id:[0-9]+}`."""
    pattern, end = "", 0
    for variable in VARIABLE.finditer(template):
        pattern += re.escape(template[end : variable.start()])
        pattern += f"(?P<{variable[1]}>{variable[2] or '[^/]+'})"
        end = variable.end()
    return re.compile(pattern + re.escape(template[end:]))


class Framework:
    """A WSGI application made of controllers.

    A controller takes a `webob.Request` and the variables of its path, and
    returns a response: text, something for JSON, or a `webob.Response`.
    """

    def __init__(self):
        self.routes = []

    def route(self, template, *methods):
        """Makes a function the controller for `template`."""

        def add(controller):
            self.routes.append((pattern_of(template), methods or ("GET", "HEAD"), controller))
            return controller

        return add

    def respond(self, request):
        allowed = set()
        for pattern, methods, controller in self.routes:
            if match := pattern.fullmatch(request.path_info or "/"):
                if request.method in methods:
                    return controller(request, **match.groupdict())
                allowed.update(methods)
        if allowed:
            raise exc.HTTPMethodNotAllowed(headers={"Allow": ", ".join(sorted(allowed))})
        raise exc.HTTPNotFound()

    def __call__(self, environ, start_response):
        request = Request(environ)
        try:
            response = self.respond(request)
        except exc.HTTPException as error:
            response = error
        if isinstance(response, str):
            response = Response(text=response)
        elif isinstance(response, dict | list):
            response = Response(json=response)
        return response(environ, start_response)
