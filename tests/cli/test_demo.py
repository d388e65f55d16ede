"""``demo``: the whole way on the built-in model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


def test_a_concept_that_cannot_be_measured_is_not_erased(command: Command, tmp_path: Path) -> None:
    code, _, err = command("demo", "-c", "object:blue rocket", "-o", str(tmp_path / "x"))
    assert (code, "--concept 'blue rocket'" in err, (tmp_path / "x").exists()) == (2, True, False)


@pytest.mark.slow
def test_the_demo_erases_and_reports(demo_run: Path) -> None:
    printed = json.loads(demo_run.with_name("demo.json").read_text(encoding="utf-8"))
    scores = {score["metric"]: score for score in printed["scores"]}
    assert scores["ua"]["value"] > 0.95
    assert scores["ua"]["baseline"] < 0.05
    for kept in ("ira", "cra"):
        assert scores[kept]["value"] > 0.95 * scores[kept]["baseline"]
    assert (demo_run / "report.html").is_file()
    assert json.loads((demo_run / "run.json").read_text(encoding="utf-8"))["checks"]["changed_outside_mask"] == 0
