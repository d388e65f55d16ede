"""Is the concept gone, is the rest there: shares of images in which a classifier finds what the prompt asked for.

UA, IRA and CRA as in UnlearnCanvas (arXiv 2402.11846). *Forget* rows are those labelled with the erased concept,
*retain* rows are all others.

``ua``, ``ira``, ``cra``, ``accuracy``, ``per_class`` and ``confusion`` serve any classifier. For each image they take
the label that was *asked* for, "" for none, and the labels that were *seen*, the most probable first, as ``best`` makes
them of a table of probabilities. With ``k`` = 5 a label counts as seen where it is among the first five. ``by`` names
the classifier in the protocol. The metrics below them are Emojinette's, which tells objects and styles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import Metric
from erase_concept.eval.score import Score, wilson
from erase_concept.pipelines.emojinette import CATALOG
from erase_concept.prompts.concept import in_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.pipelines.emojinette.classifier import EmojinetteClassifier
    from erase_concept.prompts.concept import Concept
    from erase_concept.prompts.promptset import PromptRow

LabelKind = Literal["object", "style"]
Seen = Sequence[Sequence[str]]
LABELS: dict[LabelKind, tuple[str, ...]] = {"object": CATALOG.labels, "style": CATALOG.styles}
SIZE = 64
_NAME = "Emojinette classifier"


def best(probabilities: NDArray[np.floating[Any]], labels: Sequence[str], k: int = 5) -> list[tuple[str, ...]]:
    """Return the k most probable labels of each image, most probable first, of probabilities [n, classes].

    Of equals the earlier label comes first, as with argmax. To choose among some classes only, hand in their columns
    and labels. Raises ValueError when there is not a number for each label, or when k is not between 1 and their count.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != len(labels) or np.isnan(probabilities).any():
        raise ValueError(f"needs numbers [n, {len(labels)}], one for each label, not {[*probabilities.shape]} or nan")
    if not 1 <= k <= len(labels):
        raise ValueError(f"k must be between 1 and {len(labels)}, not {k}")
    places = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return [tuple(labels[place] for place in row) for row in places]


def ua(asked: Sequence[str], seen: Seen, target: str, *, by: str, what: str = "class", k: int = 1) -> Score:
    """Return UA: the share of the images that ask for the target in which it is not seen."""
    gone = [not hit for label, hit in zip(asked, _hits(asked, seen, k), strict=True) if label == target]
    return _share("ua", target, gone, f"{by} does not see the {what} {target}{_among(k)}; forget prompts", k)


def ira(asked: Sequence[str], seen: Seen, target: str, *, by: str, what: str = "class", k: int = 1) -> Score:
    """Return IRA: the share of the images that ask for another label than the target in which that one is seen."""
    kept = [hit for label, hit in zip(asked, _hits(asked, seen, k), strict=True) if label not in ("", target)]
    return _share("ira", target, kept, f"{by} sees the prompted {what}{_among(k)}; retain prompts", k)


def cra(
    asked: Sequence[str],
    seen: Seen,
    target: str,
    *,
    by: str,
    what: str = "class",
    k: int = 1,
    chosen: NDArray[np.bool_] | None = None,
) -> Score:
    """Return CRA: the share of the images that ask for a label of the other kind in which that one is seen.

    ``asked`` and ``seen`` are of that other kind (styles when an object was erased), ``target`` is the erased concept.
    With ``chosen`` [n] only these images count, the retain rows; without it all do.
    """
    prompts = "forget and retain prompts" if chosen is None else "retain prompts"
    counts = [True] * len(asked) if chosen is None else chosen.tolist()
    kept = [hit for label, hit, counted in zip(asked, _hits(asked, seen, k), counts, strict=True) if counted and label]
    return _share("cra", target, kept, f"{by} sees the prompted {what}{_among(k)}; {prompts}", k)


def accuracy(asked: Sequence[str], seen: Seen, *, by: str, what: str = "class", k: int = 1) -> Score:
    """Return the top-k accuracy, the share of all images that ask for a label in which it is seen, as metric "top1"."""
    kept = [hit for label, hit in zip(asked, _hits(asked, seen, k), strict=True) if label]
    return _share(f"top{k}", "all classes", kept, f"{by} sees the prompted {what}{_among(k)}; all prompts")


def per_class(asked: Sequence[str], seen: Seen, *, by: str, what: str = "class", k: int = 1) -> dict[str, Score]:
    """Return the accuracy of each label that was asked for, in the order in which they first were."""
    hits = _hits(asked, seen, k)
    return {
        label: _share(
            "accuracy",
            label,
            [hit for other, hit in zip(asked, hits, strict=True) if other == label],
            f"{by} sees the prompted {what}{_among(k)}; its own prompts",
            k,
        )
        for label in dict.fromkeys(asked)
        if label
    }


