"""Scores: a value is never without its sample count, its interval, its protocol and, where known, its baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Interval = tuple[float, float]

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Score:
    """One number about one erased concept, and how it was obtained.

    ``ci95`` and ``baseline_ci95`` are 95 % intervals of ``value`` and of ``baseline``, the base model's score from the
    same prompts and seeds. A ``unit`` of "fraction" means a share from 0 to 1.
    """

    metric: str
    target: str
    value: float
    n: int
    ci95: Interval
    unit: str
    protocol: str
    baseline: float | None = None
    baseline_ci95: Interval | None = None

    @property
    def retention(self) -> tuple[float, Interval] | None:
        """The value as a share of the baseline, with its 95 % interval; None where that has no meaning."""
        if self.unit != "fraction" or not self.baseline or self.baseline_ci95 is None:
            return None
        return self.value / self.baseline, ratio_interval(self.value, self.ci95, self.baseline, self.baseline_ci95)


def wilson(successes: int, n: int) -> Interval:
    """Return the 95 % score interval of a share (Wilson 1927), which stays within [0, 1] even at 0 or n successes.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no share")
    share, z2n = successes / n, Z95**2 / n
    centre = (share + z2n / 2) / (1 + z2n)
    half = Z95 / (1 + z2n) * math.sqrt(share * (1 - share) / n + z2n / (4 * n))
    # At the ends the formula gives 0 and 1 exactly; rounding must not push the share out of its own interval.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def difference_interval(value: float, ci: Interval, other: float, other_ci: Interval) -> Interval:
    """Return the 95 % interval of value - other from the intervals of the two (Newcombe 1998, his method 10).

    The two are taken as independent, which where they are of equal prompts and seeds makes it rather too wide.
    """
    low = math.hypot(value - ci[0], other_ci[1] - other)
    high = math.hypot(ci[1] - value, other - other_ci[0])
    return value - other - low, value - other + high


def ratio_interval(value: float, ci: Interval, base: float, base_ci: Interval) -> Interval:
    """Return the 95 % interval of value / base from the intervals of the two (MOVER-R, Donner and Zou 2012).

    The two are taken as independent. Equal prompts and seeds make them agree more than that, so the interval is
    rather too wide than too narrow. Needs base > 0; the upper end is infinite where base may be 0.
    """
    product = value * base
    low = ci[0] * (2 * value - ci[0])
    high = ci[1] * (2 * value - ci[1])
    base_low = base_ci[0] * (2 * base - base_ci[0])
    base_high = base_ci[1] * (2 * base - base_ci[1])
    below = product + math.sqrt(max(product**2 - low * base_high, 0.0))
    above = product + math.sqrt(max(product**2 - high * base_low, 0.0))
    return (low / below if below else 0.0), (above / base_low if base_low > 0 else math.inf)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    generator: np.random.Generator,
    *,
    resamples: int = 1000,
    centre: float | None = None,
) -> Interval:
    """Return the 95 % percentile bootstrap interval (Efron 1979) of a statistic of n samples.

    ``statistic`` gets n places in [0, n), drawn with replacement. A statistic that repeated samples inflate gives
    resampled values that lie off its own value; with ``centre``, that value, the interval is shifted to put their mean
    back on it.
    """
    values = np.array([statistic(generator.integers(0, n, n)) for _ in range(resamples)])
    return percentiles(values, 0.0 if centre is None else centre - values.mean())


def percentiles(values: NDArray[np.float64], shift: float = 0.0) -> Interval:
    """Return the interval of a bootstrap's resampled values, moved by ``shift``."""
    low, high = np.percentile(values, (2.5, 97.5)) + shift
    return float(low), float(high)
