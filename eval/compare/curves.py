"""Compare methods and masks along several multipliers, at equal forgetting: one multiplier alone proves nothing.

At each share of forgetting, what is retained is read off a curve. Curves are compared at 90, 95 and 99 % forgotten, by
the area under them, and by their mean difference over the forgetting that both reach.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from erase_concept.eval.compare.aggregate import aggregate
from erase_concept.eval.compare.trials import TrialResult
from erase_concept.eval.score import Interval

LEVELS = (0.9, 0.95, 0.99)  # shares of forgetting at which curves are compared
GRID = tuple(np.linspace(0.005, 0.995, 100))  # shares of forgetting over which curves are averaged
Points = Sequence[tuple[float, float, float]]  # multiplier, what is forgotten, what is retained
Group = tuple[str, int]  # a concept and a seed


@dataclass(frozen=True)
class StrengthCurve:
    """What one method with one mask retains along its multipliers.

    ``points`` are (multiplier, forgotten, retained). ``at`` is what is retained at each of ``LEVELS``, None where no
    multiplier forgets as much. ``area`` is the area under the curve from 0 to 1 forgotten. Intervals are bootstrapped
    over the concepts and seeds.
    """

    method: str
    mask: str
    points: tuple[tuple[float, float, float], ...]
    at: tuple[float | None, ...]
    at_ci95: tuple[Interval | None, ...]
    area: float
    area_ci95: Interval


@dataclass(frozen=True)
class CurveDifference:
    """How much more is retained with ``mask`` than with ``other`` at equal forgetting, of the same concepts and seeds.

    ``at`` is the difference at each of ``LEVELS``. ``mean`` is over the forgetting that both reach. None stands where
    there is none.
    """

    method: str
    mask: str
    other: str
    at: tuple[float | None, ...]
    at_ci95: tuple[Interval | None, ...]
    mean: float | None
    mean_ci95: Interval | None


def strength_curve(method: str, mask: str, results: Sequence[TrialResult], *, resamples: int = 1000) -> StrengthCurve:
    """Return the curve of one method and mask from the results at several multipliers."""
    resampled = _resampled(results, _groups(results), resamples)
    at = [_with_interval([retained_at(points, level) for points in resampled]) for level in LEVELS]
    areas = [area(points) for points in resampled]
    return StrengthCurve(
        method,
        mask,
        tuple(resampled[0]),
        tuple(value for value, _ in at),
        tuple(interval for _, interval in at),
        areas[0],
        _interval(areas[1:]),
    )


def curve_difference(
    method: str,
    mask: str,
    results: Sequence[TrialResult],
    other: str,
    other_results: Sequence[TrialResult],
    *,
    resamples: int = 1000,
) -> CurveDifference:
    """Return how the curves of two masks differ over the concepts and seeds that both have, resampled together."""
    groups = sorted({*_groups(results)} & {*_groups(other_results)})
    pairs = list(zip(_resampled(results, groups, resamples), _resampled(other_results, groups, resamples), strict=True))
    at = [_with_interval([_mean_difference(ours, theirs, (level,)) for ours, theirs in pairs]) for level in LEVELS]
    mean, mean_ci95 = _with_interval([_mean_difference(ours, theirs, GRID) for ours, theirs in pairs])
    return CurveDifference(
        method, mask, other, tuple(value for value, _ in at), tuple(interval for _, interval in at), mean, mean_ci95
    )


def retained_at(points: Points, forgotten: float) -> float | None:
    """Return the most that is retained at a forgetting of at least so much, or None where the curve forgets less.

    The curve is straight between neighbouring multipliers, and between the first one and the base model, which forgets
    nothing and retains all.
    """
    line = [(0.0, 1.0), *((f, r) for _, f, r in points)]
    best = [r for f, r in line if f >= forgotten]
    for (f0, r0), (f1, r1) in pairwise(line):
        if min(f0, f1) < forgotten <= max(f0, f1):
            best.append(r0 + (r1 - r0) * (forgotten - f0) / (f1 - f0))
    return max(best) if best else None


def area(points: Points) -> float:
    """Return the area under a curve from 0 to 1 forgotten. Where it forgets less, nothing counts as retained."""
    return float(np.mean([retained_at(points, level) or 0.0 for level in GRID]))


def _mean_difference(ours: Points, theirs: Points, levels: Sequence[float]) -> float | None:
    """Return how much more one curve retains than another, on average over the levels that both reach."""
    retained = [(retained_at(ours, level), retained_at(theirs, level)) for level in levels]
    found = [a - b for a, b in retained if a is not None and b is not None]
    return float(np.mean(found)) if found else None


def _groups(results: Sequence[TrialResult]) -> list[Group]:
    return sorted({(result.trial.concept, result.trial.seed) for result in results})


def _resampled(results: Sequence[TrialResult], groups: Sequence[Group], resamples: int) -> list[Points]:
    """Return the points of a curve over these groups of results, and after them those of resampled groups.

    The same groups are resampled in the same way, whatever the results are.
    """
    table: dict[Group, list[TrialResult]] = {
        group: [r for r in results if (r.trial.concept, r.trial.seed) == group] for group in groups
    }

    def points(chosen: Sequence[Group]) -> Points:
        by_multiplier = defaultdict(list)
        for group in chosen:
            for result in table[group]:
                by_multiplier[result.trial.multiplier].append(result)
        found = [(multiplier, aggregate(some)) for multiplier, some in sorted(by_multiplier.items())]
        return [(multiplier, one.forgotten.value, one.retention) for multiplier, one in found if one is not None]

    generator = np.random.default_rng(0)
    drawn = [[groups[i] for i in generator.integers(0, len(groups), len(groups))] for _ in range(resamples)]
    return [points(chosen) for chosen in (groups, *drawn)]


def _with_interval(values: Sequence[float | None]) -> tuple[float | None, Interval | None]:
    """Return the first value and the interval of all others, which come from resamples."""
    drawn = [value for value in values[1:] if value is not None]
    # Where many resamples never forget as much, an interval of the rest would claim too much.
    enough = values[0] is not None and len(drawn) > 0.975 * (len(values) - 1)
    return values[0], _interval(drawn) if enough else None


def _interval(values: Sequence[float]) -> Interval:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
