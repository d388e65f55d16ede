"""The exact mask of a full-size UNet, against the published way of sorting all scores twice.

    python benchmarks/mask.py          859.5 million weights: 4 GB of memory, and a minute on two cores

Both ways rank the same part of the weights in turn, three times, and must agree; ours alone then ranks all of Stable
Diffusion 1.4's UNet. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}; the baseline for all
weights is the part's, scaled up in proportion. Memory is read without the Makefile's allocator settings, which never
give any back.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from full_size import row
from torch import Tensor

from erase_concept.masks import top_k
from erase_concept.pipelines.families import FAMILIES


def scores(millions: float | None = None) -> dict[str, Tensor]:
    """Return random scores in the shapes of Stable Diffusion 1.4's UNet, or of its first so many million weights."""
    config = FAMILIES.find("sd1").single_file.configs({})["unet"]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet2DConditionModel(**config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if millions is not None and sum(s.numel() for s in found.values()) >= millions * 1e6:
            break
        found[name] = torch.rand(shape, generator=generator)
    return found


def by_sorting_twice(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the mask the published way, an argsort of an argsort of all scores, with an int64 for each weight."""
    flat = torch.cat([-score.flatten() for score in found.values()])
    ranks = torch.argsort(torch.argsort(flat))
    chosen = torch.zeros_like(ranks)
    chosen[ranks < len(flat) // 2] = 1
    parts = chosen.split([score.numel() for score in found.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(found.items(), parts, strict=True)}


def resident() -> float:
    """Return the memory that this process holds now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**30


def watched(work: Callable[[], object]) -> tuple[float, float]:
    """Call ``work`` and return its seconds and its peak memory above what was held before, in GiB."""
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return seconds, peak[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=float, default=30, help="million weights that both ways rank")
    args = parser.parse_args()
    part = scores(args.part)
    count = sum(score.numel() for score in part.values())
    ours_mask, theirs_mask = top_k(part, count // 2), by_sorting_twice(part)
    # Where equal scores stand on both sides of the line, sorting leaves open which of them it takes.
    unlike = torch.cat([score[ours_mask.dense(name) != theirs_mask[name].bool()] for name, score in part.items()])
    if len(unlike.unique()) > 1:
        raise SystemExit("the two masks differ in more than the choice among equal scores")
    del ours_mask, theirs_mask
    rounds = [(watched(lambda: top_k(part, count // 2)), watched(lambda: by_sorting_twice(part))) for _ in range(3)]
    ours, theirs = ([median(values) for values in zip(*side, strict=True)] for side in zip(*rounds, strict=True))
    part.clear()
    full = scores()
    total = sum(score.numel() for score in full.values())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mask.safetensors"
        runs = [watched(lambda: top_k(full, total // 2).save(file)) for _ in range(3)]
        size = file.stat().st_size / 1e6
    seconds, memory = (median(values) for values in zip(*runs, strict=True))
    million = 1e6 / count
    name = f"mask of all {total:,} weights"
    results = [
        row("mask, a million weights", ours[0] * million, "s", theirs[0] * million),
        row("mask of a part, memory above the scores", ours[1], "GiB", theirs[1]),
        row(f"{name}, saved", seconds, "s", theirs[0] * total / count, "<= 6 s", holds=seconds <= 6),
        row(
            f"{name}, memory above the scores", memory, "GiB", theirs[1] * total / count, "<= 1 GiB", holds=memory <= 1
        ),
        row(f"{name}, file", size, "MB", total * 8 / 1e6, "<= 108 MB", holds=size <= 108),
    ]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
