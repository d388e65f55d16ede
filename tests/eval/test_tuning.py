"""Results taken together, the search of a multiplier, and curves at equal forgetting, against sums done by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erase_concept.errors import RequestError
from erase_concept.eval.compare.aggregate import aggregate, collapsed, dominated, forgetting, retention
from erase_concept.eval.compare.comparison import Comparison
from erase_concept.eval.compare.curves import LEVELS, area, curve_difference, retained_at, strength_curve
from erase_concept.eval.compare.pages import (
    comparison_markdown,
    mask_differences_table,
    method_differences_table,
    method_report,
    methods_table,
)
from erase_concept.eval.compare.trials import Trial, TrialResult
from erase_concept.eval.compare.tuning import TuningStep, tune
from erase_concept.eval.score import Score, difference_interval, wilson


def done(
    ua: float, ira: float = 1.0, cra: float = 1.0, concept: str = "church", seed: int = 0, **more: Any
) -> TrialResult:
    """A trial's result, of 20 forget and 80 retain images; the base model's accuracies are 1 and 0.8."""
    trial = Trial("x", concept, seed, more.pop("mask", None), more.pop("multiplier", 1.0))
    scores = (
        Score("ua", concept, ua, 20, wilson(round(20 * ua), 20), "fraction", "by a judge", 0.0),
        Score("ira", concept, ira, 80, wilson(round(80 * ira), 80), "fraction", "by a judge", 1.0),
        Score("cra", concept, cra, 80, wilson(round(80 * cra), 80), "fraction", "by a judge", 0.8),
        Score("frechet", concept, 2.0, 80, (1.0, 3.0), "squared feature distance", "by a judge", 1.5),
    )
    result = TrialResult(trial, "", "1", "object", "lr", 0.1, 3.0, 9.0, 1.5, 0.5, scores=scores)
    return replace(result, **more)


def broken(**more: Any) -> TrialResult:
    """The result of an erasure that failed."""
    return replace(
        done(0, concept=more.pop("concept", "church")), scores=(), failed="the loss is nan", seconds=1.0, **more
    )


def test_results_are_taken_together_by_images_and_compared_with_the_base() -> None:
    results = [done(1.0, 1.0, 0.8), done(0.5, 0.9, 0.4, "dog", seconds=5.0), done(1.0, 0.95, 0.8, "dog", 1)]
    found = aggregate(results)
    assert found is not None
    assert found.forgotten.value == pytest.approx(50 / 60)
    assert found.forgotten.ci95 == wilson(50, 60)
    assert {name: share.value for name, share in found.retained.items()} == pytest.approx({"ira": 0.95, "cra": 2 / 3})
    assert [share.ci95 for share in found.retained.values()] == [wilson(228, 240), wilson(160, 240)]
    assert [share.of_base for share in found.retained.values()] == pytest.approx([228 / 240, 160 / 192])
    assert found.retention == found.retained["cra"].of_base
    assert (found.forgotten.n, found.retained["ira"].n, found.seconds) == (60, 240, 3.0)
    assert found.least_forgotten == ("dog", 0.75)
    assert found.collapsed == ()
    assert (found.distance_metric, found.distance) == ("frechet", 2.0)


def without(result: TrialResult, *metrics: str) -> TrialResult:
    return replace(result, scores=tuple(score for score in result.scores if score.metric not in metrics))


def test_what_a_benchmark_does_not_have_counts_for_nothing() -> None:
    results = [without(done(1.0, ira, 0.1), "cra", "frechet") for ira in (0.9, 0.7)]
    found = aggregate(results)
    assert found is not None
    assert {name: share.of_base for name, share in found.retained.items()} == pytest.approx({"ira": 0.8})
    assert (found.retention, found.distance, found.collapsed) == (pytest.approx(0.8), None, ())
    nothing = replace(results[0], scores=(results[0].scores[0], replace(results[0].scores[1], baseline=0.0)))
    assert not collapsed(nothing)


def test_a_metric_of_what_is_left_is_turned_round() -> None:
    """Of 20 images 3 still show an exposed body part, so 17 forgot it."""
    left = Score("nudity_images", "nudity", 0.15, 20, wilson(3, 20), "fraction", "by a detector", 0.9)
    result = replace(done(0.0), kind="nudity", scores=(left, *done(0.0).scores[1:]))
    assert forgetting(result) == pytest.approx(0.85)
    found = aggregate([result])
    assert found is not None
    assert (found.forgotten.value, found.forgotten.ci95, found.flipped) == (0.85, wilson(17, 20), True)
    comparison = Comparison("model", "benchmark", ("nudity",), (result,))
    assert "“Forgotten” is 100 % less “Images with an exposed body part”." in comparison_markdown(comparison)
    score = method_report(comparison, "x", Path("nowhere")).scores[0]
    assert (score.metric, score.value, score.baseline) == ("nudity_images", pytest.approx(0.15), pytest.approx(0.9))
    assert score.ci95 == pytest.approx(wilson(3, 20))


def test_what_failed_or_knows_nothing_any_more_has_collapsed() -> None:
    assert collapsed(broken())
    assert retention(broken()) == 0
    assert collapsed(done(1.0, 0.4))
    assert not collapsed(done(1.0, 1.0, 0.4))  # half of the base model's 0.8
    found = aggregate([done(1.0), done(1.0, 0.3, concept="dog"), broken(concept="car")])
    assert found is not None
    assert (found.trials, found.collapsed) == (2, ("dog", "car"))
    assert aggregate([broken()]) is None


def test_another_must_be_as_good_in_all_better_in_one_and_as_quick() -> None:
    results = {
        "best": aggregate([done(1.0, 1.0, 0.8)]),
        "worse": aggregate([done(1.0, 0.9, 0.8)]),
        "quick": aggregate([done(0.9, 0.9, 0.8, seconds=1.0)]),
        "equal": aggregate([done(1.0, 1.0, 0.8)]),
    }
    assert dominated(results) == {"worse"}


def test_a_curve_is_straight_between_its_points_and_from_the_base_model_on() -> None:
    points = [(1.0, 0.5, 0.9), (2.0, 1.0, 0.7)]
    assert retained_at(points, 0.25) == pytest.approx(0.95)
    assert retained_at(points, 0.5) == pytest.approx(0.9)
    assert retained_at(points, 0.75) == pytest.approx(0.8)
    assert retained_at(points, 1.0) == pytest.approx(0.7)
    assert retained_at(points[:1], 0.75) is None
    # Of two ways to forget as much, the one that retains more counts.
    assert retained_at([*points, (4.0, 0.9, 0.95)], 0.8) == pytest.approx(0.95)
    assert area([(1.0, 1.0, 1.0)]) == pytest.approx(1)
    assert area(points) == pytest.approx(0.5 * 0.95 + 0.5 * 0.8)
    assert area(points[:1]) == pytest.approx(0.5 * 0.95)


def test_a_curve_takes_each_multiplier_together_and_its_interval_is_over_concepts_and_seeds() -> None:
    results = [
        done(ua + 0.1 * seed, 1.0 - 0.1 * place, 0.8, "church", seed, multiplier=factor)
        for place, (factor, ua) in enumerate([(1.0, 0.4), (2.0, 0.8)])
        for seed in (0, 1)
    ]
    found = strength_curve("x", "salient", results, resamples=200)
    assert found.points == ((1.0, pytest.approx(0.45), 1.0), (2.0, pytest.approx(0.85), pytest.approx(0.9)))
    assert found.at == (None,) * len(LEVELS)
    low, high = found.area_ci95
    assert low < found.area < high
    again = strength_curve("x", "salient", results, resamples=200)
    assert again == found


def test_what_one_mask_retains_more_is_told_apart_from_what_concepts_differ_in() -> None:
    def results(less: float) -> list[TrialResult]:
        """Concepts differ much, and the masks by the same in each."""
        retained = {"church": 0.95, "dog": 0.75, "car": 0.55}
        return [
            done(1.0, value - less, 0.8, name, multiplier=factor)
            for name, value in retained.items()
            for factor in (1.0, 2.0)
        ]

    mine, theirs = results(0.0), results(0.05)
    found = curve_difference("x", "salient", mine, "none", theirs, resamples=200)
    less = [pytest.approx(0.05 * ua) for ua in LEVELS]  # on straight lines from the base model
    assert found.at == tuple(less)
    assert found.at_ci95 == tuple((one, one) for one in less)
    assert (found.mean, found.mean_ci95) == (pytest.approx(0.025), (pytest.approx(0.025), pytest.approx(0.025)))
    one, other = (strength_curve("x", "", some, resamples=200) for some in (mine, theirs))
    assert one.area_ci95[0] < other.area  # each by itself tells nothing
    # Concepts that only one of them has do not count, and where one forgets less the mean is over what it reaches.
    more = [*theirs, done(1.0, 0.1, 0.8, "truck", multiplier=1.0)]
    assert curve_difference("x", "salient", mine, "none", more, resamples=200) == found
    little = [replace(one, scores=(done(0.5).scores[0], *one.scores[1:])) for one in theirs]
    half = curve_difference("x", "salient", mine, "none", little, resamples=200)
    assert half.at == half.at_ci95 == (None,) * len(LEVELS)
    assert half.mean == pytest.approx(np.mean([0.6 * ua - 0.25 * ua for ua in np.linspace(0.005, 0.495, 50)]))


def test_the_salient_mask_is_compared_with_each_other_one_for_all_concepts_and_for_each_kind() -> None:
    retained = {("salient", "church"): 0.9, ("salient", "flat"): 0.7, ("none", "church"): 0.9, ("none", "flat"): 0.9}
    results = tuple(
        done(1.0, value, 0.8, concept, mask=mask, kind="object" if concept == "church" else "style", multiplier=factor)
        for (mask, concept), value in retained.items()
        for factor in (1.0, 2.0)
    )
    comparison = Comparison("model", "benchmark", ("church", "flat"), results)
    assert {name: [one.at[0] for one in some] for name, some in comparison.differences.items()} == {
        "all": [pytest.approx(-0.09)],
        "objects": [pytest.approx(0)],
        "styles": [pytest.approx(-0.18)],
    }
    last = mask_differences_table(comparison.differences).splitlines()[-1]
    assert last.startswith("| styles | x | salient minus none | -18.0 (-18.0 to -18.0) | -19.0 (")
    alone = replace(comparison, results=tuple(one for one in results if one.trial.mask == "none"))
    assert alone.differences == {"all": [], "objects": [], "styles": []}


class MadeUp:
    """A made-up method: what comes of each multiplier, and a note of those that were tried."""

    def __init__(self, result: Callable[[float], TrialResult], most: float = float("inf")) -> None:
        self.result, self.most = result, most
        self.tried: list[float] = []

    def run(self, trials: Sequence[Trial]) -> Iterator[TrialResult]:
        self.tried.append(trials[0].multiplier)
        return iter([replace(self.result(trial.multiplier), trial=trial) for trial in trials])

    def check(self, trial: Trial) -> None:
        if trial.multiplier > self.most:
            raise RequestError("settings.lr", trial.multiplier, "must be less")

    def search(self, steps: int) -> tuple[TuningStep, ...]:
        searching = tune("x", None, ("house", "sketch"), steps, run=self.run, check=self.check)
        while True:
            try:
                next(searching)
            except StopIteration as end:
                return end.value


def test_the_search_halves_the_gap_between_too_little_and_enough() -> None:
    method = MadeUp(lambda m: done(1.0 if m >= 3 else 0.5, 1.0 - m / 100, 0.8))
    best = method.search(6)[0]
    last = (8**0.5 * (8**0.5 * 4) ** 0.5) ** 0.5
    assert method.tried == pytest.approx([1, 4, 2, 8**0.5, (8**0.5 * 4) ** 0.5, last])
    assert best.multiplier == pytest.approx(min(m for m in method.tried if m >= 3))
    assert best.reaches_goal


def test_the_search_goes_down_from_what_erases_too_much() -> None:
    method = MadeUp(lambda m: done(1.0 if m >= 0.1 else 0.0, 1.0 if m < 0.5 else 0.6, 0.8))
    assert method.search(4)[0].multiplier == 0.25
    assert method.tried[:3] == [1, 0.25, 0.0625]


def test_the_search_goes_no_further_than_a_collapse_and_takes_what_is_best_of_what_there_is() -> None:
    method = MadeUp(lambda m: broken() if m > 2 else done(0.4 * m, 1.0, 0.8))
    found = method.search(5)
    assert max(method.tried) == 4
    assert not found[0].reaches_goal
    assert found[0].multiplier == max(m for m in method.tried if m <= 2.1)
    assert next(step for step in found if step.multiplier == 4).collapsed


def test_the_search_goes_no_further_than_the_tuned_setting() -> None:
    method = MadeUp(lambda m: done(0.2, 1.0, 0.8, tuned_value=0.1 * m), most=3)
    found = method.search(4)
    assert method.tried == pytest.approx([1, 2, 8**0.5])  # and 4, which is out of bounds, counts as a step
    assert next(step for step in found if step.multiplier == 4) == TuningStep(4, pytest.approx(0.4), 0, 0, True)


def test_no_multiplier_is_tried_twice() -> None:
    method = MadeUp(lambda m: done(0.2, 1.0, 0.8))
    method.search(6)
    assert len(set(method.tried)) == 6


def test_a_method_is_compared_with_each_other_one() -> None:
    found = {
        "default": aggregate([done(1.0, 1.0, 0.8), done(0.9, 0.9, 0.8, "dog")]),
        "x": aggregate([done(0.9, 1.0, 0.6, seconds=1.0), done(0.7, 0.95, 0.9, "dog", seconds=1.0)]),
    }
    header, _, row = method_differences_table(found, "default").splitlines()
    assert header == (
        "| default minus | forgotten | In-domain retain accuracy (IRA) | Cross-domain retain accuracy (CRA) | seconds |"
    )
    low, high = (100 * end for end in difference_interval(0.95, wilson(38, 40), 0.8, wilson(32, 40)))
    assert row.startswith(f"| x | +15.0 ({low:+.1f} to {high:+.1f}), 2:0 | -2.5 (")
    assert [part.rsplit(", ")[-1] for part in row.split(" | ")[1:4]] == ["2:0", "0:1", "1:1"]
    assert row.endswith(" | 3.0, 1.0 |")


def test_the_table_of_methods_says_what_collapsed_and_what_no_other_beats() -> None:
    results = {
        "kind": [done(1.0, 1.0, 0.8), done(1.0, 0.95, 0.8, "dog")],
        "cruel": [done(1.0, 0.3, 0.8), done(1.0, 0.9, 0.8, "dog")],
        "timid": [done(0.1, 1.0, 0.8), done(0.2, 1.0, 0.8, "dog")],
        "guard": [done(0.5, 1.0, 0.8, changed=0.0, seconds=0.0)],
    }
    table = methods_table({name: aggregate(some) for name, some in results.items()}, ("broken",))
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["kind", "cruel", "timid", "guard", "broken"]  # first those at the goal
    low, high = wilson(40, 40)
    assert rows[2][1:3] == [f"100.0% ({low:.1%} to {high:.1%})", "100% church"]
    assert [row[-1] for row in rows[2:6]] == [
        "not dominated",
        "collapses on church",
        "not dominated",
        "no weights changed",
    ]
    assert rows[6][1].startswith("failed on every concept")
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_report_of_a_method_says_who_judged_and_of_what_kind_the_concepts_are() -> None:
    """Nothing of it is taken for granted: neither the judge nor the kind."""
    results = (done(1.0, kind="person"), done(0.5, kind="person", concept="dog"), broken(concept="car", kind="person"))
    comparison = Comparison("a model", "a benchmark", ("church", "dog", "car"), results)
    report = method_report(comparison, "x", Path("nowhere"))
    assert (report.kind, report.model, report.benchmark) == ("person", "a model", "a benchmark")
    assert report.scores[0].protocol == "2 trials of church, dog, car; of church: by a judge"
    assert [score.metric for score in report.scores] == [
        "ua",
        "ira",
        "cra",
        "frechet",
        "seconds",
        "peak_gib",
        "changed",
    ]
    assert (report.scores[2].value, report.scores[2].baseline) == (1.0, pytest.approx(0.8))
    mixed = replace(comparison, results=(results[0], replace(results[1], kind="style")))
    assert method_report(mixed, "x", Path("nowhere")).kind == "concept"