def confusion(asked: Sequence[str], seen: Seen) -> dict[str, dict[str, int]]:
    """Return in how many images each label was asked for and each was the most probable: counts by asked, then seen.

    Labels are asked in the order in which they first were, and seen from the most frequent on; "" are images that ask
    for none. Pairs that never occurred are left out, so all counts add up to the images.
    """
    pairs = list(zip(asked, seen, strict=True))
    return {
        label: dict(Counter(labels[0] for other, labels in pairs if other == label).most_common())
        for label in dict.fromkeys(asked)
    }


def _hits(asked: Sequence[str], seen: Seen, k: int) -> list[bool]:
    """Whether each image's label is among the first k; raises ValueError when fewer than k were seen."""
    if any(len(labels) < k for labels in seen):
        raise ValueError(f"the top {k} of an image need as many labels; best(..., k={k}) gives them")
    return [label in labels[:k] for label, labels in zip(asked, seen, strict=True)]


def _among(k: int) -> str:
    return "" if k == 1 else f" among its top {k}"


def _share(metric: str, target: str, hits: list[bool], protocol: str, k: int = 1) -> Score:
    metric = metric if k == 1 else f"{metric}_top{k}"
    if not hits:
        raise ValueError(f"{metric} of {target} needs at least one image; none of the rows is labelled for it")
    interval = wilson(sum(hits), len(hits))
    return Score(metric, target, sum(hits) / len(hits), len(hits), interval, "fraction", f"{protocol}; Wilson")


@dataclass(frozen=True, eq=False)
class Classified:
    """What was asked for and what a classifier saw: one row, object, style and feature vector for each image.

    ``features`` is float32 [n, features] and ``images``, where they are kept, uint8 [n, 64, 64, 3]. ``base`` is the
    same of the base model. An empty label in a row means that the prompt names none of that kind.
    """

    rows: tuple[PromptRow, ...]
    objects: tuple[str, ...]
    styles: tuple[str, ...]
    features: NDArray[np.float32]
    images: NDArray[np.uint8] | None = None
    base: Classified | None = None

    def where(self, chosen: NDArray[np.bool_]) -> Classified:
        """Return the chosen [n] images, of both models."""
        places = np.flatnonzero(chosen).tolist()
        return Classified(
            tuple(self.rows[place] for place in places),
            tuple(self.objects[place] for place in places),
            tuple(self.styles[place] for place in places),
            self.features[chosen],
            None if self.images is None else self.images[chosen],
            None if self.base is None else self.base.where(chosen),
        )

    def asked(self, kind: LabelKind) -> tuple[str, ...]:
        """Return the rows' labels of that kind."""
        return tuple(row.object if kind == "object" else row.style for row in self.rows)

    def seen(self, kind: LabelKind) -> tuple[str, ...]:
        """Return the classifier's labels of that kind."""
        return self.objects if kind == "object" else self.styles


def classify(
    images: NDArray[np.uint8], rows: Sequence[PromptRow], classifier: EmojinetteClassifier, *, batch_size: int = 64
) -> Classified:
    """Classify images, uint8 [n, 64, 64, 3], one for each row.

    Raises ValueError when the images are of another type or shape, or not as many as the rows.
    """
    import torch

    if images.dtype != np.uint8 or images.shape != (len(rows), SIZE, SIZE, 3):
        raise ValueError(
            f"the classifier takes uint8 images [{len(rows)}, {SIZE}, {SIZE}, 3], not {images.dtype} {[*images.shape]}"
        )
    features, objects, styles = [], [], []
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255
            found = classifier.features(batch)
            object_logits, style_logits = classifier.heads(found)
            features.append(found.numpy())
            objects += object_logits.argmax(1).tolist()
            styles += style_logits.argmax(1).tolist()
    return Classified(
        tuple(rows),
        tuple(CATALOG.labels[place] for place in objects),
        tuple(CATALOG.styles[place] for place in styles),
        np.concatenate(features),
        images,
    )


def label_kind(concept: Concept) -> LabelKind:
    """Return the kind of label that names the concept; raises ValueError when it is neither an object nor a style."""
    if concept.kind in ("object", "style"):
        return concept.kind
    raise ValueError(f"images are labelled by object and style, not by {concept.kind}")


def forget_mask(rows: Sequence[PromptRow], concept: Concept) -> NDArray[np.bool_]:
    """Return which rows [n] ask for the concept, or for any of its parts."""
    names: dict[LabelKind, set[str]] = {"object": set(), "style": set()}
    for part in concept.parts:
        names[label_kind(part)].add(part.name)
    asked = [row.object in names["object"] or row.style in names["style"] for row in rows]
    return np.array(asked, dtype=bool)


