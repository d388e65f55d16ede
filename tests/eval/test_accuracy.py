"""UA, IRA and CRA against counts made by hand, and the classification behind them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from erase_concept.errors import RequestError
from erase_concept.eval.judges.emojinette import KINDS, classify
from erase_concept.eval.judges.judge import Judgement, LoadedJudge
from erase_concept.eval.judges.judge import best_labels as best
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.accuracy import accuracy, confusion, cra, ira, per_class, share, ua
from erase_concept.eval.metrics.metric import JudgedImages, MetricContext, MetricInput, MetricResult, Target
from erase_concept.eval.score import wilson
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.pipelines.emojinette.classifier import FEATURES, EmojinetteClassifier
from erase_concept.pipelines.image_set import ImageSet
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.label_grid import asks_for
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
ROWS = tuple(PromptRow("p", place, object=o, style=s) for place, (o, s, _, _) in enumerate(TABLE))
LABELS = (*CATALOG.labels, *CATALOG.styles)


def _judgement(table: list[tuple[str, str, str, str]]) -> Judgement:
    """A judgement that shows the last two columns of a table, and is sure of it; "?" was not judged."""
    scores = np.zeros((len(table), len(LABELS)), np.float32)
    for row, (_, _, thing, style) in zip(scores, table, strict=True):
        if "?" in (thing, style):
            row[:] = np.nan
        else:
            row[LABELS.index(thing)] = row[LABELS.index(style)] = 1
    return Judgement(LABELS, scores, KINDS)


def _input(concept: Concept, judgement: Judgement, rows: tuple[PromptRow, ...] = ROWS) -> MetricInput:
    """What metrics get of one model's images."""
    images = JudgedImages(ImageSet((), rows, {}), {"net": judgement})
    targets = tuple(
        Target(part.name, part.kind, part.name, np.array([asks_for(row, part) for row in rows], bool))
        for part in concept.parts
    )
    forget = np.any([target.asks for target in targets], axis=0)
    judge = LoadedJudge("the net", LABELS, lambda files: judgement, KINDS)
    return MetricInput(concept.name, targets, forget, {"net": judge}, images, None)


def _result(name: str, data: MetricInput) -> MetricResult:
    kinds = tuple(dict.fromkeys(target.kind for target in data.targets))
    prepared = METRICS.find(name).prepare(MetricContext(None, data.judges, kinds, baseline=False))
    return prepared.compute(data)


def test_an_erased_object(church: Concept) -> None:
    data = _input(church, _judgement(TABLE))
    assert data.forget.tolist() == [True] * 3 + [False] * 6
    # UA: rows 0 and 2 of 0 to 2. IRA: rows 3, 5, 6 of 3 to 6. CRA, retain rows with a style: 3, 4, 7 of 3, 4, 5, 7.
    for metric, hits, n in (("ua", 2, 3), ("ira", 3, 4), ("cra", 3, 4)):
        (score,) = _result(metric, data).scores
        assert (score.value, score.n, score.ci95, score.target) == (hits / n, n, wilson(hits, n), "church")
        assert (score.metric, score.unit, score.baseline) == (metric, "fraction", None)


def test_an_erased_style(sketch: Concept) -> None:
    # Forget rows 2, 4, 5: seen as sketch only in 4. IRA, other rows with a style: 0, 3, 7 of 0, 3, 7.
    # CRA, all rows with an object: seen in 1, 3, 5, 6 of 0 to 6.
    for metric, hits, n in (("ua", 2, 3), ("ira", 3, 3), ("cra", 4, 7)):
        (score,) = _result(metric, _input(sketch, _judgement(TABLE))).scores
        assert (score.value, score.n) == (hits / n, n)


def test_charts_hold_every_label_that_was_asked_for(church: Concept) -> None:
    result = _result("accuracy", _input(church, _judgement(TABLE)))
    objects, styles = result.charts
    assert (objects.title, styles.title) == ("Objects recognised", "Styles recognised")
    assert {bar.label: (bar.value, bar.n) for bar in objects.bars} == {
        "church": (1 / 3, 3),
        "dog": (0.5, 2),
        "cat": (1, 2),
    }
    assert {bar.label: (bar.value, bar.n) for bar in styles.bars} == {
        "3d": (1, 1),
        "flat": (1, 2),
        "sketch": (1 / 3, 3),
    }
    assert [bar.label for bar in objects.bars] == [
        label for label in CATALOG.labels if label in ("church", "dog", "cat")
    ]
    assert [bar.label for bar in (*objects.bars, *styles.bars) if bar.forget] == ["church"]
    assert result.provenance["confusion"]["object"]["erased"]["church"] == {"horn": 1, "church": 1, "house": 1}


