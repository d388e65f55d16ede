"""The LoRA of a full-size UNet's change, against exact singular value decompositions.

    python benchmarks/lora.py          859.5 million weights: 9 GB of memory, and three minutes on two cores

Writes the LoRA of rank 16 of a random change of Stable Diffusion 1.5's UNet, in fp16, from beginning to end. Then a
sample of its large layers is decomposed at random and exactly, by the eigenvectors of the smaller Gram matrix in
float64. The former must miss hardly more. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}. The
baseline of the time is that of the exact sample, scaled up in proportion.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from full_size import row
from torch import Tensor

from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.lora import factors, lora_layers, save_lora
from erase_concept.pipelines.model import Diffusion

RANK = 16


def nearest(change: Tensor) -> Tensor:
    """Return the product of a LoRA's two matrices, which are found exactly in float64 and at random in float32."""
    up, down, _ = factors(change, RANK)
    return up @ down


def timed(change: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds that an approximation takes in a dtype, and its relative error."""
    began = time.perf_counter()
    found = nearest(change.to(dtype))
    return time.perf_counter() - began, float((change - found).norm() / change.norm())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=30, help="decompose every so manyth large layer both ways")
    args = parser.parse_args()
    family = FAMILIES.find("sd1")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**family.single_file.configs({})["unet"]).requires_grad_(False)
    erased = copy.deepcopy(unet)
    for p in erased.parameters():
        p.add_(torch.randn_like(p), alpha=1e-3)
    base = Diffusion(family, {"unet": unet, "scheduler": DDIMScheduler()}, source="random")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        options = {"rank": RANK, "style": "kohya", "dtype": torch.float16, "about": {}}
        save_lora(base, erased, Path(folder) / "lora.safetensors", **options)
        whole = time.perf_counter() - began
    after = lora_layers(erased)
    large = {name: before for name, before in lora_layers(unet).items() if min(before.flatten(1).shape) > 256}
    sample = [(after[name] - large[name]).flatten(1) for name in list(large)[:: args.every]]
    fast, slow = ([timed(change, dtype) for change in sample] for dtype in (torch.float32, torch.float64))
    errors = [found / least for (_, found), (_, least) in zip(fast, slow, strict=True)]
    ratio = sum(seconds for seconds, _ in slow) / sum(seconds for seconds, _ in fast)
    name, most = f"LoRA of rank {RANK} of all of SD 1.5's UNet", max(errors)
    results = [
        row(name, whole, "s", whole * ratio, "<= 120 s", holds=whole <= 120),
        row("error of a layer over the least, at most", most, "", 1.0, "<= 1.005", holds=most <= 1.005),
    ]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
