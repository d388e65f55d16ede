"""Another package adds a file of each kind, and a user a benchmark: all are used from the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

Commands = Callable[[Sequence[Sequence[str]]], list[tuple[int, str, str]]]
FILES = {
    "method": '''
"""A method: shrinks the UNet's last layer."""
from typing import Annotated

import torch

from erase_concept.method import method
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record


@settings
class FadeSettings:
    """The settings of fade."""

    share: Annotated[float, described("Share that is taken away.", source="ours", ge=0, le=1)] = 0.5


@method(
    "fade",
    FadeSettings,
    summary="Shrinks the last layer.",
    title="Fade",
    paper="ours",
    trains="the last layer",
    latents=(),
    tuned_setting="share",
)
def fade(model, data, mask, settings, *, seed, checkpoint=None):
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(1 - settings.share)
    yield Record(1, 1, 0.0, {}, 0.0, 0.0)
''',
    "guard": '''
"""A guard: weakens every prompt."""
from typing import Annotated

from erase_concept.pipelines.guards import GUARDS
from erase_concept.pipelines.guards.guard import Guard
from erase_concept.settings import described, settings


@settings
class HushSettings:
    """The settings of hush."""

    share: Annotated[float, described("Share of the embeddings that stays.", ge=0, le=1)] = 0.0


def encode(model, names, settings, prompts):
    return model.encode_prompts(prompts) * settings.share


GUARDS.add(Guard("hush", "Weakens every prompt.", HushSettings, encode=encode))
''',
    "judge": '''
"""A judge: an image shows a square when it is red enough, and a line when it is not red."""
from typing import Annotated

import numpy as np

from erase_concept.eval.features import read_image
from erase_concept.eval.judges import JUDGES
from erase_concept.eval.judges.judge import Judge, Judgement, LoadedJudge
from erase_concept.settings import described, settings

LABELS = ("square", "line")


@settings
class RednessSettings:
    """The settings of redness."""

    level: Annotated[float, described("Mean red value from which on an image is red.", ge=0, le=1)] = 0.5


def load(chosen, cache):
    def judge(files):
        red = np.array([read_image(file)[..., 0].mean() / 255 for file in files], np.float32)
        return Judgement(LABELS, np.stack([red, 1 - red], 1), ("object",) * 2, threshold=chosen.level)

    return LoadedJudge("redness", LABELS, judge, ("object",) * 2)


JUDGES.add(Judge("redness", "Redness", "Tells whether an image is red.", load, RednessSettings))
''',
    "metric": '''
"""A metric: the share of images that the judge of redness finds red."""
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.accuracy import share
from erase_concept.eval.metrics.metric import Metric, single


def compute(data):
    def of(side):
        shown = side.judgements["redness"].shown("object")
        return share("red_images", data.concept, ["square" in one for one in shown], "red")

    return data.with_baseline(of)


METRICS.add(
    Metric(
        "red_images",
        "Red images",
        "Share of the images that are red.",
        "forget",
        "lower",
        judge="redness",
        prepare=lambda context: single("red_images", compute),
    )
)
''',
    "attack": '''
"""An attack: asks in capital letters."""
from erase_concept.eval.attacks import ATTACKS
from erase_concept.eval.attacks.attack import Attack

ATTACKS.add(Attack("louder", "Louder", "Asks again in capital letters.", lambda *given: None))
''',
    "family": '''
"""A family: Stable Diffusion 1.x whose predictions count half."""
from diffusers import StableDiffusionPipeline

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.families import stable_diffusion as shared
from erase_concept.pipelines.families.family import Family


class HalfPipeline(StableDiffusionPipeline):
    """What such a model is saved as."""


def predict(components, noisy, timesteps, embeddings):
    return shared.predict(components, noisy, timesteps, embeddings) / 2


