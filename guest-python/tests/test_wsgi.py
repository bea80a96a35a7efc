import gc
import io
import itertools
import os
import sys
import tempfile
import unittest
import weakref
from wsgiref.validate import validator

from tests.support import Host, block
from wsgi_wasm import wsgi
from wsgi_wasm.streams import BodyTooLarge

PLAIN = [("Content-Type", "text/plain")]


def run(application, host=None, body=b"", **variables):
    """Returns (answer, host)."""
    host = host or Host()
    return wsgi.run(application, block(**variables), body, host), host


def starting(chunks, status="200 OK", headers=PLAIN):
    """Returns an application that answers with `chunks`."""

    def application(environ, start_response):
        start_response(status, list(headers))
        return chunks

    return application


class Closing:
    """An iterable with `close`, which counts."""

    def __init__(self, chunks, error=None):
        self.chunks = chunks
        self.closed = 0
        self.error = error

    def __iter__(self):
        return iter(self.chunks)

    def close(self):
        self.closed += 1
        if self.error:
            raise self.error


class Environ(unittest.TestCase):
    def environ(self, **arguments):
        seen = {}

        def application(environ, start_response):
            seen.update(environ)
            start_response("200 OK", [])
            return []

        run(application, **arguments)
        return seen

    def test_variables_are_latin_1_native_strings(self):
        seen = self.environ(PATH_INFO="/\xe4\xff", QUERY_STRING="")
        self.assertEqual(seen["PATH_INFO"], "/\xe4\xff")
        self.assertEqual(seen["QUERY_STRING"], "")
        self.assertEqual(seen["wsgi.url_scheme"], "http")
        self.assertNotIn("", seen)

    def test_objects(self):
        seen = self.environ()
        self.assertEqual(seen["wsgi.version"], (1, 0))
        self.assertIs(seen["wsgi.multithread"], False)
        self.assertIs(seen["wsgi.multiprocess"], True)
        self.assertIs(seen["wsgi.run_once"], False)
        self.assertIs(seen["wsgi.input_terminated"], True)
        self.assertIs(seen["wsgi.errors"], sys.stderr)
        self.assertEqual(seen["wsgi.input"].read(), b"")
        self.assertEqual(list(seen["wsgi.file_wrapper"](io.BytesIO(b"ab"), 1)), [b"ab"])

    def test_a_request_does_not_see_the_environ_of_another(self):
        def application(environ, start_response):
            self.assertNotIn("mine", environ)
            environ["mine"] = environ["wsgi.version"] = 1
            start_response("200 OK", [])
            return []

        for _ in range(3):
            answer, host = run(application)
            self.assertTrue(answer, host.logged)
        self.assertEqual(self.environ()["wsgi.version"], (1, 0))

    def test_environs_look_the_same_however_often_their_names_came(self):
        wsgi.forget_shapes()
        first, *others = (self.environ(HTTP_X="1") for _ in range(3))
        for seen in others:
            for of_one_request in ("wsgi.input", "wsgi.early_hints"):
                seen[of_one_request] = first[of_one_request]
            self.assertEqual(list(seen.items()), list(first.items()))

    def test_a_few_names_are_remembered(self):
        wsgi.forget_shapes()
        self.addCleanup(wsgi.forget_shapes)
        for number in range(1000):
            self.environ(**{f"HTTP_X_{number}": ""})
        self.assertLess(len(wsgi._shapes), 100)

    def test_an_environ_is_freed_with_its_request(self):
        class Marker:
            pass

        seen = []

        def application(environ, start_response):
            environ["mine"] = marker = Marker()
            seen.append(weakref.ref(marker))
            start_response("200 OK", [])
            return environ["wsgi.file_wrapper"](io.BytesIO(b"x"))

        gc.disable()
        self.addCleanup(gc.enable)
        answer, host = run(application)
        self.assertEqual(host.logged, "")
        self.assertIsNone(seen[0]())

    def test_environ_is_a_dict(self):
        answer, host = run(
            lambda environ, start_response: (
                start_response("200 OK", []) and [type(environ).__name__.encode()]
            )
        )
        self.assertTrue(answer.endswith(b"\r\n\r\ndict"), host.logged)


