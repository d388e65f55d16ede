"""Reports come back as they were written, pairs are drawn and not picked, and what is no report is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erase_concept.errors import RequestError
from erase_concept.eval.report.report import SCHEMA, Bar, Chart, Curve, Pair, Report, drawn, read_report
from erase_concept.eval.report.verdict import headline, summary
from erase_concept.eval.report.write import report_json, write_report, write_side_by_side
from erase_concept.eval.score import Score

Scored = Callable[..., Report]
PageOf = Callable[[Path], Any]


def test_a_report_comes_back_as_it_was_written(report: Report, nude: Report, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    for made in (report, nude):
        write_report(made, folder)
        assert read_report(folder) == made
        assert Report.from_dict(report_json(made)) == made
    assert sorted(file.name for file in folder.iterdir()) == ["grid.png", "report.html", "report.json", "report.md"]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["schema"] == 2
    assert content["summary"]["text"] == headline(nude)
    assert content["pairs"][0]["erased"].startswith("../../erased/")  # the folders may move together
    assert set(content["scores"][0]) >= {"metric", "target", "value", "baseline", "n", "ci95", "unit", "protocol"}


def test_an_endless_interval_and_a_broken_character_come_back(report: Report, tmp_path: Path) -> None:
    score = replace(report.scores[0], ci95=(0.5, math.inf), unit="ratio")
    pair = replace(report.pairs[0], prompt="half \ud83d of a smile", erased=tmp_path / "gone.png")
    odd = replace(report, scores=(score,), pairs=(pair,))
    write_report(odd, tmp_path / "out")
    assert read_report(tmp_path / "out") == odd
    text = (tmp_path / "out" / "report.json").read_text(encoding="utf-8")
    assert '"Infinity"' in text
    assert "NaN" not in text
    assert "∞" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_schema_is_described() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report-schema.md").read_text(encoding="utf-8")
    assert f"schema {SCHEMA}" in text.splitlines()[0]
    for kind in (Report, Score, Chart, Bar, Curve, Pair):
        for field in fields(kind):
            assert f"`{field.name}`" in text, (kind, field.name)


def test_a_report_without_a_base_comes_back_too(report: Report, tmp_path: Path, page_of: PageOf) -> None:
    alone = replace(
        report,
        base=None,
        scores=tuple(replace(score, baseline=None, baseline_ci95=None) for score in report.scores),
        charts=tuple(
            replace(chart, bars=tuple(replace(bar, baseline=None, baseline_ci95=None) for bar in chart.bars))
            for chart in report.charts
        ),
        pairs=tuple(replace(pair, base=None, base_as=None) for pair in report.pairs),
    )
    write_report(alone, tmp_path / "out")
    assert read_report(tmp_path / "out") == alone
    page = page_of(tmp_path / "out")
    assert len(page.images()) == len(drawn(alone.pairs))
    assert "input" not in {tag for tag, _ in page.tags}  # nothing to slide between
    assert "the base model's accuracy," not in headline(alone)
    assert summary(alone).lost == "Cannot be told"


def test_pairs_are_drawn_and_not_picked(report: Report, tmp_path: Path, page_of: PageOf) -> None:
    places = drawn(report.pairs)
    forget = [report.pairs[place].forget for place in places]
    asked = sum(pair.forget for pair in report.pairs)
    assert forget == [True] * min(asked, 8) + [False] * 16
    assert len(set(places)) == len(places)
    # Which ones says nothing about the images: others of the same kinds in the same order give the same places.
    others = [replace(pair, prompt=str(pair.seed), flagged=True, erased_as="?") for pair in report.pairs]
    assert drawn(others) == places
    assert drawn(report.pairs[:0]) == []
    many = [Pair("", seed, False, Path("x"), "") for seed in range(5000)]
    assert 1500 < np.mean(drawn(many)) < 3500
    write_report(report, tmp_path)
    told = f"{len(places)} of {len(report.pairs)} pairs, drawn at random"
    assert told in page_of(tmp_path).text
    assert f"{len(places)} of {len(report.pairs)} pairs" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_compare_sets_runs_side_by_side(report: Report, tmp_path: Path, scored: Scored, page_of: PageOf) -> None:
    weak, strong = scored(report, ua=10, ira=80), scored(report, ua=40, ira=60)
    write_side_by_side({"weak": weak, "strong": strong}, tmp_path / "both")
    content = json.loads((tmp_path / "both" / "report.json").read_text(encoding="utf-8"))
    assert list(content["runs"]) == ["weak", "strong"]
    assert content["runs"]["strong"]["scores"][0]["value"] == 1.0
    assert content["pareto"]["points"]["weak"] == {"forget": 0.25, "retain": 1.0, "best": True}
    lines = (tmp_path / "both" / "report.md").read_text(encoding="utf-8").replace("\u00a0", " ").splitlines()
    assert [line.split(" | ")[3] for line in lines if re.match(r"\| \d \| (weak|strong)", line)][:2] == [
        "25 % (base 2.5 %)",
        "100 % (base 2.5 %)",
    ]
    # 4 of the concept and 8 of all else that both were asked: the base's image once and each run's beside it.
    assert len(page_of(tmp_path / "both").images()) == 3 * 12
    assert len(content["runs"]["weak"]["pairs"]) == 12
    other = replace(strong, base={"unet": "another"}, pairs=strong.pairs[1:])
    write_side_by_side({"weak": weak, "other": other}, tmp_path / "apart")
    page = page_of(tmp_path / "apart")
    assert len(page.images()) == 2 * 12
    assert f"12 of the {len(strong.pairs) - 1} prompts and seeds" in page.text
    write_side_by_side({"weak": weak, "none": replace(strong, pairs=())}, tmp_path / "none")
    assert not page_of(tmp_path / "none").images()


@pytest.mark.parametrize("more", [{"erased": (1.0,)}, {"base": (1.0,)}, {"x": (2.0, 1.0)}, {"x": (), "erased": ()}])
def test_a_curve_has_a_value_for_each_setting(more: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="ascending settings and as many values"):
        Curve(**{"title": "c", "x_label": "x", "unit": "u", "x": (0.0, 1.0), "erased": (0.0, 1.0), **more})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "is no report of an evaluation"),
        ('{"schema": "2"}', "is no report of an evaluation"),
        ('{"schema": 1}', "has schema 1, of an older version; this one reads schema 2: evaluate again"),
        ('{"schema": 3}', "has schema 3, of a newer version"),
        ('{"schema": 2, "runs": {}}', "several runs side by side; name the runs themselves"),
        ('{"schema": 2}', "Field required|missing"),
    ],
)
def test_what_is_no_report_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=reason) as refused:
        read_report(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_curve_that_does_not_fit_is_refused(nude: Report) -> None:
    content = report_json(nude)
    content["curves"][0]["erased"].append(0.5)
    with pytest.raises(ValueError, match="as many values as settings"):
        Report.from_dict(content)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["scores"][0].update(value=float("nan")), "no number below"),
        (lambda c: c["scores"][0].update(baseline="Infinity"), "no number below"),
        (lambda c: c["scores"][0].update(ci95=["-Infinity", 1]), "an interval whose ends are no numbers"),
        (lambda c: c["charts"][0]["bars"][0].update(value=1e200), "no number below"),
        (lambda c: c["curves"][0].update(mark="NaN"), "no number below"),
        (lambda c: c["charts"][0].update(bars=c["charts"][0]["bars"] * 60_000), "more than the 50,000 values"),
    ],
)
def test_numbers_that_no_page_shows_are_refused(change: Any, problem: str, nude: Report) -> None:
    content = report_json(nude)
    change(content)
    with pytest.raises(ValueError, match=problem):
        Report.from_dict(content)
    back = report_json(nude)
    back["scores"][0]["ci95"] = [0, "Infinity"]  # of a ratio
    assert Report.from_dict(back).scores[0].ci95 == (0, float("inf"))


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one run"):
        write_side_by_side({}, tmp_path)


def test_a_number_that_json_cannot_hold_leaves_no_file(report: Report, tmp_path: Path) -> None:
    broken = replace(report, scores=(replace(report.scores[0], value=math.nan),))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
