"""``train``, ``unlearn`` and ``eval-classifier``."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Command = Callable[..., tuple[int, str, str]]
SMALL = ("--preset", "small", "-s", "epochs=1", "-s", "batch_size=50")


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A data set of 200 and 100 images of noise, in ten classes."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 100)):
        pixels, labels = generator.integers(0, 256, (count, 8, 8)), np.arange(count) % 10
        for name, array in ((f"{part}-images-idx3", pixels), (f"{part}-labels-idx1", labels)):
            with gzip.open(tmp_path / "images" / f"{name}-ubyte.gz", "wb") as stream:
                sizes = np.array(array.shape, ">i4").tobytes()
                stream.write(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())
    return f"fashion-mnist:{tmp_path / 'images'}"


def test_from_training_to_the_report(command: Command, images: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    few = ("-s", "data.train=90", "-s", "data.test=50")
    architecture = "resnet18-cifar[width=2,stride=2]"
    code, out, _ = command("train", architecture, "--data", images, *SMALL, *few, "-o", str(runs / "original"))
    assert code == 0, out
    assert "trained on 90 images" in out
    asked = ("unlearn", str(runs / "original"), "--data", images, "--forget", "random:20%", *SMALL)
    code, out, _ = command(*asked, "--sparsity", "0.8", "-o", str(runs / "salun"), "--json")
    info = json.loads(out)
    assert (code, info["images"], info["mask"]["kind"]) == (0, {"forget": 18, "retain": 72}, "salient")
    assert info["mask"]["density"] == pytest.approx(0.2, abs=1e-3)
    lines = (runs / "salun" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    code, out, _ = command(*asked, "--sparsity", "0.8", "-o", str(runs / "plan"), "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["images"]) == (0, info["images"])
    assert plan["weights"] == {"all": info["checks"]["weights"], "may_change": round(0.2 * info["checks"]["weights"])}
    assert plan["expected"]["stages"]["unlearn"]["times"] == len(lines)
    code, out, _ = command(*asked, "-o", str(runs / "plan"), "--dry-run", "--card", "RTX 4090")
    assert code == 0
    assert "expected on RTX 4090" in out
    assert not (runs / "plan").exists()
    again = ("unlearn", str(runs / "original"), "--recipe", str(runs / "salun" / "recipe.yaml"))
    code, out, _ = command(*again, "-o", str(runs / "salun"), "--json")  # is complete already
    assert (code, json.loads(out)["recipe"]) == (0, info["recipe"])
    code, out, _ = command(*again, "--seed", "3", "-o", str(runs / "plan"), "--dry-run")
    assert code == 0
    assert "seed: 3" in out
    code, out, _ = command(*asked, "-m", "retrain", "-o", str(runs / "retrain"))
    assert code == 0
    assert "18 of 90 training images forgotten" in out
    code, _, err = command(*asked, "-m", "retrain", "--seed", "1", "-o", str(runs / "retrain"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "holds a run with another recipe" in err
    code, _, err = command("eval-classifier", str(runs / "original"), "-o", str(runs / "report"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "has forgotten nothing" in err
    pytest.importorskip("sklearn")
    measured = ("eval-classifier", str(runs / "salun"), "--retrain", str(runs / "retrain"), "-o", str(runs / "report"))
    code, out, _ = command(*measured)
    assert code == 0
    assert "Average gap to Retrain" in out
    assert (runs / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--forget", "random:1x"), "--forget random:1x: allowed: random:10%"),
        (("--forget", "random:10%", "-m", "salum"), "--method salum: did you mean salun?"),
        (("--forget", "random:10%", "-s", "lr=fast"), "--set lr=fast: should be a valid number"),
        (("--forget", "random:10%", "-s", "data.train=7000"), "--set data.train=7000: fashion-mnist has 20 of"),
        (("--forget", "random:10%", "--preset", "best"), "--preset best: allowed: default, paper, small"),
        (("--forget", "random:10%", "--mask", "half"), "--mask half: not a readable mask"),
        (("--forget", "random:10%"), "CLASSIFIER nowhere: is no folder of a classifier"),
        (("--forget", "random:10%", "--card", "RTX 4090"), "--card RTX 4090: goes with --dry-run"),
        (("--forget", "random:10%", "--recipe", "no.yaml"), "--recipe no.yaml: not readable"),
        ((), "--forget (not given): needed, here or in the recipe"),
        (("--recipe", "{0}"), "--method 5: allowed: bad-teacher"),
    ],
)
def test_bad_input_is_one_line(
    options: tuple[str, ...], line: str, command: Command, images: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("forget: random:10%\nmethod: 5\n", encoding="utf-8")
    given = (option.format(file) for option in options)
    code, out, err = command("unlearn", "nowhere", "--data", images, *given, "-o", str(tmp_path / "run"))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert line in err
    assert not (tmp_path / "run").exists()
