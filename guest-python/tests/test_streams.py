import gzip
import io
import os
import tempfile
import unittest

from tests import support  # noqa: F401
from wsgi_wasm.streams import BodyAborted, BodyTooLarge, FileWrapper, open_input


def opened(body, first=0, step=1, length=True, chunked=False):
    """Returns an input for `body` of which `first` bytes are here and the rest comes in steps."""
    environ = {}
    if length:
        environ["CONTENT_LENGTH"] = str(len(body))
    if chunked:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    rest = memoryview(body)[first:]
    limits = []

    def pull(limit):
        nonlocal rest
        limits.append(limit)
        piece, rest = bytes(rest[: min(step, limit)]), rest[min(step, limit) :]
        return piece

    stream = open_input(environ, body[:first], pull)
    return stream, limits


class OpenInput(unittest.TestCase):
    TEXT = b"one\ntwo\n\nlast without end"

    def each(self):
        for first in (0, 1, 4, len(self.TEXT)):
            for step in (1, 3, 1000):
                yield opened(self.TEXT, first, step)[0]
                yield opened(self.TEXT, first, step, length=False, chunked=True)[0]

    def test_read(self):
        for stream in self.each():
            self.assertEqual(stream.read(0), b"")
            self.assertEqual(stream.read(2), b"on")
            self.assertEqual(stream.read(3), b"e\ntw"[:3])
            self.assertEqual(stream.read(), self.TEXT[5:])
            self.assertEqual(stream.read(), b"")
            self.assertEqual(stream.read(1), b"")

    def test_negative_and_none_mean_all(self):
        for size in (-1, None):
            for stream in self.each():
                self.assertEqual(stream.read(size), self.TEXT)

    def test_read_more_than_there_is(self):
        for stream in self.each():
            self.assertEqual(stream.read(10**6), self.TEXT)

    def test_readline(self):
        for stream in self.each():
            self.assertEqual(stream.readline(), b"one\n")
            self.assertEqual(stream.readline(2), b"tw")
            self.assertEqual(stream.readline(-1), b"o\n")
            self.assertEqual(stream.readline(None), b"\n")
            self.assertEqual(stream.readline(0), b"")
            self.assertEqual(stream.readline(), b"last without end")
            self.assertEqual(stream.readline(), b"")

    def test_readlines_and_iteration(self):
        lines = self.TEXT.splitlines(keepends=True)
        for stream in self.each():
            self.assertEqual(stream.readlines(), lines)
        for stream in self.each():
            self.assertEqual(stream.readlines(1), lines[:1])
            self.assertEqual(list(stream), lines[1:])
        for stream in self.each():
            self.assertEqual(stream.readlines(None), lines)

    def test_properties(self):
        for stream in self.each():
            self.assertTrue(stream.readable())
        self.assertFalse(opened(b"abc", 1)[0].seekable())

    def test_a_whole_body_is_never_pulled(self):
        stream, limits = opened(b"abc", 3)
        self.assertEqual((stream.read(), stream.read(), limits), (b"abc", b"", []))

    def test_no_body_is_never_pulled(self):
        stream, limits = opened(b"abc", 0, length=False)
        self.assertEqual((stream.read(), limits), (b"", []))
        stream, limits = opened(b"", 0)
        self.assertEqual((stream.read(), limits), (b"", []))

    def test_empty_content_length_is_none(self):
        self.assertEqual(open_input({"CONTENT_LENGTH": ""}, b"", self.fail).read(), b"")

    def test_nothing_is_pulled_before_it_is_read(self):
        _, limits = opened(b"abc", 1)
        self.assertEqual(limits, [])

    def test_what_is_here_is_read_without_a_pull(self):
        stream, limits = opened(b"line\nrest", 5)
        self.assertEqual((stream.readline(), limits), (b"line\n", []))

    def test_never_past_the_length(self):
        pulled = []

        def pull(limit):
            pulled.append(limit)
            return b"x" * limit

        stream = open_input({"CONTENT_LENGTH": "5"}, b"ab", pull)
        self.assertEqual((stream.read(), stream.read(), pulled), (b"abxxx", b"", [3]))

    def test_more_here_than_declared_is_cut(self):
        self.assertEqual(open_input({"CONTENT_LENGTH": "2"}, b"abcd", self.fail).read(), b"ab")

    def test_the_end_of_a_chunked_body_is_asked_for_once(self):
        stream, limits = opened(b"ab", 0, 2, length=False, chunked=True)
        stream.read()
        count = len(limits)
        stream.read()
        stream.readline()
        self.assertEqual(len(limits), count)

    def test_large_body(self):
        body = bytes(range(256)) * 4000
        for length, chunked in ((True, False), (False, True)):
            stream, _ = opened(body, 100, 70000, length, chunked)
            pieces = [stream.read(65536)]
            while pieces[-1]:
                pieces.append(stream.read(65536))
            self.assertEqual(b"".join(pieces), body)
            self.assertEqual({len(piece) for piece in pieces[:-2]}, {65536})

    def test_large_reads_are_large_pulls(self):
        stream, limits = opened(b"x" * 10**6, 0, 10**6)
        stream.read(65536)
        self.assertGreaterEqual(limits[0], 65536)

    def test_aborted(self):
        pieces = iter([b"c", b""])
        stream = open_input({"CONTENT_LENGTH": "6"}, b"ab", lambda limit: next(pieces))
        with self.assertRaisesRegex(ConnectionResetError, "3 bytes before its Content-Length"):
            stream.read()

    def test_errors_of_the_host_pass(self):
        for error in (BodyAborted("gone"), BodyTooLarge("large")):

            def pull(limit, error=error):
                raise error

            for environ in (
                {"CONTENT_LENGTH": "6"},
                {"HTTP_TRANSFER_ENCODING": "chunked"},
                {"SERVER_PROTOCOL": "HTTP/2.0"},
            ):
                for read in ("read", "readline", "readlines"):
                    stream = open_input(environ, b"", pull)
                    for _ in range(2):
                        with self.assertRaises(OSError) as caught:
                            getattr(stream, read)()
                        self.assertIs(caught.exception, error)

    def test_as_text(self):
        text = io.TextIOWrapper(opened("ä\nb".encode(), 1)[0], "utf-8")
        self.assertEqual(text.read(), "ä\nb")


