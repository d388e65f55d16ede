"""``report``: reports written again, alone or side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erase_concept.cli.options import JsonOption, OutOption, examples
from erase_concept.cli.terminal import print_report, print_text

EXAMPLES = examples(
    "erase-concept report runs/church -o again", "erase-concept report runs/church runs/dog -o side-by-side"
)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that hold a report.json.")],
    out: OutOption,
    json_: JsonOption = False,
) -> None:
    """Write the report of one run again, or put several side by side."""
    from erase_concept.eval.report.report import read_report
    from erase_concept.eval.report.write import write_report, write_side_by_side

    reports = [read_report(folder) for folder in folders]
    if len(reports) == 1:
        write_report(reports[0], out)
        print_report(reports[0], out, json_)
        return
    write_side_by_side({str(folder): r for folder, r in zip(folders, reports, strict=True)}, out)
    if json_:
        print_text((out / "report.json").read_text(encoding="utf-8"))
        return
    typer.echo(f"{len(reports)} reports side by side: {out / 'report.html'}")