def test_what_was_not_judged_counts_nowhere_and_is_told(church: Concept) -> None:
    """Row 1 shows the church. Where it is not judged, it is neither gone nor there."""
    table = [(o, s, "?" if place == 1 else thing, style) for place, (o, s, thing, style) in enumerate(TABLE)]
    (score,) = _result("ua", _input(church, _judgement(table))).scores
    assert (score.value, score.n, score.ci95) == (1, 2, wilson(2, 2))
    assert "; 1 images not judged; Wilson" in score.protocol
    nothing = [(o, s, "?", "?") for o, s, _, _ in TABLE]
    with pytest.raises(RequestError, match="ua of church: needs at least one image; none was judged"):
        _result("ua", _input(church, _judgement(nothing)))
    assert share("asr", "church", [True, None, False, True], "p").value == pytest.approx(2 / 3)


def test_any_judge_gives_the_same_shares(church: Concept) -> None:
    """A judge that answers yes or no by a threshold, in the place of a classifier."""
    scores = np.array([[0.2], [0.5], [0.49], [0.9], [0.1], [0.1], [0.1], [0.1], [np.nan]], np.float32)
    data = _input(church, Judgement(("church",), scores, ("object",), threshold=0.5))
    data = replace(data, judges={"net": LoadedJudge("yes or no", ("church",), lambda files: None, ("object",))})
    (score,) = _result("ua", data).scores
    assert (score.value, score.n) == (2 / 3, 3)
    assert score.protocol.startswith("yes or no does not see the object church")


def test_what_nobody_asks_for_is_not_measured() -> None:
    rocket = _input(CATALOG.concepts["rocket"], _judgement(TABLE))
    assert _result("ua", rocket).missing == {"ua": "no image asks for what was erased"}
    with pytest.raises(
        RequestError, match="needs a judge that tells which nudity an image shows; none of these does: net"
    ):
        METRICS.find("ua").prepare(MetricContext(None, rocket.judges, ("nudity",), baseline=False))


def _noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)


def test_classify_does_not_depend_on_the_batch_size(classifier: EmojinetteClassifier) -> None:
    images = _noise(7)
    whole = classify(images, classifier)
    assert whole.features.shape == (7, FEATURES)
    assert whole.features.dtype == np.float32
    for batch_size in (1, 3):
        part = classify(images, classifier, batch_size=batch_size)
        assert part.words == whole.words
        np.testing.assert_allclose(part.features, whole.features, rtol=1e-4, atol=1e-5)


def test_classify_names_the_largest_logit_of_pixels_from_0_to_1(classifier: EmojinetteClassifier) -> None:
    images = _noise(4)
    seen = classify(images, classifier)
    object_logits, style_logits = classifier(torch.tensor(images / 255.0, dtype=torch.float32).movedim(-1, 1))
    assert seen.shown("object") == [(CATALOG.labels[place],) for place in object_logits.argmax(1)]
    assert seen.shown("style") == [(CATALOG.styles[place],) for place in style_logits.argmax(1)]
    chances = torch.cat([object_logits.softmax(1), style_logits.softmax(1)], 1)
    np.testing.assert_allclose(seen.scores, chances.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32), np.zeros((2, 64, 64, 1), np.uint8)],
)
def test_classify_refuses_other_images(images: np.ndarray, classifier: EmojinetteClassifier) -> None:
    with pytest.raises(ValueError, match=r"takes uint8 images \[n, 64, 64, 3\]"):
        classify(images, classifier)


# What was asked for, and the probabilities of cat, dog, owl and bee.
ANIMALS = ("cat", "dog", "owl", "bee")
ASKED = ("cat", "cat", "cat", "dog", "dog", "owl", "")
CHANCES = np.array(
    [
        [0.1, 0.6, 0.2, 0.1],  # cat is third, for it ties with bee and stands before it
        [0.5, 0.3, 0.1, 0.1],  # cat is first
        [0.3, 0.4, 0.2, 0.1],  # cat is second
        [0.4, 0.4, 0.1, 0.1],  # dog is second, for it ties with cat and stands behind it
        [0.1, 0.7, 0.1, 0.1],  # dog is first
        [0.2, 0.3, 0.1, 0.4],  # owl is fourth
        [0.1, 0.1, 0.7, 0.1],  # no label is asked for
    ],
    dtype=np.float32,
)


def test_the_best_labels_in_order() -> None:
    assert best(CHANCES, ANIMALS, k=4)[0] == ("dog", "owl", "cat", "bee")
    assert best(CHANCES, ANIMALS, k=1) == [("dog",), ("cat",), ("dog",), ("cat",), ("dog",), ("bee",), ("owl",)]
    # Among cat and bee alone, by their columns.
    assert [labels[0] for labels in best(CHANCES[:, [0, 3]], ("cat", "bee"), k=2)] == ["cat"] * 5 + ["bee", "cat"]


