"""The tables of docs/classification.md: every method for classifiers, tuned with equal budgets, and its gap to Retrain.

    python benchmarks/classification.py                 measures what is not measured yet, on two processes
    python benchmarks/classification.py --minutes 60    the same, and stops with the trial that is then at work
    python benchmarks/classification.py --smoke         a few epochs of one seed and one kind of forgetting, for a try
    python benchmarks/classification.py --tables-only   writes the tables from the results that are there

Every result is a line of docs/classification/trials.jsonl as soon as it is measured, so the command can be killed at
any time. Each method's tuned setting is first multiplied by five numbers on a pilot seed, for each kind of forgetting,
and then by two more around the best one. Seconds are those of the processor, so that other work does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from page import fill

from erase_concept.classification.methods import UNLEARNERS
from erase_concept.classification.recipe import NOTHING, UnlearnRecipe, unlearn_recipe
from erase_concept.classification.run import UnlearnRun, iter_unlearn
from erase_concept.errors import EraseError
from erase_concept.eval.classification.evaluate import evaluate_classifier
from erase_concept.eval.classification.table import (
    RETRAIN,
    Trial,
    best_multiplier,
    ranking,
    read_trials,
    rows,
    table,
    write_trial,
)

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "classification.md", DOCS / "classification" / "trials.jsonl"
ARCHITECTURE = "resnet18-cifar[width=16,stride=2]"
FORGET = ("random:10%", "random:50%", "class:Sandal")
SEEDS, PILOT = (0, 1, 2), 100
COARSE, FINE = (1.0, 0.01, 0.1, 10.0, 100.0), (0.3, 3.0)  # the fine ones multiply the best coarse one
# SalUn's first table, CIFAR-10 (arXiv 2310.12508): the average gap of each method, in per cent.
PUBLISHED = {
    "random:10%": {
        **{
            "fine-tune": 3.78,
            "random-label": 7.15,
            "gradient-ascent": 4.12,
            "influence": 4.06,
            "boundary-expand": 2.76,
        },
        **{"boundary-shrink": 2.67, "l1-sparse": 2.26, "salun": 1.15, "salun-soft": 2.19},
    },
    "random:50%": {
        **{
            "fine-tune": 6.79,
            "random-label": 6.65,
            "gradient-ascent": 7.15,
            "influence": 5.36,
            "boundary-expand": 3.72,
        },
        **{"boundary-shrink": 8.13, "l1-sparse": 5.72, "salun": 2.65, "salun-soft": 4.30},
    },
    "class:Sandal": {
        **{
            "fine-tune": 19.29,
            "random-label": 3.20,
            "gradient-ascent": 28.87,
            "influence": 3.11,
            "boundary-expand": 7.53,
        },
        **{"boundary-shrink": 7.43, "l1-sparse": 0.56, "salun": 0.56, "salun-soft": 1.29},
    },
}


@dataclass(frozen=True)
class Plan:
    """What is measured: data, architecture, where runs are, and settings that replace those of the preset."""

    data: str
    work: Path
    seeds: tuple[int, ...] = SEEDS
    forget: tuple[str, ...] = FORGET
    epochs: int | None = None  # of every method, for a try
    tune: bool = True

    def recipe(self, method: str, forget: str, seed: int, multiplier: float = 1.0) -> UnlearnRecipe:
        """Return the recipe of a trial, or with ``NOTHING`` that of a seed's original."""
        record = UNLEARNERS.find(method)
        start = ARCHITECTURE if forget == NOTHING else str(self.original(seed))
        data = {"source": self.data, **({"train": 1000, "test": 500} if self.epochs else {})}
        recipe = unlearn_recipe(start, data, forget, method=method, preset="small", seed=seed)
        settings = recipe.settings
        if self.epochs and hasattr(settings, "epochs"):
            settings = replace(settings, epochs=self.epochs)
        value = getattr(settings, record.tuned_setting)
        if multiplier != 1.0:
            settings = replace(settings, **{record.tuned_setting: value * multiplier})
        return replace(recipe, settings=settings)

    def original(self, seed: int) -> Path:
        """Return the folder of a seed's original."""
        return self.work / f"original-{seed}"

    def key(self, recipe: UnlearnRecipe) -> str:
        """Return a hash of all that a trial's result depends on but the code: its recipe and that of its original."""
        told = [recipe.to_dict(), self.recipe(RETRAIN, NOTHING, recipe.seed).to_dict()]
        for one in told:
            one["data"].pop("source", None)
        told[0].pop("classifier")
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def train_original(plan: Plan, seed: int) -> int:
    """Train a seed's original, and return the seed."""
    torch.set_num_threads(1)
    for _ in iter_unlearn(plan.recipe(RETRAIN, NOTHING, seed), plan.original(seed)):
        pass
    return seed


def measure(plan: Plan, method: str, forget: str, seed: int, multiplier: float) -> Trial:
    """Unlearn and measure; one whose loss is not finite has failed."""
    torch.set_num_threads(1)
    recipe = plan.recipe(method, forget, seed, multiplier)
    trial = Trial(forget, method, seed, multiplier, {}, 0.0, plan.key(recipe))
    out, began = plan.work / "trials" / trial.key, {}
    try:
        for event in iter_unlearn(recipe, out):
            if isinstance(event, str):
                began[event] = time.process_time()
        report = evaluate_classifier(UnlearnRun(out))
    except EraseError as problem:
        return replace(trial, failed=str(problem))
    finally:
        if (out / "unlearn.json").exists():
            shutil.rmtree(out)
    return replace(trial, values=report.values, seconds=round(began["save"] - began["mask"], 3))


