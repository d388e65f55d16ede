"""Files of the right structure with wrong values in it, as strategies of Hypothesis."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

# Texts that would do something if they were taken for more than texts.
TEXTS = [
    *(
        "",
        " ",
        "\x00",
        "a\x00b",
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "C:\\x",
        "\\\\host\\share",
        "~",
        "x" * 300,
    ),
    *(
        "\x1b[2J",
        "\u202egnp.exe",
        "\u2028",
        "\x85",
        "\ufeff",
        "é",
        "🪦",
        "\ud800",
        "%s%n",
        "${x}",
        "{o}",
        "{O}{O}",
        "{",
    ),
    *("<script>fuzz()</script>", '"><img src=x onerror=fuzz()>', "javascript:fuzz()", "{{ 7*7 }}", "{% raw %}"),
    *(
        "http://x.y/z",
        "www.x.y",
        "![a](http://x/y.png)",
        "[a](http://x)",
        "|",
        "`",
        "``` x",
        "---",
        "null",
        "nan",
        "1e9",
    ),
    *("os", "fuzz_canary", "torchscript:x.pt", "hub:a/b", "hub:../x", "none", "salient", "object", "x.yaml", "x.csv"),
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    8,
    255,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    10**300,
    0.5,
    -0.0,
    1e-9,
    1e308,
]
WILD = [float("nan"), float("inf"), float("-inf")]
leaves = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from([*NUMBERS, *WILD]),
    st.sampled_from([None, True, False]),
    st.text(max_size=6),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(TEXTS), st.text(max_size=4)), inner, max_size=4),
    ),
    max_leaves=6,
)
_deep: Any = 1
for _ in range(80):
    _deep = [_deep]
ANY = st.one_of(values, values, values, st.just(_deep), st.just(["x" * 3000]), st.just([[]] * 200))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in _places(one, (*path, key)))]


def changed(*documents: Any) -> st.SearchStrategy[Any]:
    """Return documents with some of their values replaced, left out or under another name."""

    def change(document: Any, changes: list[tuple[int, int, Any, str]]) -> Any:
        document = copy.deepcopy(document)
        for place, kind, chosen, name in changes:
            value = copy.deepcopy(chosen)  # so that no value comes to hold itself
            places = _places(document)
            *way, last = places[place % len(places)] or ((),)
            if last == ():
                document = value if kind == 0 else document
                continue
            owner = document
            for key in way:
                owner = owner[key]
            if kind <= 2:
                owner[last] = value
            elif kind == 3 and isinstance(owner, dict):
                owner[name] = owner.pop(last)
            elif kind == 4 and isinstance(owner, dict):
                owner[name] = value
            else:
                del owner[last]
        return document

    one = st.tuples(st.integers(0, 400), st.integers(0, 5), ANY, st.sampled_from(TEXTS))
    return st.builds(change, st.sampled_from(documents), st.lists(one, max_size=3))


def json_of(*documents: Any) -> st.SearchStrategy[bytes]:
    """Return JSON of changed documents."""
    return changed(*documents).map(lambda value: json.dumps(value).encode())


def json_lines(*documents: Any) -> st.SearchStrategy[bytes]:
    """Return lines of JSON, some of them cut."""
    lines = st.lists(json_of(*documents), max_size=4)
    return st.builds(lambda some, cut: b"\n".join(some)[: -cut or None], lines, st.integers(0, 9))


_TAGS = [
    *(
        "!!python/object/apply:os.system ['x']",
        "!!python/name:fuzz_canary.x",
        "!!python/module:fuzz_canary",
        "!!binary x",
    ),
    *("!!timestamp x", "!!bool x", "!!int x", "!!float x", "!!set {a, b}", "!!omap [a: 1]", "2020-13-45", "2020-01-01"),
    *("&a [*a]", "&a {<<: *a}", "*gone", "{<<: [{a: 1}]}", "0x", "1:99:99", "? [a]\n: b", "=", "~", ".nan", "-.inf"),
    "[&a [x,x,x,x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b,*b,*b,*b],[*c,*c,*c,*c,*c,*c]]",
]


def yaml_of(*documents: Any) -> st.SearchStrategy[bytes]:
    """Return YAML of changed documents, some with a tag or an alias in the place of a value."""

    def dump(value: Any, tag: str | None) -> bytes:
        text = yaml.dump(value, allow_unicode=True, sort_keys=False)
        if tag is not None and ":" in text:
            head, colon, tail = text.partition(":")
            text = f"{head}: {tag}\n{tail.partition(chr(10))[2]}" if colon else text
        return text.encode("utf-8", "surrogatepass")

    return st.builds(dump, changed(*documents), st.one_of(st.none(), st.none(), st.sampled_from(_TAGS)))


def csv_of(*columns: str) -> st.SearchStrategy[bytes]:
    """Return tables with these columns and others, whose cells may be anything."""
    cell = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS).map(str), st.text(max_size=6), st.just("7"))
    head = st.lists(st.one_of(st.sampled_from(columns), st.sampled_from(TEXTS)), min_size=1, max_size=5)
    quote = st.sampled_from(["{}", '"{}"', '"{}', "{}\r"])

    def table(names: list[str], rows: list[list[str]], quotes: list[str], mark: bytes) -> bytes:
        lines = [names, *rows]
        text = "\n".join(",".join(quotes[i % len(quotes)].format(c) for i, c in enumerate(line)) for line in lines)
        return mark + text.encode("utf-8", "surrogatepass")

    rows = st.lists(st.lists(cell, max_size=5), max_size=5)
    marks = st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"])
    return st.builds(table, head, rows, st.lists(quote, min_size=1, max_size=3), marks)


_DTYPES = ["F32", "F16", "BF16", "U8", "I8", "I16", "I32", "I64", "BOOL", "F64", "F8_E4M3", "F8_E5M2", "F4", "C64", "X"]


def tensors_of(*documents: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return safetensors files; a document is {"metadata": ..., "tensors": {name: [dtype, shape, bytes]}}."""

    def pack(document: dict[str, Any], wrong: tuple[int, int, Any], data: bytes, twice: bool) -> bytes:
        at, header = 0, {}
        named = document.get("tensors") if isinstance(document, dict) else None
        for name, one in named.items() if isinstance(named, dict) else ():
            kind, shape, size = one if isinstance(one, list) and len(one) == 3 else ["U8", one, 1]
            size = size if type(size) is int and 0 <= size < 4096 else 8
            header[str(name)] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        place, kind, value = wrong
        if header and kind < 3:
            chosen = header[[*header][place % len(header)]]
            chosen[("dtype", "shape", "data_offsets")[kind]] = value
        if isinstance(document, dict) and "metadata" in document:
            header["__metadata__"] = document["metadata"]
        text = json.dumps(header).encode()
        if twice and len(header) > 1:
            text = text[:-1] + b"," + json.dumps({next(iter(header)): [*header.values()][-1]}).encode()[1:]
        return struct.pack("<Q", len(text)) + text + (data * (at // max(len(data), 1) + 1))[:at]

    shape = st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**32, 2**63, -1]), max_size=5)
    offsets = st.lists(st.sampled_from([0, 1, 4, 8, 2**40, 2**63, -1]), max_size=3)
    value = st.one_of(st.sampled_from(_DTYPES), shape, offsets, leaves)
    wrong = st.tuples(st.integers(0, 20), st.integers(0, 8), value)
    return st.builds(
        pack, changed(*documents), wrong, st.sampled_from([b"\0", b"\xff", b"\x01\x80", b"{"]), st.booleans()
    )


