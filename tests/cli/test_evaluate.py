"""``eval``: thresholds and what it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., tuple[int, str, str]]


def test_a_gate_ends_with_1_after_the_report(folder: Path, command: Command) -> None:
    (folder / "p.csv").write_text("prompt,seed\nthe square,1\ntwo lines,2\n")
    (folder / "own.yaml").write_text("prompts: p.csv\nmetrics: [pixel_distance]\nsettings: {steps: 1}\n")
    asked = ["eval", "model", "-b", "own.yaml", "-c", "square.yaml", "--baseline", "model", "-o", "out"]
    code, _, err = command(*asked, "--fail-if", "pixels>1")
    assert (code, "--fail-if 'pixels>1': did you mean pixel_distance?" in err) == (2, True)
    assert not (folder / "out").exists()
    code, _, err = command(*asked, "--fail-if", "pixel_distance<1", "--fail-if", "pixel_distance>1")
    assert (code, err.strip()) == (1, "erase-concept: --fail-if pixel_distance<1: pixel_distance is 0 (n = 2)")
    assert (folder / "out" / "report.html").is_file()
    code, out, err = command(*asked, "--fail-if", "pixel_distance>1", "--json")
    assert (code, err.strip()) == (0, "")
    assert json.loads(out)["scores"][0]["value"] == 0


def test_metrics_and_settings_in_the_place_of_the_benchmarks(folder: Path, command: Command) -> None:
    (folder / "p.csv").write_text("prompt,seed\nthe square,1\ntwo lines,2\n")
    (folder / "own.yaml").write_text("prompts: p.csv\nmetrics: [clip_score]\nsettings: {steps: 1}\n")
    asked = ["eval", "model", "-b", "own.yaml", "-c", "square.yaml", "--baseline", "model", "-o", "out"]
    for wrong, told in (
        (["--metric", "ssimm"], "--metric ssimm: did you mean ssim?"),
        (["-s", "metric.size=1"], "--set metric.size=1"),
        (["-s", "sise=1"], "--set sise=1: KEY must be judge.NAME"),
        (["--judge", "nudenett"], "--judge nudenett: did you mean nudenet?"),
    ):
        code, out, err = command(*asked, *wrong)
        assert (code, out, told in err) == (2, "", True), err
        assert not (folder / "out").exists()
    code, out, err = command(*asked, "--metric", "pixel_distance", "--json")
    assert code == 0, err
    assert {score["metric"]: score["value"] for score in json.loads(out)["scores"]} == {"pixel_distance": 0}


def test_models_that_differ_in_more_than_what_was_erased_are_noted(folder: Path, command: Command) -> None:
    (folder / "p.csv").write_text("prompt,seed\nthe square,1\ntwo lines,2\n")
    (folder / "own.yaml").write_text("prompts: p.csv\nmetrics: [pixel_distance]\nsettings: {steps: 1}\n")
    shutil.copytree("model", "base")
    for file, changed in (
        ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ):
        told = json.loads((folder / "base" / file).read_text())
        (folder / "base" / file).write_text(json.dumps(told | changed))
    asked = ["eval", "model", "-b", "own.yaml", "-c", "square.yaml", "-o", "out", "--baseline"]
    code, out, err = command(*asked, "base", "--json")
    note = "differs from the erased model in more than what was erased: configurations, scheduler"
    assert (code, err.strip()) == (0, f"erase-concept: base: {note}")
    assert json.loads(out)["provenance"]["notes"] == {"base": [note]}