class Measured:
    """The trials that are measured, in a file, and the processes that measure the others."""

    def __init__(self, plan: Plan, file: Path, end: float, pool: ProcessPoolExecutor) -> None:
        self.plan, self.file, self.end, self.pool = plan, file, end, pool
        self.found = {trial.key: trial for trial in read_trials(file, Trial)}

    def trials(self, asked: Sequence[tuple[str, str, int, float]]) -> list[Trial]:
        """Return the trials of these methods, forgetting, seeds and multipliers, measured where they are not there yet.

        Raises TimeoutError when the time is over.
        """
        keys = [self.plan.key(self.plan.recipe(*one)) for one in asked]
        missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in self.found}
        running = {self.pool.submit(measure, self.plan, *one): one for one in missing.values()}
        for place, future in enumerate(as_completed(running), 1):
            trial = future.result()
            write_trial(trial, self.file)
            self.found[trial.key] = trial
            said = trial.failed or " ".join(f"{name} {100 * value:.1f}" for name, value in trial.values.items())
            print(
                f"{time.strftime('%H:%M:%S')} {place} of {len(running)}: {trial.method}, {trial.forget}, "
                f"seed {trial.seed}, x {trial.multiplier:g}: {said}, {trial.seconds:.1f} s",
                flush=True,
            )
            if time.monotonic() > self.end:
                self.pool.shutdown(cancel_futures=True)
                raise TimeoutError
        return [self.found[key] for key in keys]

    def originals(self, seeds: Sequence[int]) -> None:
        """Train the originals that are not there yet."""
        for seed in self.pool.map(train_original, [self.plan] * len(seeds), seeds):
            print(f"{time.strftime('%H:%M:%S')} original of seed {seed}", flush=True)


def run(plan: Plan, measured: Measured) -> dict[str, list[Trial]]:
    """Tune, then measure all methods with all seeds, and return the trials by what is forgotten."""
    measured.originals((*plan.seeds, *((PILOT,) if plan.tune else ())))
    methods = [name for name in UNLEARNERS.all() if name != RETRAIN]
    best: dict[tuple[str, str], float] = {}
    if plan.tune:
        pairs = [(name, what) for what in plan.forget for name in methods]
        retrained = {one.forget: one for one in measured.trials([(RETRAIN, what, PILOT, 1.0) for what in plan.forget])}
        tried = measured.trials([(*pair, PILOT, times) for pair in pairs for times in COARSE])
        best = best_multipliers(tried, retrained)
        tried += measured.trials([(*pair, PILOT, best[pair] * times) for pair in pairs for times in FINE])
        best = best_multipliers(tried, retrained)
    asked = [
        (name, what, seed, best.get((name, what), 1.0))
        for seed in plan.seeds
        for what in plan.forget
        for name in (RETRAIN, *methods)
    ]
    trials = measured.trials(asked)
    return {what: [trial for trial in trials if trial.forget == what] for what in plan.forget}


def best_multipliers(tried: Sequence[Trial], retrained: Mapping[str, Trial]) -> dict[tuple[str, str], float]:
    """Return the best multiplier by method and what is forgotten; ``retrained`` is Retrain of the same seed."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for trial in tried:
        found.setdefault((trial.method, trial.forget), []).append(trial)
    return {(name, what): best_multiplier(some, retrained[what]) for (name, what), some in found.items()}


def blocks(trials: dict[str, list[Trial]]) -> Iterator[tuple[str, str]]:
    """Yield each kind of forgetting and its tables in Markdown."""
    titles = {name: record.title for name, record in UNLEARNERS.all().items()}
    for what, some in trials.items():
        found = rows(some)
        failed = sorted({f"{titles[one.method]} (seed {one.seed})" for one in some if one.failed})
        text = table(found, titles) + (f"\n\nFailed: {', '.join(failed)}." if failed else "")
        yield what, f"{text}\n\n{ranking(found, PUBLISHED[what], titles)}"


def publish(trials: dict[str, list[Trial]]) -> None:
    """Put the tables in their places on the page, between the marks of their names."""
    for what, text in blocks(trials):
        fill(PAGE, what, text)


def main() -> None:
    """Measure what is missing, and write the page's tables when all is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", help="the data set, as 'unlearn --data' takes it")
    parser.add_argument("--work", type=Path, default=Path("runs/classification"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to stop, between two trials")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one seed, 10 %%, one epoch of 1,000 images, no tuning")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    args: Any = parser.parse_args()
    plan, file = Plan(args.data, args.work), RESULTS
    if args.smoke:
        plan = replace(plan, work=args.work / "smoke", seeds=(0,), forget=FORGET[:1], epochs=1, tune=False)
        file = plan.work / "trials.jsonl"
    if args.tables_only:
        wanted = {(one.forget, one.method, one.seed): one for one in read_trials(file, Trial) if one.seed in plan.seeds}
        publish({what: [one for one in wanted.values() if one.forget == what] for what in plan.forget})
        return
    plan.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            trials = run(plan, Measured(plan, file, end, pool))
        except TimeoutError:
            print("the time is over; the same command goes on from here")
            return
    if args.smoke:
        for what, text in blocks(trials):
            print(f"\n{what}\n\n{text}")
    else:
        publish(trials)


if __name__ == "__main__":
    main()