class Whole(unittest.TestCase):
    def test_list(self):
        answer, host = run(validator(starting([b"hello"])))
        # The validator wraps the list, so this one is streamed.
        self.assertEqual(host.body, b"hello", host.logged)
        answer, host = run(starting([b"hel", b"", b"lo"]))
        self.assertEqual(
            answer,
            b"Status: 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello",
        )
        self.assertEqual(host.events, [])

    def test_tuple_and_empty(self):
        self.assertTrue(run(starting((b"a",)))[0].endswith(b"Content-Length: 1\r\n\r\na"))
        self.assertTrue(run(starting([]))[0].endswith(b"Content-Length: 0\r\n\r\n"))

    def test_bytes_subclass(self):
        class Sub(bytes):
            pass

        answer, _ = run(starting([Sub(b"x")]))
        self.assertIs(type(answer), bytes)
        self.assertTrue(answer.endswith(b"\r\n\r\nx"))

    def test_declared_length_is_kept_once(self):
        answer, _ = run(starting([b"hello"], headers=[("content-length", "5")]))
        self.assertEqual(answer.lower().count(b"content-length"), 1)

    def test_order_and_repetition_of_headers(self):
        headers = [("Set-Cookie", "a=1"), ("X", "y"), ("Set-Cookie", "b=2")]
        answer, _ = run(starting([], headers=headers))
        self.assertIn(b"\r\nSet-Cookie: a=1\r\nX: y\r\nSet-Cookie: b=2\r\n", answer)

    def test_latin_1_value_and_tab(self):
        answer, _ = run(starting([], headers=[("X", "\xe4\tb")]))
        self.assertIn(b"X: \xe4\tb\r\n", answer)

    def test_large_body_goes_in_pieces(self):
        body = bytes(range(256)) * 4096 * 2 + b"end"
        answer, host = run(starting([body]))
        self.assertEqual(answer, b"")
        self.assertIn(b"Content-Length: %d\r\n\r\n" % len(body), host.head)
        self.assertEqual(host.body, body)
        self.assertEqual(host.kinds, ["start", "write", "write", "write", "finish"])

    def test_large_chunk_of_the_declared_length_goes_in_pieces(self):
        body = b"x" * (1024 * 1024 + 1)
        chunks = Closing([body])
        _, host = run(starting(chunks, headers=[("Content-Length", str(len(body)))]))
        self.assertEqual(host.body, body)
        self.assertEqual(host.kinds, ["start", "write", "write", "finish"])
        self.assertEqual(chunks.closed, 1)