_GLOBALS = [
    *("os system", "builtins eval", "builtins getattr", "fuzz_canary x", "pathlib Path", "subprocess Popen", "a.b C"),
    *(
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor",
        "torch FloatStorage",
        "torch.storage UntypedStorage",
    ),
    *(
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_meta_tensor_no_storage",
        "torch._utils _rebuild_sparse_tensor",
    ),
    *("collections OrderedDict", "collections Counter", "numpy dtype", "numpy ndarray", "_codecs encode", "torch Size"),
    *("numpy._core.multiarray _reconstruct", "numpy._core.multiarray scalar", "numpy._core.numeric _frombuffer"),
    *(
        "torch float32",
        "builtins bytearray",
        "builtins set",
        "torch.nn.parameter Parameter",
        "torch device",
        "torch load",
    ),
]
_OPS = [
    *(
        b".",
        b"(",
        b"0",
        b"1",
        b"2",
        b"N",
        b"}",
        b"]",
        b")",
        b"a",
        b"e",
        b"d",
        b"l",
        b"s",
        b"u",
        b"t",
        b"R",
        b"b",
        b"o",
        b"Q",
    ),
    *(
        b"\x81",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x88",
        b"\x89",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x93",
        b"\x94",
        b"q\x00",
        b"h\x00",
    ),
    *(
        b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff",
        b"K\x02",
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x08" + b"\x7f" * 8,
    ),
    *(
        b"X\x0a\x00\x00\x00state_dict",
        b"X\x01\x00\x00\x00a",
        b"X\x07\x00\x00\x00storage",
        b"X\x03\x00\x00\x00cpu",
        b"Vx\n",
    ),
    *(
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"B\x04\x00\x00\x00abcd",
        b"C\x01a",
        b"G" + b"\x7f\xf0" + b"\0" * 6,
        b"I9\n",
        b"L9L\n",
    ),
    *(
        b"X\x01\x00\x00\x000",
        b"\x95" + b"\xff" * 8,
        b"X\x06\x00\x00\x00little",
        b"\x8c\x02os",
        b"\x8c\x06system",
        b"P0\n",
    ),
    *(f"c{name.replace(' ', chr(10))}\n".encode() for name in _GLOBALS),
]


