"""A report in Markdown, in which no text from outside can break out of its place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from erase_concept.errors import one_line
from erase_concept.eval.report.plots import Front
from erase_concept.eval.report.report import Bar, Curve, Pair, Report
from erase_concept.eval.report.text import NOTHING, interval_text, percent, retention_text, short, title, value_text
from erase_concept.eval.report.verdict import GONE, LOST, bounds, collateral, ranked, summary
from erase_concept.eval.score import Interval

_BAR = ("base", "erased", "of the base", "n")
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~"} | {"&": "&amp;", "<": "&lt;"})


def markdown(report: Report, pairs: Sequence[Pair]) -> bytes:
    """Return one report, with a line for each of the pairs that its page shows."""
    found = summary(report)
    lost = [(bar.label, chart.title, *_bar(bar, chart.unit)) for chart, bar in collateral(report)]
    parts = [
        f"# {_cell(report.concept)}, erased from {_cell(report.model)}",
        f"**Is it gone? {found.gone}.** {_cell(found.gone_text)}",
        f"**What else was lost? {found.lost}.** {_cell(found.lost_text)}",
        _table(
            ("", "erased", "base", "how certain"),
            [(tile.what, tile.value, tile.base or NOTHING, tile.interval) for tile in found.tiles],
        ),
        *_pairs(report, pairs),
        "## What was lost, worst first",
        _table(("what", "of", *_BAR), lost) if lost else "Nothing that the charts compare with the base model.",
        *(
            f"## {_cell(chart.title)}\n\n"
            + _table(("what", *_BAR), [(bar.label, *_bar(bar, chart.unit)) for bar in ranked(chart)])
            for chart in report.charts
        ),
        *(
            f"## {_cell(curve.title)}\n\n" + _table((curve.x_label, *_BAR[:2]), _curve_rows(curve))
            for curve in report.curves
        ),
        *_scores(report),
        "## Provenance",
        f"Benchmark {_cell(report.benchmark)}{_became(report)}.",
        _fenced({"erased": report.erased, "base": report.base, **report.provenance}),
    ]
    return ("\n\n".join(parts) + "\n").encode(errors="backslashreplace")


def _pairs(report: Report, pairs: Sequence[Pair]) -> list[str]:
    """Return the pairs that the page shows, and what their images were taken for."""
    forget = sum(pair.forget for pair in report.pairs)
    rows = [
        (
            report.concept if pair.forget else "other",
            short(pair.prompt),
            str(pair.seed),
            pair.base_as or NOTHING,
            pair.erased_as or NOTHING,
        )
        for pair in pairs
    ]
    return [
        "## Before and after, equal seeds",
        f"{len(pairs)} of {len(report.pairs)} pairs, drawn at random with a fixed seed, never picked. Of all, "
        f"{forget} asked for it. Flagged ones are blurred.",
        "![Base and erased images of the same prompts and seeds](grid.png)",
        _table(("asked for", "prompt", "seed", "base", "erased"), rows),
    ]


def _scores(report: Report) -> list[str]:
    """Return all scores, how each was obtained, and how the verdict chooses its words."""
    rows = [
        (
            title(score.metric),
            score.target,
            value_text(score.baseline, score.unit),
            value_text(score.value, score.unit),
            interval_text(score.ci95, score.unit),
            retention_text(score),
            str(score.n),
            score.protocol,
        )
        for score in report.scores
    ]
    return [
        "## How it was measured",
        f"“Is it gone?” goes by how many of the images in which the base model shows it still show it: {bounds(GONE)}. "
        f"“What else was lost?” goes by the greatest share that was lost of any of the base model's accuracies: "
        f"{bounds(LOST)}.",
        _table(("score", "of", "base", "erased", "95 % interval", "of the base", "n", "how"), rows),
    ]


def markdown_of_all(reports: Mapping[str, Report], names: Sequence[str], front: Front | None) -> bytes:
    """Return the named metrics of several runs side by side, and the runs of the plot."""
    rows = []
    for number, (name, report) in enumerate(reports.items(), start=1):
        cells = [str(number), name, report.concept]
        for metric in names:
            score = report.score(metric)
            cells.append(
                NOTHING
                if score is None
                else f"{value_text(score.value, score.unit)} (base {value_text(score.baseline, score.unit)})"
            )
        rows.append(cells)
    parts = ["# Runs side by side", _table(("", "run", "erased", *(title(metric) for metric in names)), rows)]
    if front is not None:
        points = [
            (
                str(point.number),
                point.name,
                f"{percent(point.forget)} ({interval_text(point.forget_ci95, 'fraction')})",
                f"{value_text(point.retain, front.unit)} ({interval_text(point.retain_ci95, front.unit)})",
                "yes" if point.best else "no",
            )
            for point in front.points
        ]
        parts += [
            "## Forgetting against retaining",
            _table(("", "run", front.forget, front.retain, "no other run is better"), points),
        ]
        if front.others:
            parts.append(f"Measured differently, and so not here: {_cell(', '.join(front.others))}.")
    return ("\n\n".join(parts) + "\n").encode(errors="backslashreplace")


def _became(report: Report) -> str:
    if not report.anchor:
        return ""
    return f"; the prompts that asked for it now lead to {_cell(report.anchor)}"


def _cell(text: str) -> str:
    """Text that cannot break out of a Markdown table, link or load anything, or smuggle HTML in."""
    joined = one_line(text).translate(_MARKDOWN)
    return re.sub(r"://|www\.|@", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", joined, flags=re.IGNORECASE)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _bar(bar: Bar, unit: str) -> tuple[str, ...]:
    return (
        _with_interval(bar.baseline, bar.baseline_ci95, unit),
        _with_interval(bar.value, bar.ci95, unit),
        NOTHING if bar.forget else retention_text(bar),
        NOTHING if bar.n is None else str(bar.n),
    )


def _curve_rows(curve: Curve) -> list[tuple[str, ...]]:
    none = (None,) * len(curve.x)
    columns = (curve.base or none, curve.base_ci95 or none, curve.erased, curve.erased_ci95 or none)
    return [
        (f"{x:g}", _with_interval(before, before_ci95, curve.unit), _with_interval(value, ci95, curve.unit))
        for x, before, before_ci95, value, ci95 in zip(curve.x, *columns, strict=True)
    ]


def _with_interval(value: float | None, interval: Interval | None, unit: str) -> str:
    return value_text(value, unit) + ("" if interval is None else f" ({interval_text(interval, unit)})")


def _fenced(content: Any) -> str:
    # No line of it can end the fence: JSON has its backticks within quotes.
    return f"```json\n{json.dumps(content, indent=1, ensure_ascii=False)}\n```"
