"""`hashlib.pbkdf2_hmac` and `hashlib.scrypt`, which CPython has only with OpenSSL.

The work is done by the host. Signatures, checks and error types are those of
CPython, so that Django, Werkzeug and passlib find what they expect.
"""

from __future__ import annotations

import hashlib
import operator
from typing import Any, Protocol

building = True
"""Whether the host can not be called yet: its functions trap during the build."""


class Derivation(Protocol):
    """The host's side. Both raise ValueError for what it does not grant."""

    def pbkdf2_hmac(
        self, digest: str, password: bytes, salt: bytes, iterations: int, length: int, /
    ) -> bytes:
        """Returns `length` bytes; `digest` is one of `DIGESTS`."""
        ...

    def scrypt(self, password: bytes, salt: bytes, n: int, r: int, p: int, length: int, /) -> bytes:
        """Returns `length` bytes."""
        ...


DIGESTS = frozenset({
    "md5", "sha1", "sha224", "sha256", "sha384", "sha512",
    "sha3_224", "sha3_256", "sha3_384", "sha3_512",
})  # fmt: skip
"""The hash functions that the host can use, as `hashlib` names them."""

# The limits of the C code: OpenSSL takes `int`, and the host 32 bits.
_INT_MAX = 2**31 - 1
_U32_MAX = 2**32 - 1
# OpenSSL's, if the caller gives no `maxmem`.
_SCRYPT_MAXMEM = 32 * 1024 * 1024
_SCRYPT_PR_MAX = 2**30 - 1

# Bytes of a password and of a salt that the host takes. A longer password is
# hashed here first, which is what HMAC does with every key that is longer than
# a block (RFC 2104 section 2).
_INPUT_MAX = 1 << 16

_derivation: Derivation | None = None


def install(derivation: Derivation) -> None:
    """Puts the functions that are missing into `hashlib`."""
    global _derivation
    _derivation = derivation
    module: Any = hashlib
    if not hasattr(hashlib, "pbkdf2_hmac"):
        module.pbkdf2_hmac = pbkdf2_hmac
    if not hasattr(hashlib, "scrypt"):
        module.scrypt = scrypt


def pbkdf2_hmac(
    hash_name: str, password: Any, salt: Any, iterations: int, dklen: int | None = None
) -> bytes:
    """Password based key derivation function 2 (RFC 8018) with HMAC."""
    if not isinstance(hash_name, str):
        raise TypeError(
            "pbkdf2_hmac() argument 'hash_name' must be str, not " + type(hash_name).__name__
        )
    digest = _digest(hash_name)
    password, salt = _bytes(password), _bytes(salt)
    iterations = operator.index(iterations)
    if iterations < 1:
        raise ValueError("iteration value must be greater than 0.")
    if iterations > _INT_MAX:
        raise OverflowError("iteration value is too great.")
    # The constructor is the test whether this build has the function.
    length = hashlib.new(digest).digest_size if dklen is None else operator.index(dklen)
    if length < 1:
        raise ValueError("key length must be greater than 0.")
    if length > _INT_MAX:
        raise OverflowError("key length is too great.")
    if building or _derivation is None or digest not in DIGESTS:
        return _pbkdf2_hmac(digest, password, salt, iterations, length)
    _check_salt(salt)
    if len(password) > _INPUT_MAX:
        password = hashlib.new(digest, password).digest()
    return _derivation.pbkdf2_hmac(digest, password, salt, iterations, length)


def scrypt(
    password: Any, *, salt: Any, n: int, r: int, p: int, maxmem: int = 0, dklen: int = 64
) -> bytes:
    """scrypt password-based key derivation function (RFC 7914)."""
    password, salt = _bytes(password), _bytes(salt)
    n, r, p = operator.index(n), operator.index(r), operator.index(p)
    maxmem, dklen = operator.index(maxmem), operator.index(dklen)
    if n < 2 or n & (n - 1):
        raise ValueError("n must be a power of 2.")
    if not 0 <= maxmem <= _INT_MAX:
        raise ValueError(f"maxmem must be positive and smaller than {_INT_MAX}")
    if not 1 <= dklen <= _INT_MAX:
        raise ValueError(f"dklen must be greater than 0 and smaller than {_INT_MAX}")
    # As in OpenSSL's EVP_PBE_scrypt; the sum is the memory that it allocates.
    if (
        r < 1
        or p < 1
        or p > _SCRYPT_PR_MAX // r
        or (16 * r <= 63 and n >= 2 ** (16 * r))
        or n > _U32_MAX
        or 128 * r * p + 128 * r * (n + 2) > (maxmem or _SCRYPT_MAXMEM)
    ):
        raise ValueError("Invalid parameter combination for n, r, p, maxmem.")
    if building or _derivation is None:
        # In Python it would take minutes at the usual cost.
        raise RuntimeError(
            "hashlib.scrypt is not available while the app is being built; "
            "hash passwords when a request or a command needs it, not at import"
        )
    _check_salt(salt)
    if len(password) > _INPUT_MAX:
        # It goes into PBKDF2 with HMAC-SHA-256 only.
        password = hashlib.sha256(password).digest()
    return _derivation.scrypt(password, salt, n, r, p, dklen)


def _digest(name: str) -> str:
    """Returns hashlib's name for the spellings that OpenSSL takes: `SHA-256`, `SHA2-256`."""
    plain = name.lower().replace("_", "-")
    for family in ("sha3-", "shake-"):
        if plain.startswith(family):
            return plain.replace("-", "_")
    if plain.startswith("sha2-"):
        return "sha" + plain[len("sha2-") :].replace("/", "-")
    if plain.startswith("sha-"):
        return "sha" + plain[len("sha-") :]
    return {"blake2b512": "blake2b", "blake2s256": "blake2s"}.get(plain, plain)


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        raise TypeError("a bytes-like object is required, not 'str'")
    return bytes(memoryview(value))


def _check_salt(salt: bytes) -> None:
    if len(salt) > _INPUT_MAX:
        raise ValueError(f"the host takes no salt of more than {_INPUT_MAX} bytes")


def _pbkdf2_hmac(digest: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2 in Python, for the build and for hash functions that the host lacks."""
    inner, outer = hashlib.new(digest), hashlib.new(digest)
    block_size = inner.block_size
    if len(password) > block_size:
        password = hashlib.new(digest, password).digest()
    key = password.ljust(block_size, b"\0")
    inner.update(bytes(byte ^ 0x36 for byte in key))
    outer.update(bytes(byte ^ 0x5C for byte in key))

    def hmac(message: bytes) -> bytes:
        # Copies of the two keyed states save half of the hashing.
        first, second = inner.copy(), outer.copy()
        first.update(message)
        second.update(first.digest())
        return second.digest()

    derived = b""
    block = 1
    while len(derived) < length:
        last = hmac(salt + block.to_bytes(4, "big"))
        total = int.from_bytes(last, "big")
        for _ in range(iterations - 1):
            last = hmac(last)
            total ^= int.from_bytes(last, "big")
        derived += total.to_bytes(len(last), "big")
        block += 1
    return derived[:length]
