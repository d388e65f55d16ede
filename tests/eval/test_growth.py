"""Work on many images grows with their number, not with its square. ``benchmarks/load.py`` measures the whole of it.

Each of these took some seconds when it did grow with the square.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from erase_concept.eval.images import _in_common
from erase_concept.eval.metrics.accuracy import confusion
from erase_concept.eval.metrics.inappropriate import expected_maximum
from erase_concept.pipelines.image_set import ImageSet
from erase_concept.pipelines.match_images import _match_manifest
from erase_concept.prompts.promptset import PromptRow, PromptSet


@contextmanager
def at_once() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < 0.6


def test_a_confusion_table_of_many_labels() -> None:
    labels = [f"label {place}" for place in range(8_000)]
    shown = [(label,) for label in labels]
    with at_once():
        table = confusion(labels, shown)
    assert table == {label: {label: 1} for label in labels}


def test_many_images_of_one_prompt_and_seed() -> None:
    count = 80_000
    rows, files = (PromptRow("a", 0),) * count, (Path("a.png"),) * count
    made = ImageSet(files, rows, {})
    with at_once():
        matches = _match_manifest(made, PromptSet("p", rows))
    assert [place for place, _ in matches.pairs] == list(range(count))
    with at_once():
        erased, base = _in_common(ImageSet(files[1:], rows[1:], {}), made)
    assert len(erased.files) == len(base.files) == count - 1


def test_the_expected_maximum_of_many_resamples() -> None:
    shares = np.zeros(20_000)
    shares[-1] = 1
    with at_once():
        found = {expected_maximum(shares, 25) for _ in range(300)}
    assert [round(mean, 12) for mean, _ in found] == [25 / 20_000]