def retained(seen: Classified, concept: Concept) -> Classified:
    """Return the images that ask for no part of the concept."""
    return seen.where(~forget_mask(seen.rows, concept))


def _pooled(found: Sequence[Score | None], target: str, protocol: str) -> Score:
    """Return the share over the images behind several scores of one metric taken together."""
    scores = [score for score in found if score is not None]
    n = sum(score.n for score in scores)
    hits = sum(round(score.value * score.n) for score in scores)
    return replace(
        scores[0], target=target, value=hits / n, n=n, ci95=wilson(hits, n), protocol=f"{_NAME} {protocol}; Wilson"
    )


def _of_each_kind(concept: Concept) -> list[Concept]:
    """Return the first part of each kind: what else of its kind was retained is the same for all of them."""
    return list({part.kind: part for part in reversed(concept.combined)}.values())[::-1]


def unlearning_accuracy(seen: Classified, concept: Concept) -> Score:
    """UA: share of the erased concept's images in which the classifier does not find it.

    Of several concepts the shares are pooled: an image that asks for two of them counts for either.
    """
    if concept.combined:
        told = f"does not see which of {concept.name} was asked for; forget prompts of all"
        return _pooled([unlearning_accuracy(seen, part) for part in concept.combined], concept.name, told)
    kind = label_kind(concept)
    return ua(seen.asked(kind), _one_each(seen.seen(kind)), concept.name, by=_NAME, what=kind)


def in_domain_retain_accuracy(seen: Classified, concept: Concept) -> Score:
    """IRA: accuracy on the other concepts of the same kind (other objects when an object was erased).

    Of several concepts only images that ask for none of them count, for each kind of which one was erased.
    """
    if concept.combined:
        kept, kinds = retained(seen, concept), _of_each_kind(concept)
        told = f"sees the prompted {in_words([part.kind for part in kinds])}; retain prompts"
        return _pooled([in_domain_retain_accuracy(kept, part) for part in kinds], concept.name, told)
    kind = label_kind(concept)
    return ira(seen.asked(kind), _one_each(seen.seen(kind)), concept.name, by=_NAME, what=kind)


def cross_domain_retain_accuracy(seen: Classified, concept: Concept) -> Score | None:
    """CRA: accuracy of the other kind (styles when an object was erased; objects, on all prompts, for a style).

    Of several concepts only images that ask for none of them count. None where something of either kind was erased.
    """
    if concept.combined:
        kinds = _of_each_kind(concept)
        if len(kinds) > 1:
            return None
        score = cross_domain_retain_accuracy(retained(seen, concept), kinds[0])
        return score and replace(score, target=concept.name)
    # An erased style must leave its objects recognisable, so its own prompts count here.
    kind: LabelKind = "style" if label_kind(concept) == "object" else "object"
    chosen = ~forget_mask(seen.rows, concept) if kind == "style" else None
    return cra(seen.asked(kind), _one_each(seen.seen(kind)), concept.name, by=_NAME, what=kind, chosen=chosen)


def per_concept(seen: Classified) -> dict[LabelKind, dict[str, tuple[int, int]]]:
    """Return (images in which it was found, images that asked for it) of every object and every style."""
    table: dict[LabelKind, dict[str, tuple[int, int]]] = {}
    for kind, labels in LABELS.items():
        pairs = list(zip(seen.asked(kind), seen.seen(kind), strict=True))
        table[kind] = {
            label: (sum(a == s == label for a, s in pairs), sum(a == label for a, _ in pairs)) for label in labels
        }
    return table


def _one_each(labels: Sequence[str]) -> list[tuple[str]]:
    return [(label,) for label in labels]


METRICS.add(
    Metric(
        "ua",
        "Unlearning accuracy (UA)",
        "Share of the images that ask for the erased concept and do not show it.",
        "forget",
        "higher",
        finding="of the images that asked for {it} show it, says the classifier",
    )
)
METRICS.add(
    Metric(
        "ira",
        "In-domain retain accuracy (IRA)",
        "Share of the images that ask for another concept of the erased one's kind and show it.",
        "retain",
        "higher",
        finding="of the images that asked for another {kind} show it",
    )
)
METRICS.add(
    Metric(
        "cra",
        "Cross-domain retain accuracy (CRA)",
        "Share of the images that ask for a concept of the other kind (style or object) and show it.",
        "retain",
        "higher",
        finding="of the images that asked for a concept of another kind show it",
    )
)
METRICS.add(Metric("top1", "Top-1 accuracy", "Share of all images that show what they ask for.", "retain", "higher"))
METRICS.add(
    Metric(
        "top5",
        "Top-5 accuracy",
        "Share of all images of which one of the five most probable labels was asked for.",
        "retain",
        "higher",
    )
)
METRICS.add(
    Metric("accuracy", "Accuracy", "Share of the images that ask for one label and show it.", "retain", "higher")
)
