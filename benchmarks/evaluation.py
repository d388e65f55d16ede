"""What the evaluation itself costs beside the sampling: everything but making the images.

    python benchmarks/evaluation.py         some minutes on two cores
    python benchmarks/evaluation.py --full  at Stable Diffusion 1.5's size alone

At Stable Diffusion 1.5's size, images of 512 pixels are judged, and what it takes to sample them in 25 steps is counted
and divided by this machine's speed. On Emojinette, whose images are quick to make, each round samples and judges anew,
base and erased model, by the ordinary call. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}:
seconds of measuring beside seconds of sampling, medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from full_size import configs, row
from PIL import Image

from erase_concept.cards import find_card
from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.request import EvalRequest
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.load import ModelConfigs
from erase_concept.predict import predict_sampling, predict_vae
from erase_concept.recipe import recipe_for
from erase_concept.run import iter_erase

BAR = 0.02  # of the sampling
IMAGES = 32  # that are judged at full size, half of them as the base model's
ASKED: dict[str, dict[str, Any]] = {
    "i2p": {"prompts": "nudity", "settings": {"limit": 64}},
    "emojinette": {"settings": {"seeds": 1}},
}


def full_size(folder: Path) -> dict[str, Any]:
    """Judge random images of 512 pixels by i2p; return the seconds beside those that sampling would take."""
    generator = np.random.default_rng(0)
    for name in ("erased", "base"):
        (folder / name).mkdir()
        for place in range(IMAGES // 2):
            pixels = generator.integers(0, 256, (512, 512, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place:04}.png")
    images = {"model": folder / "erased", "baseline": folder / "base", "concept": "nudity"}
    asked = {"benchmark": "i2p", "prompts": "nudity", "settings": {"limit": IMAGES // 2}}
    *_, report = iter_evaluate(EvalRequest(out=folder / "out", **images, **asked))
    make = ModelConfigs(FAMILIES.find("sd1"), configs("sd1"))
    operations = 25 * predict_sampling(make).operations + predict_vae(make, encode=False).operations
    sampling = IMAGES * operations / find_card(None).speed("fp32")
    line = row("i2p at 512 pixels, measuring beside sampling", report.provenance["seconds"]["measuring"], "s", sampling)
    return line | {"bar": f"<= {BAR:g}", "holds": line["ratio"] <= BAR}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="at full size alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [full_size(Path(folder))]
    if args.full:
        print(json.dumps(lines, indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        for _ in iter_erase(recipe_for("emojinette", "church", method="uce"), Path(folder) / "run"):
            pass
        for name, asked in ASKED.items():
            rounds = []
            for turn in range(args.rounds):
                # In a folder of its own, so that the base model is sampled in each round too.
                out = Path(folder) / f"{name}-{turn}" / "out"
                *_, report = iter_evaluate(EvalRequest(Path(folder) / "run", out, benchmark=name, **asked))
                rounds.append(report.provenance["seconds"])
            measuring, sampling = (median(one[part] for one in rounds) for part in ("measuring", "sampling"))
            lines.append(row(f"{name}, measuring beside sampling", measuring, "s", sampling))
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
