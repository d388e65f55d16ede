"""The benchmark of the DDPM of Fashion-MNIST: it asks by label, and measures the other classes against real images."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.plan import make_plan
from erase_concept.eval.report.report import Report
from erase_concept.eval.request import EvalRequest
from erase_concept.methods import METHODS
from erase_concept.pipelines.fashion_ddpm import LABELS
from erase_concept.recipe import recipe_for
from erase_concept.run import iter_erase

PRESET = ("salun", "random-label", "salun-soft", "gradient-ascent", "l1-sparse", "esd-full")


def test_it_asks_in_the_labels_that_the_erasing_used(tmp_path: Path) -> None:
    plan = make_plan(EvalRequest("fashion-ddpm", tmp_path, "bag", baseline="fashion-ddpm"))
    rows = plan.prompts.asked.rows
    assert plan.benchmark.name == "fashion-ddpm"
    assert [sum(row.object == label for row in rows) for label in LABELS] == [100] * 10
    assert len({row.seed for row in rows}) == len(rows)
    assert plan.forget(rows).sum() == 100
    assert plan.prompts.left_out == 0


@pytest.mark.parametrize("method", PRESET)
def test_the_preset_has_settings_for_what_works_on_it(method: str) -> None:
    recipe = recipe_for("fashion-ddpm", "bag", method=method)
    assert recipe.settings.lr != METHODS.find(method).settings().lr
    assert recipe.data.scheduler == "DDIMScheduler"
    assert recipe.concept.anchor == "boot"


def test_from_erasing_to_the_report(tmp_path: Path) -> None:
    small = {"settings": {"steps": 1, "batch_size": 2}, "data": {"forget": 2, "retain": 2, "steps": 2}}
    assert recipe_for("fashion-ddpm", "bag").method == "salun"
    list(iter_erase(recipe_for("fashion-ddpm", "bag", **small), tmp_path / "run"))
    settings = {"seeds": 1, "steps": 2}
    *_, report = iter_evaluate(EvalRequest(tmp_path / "run", tmp_path / "run", settings=settings, batch_size=10))
    assert isinstance(report, Report)
    assert [(score.metric, score.n) for score in report.scores] == [("ua", 1), ("ira", 9), ("frechet", 9)]
    assert all(score.baseline is not None for score in report.scores)
    frechet = report.score("frechet")
    assert frechet is not None
    assert "9 images of retain prompts against 2700 held-out real images of the same labels" in frechet.protocol
