"""The tables of docs/comparison.md: methods at tuned strengths, the published steps, masks along curves, settings.

    python benchmarks/comparison.py                     goes on with what docs/comparison/ does not hold yet
    python benchmarks/comparison.py --minutes 100       the same, and stops after the cell that is then at work
    python benchmarks/comparison.py --anew              measures everything again (some seven hours on two cores)

Every cell is a line of docs/comparison/cells.jsonl as soon as it is measured, so that it can be killed at any time; no
table measures what another one has. A table is put in its place on the page when all of its cells are there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from erase_concept.eval.compare.compare import compare
from erase_concept.eval.compare.trials import PRESETS
from erase_concept.methods import METHODS
from erase_concept.pipelines.guards import GUARDS

DOCS = Path(__file__).parents[1] / "docs"
HELD_OUT = ("church", "dog", "parachute", "guitar", "truck", "flat", "3d")
MORE = ("fish", "radio", "horn", "gas pump", "golf", "flower", "car", "bicycle", "umbrella", "cake", "rocket")
TABLES: dict[str, dict[str, Any]] = {
    "methods": {
        "entries": [*METHODS.all(), *GUARDS.all(), *PRESETS],
        "concepts": HELD_OUT,
        "seeds": (0, 1),
        "tune_on": ("house", "sketch"),
        "trials": 5,
    },
    "paper": {  # all concepts that the default was not found with
        "entries": ("default", "paper"),
        "concepts": HELD_OUT + MORE,
        "seeds": (0, 1),
    },
    "masks": {
        "entries": ("salun[lr=2.0e-4]", "esd-x[lr=8.0e-4]", "gradient-ascent[lr=4.0e-5]"),  # as they were tuned
        "concepts": ("church", "dog", "flat"),
        "seeds": (0, 1),
        "masks": ("none", "salient", "random@2", "least-salient@4"),  # which forget as much only at greater rates
        "strengths": (0.25, 0.5, 1.0, 2.0, 4.0),
    },
    "settings": {  # on concepts and seeds that the default was found with
        "entries": (
            "default",
            "default[start=base]",
            "default[start=base,steps=100,lr=2.0e-4]",
            "default[steps=60]",
            "default[guidance=0]",
            "default[guidance=0,target=current]",
            "default[retain_target=data]",
            "default[remap=random]",
            "default[remap=empty]",
            "default[mask.accumulate=absolute]",
            "default[mask.scope=cross-attention]",
            "default[mask.sparsity=0.9]",
        ),
        "concepts": ("house", "cat", "sketch", "pixel"),
        "seeds": (100, 101),
    },
}


def main() -> None:
    """Run what is missing, and write the page's tables where they are whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help=", ".join(TABLES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to stop, between two cells")
    parser.add_argument("--anew", action="store_true", help="leave aside what was measured before")
    parser.add_argument("--work", type=Path, default=Path("runs/comparison"))
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    measured, kept = args.work / "cells.jsonl", DOCS / "comparison" / "cells.jsonl"
    kept.parent.mkdir(exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.anew and kept.exists() and not measured.exists():
        shutil.copyfile(kept, measured)
    for name in args.names or TABLES:
        for what, done, total in compare("emojinette", out=args.work, **TABLES[name]):
            shutil.copyfile(measured, kept)
            print(f"{time.strftime('%H:%M:%S')} {name}: {what} ({done} of {total})", flush=True)
            if time.monotonic() > end:
                return
        publish(name, args.work)


def publish(name: str, work: Path) -> None:
    """Put a table, and the drawing that belongs to it, in its place on the page, between the marks of its name."""
    page = DOCS / "comparison.md"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    _, table = (work / "comparison.md").read_text(encoding="utf-8").split("\n", 1)  # without its title
    table = table.replace("\n## ", "\n### ").replace("(curves.svg)", f"(comparison/{name}.svg)")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    if "strengths" in TABLES[name]:
        shutil.copyfile(work / "curves.svg", DOCS / "comparison" / f"{name}.svg")


if __name__ == "__main__":
    main()
