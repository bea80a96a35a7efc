"""Several applications at one address, each with its own part of the path.

PEP 3333 divides a path in two: SCRIPT_NAME is what led to the application,
PATH_INFO is what is left for it. Whoever hands a request on moves the border.
"""

import calendar
from wsgiref.util import application_uri, request_uri, shift_path_info

TEXT = [("Content-Type", "text/plain; charset=utf-8")]


def text(start_response, content, status="200 OK"):
    start_response(status, TEXT)
    return [content.encode()]


def not_found(environ, start_response):
    return text(start_response, "not found\n", "404 Not Found")


def by_segment(apps, otherwise=not_found):
    """Hands a request to the application that the next segment of its path names."""

    def dispatch(environ, start_response):
        first = environ["PATH_INFO"].strip("/").partition("/")[0]
        if first not in apps:
            return otherwise(environ, start_response)
        shift_path_info(environ)
        return apps[first](environ, start_response)

    return dispatch


def mounted(mounts, otherwise=not_found):
    """Hands a request to the application with the longest prefix of its path."""
    longest_first = sorted(mounts.items(), key=lambda mount: len(mount[0]), reverse=True)

    def dispatch(environ, start_response):
        path = environ["PATH_INFO"]
        for prefix, app in longest_first:
            rest = path.removeprefix(prefix)
            if path.startswith(prefix) and (not rest or rest.startswith("/")):
                environ["SCRIPT_NAME"] += prefix
                environ["PATH_INFO"] = rest
                return app(environ, start_response)
        return otherwise(environ, start_response)

    return dispatch


def where(environ, start_response):
    """Tells where it is mounted, and by which address it is seen."""
    return text(
        start_response,
        f"SCRIPT_NAME {environ['SCRIPT_NAME']!r}\nPATH_INFO {environ['PATH_INFO']!r}\n"
        f"application {application_uri(environ)}\nrequest {request_uri(environ)}\n",
    )


def dates(environ, start_response):
    """The calendar: `/1900` is a year, `/1900/2` one of its months."""
    year, month = shift_path_info(environ), shift_path_info(environ)
    try:
        if not year:
            return text(start_response, f"try {application_uri(environ)}/1900/2\n")
        if not month:
            return text(start_response, calendar.TextCalendar().formatyear(int(year)))
        return text(start_response, calendar.TextCalendar().formatmonth(int(year), int(month)))
    except (ValueError, IndexError):
        return not_found(environ, start_response)


def index(environ, start_response):
    base = application_uri(environ).rstrip("/")
    if environ["PATH_INFO"] not in ("", "/"):
        return not_found(environ, start_response)
    return text(start_response, "".join(f"{base}/{name}\n" for name in ("dates/", "where")))


# An application of applications is an application, and can be mounted itself.
inner = by_segment({"where": where, "dates": dates}, otherwise=index)
app = mounted(
    {"/a": where, "/a/b": where, "/inner": inner},
    otherwise=by_segment({"where": where, "dates": dates}, otherwise=index),
)