class Files(unittest.TestCase):
    """What of a file-like object is left to the host."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "file")
        with open(self.path, "wb") as file:
            file.write(b"0123456789")

    def assert_file(self, filelike, offset, size):
        wrapper = FileWrapper(filelike)
        self.assertEqual(wrapper.size(), size)
        self.assertEqual(wrapper.locate(), (self.path, offset))

    def test_a_real_file_from_its_position(self):
        for buffering in (-1, 0):
            with open(self.path, "rb", buffering) as file:
                self.assert_file(file, 0, 10)
                file.read(3)
                self.assert_file(file, 3, 7)
                file.seek(0, 2)
                self.assert_file(file, 10, 0)
                file.seek(100)
                self.assert_file(file, 100, 0)

    def test_a_relative_path(self):
        before = os.getcwd()
        os.chdir(os.path.dirname(self.path))
        self.addCleanup(os.chdir, before)
        with open("file", "rb") as file:
            self.assertTrue(os.path.samefile(FileWrapper(file).locate()[0], self.path))
            self.assertTrue(os.path.isabs(FileWrapper(file).locate()[0]))

    def test_what_was_written_is_flushed(self):
        with open(self.path, "r+b") as file:
            file.write(b"abcdefghijkl")
            file.seek(2)
            self.assert_file(file, 2, 10)
            self.assertEqual(os.path.getsize(self.path), 12)

    def test_temporary_files(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"0123")
            file.seek(1)
            self.assertEqual(FileWrapper(file).size(), 3)
            self.assertEqual(FileWrapper(file).locate(), (file.name, 1))
        # It has no name.
        with tempfile.TemporaryFile() as file:
            self.assertIsNone(FileWrapper(file).locate())

    def test_a_proxy_whose_read_is_that_of_the_file(self):
        class Proxy:
            def __init__(self, file):
                self.file = file

            read = property(lambda self: self.file.read)
            tell = property(lambda self: self.file.tell)

        with open(self.path, "rb") as file:
            self.assert_file(Proxy(file), 0, 10)

    def test_a_file_that_was_replaced_or_removed(self):
        with open(self.path, "rb") as file:
            os.rename(self.path, self.path + "2")
            self.assertIsNone(FileWrapper(file).locate())
            with open(self.path, "wb") as other:
                other.write(b"another")
            self.assertIsNone(FileWrapper(file).locate())

    def test_what_only_looks_like_a_file(self):
        class Upper(io.BufferedReader):
            def read(self, size=-1):
                return super().read(size).upper()

        with (
            gzip.open(self.path + ".gz", "wb") as zipped,
            open(self.path, "rb") as file,
            open(self.path) as text,
            Upper(io.FileIO(self.path)) as upper,
            open(self.path, "ab") as appending,
            open(os.open(self.path, os.O_RDONLY), "rb") as unnamed,
        ):
            class Limited:
                def __init__(self):
                    self.fileno, self.name, self.tell = file.fileno, file.name, file.tell

                def read(self, size):
                    return file.read(min(size, 2))

            for filelike in (io.BytesIO(b"x"), zipped, text, upper, appending, Limited()):
                self.assertIsNone(FileWrapper(filelike).size(), filelike)
                self.assertIsNone(FileWrapper(filelike).locate(), filelike)
            self.assertIsNone(FileWrapper(unnamed).locate())
        # Closed by now.
        self.assertIsNone(FileWrapper(file).size())

    def test_a_device_has_no_size(self):
        with open("/dev/zero", "rb") as file:
            self.assertIsNone(FileWrapper(file).size())


class Wrapper(unittest.TestCase):
    def test_blocks(self):
        # A block size is a suggestion: small ones are not taken.
        self.assertEqual(list(FileWrapper(io.BytesIO(b"abcde"), 2)), [b"abcde"])
        content = b"x" * (65536 * 2 + 1)
        blocks = FileWrapper(io.BytesIO(content))
        self.assertEqual([len(block) for block in blocks], [65536, 65536, 1])
        blocks = FileWrapper(io.BytesIO(content), 100_000)
        self.assertEqual([len(block) for block in blocks], [100_000, 31_073])

    def test_room(self):
        wrapper = FileWrapper(io.BytesIO(b"0123456789"))
        wrapper.room = 4
        self.assertEqual(list(wrapper), [b"0123"])

    def test_seek(self):
        wrapper = FileWrapper(io.BytesIO(b"0123456789"))
        self.assertTrue(wrapper.seekable())
        wrapper.seek(7)
        self.assertEqual(wrapper.tell(), 7)
        self.assertEqual(list(wrapper), [b"789"])

        class OnlyRead:
            def read(self, size):
                return b""

        self.assertFalse(FileWrapper(OnlyRead()).seekable())

    def test_close_is_that_of_the_file(self):
        file = io.BytesIO()
        FileWrapper(file).close()
        self.assertTrue(file.closed)

    def test_no_close_without_one(self):
        class OnlyRead:
            def read(self, size):
                return b""

        self.assertFalse(hasattr(FileWrapper(OnlyRead()), "close"))
        self.assertEqual(list(FileWrapper(OnlyRead())), [])


if __name__ == "__main__":
    unittest.main()
