"""The whole way at full size: a random Stable Diffusion 1.4 in as one file, ten SalUn steps, and out in every format.

    python benchmarks/walk.py --work runs/walk     some 15 minutes on two cores, 9 GB of memory, 35 GB of disk

Every step is the ordinary command in a process of its own: erase, export as single file, delta and diffusers folder,
apply and revert the delta. What comes back of each must be the erased UNet, or the base's, by its hash. 512 pixels, one
forget and one retain row, images of noise. Prints a JSON list of {name, value, unit, baseline, ratio, bar, holds}: peak
memory of each command beside the machine's 24 GiB, and seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from full_size import build, configs, row
from PIL import Image

from erase_concept.pipelines import emojinette
from erase_concept.pipelines.families import FAMILIES
from erase_concept.pipelines.formats.single_file import save_single_file
from erase_concept.run_folder import read_run

MACHINE = 24.0
HASH = """
import sys
from erase_concept.pipelines.model import weights_hash
from erase_concept.pipelines.load import load
print(weights_hash(load(sys.argv[1]).unet))
"""


def prepare(work: Path) -> Path:
    """Write the model with a stand-in for CLIP's tokenizer, the images and the concept; return the model's file."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(emojinette.MODEL / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    made, file = configs(), work / "model.safetensors"
    if not file.exists():
        states = {part: build(part, made[part]).state_dict() for part in ("unet", "vae", "text_encoder")}
        save_single_file(states, FAMILIES.find("sd1"), file, {})
    generator = np.random.default_rng(0)
    for folder in ("forget", "retain"):
        (work / folder).mkdir(exist_ok=True)
        for i in range(2):
            Image.fromarray(generator.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(work / folder / f"{i}.png")
    concept = {
        "name": "church",
        "kind": "object",
        "anchor": "house",
        "templates": ["a photo of a {O}"],
        "retain": ["dog"],
    }
    (work / "concept.yaml").write_text(yaml.safe_dump(concept), encoding="utf-8")
    return file


def command(*words: str | Path) -> tuple[float, float, str]:
    """Run a Python command; return its seconds, its peak memory in GiB, and what it printed."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {process.returncode}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # the largest of all children so far
    print(*words, f"{time.perf_counter() - began:.0f} s, {peak:.1f} GiB", file=sys.stderr, flush=True)
    return time.perf_counter() - began, peak, out.strip()


def main() -> None:
    """Walk, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/walk"))
    parser.add_argument("--memory", default="balanced")
    args = parser.parse_args()
    work: Path = args.work
    model, run = prepare(work), work / "run"
    cli = ("-m", "erase_concept")
    settings = ["steps=10", "batch_size=1", "mask.batch_size=1"]
    options = [word for setting in settings for word in ("--set", setting)]
    images = ["--forget-images", work / "forget", "--retain-images", work / "retain"]
    erase = [*cli, "erase", model, "--concept", work / "concept.yaml", "--memory", args.memory, *images, *options]
    seconds, peak, _ = command(*erase, "--out", run)
    results = [row("erase, peak memory", peak, "GiB", MACHINE, "<= 24", holds=peak <= MACHINE)]
    results.append(row("erase, 10 steps and all around them", seconds, "s", seconds))
    account: dict[str, Any] = read_run(run)
    base, erased = account["base"]["unet"], account["erased"]["unet"]
    outs = {"single-file": work / "out.safetensors", "delta": work / "delta.safetensors", "diffusers": work / "folder"}
    for name, out in outs.items():
        seconds, peak, _ = command(*cli, "export", run, "--format", name, "--out", out)
        results.append(row(f"export {name}", seconds, "s", seconds))
    command(*cli, "apply", outs["delta"], model, "--out", work / "applied")
    command(*cli, "apply", outs["delta"], work / "applied", "--revert", "--out", work / "reverted")
    back = {"single-file": outs["single-file"], "diffusers": outs["diffusers"], "applied delta": work / "applied"}
    for name, path in (back | {"reverted delta": work / "reverted"}).items():
        found = command("-c", HASH, path)[2].splitlines()[-1]
        wanted = base if name.startswith("reverted") else erased
        results.append(
            row(f"{name} comes back bit for bit", float(found == wanted), "", 1, "= 1", holds=found == wanted)
        )
    size = outs["delta"].stat().st_size / 2**30
    unet = account["checks"]["weights"] * 4 / 2**30
    results.append(row("delta's size, to the UNet's", size, "GiB", unet, "<= 0.55", holds=size <= 0.55 * unet))
    print(json.dumps(results, indent=1))
    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
