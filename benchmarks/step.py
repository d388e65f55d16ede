"""The time of a SalUn step at Stable Diffusion 1.4's size, against the published flow and the UNet's bare work.

    python benchmarks/step.py          some 6 minutes and 20 GB of memory on two cores

The three take turns, each time in a new process with the Makefile's allocator settings; 256 pixels, one forget and one
retain row, fp32. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import median

from full_size import measured, row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps in each round, of which the first is not counted")
    args = parser.parse_args()
    runs: dict[str, list[float]] = {"bare": [], "ours": [], "published": []}
    for _ in range(args.rounds):
        for flow, found in runs.items():
            found.extend(measured(flow, fast=True, steps=args.steps)["seconds"])
            print(flow, [round(value, 2) for value in found], file=sys.stderr, flush=True)
    bare, ours, published = (median(seconds) for seconds in runs.values())
    shape = "s, 256 px, batch 1 + 1"
    results = [
        row("SalUn step, to the published flow", ours, shape, published, bar="<= 0.6", holds=ours <= 0.6 * published),
        row("SalUn step, to the bare UNet work in it", ours, shape, bare, bar="<= 1.15", holds=ours <= 1.15 * bare),
    ]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
