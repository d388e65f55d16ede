"""Which training images are forgotten: a random share, a class, or a list."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from erase_concept.classification.data import Split
from erase_concept.errors import RequestError, did_you_mean
from erase_concept.files import read_text
from erase_concept.seed import stage_generator

_ALLOWED = "allowed: random:10%, random:COUNT, class:NAME, indices:FILE"


def forget_rows(forget: str, split: Split, seed: int) -> Tensor:
    """Return the numbers of the images to forget, int64 and ascending, among the data set's training images.

    ``random:10%`` and ``random:450`` draw from a split's training images by the seed, ``class:NAME`` takes all of a
    class, and ``indices:FILE`` those of a file with one number a line, from 0. Raises RequestError for anything else,
    for no image and for all of them.
    """
    kind, _, what = forget.partition(":")
    if kind not in ("random", "class", "indices") or not what:
        raise RequestError("forget", forget, _ALLOWED)
    if kind == "random":
        rows = split.train[
            torch.randperm(len(split.train), generator=stage_generator(seed, "forget"))[: _count(what, forget, split)]
        ]
    elif kind == "class":
        rows = split.train[split.images.train_labels[split.train] == _class(what, split)]
    else:
        rows = _read(Path(what), split)
    if len(rows) == 0:
        raise RequestError("forget", forget, "is no training image: there is nothing to forget")
    if len(rows) == len(split.train):
        raise RequestError("forget", forget, f"are all {len(split.train)} training images: nothing would be retained")
    return rows.sort().values


def _count(what: str, forget: str, split: Split) -> int:
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", what):
        count = round(float(found[1]) / 100 * len(split.train))
    elif what.isdigit():
        count = int(what)
    else:
        raise RequestError("forget", forget, _ALLOWED)
    if count > len(split.train):
        raise RequestError("forget", forget, f"there are {len(split.train)} training images")
    return count


def _class(name: str, split: Split) -> int:
    labels = split.images.labels
    if name not in labels:
        shown = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise RequestError(
            "forget", f"class:{name}", f"{did_you_mean(name, labels)}classes of {split.images.name}: {shown}"
        )
    return labels.index(name)


def _read(file: Path, split: Split) -> Tensor:
    """Read numbers of images; raises RequestError for the first that is no training image of the split."""
    found = read_rows(file)
    total, training = len(split.images.train), set(split.train.tolist())
    for row, place in found.items():
        said = f"line {place} is {row}"
        if row >= total:
            raise _wrong(file, f"{said}; {split.images.name} has images 0 to {total - 1}")
        if row not in training:
            raise _wrong(file, f"{said}, which is no training image of this split")
    return torch.tensor(list(found), dtype=torch.int64)


def read_rows(file: Path) -> dict[int, int]:
    """Return the numbers of images in a file, and the line of each; raises RequestError for anything else, or twice."""
    try:
        lines = read_text(file).split("\n")
    except ValueError as problem:
        raise _wrong(file, f"not readable: {problem}") from None
    found: dict[int, int] = {}
    for place, text in enumerate(map(str.strip, lines), 1):
        if not text:
            continue
        if not re.fullmatch("[0-9]{1,18}", text):
            raise _wrong(file, f"line {place} is {text[:40]!r}; needed: a whole number from 0 on each line")
        if int(text) in found:
            raise _wrong(file, f"line {place} is {int(text)}, as line {found[int(text)]}: each image once")
        found[int(text)] = place
    return found


def _wrong(file: Path, found: str) -> RequestError:
    return RequestError("forget", f"indices:{file}", found)
