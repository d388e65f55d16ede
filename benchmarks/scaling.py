"""How the cost of a mask and of a SalUn step grows with the model: Stable Diffusion 1.4's UNet, made narrower.

    python benchmarks/scaling.py          some 4 minutes on two cores

An eighth, a quarter, half and all of the channels; the step at 256 pixels with one forget and one retain row. Prints a
JSON list of {name, value, unit, baseline, ratio, bar, holds}: seconds at each width, beside the next narrower one's,
and last the exponent of the power law that fits seconds to weights best, beside 1, at which cost is in proportion.
"""

from __future__ import annotations

import json
import math
import sys
import time
from statistics import linear_regression, median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from full_size import configs, measured, row

from erase_concept.masks import top_k

WIDTHS = (0.125, 0.25, 0.5, 1.0)


def mask_seconds(width: float) -> tuple[int, float]:
    """Return the weights of a UNet and the median time of ranking random scores for them all, of three."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs(width=width)["unet"])
    shapes = {name: p.shape for name, p in unet.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    total = sum(score.numel() for score in scores.values())
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        top_k(scores, total // 2)
        seconds.append(time.perf_counter() - began)
    return total, median(seconds)


def main() -> None:
    """Measure and print."""
    costs: dict[str, list[tuple[int, float]]] = {"mask": [], "step": []}
    results: list[dict[str, Any]] = []
    for width in WIDTHS:
        weights, seconds = mask_seconds(width)
        costs["mask"].append((weights, seconds))
        costs["step"].append((weights, median(measured("ours", fast=True, width=width, steps=4)["seconds"])))
        print(width, {name: found[-1] for name, found in costs.items()}, file=sys.stderr, flush=True)
    for name, found in costs.items():
        for i, (weights, seconds) in enumerate(found):
            results.append(row(f"{name}, {weights / 1e6:.1f} million weights", seconds, "s", found[max(i - 1, 0)][1]))
        slope, _ = linear_regression(*zip(*((math.log(w), math.log(s)) for w, s in found), strict=True))
        results.append(row(f"{name}, exponent of seconds in weights", slope, "", 1.0))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
