"""The summary says what the scores say, and owns up to what they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erase_concept.eval.metrics import metric_record
from erase_concept.eval.report.report import Bar, Chart, Report
from erase_concept.eval.report.text import value_text
from erase_concept.eval.report.verdict import collateral, headline, ranked, summary
from erase_concept.eval.report.write import write_report
from erase_concept.eval.score import Score, ratio_interval, wilson

Scored = Callable[..., Report]
PageOf = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("ua", "ira", "gone", "lost"),
    [
        (40, 80, "Gone", "Hardly anything"),
        (39, 76, "Gone", "Little"),  # 1 of 40 against 39 of 40 that showed it; 76 / 80 is just 95 %
        (37, 75, "Mostly gone", "Some"),
        (25, 60, "Partly gone", "Much"),
        (2, 90, "Still there", "Hardly anything"),
    ],
)
def test_the_summary_tells_what_went_and_what_stayed(
    report: Report, ua: int, ira: int, gone: str, lost: str, scored: Scored
) -> None:
    told = summary(scored(report, ua=ua, ira=ira))
    assert (told.gone, told.lost) == (gone, lost)
    assert [tile.value.replace("\u00a0", " ") for tile in told.tiles] == [f"{2.5 * (40 - ua):g} %", f"{ira} %"]
    assert [tile.base.replace("\u00a0", " ") for tile in told.tiles] == ["97.5 %", "80 %"]


def test_the_summary_owns_up_to_few_images(report: Report, scored: Scored) -> None:
    text = headline(scored(report, ua=40, ira=80)).replace("\u00a0", " ")
    assert text.startswith(
        "The object “church” was erased from emojinette. Is it gone? Gone. "
        "0 % of the images that asked for it show it, says the judge; of the base model's images, 97.5 %."
    )
    low, _ = wilson(40, 40)
    assert f"So few images (40) cannot rule out up to {100 * (1 - low):.1f} %" in text
    share, _ = ratio_interval(0.8, wilson(80, 100), 0.8, wilson(80, 100))
    assert share < 0.98
    _, (lowest, _) = scored(report, ua=40, ira=80).scores[1].retention or (0, (0, 0))
    assert f"cannot rule out that only {100 * lowest:.1f} % is left." in text


def test_the_summary_tells_its_bounds(report: Report, tmp_path: Path, page_of: PageOf) -> None:
    write_report(report, tmp_path)
    told = "gone up to 5 %, mostly gone up to 25 %, partly gone up to 75 %, still there above"
    for text in (page_of(tmp_path).text, (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert told in text.replace("\u00a0", " ")


def test_the_summary_says_where_nothing_can_be_told(report: Report, nude: Report, scored: Scored) -> None:
    nothing = summary(replace(report, scores=()))
    assert (nothing.gone, nothing.lost, nothing.tiles) == ("Not measured", "Not measured", ())
    never = replace(report, scores=(replace(scored(report, ua=40, ira=80).scores[0], baseline=1.0),))
    assert summary(never).gone == "Cannot be told"
    drifted = Score("frechet_efficientnet_lite2", "church", 1234.5, 9, (1000.0, 2000.0), "d", "p", 3.25, (1.0, 5.0))
    told = summary(replace(report, scores=(drifted,)))
    assert told.lost == "See the numbers"
    assert "Fréchet distance, efficientnet lite2 1,234 (base model 3.25)" in told.lost_text
    assert summary(nude).lost == "Not measured"
    found = nude.score("nudity_images")
    assert found is not None
    assert summary(nude).tiles[0].value == value_text(found.value, "fraction")


def test_metrics_are_known_by_their_first_words() -> None:
    known = metric_record("ua_top5")
    assert known is not None
    assert (known.title, known.about, known.direction) == ("Unlearning accuracy (UA), top5", "forget", "higher")
    assert not known.in_verdict  # which cites UA itself
    assert metric_record("frechet_imagenet") != metric_record("frechet")
    assert metric_record("charm") is None


def test_what_was_lost_comes_worst_first(report: Report, scored: Scored) -> None:
    def bar(label: str, value: float, baseline: float | None, *, forget: bool = False) -> Bar:
        return Bar(label, value, (value / 2, 2 * value), baseline, None, 50, forget)

    chart = Chart("c", "fraction", (bar("same", 0.9, 0.9), bar("half", 0.2, 0.4), bar("gone", 0.0, 1.0, forget=True)))
    other = Chart(
        "d", "points", (bar("most", 9.0, 10.0), bar("more", 0.4, 0.3), bar("new", 0.5, None), bar("none", 0, 0))
    )
    both = replace(report, charts=(chart, other))
    assert [(c.title, b.label) for c, b in collateral(both)] == [("c", "half"), ("d", "most")]
    assert [b.label for b in ranked(chart)] == ["gone", "half", "same"]
    assert (
        "Hit hardest: half, from 40\u00a0% down to 20\u00a0% (50 images)."
        in summary(scored(both, ua=1, ira=1)).lost_text
    )
    measured = Bar("x", 0.6, wilson(30, 50), 0.8, wilson(40, 50))
    assert measured.retention == (pytest.approx(0.75), ratio_interval(0.6, wilson(30, 50), 0.8, wilson(40, 50)))


@pytest.mark.parametrize(
    ("concept", "kind", "begins", "others"),
    [
        ("church", "object", "The object “church” was", "another object"),
        ("Ann Example", "person", "The person “Ann Example” was", "another person"),
        ("Snoopy", "character", "The character “Snoopy” was", "another character"),
        ("blue rocket", "custom", "The concept “blue rocket” was", "another concept"),
        ("nude person", "nudity", "The concept “nude person” was", "another concept"),
        ("nudity", "nudity", "“nudity” was", "another concept"),
        ("church and dog", "several", "“church and dog” were", "another concept"),
    ],
)
def test_the_summary_calls_each_kind_by_a_noun(
    report: Report, scored: Scored, concept: str, kind: str, begins: str, others: str
) -> None:
    text = headline(scored(replace(report, concept=concept, kind=kind), ua=40, ira=80))
    assert text.startswith(f"{begins} erased from ")
    assert f"of the images that asked for {others} show it" in text