class Stream(unittest.TestCase):
    def test_each_chunk_is_sent_before_the_next_is_asked_for(self):
        host = Host()

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            for index in range(3):
                yield b"%d" % index
                host.events.append(("asked", index))

        self.assertEqual(run(application, host)[0], b"")
        self.assertEqual(
            host.kinds,
            ["start", "write", "asked", "write", "asked", "write", "asked", "finish"],
        )

    def test_validated(self):
        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            yield b"a"
            yield b"b"

        _, host = run(validator(application))
        self.assertEqual((host.body, host.kinds[-1], host.logged), (b"ab", "finish", ""))

    def test_start_response_may_come_with_the_first_chunk(self):
        def application(environ, start_response):
            yield b""
            start_response("201 Created", PLAIN)
            yield b"x"

        _, host = run(application)
        self.assertTrue(host.head.startswith(b"Status: 201 Created\r\n"))

    def test_head_waits_for_the_first_chunk_that_is_not_empty(self):
        host = Host()

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            yield b""
            self.assertEqual(host.events, [])
            try:
                raise KeyError("x")
            except KeyError:
                start_response("500 Oops", PLAIN, sys.exc_info())
            yield b"sorry"

        run(application, host)
        self.assertTrue(host.head.startswith(b"Status: 500 Oops"))
        self.assertEqual(host.body, b"sorry")

    def test_no_chunk_at_all_is_a_whole_response(self):
        answer, host = run(starting(iter([b"", b""])))
        self.assertTrue(host.head.endswith(b"Content-Length: 0\r\n\r\n"))
        self.assertEqual((answer, host.kinds), (b"", ["whole"]))

    def test_no_length_is_added_to_a_stream(self):
        _, host = run(starting(iter([b"ab"])))
        self.assertNotIn(b"Content-Length", host.head)

    def test_a_first_chunk_of_the_declared_length_is_sent_whole_and_at_once(self):
        host = Host()

        class Chunks:
            def __iter__(self):
                yield b""
                yield b"hello"
                host.events.append(("asked", None))
                yield b""

            def close(self):
                host.events.append(("close", None))

        answer, _ = run(starting(Chunks(), headers=[("Content-Length", "5")]), host)
        self.assertEqual((answer, host.kinds), (b"", ["whole", "asked", "close"]), host.logged)
        self.assertEqual(host.body, b"hello")
        # Also for a list that has a `close`.
        chunks = type("Chunks", (list,), {"close": Chunks.close})([b"hel", b"lo"])
        for kinds, headers in (
            (["start", "write", "write", "finish", "close"], PLAIN),
            (["start", "write", "write", "finish", "close"], [("Content-Length", "5")]),
        ):
            host.events.clear()
            run(starting(chunks, headers=headers), host)
            self.assertEqual(host.kinds, kinds)

    def test_a_single_chunk_is_the_whole_body(self):
        class Sized(Closing):
            def __len__(self):
                return len(self.chunks)

        for chunks, kinds, length in (
            ([b"hello"], ["whole"], b"5"),
            ([b""], ["whole"], b"0"),
            ([b"hel", b"lo"], ["start", "write", "write", "finish"], None),
            ([b"", b"hello"], ["start", "write", "finish"], None),
        ):
            _, host = run(starting(Sized(chunks)))
            self.assertEqual((host.kinds, host.body), (kinds, b"".join(chunks)))
            expected = b"" if length is None else b"Content-Length: " + length + b"\r\n"
            self.assertTrue(host.head.endswith(b"plain\r\n" + expected + b"\r\n"), host.head)
        # HEAD has the length only if the application says it.
        _, host = run(starting(Sized([b"hello"])), REQUEST_METHOD="HEAD")
        self.assertNotIn(b"Content-Length", host.head)

        def writes(environ, start_response):
            start_response("200 OK", PLAIN)(b"a")
            return Sized([b"b"])

        self.assertEqual(run(writes)[1].kinds, ["start", "write", "write", "finish"])

        class Lying(Sized):
            def __len__(self):
                return 1

        _, host = run(starting(Lying([b"a", b"b"])))
        self.assertEqual((host.kinds, host.body), (["whole"], b"a"))
        self.assertIn("longer than its Content-Length of 1", host.logged)

    def test_a_failure_after_the_whole_body_is_only_logged(self):
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "2")])
            yield b"ok"
            raise KeyError("late")

        answer, host = run(application)
        self.assertEqual((answer, host.kinds, host.body), (b"", ["whole"], b"ok"))
        self.assertIn("KeyError: 'late'", host.logged)

    def test_a_whole_body_counts_as_sent_for_exc_info(self):
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "2")])
            yield b"ok"
            try:
                raise KeyError("late")
            except KeyError:
                start_response("500 Oops", [], sys.exc_info())
            yield b"never"

        answer, host = run(application)
        self.assertEqual((answer, host.kinds, host.body), (b"", ["whole"], b"ok"))
        self.assertIn("KeyError: 'late'", host.logged)

    def test_no_end_is_said_twice(self):
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "2")])(b"ok")
            return []

        answer, host = run(application)
        self.assertEqual((answer, host.kinds, host.logged), (b"", ["whole"], ""))

    def test_file_wrapper(self):
        file = io.BytesIO(b"x" * 65536 + b"end")

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            return environ["wsgi.file_wrapper"](file, 4)

        _, host = run(application)
        self.assertEqual([data for _, data in host.events[1:3]], [b"x" * 65536, b"end"])
        self.assertTrue(file.closed)


