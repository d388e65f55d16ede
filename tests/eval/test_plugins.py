"""Another package adds a judge, a metric and an attack, each as one file, and a user a benchmark, from the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., "subprocess.CompletedProcess[str]"]
JUDGE = """
from typing import Annotated

import numpy as np

from erase_concept.eval.features import read_image
from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.judge import Judge, Judgement, LoadedJudge
from erase_concept.settings import described, settings


@settings
class RednessSettings:
    \"\"\"What counts as red.\"\"\"

    level: Annotated[float, described("Share of the light that is red.", ge=0, le=1)] = 0.5


def load(chosen, cache):
    def judge(files):
        images = [read_image(file).astype(float) for file in files]
        light = [image.sum() for image in images]
        share = [np.nan if not all_ else image[..., 0].sum() / all_ for image, all_ in zip(images, light)]
        return Judgement(("red",), np.array(share, np.float32)[:, None], ("object",), threshold=chosen.level)

    return LoadedJudge("the redness of images", ("red",), judge, ("object",))


JUDGES.add(Judge("redness", "Redness", "Tells whether an image is red.", load, RednessSettings))
"""
METRIC = """
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.accuracy import share
from erase_concept.eval.metrics.metric import Metric, single


def compute(data):
    def of(side):
        shown = side.judgements["redness"].shown("object")
        return share("red_images", data.concept, [None if one is None else "red" in one for one in shown], "red")

    return data.with_baseline(of)


METRICS.add(
    Metric(
        "red_images", "Red images", "Share of the images that are red.", "forget", "lower", judge="redness",
        prepare=lambda context: single("red_images", compute),
    )
)
"""
ATTACK = """
from erase_concept.eval.attacks import ATTACKS
from erase_concept.eval.attacks.attack import Attack

ATTACKS.add(Attack("louder", "Louder", "Asks again in capital letters.", lambda *given: None))
"""
ENTRY_POINTS = """
[erase_concept.judges]
redness = another_judge
[erase_concept.metrics]
red_images = another_metric
[erase_concept.attacks]
louder = another_attack
"""
BENCHMARK = """
prompts: prompts.csv
metrics: [ua, red_images]
judges: [redness]
blur: false
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs the command where the other package is installed."""
    site = tmp_path / "site"
    (site / "another-1.0.dist-info").mkdir(parents=True)
    (site / "another-1.0.dist-info" / "METADATA").write_text("Name: another\nVersion: 1.0\n")
    (site / "another-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    for name, text in (("judge", JUDGE), ("metric", METRIC), ("attack", ATTACK)):
        (site / f"another_{name}.py").write_text(text)
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "erase_concept.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


def test_what_another_package_adds_is_used_from_the_command(run: Run, tmp_path: Path) -> None:
    for what, name in (("judges", "redness"), ("metrics", "red_images"), ("attacks", "louder")):
        listed = run("list", what, "--json")
        assert listed.returncode == 0, listed.stderr
        assert name in json.loads(listed.stdout)
    # Four images that ask for red: one is red, one half red, one green, and one black, which cannot be judged.
    colours = [(200, 0, 0), (100, 60, 40), (0, 200, 0), (0, 0, 0)]
    (tmp_path / "images").mkdir()
    for place, colour in enumerate(colours):
        Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(tmp_path / "images" / f"{place}.png")
    (tmp_path / "prompts.csv").write_text("prompt,object\n" + "a red thing,red\n" * 4)
    (tmp_path / "own.yaml").write_text(BENCHMARK)
    command = ("eval", "images", "-b", "own.yaml", "-c", "red", "--json")
    report = run(*command, "-o", "out")
    assert report.returncode == 0, report.stderr
    scores = {score["metric"]: score for score in json.loads(report.stdout)["scores"]}
    assert (scores["ua"]["value"], scores["ua"]["n"]) == (pytest.approx(1 / 3), 3)
    assert "the redness of images does not see the object red" in scores["ua"]["protocol"]
    assert "1 images not judged" in scores["ua"]["protocol"]
    assert (scores["red_images"]["value"], scores["red_images"]["n"]) == (pytest.approx(2 / 3), 3)
    stricter = run(*command, "-s", "judge.level=0.9", "--fail-if", "red_images<0.5", "-o", "strict")
    assert stricter.returncode == 1
    assert json.loads(stricter.stdout)["scores"][1]["value"] == pytest.approx(1 / 3)
    assert "red_images<0.5: red_images is 0.3333 (n = 3)" in stricter.stderr
    refused = run(*command, "-s", "judge.level=2", "-o", "no")
    assert (refused.returncode, (tmp_path / "no").exists()) == (2, False)
    assert "judge.level" in refused.stderr
