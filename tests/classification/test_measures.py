"""Membership attacks, gaps and intervals against independent computations."""

from __future__ import annotations

import numpy as np
import pytest

from erase_concept.eval.classification.gap import average_gap, gap_of_means, over_seeds, paired_gaps
from erase_concept.eval.classification.membership import loss_threshold, svc_confidence

GENERATOR = np.random.default_rng(0)
RETAIN, TEST, FORGET = (GENERATOR.beta(a, 1, n) for a, n in ((8, 120), (2, 120), (3, 50)))


def test_the_support_vector_machine_is_that_of_the_papers_code() -> None:
    """Transcribed: shadow members are labelled 1, gamma "auto" is 1 / features, and non-members are counted."""
    svm = pytest.importorskip("sklearn.svm")
    features = np.vstack([RETAIN.reshape(-1, 1), TEST.reshape(-1, 1)])
    labels = np.concatenate([np.ones(len(RETAIN)), np.zeros(len(TEST))])
    fitted = svm.SVC(C=3, gamma=1.0, kernel="rbf").fit(features, labels)
    expected = 1 - fitted.predict(FORGET.reshape(-1, 1)).mean()
    assert svc_confidence(RETAIN, TEST, FORGET).mean() == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_its_decision_is_the_solution_of_the_dual_problem() -> None:
    """The dual's conditions hold for the multipliers, with the kernel exp(-|x - y|^2) written out."""
    svm = pytest.importorskip("sklearn.svm")
    x = np.concatenate([RETAIN, TEST])
    y = np.repeat([1.0, -1.0], 120)
    fitted = svm.SVC(C=3, gamma="auto", kernel="rbf", tol=1e-6).fit(x[:, None], y)
    kernel = np.exp(-((FORGET[:, None] - x[fitted.support_][None]) ** 2))
    decision = kernel @ fitted.dual_coef_[0] + fitted.intercept_[0]
    assert np.array_equal(decision < 0, svc_confidence(RETAIN, TEST, FORGET))
    assert np.abs(fitted.dual_coef_).max() <= 3 + 1e-9
    assert fitted.dual_coef_.sum() == pytest.approx(0, abs=1e-6)


def test_the_loss_threshold_is_the_best_of_all() -> None:
    retain, test, forget = -np.log(RETAIN), -np.log(TEST), -np.log(FORGET)
    best = max(sorted([*retain, *test]), key=lambda t: np.mean(retain <= t) + np.mean(test > t))
    assert np.array_equal(loss_threshold(retain, test, forget), forget > best)


def test_gaps_are_means_of_absolute_differences() -> None:
    """SalUn's first table, 10 %: Retrain 5.24 / 100 / 94.26 / 12.88, SalUn 2.85 / 99.62 / 93.93 / 14.39, gap 1.15."""
    names = ("ua", "ra", "ta", "mia")
    retrain = dict(zip(names, (5.24, 100, 94.26, 12.88), strict=True))
    rows = {(2.85, 99.62, 93.93, 14.39): 1.15, (7.61, 99.67, 92.83, 37.36): 7.15, (0.63, 99.88, 94.06, 2.70): 3.78}
    for values, published in rows.items():
        assert average_gap(dict(zip(names, values, strict=True)), retrain) == pytest.approx(published, abs=0.006)


def test_the_gap_of_means_hides_what_paired_gaps_show() -> None:
    retrained = [dict.fromkeys(("ua", "ra", "ta", "mia"), 0.5)] * 2
    ours = [dict.fromkeys(("ua", "ra", "ta", "mia"), value) for value in (0.4, 0.6)]
    assert gap_of_means(ours, retrained) == pytest.approx(0)
    assert paired_gaps(ours, retrained).mean == pytest.approx(0.1)


@pytest.mark.parametrize("n", [2, 3, 5, 11])
def test_intervals_over_seeds_are_students(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(size=n).tolist()
    found = over_seeds(values)
    expected = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.ci95 == pytest.approx(expected, abs=1e-3)


def test_of_one_seed_nothing_is_known_of_the_spread() -> None:
    assert (over_seeds([0.3]).sd, over_seeds([0.3]).ci95) == (None, None)
    with pytest.raises(ValueError, match="1 to 11 seeds"):
        over_seeds([])
