"""The command from outside: exit codes, one clear line, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from erase_concept.cli import main as cli
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash

CONCEPT = "name: square\nkind: custom\nanchor: circle\ntemplates: ['a {O}']\nretain: [circle, line]\n"
SMALL = ["-s", "steps=2", "-s", "batch_size=2", "-s", "data.forget=2", "-s", "data.retain=2", "-s", "data.steps=2"]


@pytest.fixture
def folder(tiny: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and a concept in it."""
    save_pipeline(tiny, tmp_path / "model")
    (tmp_path / "square.yaml").write_text(CONCEPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Call the command in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["erase-concept", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_from_model_to_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "erase", "model", "-c", "square.yaml", "-o", "run", *SMALL, "--json")
    assert code == 0
    assert json.loads(out)["checks"]["changed_outside_mask"] == 0
    code, out, _ = call(monkeypatch, capsys, "mask-info", "run/mask.safetensors", "run/mask.safetensors", "--json")
    assert code == 0
    assert next(iter(json.loads(out)["masks"].values()))["density"] == pytest.approx(0.5, abs=1e-4)
    code, out, _ = call(monkeypatch, capsys, "mask-info", "run/mask.safetensors")
    assert "cross-attention" in out
    (folder / "p.csv").write_text("prompt,seed\na square,1\na line,2\n")
    code, out, _ = call(monkeypatch, capsys, "sample", "run", "-p", "p.csv", "-o", "images", "--steps", "2")
    assert (code, "2 images in images, 2 of them new" in out) == (0, True)
    code, out, _ = call(monkeypatch, capsys, "export", "run", "-o", "unet.safetensors", "--dtype", "bf16")
    assert code == 0
    assert (folder / "unet.safetensors").stat().st_size > 1000


@pytest.mark.slow
def test_several_processes_tell_once(folder: Path) -> None:
    """They share the sampling; what is for one process alone, or wrong, is refused in one line."""
    (folder / "p.csv").write_text("prompt,seed\na square,1\na line,2\na dot,3\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    sampling = ["sample", "model", "-p", "p.csv", "-o", "images", "--steps", "2", "--batch-size", "1"]
    asked = {
        0: (sampling, "3 images in images, 3 of them new"),
        1: (
            ["erase", "model", "-c", "square.yaml", "-o", "run", *SMALL],
            "processes 2: a run folder is written by one",
        ),
    }
    for code, (arguments, line) in asked.items():
        command = [*launch, "erase_concept.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr  # a launcher's own code is 1, whatever failed
        assert (done.stdout + done.stderr).count(line) == 1, done.stderr
    assert len(list((folder / "images").glob("*.png"))) == 3


def test_a_delta_makes_the_erased_model_and_gives_the_base_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, capsys, "erase", "model", "-c", "square.yaml", "-o", "run", *SMALL)
    assert call(monkeypatch, capsys, "export", "run", "-f", "delta", "-o", "d.safetensors")[0] == 0
    assert call(monkeypatch, capsys, "apply", "d.safetensors", "model", "-o", "erased")[0] == 0
    assert call(monkeypatch, capsys, "apply", "d.safetensors", "erased", "-o", "base", "--revert")[0] == 0
    account = json.loads((folder / "run" / "run.json").read_text())
    for name, side in (("erased", "erased"), ("base", "base")):
        assert weights_hash(load(folder / name).unet) == account[side]["unet"]
    code, _, err = call(monkeypatch, capsys, "apply", "d.safetensors", "erased", "-o", "twice")
    assert (code, "is not the base model" in err) == (2, True)
    assert not (folder / "twice").exists()
    code, out, _ = call(monkeypatch, capsys, "apply", "d.safetensors", "erased", "-o", "twice", "--transfer")
    assert (code, "measure whether" in out) == (0, True)
    half = ["export", "run", "-f", "delta", "--dtype", "fp16", "-o", "half.safetensors"]
    assert call(monkeypatch, capsys, *half)[0] == 0
    assert call(monkeypatch, capsys, "apply", "half.safetensors", "model", "-o", "half")[0] == 0
    erased, half = load(folder / "run", dtype=torch.float16), load(folder / "half", dtype=torch.float16)
    assert weights_hash(half.unet) == weights_hash(erased.unet)


def test_several_concepts_are_named_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "star.yaml").write_text(CONCEPT.replace("square", "star"))
    options = ["-c", "square.yaml", "-c", "star.yaml", "-s", "mask.combine=union", *SMALL]
    code, out, _ = call(monkeypatch, capsys, "erase", "model", *options, "-o", "run")
    assert (code, "square and star erased: " in out) == (0, True)
    account = json.loads((folder / "run" / "run.json").read_text())
    assert f"The mask holds {account['mask']['density']:.1%} of the weights" in out
    assert account["mask"]["density"] > 0.5
    code, _, _ = call(monkeypatch, capsys, "erase", "model", "--recipe", "run/recipe.yaml", "-o", "again")
    assert code == 0
    assert json.loads((folder / "again" / "run.json").read_text())["erased"] == account["erased"]


def test_concepts_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words, prompts and images, all in one run."""
    (folder / "asked.txt").write_text("a dot\ntwo dots\n")
    (folder / "red_star").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(folder / "red_star" / f"{i}.png")
    options = ["-c", "blue disc", "-c", "asked.txt", "-c", "red_star", *SMALL]
    code, out, _ = call(monkeypatch, capsys, "erase", "model", *options, "-o", "run", "--json")
    account = json.loads(out)
    assert (code, account["concept"]) == (0, "blue disc, asked and red star")
    assert [part["anchor"] for part in account["parts"]] == ["", "", ""]
    assert "remapped to the empty prompt" in (folder / "run" / "pipeline" / "README.md").read_text()
    code, _, _ = call(monkeypatch, capsys, "erase", "model", "--recipe", "run/recipe.yaml", "-o", "again")
    assert (code, json.loads((folder / "again" / "run.json").read_text())["erased"]) == (0, account["erased"])
    code, _, err = call(monkeypatch, capsys, "eval", "run", "-o", "out")
    assert (code, "--concept 'blue disc' (custom): the objects and styles of emojinette are: " in err) == (2, True)
    code, _, err = call(monkeypatch, capsys, "eval", "model", "-c", "dog", "-c", "dog", "-o", "out")
    assert (code, "'dog' is named twice" in err) == (2, True)


def test_mask_command_makes_the_runs_mask(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, capsys, "erase", "model", "-c", "square.yaml", "-o", "run", *SMALL)
    data = [s for s in SMALL if s.startswith("data.")]
    options = [part for setting in data for part in ("-s", setting)]
    code, _, _ = call(monkeypatch, capsys, "mask", "model", "-c", "square.yaml", "-o", "m.safetensors", *options)
    assert code == 0
    _, out, _ = call(monkeypatch, capsys, "mask-info", "m.safetensors", "run/mask.safetensors", "--json")
    assert json.loads(out)["overlaps"][0]["jaccard"] == 1


def test_dry_run_prints_the_plan_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    options = ["-c", "square.yaml", "-o", "run", "--dry-run", "--json", "-s", "lr=1e-4", "--sparsity", "0.9"]
    code, out, _ = call(monkeypatch, capsys, "erase", "model", *options)
    plan = json.loads(out)
    assert (code, plan["settings"]["lr"], plan["mask"]["sparsity"]) == (0, 1e-4, 0.9)
    step = plan["expected"]["step"]
    assert step["peak_gib"] == pytest.approx(sum(step["of_which_gib"].values()), abs=0.05)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--scope", "attention"], "--scope attention: allowed: full, cross-attention"),
        (["--scope", "text-encoder"], "--scope text-encoder: goes with concept-ablation and concept-ablation-noise"),
        (["--mask", "absent.safetensors"], "--mask absent.safetensors: not a readable mask"),
    ],
)
def test_what_a_run_refuses_its_dry_run_and_its_mask_refuse_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str], told: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    commands = [["erase", "--dry-run"], ["erase"], *([["mask"]] if wrong[0] == "--scope" else [])]
    for command in commands:
        code, out, err = call(monkeypatch, capsys, *command, "model", "-c", "square.yaml", "-o", "new", *wrong)
        assert (code, out) == (2, "")
        assert told in err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_memory_presets_are_settings_that_others_overrule(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["erase", "model", "-c", "square.yaml", "-o", "run", "--dry-run", "--json", "--memory", "low"]
    plan = json.loads(call(monkeypatch, capsys, *options)[1])
    assert (plan["settings"]["state"], plan["settings"]["recompute"], plan["mask"]["offload"]) == ("8bit", True, True)
    plan = json.loads(call(monkeypatch, capsys, *options, "-s", "state=bf16")[1])
    assert (plan["settings"]["state"], plan["settings"]["recompute"]) == ("bf16", True)


def test_too_little_memory_gets_one_line_and_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture of 2^19 pixels a side: torch's allocator refuses it at once."""
    (folder / "p.csv").write_text("prompt,height,width\na,524288,524288\n")
    code, _, err = call(monkeypatch, capsys, "sample", "model", "-p", "p.csv", "-o", "x", "--steps", "1")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "too little memory" in err


def test_a_recipe_file_is_a_whole_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, capsys, "erase", "model", "-c", "square.yaml", "-o", "a", *SMALL)
    code, _, _ = call(monkeypatch, capsys, "erase", "model", "--recipe", "a/recipe.yaml", "-o", "b")
    assert code == 0
    accounts = [json.loads((folder / name / "run.json").read_text()) for name in "ab"]
    assert accounts[0]["erased"] == accounts[1]["erased"]


