"""Plain data as bytes, and back: numbers, text, bytes, None, and lists, tuples, sets and dicts of them.

Unlike pickle and marshal it can be read from anyone: reading makes plain data or raises. A value is a letter, a size in
hexadecimal, a colon, and as many bytes or values. An object of a subclass is written as its base sees it, so that no method
of its own has a say; one that is no plain data is opaque: true or false as it says itself, and equal to nothing.
"""

from __future__ import annotations

# typing takes longer to import than everything else that runs before the code does
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

SINGLE = {b"N": None, b"T": True, b"F": False}
SCALARS: dict[type, tuple[bytes, Callable[[Any], bytes]]] = {
    int: (b"i", lambda value: int.__format__(value, "x").encode()),
    float: (b"f", lambda value: float.hex(value).encode()),
    complex: (b"c", lambda value: b"%s %s" % tuple(float.hex(part).encode() for part in _parts(value))),
    str: (b"s", lambda value: str.encode(value, "utf-8", "surrogatepass")),
    bytes: (b"b", lambda value: bytes.__getitem__(value, slice(None))),
    bytearray: (b"b", lambda value: bytes(bytearray.__getitem__(value, slice(None)))),
}
CONTAINERS: dict[type, tuple[bytes, Callable[[Any], Iterator[Any]]]] = {
    list: (b"l", list.__iter__),
    tuple: (b"t", tuple.__iter__),
    set: (b"z", set.__iter__),
    frozenset: (b"z", frozenset.__iter__),
    dict: (b"d", lambda value: (part for pair in dict.items(value) for part in pair)),
    type({}.keys()): (b"z", iter),  # these two equal sets
    type({}.items()): (b"z", iter),
}
READ_SCALARS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda data: int(data, 16),
    b"f": lambda data: float.fromhex(data.decode()),
    b"c": lambda data: complex(*map(float.fromhex, data.decode().split())),
    b"s": lambda data: data.decode("utf-8", "surrogatepass"),
    b"b": bytes,
}
READ_CONTAINERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"l": list,
    b"t": tuple,
    b"z": frozenset,  # equal to a set, and may be in one
    b"d": lambda parts: dict(zip(parts[::2], parts[1::2], strict=True)),
}


class Opaque:
    """Stands for what is no plain data.

    Args:
        truth: Whether it says that it is true.
    """

    def __init__(self, truth: bool):
        self._truth = truth

    def __bool__(self) -> bool:
        return self._truth


def pack(value: Any) -> bytes:
    """A value as bytes. Raises TypeError, or RecursionError, when it is no plain data."""
    for letter, single in SINGLE.items():
        if value is single:
            return letter
    for base in type(value).__mro__:
        if base in SCALARS:
            letter, content = SCALARS[base]
            data = content(value)
            return b"%c%x:%s" % (letter, len(data), data)
        if base in CONTAINERS:
            letter, parts = CONTAINERS[base]
            packed = [pack(part) for part in parts(value)]
            return b"%c%x:%s" % (letter, len(packed), b"".join(packed))
    raise TypeError(f"{type(value)} is no plain data")


def opaque(value: Any) -> bytes:
    """What stands for a value that cannot be packed."""
    try:
        return b"O" if value else b"o"
    except Exception:  # neither true nor false
        return b"o"


def unpack(data: bytes) -> list[Any]:
    """The values packed one after another. Raises an exception, of any kind, when it was something else."""
    values, at = [], 0
    while at < len(data):
        value, at = _unpack(data, at)
        values.append(value)
    return values


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    letter = data[at : at + 1]
    if letter in SINGLE:
        return SINGLE[letter], at + 1
    if letter in (b"O", b"o"):
        return Opaque(letter == b"O"), at + 1
    colon = data.index(b":", at)
    size, at = int(data[at + 1 : colon], 16), colon + 1
    if letter in READ_SCALARS:
        if not 0 <= size <= len(data) - at:
            raise ValueError("it ends too early")
        return READ_SCALARS[letter](data[at : at + size]), at + size
    parts = []
    for _ in range(size):
        part, at = _unpack(data, at)
        parts.append(part)
    return READ_CONTAINERS[letter](parts), at


def _parts(value: complex) -> tuple[float, float]:
    return complex.real.__get__(value), complex.imag.__get__(value)
