"""Is the concept gone, is the rest there: shares of images that show what they ask for, by any judge.

UA, IRA and CRA as in UnlearnCanvas (arXiv 2402.11846). *Forget* rows ask for the erased concept, *retain* rows for
nothing that was erased.

``ua``, ``ira``, ``cra``, ``accuracy``, ``per_class`` and ``confusion`` are pure functions. For each image they take the
label that was *asked* for, "" for none, and the labels that it *shows*, the most probable first, or None where it was
not judged. With ``k`` = 5 a label counts as shown where it is among the first five. ``by`` names the judge in the
protocol. Images that were not judged count nowhere; the protocol says how many they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from erase_concept.errors import RequestError
from erase_concept.eval.score import Score, wilson

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Shown = Sequence["Sequence[str] | None"]


def ua(asked: Sequence[str], shown: Shown, target: str, *, by: str, what: str = "class", k: int = 1) -> Score:
    """Return UA: the share of the images that ask for the target that do not show it."""
    gone = [
        hit if hit is None else not hit
        for label, hit in zip(asked, _hits(asked, shown, k), strict=True)
        if label == target
    ]
    return _share("ua", target, gone, f"{by} does not see the {what} {target}{_among(k)}; forget prompts", k)


def ira(asked: Sequence[str], shown: Shown, target: str, *, by: str, what: str = "class", k: int = 1) -> Score:
    """Return IRA: the share of the images that ask for another label than the target that show that one."""
    kept = [hit for label, hit in zip(asked, _hits(asked, shown, k), strict=True) if label not in ("", target)]
    return _share("ira", target, kept, f"{by} sees the prompted {what}{_among(k)}; retain prompts", k)


def cra(
    asked: Sequence[str],
    shown: Shown,
    target: str,
    *,
    by: str,
    what: str = "class",
    k: int = 1,
    chosen: NDArray[np.bool_] | None = None,
) -> Score:
    """Return CRA: the share of the images that ask for a label of the other kind that show that one.

    ``asked`` and ``shown`` are of that other kind (styles when an object was erased), ``target`` is the erased concept.
    With ``chosen`` [n] only these images count, the retain rows; without it all do.
    """
    prompts = "forget and retain prompts" if chosen is None else "retain prompts"
    counts = [True] * len(asked) if chosen is None else chosen.tolist()
    kept = [hit for label, hit, counted in zip(asked, _hits(asked, shown, k), counts, strict=True) if counted and label]
    return _share("cra", target, kept, f"{by} sees the prompted {what}{_among(k)}; {prompts}", k)


def accuracy(asked: Sequence[str], shown: Shown, *, by: str, what: str = "class", k: int = 1) -> Score:
    """Return the top-k accuracy, the share of all images that ask for a label that show it, as metric "top1"."""
    kept = [hit for label, hit in zip(asked, _hits(asked, shown, k), strict=True) if label]
    return _share(f"top{k}", "all classes", kept, f"{by} sees the prompted {what}{_among(k)}; all prompts")


def per_class(asked: Sequence[str], shown: Shown, *, by: str, what: str = "class", k: int = 1) -> dict[str, Score]:
    """Return the accuracy of each label that was asked for, in the order in which they first were."""
    hits: dict[str, list[bool | None]] = {}
    for label, hit in zip(asked, _hits(asked, shown, k), strict=True):
        hits.setdefault(label, []).append(hit)
    protocol = f"{by} sees the prompted {what}{_among(k)}; its own prompts"
    judged = {label: some for label, some in hits.items() if label and any(hit is not None for hit in some)}
    return {label: _share("accuracy", label, some, protocol, k) for label, some in judged.items()}


def confusion(asked: Sequence[str], shown: Shown) -> dict[str, dict[str, int]]:
    """Return how many images ask for each label and show each label: counts by what is asked, then by what is shown.

    Asked labels come in the order in which they first were, shown ones from the most frequent on. "" are images that
    ask for none, show none, or were not judged. Pairs that never occurred are left out, so all counts add up to the
    images.
    """
    counts: dict[str, Counter[str]] = {}
    for label, labels in zip(asked, shown, strict=True):
        counts.setdefault(label, Counter())[_first(labels)] += 1
    return {label: dict(found.most_common()) for label, found in counts.items()}


def share(metric: str, target: str, hits: Sequence[bool | None], protocol: str) -> Score:
    """Return the share of hits with Wilson's interval; None is an image that was not judged and does not count.

    Raises RequestError when no image was judged.
    """
    judged = [hit for hit in hits if hit is not None]
    if not judged:
        why = "none was judged" if hits else "none of the rows is labelled for it"
        raise RequestError("metric", f"{metric} of {target}", f"needs at least one image; {why}")
    left = len(hits) - len(judged)
    protocol += f"; {left:,} images not judged" if left else ""
    interval = wilson(sum(judged), len(judged))
    return Score(metric, target, sum(judged) / len(judged), len(judged), interval, "fraction", f"{protocol}; Wilson")


def _hits(asked: Sequence[str], shown: Shown, k: int) -> list[bool | None]:
    """Whether each image's label is among the first k; raises ValueError when an image has fewer than k."""
    if k > 1 and any(labels is not None and len(labels) < k for labels in shown):
        raise ValueError(f"the top {k} of an image need as many labels; shown(..., k={k}) gives them")
    return [None if labels is None else label in labels[:k] for label, labels in zip(asked, shown, strict=True)]


def _among(k: int) -> str:
    return "" if k == 1 else f" among its top {k}"


def _first(labels: Sequence[str] | None) -> str:
    return labels[0] if labels else ""


def _share(metric: str, target: str, hits: Sequence[bool | None], protocol: str, k: int = 1) -> Score:
    return share(metric if k == 1 else f"{metric}_top{k}", target, hits, protocol)
