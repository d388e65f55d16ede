"""Cells of a grid taken together: what was forgotten, what was kept, what it took, and what collapsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from erase_concept.eval.score import Interval, wilson

COLLAPSED = 0.5  # of the base model's accuracy: below that, a method has destroyed the model
Cells = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Pooled:
    """Cells of one entry taken together: shares with their counts and 95 % intervals (Wilson), and medians.

    ``share``, ``ci95`` and ``n`` are of UA, IRA and CRA, as far as a benchmark has them, by their names; ``of_base``
    are IRA and CRA as shares of the base model's. ``by_concept`` are the shares of each concept, by their names and
    its own. ``frechet`` is a mean, None where there is no such distance.
    ``collapsed`` are the concepts of which less than ``COLLAPSED`` was kept or whose erasing failed.
    """

    cells: int
    share: dict[str, float]
    ci95: dict[str, Interval]
    n: dict[str, int]
    of_base: dict[str, float]
    by_concept: dict[str, dict[str, float]]
    frechet: float | None
    seconds: float
    cell_seconds: float
    peak_gib: float
    changed: float
    collapsed: tuple[str, ...]

    @property
    def ua(self) -> float:
        """The share of the concept's images that do not show it."""
        return self.share["ua"]

    @property
    def lowest_ua(self) -> tuple[str, float]:
        """The concept that is forgotten least, and its UA."""
        return min(self.by_concept["ua"].items(), key=lambda found: found[1])

    @property
    def kept(self) -> float:
        """The smaller of IRA and CRA as shares of the base model's accuracy."""
        return min(self.of_base.values())


def failed(cell: dict[str, Any]) -> bool:
    """Tell whether a cell's erasing ended without a model, or with one that knows nothing any more."""
    return "failed" in cell or kept(cell) < COLLAPSED


def kept(cell: dict[str, Any]) -> float:
    """Return the smaller of a cell's IRA and CRA as shares of the base model's."""
    scores = [cell["scores"][name] for name in ("ira", "cra") if name in cell["scores"]]
    # A base model that nothing is recognised of has nothing to lose.
    return float(min(score["value"] / score["baseline"] if score["baseline"] else 1.0 for score in scores))


def pool(cells: Cells) -> Pooled | None:
    """Take cells together; None where all have failed. One that failed counts as collapsed, and for nothing else."""
    done = [cell for cell in cells if "failed" not in cell]
    if not done:
        return None
    share, interval, of_base, count, by_concept = {}, {}, {}, {}, {}
    for name in ("ua", "ira", "cra"):
        found = [(cell["concept"], cell["scores"][name]) for cell in done if name in cell["scores"]]
        if not found:  # as CRA, where a classifier knows no styles
            continue
        images, hits = Counter[str](), Counter[str]()
        for concept, score in found:
            images[concept] += score["n"]
            hits[concept] += round(score["value"] * score["n"])
        by_concept[name] = {concept: hits[concept] / images[concept] for concept in images}
        count[name] = n = sum(images.values())
        share[name], interval[name] = sum(hits.values()) / n, wilson(sum(hits.values()), n)
        if name != "ua":
            base = sum(score["baseline"] * score["n"] for _, score in found)
            of_base[name] = sum(hits.values()) / base if base else 1.0
    far = [cell["scores"]["frechet"]["value"] for cell in done if "frechet" in cell["scores"]]
    return Pooled(
        cells=len(done),
        share=share,
        ci95=interval,
        n=count,
        of_base=of_base,
        by_concept=by_concept,
        frechet=sum(far) / len(far) if far else None,
        seconds=median(cell["seconds"] for cell in done),
        cell_seconds=median(cell["cell_seconds"] for cell in done),
        peak_gib=median(cell["peak_gib"] for cell in done),
        changed=median(cell["changed"] for cell in done),
        collapsed=tuple(dict.fromkeys(cell["concept"] for cell in cells if failed(cell))),
    )


def dominated(pooled: dict[str, Pooled]) -> set[str]:
    """Return the entries for which another is as good in UA, IRA and CRA, better in one, and takes no more time."""

    def beats(a: Pooled, b: Pooled) -> bool:
        ours, theirs = ((one.ua, *one.of_base.values()) for one in (a, b))
        return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True)) and a.seconds <= b.seconds

    return {name for name, one in pooled.items() if any(beats(other, one) for other in pooled.values())}