WRONG = {
    "unknown concept": (["erase", "model", "-c", "chruch", "-o", "x"], "--concept chruch: unknown concept; did you"),
    "concept twice": (["erase", "model", "-c", "dog", "-c", "dog", "-o", "x"], "--concept dog: 'dog' is named twice"),
    "no concept": (["erase", "model", "-o", "x"], "--concept (not given): needed"),
    "no model": (["erase", "absent", "-c", "square.yaml", "-o", "x"], "MODEL absent: no such model; allowed:"),
    "no pipeline": (["sample", ".", "-p", "emojinette", "-o", "x"], "MODEL .: the folder holds no model_index.json"),
    "bad setting": (["erase", "model", "-c", "square.yaml", "-o", "x", "-s", "lrr=1"], "--set lrr=1: salun has:"),
    "no value": (["erase", "model", "-c", "square.yaml", "-o", "x", "-s", "lr"], "--set lr: must be KEY=VALUE"),
    "bad part": (
        ["erase", "model", "-c", "square.yaml", "-o", "x", "-s", "x.y=1"],
        "--set x.y=1: KEY must be a setting's name or mask.NAME",
    ),
    "bad sparsity": (["erase", "model", "-c", "square.yaml", "-o", "x", "--sparsity", "2"], "--sparsity 2.0:"),
    "bad memory": (["erase", "model", "-c", "square.yaml", "-o", "x", "--memory", "y"], "--memory y: allowed: fast,"),
    "bad preset": (
        ["erase", "model", "-c", "square.yaml", "-o", "x", "--preset", "y"],
        "--preset y: allowed: default, paper",
    ),
    "no images": (["erase", "model", "-c", "square.yaml", "-o", "x", "--forget-images", "no"], "no such folder"),
    "no mask": (["mask-info", "absent.safetensors"], "FILE absent.safetensors: not a readable mask"),
    "bad kind": (["mask", "model", "-c", "square.yaml", "-o", "x", "--mask", "none"], "--mask none: nothing"),
    "old flag": (["mask", "model", "-c", "square.yaml", "-o", "x", "--kind", "y"], "--kind: is now --mask"),
    "no prompts": (["sample", "model", "-p", "absent.csv", "-o", "x"], "--prompts absent.csv: no such file"),
    "empty prompts": (["sample", "model", "-p", "empty.csv", "-o", "x"], "the prompt set is empty"),
    "no report": (["report", "model", "-o", "x"], "model"),
    "not listed": (["list", "colours"], "WHAT colours: allowed: models, concepts"),
    "no such option": (["erase", "model", "--colour"], "--colour"),
    "no such command": (["erace"], "erace"),
    "bad number": (["sample", "model", "-p", "emojinette", "-o", "x", "--steps", "0"], "steps"),
    "no run": (["export", "model", "-o", "x"], "RUN model: holds no complete run"),
    "no delta": (["apply", "absent", "model", "-o", "x"], "DELTA absent: is not a readable delta"),
    "bad benchmark": (["eval", "model", "-b", "y", "-c", "church", "-o", "x"], "--benchmark y: unknown benchmark"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_get_one_line_and_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (folder / "empty.csv").write_text("prompt,seed\n")
    arguments, problem = WRONG[case]
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert problem in err
    assert len(err.strip().splitlines()) == 1
    assert not list(folder.rglob("*.partial*"))
    assert not (folder / "x" / "recipe.yaml").exists()  # the corrected request may use the same folder


def test_a_full_disk_gets_one_line_and_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full refuses every byte, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (folder / "x").mkdir()
    (folder / "x" / "00000.png.partial").symlink_to("/dev/full")
    (folder / "p.csv").write_text("prompt\na\n")
    code, _, err = call(monkeypatch, capsys, "sample", "model", "-p", "p.csv", "-o", "x", "--steps", "1")
    assert (code, "No space left on device" in err, len(err.strip().splitlines())) == (1, True, 1)
    assert not (folder / "x" / "00000.png").exists()


def test_a_gate_ends_with_1_after_the_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "p.csv").write_text("prompt,seed\nthe square,1\ntwo lines,2\n")
    (folder / "own.yaml").write_text("prompts: p.csv\nmetrics: [similarity]\nsettings: {steps: 1}\n")
    asked = ["eval", "model", "-b", "own.yaml", "-c", "square.yaml", "--baseline", "model", "-o", "out"]
    code, _, err = call(monkeypatch, capsys, *asked, "--fail-if", "pixels>1")
    assert (code, "--fail-if 'pixels>1': did you mean pixel_distance?" in err) == (2, True)
    assert not (folder / "out").exists()
    code, _, err = call(monkeypatch, capsys, *asked, "--fail-if", "pixel_distance<1", "--fail-if", "pixel_distance>1")
    assert (code, err.strip()) == (1, "erase-concept: --fail-if pixel_distance<1: pixel_distance is 0 (n = 2)")
    assert (folder / "out" / "report.html").is_file()
    code, out, err = call(monkeypatch, capsys, *asked, "--fail-if", "pixel_distance>1", "--json")
    assert (code, err.strip()) == (0, "")
    assert json.loads(out)["scores"][0]["value"] == 0


@pytest.mark.parametrize("what", ["models", "concepts", "methods", "metrics", "benchmarks", "prompts"])
def test_everything_is_listed(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "list", what, "--json")
    assert code == 0
    assert all(about for about in json.loads(out).values())
    assert call(monkeypatch, capsys, "list", what)[0] == 0


def test_installed_command_answers() -> None:
    command = Path(sys.executable).with_name("erase-concept")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for name in ("demo", "erase", "mask", "mask-info", "sample", "eval", "report", "export", "list"):
        assert name in done.stdout


def test_samples_with_a_guard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "p.csv").write_text("prompt,seed\na square,1\na line,2\n")
    asked = ["sample", "model", "-p", "p.csv", "-o", "images", "--steps", "2"]
    guard = ["--guard", "sld-max", "--concept", "square.yaml"]
    assert call(monkeypatch, capsys, *asked, *guard)[0] == 0
    assert json.loads((folder / "images" / "sampling.json").read_text())["guard"] == "sld-max: square"
    code, _, err = call(monkeypatch, capsys, *asked)
    assert (code, "holds images of another model, prompt set or setting" in err) == (2, True)
    for part in (guard[:2], guard[2:]):
        code, _, err = call(monkeypatch, capsys, *asked, *part)
        assert (code, f"{' '.join(part)}: --guard and --concept go together" in err) == (2, True)
    listed = json.loads(call(monkeypatch, capsys, "list", "guards", "--json")[1])
    assert set(listed) == {"negative-prompt", "sld-weak", "sld-medium", "sld-strong", "sld-max", "safree"}
    assert all("arXiv" in about or name == "negative-prompt" for name, about in listed.items())