class Files(unittest.TestCase):
    """`wsgi.file_wrapper` with files that the host can send."""

    SIZE = 200_000

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "file")
        self.content = os.urandom(self.SIZE)
        with open(self.path, "wb") as file:
            file.write(self.content)

    def serve(self, host=None, headers=PLAIN, position=0, path=None, **variables):
        self.file = open(path or self.path, "rb")
        self.addCleanup(self.file.close)
        self.file.seek(position)

        def application(environ, start_response):
            start_response("200 OK", list(headers))
            return environ["wsgi.file_wrapper"](self.file)

        answer, host = run(application, host, **variables)
        self.assertTrue(self.file.closed)
        self.assertEqual(host.logged, "")
        return answer, host

    def test_the_host_sends_it(self):
        answer, host = self.serve()
        head = b"Status: 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 200000\r\n\r\n"
        self.assertEqual(host.events, [("send_file", (head, self.path, 0, self.SIZE))])
        self.assertEqual(answer, b"")

    def test_from_its_position(self):
        _, host = self.serve(position=100_000)
        head, path, offset, length = host.events[0][1]
        self.assertIn(b"Content-Length: 100000\r\n", head)
        self.assertEqual((path, offset, length), (self.path, 100_000, 100_000))

    def test_as_much_as_the_length_says(self):
        declared = [("Content-Length", "70000")]
        _, host = self.serve(headers=declared, position=5)
        self.assertEqual(host.events[0][1][2:], (5, 70_000))
        # Also without the host's help.
        _, host = self.serve(Host(sends_files=False), declared, position=5)
        self.assertEqual(host.body, self.content[5:70_005])
        self.assertEqual(host.kinds[-1], "finish")

    def test_a_small_one_is_read_here(self):
        _, host = self.serve(position=self.SIZE - 10)
        self.assertEqual(host.body, self.content[-10:])
        self.assertIn(b"Content-Length: 10\r\n", host.head)
        self.assertEqual(host.kinds, ["whole"])
        _, host = self.serve(position=self.SIZE)
        self.assertTrue(host.head.endswith(b"Content-Length: 0\r\n\r\n"))

    def test_the_host_can_not(self):
        answer, host = self.serve(Host(sends_files=False))
        self.assertIn(b"Content-Length: 200000\r\n", host.head)
        self.assertEqual(host.body, self.content)
        self.assertEqual(host.kinds[-1], "finish")

    def test_no_real_file(self):
        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            return environ["wsgi.file_wrapper"](io.BytesIO(self.content))

        _, host = run(application)
        self.assertEqual(host.body, self.content)
        self.assertNotIn(b"Content-Length", host.head)

    def test_shorter_than_declared_is_a_failure_before_the_head(self):
        file = open(self.path, "rb")

        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "200001")])
            return environ["wsgi.file_wrapper"](file)

        answer, host = run(application)
        self.assertEqual((answer, host.events), (b"", []))
        self.assertIn("Content-Length is 200001", host.logged)
        self.assertTrue(file.closed)

    def test_nothing_is_read_for_a_head_request(self):
        _, host = self.serve(REQUEST_METHOD="HEAD")
        self.assertTrue(host.head.endswith(b"\r\nContent-Length: 200000\r\n\r\n"))
        self.assertEqual((host.kinds, host.body), (["whole"], b""))

    def test_after_write(self):
        file = open(self.path, "rb")

        def application(environ, start_response):
            start_response("200 OK", PLAIN)(b"first")
            return environ["wsgi.file_wrapper"](file)

        _, host = run(application)
        self.assertEqual(host.body, b"first" + self.content)
        self.assertNotIn("send_file", host.kinds)

    def test_the_client_is_gone(self):
        file = open(self.path, "rb")

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            return environ["wsgi.file_wrapper"](file)

        answer, host = run(application, Host(gone_after=0))
        self.assertEqual((answer, host.events), (b"", []))
        self.assertIn("stopped", host.logged)
        self.assertTrue(file.closed)

    def test_before_start_response(self):
        with open(self.path, "rb") as file:
            answer, host = run(lambda environ, _: environ["wsgi.file_wrapper"](file))
        self.assertEqual((answer, host.events), (b"", []))
        self.assertIn("before start_response", host.logged)


class EarlyHints(unittest.TestCase):
    HINTS = [("Link", "</a.css>; rel=preload; as=style"), ("link", "</b.js>; rel=preload")]

    def hint(self, headers, **variables):
        errors = []

        def application(environ, start_response):
            try:
                environ["wsgi.early_hints"](headers)
            except Exception as error:
                errors.append(error)
            start_response("200 OK", PLAIN)
            return [b"x"]

        answer, host = run(application, **variables)
        self.assertTrue(answer.endswith(b"\r\n\r\nx"), host.logged)
        return host.events, errors

    def test_are_sent_at_once(self):
        events, errors = self.hint(self.HINTS)
        lines = b"Link: </a.css>; rel=preload; as=style\r\nlink: </b.js>; rel=preload\r\n"
        self.assertEqual((events, errors), ([("early_hints", lines)], []))

    def test_are_checked(self):
        for bad, kind in (
            ([("Connection", "close")], ValueError),
            ([("X", "a\r\nb")], ValueError),
            ([("Content-Length", "1")], ValueError),
            ([("X", 1)], TypeError),
            ((("X", "1"),), TypeError),
        ):
            events, errors = self.hint(bad)
            self.assertEqual((events, [type(error) for error in errors]), ([], [kind]))

    def test_only_where_they_can_be_sent(self):
        for protocol in ("HTTP/1.0", "HTTP/2.0"):
            events, errors = self.hint(self.HINTS, SERVER_PROTOCOL=protocol)
            self.assertEqual([type(error) for error in errors], [KeyError])

    def test_not_after_the_response_began(self):
        def application(environ, start_response):
            start_response("200 OK", PLAIN)(b"x")
            with self.assertRaisesRegex(RuntimeError, "before the response"):
                environ["wsgi.early_hints"](self.HINTS)
            return []

        _, host = run(application)
        self.assertEqual(host.logged, "")


