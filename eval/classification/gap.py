"""The distance from Retrain: differences of paired classifiers, and means over seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from erase_concept.eval.score import Interval

COMPARED = ("ua", "ra", "ta", "mia")  # the metrics of the average gap
# The 97.5 % points of Student's t, for 1 to 10 degrees of freedom.
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class OverSeeds:
    """The mean of a value over seeds, its standard deviation, and the 95 % interval of the mean (Student's t).

    Of one seed both are not known.
    """

    mean: float
    sd: float | None
    ci95: Interval | None
    n: int


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Take a value of several seeds together; raises ValueError for more than eleven seeds, or none."""
    n = len(values)
    if not 1 <= n <= len(_T975) + 1:
        raise ValueError(f"needs the values of 1 to {len(_T975) + 1} seeds, not {n}")
    mean = fmean(values)
    if n == 1:
        return OverSeeds(mean, None, None, n)
    sd = stdev(values)
    half = _T975[n - 2] * sd / math.sqrt(n)
    return OverSeeds(mean, sd, (mean - half, mean + half), n)


def average_gap(ours: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Return the mean of |difference| over UA, RA, TA and MIA (arXiv 2310.12508)."""
    return fmean(abs(ours[name] - retrained[name]) for name in COMPARED)


def gap_of_means(ours: Sequence[Mapping[str, float]], retrained: Sequence[Mapping[str, float]]) -> float:
    """Return the average gap between the means over seeds, as papers report it. It hides what differs by chance."""
    means = [{name: fmean(one[name] for one in some) for name in COMPARED} for some in (ours, retrained)]
    return average_gap(means[0], means[1])


def paired_gaps(ours: Sequence[Mapping[str, float]], retrained: Sequence[Mapping[str, float]]) -> OverSeeds:
    """Return the average gap over seeds, each seed's classifier compared with the retrained one of the same seed."""
    return over_seeds([average_gap(one, other) for one, other in zip(ours, retrained, strict=True)])
