"""What the command prints: tables, JSON and reports."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from erase_concept.errors import one_line
from erase_concept.pipelines.processes import main_process
from erase_concept.pipelines.signals import say

if TYPE_CHECKING:
    from erase_concept.classification.recipe import UnlearnRecipe
    from erase_concept.dry_run import Expected
    from erase_concept.eval.report.report import Report
    from erase_concept.recipe import Recipe

_NAME = "bold cyan"


def print_plan(
    recipe: Recipe | UnlearnRecipe, out: Path, expected: Expected, json_: bool, counts: Mapping[str, Any] | None = None
) -> None:
    """Print what a recipe would do, its settings in full, what is counted and the folder, and what it would take.

    It is printed in YAML or JSON.
    """
    plan = recipe.to_dict() | {"settings": asdict(recipe.settings), "out": str(out), **(counts or {})}
    if json_:
        print_json(plan | {"expected": expected.to_dict()})
        return
    print_yaml(plan)
    typer.echo()
    rows = [
        [
            stage.name,
            f"{stage.times:,} {stage.what}",
            f"{stage.peak / 2**30:.1f} GiB",
            f"{stage.largest} {stage.bytes[stage.largest] / 2**30:.1f}",
            _duration(expected.seconds(stage)) if stage.operations else "seconds",
        ]
        for stage in expected.stages
    ]
    card = expected.card
    title = f"expected on {card.name} ({card.memory / 2**30:.0f} GiB; {card.speed_from})"
    print_table(title, ["stage", "of what", "memory", "most of it", "time"], rows)
    if expected.advice:
        typer.echo(expected.advice)


def _duration(seconds: float) -> str:
    """Return a time in the largest unit of which there are two at least."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_report(report: Report, out: Path, json_: bool) -> None:
    """Print the scores of a report, or all of it as it stands in report.json."""
    if json_:
        from erase_concept.eval.report.write import report_json

        print_json(report_json(report))
        return
    rows = [
        [
            score.metric if score.metric != "ua" or score.target == report.concept else f"ua, {score.target}",
            "" if score.baseline is None else f"{score.baseline:.3f}",
            f"{score.value:.3f}",
            f"{score.ci95[0]:.3f} to {score.ci95[1]:.3f}",
            str(score.n),
        ]
        for score in report.scores
    ]
    print_table("scores", ["metric", "base", "erased", "95 % interval", "n"], rows)
    print_text(f"Report: {out / 'report.html'}\n")


def print_dropped(count: int) -> None:
    """Say on standard error how many prompts were dropped, if any."""
    if count:
        from erase_concept.prompts.minors import DROPPED

        print_note(f"dropped {count:,} of the prompts: {DROPPED}")


def print_note(note: str) -> None:
    """Say something on standard error, unless it is empty; of several processes the main one says it."""
    if note and main_process():
        say(one_line(note))


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table; what is in its cells is text, never markup."""
    table = Table(title=Text(one_line(title)), title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(str(cell))) for cell in row))
    Console().print(table)


def print_rows(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print rows of a name and its fields: as a table, or where several fields do not fit, as two lines each.

    Of two lines the second is the field with the longest text.
    """
    console = Console()
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    if len(header) <= 2 or sum(widths) + 3 * (len(header) - 1) <= console.width:
        table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for place, name in enumerate(header):
            table.add_column(name, style="" if place else _NAME, no_wrap=not place)
        for row in rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        console.print(table)
        return
    console.print(Text(title))
    long = widths.index(max(widths[1:]), 1)
    for row in rows:
        fields = ((header[at], text) for at, text in enumerate(row) if at not in (0, long) and text)
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style=_NAME, min_width=widths[0], no_wrap=True)
        facts.add_column(style="dim")
        facts.add_row(Text(row[0]), Text("; ".join(f"{name}: {text}" if name else text for name, text in fields)))
        console.print(facts, Padding(Text(row[long]), (0, 0, 0, 4), expand=False))


def print_fields(title: str, fields: dict[str, str]) -> None:
    """Print a title and what is known of it, a line each."""
    table = Table(title=Text(title, _NAME), title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(Text(name), Text(value))
    Console().print(table)


def print_json(value: Any) -> None:
    """Print a value as JSON, and what JSON does not know as text."""
    print_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def print_yaml(value: Any, **options: Any) -> None:
    """Print a value as YAML."""
    told = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    if _obeyed(told):
        told = yaml.safe_dump(value, sort_keys=False, **options)
    typer.echo(told, nl=False)


def print_text(text: str) -> None:
    """Print a text with its lines; of what a terminal would obey, it has JSON's escapes, so JSON stays the same."""
    escapes = {ord(character): json.dumps(character)[1:-1] for character in _obeyed(text)}
    typer.echo(text.translate(escapes), nl=False)


def _obeyed(text: str) -> set[str]:
    """Return the characters of a text that move the cursor, colour or turn what follows, but for its lines' ends."""
    return {one for one in set(text) if unicodedata.category(one) in ("Cc", "Cf", "Cs") and one not in "\n\t"}
