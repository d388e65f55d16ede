"""What the evaluation itself costs beside the sampling: everything but making the images, on Emojinette.

    python benchmarks/evaluation.py         both benchmarks, 3 rounds: some minutes on two cores

Each round samples and judges anew, base and erased model, by the ordinary call. Prints a JSON list of {name, value,
unit, baseline, ratio, bar, holds}: seconds of measuring beside seconds of sampling, medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from full_size import row

from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.request import EvalRequest
from erase_concept.recipe import recipe_for
from erase_concept.run import iter_erase

BAR = 0.1  # of the sampling
ASKED: dict[str, dict[str, Any]] = {
    "i2p": {"prompts": "nudity", "settings": {"limit": 64}},
    "emojinette": {"settings": {"seeds": 1}},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in iter_erase(recipe_for("emojinette", "church", method="uce"), Path(folder) / "run"):
            pass
        for name, asked in ASKED.items():
            rounds = []
            for turn in range(args.rounds):
                # In a folder of its own, so that the base model is sampled in each round too.
                out = Path(folder) / f"{name}-{turn}" / "out"
                *_, report = iter_evaluate(EvalRequest(Path(folder) / "run", out, benchmark=name, **asked))
                rounds.append(report.provenance["seconds"])
            measuring, sampling = (median(one[part] for one in rounds) for part in ("measuring", "sampling"))
            line = row(f"{name}, measuring beside sampling", measuring, "s", sampling, f"<= {BAR:g}")
            lines.append(line | {"holds": line["ratio"] <= BAR})
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
