"""All benchmarks, one after the other, into ``results.json``.

    python benchmarks/run.py mask step     these alone; what the file holds of others stays

The file is a list of {name, value, unit, baseline, ratio, bar, holds}. Each benchmark is a script of its own, and tells
there what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from full_size import ALLOCATOR

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
BENCHMARKS = ("mask", "update", "step", "memory", "scaling", "walk", "nudity", "evaluation", "lora")


def main() -> None:
    """Run, write, and fail when a bar does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or BENCHMARKS
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in BENCHMARKS}
    for line in json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else ():
        results[line["name"].partition(": ")[0]].append(line)
    for name in names:
        # The others choose for themselves.
        environment = os.environ | (ALLOCATOR if name == "evaluation" else {})
        command = [sys.executable, str(HERE / f"{name}.py")]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        results[name] = [line | {"name": f"{name}: {line['name']}"} for line in json.loads(done.stdout)]
        lines = [line for found in results.values() for line in found]
        RESULTS.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    missed = [line["name"] for found in results.values() for line in found if not line["holds"]]
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
