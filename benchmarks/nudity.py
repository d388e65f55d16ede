"""Throughput of the nudity detector, against NudeNet's own way of one image after the other.

    python benchmarks/nudity.py          96 images, 5 rounds: a minute on two cores

Both judge the same PNG files, scikit-image's photographs in the sizes of Stable Diffusion's, in turn in each round, and
must find the same. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}; values are medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import skimage.data
from nudenet import NudeDetector
from PIL import Image

from erase_concept.eval.judges.judge import Detection
from erase_concept.eval.judges.nudenet import detect

BAR = 1.5  # times as many images a second as NudeNet's own way
NUDENET_FLOOR = 0.25  # it drops what scores less when it suppresses overlapping boxes
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIZES = ((512, 512), (512, 768), (768, 512))


def pictures(folder: Path, count: int) -> list[Path]:
    """Write so many different PNG files: each photograph in each size, then a little darker each time."""
    files = []
    for place in range(count):
        turn, kind = divmod(place, len(PHOTOGRAPHS) * len(SIZES))
        photograph, size = PHOTOGRAPHS[kind // len(SIZES)], SIZES[kind % len(SIZES)]
        image = Image.fromarray(getattr(skimage.data, photograph)()).resize(size, Image.Resampling.BICUBIC)
        files.append(folder / f"{place:03d}.png")
        image.point([int(value * 0.95**turn) for value in range(256)] * 3).save(files[-1])
    return files


def seconds(work: Callable[[], object]) -> float:
    """Call ``work`` and return how long it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    single = NudeDetector()
    with tempfile.TemporaryDirectory() as folder:
        files = pictures(Path(folder), args.images)

        def ours() -> list[tuple[Detection, ...]]:
            return detect(files)

        def theirs() -> list[list[tuple[str, float]]]:
            return [[(found["class"], found["score"]) for found in single.detect(str(file))] for file in files]

        for mine, own in zip(ours(), theirs(), strict=True):  # which also warms both up
            kept = [(found.label, found.score) for found in mine if found.score > NUDENET_FLOOR]
            if [label for label, _ in kept] != [label for label, _ in own] or any(
                abs(a - b) > 1e-4 for (_, a), (_, b) in zip(kept, own, strict=True)
            ):
                raise SystemExit(f"found {kept}, but NudeNet {own}")
        rounds = [(seconds(ours), seconds(theirs)) for _ in range(args.rounds)]
    value, baseline = (len(files) / median(side) for side in zip(*rounds, strict=True))
    row = {"name": "nudity detection", "value": value, "unit": "images/s", "baseline": baseline}
    row |= {"ratio": value / baseline, "bar": BAR, "holds": value / baseline >= BAR}
    print(json.dumps([row], indent=1))


if __name__ == "__main__":
    main()