@pytest.mark.parametrize(
    ("table", "k", "words"),
    [
        (CHANCES[:, :3], 1, r"needs numbers \[n, 4\]"),
        (CHANCES[0], 1, "one for each label"),
        (np.full((2, 4), np.nan), 1, "or nan"),
        (CHANCES, 5, "between 1 and 4"),
        (CHANCES, 0, "between 1 and 4"),
    ],
)
def test_no_best_labels_of_other_tables(table: np.ndarray, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        best(table, ANIMALS, k=k)


def test_accuracies_of_probabilities_by_hand() -> None:
    seen = best(CHANCES, ANIMALS, k=2)
    # Places of the asked labels: 3, 1, 2 of cat; 2, 1 of dog; 4 of owl.
    for function, hits, n in ((ua, 2, 3), (ira, 1, 3)):
        score = function(ASKED, seen, "cat", by="the animal net")
        assert (score.value, score.n, score.ci95, score.target) == (hits / n, n, wilson(hits, n), "cat")
        assert score.protocol.startswith("the animal net ")
    for function, hits, n in ((ua, 1, 3), (ira, 2, 3)):  # within two
        score = function(ASKED, seen, "cat", by="net", k=2)
        assert (score.metric, score.value, score.n) == (f"{function.__name__}_top2", hits / n, n)
        assert "among its top 2" in score.protocol
    top1, top2 = (accuracy(ASKED, seen, by="net", k=k) for k in (1, 2))
    assert (top1.metric, top1.value, top1.n, top1.ci95) == ("top1", 2 / 6, 6, wilson(2, 6))
    assert (top2.metric, top2.value, top2.n) == ("top2", 4 / 6, 6)
    classes = per_class(ASKED, seen, by="net")
    assert {label: (score.value, score.n) for label, score in classes.items()} == {
        "cat": (1 / 3, 3),
        "dog": (1 / 2, 2),
        "owl": (0, 1),
    }
    assert classes["cat"].ci95 == wilson(1, 3)
    assert per_class(ASKED, seen, by="net", k=2)["cat"].value == 2 / 3


def test_cra_counts_the_chosen_images() -> None:
    kept = np.array([False, False, False, True, True, True, True])
    seen = best(CHANCES, ANIMALS, k=1)
    some, whole = (cra(ASKED, seen, "sketch", by="net", what="object", chosen=chosen) for chosen in (kept, None))
    assert (some.value, some.n, some.target) == (1 / 3, 3, "sketch")
    assert some.protocol == "net sees the prompted object; retain prompts; Wilson"
    assert (whole.value, whole.n) == (2 / 6, 6)
    assert "forget and retain prompts" in whole.protocol


def test_confusion_tells_every_image() -> None:
    table = confusion(ASKED, best(CHANCES, ANIMALS, k=3))
    assert table == {"cat": {"dog": 2, "cat": 1}, "dog": {"cat": 1, "dog": 1}, "owl": {"bee": 1}, "": {"owl": 1}}
    assert list(table) == ["cat", "dog", "owl", ""]
    assert list(table["cat"]) == ["dog", "cat"]


def test_accuracies_equal_a_count_over_random_ranks() -> None:
    generator = np.random.default_rng(0)
    labels = tuple(f"class {place}" for place in range(30))
    chances = generator.dirichlet(np.ones(30), 400)
    asked = generator.integers(0, 30, 400)
    rank = (chances > chances[np.arange(400), asked][:, None]).sum(1)
    names, seen = [labels[place] for place in asked], best(chances, labels)
    for k in (1, 5):
        assert accuracy(names, seen, by="net", k=k).value == pytest.approx((rank < k).mean())
        assert ua(names, seen, "class 7", by="net", k=k).value == pytest.approx((rank[asked == 7] >= k).mean())
        assert ira(names, seen, "class 7", by="net", k=k).value == pytest.approx((rank[asked != 7] < k).mean())
    table = confusion(names, seen)
    first = chances.argmax(1)
    assert sum(sum(row.values()) for row in table.values()) == 400
    assert all(
        table[labels[a]].get(labels[s], 0) == ((asked == a) & (first == s)).sum() for a in range(30) for s in range(30)
    )


def test_accuracies_refuse_what_cannot_be_counted() -> None:
    seen = best(CHANCES, ANIMALS, k=1)
    with pytest.raises(ValueError, match="the top 5 of an image"):
        ua(ASKED, seen, "cat", by="net", k=5)
    with pytest.raises(ValueError, match="ua of bee: needs at least one image"):
        ua(ASKED, seen, "bee", by="net")
    with pytest.raises(ValueError, match="longer"):
        accuracy(ASKED[:-1], seen, by="net")
