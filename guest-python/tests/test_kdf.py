import hashlib
import unittest
from unittest import mock

from tests import support  # noqa: F401
from wsgi_wasm import kdf


class Recorder:
    """The host's side, by the CPython that runs the tests."""

    def __init__(self):
        self.calls = []

    def pbkdf2_hmac(self, *arguments):
        self.calls.append(arguments)
        return b"p" * arguments[-1]

    def scrypt(self, *arguments):
        self.calls.append(arguments)
        return b"s" * arguments[-1]


def outcome(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except Exception as error:
        return type(error)


class Fallback(unittest.TestCase):
    """RFC 6070 and RFC 7914 section 11, without a host."""

    def setUp(self):
        patch = mock.patch.object(kdf, "building", True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_rfc_6070(self):
        for password, salt, iterations, length, expected in (
            (b"password", b"salt", 1, 20, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
            (b"password", b"salt", 2, 20, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
            (b"password", b"salt", 4096, 20, "4b007901b765489abead49d926f721d065a429c1"),
            (b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25,
             "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"),
            (b"pass\0word", b"sa\0lt", 4096, 16, "56fa6aa75548099dcc37d7f03425e0c3"),
        ):  # fmt: skip
            derived = kdf.pbkdf2_hmac("sha1", password, salt, iterations, length).hex()
            self.assertEqual(derived, expected)

    def test_rfc_7914(self):
        self.assertEqual(
            kdf.pbkdf2_hmac("sha256", b"passwd", b"salt", 1, 64).hex(),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
            "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783",
        )

    @unittest.skipUnless(hasattr(hashlib, "pbkdf2_hmac"), "CPython without OpenSSL")
    def test_like_openssl(self):
        for digest in (*sorted(kdf.DIGESTS), "sha-256", "SHA2-512", "SHA3-256", "blake2b512"):
            for length in (None, 1, 7, 65, 200):
                for password in (b"", b"x" * 63, b"x" * 200):
                    arguments = (digest, password, b"salt", 3, length)
                    ours, theirs = kdf.pbkdf2_hmac(*arguments), hashlib.pbkdf2_hmac(*arguments)
                    self.assertEqual(ours, theirs, arguments)

    def test_scrypt_says_that_it_is_not_there(self):
        with self.assertRaisesRegex(RuntimeError, "while the app is being built"):
            kdf.scrypt(b"p", salt=b"s", n=2, r=1, p=1)


class Arguments(unittest.TestCase):
    """What is refused, and how, is what OpenSSL's functions do."""

    PBKDF2 = (
        (b"sha256", b"p", b"s", 1),
        (None, b"p", b"s", 1),
        ("sha256", "p", b"s", 1),
        ("sha256", b"p", "s", 1),
        ("sha256", None, b"s", 1),
        ("sha256", b"p", b"s", 0),
        ("sha256", b"p", b"s", -1),
        ("sha256", b"p", b"s", 1.5),
        ("sha256", b"p", b"s", "1"),
        ("sha256", b"p", b"s", 2**80),
        ("sha256", b"p", b"s", 1, 0),
        ("sha256", b"p", b"s", 1, -1),
        ("sha256", b"p", b"s", 1, 2**80),
        ("sha256", b"p", b"s", 1, "x"),
        ("unknown", b"p", b"s", 1),
        ("sha256", b"p", b"s"),
        ("sha256", bytearray(b"p"), memoryview(b"s"), 1),
        ("SHA256", b"p", b"s", True),
    )
    SCRYPT = (
        {"n": 3}, {"n": 1}, {"n": 0}, {"n": 2.0}, {"r": 0},
        {"p": 0}, {"p": 2**30}, {"maxmem": -1}, {"maxmem": 2**31}, {"maxmem": 1000},
        {"dklen": 0}, {"dklen": -1}, {"dklen": 2**31}, {"salt": "x"}, {"n": 2**15, "r": 8},
        {"n": 2**14, "r": 8}, {"n": 2**15, "r": 8, "maxmem": 64 * 1024 * 1024},
        {"n": 2**16, "r": 1}, {"n": 2**15, "r": 1}, {"dklen": 5}, {"dklen": True},
    )  # fmt: skip

    def setUp(self):
        self.host = Recorder()
        patch = mock.patch.multiple(kdf, building=False, _derivation=self.host)
        patch.start()
        self.addCleanup(patch.stop)

    def alike(self, ours, theirs, case):
        if isinstance(ours, type) and isinstance(theirs, type):
            # OpenSSL's own errors are subclasses.
            self.assertTrue(issubclass(theirs, ours), (case, ours, theirs))
        else:
            self.assertEqual(len(ours), len(theirs), case)

    @unittest.skipUnless(hasattr(hashlib, "pbkdf2_hmac"), "CPython without OpenSSL")
    def test_pbkdf2_like_openssl(self):
        for arguments in self.PBKDF2:
            ours = outcome(kdf.pbkdf2_hmac, *arguments)
            theirs = outcome(hashlib.pbkdf2_hmac, *arguments)
            self.alike(ours, theirs, arguments)

    @unittest.skipUnless(hasattr(hashlib, "scrypt"), "CPython without OpenSSL")
    def test_scrypt_like_openssl(self):
        for change in self.SCRYPT:
            options = {"salt": b"s", "n": 2, "r": 1, "p": 1, **change}
            ours = outcome(kdf.scrypt, b"p", **options)
            theirs = outcome(hashlib.scrypt, b"p", **options)
            self.alike(ours, theirs, change)

    def test_scrypt_with_negative_numbers(self):
        # As CPython 3.14 does; 3.11 raises TypeError.
        for name in ("n", "r", "p"):
            with self.assertRaises(ValueError):
                kdf.scrypt(b"p", **{"salt": b"s", "n": 2, "r": 1, "p": 1, name: -1})

    def test_scrypt_is_keyword_only(self):
        with self.assertRaises(TypeError):
            kdf.scrypt(b"p", b"s", 2, 1, 1)
        with self.assertRaises(TypeError):
            kdf.scrypt(b"p", n=2, r=1, p=1)

    def test_what_the_host_gets(self):
        self.assertEqual(kdf.pbkdf2_hmac("SHA-256", b"p", bytearray(b"s"), 9), b"p" * 32)
        self.assertEqual(kdf.pbkdf2_hmac("sha3-512", b"p", b"s", 9, dklen=3), b"ppp")
        self.assertEqual(kdf.scrypt(b"p", salt=b"s", n=2, r=3, p=4), b"s" * 64)
        self.assertEqual(
            self.host.calls,
            [
                ("sha256", b"p", b"s", 9, 32),
                ("sha3_512", b"p", b"s", 9, 3),
                (b"p", b"s", 2, 3, 4, 64),
            ],
        )

    def test_long_passwords_are_hashed_before(self):
        long = b"x" * (kdf._INPUT_MAX + 1)
        kdf.pbkdf2_hmac("sha512", long, b"s", 9)
        kdf.scrypt(long, salt=b"s", n=2, r=3, p=4)
        self.assertEqual(
            self.host.calls,
            [
                ("sha512", hashlib.sha512(long).digest(), b"s", 9, 64),
                (hashlib.sha256(long).digest(), b"s", 2, 3, 4, 64),
            ],
        )
        # Which makes no difference.
        expected = kdf._pbkdf2_hmac("sha512", long, b"s", 9, 64)
        short = kdf._pbkdf2_hmac("sha512", hashlib.sha512(long).digest(), b"s", 9, 64)
        self.assertEqual(short, expected)

    def test_long_salts_are_refused(self):
        long = b"x" * (kdf._INPUT_MAX + 1)
        with self.assertRaises(ValueError):
            kdf.pbkdf2_hmac("sha512", b"p", long, 9)
        with self.assertRaises(ValueError):
            kdf.scrypt(b"p", salt=long, n=2, r=3, p=4)
        self.assertEqual(self.host.calls, [])

    def test_what_the_host_has_not_is_computed_here(self):
        expected = kdf._pbkdf2_hmac("blake2b", b"p", b"s", 2, 64)
        self.assertEqual(kdf.pbkdf2_hmac("blake2b", b"p", b"s", 2), expected)
        self.assertEqual(self.host.calls, [])


class Install(unittest.TestCase):
    def test_only_what_is_missing(self):
        saved = {name: vars(hashlib).get(name) for name in ("pbkdf2_hmac", "scrypt")}

        def restore():
            for name, value in saved.items():
                setattr(hashlib, name, value)
                if value is None:
                    delattr(hashlib, name)

        self.addCleanup(restore)
        self.addCleanup(setattr, kdf, "_derivation", kdf._derivation)
        hashlib.scrypt = sentinel = object()
        vars(hashlib).pop("pbkdf2_hmac", None)
        kdf.install(Recorder())
        self.assertIs(hashlib.pbkdf2_hmac, kdf.pbkdf2_hmac)
        self.assertIs(hashlib.scrypt, sentinel)


if __name__ == "__main__":
    unittest.main()
