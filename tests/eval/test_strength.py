"""Cells taken together, the search of a strength, and curves at equal forgetting, against sums done by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erase_concept.errors import RequestError
from erase_concept.eval.compare import tuning as strengths
from erase_concept.eval.compare.aggregate import dominated, failed, pool
from erase_concept.eval.compare.compare import beside_salient, beside_table, differences_table
from erase_concept.eval.compare.trials import Cell
from erase_concept.eval.compare.tuning import LEVELS, Trial, area, curve, curve_difference, kept_at, tune
from erase_concept.eval.score import difference_interval, wilson


def cell(
    ua: float, ira: float = 1.0, cra: float = 1.0, concept: str = "church", seed: int = 0, **more: Any
) -> dict[str, Any]:
    """A cell's result, of 20 forget and 80 retain images; the base model's accuracies are 1 and 0.8."""
    scores = {
        "ua": {"value": ua, "n": 20, "baseline": 0.0},
        "ira": {"value": ira, "n": 80, "baseline": 1.0},
        "cra": {"value": cra, "n": 80, "baseline": 0.8},
        "frechet": {"value": 2.0, "n": 80, "baseline": 1.5},
    }
    costs = {"seconds": 3.0, "cell_seconds": 9.0, "peak_gib": 1.5, "changed": 0.5}
    about = {"entry": "x", "mask": None, "strength": 1.0, "value": 0.1, "concept": concept, "seed": seed}
    return {"scores": scores, **costs, **about, **more}


def broken(**more: Any) -> dict[str, Any]:
    """The result of an erasure that failed."""
    return {"failed": "the loss is nan", "seconds": 1.0, **cell(0)} | {"scores": {}} | more


def test_cells_pool_by_images_and_hold_against_the_base() -> None:
    found = pool([cell(1.0, 1.0, 0.8), cell(0.5, 0.9, 0.4, "dog", seconds=5.0), cell(1.0, 0.95, 0.8, "dog", 1)])
    assert found is not None
    assert found.share == pytest.approx({"ua": 50 / 60, "ira": 228 / 240, "cra": 160 / 240})
    assert found.ci95 == {"ua": wilson(50, 60), "ira": wilson(228, 240), "cra": wilson(160, 240)}
    assert found.of_base == pytest.approx({"ira": 228 / 240, "cra": 160 / 192})
    assert found.kept == found.of_base["cra"]
    assert (found.n, found.seconds) == ({"ua": 60, "ira": 240, "cra": 240}, 3.0)
    assert found.lowest_ua == ("dog", 0.75)
    assert found.collapsed == ()


def test_what_a_benchmark_does_not_have_counts_for_nothing() -> None:
    cells = [cell(1.0, 0.9, 0.1), cell(1.0, 0.7, 0.1)]
    for one in cells:
        del one["scores"]["cra"], one["scores"]["frechet"]
    found = pool(cells)
    assert found is not None
    assert found.of_base == pytest.approx({"ira": 0.8})
    assert (found.kept, found.frechet, found.collapsed) == (pytest.approx(0.8), None, ())
    cells[0]["scores"]["ira"]["baseline"] = 0.0
    assert not failed(cells[0])


def test_what_failed_or_knows_nothing_any_more_has_collapsed() -> None:
    assert failed(broken())
    assert failed(cell(1.0, 0.4))
    assert not failed(cell(1.0, 1.0, 0.4))  # half of the base model's 0.8
    found = pool([cell(1.0), cell(1.0, 0.3, concept="dog"), broken(concept="car")])
    assert found is not None
    assert (found.cells, found.collapsed) == (2, ("dog", "car"))
    assert pool([broken()]) is None


def test_another_must_be_as_good_in_all_better_in_one_and_as_quick() -> None:
    results = {
        "best": pool([cell(1.0, 1.0, 0.8)]),
        "worse": pool([cell(1.0, 0.9, 0.8)]),
        "quick": pool([cell(0.9, 0.9, 0.8, seconds=1.0)]),
        "equal": pool([cell(1.0, 1.0, 0.8)]),
    }
    assert dominated(results) == {"worse"}


def test_a_curve_is_straight_between_its_points_and_from_the_base_model_on() -> None:
    points = [(1.0, 0.5, 0.9), (2.0, 1.0, 0.7)]
    assert kept_at(points, 0.25) == pytest.approx(0.95)
    assert kept_at(points, 0.5) == pytest.approx(0.9)
    assert kept_at(points, 0.75) == pytest.approx(0.8)
    assert kept_at(points, 1.0) == pytest.approx(0.7)
    assert kept_at(points[:1], 0.75) is None
    # Of two ways to forget as much, the one that keeps more counts.
    assert kept_at([*points, (4.0, 0.9, 0.95)], 0.8) == pytest.approx(0.95)
    assert area([(1.0, 1.0, 1.0)]) == pytest.approx(1)
    assert area(points) == pytest.approx(0.5 * 0.95 + 0.5 * 0.8)
    assert area(points[:1]) == pytest.approx(0.5 * 0.95)


def test_a_curve_pools_each_strength_and_its_interval_is_over_concepts_and_seeds() -> None:
    cells = [
        cell(ua + 0.1 * seed, 1.0 - 0.1 * place, 0.8, "church", seed, strength=factor)
        for place, (factor, ua) in enumerate([(1.0, 0.4), (2.0, 0.8)])
        for seed in (0, 1)
    ]
    found = curve("x", "salient", cells, resamples=200)
    assert found.points == ((1.0, pytest.approx(0.45), 1.0), (2.0, pytest.approx(0.85), pytest.approx(0.9)))
    assert found.at == (None,) * len(LEVELS)
    low, high = found.area_ci95
    assert low < found.area < high
    again = curve("x", "salient", cells, resamples=200)
    assert again == found


def test_what_one_mask_keeps_more_is_told_apart_from_what_concepts_differ_in() -> None:
    def cells(less: float) -> list[dict[str, Any]]:
        """Concepts differ much, and the masks by the same in each."""
        kept = {"church": 0.95, "dog": 0.75, "car": 0.55}
        return [cell(1.0, value - less, 0.8, name, strength=s) for name, value in kept.items() for s in (1.0, 2.0)]

    mine, theirs = cells(0.0), cells(0.05)
    found = curve_difference("x", "salient", mine, "none", theirs, resamples=200)
    less = [pytest.approx(0.05 * ua) for ua in LEVELS]  # on straight lines from the base model
    assert found.at == tuple(less)
    assert found.at_ci95 == tuple((one, one) for one in less)
    assert (found.mean, found.mean_ci95) == (pytest.approx(0.025), (pytest.approx(0.025), pytest.approx(0.025)))
    one, other = (curve("x", "", some, resamples=200) for some in (mine, theirs))
    assert one.area_ci95[0] < other.area  # each by itself tells nothing
    # Concepts that only one of them has do not count, and where one forgets less the mean is over what it reaches.
    more = [*theirs, cell(1.0, 0.1, 0.8, "truck", strength=1.0)]
    assert curve_difference("x", "salient", mine, "none", more, resamples=200) == found
    little = [c | {"scores": c["scores"] | {"ua": cell(0.5)["scores"]["ua"]}} for c in theirs]
    half = curve_difference("x", "salient", mine, "none", little, resamples=200)
    assert half.at == half.at_ci95 == (None,) * len(LEVELS)
    assert half.mean == pytest.approx(np.mean([0.6 * ua - 0.25 * ua for ua in np.linspace(0.005, 0.495, 50)]))


def test_the_salient_mask_is_laid_beside_each_other_one_for_all_concepts_and_for_each_kind() -> None:
    kept = {("salient", "church"): 0.9, ("salient", "flat"): 0.7, ("none", "church"): 0.9, ("none", "flat"): 0.9}
    cells = [
        cell(1.0, value, 0.8, concept, mask=mask, kind="object" if concept == "church" else "style", strength=factor)
        for (mask, concept), value in kept.items()
        for factor in (1.0, 2.0)
    ]
    found = beside_salient(cells)
    assert {name: [one.at[0] for one in some] for name, some in found.items()} == {
        "all": [pytest.approx(-0.09)],
        "objects": [pytest.approx(0)],
        "styles": [pytest.approx(-0.18)],
    }
    last = differences_table(found).splitlines()[-1]
    assert last.startswith("| styles | x | salient less none | -18.0 (-18.0 to -18.0) | -19.0 (")
    assert beside_salient([one for one in cells if one["mask"] == "none"]) == {"all": [], "objects": [], "styles": []}


@pytest.fixture
def tuned_setting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], dict[str, Any]]], list[float]]:
    """Have the search meet a made-up method, told by what comes of each strength, and note the strengths it tries."""

    def made_up(result: Callable[[float], dict[str, Any]], most: float = float("inf")) -> list[float]:
        tried: list[float] = []

        def run(model: str, cells: Any, out: Path, benchmark: str) -> Any:
            tried.append(cells[0].strength)
            return iter([result(c.strength) | {"concept": c.concept} for c in cells])

        def end(model: str, made: Cell) -> None:
            if made.strength > most:
                raise RequestError("--set", made.strength, "must be less")

        monkeypatch.setattr(strengths, "run_cells", run)
        monkeypatch.setattr(strengths, "recipe_of", end)
        return tried

    return made_up


def search(trials: int) -> list[Trial]:
    *_, found = tune("emojinette", "x", ("house", "sketch"), trials, Path("nowhere"))
    assert isinstance(found, list)
    return found


def test_the_search_halves_the_gap_between_too_little_and_enough(tuned_setting: Any) -> None:
    tried = tuned_setting(lambda s: cell(1.0 if s >= 3 else 0.5, 1.0 - s / 100, 0.8))
    best = search(6)[0]
    assert tried == pytest.approx([1, 4, 2, 8**0.5, (8**0.5 * 4) ** 0.5, (8**0.5 * (8**0.5 * 4) ** 0.5) ** 0.5])
    assert best.strength == pytest.approx(min(s for s in tried if s >= 3))
    assert best.fits


def test_the_search_goes_down_from_what_erases_too_much(tuned_setting: Any) -> None:
    tried = tuned_setting(lambda s: cell(1.0 if s >= 0.1 else 0.0, 1.0 if s < 0.5 else 0.6, 0.8))
    assert search(4)[0].strength == 0.25
    assert tried[:3] == [1, 0.25, 0.0625]


def test_the_search_goes_no_further_than_a_collapse_and_takes_what_is_best_of_what_there_is(tuned_setting: Any) -> None:
    tried = tuned_setting(lambda s: broken(value=s) if s > 2 else cell(0.4 * s, 1.0, 0.8))
    found = search(5)
    assert max(tried) == 4
    assert not found[0].fits
    assert found[0].strength == max(s for s in tried if s <= 2.1)
    assert next(t for t in found if t.strength == 4).collapsed


def test_the_search_goes_no_further_than_the_knob(tuned_setting: Any) -> None:
    tried = tuned_setting(lambda s: cell(0.2, 1.0, 0.8, value=0.1 * s), most=3)
    found = search(4)
    assert tried == pytest.approx([1, 2, 8**0.5])  # and 4, which the tuned_setting does not reach, counts as a trial
    assert next(t for t in found if t.strength == 4) == Trial(4, pytest.approx(0.4), 0, 0, collapsed=True)


def test_no_strength_is_tried_twice(tuned_setting: Any) -> None:
    tried = tuned_setting(lambda s: cell(0.2, 1.0, 0.8))
    search(6)
    assert len(set(tried)) == 6


def test_an_entry_is_laid_beside_each_other_one() -> None:
    pooled = {
        "default": pool([cell(1.0, 1.0, 0.8), cell(0.9, 0.9, 0.8, "dog")]),
        "x": pool([cell(0.9, 1.0, 0.6, seconds=1.0), cell(0.7, 0.95, 0.9, "dog", seconds=1.0)]),
    }
    assert all(pooled.values())
    header, _, row = beside_table(pooled, "default").splitlines()
    assert header == "| default less | UA | IRA | CRA | seconds |"
    low, high = (100 * end for end in difference_interval(0.95, wilson(38, 40), 0.8, wilson(32, 40)))
    assert row.startswith(f"| x | +15.0 ({low:+.1f} to {high:+.1f}), 2:0 | -2.5 (")
    assert [part.rsplit(", ")[-1] for part in row.split(" | ")[1:4]] == ["2:0", "0:1", "1:1"]
    assert row.endswith(" | 3.0, 1.0 |")