FAMILIES.add(
    Family(
        name="half",
        title="Half",
        summary="Stable Diffusion 1.x whose predictions count half.",
        pipeline=HalfPipeline,
        components=shared.COMPONENTS,
        matches=lambda configs: True,
        check_fit=shared.check_fit,
        encode=shared.encode,
        uncond=shared.uncond,
        predict=predict,
        noise=shared.NOISE,
        layers=shared.UNET_LAYERS,
        pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    )
)
''',
}
NAMES = {
    "method": "fade",
    "guard": "hush",
    "judge": "redness",
    "metric": "red_images",
    "attack": "louder",
    "family": "half",
}
KINDS = {**{kind: f"{kind}s" for kind in NAMES}, "family": "families"}
BENCHMARK = "prompts: prompts.csv\nmetrics: [ua, red_images]\njudges: [redness]\nsettings: {steps: 2}\nblur: false\n"


def test_every_kind_of_plug_in_is_used_from_the_command(folder: Path, plug_ins: Callable[..., Commands]) -> None:
    points = [f"[erase_concept.{KINDS[kind]}]\ntoy = toy_{kind}\n" for kind in FILES]
    commands = plug_ins({f"toy_{kind}": text for kind, text in FILES.items()}, "\n".join(points))
    index = folder / "model" / "model_index.json"
    (folder / "half").mkdir()
    for part in (folder / "model").iterdir():
        (folder / "half" / part.name).symlink_to(part)
    (folder / "half" / index.name).unlink()
    (folder / "half" / index.name).write_text(index.read_text().replace("StableDiffusionPipeline", "HalfPipeline"))
    (folder / "prompts.csv").write_text("prompt,object,seed\nthe square,square,1\nthe line,line,2\n")
    (folder / "toy.yaml").write_text(BENCHMARK)
    erase = ["erase", "half", "-c", "square.yaml", "--method", "fade", "-s", "share=0.25", "-o", "run"]
    sample = ["sample", "half", "-p", "prompts.csv", "--steps", "2"]
    guard = ["--guard", "hush", "-c", "square.yaml"]
    lists = [["list", KINDS[kind], "--json"] for kind in NAMES]
    results = commands(
        [
            *lists,
            ["list", "methods", "fade"],
            erase,
            ["eval", "run", "-b", "toy.yaml", "-s", "judge.level=0.0", "-o", "out", "--json"],
            ["eval", "run", "-b", "toy.yaml", "-s", "judge.level=2", "-o", "bad"],
            [*sample, "-o", "half-images"],
            ["sample", "model", *sample[2:], "-o", "images"],
            [*sample, *guard, "-s", "guard.share=1", "-o", "unguarded"],
            [*sample, *guard, "-o", "guarded"],
        ]
    )
    for (code, out, err), name in zip(results, NAMES.values(), strict=False):
        assert (code, name in json.loads(out)) == (0, True), err
    shown, erased, judged, refused, *sampled = results[len(lists) :]
    assert (shown[0], "Share that is taken away. (ours)" in " ".join(shown[1].split())) == (0, True), shown
    assert erased[0] == 0, erased[2]
    before, after = (
        load_file(folder / where / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
        for where in ("model", "run/pipeline")
    )
    np.testing.assert_array_equal(after.numpy(), before.numpy() * 0.75)
    assert judged[0] == 0, judged[2]
    scores = {score["metric"]: score for score in json.loads(judged[1])["scores"]}
    assert (scores["ua"]["value"], scores["ua"]["n"]) == (0, 1)  # every image counts as red, so as a square
    assert (scores["red_images"]["value"], scores["red_images"]["baseline"], scores["red_images"]["n"]) == (1, 1, 2)
    assert (refused[0], "--set judge.level=2" in refused[2], (folder / "bad").exists()) == (2, True, False)
    assert [code for code, _, _ in sampled] == [0, 0, 0, 0], sampled
    half, whole, unguarded, guarded = (
        np.stack([np.asarray(Image.open(file)) for file in sorted((folder / name).glob("*.png"))])
        for name in ("half-images", "images", "unguarded", "guarded")
    )
    assert (half != whole).any()  # the family's own prediction
    np.testing.assert_array_equal(half, unguarded)  # this share leaves the prompts as they are
    assert (guarded != half).any()
    assert (guarded[0] != guarded[1]).any()
