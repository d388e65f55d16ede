"""What processes send each other in a step of training, with a mask and without: docs/how-to/several-processes.md.

    python benchmarks/wire.py            measures the built-in model, and writes the page's tables
    python benchmarks/wire.py --steps 5  takes more steps

Two processes on this machine train the built-in model. The bytes are those of the kernel's counter of the loopback
device, so nothing else may use it meanwhile. Those of Stable Diffusion are computed: of a sum over n processes by a
ring each one sends 2 (n - 1) / n of the bytes that are summed, and receives as many.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import CUDA, predicted
from page import fill

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "several-processes.md"
FAMILIES_SHOWN = (("SD 1.x", "sd1", 512), ("SD XL", "sdxl", 1024))


def sent() -> int:
    """Return how many bytes the loopback device has sent."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise SystemExit("there is no loopback device in /proc/net/dev")


def train(out: Path, kind: str, steps: int) -> None:
    """Train the built-in model as one of two processes; the first one prints the bytes of a step."""
    from erase_concept.pipelines.processes import processes
    from erase_concept.recipe import recipe_for
    from erase_concept.run import iter_erase
    from erase_concept.training.loop import Record

    settings = {"steps": steps + 1, "batch_size": 1, "accumulation": 2, "probe_every": 0, "checkpoint_every": 1000}
    data = {"forget": 4, "retain": 4, "anchor": 0, "steps": 2}
    recipe = recipe_for("emojinette", "church", method="salun", settings=settings, data=data, mask={"kind": kind})
    before = after = 0
    for event in iter_erase(recipe, out):
        if isinstance(event, Record):
            processes().wait_for_everyone()
            before, after = (sent(), 0) if event.step == 1 else (before, sent())
    if processes().is_main_process:
        print(json.dumps((after - before) / steps))


def measured(kind: str, steps: int) -> float:
    """Return the bytes that two processes send each other in a step, both directions together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank", folder, "--kind", kind, "--steps", str(steps)]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **there, "RANK": str(rank), "LOCAL_RANK": str(rank), **quiet},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a process failed")
    return float(said[0].splitlines()[-1])


def weights(family: str) -> int:
    """Return how many weights a family's UNet has."""
    import torch
    from diffusers import UNet2DConditionModel

    from erase_concept.pipelines.families import FAMILIES

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(FAMILIES.find(family).single_file.configs({})["unet"])
    return sum(p.numel() for p in unet.parameters())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def computed() -> str:
    """Return what each process of a ring sends, in GB: for a round of the mask's batches, and for a step."""
    rows = []
    for title, family, _ in FAMILIES_SHOWN:
        size = 4 * weights(family) / 1e9
        for count in (8, 64):
            share = (count - 1) / count
            rows.append([title, str(count), *(f"{times * share * size:.2f}" for times in (1, 2, 1))])
    return table(["UNet", "processes", "mask, GB", "step, all weights, GB", "step, salient half, GB"], rows)


def in_memory() -> str:
    """Return what a step is predicted to take in each process, which holds all gradients."""
    rows = []
    for title, family, size in FAMILIES_SHOWN:
        peaks = (predicted(family, memory, size=size, accumulation=8) + CUDA for memory in ("fast", "balanced", "low"))
        rows.append([f"{title}, {size} px", *(f"{peak:.1f} GiB" for peak in peaks)])
    return table(["model", "fast", "balanced", "low"], rows)


def main() -> None:
    """Measure, compute, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kind", default="salient", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        train(args.rank, args.kind, args.steps)
        return
    dense, half = (measured(kind, args.steps) for kind in ("none", "salient"))
    both = (("all weights", dense), ("the salient half", half))
    found = [[title, f"{size / 1e6:.1f}", f"{size / dense:.3f}"] for title, size in both]
    tables = {
        "measured": table(["what is trained", "MB a step", "of all weights'"], found),
        "computed": computed(),
        "memory": in_memory(),
    }
    for name, text in tables.items():
        print(text)
        fill(PAGE, name, text)


if __name__ == "__main__":
    main()
