"""Write a report as JSON, Markdown, HTML and one grid of images; write several runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from erase_concept.errors import RequestError
from erase_concept.eval.report.html import render
from erase_concept.eval.report.image_grid import encoded, grid
from erase_concept.eval.report.markdown import markdown, markdown_of_all
from erase_concept.eval.report.plots import pareto
from erase_concept.eval.report.report import SCHEMA, SHOWN, Pair, Report, drawn
from erase_concept.eval.report.verdict import headline, summary
from erase_concept.files import atomic_write, relative

COMPARED = 300  # images at most on a page of many runs


def report_json(report: Report) -> dict[str, Any]:
    """Return what report.json holds: the number of the schema, the summary in words, and all fields."""
    found = summary(report)
    words = {"gone": found.gone, "lost": found.lost, "text": headline(report)}
    return {"schema": SCHEMA, "summary": words, **TypeAdapter(Report).dump_python(report, mode="json")}


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.html (images inside, no external resources) and grid.png.

    The last two show the same few pairs, those that ``drawn`` gives. Images that are gone leave a gap.
    """
    places = drawn(report.pairs)
    pairs = [report.pairs[place] for place in places]
    content = _json(report_content(report, folder))
    page = render("report.html.j2", report=report, summary=summary(report), pairs=pairs)
    _write(folder / "report.md", markdown(report, pairs))
    _write(folder / "report.html", page)
    _write(folder / "grid.png", encoded(grid(pairs), "PNG", optimize=False))
    _write(folder / "report.json", content)  # last: it says that the others are there


def write_side_by_side(reports: Mapping[str, Report], folder: Path) -> None:
    """Write report.json, report.md and report.html of several named runs side by side.

    The page also shows images of the prompts that all runs share. Raises RequestError when there is no run.
    """
    if not reports:
        raise RequestError("RUN", "", "at least one run is needed")
    names = list(dict.fromkeys(score.metric for report in reports.values() for score in report.scores))
    rows, common = _common(list(reports.values()))
    front = pareto(reports)
    plot = None
    if front is not None:
        points = {p.name: {"forget": p.forget, "retain": p.retain, "best": p.best} for p in front.points}
        plot = {"forget": front.forget, "retain": front.retain, "points": points}
    shown = {name: tuple(row[place] for _, row in rows) for place, name in enumerate(reports)}
    content = {
        "schema": SCHEMA,
        "runs": {name: report_content(replace(report, pairs=shown[name]), folder) for name, report in reports.items()},
        "pareto": plot,
    }
    page = render("compare.html.j2", reports=reports, metrics=names, rows=rows, common=common, front=front)
    _write(folder / "report.md", markdown_of_all(reports, names, front))
    _write(folder / "report.html", page)
    _write(folder / "report.json", _json(content))


def _common(reports: Sequence[Report]) -> tuple[list[tuple[Pair, tuple[Pair, ...]]], int]:
    """Return some of the prompts and seeds that all runs share, and how many there are.

    For each, a pair with the base model's image, where the runs have one base, and then each run's pair.
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


def report_content(report: Report, folder: Path) -> dict[str, Any]:
    """Return what report.json holds in a folder: ``report_json`` with the images' paths relative to it."""
    plain = report_json(report)
    for pair in plain["pairs"]:
        for side in ("erased", "base"):
            if pair[side] is not None:
                pair[side] = relative(Path(pair[side]), folder)
    return plain


def _json(content: Any) -> bytes:
    """Return JSON in UTF-8. NaN is refused, and so is infinity, except at the end of an interval."""
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
