"""What a judge is: it says for each image whether it shows a concept.

A judge is a record (``Judge``) that loads its network (``LoadedJudge``), which turns image files into a ``Judgement``.
Metrics count judgements and know no judge.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.settings import NoSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.features import Extractor

ANY_KIND = ""  # the kind of labels that may be objects or styles: the benchmark knows which


@dataclass(frozen=True, slots=True)  # there are many of them
class Detection:
    """One thing found in an image: its label and the detector's score from 0 to 1."""

    label: str
    score: float


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a judge says of n images.

    ``scores`` is float32 [n, labels] and NaN where an image was not judged; such an image counts nowhere. An image
    shows a label whose score is at least ``threshold``. Without a threshold it shows its most probable label of each
    kind. ``kinds`` holds each label's kind: "object", "style", "nudity".

    ``words`` tell people what each image is taken for. ``flagged`` [n] marks images that not everybody wants to see.
    ``features`` [n, d] are the network's. ``detections`` holds what a detector found in each image, and None for one
    that was not judged.
    """

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    kinds: tuple[str, ...] = ()
    threshold: float | None = None
    words: tuple[str, ...] = ()
    flagged: NDArray[np.bool_] | None = None
    features: NDArray[np.float32] | None = None
    detections: tuple[tuple[Detection, ...] | None, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a score for each image and label."""
        if self.scores.ndim != 2 or self.scores.shape[1] != len(self.labels):
            raise ValueError(f"a judgement needs scores [n, {len(self.labels)}], not {[*self.scores.shape]}")

    def shown(self, kind: str = ANY_KIND, k: int = 1) -> list[tuple[str, ...] | None]:
        """Return the labels of a kind that each image shows, the most probable first; None where it was not judged.

        Without a threshold these are the k most probable labels; of equals the earlier one comes first.
        """
        places = [at for at in range(len(self.labels)) if not self.kinds or self.kinds[at] == kind]
        labels, scores = [self.labels[at] for at in places], self.scores[:, places]
        found: list[tuple[str, ...] | None] = [None] * len(scores)
        judged = np.flatnonzero(~np.isnan(scores).any(1))
        count = k if self.threshold is None else len(labels)
        for row, best in zip(judged, best_labels(scores[judged], labels, count), strict=True):
            if self.threshold is None:
                found[row] = best
            else:
                found[row] = tuple(label for label in best if scores[row, labels.index(label)] >= self.threshold)
        return found

    def where(self, chosen: NDArray[np.bool_]) -> Judgement:
        """Return what is said of the chosen [n] images."""
        places = np.flatnonzero(chosen)
        return replace(
            self,
            scores=self.scores[places],
            words=tuple(self.words[at] for at in places) if self.words else (),
            flagged=None if self.flagged is None else self.flagged[places],
            features=None if self.features is None else self.features[places],
            detections=None if self.detections is None else tuple(self.detections[at] for at in places),
        )


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Features [n, d] of real images that a judge brings along, and the (object, style) that each shows."""

    features: NDArray[np.floating[Any]]
    labels: tuple[tuple[str, str], ...]
    weights: str  # SHA-256 of the file


@dataclass(frozen=True, eq=False)
class LoadedJudge:
    """A judge that is ready: what it can say, and the function that judges image files.

    ``name`` is what protocols call it, with the start of ``weights``, the SHA-256 of its weights. ``synonyms`` are
    further names of labels. ``judge`` never takes a failure for an image without the concept: where it cannot read a
    file it raises RequestError or says that the image was not judged, and it raises EraseError when its network fails.
    """

    name: str
    labels: tuple[str, ...]
    judge: Callable[[Sequence[Path]], Judgement]
    kinds: tuple[str, ...] = ()
    weights: str = ""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    held_out: HeldOut | None = None
    settings: Any = None

    def labels_of(self, kind: str) -> tuple[str, ...]:
        """Return the labels of one kind."""
        return tuple(label for label, its in zip(self.labels, self._kinds, strict=True) if its == kind)

    def knows(self, kind: str) -> bool:
        """Tell whether it has labels of that kind."""
        return kind in self._kinds

    def as_kind(self, kind: str) -> LoadedJudge:
        """Return the judge with labels of no known kind taken for that kind, as the benchmark asks."""
        if not set(self._kinds) <= {ANY_KIND}:
            return self
        kinds = (kind,) * len(self.labels)
        judge = self.judge
        return replace(self, kinds=kinds, judge=lambda files: replace(judge(files), kinds=kinds))

    def label(self, name: str, kind: str, *, setting: str = "concept") -> str:
        """Return the judge's label of that name, in any case and with ``_`` for spaces, or of a synonym.

        A label such as "chain saw, chainsaw" lists synonyms. Raises RequestError when there is none, or more than one.
        """
        labels, wanted = self.labels_of(kind), plain(name)
        found = {label for label in labels if plain(label) == wanted}
        found = found or {label for label in labels if wanted in map(plain, label.split(","))}
        found = found or {label for other, label in self.synonyms.items() if plain(other) == wanted and label in labels}
        if len(found) == 1:
            return found.pop()
        if found:
            raise RequestError(setting, name, f"names several classes of {self.name}: {'; '.join(sorted(found))}")
        near = get_close_matches(name, labels, cutoff=0.5) if len(labels) > 30 else labels
        hint = f"; {'near it' if len(labels) > 30 else 'allowed'}: {', '.join(near)}" if near else ""
        raise RequestError(setting, name, f"is no class of {self.name}{hint}")

    @property
    def _kinds(self) -> tuple[str, ...]:
        return self.kinds or (ANY_KIND,) * len(self.labels)


@dataclass(frozen=True)
class Judge:
    """What a judge says of itself, and how it is loaded.

    ``load`` takes the settings and the folder in which it may keep what it found in images, or None. It raises
    RequestError where a package or weights are missing. ``value`` is the setting that stands behind the name and a
    colon: ``torchvision:resnet50``. ``extractor`` loads its network's features, by which images have distances.
    """

    name: str
    title: str
    summary: str
    load: Callable[[Any, Path | None], LoadedJudge]
    settings: type = NoSettings
    value: str = ""
    extractor: Callable[[], Extractor] | None = None


def best_labels(scores: NDArray[np.floating[Any]], labels: Sequence[str], k: int = 5) -> list[tuple[str, ...]]:
    """Return the k labels of the highest scores of each image, the highest first, of scores [n, labels].

    Of equals the earlier label comes first, as with argmax. To choose among some labels only, hand in their columns.
    Raises ValueError when there is not a number for each label, or when k is not between 1 and their count.
    """
    if scores.ndim != 2 or scores.shape[1] != len(labels) or np.isnan(scores).any():
        raise ValueError(f"needs numbers [n, {len(labels)}], one for each label, not {[*scores.shape]} or nan")
    if not 1 <= k <= len(labels):
        raise ValueError(f"k must be between 1 and {len(labels)}, not {k}")
    places = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [tuple(labels[place] for place in row) for row in places]


def plain(text: str) -> str:
    """Return a label as it is compared: in lower case, with spaces in the place of ``_``."""
    return " ".join(text.replace("_", " ").casefold().split())


def package(name: str, extra: str) -> importlib.metadata.Distribution:
    """Return an optional package; raises RequestError with the way to install it."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise RequestError("judge", name, f'needs {name}: pip install "erase-concept[{extra}]"') from None
