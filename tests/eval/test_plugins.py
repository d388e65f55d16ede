"""Another package adds a judge, a metric and an attack, each as one file, and a user a benchmark, from the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Commands = Callable[[Sequence[Sequence[str]]], list[tuple[int, str, str]]]
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


def test_what_another_package_adds_is_used_from_the_command(plug_ins: Callable[..., Commands], tmp_path: Path) -> None:
    # Four images that ask for red: one is red, one half red, one green, and one black, which cannot be judged.
    colours = [(200, 0, 0), (100, 60, 40), (0, 200, 0), (0, 0, 0)]
    (tmp_path / "images").mkdir()
    for place, colour in enumerate(colours):
        image = np.full((16, 16, 3), colour, np.uint8)
        image[0, 0, 0] += place == 0  # a folder with nothing but plain colours is refused as a broken model's
        Image.fromarray(image).save(tmp_path / "images" / f"{place}.png")
    (tmp_path / "prompts.csv").write_text("prompt,object\n" + "a red thing,red\n" * 4)
    (tmp_path / "own.yaml").write_text(BENCHMARK)
    command = ("eval", "images", "-b", "own.yaml", "-c", "red", "--json")
    run = plug_ins({"another_judge": JUDGE, "another_metric": METRIC, "another_attack": ATTACK}, ENTRY_POINTS)
    *lists, report, stricter, refused = run(
        [
            *(["list", what, "--json"] for what in ("judges", "metrics", "attacks")),
            [*command, "-o", "out"],
            [*command, "-s", "judge.level=0.9", "--fail-if", "red_images<0.5", "-o", "strict"],
            [*command, "-s", "judge.level=2", "-o", "no"],
        ]
    )
    for (code, out, err), name in zip(lists, ("redness", "red_images", "louder"), strict=True):
        assert code == 0, err
        assert name in json.loads(out)
    assert report[0] == 0, report[2]
    scores = {score["metric"]: score for score in json.loads(report[1])["scores"]}
    assert (scores["ua"]["value"], scores["ua"]["n"]) == (pytest.approx(1 / 3), 3)
    assert "the redness of images does not see the object red" in scores["ua"]["protocol"]
    assert "1 images not judged" in scores["ua"]["protocol"]
    assert (scores["red_images"]["value"], scores["red_images"]["n"]) == (pytest.approx(2 / 3), 3)
    assert stricter[0] == 1
    assert json.loads(stricter[1])["scores"][1]["value"] == pytest.approx(1 / 3)
    assert "red_images<0.5: red_images is 0.3333 (n = 3)" in stricter[2]
    assert (refused[0], (tmp_path / "no").exists()) == (2, False)
    assert "judge.level" in refused[2]
