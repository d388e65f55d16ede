"""``sample``: images of a prompt set, with and without a guard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., tuple[int, str, str]]


def test_samples_with_a_guard(folder: Path, command: Command) -> None:
    (folder / "p.csv").write_text("prompt,seed\na square,1\na line,2\n")
    asked = ["sample", "model", "-p", "p.csv", "-o", "images", "--steps", "2"]
    guard = ["--guard", "sld-max", "--concept", "square.yaml"]
    assert command(*asked, *guard)[0] == 0
    assert json.loads((folder / "images" / "sampling.json").read_text())["guard"] == "sld-max: square"
    code, _, err = command(*asked)
    assert (code, "holds images of another model, prompt set or setting" in err) == (2, True)
    for part in (guard[:2], guard[2:]):
        code, _, err = command(*asked, *part)
        assert (code, f"{' '.join(part)}: --guard and --concept go together" in err) == (2, True)
    listed = json.loads(command("list", "guards", "--json")[1])
    levels = {f"sld-{level}" for level in ("weak", "weak-diffusers", "medium", "strong", "max")}
    assert set(listed) == {"negative-prompt", "safree", *levels}
    assert all("arXiv" in about["paper"] or name == "negative-prompt" for name, about in listed.items())


def test_settings_of_a_guard(folder: Path, command: Command) -> None:
    (folder / "p.csv").write_text("prompt,seed\na square,1\n")
    asked = ["sample", "model", "-p", "p.csv", "-o", "images", "--steps", "1"]
    guard = ["--guard", "sld-max", "-c", "square.yaml"]
    for wrong, told in (
        ([*guard, "-s", "guard.scale=-1"], "--set guard.scale=-1: should be greater than or equal to 0"),
        ([*guard, "-s", "guard.scales=1"], "--set guard.scales=1: no such setting"),
        (["-s", "guard.scale=1"], "--set guard.scale=1: goes with --guard"),
        ([*guard, "-s", "scale=1"], "--set scale=1: KEY must be guard.NAME"),
    ):
        code, _, err = command(*asked, *wrong)
        assert (code, told in err) == (2, True), err
        assert not (folder / "images").exists()
    assert command(*asked, *guard, "-s", "guard.scale=100")[0] == 0
    assert "scale=100" in json.loads((folder / "images" / "sampling.json").read_text())["guard"]
