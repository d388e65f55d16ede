"""Reports: what was erased, what was kept and how it looks, as JSON, Markdown, HTML and one grid of images.

docs/report-schema.md describes report.json.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from erase_concept.errors import RequestError
from erase_concept.eval.report.html import encoded, grid, render
from erase_concept.eval.report.markdown import markdown, markdown_of_all
from erase_concept.eval.report.plots import pareto
from erase_concept.eval.report.verdict import headline, summary
from erase_concept.eval.score import Interval, Score, ratio_interval
from erase_concept.files import atomic_write

SCHEMA = 2
SHOWN = 8  # pairs of what was erased on a page, and twice as many of all else
COMPARED = 300  # images at most on a page of many runs


@dataclass(frozen=True)
class Bar:
    """One class, body part or category of a chart: the erased model's value and the base model's, with intervals.

    ``n`` counts the images behind it. A ``forget`` bar is of what was erased, and well when it is low; any other is of
    what was to stay, and well when it is as high as the base model's.
    """

    label: str
    value: float
    ci95: Interval | None = None
    baseline: float | None = None
    baseline_ci95: Interval | None = None
    n: int | None = None
    forget: bool = False

    @property
    def kept(self) -> tuple[float, Interval | None] | None:
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


@dataclass(frozen=True)
class Pair:
    """The images of one prompt and seed by both models, and what each is taken for.

    ``flagged`` says that a detector found in either what not everybody wants to see: every page veils them.
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
    the scores of one metric, that of everything together comes first, those of its parts after it.
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

    def score(self, metric: str) -> Score | None:
        """Return the score of that metric, the first where it has several, or None when it was not measured."""
        return next((score for score in self.scores if score.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the number of the schema, the summary in words, and all fields."""
        told = summary(self)
        words = {"gone": told.gone, "lost": told.lost, "text": headline(self)}
        return {"schema": SCHEMA, "summary": words, **TypeAdapter(Report).dump_python(self, mode="json")}

    @classmethod
    def from_dict(cls, content: Any) -> Report:
        """Return the report that ``to_dict`` gave; raises ValueError, in one line, for anything else."""
        if not isinstance(content, dict) or not isinstance(schema := content.get("schema"), int):
            raise ValueError("is no report of an evaluation")
        if schema != SCHEMA:
            age = "an older" if schema < SCHEMA else "a newer"
            raise ValueError(f"has schema {schema}, of {age} version; this one reads schema {SCHEMA}: evaluate again")
        if "runs" in content:
            raise ValueError("lays several runs side by side; name the runs themselves")
        try:
            return TypeAdapter(Report).validate_python(content)
        except ValidationError as problem:
            first = problem.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.html (images inside, no external resources) and grid.png.

    The last two show the same few pairs, those that ``drawn`` gives. Images that are gone leave a gap.
    """
    places = drawn(report.pairs)
    pairs = [report.pairs[place] for place in places]
    content = _json(_plain(report, folder))
    page = render("report.html.j2", report=report, summary=summary(report), pairs=pairs)
    _write(folder / "report.md", markdown(report, pairs))
    _write(folder / "report.html", page)
    _write(folder / "grid.png", encoded(grid(pairs), "PNG", optimize=False))
    _write(folder / "report.json", content)  # last: it says that the others are there


def read_report(folder: Path) -> Report:
    """Read what ``write_report`` wrote; raises RequestError when it is not there or not of this schema."""
    file = folder / "report.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not JSON"
        raise RequestError("RUN", file, f"{reason}; a folder with the report of an evaluation is needed") from None
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


def compare(reports: Mapping[str, Report], folder: Path) -> None:
    """Write report.json, report.md and report.html of several named runs side by side.

    The page shows the images too of what all runs were asked. Raises RequestError when there is no run.
    """
    if not reports:
        raise RequestError("RUN", "", "at least one run is needed")
    names = list(dict.fromkeys(score.metric for report in reports.values() for score in report.scores))
    rows, common = _common(list(reports.values()))
    front = pareto(reports)
    plot = None
    if front is not None:
        told = {p.name: {"forget": p.forget, "retain": p.retain, "best": p.best} for p in front.points}
        plot = {"forget": front.forget, "retain": front.retain, "points": told}
    shown = {name: tuple(row[place] for _, row in rows) for place, name in enumerate(reports)}
    content = {
        "schema": SCHEMA,
        "runs": {name: _plain(replace(report, pairs=shown[name]), folder) for name, report in reports.items()},
        "pareto": plot,
    }
    page = render("compare.html.j2", reports=reports, metrics=names, rows=rows, common=common, front=front)
    _write(folder / "report.md", markdown_of_all(reports, names, front))
    _write(folder / "report.html", page)
    _write(folder / "report.json", _json(content))


def _common(reports: Sequence[Report]) -> tuple[list[tuple[Pair, tuple[Pair, ...]]], int]:
    """Return some of the questions that all runs were asked, and how many there are.

    Of each the question itself, with the base model's image where the runs have one base, and each run's pair.
    """
    asked = [{(pair.prompt, pair.seed): pair for pair in reversed(report.pairs)} for report in reports]
    keys = dict.fromkeys((pair.prompt, pair.seed) for pair in reports[0].pairs)
    rows = [tuple(table[key] for table in asked) for key in keys if all(key in table for table in asked)]
    one_base = all(report.base == reports[0].base for report in reports)
    heads = [
        replace(
            row[0],
            forget=any(pair.forget for pair in row),
            flagged=any(pair.flagged for pair in row),
            base=row[0].base if one_base else None,
        )
        for row in rows
    ]
    places = drawn(heads, min(SHOWN // 2, COMPARED // (3 * (len(reports) + 1))))
    return [(heads[place], rows[place]) for place in places], len(rows)


def drawn(pairs: Sequence[Pair], count: int = SHOWN) -> list[int]:
    """Return the places of the pairs to show: ``count`` of what was erased, then twice as many of all else.

    Drawn at random, but of as many pairs always the same. No picking.
    """
    generator = np.random.default_rng(0)
    forget = np.array([pair.forget for pair in pairs], dtype=bool)
    some = (
        generator.permutation(np.flatnonzero(mask))[:most] for mask, most in ((forget, count), (~forget, 2 * count))
    )
    return [int(place) for places in some for place in sorted(places)]


def _plain(report: Report, folder: Path) -> dict[str, Any]:
    """Return the report as JSON holds it, its images' paths relative to the folder it is written to."""
    plain = report.to_dict()
    for pair in plain["pairs"]:
        for side in ("erased", "base"):
            if pair[side] is not None:
                pair[side] = _away(folder, Path(pair[side]))
    return plain


def _away(folder: Path, file: Path) -> str:
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:  # on Windows there is no way from one drive to another
        return file.resolve().as_posix()


def _back(folder: Path, file: Path) -> Path:
    return Path(os.path.normpath(folder / file))


def _json(content: Any) -> bytes:
    """Return JSON in UTF-8. What is no number in JSON is refused, but for an interval's end at infinity."""
    text = json.dumps(_endless(content), indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode(errors="backslashreplace")  # half a surrogate pair, in a prompt, becomes \\ud800


def _endless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _endless(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_endless(value) for value in content]
    return "Infinity" if content == math.inf else content


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as partial:
        partial.write_bytes(content)