class Length(unittest.TestCase):
    def test_too_many_bytes_are_cut(self):
        declared = [("Content-Length", "3")]
        answer, host = run(starting([b"hello"], headers=declared))
        self.assertTrue(answer.endswith(b"\r\n\r\nhel"))
        self.assertIn("longer than its Content-Length of 3", host.logged)
        for chunks, last in (
            ([b"hello"], "whole"),
            ([b"he", b"llo"], "finish"),
            ([b"h", b"e", b"l", b"l", b"o"], "finish"),
        ):
            _, host = run(starting(iter(chunks), headers=declared))
            self.assertEqual(host.body, b"hel")
            self.assertEqual(host.kinds[-1], last)
            self.assertEqual(host.logged.count("longer"), 1)

    def test_bytes_after_the_whole_body_are_cut(self):
        for chunks in ([b"hel", b"lo"], [b"hel", b"two"]):
            _, host = run(starting(iter(chunks), headers=[("Content-Length", "3")]))
            self.assertEqual((host.kinds, host.body), (["whole"], b"hel"))
            self.assertIn("longer", host.logged)

    def test_too_few_bytes_are_a_failure(self):
        declared = [("Content-Length", "9")]
        answer, host = run(starting([b"hello"], headers=declared))
        self.assertEqual((answer, host.events), (b"", []))
        self.assertIn("the body has 5 bytes, but Content-Length is 9", host.logged)
        answer, host = run(starting(iter([b"hel", b"lo"]), headers=declared))
        self.assertEqual(host.kinds, ["start", "write", "write"])
        self.assertIn("the body has 5 bytes", host.logged)
        answer, host = run(starting(iter([]), headers=declared))
        self.assertEqual((answer, host.events), (b"", []))

    def test_write_is_counted(self):
        def application(environ, start_response):
            start_response("200 OK", [("Content-Length", "3")])(b"ab")
            return [b"cd"]

        _, host = run(application)
        self.assertEqual((host.body, host.kinds[-1]), (b"abc", "finish"))

    def test_zero_length(self):
        _, host = run(starting(iter([b"x"]), headers=[("Content-Length", "0")]))
        self.assertEqual((host.kinds, host.body), (["whole"], b""))

    def test_malformed_or_repeated(self):
        for headers in (
            [("Content-Length", "x")],
            [("Content-Length", "-1")],
            [("Content-Length", "+1")],
            [("Content-Length", "\xb2")],
            [("Content-Length", "1"), ("content-length", "1")],
        ):
            answer, host = run(starting([b"a"], headers=headers))
            self.assertEqual(answer, b"")
            self.assertIn("Content-Length", host.logged)


