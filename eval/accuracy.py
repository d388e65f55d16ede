"""Is the concept gone, is the rest there: shares of images in which a classifier finds what the prompt asked for.

UA, IRA and CRA as in UnlearnCanvas (arXiv 2402.11846). *Forget* rows are those labelled with the erased concept,
*retain* rows are all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from erase_concept.eval.score import Score, metric, wilson
from erase_concept.prompts.emojinette import OBJECT_LABELS, STYLES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.pipelines.emojinette.classifier import EmojinetteClassifier
    from erase_concept.prompts.concept import Concept
    from erase_concept.prompts.promptset import PromptRow

LabelKind = Literal["object", "style"]
LABELS: dict[LabelKind, tuple[str, ...]] = {"object": OBJECT_LABELS, "style": STYLES}
SIZE = 64


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
        tuple(OBJECT_LABELS[place] for place in objects),
        tuple(STYLES[place] for place in styles),
        np.concatenate(features),
        images,
    )


def label_kind(concept: Concept) -> LabelKind:
    """Return the kind of label that names the concept; raises ValueError when it is neither an object nor a style."""
    if concept.kind in ("object", "style"):
        return concept.kind
    raise ValueError(f"images are labelled by object and style, not by {concept.kind}")


def forget_mask(rows: Sequence[PromptRow], concept: Concept) -> NDArray[np.bool_]:
    """Return which rows [n] ask for the concept."""
    kind = label_kind(concept)
    return np.array([(row.object if kind == "object" else row.style) == concept.name for row in rows], dtype=bool)


@metric("ua")
def unlearning_accuracy(seen: Classified, concept: Concept) -> Score:
    """UA: share of the erased concept's images in which the classifier does not find it."""
    kind = label_kind(concept)
    gone = [label != concept.name for label in _chosen(seen.seen(kind), forget_mask(seen.rows, concept))]
    return _share("ua", concept, gone, f"Emojinette classifier does not see the {kind} {concept.name}; forget prompts")


@metric("ira")
def in_domain_retain_accuracy(seen: Classified, concept: Concept) -> Score:
    """IRA: accuracy on the other concepts of the same kind (other objects when an object was erased)."""
    kind = label_kind(concept)
    correct = _correct(seen, kind, ~forget_mask(seen.rows, concept))
    return _share("ira", concept, correct, f"Emojinette classifier sees the prompted {kind}; retain prompts")


@metric("cra")
def cross_domain_retain_accuracy(seen: Classified, concept: Concept) -> Score:
    """CRA: accuracy of the other kind (styles when an object was erased; objects, on all prompts, for a style)."""
    if label_kind(concept) == "object":
        correct = _correct(seen, "style", ~forget_mask(seen.rows, concept))
        return _share("cra", concept, correct, "Emojinette classifier sees the prompted style; retain prompts")
    # An erased style must leave its objects recognisable, so its own prompts count here.
    correct = _correct(seen, "object", np.ones(len(seen.rows), dtype=bool))
    return _share("cra", concept, correct, "Emojinette classifier sees the prompted object; forget and retain prompts")


def per_concept(seen: Classified) -> dict[LabelKind, dict[str, tuple[int, int]]]:
    """Return (images in which it was found, images that asked for it) of every object and every style."""
    table: dict[LabelKind, dict[str, tuple[int, int]]] = {}
    for kind, labels in LABELS.items():
        pairs = list(zip(seen.asked(kind), seen.seen(kind), strict=True))
        table[kind] = {
            label: (sum(a == s == label for a, s in pairs), sum(a == label for a, _ in pairs)) for label in labels
        }
    return table


def _correct(seen: Classified, kind: LabelKind, chosen: NDArray[np.bool_]) -> list[bool]:
    """Whether each chosen row's label of that kind was seen; rows without such a label are left out."""
    asked, found = _chosen(seen.asked(kind), chosen), _chosen(seen.seen(kind), chosen)
    return [a == f for a, f in zip(asked, found, strict=True) if a]


def _chosen(labels: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [label for label, keep in zip(labels, chosen, strict=True) if keep]


def _share(name: str, concept: Concept, hits: list[bool], protocol: str) -> Score:
    if not hits:
        raise ValueError(f"{name} of {concept.name} needs at least one image; none of the rows is labelled for it")
    interval = wilson(sum(hits), len(hits))
    return Score(name, concept.name, sum(hits) / len(hits), len(hits), interval, "fraction", f"{protocol}; Wilson")
