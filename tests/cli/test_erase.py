"""``erase``: from options to a run folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

Command = Callable[..., tuple[int, str, str]]


def test_from_model_to_export(folder: Path, command: Command, small: Sequence[str]) -> None:
    code, out, _ = command("erase", "model", "-c", "square.yaml", "-o", "run", *small, "--json")
    assert code == 0
    assert json.loads(out)["checks"]["changed_outside_mask"] == 0
    code, out, _ = command("mask-info", "run/mask.safetensors", "run/mask.safetensors", "--json")
    assert code == 0
    assert next(iter(json.loads(out)["masks"].values()))["density"] == pytest.approx(0.5, abs=1e-4)
    code, out, _ = command("mask-info", "run/mask.safetensors")
    assert "cross-attention" in out
    (folder / "p.csv").write_text("prompt,seed\na square,1\na line,2\n")
    code, out, _ = command("sample", "run", "-p", "p.csv", "-o", "images", "--steps", "2")
    assert (code, "2 images in images, 2 of them new" in out) == (0, True)
    code, out, _ = command("export", "run", "-o", "unet.safetensors", "--dtype", "bf16")
    assert code == 0
    assert (folder / "unet.safetensors").stat().st_size > 1000


def test_several_concepts_are_named_one_by_one(folder: Path, command: Command, small: Sequence[str]) -> None:
    (folder / "star.yaml").write_text((folder / "square.yaml").read_text().replace("square", "star"))
    options = ["-c", "square.yaml", "-c", "star.yaml", "-s", "mask.combine=union", *small]
    code, out, _ = command("erase", "model", *options, "-o", "run")
    assert (code, "square and star erased: " in out) == (0, True)
    account = json.loads((folder / "run" / "run.json").read_text())
    assert f"The mask holds {account['mask']['density']:.1%} of the weights" in out
    assert account["mask"]["density"] > 0.5
    code, _, _ = command("erase", "model", "--recipe", "run/recipe.yaml", "-o", "again")
    assert code == 0
    assert json.loads((folder / "again" / "run.json").read_text())["erased"] == account["erased"]


def test_concepts_of_ones_own(folder: Path, command: Command, small: Sequence[str]) -> None:
    """Words, prompts and images, all in one run."""
    (folder / "asked.txt").write_text("a dot\ntwo dots\n")
    (folder / "red_star").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(folder / "red_star" / f"{i}.png")
    options = ["-c", "object:blue disc", "-c", "asked.txt", "-c", "object:red_star", *small]
    code, out, _ = command("erase", "model", *options, "-o", "run", "--json")
    account = json.loads(out)
    assert (code, account["concept"]) == (0, "blue disc, asked and red star")
    assert [part["anchor"] for part in account["parts"]] == ["", "", ""]
    assert "remapped to the empty prompt" in (folder / "run" / "pipeline" / "README.md").read_text()
    code, _, _ = command("erase", "model", "--recipe", "run/recipe.yaml", "-o", "again")
    assert (code, json.loads((folder / "again" / "run.json").read_text())["erased"]) == (0, account["erased"])
    code, _, err = command("eval", "run", "-o", "out")
    assert (code, "--benchmark (not given): none is made for 'blue disc, asked and red star'" in err) == (2, True)
    code, _, err = command("eval", "model", "-c", "church", "-c", "church", "-o", "out")
    assert (code, "'church' is named twice" in err) == (2, True)


def test_dry_run_prints_the_plan_and_writes_nothing(folder: Path, command: Command) -> None:
    before = sorted(path.name for path in folder.iterdir())
    options = ["-c", "square.yaml", "-o", "run", "--dry-run", "--json", "-s", "lr=1e-4", "--sparsity", "0.9"]
    code, out, _ = command("erase", "model", *options)
    plan = json.loads(out)
    assert (code, plan["settings"]["lr"], plan["mask"]["sparsity"]) == (0, 1e-4, 0.9)
    step = plan["expected"]["stages"]["training"]
    assert step["peak_gib"] == pytest.approx(sum(step["of_which_gib"].values()), abs=0.05)
    code, out, _ = command("erase", "model", "-c", "square.yaml", "-o", "run", "--dry-run", "--card", "rtx 3060")
    assert (code, "RTX 3060 (12 GiB; assumed to reach 40%" in out, "needs most memory" in out) == (0, True, True)
    code, _, err = command("erase", "model", "-c", "square.yaml", "-o", "run", "--dry-run", "--card", "RTX 1")
    assert (code, len(err.splitlines()), "--card RTX 1: unknown; allowed: " in err) == (2, 1, True)
    code, _, err = command("erase", "model", "-c", "square.yaml", "-o", "run", "--card", "L4")
    assert (code, "--card L4: goes with --dry-run" in err) == (2, True)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--scope", "convolutions"], "--scope convolutions: allowed: full, cross-attention"),
        (["--scope", "text-encoder"], "--scope text-encoder: goes with concept-ablation and concept-ablation-noise"),
        (["--mask", "absent.safetensors"], "--mask absent.safetensors: not a readable mask"),
    ],
)
def test_what_a_run_refuses_its_dry_run_and_its_mask_refuse_too(
    folder: Path, command: Command, wrong: list[str], told: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    commands = [["erase", "--dry-run"], ["erase"], *([["mask"]] if wrong[0] == "--scope" else [])]
    for start in commands:
        code, out, err = command(*start, "model", "-c", "square.yaml", "-o", "new", *wrong)
        assert (code, out) == (2, "")
        assert told in err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_memory_presets_are_settings_that_others_overrule(folder: Path, command: Command) -> None:
    options = ["erase", "model", "-c", "square.yaml", "-o", "run", "--dry-run", "--json", "--memory", "low"]
    plan = json.loads(command(*options)[1])
    assert (plan["settings"]["state"], plan["settings"]["recompute"], plan["mask"]["offload"]) == ("8bit", True, True)
    plan = json.loads(command(*options, "-s", "state=bf16")[1])
    assert (plan["settings"]["state"], plan["settings"]["recompute"]) == ("bf16", True)


def test_a_recipe_file_is_a_whole_request(folder: Path, command: Command, small: Sequence[str]) -> None:
    command("erase", "model", "-c", "square.yaml", "-o", "a", *small)
    code, _, _ = command("erase", "model", "--recipe", "a/recipe.yaml", "-o", "b")
    assert code == 0
    accounts = [json.loads((folder / name / "run.json").read_text()) for name in "ab"]
    assert accounts[0]["erased"] == accounts[1]["erased"]


def test_flags_change_parts_of_a_concept(folder: Path, command: Command) -> None:
    def plan(*options: str) -> dict:
        return json.loads(command("erase", "model", "-o", "run", "--dry-run", "--json", *options)[1])["concept"]

    changed = plan("-c", "object:blue disc", "--anchor", "ball", "--retain", "dot", "--retain", "line")
    assert (changed["anchor"], changed["retain"]) == ("ball", ["dot", "line"])
    changed = plan("-c", "square.yaml", "--templates", "one {O}", "--templates", "{o}", "--anchor", "")
    assert (changed["templates"], "anchor" in changed) == (["one {O}", "{o}"], False)
    assert plan("-c", "square.yaml")["templates"] == ["a {O}"]
    for wrong, told in (
        (["-c", "square.yaml", "--templates", "a tree"], "--concept square: .*no place for the name"),
        (["-c", "square.yaml", "--retain", "square"], "--concept square: .*be retained"),
        (["-c", "square.yaml", "-c", "object:disc", "--anchor", "x"], "--anchor x: goes with one concept"),
        (["-c", "asked.txt", "--anchor", "x"], "--concept asked: .*with prompts has no anchor"),
    ):
        (folder / "asked.txt").write_text("a dot\n")
        code, _, err = command("erase", "model", "-o", "run", "--dry-run", *wrong)
        assert (code, bool(re.search(told, err))) == (2, True), err
