"""Write what was measured of an unlearned classifier: as JSON, Markdown and an HTML page of its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from erase_concept.eval.classification.evaluate import ClassifierReport
from erase_concept.eval.report.html import render
from erase_concept.eval.report.text import NOTHING, interval_text, percent, title, value_text
from erase_concept.files import atomic_write


def write_classifier_report(report: ClassifierReport, folder: Path) -> None:
    """Write report.json, report.md and report.html, which loads nothing from anywhere."""
    _write(folder / "report.md", markdown(report).encode())
    _write(folder / "report.html", render("classifier.html.j2", report=report))
    content = json.dumps({"schema": 1, **asdict(report)}, indent=1, ensure_ascii=False)
    _write(folder / "report.json", f"{content}\n".encode())  # last: it says that the others are there


def markdown(report: ClassifierReport) -> str:
    """Return the report as Markdown."""
    gap = "" if report.gap is None else f"\n\n**Average gap to Retrain: {percent(report.gap)}**"
    head = ["score", "Retrain", "unlearned", "95 % interval", "images"]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            title(score.metric),
            NOTHING if score.baseline is None else value_text(score.baseline, score.unit),
            value_text(score.value, score.unit),
            interval_text(score.ci95, score.unit),
            f"{score.n:,}",
        ]
        for score in report.scores
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# `{report.forget}`, unlearned by {report.method}{gap}\n\n{table}\n"


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as partial:
        partial.write_bytes(content)
