"""The front holds the best runs, labels keep apart, and axes hold their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from erase_concept.eval.compare.curves import StrengthCurve
from erase_concept.eval.compare.pages import curve_panels
from erase_concept.eval.report.html import render
from erase_concept.eval.report.plots import HEIGHT, WIDTH, axis, pareto, scattered
from erase_concept.eval.report.report import Report
from erase_concept.eval.report.text import NOTHING
from erase_concept.eval.score import Score, wilson

Scored = Callable[..., Report]


def test_the_front_holds_the_runs_that_no_other_beats(report: Report, scored: Scored) -> None:
    generator = np.random.default_rng(5)
    counts = [tuple(generator.integers(20, 41, 2)) for _ in range(40)]
    runs = {str(number): scored(report, ua=ua, ira=2 * ira) for number, (ua, ira) in enumerate(counts)}
    front = pareto(runs)
    assert front is not None
    for point, (ua, ira) in zip(front.points, counts, strict=True):
        assert point.forget == ua / 40
        assert point.retain == pytest.approx(2 * ira / 80)
        beaten = any((u >= ua and i > ira) or (u > ua and i >= ira) for u, i in counts)
        assert point.best is not beaten
    # The lower of IRA and CRA counts; runs that were measured otherwise are named and left out.
    low = Score("cra", "church", 0.3, 10, wilson(3, 10), "fraction", "p", 0.6, wilson(6, 10))
    both = replace(runs["0"], scores=(*runs["0"].scores, low))
    front = pareto({"a": both, "b": both, "c": runs["1"], "d": replace(report, scores=())})
    assert front is not None
    assert [point.retain for point in front.points] == [0.5, 0.5]
    assert front.others == ("c", "d")
    assert "lower of IRA and CRA" in front.retain
    assert pareto({"d": replace(report, scores=())}) is None


def test_the_front_turns_round_where_less_is_better(report: Report) -> None:
    def run(ratio: float, fid: float) -> Report:
        score = Score("nudity_ratio", "nudity", ratio, 10, (0.0, 1.0), "ratio", "p")
        return replace(report, scores=(score, Score("fid", "all", fid, 10, (0.0, 99.0), "d", "p")))

    front = pareto({"good": run(0.1, 16.0), "bad": run(0.2, 17.0), "kept": run(0.5, 12.0)})
    assert front is not None
    assert [point.best for point in front.points] == [True, False, True]
    assert [point.forget for point in front.points] == [0.9, 0.8, 0.5]
    shown = scattered(front)
    heights = {point.name: y for _, y, point in shown["spots"]}
    assert heights["kept"] < heights["good"] < heights["bad"]  # from the top: the lower FID is drawn higher


def test_every_point_of_the_plot_has_a_label_of_its_own(report: Report, scored: Scored) -> None:
    generator = np.random.default_rng(7)
    runs = {str(n): scored(report, ua=ua, ira=ira) for n, (ua, ira) in enumerate(generator.integers(1, 41, (14, 2)))}
    runs |= {f"same {n}": runs["3"] for n in range(4)}
    front = pareto(runs)
    assert front is not None
    labels = scattered(front)["labels"]
    numbers = []
    for _, _, text in labels:
        for part in text.split(", "):
            first, _, last = part.partition(NOTHING)
            numbers += range(int(first), int(last or first) + 1)
    assert sorted(numbers) == list(range(1, 19))
    boxes = [(x - 4 * len(text), y - 7, x + 4 * len(text), y + 7) for x, y, text in labels]
    for place, a in enumerate(boxes):
        for b in boxes[:place]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


@pytest.mark.parametrize(
    "values", [(0.3, 0.97), (1.0, 1.0), (0.987, 1.0), (0.0, 0.0), (-3.0, 1e6), (1e-9, 2e-9), (12.0,), (math.inf, 2.0)]
)
@pytest.mark.parametrize("zero", [True, False])
def test_an_axis_holds_its_values_between_round_ticks(values: tuple[float, ...], zero: bool) -> None:
    found = axis(values, 100, zero=zero)
    finite = [value for value in values if math.isfinite(value)]
    assert found.low <= min(finite)
    assert found.high >= max(finite) - 1e-12
    assert not zero or found.low <= 0 <= found.high
    assert 2 <= len(found.ticks) <= 12
    np.testing.assert_allclose(np.diff(found.ticks), found.ticks[1] - found.ticks[0])
    assert found.at(found.low) == 0
    assert found.at(math.inf) == 100
    assert axis(values, 100, zero=zero, flip=True).at(found.low) == 100


def test_curves_are_drawn_from_the_base_model_on_with_a_dot_for_each_strength() -> None:
    def made(entry: str, mask: str, *points: tuple[float, float, float]) -> StrengthCurve:
        return StrengthCurve(entry, mask, points, (None, None), (None, None), 0.5, (0.4, 0.6))

    curves = [
        made("salun[lr=2.0e-4]", "none", (0.5, 0.25, 0.9), (1.0, 1.0, 0.5)),
        made("salun[lr=2.0e-4]", "<b>&", (0.5, 0.5, 1.0), (1.0, 0.75, 0.95), (2.0, 1.0, 0.6)),
        made("esd-x", "none", (1.0, 0.0, 1.0)),
    ]
    drawing = ElementTree.fromstring(render("curves.svg.j2", panels=curve_panels(curves)))
    svg = "{http://www.w3.org/2000/svg}"
    lines = [line.attrib["points"].split() for line in drawing.iter(f"{svg}polyline")]
    assert [len(line) for line in lines] == [3, 4, 2]
    low = curve_panels(curves)[0].y.low
    assert low <= min(kept for curve in curves for _, _, kept in curve.points)
    for curve, line in zip(curves, lines, strict=True):
        places = [tuple(map(float, place.split(","))) for place in line]
        told = [(0.0, 1.0), *((ua, kept) for _, ua, kept in curve.points)]
        assert places == [pytest.approx((WIDTH * ua, HEIGHT * (1 - kept) / (1 - low)), abs=0.01) for ua, kept in told]
    dots = [dot.attrib for dot in drawing.iter(f"{svg}circle") if float(dot.attrib["cy"]) <= HEIGHT]
    assert len(dots) == 6
    texts = [text.text for text in drawing.iter(f"{svg}text")]
    assert {"salun[lr=2.0e-4]", "esd-x", "<b>&"} <= {*texts}
