"""Lay out the plots of a page: axes, lines, points and labels. Find the runs that no other run beats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from erase_concept.eval.metrics import metric_record
from erase_concept.eval.report.report import Chart, Curve, Report
from erase_concept.eval.report.text import NOTHING
from erase_concept.eval.report.verdict import cited
from erase_concept.eval.score import Interval

WIDTH, HEIGHT = 400.0, 250.0  # of a plot's inside, in its own units


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high`` along so many units of a drawing, with round ticks; flipped, it starts at the end."""

    low: float
    high: float
    ticks: tuple[float, ...]
    length: float
    flip: bool

    def at(self, value: float) -> float:
        """Return a value's place along the axis, at its ends what is outside."""
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return round(self.length * (1 - share if self.flip else share), 2)


def axis(values: Sequence[float], length: float, *, zero: bool = False, flip: bool = False) -> Axis:
    """Return an axis on which all the values are, from zero if asked for."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = (min(0.0, *finite), max(finite)) if zero else (min(finite), max(finite))
    if high - low <= 0.01 * max(abs(low), abs(high)):  # all of one value, nearly
        low, high = (low, low + 1.0) if zero else (low - max(0.05 * abs(low), 1e-6), high)
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k * 4.5 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{step * k:.10g}") for k in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, length, flip)


def top(chart: Chart) -> float:
    """Return the value at the right end of a chart's bars: 1 for shares, otherwise the greatest."""
    if chart.unit == "fraction":
        return 1.0
    values = [v for bar in chart.bars for v in (bar.value, bar.baseline) if v is not None]
    ends = [end for bar in chart.bars for i in (bar.ci95, bar.baseline_ci95) if i is not None for end in i]
    return max((value for value in (*values, *ends) if math.isfinite(value)), default=0.0) or 1.0


def plotted(curve: Curve) -> dict[str, Any]:
    """Return a curve's axes, and its lines and bands as SVG's lists of points."""
    ends = [end for band in (curve.erased_ci95, curve.base_ci95) for interval in band or () for end in interval]
    x = axis(curve.x, WIDTH)
    y = axis([*curve.erased, *(curve.base or ()), *ends], HEIGHT, zero=True, flip=True)

    def line(values: Sequence[float], settings: Sequence[float]) -> str:
        return " ".join(f"{x.at(s):g},{y.at(v):g}" for s, v in zip(settings, values, strict=True))

    def band(intervals: Sequence[Interval]) -> str:
        back = [low for low, _ in reversed(intervals)]
        return f"{line([high for _, high in intervals], curve.x)} {line(back, curve.x[::-1])}"

    sides = {"base": (curve.base, curve.base_ci95), "erased": (curve.erased, curve.erased_ci95)}
    lines = {side: line(values, curve.x) for side, (values, _) in sides.items() if values is not None}
    bands = {side: band(intervals) for side, (_, intervals) in sides.items() if intervals is not None}
    return {"x": x, "y": y, "lines": lines, "bands": bands}


@dataclass(frozen=True)
class Point:
    """A run in the plot: how much of the concept is gone and how much of the rest is there, with 95 % intervals.

    ``best`` says that no other run is as good in both and better in one.
    """

    number: int
    name: str
    concept: str
    forget: float
    forget_ci95: Interval
    retain: float
    retain_ci95: Interval
    best: bool = False


@dataclass(frozen=True)
class Front:
    """The runs that have the same two measures; ``others`` are the names of those that do not."""

    forget: str
    retain: str
    unit: str
    higher: bool
    points: tuple[Point, ...]
    others: tuple[str, ...]


def pareto(reports: Mapping[str, Report]) -> Front | None:
    """Plot retaining over forgetting, of as many runs as measured both alike; None where no run measured both."""
    found = {name: (_forgotten(report), _retained(report)) for name, report in reports.items()}
    both = {name: (f, r) for name, (f, r) in found.items() if f is not None and r is not None}
    if not both:
        return None
    (forget, (retain, unit, higher)), _ = Counter((f[0], r[0]) for f, r in both.values()).most_common(1)[0]
    points = [
        Point(number, name, reports[name].concept, *both[name][0][1:], *both[name][1][1:])
        for number, name in enumerate(reports, start=1)
        if name in both and (both[name][0][0], both[name][1][0]) == (forget, (retain, unit, higher))
    ]
    sign = 1 if higher else -1
    values = [(point.forget, sign * point.retain) for point in points]
    best = [not any(v != w and v[0] <= w[0] and v[1] <= w[1] for w in values) for v in values]
    shown = tuple(replace(point, best=is_best) for point, is_best in zip(points, best, strict=True))
    others = tuple(name for name in reports if name not in {point.name for point in points})
    return Front(forget, retain, unit, higher, shown, others)


