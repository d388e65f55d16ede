"""The tables of docs/comparison.md: methods at tuned settings, the published steps, masks along curves, settings.

    python benchmarks/comparison.py                     measures what this version of the code has not measured yet
    python benchmarks/comparison.py --minutes 100       the same, and stops after the trial that is then at work
    python benchmarks/comparison.py --anew              measures everything again (some seven hours on two cores)
    python benchmarks/comparison.py --tables-only       writes the tables from the results that are there

Every result is a line of docs/comparison/trials.jsonl as soon as it is measured, so the command can be killed at any
time. No table measures what another one has. A table is put in its place on the page when all of its trials are there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from page import fill

from erase_concept.errors import EraseError
from erase_concept.eval.compare.compare import iter_compare, run_comparison
from erase_concept.eval.compare.comparison import CompareRequest, Comparison
from erase_concept.eval.compare.pages import comparison_markdown, write_curves
from erase_concept.eval.compare.sweep import RESULTS, read_results
from erase_concept.eval.compare.trials import PRESETS, Trial, TrialResult
from erase_concept.methods import METHODS
from erase_concept.pipelines.builtin import builtin_models
from erase_concept.pipelines.guards import GUARDS

DOCS = Path(__file__).parents[1] / "docs"
KEPT = DOCS / "comparison" / RESULTS
WORK = Path("runs/comparison")
MODEL = next(iter(builtin_models()))
HELD_OUT = ("church", "dog", "parachute", "guitar", "truck", "flat", "3d")
MORE = ("fish", "radio", "horn", "gas pump", "golf", "flower", "car", "bicycle", "umbrella", "cake", "rocket")
TABLES = {
    "methods": CompareRequest(
        MODEL,
        methods=(*METHODS.all(), *GUARDS.all(), *PRESETS),
        out=WORK,
        concepts=HELD_OUT,
        tune_on=("house", "sketch"),
        tuning_steps=5,
    ),
    # All concepts that the default was not found with.
    "paper": CompareRequest(MODEL, methods=("default", "paper"), out=WORK, concepts=HELD_OUT + MORE),
    "masks": CompareRequest(
        MODEL,
        methods=("salun[lr=2.0e-4]", "esd-x[lr=8.0e-4]", "gradient-ascent[lr=4.0e-5]"),  # as they were tuned
        out=WORK,
        concepts=("church", "dog", "flat"),
        masks=("none", "salient", "random@2", "least-salient@4"),  # the last two forget as much only at greater rates
        multipliers=(0.25, 0.5, 1.0, 2.0, 4.0),
    ),
    # On concepts and seeds that the default was found with.
    "settings": CompareRequest(
        MODEL,
        methods=(
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
        out=WORK,
        concepts=("house", "cat", "sketch", "pixel"),
        seeds=(100, 101),
    ),
}


def main() -> None:
    """Measure what is missing, and write the page's tables where they are complete."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help=", ".join(TABLES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to stop, between two trials")
    parser.add_argument("--anew", action="store_true", help="leave aside what was measured before")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    requests = {name: replace(TABLES[name], out=args.work) for name in args.names or TABLES}
    if args.tables_only:
        results = read_results(KEPT)
        for name, request in requests.items():
            if comparison := recorded(request, results):
                publish(name, comparison)
        return
    end = time.monotonic() + 60 * args.minutes
    measured = args.work / RESULTS
    KEPT.parent.mkdir(exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.anew and KEPT.exists() and not measured.exists():
        shutil.copyfile(KEPT, measured)
    for name, request in requests.items():
        for event in iter_compare(request):
            if isinstance(event, Comparison):
                publish(name, event)
                continue
            shutil.copyfile(measured, KEPT)
            print(f"{time.strftime('%H:%M:%S')} {name}: {event.what} ({event.done} of {event.total})", flush=True)
            if time.monotonic() > end:
                return


def recorded(request: CompareRequest, results: Sequence[TrialResult]) -> Comparison | None:
    """Return the comparison of those methods that there are results of, whichever code measured them; or None.

    Raises EraseError where a result of such a method is missing.
    """
    found = {result.trial: result for result in results}
    there = {(trial.method, trial.concept) for trial in found}
    methods = tuple(name for name in request.methods if (name, request.concepts[0]) in there)
    if not methods:
        return None

    def run(trials: Sequence[Trial]) -> Iterator[TrialResult]:
        for trial in trials:
            if trial not in found:
                raise EraseError(f"{KEPT} has no result of {trial.label}")
            yield found[trial]

    *_, comparison = run_comparison(replace(request, methods=methods), run)
    assert isinstance(comparison, Comparison)
    return comparison


def publish(name: str, comparison: Comparison) -> None:
    """Put a table, and the drawing that belongs to it, in its place on the page, between the marks of its name."""
    _, table = comparison_markdown(comparison).split("\n", 1)  # without its title
    table = table.replace("\n## ", "\n### ").replace("(curves.svg)", f"(comparison/{name}.svg)")
    fill(DOCS / "comparison.md", name, table)
    if comparison.curves:
        write_curves(comparison, DOCS / "comparison" / f"{name}.svg")


if __name__ == "__main__":
    main()