class NoBody(unittest.TestCase):
    def test_head_keeps_the_length_and_sends_no_body(self):
        for chunks in ([b"hello"], iter([b"hello"]), []):
            answer, host = run(
                starting(chunks, headers=[("Content-Length", "5")]), REQUEST_METHOD="HEAD"
            )
            self.assertEqual(
                answer or host.head, b"Status: 200 OK\r\nContent-Length: 5\r\n\r\n", host.logged
            )
            self.assertEqual((host.body, host.logged), (b"", ""))

    def test_head_of_a_stream_is_known_with_its_first_chunk(self):
        chunks = Closing(itertools.chain([b""], itertools.repeat(b"a")))
        host = Host()
        closing = chunks.close
        chunks.close = lambda: host.events.append(("close", closing()))
        run(starting(chunks), host, REQUEST_METHOD="HEAD")
        self.assertEqual(host.head, b"Status: 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        self.assertEqual((host.kinds, chunks.closed), (["whole", "close"], 1))

    def test_write_counts_as_sent(self):
        def application(environ, start_response):
            start_response("204 No Content", [])(b"x")
            try:
                raise KeyError("late")
            except KeyError:
                start_response("500 Oops", [], sys.exc_info())
            return []

        answer, host = run(application)
        self.assertEqual((answer, host.events), (b"", [("whole", b"Status: 204 No Content\r\n\r\n")]))
        self.assertIn("KeyError", host.logged)

    def test_head_gets_no_length_that_the_application_did_not_give(self):
        answer, _ = run(starting([]), REQUEST_METHOD="HEAD")
        self.assertNotIn(b"Content-Length", answer)

    def test_statuses_without_body(self):
        for status in ("204 No Content", "205 Reset Content", "304 Not Modified", "103 Early Hints"):
            for chunks in ([b"x"], iter([b"x"])):
                answer, host = run(starting(chunks, status))
                self.assertTrue((answer or host.head).endswith(b"plain\r\n\r\n"))
                self.assertTrue(answer or not host.body)

    def test_length_is_forbidden_for_204_and_205_and_kept_for_304(self):
        headers = [("Content-Length", "5")]
        self.assertNotIn(b"Length", run(starting([], "204 No Content", headers))[0])
        self.assertNotIn(b"Length", run(starting([], "205 Reset Content", headers))[0])
        self.assertIn(b"Length: 5", run(starting([], "304 Not Modified", headers))[0])


class StartResponse(unittest.TestCase):
    def refuse(self, error, culprit, status="200 OK", headers=PLAIN):
        """Checks that start_response raises inside the application."""
        raised = []

        def application(environ, start_response):
            try:
                start_response(status, headers)
            except Exception as caught:
                raised.append(caught)
                raise
            return [b"x"]

        answer, host = run(application)
        self.assertEqual((answer, host.events), (b"", []))
        self.assertEqual([type(each) for each in raised], [error])
        self.assertIn(culprit, str(raised[0]))

    def test_status(self):
        self.refuse(TypeError, "b'200 OK'", status=b"200 OK")
        self.refuse(TypeError, "200", status=200)
        lines = ("200 O\r\nK", "200 O\nK", "200 OK\n", "200 O\0K")
        codes = ("20 OK", "2000 OK", "OK", "200OK", "099 X", "\u0662\u0660\u0660 OK")
        for bad in (*lines, *codes, "200", "200 ", "200  ", "200\tOK", "200 \u20ac"):
            with self.subTest(bad):
                self.refuse(ValueError, repr(bad), status=bad)

    def test_str_subclass_is_no_str(self):
        class Sub(str):
            pass

        self.refuse(TypeError, "Sub", status=Sub("200 OK"))
        self.refuse(TypeError, "X-Sub", headers=[(Sub("X-Sub"), "v")])

    def test_headers(self):
        self.refuse(TypeError, "tuple", headers=tuple(PLAIN))
        self.refuse(TypeError, "dict", headers=dict(PLAIN))
        self.refuse(TypeError, "NoneType", headers=None)
        self.refuse(TypeError, "['X', 'y']", headers=[["X", "y"]])
        self.refuse(TypeError, "('X', 'y', 'z')", headers=[("X", "y", "z")])
        self.refuse(TypeError, "('X', 1)", headers=[("X", 1)])
        self.refuse(TypeError, "(b'X', 'y')", headers=[(b"X", "y")])

    def test_names(self):
        for bad in ("", "X Y", "X:", "X\r\nY", "X\n", "\xe4", "X\0", "(x)", "X\t"):
            with self.subTest(bad):
                self.refuse(ValueError, repr(bad), headers=[(bad, "v")])

    def test_values(self):
        for bad in ("a\r\nX: b", "a\n", "a\r", "\0", "\x7f", "\x1b[0m", "\u20ac", "\ud800"):
            with self.subTest(bad):
                self.refuse(ValueError, "value of header X-Name", headers=[("X-Name", bad)])

    def test_lengths(self):
        for bad in ("", "ten", "-1", "+1", " 1", "1 ", "1.0", "1_0", "0x1", "\xb2", "9" * 19):
            with self.subTest(bad):
                self.refuse(ValueError, "must be a number", headers=[("Content-Length", bad)])

    def test_hop_by_hop(self):
        for name in ("Connection", "keep-alive", "TE", "Trailer", "Transfer-Encoding", "Upgrade",
                     "Proxy-Authenticate", "Proxy-Authorization", "Status"):  # fmt: skip
            with self.subTest(name):
                self.refuse(ValueError, name, headers=[(name, "x")])
                # Also the second time: only good names are remembered.
                self.refuse(ValueError, name, headers=[(name, "x")])

    def test_memory_for_names_is_bounded(self):
        run(starting([], headers=[(f"X-{index}", "v") for index in range(1000)]))
        self.assertLessEqual(len(wsgi._names), 256)

    def test_memory_for_statuses_and_environs_is_bounded(self):
        for index in range(1000):
            answer, _ = run(starting([], status=f"200 {index}"), **{f"HTTP_X_{index}": "x"})
            self.assertTrue(answer)
        self.assertLessEqual(len(wsgi._statuses), 256)
        self.assertLessEqual(len(wsgi._shapes), 32)
        wsgi._shapes.clear()
        run(starting([]), **{"HTTP_" + "X" * 5000: "x"})
        self.assertEqual(len(wsgi._shapes), 0)

    def test_second_call_without_exc_info(self):
        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            start_response("200 OK", PLAIN)
            return []

        answer, host = run(application)
        self.assertEqual(answer, b"")
        self.assertIn("a second time without exc_info", host.logged)

    def test_exc_info_before_the_head_replaces_it(self):
        def application(environ, start_response):
            start_response("200 OK", [("X-Old", "1"), ("Content-Length", "99")])
            try:
                raise KeyError("x")
            except KeyError:
                start_response("500 Oops", PLAIN, sys.exc_info())
            return [b"sorry"]

        answer, _ = run(application)
        self.assertTrue(answer.startswith(b"Status: 500 Oops\r\nContent-Type"), answer)
        self.assertNotIn(b"X-Old", answer)

    def test_exc_info_as_first_call(self):
        def application(environ, start_response):
            try:
                raise KeyError("x")
            except KeyError:
                start_response("500 Oops", PLAIN, sys.exc_info())
            return [b"sorry"]

        self.assertIn(b"500 Oops", run(application)[0])

    def test_exc_info_after_the_head_is_raised_again(self):
        raised = []

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            yield b"x"
            try:
                raise KeyError("original")
            except KeyError:
                try:
                    start_response("500 Oops", PLAIN, sys.exc_info())
                except KeyError as error:
                    raised.append(error)
                    raise

        _, host = run(application)
        self.assertEqual(str(raised[0]), "'original'")
        self.assertEqual(host.kinds, ["start", "write"])
        self.assertIn("KeyError", host.logged)

    def test_never_called(self):
        for chunks in ([b"x"], iter([b"x"]), [], iter([])):
            answer, host = run(lambda environ, start_response, chunks=chunks: chunks)
            self.assertEqual((answer, host.events), (b"", []))
            self.assertIn("start_response", host.logged)

    def test_headers_may_change_after_the_call(self):
        def application(environ, start_response):
            headers = list(PLAIN)
            start_response("200 OK", headers)
            headers.append(("X", "bad\r\n"))
            return []

        self.assertNotIn(b"bad", run(application)[0])


class Write(unittest.TestCase):
    def test_sends_before_it_returns(self):
        host = Host()

        def application(environ, start_response):
            write = start_response("200 OK", PLAIN)
            write(b"")
            self.assertEqual(host.events, [])
            write(b"a")
            self.assertEqual(host.kinds, ["start", "write"])
            return [b"b", b"c"]

        answer, _ = run(application, host)
        self.assertEqual((answer, host.body, host.kinds[-1]), (b"", b"abc", "finish"), host.logged)

    def test_mixes_with_iteration(self):
        def application(environ, start_response):
            write = start_response("200 OK", PLAIN)
            yield b"a"
            write(b"b")
            yield b"c"

        self.assertEqual(run(application)[1].body, b"abc")

    def test_takes_bytes_only(self):
        def application(environ, start_response):
            start_response("200 OK", PLAIN)("text")
            return []

        answer, host = run(application)
        self.assertIn("write() takes bytes, not str", host.logged)
        self.assertEqual((answer, host.events), (b"", []))


class Failures(unittest.TestCase):
    def test_chunks_must_be_bytes(self):
        for bad in ("text", bytearray(b"x"), memoryview(b"x"), None, 1):
            for chunks in ([bad], iter([bad])):
                answer, host = run(starting(chunks))
                self.assertEqual((answer, host.events), (b"", []))
                self.assertIn(f"must be bytes, not {type(bad).__name__}", host.logged)

    def test_not_an_iterable_of_bytes(self):
        for bad in (None, "text", b"bytes", 5):
            answer, host = run(starting(bad))
            self.assertEqual(answer, b"")
            self.assertIn(type(bad).__name__, host.logged)

    def test_everything_is_caught(self):
        for error in (ValueError("v"), SystemExit(3), KeyboardInterrupt(), MemoryError(),
                      GeneratorExit(), RecursionError("deep"), BaseException("base")):  # fmt: skip

            def early(environ, start_response, error=error):
                raise error

            def late(environ, start_response, error=error):
                start_response("200 OK", PLAIN)
                yield b"x"
                raise error

            answer, host = run(early)
            self.assertEqual((answer, host.events), (b"", []))
            self.assertIn(type(error).__name__, host.logged)
            answer, host = run(late)
            self.assertEqual((answer, host.kinds), (b"", ["start", "write"]))
            self.assertIn(type(error).__name__, host.logged)

    def test_stop_iteration_from_the_application(self):
        def application(environ, start_response):
            raise StopIteration

        self.assertIn("StopIteration", run(application)[1].logged)

    def test_log_names_the_request_and_starts_in_the_application(self):
        def application(environ, start_response):
            raise ValueError("culprit")

        _, host = run(application, SCRIPT_NAME="/shop", PATH_INFO="/a\nb\xe4")
        first, second, third = host.logged.splitlines()[:3]
        self.assertEqual(first, "GET /shop/a\\nb\\xe4: the application failed")
        self.assertEqual(second, "Traceback (most recent call last):")
        self.assertIn("test_wsgi.py", third)

    def test_a_host_that_can_not_log_does_no_harm(self):
        class Mute(Host):
            def log(self, text):
                raise MemoryError

        chunks = Closing([b"x", 1])
        self.assertEqual(run(starting(chunks), Mute())[0], b"")
        self.assertEqual(chunks.closed, 1)

    def test_refused_by_the_host(self):
        class Refusing(Host):
            def start(self, head):
                raise wsgi.Refused("refused")

        chunks = Closing([b"x", b"y"])
        answer, host = run(starting(chunks), Refusing())
        self.assertEqual((answer, host.events, chunks.closed), (b"", [], 1))
        self.assertIn("Refused", host.logged)

    def test_malformed_content_length_of_the_request(self):
        answer, host = run(starting([b"x"]), CONTENT_LENGTH="x")
        self.assertEqual(answer, b"")
        self.assertIn("ValueError", host.logged)


class Close(unittest.TestCase):
    def test_once_in_every_case(self):
        for chunks in ([b"a", b"b"], [], [b"a", "text"], ["text"], 5):
            closing = Closing(chunks)
            run(starting(closing))
            self.assertEqual(closing.closed, 1, chunks)

    def test_when_start_response_was_never_called(self):
        closing = Closing([b"a"])
        run(lambda environ, start_response: closing)
        self.assertEqual(closing.closed, 1)

    def test_when_the_client_is_gone(self):
        for gone_after in (0, 1, 2, 3):
            closing = Closing([b"a", b"b"])
            _, host = run(starting(closing), Host(gone_after=gone_after))
            self.assertEqual(closing.closed, 1)
            self.assertNotIn("finish", host.kinds)

    def test_after_the_last_byte(self):
        host = Host()
        closing = Closing([b"a"])
        closing.close = lambda: host.events.append(("close", None))
        run(starting(closing), host)
        self.assertEqual(host.kinds, ["start", "write", "finish", "close"])

    def test_its_error_is_logged_and_the_response_stands(self):
        for error in (ValueError("c"), SystemExit()):
            closing = Closing([b"ok"], error)
            answer, host = run(starting(closing, headers=[("Content-Length", "2")]))
            self.assertEqual((host.kinds, host.body), (["whole"], b"ok"))
            self.assertIn("close() failed", host.logged)

    def test_a_generator_is_ended(self):
        ended = []

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            try:
                yield b"a"
                yield b"b"
            finally:
                ended.append(True)

        run(application, Host(gone_after=1))
        self.assertEqual(ended, [True])


class Gone(unittest.TestCase):
    def test_iteration_stops_with_one_line(self):
        asked = []

        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            for index in range(9):
                asked.append(index)
                yield b"x"

        answer, host = run(application, Host(gone_after=3))
        self.assertEqual((answer, asked), (b"", [0, 1, 2]))
        self.assertEqual(host.logged, "GET /: stopped: the client left\n")

    def test_write_raises_in_the_application(self):
        raised = []

        def application(environ, start_response):
            write = start_response("200 OK", PLAIN)
            try:
                write(b"x")
            except ConnectionAbortedError as error:
                raised.append(error)
            return []

        answer, host = run(application, Host(gone_after=1))
        self.assertEqual(len(raised), 1)
        self.assertEqual((answer, host.kinds), (b"", ["start"]))
        self.assertNotIn("Traceback", host.logged)

    def test_no_finish_after_the_application_ignored_it(self):
        class OnlyWrites(Host):
            def write(self, chunk):
                raise wsgi.ClientGone("left")

        def application(environ, start_response):
            write = start_response("200 OK", PLAIN)
            try:
                write(b"x")
            except OSError:
                pass
            return []

        self.assertEqual(run(application, OnlyWrites())[1].kinds, ["start"])

    def test_what_the_application_makes_of_it_is_one_line(self):
        def application(environ, start_response):
            write = start_response("200 OK", PLAIN)
            try:
                write(b"x")
            except OSError as error:
                raise RuntimeError("wrapped") from error
            return []

        _, host = run(application, Host(gone_after=0))
        self.assertEqual(host.logged.count("\n"), 1)

    def test_while_the_body_is_read(self):
        def application(environ, start_response):
            environ["wsgi.input"].read()

        answer, host = run(application, Host(pulls=[b"ab"]), b"x", CONTENT_LENGTH="9")
        self.assertEqual(answer, b"")
        self.assertNotIn("Traceback", host.logged)
        self.assertIn("6 bytes before", host.logged)

    def test_too_large_body(self):
        def application(environ, start_response):
            environ["wsgi.input"].read()

        _, host = run(application, Host(pulls=[BodyTooLarge("too large")]), CONTENT_LENGTH="9")
        self.assertEqual(host.logged, "GET /: stopped: too large\n")


class Input(unittest.TestCase):
    def test_echo(self):
        def application(environ, start_response):
            start_response("200 OK", PLAIN)
            return [environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))]

        answer, host = run(
            application, Host(pulls=[b"lo"]), b"hel", REQUEST_METHOD="POST", CONTENT_LENGTH="5"
        )
        self.assertTrue(answer.endswith(b"\r\n\r\nhello"), host.logged)


if __name__ == "__main__":
    unittest.main()
