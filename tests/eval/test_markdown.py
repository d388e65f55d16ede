"""The Markdown says what the page says, and its tables hold together."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from erase_concept.eval.report.report import Report
from erase_concept.eval.report.verdict import summary
from erase_concept.eval.report.write import write_report, write_side_by_side


def test_markdown_tables_hold_together(report: Report, tmp_path: Path) -> None:
    write_report(replace(report, model="a|b\nc"), tmp_path)
    write_side_by_side({"a\\|b": report}, tmp_path / "both")
    for folder in (tmp_path, tmp_path / "both"):
        text = (folder / "report.md").read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
            columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table


def test_no_address_in_a_text_becomes_a_link(report: Report, tmp_path: Path) -> None:
    write_report(replace(report, model="https://x.y/z WWW.x.y [a](http://b)"), tmp_path)
    head = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[0]
    assert head.endswith(r"https:/\/x.y/z WWW\.x.y \[a\](http:/\/b)")


def test_markdown_says_what_the_page_says(report: Report, nude: Report, tmp_path: Path) -> None:
    for made in (report, nude):
        write_report(made, tmp_path)
        text = re.sub(r"\\(.)", r"\1", (tmp_path / "report.md").read_text(encoding="utf-8"))
        told = summary(made)
        for part in (told.gone_text, told.lost_text, *(score.protocol for score in made.scores)):
            assert " ".join(part.split()) in text
        for chart in made.charts:
            assert chart.title in text
            assert all(f"| {bar.label} |" in text for bar in chart.bars)
        for curve in made.curves:
            assert curve.x_label in text
            assert all(f"| {x:g} |" in text for x in curve.x)
