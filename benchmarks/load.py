"""How time and memory grow with a load far above the ordinary: prompts, images, layers, and processes at once.

    python benchmarks/load.py                      half an hour on one core
    python benchmarks/load.py --smoke              the smallest sizes, a minute at most
    python benchmarks/load.py prompts images       these alone

- prompts: an evaluation of up to 100,000 prompts whose images were judged already, from their file to the report.
  The verdicts are drawn at random and kept by the ordinary writer.
- images: an evaluation of up to 10,000 images made elsewhere, of either model, judged by Emojinette's classifier.
- layers: all that walks over a UNet's layers, on UNets of up to 2,065 of them without weights (meta device).
- processes: up to 50 processes that erase and evaluate at once with one cache folder, beside one that is alone.

Each size is measured in a process of its own, forked when everything is imported. Time is the processor's, since a
machine has other things to do. The exponent is that of the power law that fits seconds to sizes best; memory is the
process's peak above what it had at the start. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import linear_regression
from typing import Any

import psutil
import torch
from full_size import row
from load_layers import layers
from load_processes import processes
from load_reports import images, prompts

EXPONENT = 1.05
Work = Callable[
    [int, Path], Iterator[str]
]  # prepares in a new folder, yields "start", then what it has just done; "" does not count

# What is measured: the work, its sizes, what they count, and the most bytes that one more may take.
LOADS: dict[str, tuple[Work, tuple[int, ...], str, int]] = {
    "prompts": (prompts, (12_500, 25_000, 50_000, 100_000), "prompts", 5_000),
    "images": (images, (1_250, 2_500, 5_000, 10_000), "images", 6_000),
    "layers": (layers, (271, 478, 1_030, 2_065), "layers", 60_000),
}
SMALLEST = 50  # of --smoke


def _measure(work: Work, size: int, folder: Path, answer: Any) -> None:
    """Do the work in this process, and send the seconds of each part of it and the peak of memory in bytes."""
    seconds: dict[str, float] = defaultdict(float)
    for _ in work(SMALLEST, folder / "first"):  # imports what is imported late
        pass
    parts = work(size, folder / "then")
    next(parts)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
    before = psutil.Process().memory_info().rss
    began = time.process_time()
    for name in parts:
        if name:
            seconds[name] += time.process_time() - began
        began = time.process_time()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    answer.send((dict(seconds), 1024 * int(peak.split()[1]) - before))


def measured(work: Work, size: int) -> tuple[dict[str, float], int]:
    """Return what ``_measure`` finds in a forked process."""
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=_measure, args=(work, size, Path(folder), theirs))
        process.start()
        theirs.close()
        try:
            found: tuple[dict[str, float], int] = ours.recv()
        except EOFError:
            raise SystemExit(f"{work.__name__} of {size:,} ended without an answer") from None
        process.join()
    return found


def growth(name: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure a load at each size; return seconds, exponent and memory, and beside them what each part took."""
    work, _, unit, most = LOADS[name]
    found = {}
    for size in sizes:
        found[size] = measured(work, size)
        print(name, size, found[size], file=sys.stderr, flush=True)
    total = {size: sum(seconds.values()) for size, (seconds, _) in found.items()}
    smallest, largest = sizes[0], sizes[-1]
    lines = [row(f"{largest:,} {unit}", total[largest], "s", total[smallest])]
    for part, seconds in found[largest][0].items():
        each = {size: parts[part] for size, (parts, _) in found.items()}
        lines.append(row(f"{largest:,} {unit}, {part}", seconds, "s", total[largest]))
        lines[-1] |= {"exponent": round(_slope(each, math.log), 3)} if each[smallest] > 0.01 else {}
    exponent = _slope(total, math.log)
    bar = {"bar": f"<= {EXPONENT}", "holds": exponent <= EXPONENT}
    lines.append(row(f"{unit}, exponent of seconds", exponent, "", 1.0, **bar))
    peaks = {size: peak for size, (_, peak) in found.items()}
    more = _slope(peaks, float)
    lines.append(row(f"{largest:,} {unit}, peak memory", peaks[largest] / 2**20, "MiB", peaks[smallest] / 2**20))
    bar = {"bar": f"<= {most:,} bytes", "holds": more <= most}
    lines.append(row(f"{unit}, memory of one more", more, "bytes", float(most), **bar))
    return lines


def _slope(found: dict[int, float], scale: Callable[[float], float]) -> float:
    slope, _ = linear_regression(*zip(*((scale(size), scale(value)) for size, value in found.items()), strict=True))
    return slope


def main() -> None:
    """Measure and print, and fail when a bar does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join((*LOADS, "processes")))
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, without bars")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for name in args.names or (*LOADS, "processes"):
        if name == "processes":
            lines += processes(2 if args.smoke else 50)
            continue
        lines += growth(name, (SMALLEST, 2 * SMALLEST) if args.smoke else LOADS[name][1])
    print(json.dumps(lines, indent=1))
    if not args.smoke and not all(line["holds"] for line in lines):
        raise SystemExit("missed: " + "; ".join(line["name"] for line in lines if not line["holds"]))


if __name__ == "__main__":
    main()
