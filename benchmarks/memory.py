"""The peak memory of a SalUn step at Stable Diffusion 1.4's size, beside the published flow's and the predicted one.

    python benchmarks/memory.py           some 8 minutes on two cores
    python benchmarks/memory.py --table   what a step takes on a GPU, for the three families, from the predictor alone

One forget and one retain row, in processes without any allocator settings: at 256 pixels, as the published flow, and in
the preset low at 512, as SD XL. Peak memory is all that the process ever held, libraries included. What is predicted
for GPUs has bars, too. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}; the baseline of a
prediction is what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from full_size import configs, measured, row

from erase_concept.dry_run import GIB
from erase_concept.methods.salun import SalUnSettings
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.load import ModelConfigs
from erase_concept.predict import HELD_BY_MALLOC, predict_step
from erase_concept.recipe import MEMORY

BARS = {"fast": None, "balanced": 8.0, "low": 6.0}
WITHIN = 0.15
# Predicted for GPUs at the models' own sizes, with CUDA's own memory: family, preset, GiB at most.
GPU_BARS = (("sd1", "low", 4.5), ("sdxl", "low", 14.0), ("sdxl", "balanced", 21.0))
CUDA = 0.6


def predicted(
    family: str, memory: str, *, size: int | None = None, batch: int = 1, accumulation: int = 1, cpu: bool = False
) -> float:
    """Return the GiB that a step of a preset is predicted to take, without the process's own."""
    settings = SalUnSettings(batch_size=batch, accumulation=accumulation, **MEMORY[memory].get("settings", {}))
    found = predict_step(ModelConfigs(FAMILIES.find(family), configs(family)), settings, 0.5, size=size)
    held = HELD_BY_MALLOC * found.bytes["activations"] if cpu and settings.recompute else 0
    return (found.peak + held) / GIB


def table() -> str:
    """Return the predictions for GPUs as a Markdown table."""
    names = {"sd1": ("SD 1.x", 512), "sd2": ("SD 2.x", 768), "sdxl": ("SD XL", 1024)}
    lines = [
        "| model | batch | fast | balanced | low | fits 8 GB | 12 GB | 24 GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, (name, size) in names.items():
        for batch in (1, 2, 4):
            peaks = {memory: predicted(family, memory, size=size, batch=batch) + CUDA for memory in MEMORY}
            # A card of so many GB has as many GiB, less what the system takes of it.
            fits = [next((m for m, peak in peaks.items() if peak <= card - 0.5), "no") for card in (8, 12, 24)]
            shown = [f"{peak:.1f} GiB" for peak in peaks.values()]
            lines.append(f"| {' | '.join([f'{name}, {size} px', f'{batch} + {batch}', *shown, *fits])} |")
    return "\n".join(lines)


def beside(name: str, family: str, memory: str, size: int, seen: dict[str, float]) -> dict[str, Any]:
    """Return the line of a prediction for the CPU beside what was measured."""
    expected, peak = predicted(family, memory, size=size, cpu=True) + seen["before"], seen["peak"]
    holds = abs(expected / peak - 1) <= WITHIN
    return row(name, expected, "GiB", peak, bar="within 15 %", holds=holds)


def on_gpus() -> list[dict[str, Any]]:
    """Return the lines of what is predicted for GPUs; the baseline is the preset fast."""
    lines = []
    for family, memory, bar in GPU_BARS:
        peak, fast = (predicted(family, one) + CUDA for one in (memory, "fast"))
        name = f"predicted peak on a GPU, {FAMILIES.find(family).title}, {memory}"
        lines.append(row(name, peak, "GiB", fast, bar=f"<= {bar:g} GiB", holds=peak <= bar))
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the predictions for GPUs and stop")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    published = measured("published", fast=False, steps=2)["peak"]
    results = []
    for memory, bar in BARS.items():
        seen = measured("ours", fast=False, memory=memory)
        print(memory, seen, file=sys.stderr, flush=True)
        limits = {"bar": f"<= {bar:g} GiB", "holds": seen["peak"] <= bar} if bar else {}
        results.append(row(f"peak memory of a step, {memory}", seen["peak"], "GiB", published, **limits))
        results.append(beside(f"predicted peak, {memory}", "sd1", memory, 256, seen))
    for family, title in (("sd1", ""), ("sdxl", ", Stable Diffusion XL")):
        seen = measured("ours", fast=False, family=family, memory="low", size=512, steps=1)
        results.append(beside(f"predicted peak, low, 512 pixels{title}", family, "low", 512, seen))
    results += on_gpus()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
