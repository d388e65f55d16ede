"""The peak memory of a SalUn step at Stable Diffusion 1.4's size, beside the published flow's and the predicted one.

    python benchmarks/memory.py           some 4 minutes on two cores
    python benchmarks/memory.py --table   what a step takes on a GPU, for the three families, from the predictor alone

256 pixels, one forget and one retain row, fp32 weights, in processes without any allocator settings. Peak memory is
all that the process ever held, libraries included. Prints a JSON list of {name, value, unit, baseline, ratio, bar,
holds}; the baseline of a prediction is what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys

from full_size import configs, measured, row

from erase_concept.dry_run import GIB
from erase_concept.methods.salun import SalUnSettings
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.load import ModelConfigs
from erase_concept.predict import predict_step
from erase_concept.recipe import MEMORY

BARS = {"fast": None, "balanced": 8.0, "low": 6.0}
WITHIN = 0.15


def predicted(family: str, memory: str, *, size: int | None = None, batch: int = 1) -> float:
    """Return the GiB that a step of a preset is predicted to take, without the process's own."""
    settings = SalUnSettings(batch_size=batch, **MEMORY[memory].get("settings", {}))
    return predict_step(ModelConfigs(FAMILIES.find(family), configs(family)), settings, 0.5, size=size).peak / GIB


def table() -> str:
    """Return the predictions for GPUs as a Markdown table."""
    names = {"sd1": ("SD 1.x", 512), "sd2": ("SD 2.x", 768), "sdxl": ("SD XL", 1024)}
    lines = [
        "| model | batch | fast | balanced | low | fits 8 GB | 12 GB | 24 GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, (name, size) in names.items():
        for batch in (1, 2, 4):
            peaks = {memory: predicted(family, memory, size=size, batch=batch) + 0.6 for memory in MEMORY}
            # A card of so many GB has as many GiB, less what the system takes of it.
            fits = [next((m for m, peak in peaks.items() if peak <= card - 0.5), "no") for card in (8, 12, 24)]
            shown = [f"{peak:.1f} GiB" for peak in peaks.values()]
            lines.append(f"| {' | '.join([f'{name}, {size} px', f'{batch} + {batch}', *shown, *fits])} |")
    return "\n".join(lines)


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
        peak, expected = seen["peak"], predicted("sd1", memory, size=256) + seen["before"]
        limits = {"bar": f"<= {bar:g} GiB", "holds": peak <= bar} if bar else {}
        results.append(row(f"peak memory of a step, {memory}", peak, "GiB", published, **limits))
        off = abs(expected / peak - 1) <= WITHIN
        results.append(row(f"predicted peak, {memory}", expected, "GiB", peak, bar="within 15 %", holds=off))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
