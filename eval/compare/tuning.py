"""Strength: search an entry's own, and compare whole curves of it at equal forgetting.

What is *kept* is the smaller of IRA and CRA, each as a share of the base model's from the same prompts and seeds. A
method that is tuned is taken at the strength that keeps most among those with a mean UA of at least ``GOAL`` on the
tuning concepts. Where whole curves of strength are known, they are compared at equal UA: what is kept at 90, 95 and
99 %, the area under what is kept over UA, and of two of them the mean difference over the UA that both reach. No method
and no mask is judged at one strength alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.compare.aggregate import Cells, failed, kept, pool
from erase_concept.eval.compare.trials import Cell, recipe_of, run_cells
from erase_concept.eval.score import Interval

GOAL = 0.95  # UA that a tuned method must reach on the tuning concepts
STEP = 4.0  # by which a search turns the tuned_setting until the goal lies between two strengths
LEVELS = (0.9, 0.95, 0.99)  # UA at which curves are compared
LINE = tuple(np.linspace(0.005, 0.995, 100))  # UA over which curves are averaged
Points = Sequence[tuple[float, float, float]]  # strength, UA and what is kept


@dataclass(frozen=True)
class Trial:
    """One strength tried in a search: mean UA over the tuning concepts, what was kept, and whether it collapsed."""

    strength: float
    value: float
    ua: float
    kept: float
    collapsed: bool

    @property
    def fits(self) -> bool:
        """Whether the concept is gone and the model still there."""
        return self.ua >= GOAL and not self.collapsed


def tune(
    model: str,
    entry: str,
    concepts: Sequence[str],
    trials: int,
    out: Path,
    *,
    mask: str | None = None,
    benchmark: str = "emojinette",
    seed: int = 100,
) -> Iterator[dict[str, Any] | list[Trial]]:
    """Search an entry's strength, yielding each cell's result and last the trials, the best one first.

    From the method's own strength the setting goes up by ``STEP`` while the concept is not gone, down while it is, and
    then halves the gap between the two, on a scale of ratios. It stops going up where the model collapses or the
    setting goes no further. Every entry has as many trials. The best is the one that fits and keeps most; where none
    fits, the one whose lesser of UA and kept is greatest.
    """
    tried: dict[float, Trial] = {}
    strength = 1.0
    while len(tried) < trials:
        found = []
        cells = [Cell(entry, concept, seed, mask, strength) for concept in concepts]
        try:
            recipe_of(model, cells[0])
        except RequestError:  # a tuned_setting that has an end, such as a share
            tried[strength] = Trial(strength, strength * next(iter(tried.values())).value, 0.0, 0.0, True)
        else:
            for result in run_cells(model, cells, out, benchmark):
                found.append(result)
                yield result
            tried[strength] = _trial(strength, found)
        strength = _next(tried)
    ranked = sorted(tried.values(), key=lambda t: (t.fits, t.kept if t.fits else min(t.ua, t.kept)), reverse=True)
    yield ranked


def _trial(strength: float, found: Cells) -> Trial:
    pooled = pool(found)
    if pooled is None:
        return Trial(strength, found[0]["value"], 0.0, 0.0, True)
    ua = sum(cell["scores"]["ua"]["value"] for cell in found if "failed" not in cell) / len(found)
    least = min(0.0 if "failed" in cell else kept(cell) for cell in found)
    return Trial(strength, found[0]["value"], ua, least, any(failed(cell) for cell in found))


def _next(tried: dict[float, Trial]) -> float:
    """Return the strength to try next; raises nothing: where the goal is out of reach the steps become smaller."""
    enough = [t.strength for t in tried.values() if t.ua >= GOAL or t.collapsed]
    little = [t.strength for t in tried.values() if t.ua < GOAL and not t.collapsed]
    if not enough:
        return max(little) * STEP
    if not little:
        return min(enough) / STEP
    return float(np.sqrt(max([s for s in little if s < min(enough)] or [min(enough) / STEP]) * min(enough)))


@dataclass(frozen=True)
class Curve:
    """What one loss with one mask keeps along its strengths: points (strength, UA, kept), and what follows from them.

    ``at`` is what is kept at each of ``LEVELS``, None where no strength forgets as much; ``area`` is that under what is
    kept over UA from 0 to 1. Intervals are bootstrapped over the concepts and seeds.
    """

    entry: str
    mask: str
    points: tuple[tuple[float, float, float], ...]
    at: tuple[float | None, ...]
    at_ci95: tuple[Interval | None, ...]
    area: float
    area_ci95: Interval


@dataclass(frozen=True)
class CurveDifference:
    """How much more is kept with one mask than with another at equal UA, from the same concepts and seeds.

    ``at`` as ``Curve`` has it; ``mean`` is over each UA from 0 to 1 that both reach, None where there is none.
    """

    entry: str
    mask: str
    other: str
    at: tuple[float | None, ...]
    at_ci95: tuple[Interval | None, ...]
    mean: float | None
    mean_ci95: Interval | None


def curve(entry: str, mask: str, cells: Cells, *, resamples: int = 1000) -> Curve:
    """Return the curve of cells of one entry and mask at several strengths."""
    sampled = _sampled(cells, _groups(cells), resamples)
    at = [_bootstrapped([kept_at(points, level) for points in sampled]) for level in LEVELS]
    areas = [area(points) for points in sampled]
    return Curve(
        entry,
        mask,
        tuple(sampled[0]),
        tuple(value for value, _ in at),
        tuple(interval for _, interval in at),
        areas[0],
        _interval(areas[1:]),
    )


def curve_difference(
    entry: str, mask: str, cells: Cells, other: str, other_cells: Cells, *, resamples: int = 1000
) -> CurveDifference:
    """Return how the curves of two masks differ, over the concepts and seeds that both have, resampled together."""
    groups = sorted({*_groups(cells)} & {*_groups(other_cells)})
    pairs = list(zip(_sampled(cells, groups, resamples), _sampled(other_cells, groups, resamples), strict=True))
    at = [_bootstrapped([_less(ours, theirs, (level,)) for ours, theirs in pairs]) for level in LEVELS]
    mean, mean_ci95 = _bootstrapped([_less(ours, theirs, LINE) for ours, theirs in pairs])
    return CurveDifference(
        entry, mask, other, tuple(value for value, _ in at), tuple(interval for _, interval in at), mean, mean_ci95
    )


def _less(ours: Points, theirs: Points, levels: Sequence[float]) -> float | None:
    """Return how much more one curve keeps than another, on average over the levels of UA that both reach."""
    kept = [(kept_at(ours, ua), kept_at(theirs, ua)) for ua in levels]
    found = [a - b for a, b in kept if a is not None and b is not None]
    return float(np.mean(found)) if found else None


def _groups(cells: Cells) -> list[tuple[str, int]]:
    return sorted({(cell["concept"], cell["seed"]) for cell in cells})


def _sampled(cells: Cells, groups: Sequence[tuple[str, int]], resamples: int) -> list[Points]:
    """Return the points of a curve over these groups of cells, and after them those of resamples of the groups.

    The same groups are resampled in the same way, whatever the cells are.
    """
    table: dict[tuple[str, int], Cells] = {g: [c for c in cells if (c["concept"], c["seed"]) == g] for g in groups}

    def points(chosen: Sequence[tuple[str, int]]) -> Points:
        by_strength = defaultdict(list)
        for group in chosen:
            for cell in table[group]:
                by_strength[cell["strength"]].append(cell)
        pooled = [(strength, pool(found)) for strength, found in sorted(by_strength.items())]
        return [(strength, p.ua, p.kept) for strength, p in pooled if p is not None]

    generator = np.random.default_rng(0)
    drawn = [[groups[i] for i in generator.integers(0, len(groups), len(groups))] for _ in range(resamples)]
    return [points(chosen) for chosen in (groups, *drawn)]


def _bootstrapped(values: Sequence[float | None]) -> tuple[float | None, Interval | None]:
    """Return the first value and the interval of all others, which come from resamples."""
    drawn = [value for value in values[1:] if value is not None]
    # Where many samples of the groups never forget as much, an interval of the rest would say too much.
    enough = values[0] is not None and len(drawn) > 0.975 * (len(values) - 1)
    return values[0], _interval(drawn) if enough else None


def _interval(values: Sequence[float]) -> Interval:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def kept_at(points: Points, ua: float) -> float | None:
    """Return the most that is kept at a UA of at least ``ua`` along a curve, or None where it forgets less.

    Between neighbouring strengths, and between the first one and the base model, which forgets nothing and keeps all,
    the curve is taken as straight.
    """
    line = [(0.0, 1.0), *((u, k) for _, u, k in points)]
    best = [k for u, k in line if u >= ua]
    for (u0, k0), (u1, k1) in pairwise(line):
        if min(u0, u1) < ua <= max(u0, u1):
            best.append(k0 + (k1 - k0) * (ua - u0) / (u1 - u0))
    return max(best) if best else None


def area(points: Points) -> float:
    """Return the area under what is kept at each UA from 0 to 1; where a curve forgets less, nothing is kept."""
    return float(np.mean([kept_at(points, ua) or 0.0 for ua in LINE]))
