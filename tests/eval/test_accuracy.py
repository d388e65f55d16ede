"""UA, IRA and CRA against counts made by hand, and the classification behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erase_concept.eval.accuracy import (
    Classified,
    classify,
    cross_domain_retain_accuracy,
    forget_mask,
    in_domain_retain_accuracy,
    per_concept,
    unlearning_accuracy,
)
from erase_concept.eval.score import wilson
from erase_concept.pipelines.emojinette.classifier import FEATURES, EmojinetteClassifier
from erase_concept.prompts.concept import Concept, concepts
from erase_concept.prompts.emojinette import OBJECT_LABELS, STYLES
from erase_concept.prompts.promptset import PromptRow

# asked object, asked style, seen object, seen style
TABLE = [
    ("church", "flat", "horn", "flat"),
    ("church", "", "church", "pixel"),
    ("church", "sketch", "house", "flat"),
    ("dog", "flat", "dog", "flat"),
    ("dog", "sketch", "cat", "sketch"),
    ("cat", "sketch", "cat", "3d"),
    ("cat", "", "cat", "flat"),
    ("", "3d", "church", "3d"),
    ("", "", "church", "3d"),
]
SEEN = Classified(
    tuple(PromptRow("p", place, object=o, style=s) for place, (o, s, _, _) in enumerate(TABLE)),
    tuple(line[2] for line in TABLE),
    tuple(line[3] for line in TABLE),
    np.zeros((len(TABLE), 2), np.float32),
)


def test_an_erased_object(church: Concept) -> None:
    assert forget_mask(SEEN.rows, church).tolist() == [True] * 3 + [False] * 6
    # UA: rows 0 and 2 of 0 to 2. IRA: rows 3, 5, 6 of 3 to 6. CRA, retain rows with a style: 3, 4, 7 of 3, 4, 5, 7.
    for metric, hits, n in (
        (unlearning_accuracy, 2, 3),
        (in_domain_retain_accuracy, 3, 4),
        (cross_domain_retain_accuracy, 3, 4),
    ):
        score = metric(SEEN, church)
        assert (score.value, score.n, score.ci95, score.target) == (hits / n, n, wilson(hits, n), "church")
        assert (score.unit, score.baseline) == ("fraction", None)


def test_an_erased_style(sketch: Concept) -> None:
    # Forget rows 2, 4, 5: seen as sketch only in 4. IRA, other rows with a style: 0, 3, 7 of 0, 3, 7.
    # CRA, all rows with an object: seen in 1, 3, 5, 6 of 0 to 6.
    for metric, hits, n in (
        (unlearning_accuracy, 2, 3),
        (in_domain_retain_accuracy, 3, 3),
        (cross_domain_retain_accuracy, 4, 7),
    ):
        score = metric(SEEN, sketch)
        assert (score.value, score.n) == (hits / n, n)


def test_per_concept_counts_every_label() -> None:
    table = per_concept(SEEN)
    assert tuple(table["object"]) == OBJECT_LABELS
    assert tuple(table["style"]) == STYLES
    assert table["object"]["church"] == (1, 3)
    assert table["object"]["dog"] == (1, 2)
    assert table["object"]["cat"] == (2, 2)
    assert table["object"]["rocket"] == (0, 0)
    assert table["style"] == {"3d": (1, 1), "flat": (2, 2), "sketch": (1, 3), "pixel": (0, 0)}


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="ua of rocket needs at least one image"):
        unlearning_accuracy(SEEN, concepts()["rocket"])
    with pytest.raises(ValueError, match="not by nudity"):
        unlearning_accuracy(SEEN, concepts()["nudity"])


def _noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)


def test_classify_does_not_depend_on_the_batch_size(classifier: EmojinetteClassifier) -> None:
    images, rows = _noise(7), [PromptRow("p", seed) for seed in range(7)]
    whole = classify(images, rows, classifier)
    assert whole.features.shape == (7, FEATURES)
    assert whole.features.dtype == np.float32
    for batch_size in (1, 3):
        part = classify(images, rows, classifier, batch_size=batch_size)
        assert (part.objects, part.styles, part.rows) == (whole.objects, whole.styles, whole.rows)
        np.testing.assert_allclose(part.features, whole.features, rtol=1e-4, atol=1e-5)


def test_classify_names_the_largest_logit_of_pixels_from_0_to_1(classifier: EmojinetteClassifier) -> None:
    images, rows = _noise(4), [PromptRow("p", seed) for seed in range(4)]
    seen = classify(images, rows, classifier)
    object_logits, style_logits = classifier(torch.tensor(images / 255.0, dtype=torch.float32).movedim(-1, 1))
    assert seen.objects == tuple(OBJECT_LABELS[place] for place in object_logits.argmax(1))
    assert seen.styles == tuple(STYLES[place] for place in style_logits.argmax(1))


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32), np.zeros((1, 64, 64, 3), np.uint8)],
)
def test_classify_refuses_other_images(images: np.ndarray, classifier: EmojinetteClassifier) -> None:
    with pytest.raises(ValueError, match=r"takes uint8 images \[2, 64, 64, 3\]"):
        classify(images, [PromptRow("p", 0), PromptRow("p", 1)], classifier)
