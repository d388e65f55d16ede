"""Intervals against exact and independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from erase_concept.eval.score import Score, bootstrap, difference_interval, ratio_interval, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (39, 40), (7, 10), (500, 1000)])
def test_wilson_ends_are_where_the_score_test_just_rejects(successes: int, n: int) -> None:
    # Independent of the closed form: each end p solves |x/n - p| = z sqrt(p (1 - p) / n), or is an end of [0, 1].
    low, high = wilson(successes, n)
    share = successes / n
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        gap, z = abs(share - end), 1.959963984540054
        at_edge = end in (0.0, 1.0) and share == end
        assert at_edge or math.isclose(gap, z * math.sqrt(end * (1 - end) / n), rel_tol=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 7), (152, 152), (149, 152), (12, 40)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(successes, n)


def test_ratio_interval_of_a_known_base_is_the_interval_divided_by_it() -> None:
    # A base without uncertainty is a constant c, and the interval of x / c is that of x, divided by c.
    assert ratio_interval(0.6, (0.5, 0.7), 0.8, (0.8, 0.8)) == pytest.approx((0.5 / 0.8, 0.7 / 0.8))


def test_ratio_interval_inverts_with_its_arguments() -> None:
    # x / y lies in [a, b] exactly when y / x lies in [1 / b, 1 / a].
    x, y = (0.7, (0.6, 0.78)), (0.9, (0.83, 0.94))
    low, high = ratio_interval(*x, *y)
    assert low < 0.7 / 0.9 < high
    assert ratio_interval(*y, *x) == pytest.approx((1 / high, 1 / low))


def test_ratio_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    n, share, base = 150, 0.94, 0.97
    hits = 0
    for a, b in zip(generator.binomial(n, share, 2000), generator.binomial(n, base, 2000), strict=True):
        low, high = ratio_interval(a / n, wilson(a, n), b / n, wilson(b, n))
        hits += low <= share / base <= high
    assert 0.93 < hits / 2000 < 0.98  # 95 %, give or take three standard errors and the discreteness of counts


def test_ratio_interval_is_open_where_the_base_may_be_zero() -> None:
    assert ratio_interval(0.5, (0.4, 0.6), 0.1, (0.0, 0.3))[1] == math.inf
    assert ratio_interval(0.0, (0.0, 0.1), 0.5, (0.4, 0.6))[0] == 0


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    data = np.random.default_rng(3).normal(5, 2, 400)
    half = 1.96 * data.std(ddof=1) / math.sqrt(400)
    low, high = bootstrap(lambda places: float(data[places].mean()), 400, np.random.default_rng(0), resamples=4000)
    assert (low, high) == pytest.approx((data.mean() - half, data.mean() + half), abs=0.05 * 2 * half)


def test_bootstrap_repeats_with_its_seed_and_moves_to_its_centre() -> None:
    data = np.arange(50.0)

    def mean(places: np.ndarray) -> float:
        return float(data[places].mean())

    first = bootstrap(mean, 50, np.random.default_rng(7), resamples=100)
    assert first == bootstrap(mean, 50, np.random.default_rng(7), resamples=100)
    assert first != bootstrap(mean, 50, np.random.default_rng(8), resamples=100)
    moved = bootstrap(mean, 50, np.random.default_rng(7), resamples=100, centre=100.0)
    assert moved[0] < 100 < moved[1]
    assert moved[1] - moved[0] == pytest.approx(first[1] - first[0])


def test_retention_is_the_share_of_the_baseline() -> None:
    score = Score("ira", "church", 0.45, 100, wilson(45, 100), "fraction", "p", 0.9, wilson(90, 100))
    assert score.retention is not None
    assert score.retention[0] == pytest.approx(0.5)
    assert score.retention[1][0] < 0.5 < score.retention[1][1]


@pytest.mark.parametrize(
    ("unit", "baseline"), [("squared feature distance", 0.9), ("fraction", None), ("fraction", 0.0)]
)
def test_retention_is_none_where_it_means_nothing(unit: str, baseline: float | None) -> None:
    interval = None if baseline is None else (0.0, 1.0)
    assert Score("x", "church", 0.45, 100, (0.4, 0.5), unit, "p", baseline, interval).retention is None


def test_a_difference_has_newcombe_s_interval() -> None:
    """56 of 70 against 48 of 80, the example of Newcombe's table II, method 10."""
    found = difference_interval(56 / 70, wilson(56, 70), 48 / 80, wilson(48, 80))
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)
    back = difference_interval(48 / 80, wilson(48, 80), 56 / 70, wilson(56, 70))
    assert back == pytest.approx((-found[1], -found[0]))