def _forgotten(report: Report) -> tuple[str, float, Interval] | None:
    """Return what is plotted as forgotten: what it is, its share, and the interval.

    It is a metric that a verdict cites, and of these a share of the base model's where there is one.
    """
    found = sorted(cited(report, "forget"), key=lambda one: one[1].unit != "ratio")
    for record, score in found:
        if record.direction == "higher":
            return record.title, score.value, score.ci95
        return f"100\u00a0% \u2212 {record.title}", 1 - score.value, (1 - score.ci95[1], 1 - score.ci95[0])
    return None


def _retained(report: Report) -> tuple[tuple[str, str, bool], float, Interval] | None:
    """Return what is plotted as retained: (what it is, its unit, whether more is better), its value, the interval.

    It is the lowest of the metrics that a verdict cites, as a share of the base model's where there is one. Where it
    cites none, it is the first metric about what was to stay.
    """
    scores = [score for record, score in cited(report, "retain") if record.in_verdict]
    names = " and ".join(score.metric.upper() for score in scores)
    which = f"lower of {names}" if len(scores) > 1 else names
    retention = [score.retention for score in scores if score.retention is not None]
    if scores and len(retention) == len(scores):
        return (f"Retained of the base model's accuracy ({which})", "fraction", True), *min(retention)
    if scores:
        return (f"Accuracy on the rest ({which})", "fraction", True), *min((s.value, s.ci95) for s in scores)
    for score in report.scores:
        record = metric_record(score.metric)
        if record is not None and record.about == "retain":
            name = f"{record.title} ({record.direction} is better)"
            return (name, score.unit, record.direction == "higher"), score.value, score.ci95
    return None


def scattered(front: Front) -> dict[str, Any]:
    """Return the axes, the points in the drawing and the labels (x, y, text), one for points that lie together."""
    x = axis([point.forget for point in front.points], WIDTH)
    y = axis([point.retain for point in front.points], HEIGHT, flip=front.higher)
    spots = [(x.at(point.forget), y.at(point.retain), point) for point in front.points]
    together: list[tuple[float, float, list[int]]] = []
    for across, down, point in spots:
        near = next((t for t in together if abs(t[0] - across) < 10 and abs(t[1] - down) < 10), None)
        if near is None:
            together.append((across, down, [point.number]))
        else:
            near[2].append(point.number)
    taken = [(across - 7, down - 7, across + 7, down + 7) for across, down, _ in spots]
    labels = []
    for across, down, numbers in together:
        text = _ranges(numbers)
        wide, high = 4.2 * len(text) + 2, 8.0
        around = [
            (across + far * i * (wide + 9), down + far * j * 17)
            for far in (1, 1.7, 2.4)
            for i, j in ((1, -0.7), (-1, -0.7), (1, 0.7), (-1, 0.7), (0, -1), (0, 1), (1, 0), (-1, 0))
        ]
        boxes = {(a, d): (a - wide, d - high, a + wide, d + high) for a, d in around}
        free = [
            place
            for place, box in boxes.items()
            if box[0] > 0 and box[1] > -12 and box[2] < WIDTH + 20 and box[3] < HEIGHT
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
        ]
        place = (free or around)[0]
        taken.append(boxes[place])
        labels.append((round(place[0], 1), round(place[1], 1), text))
    steps = sorted({(across, down) for across, down, point in spots if point.best})
    return {"x": x, "y": y, "spots": spots, "labels": labels, "front": " ".join(f"{a:g},{d:g}" for a, d in steps)}


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in short: 1, 3-5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]}{', ' if len(run) == 2 else NOTHING}{run[-1]}" for run in runs
    )
