"""``report``: one report written again, and several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., tuple[int, str, str]]


def test_reports_are_written_again_and_side_by_side(folder: Path, command: Command) -> None:
    (folder / "p.csv").write_text("prompt,seed\nthe square,1\ntwo lines,2\n")
    (folder / "own.yaml").write_text("prompts: p.csv\nmetrics: [pixel_distance]\nsettings: {steps: 1}\n")
    asked = ["eval", "model", "-b", "own.yaml", "-c", "square.yaml", "--baseline", "model", "-o", "one", "--json"]
    code, first, _ = command(*asked)
    assert code == 0
    code, again, _ = command("report", "one", "-o", "two", "--json")
    assert (code, json.loads(again)["scores"]) == (0, json.loads(first)["scores"])
    assert (folder / "two" / "report.html").is_file()
    code, shown, _ = command("report", "one", "-o", "three")
    assert (code, "pixel_distance" in shown, "report.html" in shown) == (0, True, True)
    code, shown, _ = command("report", "one", "two", "-o", "both")
    assert (code, "2 reports side by side" in shown, (folder / "both" / "report.html").is_file()) == (0, True, True)