def pickles(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Return programs for the unpickler, as they are or as PyTorch packs them."""
    steps = st.one_of(st.sampled_from(_OPS), st.sampled_from(_OPS[-len(_GLOBALS) :]))
    program = st.lists(steps, max_size=24).map(lambda some: b"\x80\x02" + b"".join(some) + b".")

    def archive(content: bytes, packed: int, size: int) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", packed) as parts:
            parts.writestr("archive/data.pkl", content)
            parts.writestr("archive/byteorder", b"little")
            parts.writestr("archive/version", b"3\n")
            parts.writestr("archive/data/0", b"\0" * size)
        return out.getvalue()

    kinds = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    objects = values.map(lambda value: pickle.dumps({"state_dict": value}, 2))
    content = st.one_of(program, program, objects)
    packed = st.builds(archive, content, kinds, st.sampled_from([0, 4, 64, 1 << 20]))
    return st.one_of(content, packed, packed, *(st.just(seed) for seed in seeds))


def images(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """Return PNGs of any size and chunks, heads of other formats, and pictures with something behind them."""

    def png(width: int, height: int, depth: int, kind: int, chunks: list[tuple[bytes, bytes]], data: bytes) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
        parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
        body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(body)

    side = st.sampled_from([0, 1, 2, 3, 8, 300, 9000, 65535, 2**31 - 1, 2**32 - 1])
    bomb = b"a\0\0" + zlib.compress(b"\0" * (1 << 21))
    names = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"PLTE", b"eXIf", b"gAMA", b"acTL", b"fcTL", b"pHYs", b"sRGB"]
    chunk = st.tuples(
        st.sampled_from(names), st.one_of(st.binary(max_size=24), st.just(bomb), st.just(b"Exif\0\0MM\0*"))
    )
    drawn = st.builds(
        png, side, side, st.sampled_from([1, 2, 4, 8, 16, 3]), st.sampled_from([0, 2, 3, 4, 6, 1]),
        st.lists(chunk, max_size=3), st.sampled_from([b"", b"\0" * 64, b"\1" * 4096, b"\0" * (1 << 20)]),
    )  # fmt: skip
    heads = [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x)(w)file\n",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
    ]
    heads += [
        b"RIFF\x24\0\0\0WEBPVP8X",
        b"\xff\xd8\xff\xe0",
        b"\xff\xd8\xff\xe1\0\x10Exif\0\0",
        b"P6 99999 99999 255\n",
        b"qoif",
    ]
    heads += [
        b"\0\0\1\0",
        b"8BPS",
        b"\x00\x00\x00\x0cjP  ",
        b"#define x 9",
        b"<svg xmlns='http://www.w3.org/2000/svg'>",
    ]
    other = st.builds(lambda head, tail: head + tail, st.sampled_from(heads), st.binary(max_size=64))
    tailed = st.builds(lambda seed, tail: seed + tail, st.sampled_from(seeds), st.binary(max_size=24))
    return st.one_of(drawn, drawn, other, tailed)


def lines_of(*known: str) -> st.SearchStrategy[bytes]:
    """Return lines of text, some of them known ones."""
    line = st.one_of(
        st.sampled_from(TEXTS), st.sampled_from(known), st.sampled_from(NUMBERS).map(str), st.text(max_size=6)
    )
    ends = st.sampled_from(["\n", "\r\n", "\r", "\x0b"])
    joined = st.builds(lambda some, end: end.join(some), st.lists(line, max_size=6), ends)
    return joined.map(lambda text: text.encode("utf-8", "surrogatepass"))


def packed(inner: st.SearchStrategy[bytes], pack: Callable[[bytes], bytes]) -> st.SearchStrategy[bytes]:
    """Return what ``inner`` gives, packed."""
    return inner.map(pack)
