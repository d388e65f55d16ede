"""Files of classifiers' weights, and the labels beside them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from erase_concept.errors import RequestError
from erase_concept.files import read_text
from erase_concept.pipelines.formats.weights import read_tensors

_MOST_BYTES = 4 << 20  # of a file of labels


def read_state(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Read a state dict and the labels beside it; raises ValueError when it is damaged or holds more than tensors."""
    labels = labels_beside(file)
    try:
        return read_tensors(file)[0], labels
    except RequestError as problem:
        raise ValueError(f"{file.name} {problem.allowed}") from problem


def labels_beside(file: Path) -> tuple[str, ...] | None:
    """Return the lines of the file of labels beside ``file``, if there is one."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        labels = tuple(line.strip() for line in read_text(beside, _MOST_BYTES).splitlines())
    except ValueError as problem:
        raise ValueError(f"{beside} {problem}") from None
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"{beside} must hold two labels or more, each on a line and each once")
    return labels


def fill_weights(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights that are the network's, all of them and no others."""
    versioned: Any = OrderedDict(state)
    versioned._metadata = {"": {"version": network._version}}  # as torch's own state has it: MNASNet asks for it
    try:
        network.load_state_dict(versioned)
    except RuntimeError as problem:
        what = "; ".join(line.strip() for line in str(problem).splitlines()[1:3])
        raise ValueError(f"the weights are not this model's: {what[:300]}") from None
