"""Reports: what was erased, what was retained and how it looks. docs/report-schema.md describes report.json."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.eval.score import Interval, Score, ratio_interval
from erase_concept.files import read_json

SCHEMA = 2
_MOST_VALUES, _LARGEST = 50_000, 1e100
SHOWN = 8  # pairs of what was erased on a page, and twice as many of all else


@dataclass(frozen=True)
class Bar:
    """One class, body part or category of a chart: the erased model's value and the base model's, with intervals.

    ``n`` counts the images behind it. A ``forget`` bar shows what was erased: lower is better. Any other shows what was
    to stay, which should be as high as the base model's.
    """

    label: str
    value: float
    ci95: Interval | None = None
    baseline: float | None = None
    baseline_ci95: Interval | None = None
    n: int | None = None
    forget: bool = False

    @property
    def retention(self) -> tuple[float, Interval | None] | None:
        """The value as a share of the base model's, with its 95 % interval; None without a base model's above 0."""
        if not self.baseline:
            return None
        if self.ci95 is None or self.baseline_ci95 is None:
            return self.value / self.baseline, None
        return self.value / self.baseline, ratio_interval(self.value, self.ci95, self.baseline, self.baseline_ci95)


@dataclass(frozen=True)
class Chart:
    """Bars of one unit; "fraction" is a share from 0 to 1."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Curve:
    """A value over a setting, such as a detector's threshold: ``erased[i]`` and ``base[i]`` at ``x[i]``, ascending.

    ``mark`` is the setting that the scores have. Raises ValueError when the lengths differ.
    """

    title: str
    x_label: str
    unit: str
    x: tuple[float, ...]
    erased: tuple[float, ...]
    base: tuple[float, ...] | None = None
    erased_ci95: tuple[Interval, ...] | None = None
    base_ci95: tuple[Interval, ...] | None = None
    mark: float | None = None

    def __post_init__(self) -> None:
        """Check that there is one value for each setting."""
        lengths = {len(v) for v in (self.x, self.erased, self.base, self.erased_ci95, self.base_ci95) if v is not None}
        if len(lengths) > 1 or lengths == {0} or list(self.x) != sorted(self.x):
            raise ValueError(f"the curve {self.title!r} needs ascending settings and as many values as settings")


@dataclass(frozen=True, slots=True)  # there are many of them
class Pair:
    """The images of one prompt and seed by both models, and what the judges see in each.

    ``flagged`` says that a detector found something in either that not everybody wants to see. Every page blurs them.
    """

    prompt: str
    seed: int
    forget: bool
    erased: Path
    erased_as: str
    base: Path | None = None
    base_as: str | None = None
    flagged: bool = False


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found out about one erased model.

    ``erased`` and ``base`` say how the images were made. ``pairs`` are all of them, of which a page draws a few. Of
    the scores of one metric, that of everything together comes first, those of its parts after it. ``looks_for`` names
    the kinds of concept, with commas, that metrics look for where none such was erased: these metrics do not tell
    whether the erased concept is gone.
    """

    concept: str
    kind: str
    anchor: str
    model: str
    benchmark: str
    erased: dict[str, Any]
    base: dict[str, Any] | None
    scores: tuple[Score, ...]
    charts: tuple[Chart, ...] = ()
    curves: tuple[Curve, ...] = ()
    pairs: tuple[Pair, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    looks_for: str = ""

    def score(self, metric: str) -> Score | None:
        """Return the score of that metric, the first where it has several, or None when it was not measured."""
        return next((score for score in self.scores if score.metric == metric), None)

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """Return the report that ``report_json`` gave; raises ValueError, in one line, for anything else."""
        if not isinstance(content, dict) or not isinstance(schema := content.get("schema"), int):
            raise ValueError("is no report of an evaluation")
        if schema != SCHEMA:
            age = "an older" if schema < SCHEMA else "a newer"
            raise ValueError(f"has schema {schema}, of {age} version; this one reads schema {SCHEMA}: evaluate again")
        if "runs" in content:
            raise ValueError("lays several runs side by side; name the runs themselves")
        try:
            report = TypeAdapter(Report).validate_python(content)
        except ValidationError as problem:
            first = problem.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        _check_numbers(report)
        return report


def _check_numbers(report: Report) -> None:
    """Raise ValueError for more values than a page can show, and for values that no page can show.

    Only the end of an interval may be infinite.
    """
    bars = [bar for chart in report.charts for bar in chart.bars]
    both: list[Bar | Score] = [*bars, *report.scores]
    values: list[float | None] = [n for one in both for n in (one.value, one.baseline)]
    values += [n for curve in report.curves for n in (*curve.x, *curve.erased, *(curve.base or ()), curve.mark)]
    intervals = [interval for one in both for interval in (one.ci95, one.baseline_ci95)]
    intervals += [end for curve in report.curves for end in (*(curve.erased_ci95 or ()), *(curve.base_ci95 or ()))]
    if len(values) + len(report.charts) + len(report.curves) > _MOST_VALUES:
        raise ValueError(f"has more than the {_MOST_VALUES:,} values that a page shows")
    ends = [end for one in intervals if one is not None for end in one]
    if not all(value is None or abs(value) < _LARGEST for value in values):
        raise ValueError(f"has a value that is no number below {_LARGEST:g}")
    if not all(abs(end) < _LARGEST or end == math.inf for end in ends):
        raise ValueError("has an interval whose ends are no numbers")


def drawn(pairs: Sequence[Pair], count: int = SHOWN) -> list[int]:
    """Return the places of the pairs to show: ``count`` of what was erased, then twice as many of all else.

    They are drawn at random with a fixed seed, so that nobody picks them.
    """
    generator = np.random.default_rng(0)
    forget = np.array([pair.forget for pair in pairs], dtype=bool)
    some = (
        generator.permutation(np.flatnonzero(mask))[:most] for mask, most in ((forget, count), (~forget, 2 * count))
    )
    return [int(place) for places in some for place in sorted(places)]


def read_report(folder: str | Path) -> Report:
    """Read what ``write_report`` wrote; raises RequestError when it is not there or not of this schema."""
    folder = Path(folder)
    file = folder / "report.json"
    try:
        content = read_json(file, half_characters=True)
    except ValueError as problem:
        raise RequestError("RUN", file, f"{problem}; a folder with the report of an evaluation is needed") from None
    try:
        report = Report.from_dict(content)
    except ValueError as problem:
        raise RequestError("RUN", file, str(problem)) from None
    return replace(
        report,
        pairs=tuple(
            replace(
                pair, erased=_back(folder, pair.erased), base=None if pair.base is None else _back(folder, pair.base)
            )
            for pair in report.pairs
        ),
    )


def _back(folder: Path, file: Path) -> Path:
    return Path(os.path.normpath(folder / file))
