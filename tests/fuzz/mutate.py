"""Changes of bytes, for files of which nobody knows the structure: always the same of a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NUMBERS = [bytes([n]) * size for size in (1, 2, 4, 8) for n in (0, 0x7F, 0x80, 0xFF)]
_NUMBERS += [(1 << bits).to_bytes(8, order) for bits in (16, 31, 32, 40, 62) for order in ("little", "big")]
_PARTS = [
    b"\x00",
    b"\n",
    b"\r",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"!!",
    b"&a ",
    b"*a",
    b"<<: ",
    b"\\",
]
_PARTS += [b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 5000]
_PARTS += [
    b"../../",
    b"/etc/passwd",
    b"<script>",
    b"null",
    b"true",
    b"[" * 300,
    b"{" * 300,
    b"(" * 300,
    b"!!python/name:os",
    b":1" * 20_000,
    b"0x" + b"f" * 5_000,
]


def mutated(content: bytes, others: Sequence[bytes], dice: random.Random, most: int = 1 << 16) -> bytes:
    """Return content with one to eight changes, of at most ``most`` bytes; ``others`` give parts to splice in."""
    data = bytearray(content)
    for _ in range(1 << dice.randrange(4)):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + (1 << dice.randrange(8)))
        kind = dice.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[at:at] = dice.choice(_PARTS)
        elif kind == 2:
            number = dice.choice(_NUMBERS)
            data[at : at + len(number)] = number
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at:end]
        elif kind == 5 and others:
            other = dice.choice(others)
            start = dice.randrange(len(other) + 1)
            data[at:end] = other[start : start + end - at + dice.randrange(16)]
        elif kind == 6:
            data[at:at] = dice.randbytes(1 << dice.randrange(5))
        elif dice.randrange(4) == 0:
            del data[at:]
    return bytes(data[:most])
