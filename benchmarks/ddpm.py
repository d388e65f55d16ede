"""The tables of docs/ddpm.md: a class forgotten by a class-conditional DDPM, beside Retrain; ten classes, two seeds.

    python benchmarks/ddpm.py                 measures what is not measured yet, in two processes of one thread each
    python benchmarks/ddpm.py --minutes 60    the same, and stops with the trials that are then at work
    python benchmarks/ddpm.py --concepts bag  the same for some classes
    python benchmarks/ddpm.py --tables-only   writes the tables from the results that are there

Every result is a line of docs/ddpm/trials.jsonl as soon as it is measured, so the command can be killed at any time,
and a training goes on where it was. The base model of seed 0 is the built-in one, that of seed 1 is trained here.
Retrain is the training of its seed's base model without the class: the same first weights, noise and time steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from page import fill

from erase_concept.eval.classification.table import read_trials, write_trial
from erase_concept.eval.evaluate import iter_evaluate
from erase_concept.eval.report.report import Report
from erase_concept.eval.request import EvalRequest
from erase_concept.eval.score import wilson
from erase_concept.pipelines.fashion_ddpm import LABELS, MODEL
from erase_concept.pipelines.fashion_ddpm.train import STEPS, read_small, save_model, train_unet
from erase_concept.presets import preset
from erase_concept.prompts.catalog import catalog
from erase_concept.recipe import Recipe, make_recipe
from erase_concept.run import iter_erase
from erase_concept.settings import merge

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "ddpm.md", DOCS / "ddpm" / "trials.jsonl"
BUILTIN = "fashion-ddpm"  # model, benchmark and preset
RETRAIN = "retrain"
METHODS = {RETRAIN: "Retrain", "salun": "SalUn", "random-label": "Random label", "esd-full": "ESD"}
SEEDS = (0, 1)
# CIFAR-10, one class forgotten: UA in per cent and FID of the other nine (arXiv 2310.12508), unconfirmed.
PUBLISHED = {RETRAIN: (100.0, 11.69), "salun": (99.96, 11.25), "esd-full": (100.0, 17.37)}


@dataclass(frozen=True)
class Trial:
    """A method that forgot a class, with a seed, and what its images are: shares, distances, and counts of images.

    ``base_ira`` and ``base_frechet`` are the base model's. ``seconds`` are the processor's for mask and training,
    ``data_seconds`` those in which the method's own rows were sampled. ``key`` tells settings apart.
    """

    concept: str
    method: str
    seed: int
    ua: float
    ua_n: int
    ira: float
    ira_n: int
    frechet: float
    base_ua: float
    base_ira: float
    base_frechet: float
    seconds: float
    data_seconds: float
    key: str


@dataclass(frozen=True)
class Plan:
    """What is measured, and where models and runs are."""

    data: str
    work: Path
    steps: int = STEPS
    settings: tuple[str, ...] = ()

    def base(self, seed: int) -> str:
        """Return the base model of a seed."""
        return BUILTIN if seed == 0 else str(self.work / f"base-{seed}" / MODEL.name)

    def recipe(self, method: str, concept: str, seed: int) -> Recipe:
        """Return the recipe of a method other than Retrain."""
        start = preset("default", BUILTIN, "object", method)
        fields = {"model": self.base(seed), "concept": catalog("fashion-mnist").concepts[concept], "seed": seed}
        return make_recipe(merge(start.parts, {"method": method, **fields}))

    def key(self, method: str, concept: str, seed: int) -> str:
        """Return a hash of all that a trial's result depends on but the code and the weights of its base model."""
        told: dict[str, Any] = {"method": method, "concept": concept, "seed": seed, "steps": self.steps}
        if method != RETRAIN:
            told |= self.recipe(method, concept, seed).to_dict() | {"model": "", "notes": []}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def train(plan: Plan, out: Path, seed: int, without: str = "") -> tuple[Path, float]:
    """Train a base model or Retrain into a folder where it is not there yet; return the model and its seconds.

    Of a training that was killed and goes on, these are estimated from the rest of its steps.
    """
    model, took, checkpoint = out / MODEL.name, out / "seconds", out / "unet.pt"
    if not model.exists():
        done = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0
        began = time.process_time()
        unet = train_unet(read_small(plan.data), out, plan.steps, seed, without)
        seconds = (time.process_time() - began) * plan.steps / max(1, plan.steps - done)
        took.write_text(str(seconds), encoding="utf-8")
        save_model(unet, model)
    return model, float(took.read_text(encoding="utf-8"))


def train_base(plan: Plan, seed: int) -> int:
    """Train the base model of a seed, and return the seed."""
    torch.set_num_threads(1)
    train(plan, plan.work / f"base-{seed}", seed)
    return seed


def measure(plan: Plan, method: str, concept: str, seed: int) -> Trial:
    """Make a model forget a class, and judge it by the benchmark."""
    torch.set_num_threads(1)
    name = f"{method}-{concept}-{seed}"
    if method == RETRAIN:
        model, seconds = train(plan, plan.work / name, seed, concept)
        data_seconds = 0.0
    else:
        model = plan.work / "runs" / name
        shutil.rmtree(model, ignore_errors=True)  # of other settings, or killed
        began = {}
        for event in iter_erase(plan.recipe(method, concept, seed), model):
            if isinstance(event, str):
                began[event] = time.process_time()
        learning = began.get("mask", began["erase"])
        seconds, data_seconds = began["export"] - learning, learning - began["data"]
    report = evaluated(plan, model, concept, seed, plan.work / "evals" / name)
    ua, ira, frechet = (report.score(metric) for metric in ("ua", "ira", "frechet"))
    assert ua is not None
    assert ira is not None
    assert frechet is not None
    shutil.rmtree(plan.work / "runs" / name, ignore_errors=True)
    return Trial(
        concept=concept,
        method=method,
        seed=seed,
        ua=ua.value,
        ua_n=ua.n,
        ira=ira.value,
        ira_n=ira.n,
        frechet=frechet.value,
        base_ua=ua.baseline or 0.0,
        base_ira=ira.baseline or 0.0,
        base_frechet=frechet.baseline or 0.0,
        seconds=round(seconds, 1),
        data_seconds=round(data_seconds, 1),
        key=plan.key(method, concept, seed),
    )


def evaluated(plan: Plan, model: Path, concept: str, seed: int, out: Path) -> Report:
    """Evaluate a model beside the base model of its seed; its images are not kept."""
    request = EvalRequest(
        model,
        out,
        catalog("fashion-mnist").concepts[concept],
        benchmark=BUILTIN,
        baseline=plan.base(seed),
        batch_size=100,
    )
    (report,) = (event for event in iter_evaluate(request) if isinstance(event, Report))
    shutil.rmtree(out / "samples", ignore_errors=True)
    return report


def measure_missing(plan: Plan, asked: Sequence[tuple[str, str, int]], processes: int, minutes: float) -> None:
    """Measure the trials (method, class, seed) that are not in the file yet."""
    end, known = time.monotonic() + 60 * minutes, {trial.key for trial in read_trials(RESULTS, Trial)}
    missing = [one for one in asked if plan.key(*one) not in known]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        bases = {seed for _, _, seed in missing if seed and not Path(plan.base(seed)).exists()}
        for seed in pool.map(train_base, [plan] * len(bases), bases):
            print(f"{time.strftime('%H:%M:%S')} base model of seed {seed}", flush=True)
        running: list[Future[Trial]] = [pool.submit(measure, plan, *one) for one in missing]
        for place, future in enumerate(as_completed(running), 1):
            trial = future.result()
            write_trial(trial, RESULTS)
            print(
                f"{time.strftime('%H:%M:%S')} {place} of {len(running)}: {trial.method}, {trial.concept}, seed "
                f"{trial.seed}: UA {100 * trial.ua:.1f}, others {100 * trial.ira:.1f}, distance {trial.frechet:.3f} "
                f"(base {trial.base_frechet:.3f}), {trial.seconds:.0f} s",
                flush=True,
            )
            if time.monotonic() > end:
                pool.shutdown(cancel_futures=True)
                print("the time is over; the same command goes on from here")
                return


def _share(values: Sequence[tuple[float, int]]) -> str:
    """Return the share over several sets of images, of value and count each, in per cent with its interval."""
    n = sum(count for _, count in values)
    hits = sum(round(value * count) for value, count in values)
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.2f} ({100 * low:.1f} to {100 * high:.1f})"


def summary(trials: Sequence[Trial]) -> Iterator[str]:
    """Yield the lines of the table of methods, over all classes and seeds that have all of them."""
    retrained = {(one.concept, one.seed): one for one in trials if one.method == RETRAIN}
    yield "| method | classes x seeds | UA | lowest UA | others | distance | of Retrain's | largest | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    pairs = {(one.concept, one.seed): one for one in trials}
    base = list(pairs.values())
    yield (
        f"| base model | {len(base)} | {100 * mean(one.base_ua for one in base):.2f} | | "
        f"{100 * mean(one.base_ira for one in base):.2f} | {mean(one.base_frechet for one in base):.3f} | | | |"
    )
    for method, title in METHODS.items():
        own = [one for one in trials if one.method == method and (one.concept, one.seed) in retrained]
        if not own:
            continue
        ratios = [one.frechet / retrained[one.concept, one.seed].frechet for one in own]
        worst, largest = min(own, key=lambda one: one.ua), own[max(range(len(own)), key=ratios.__getitem__)]
        geometric = math.exp(mean(map(math.log, ratios)))
        yield (
            f"| {title} | {len(own)} | {_share([(one.ua, one.ua_n) for one in own])} | "
            f"{100 * worst.ua:.0f} {worst.concept} | {_share([(one.ira, one.ira_n) for one in own])} | "
            f"{mean(one.frechet for one in own):.3f} | {geometric:.2f} | {max(ratios):.2f} {largest.concept} | "
            f"{mean(one.seconds for one in own):.0f} |"
        )


def by_class(trials: Sequence[Trial]) -> Iterator[str]:
    """Yield the lines of the table of classes: UA and the distance of each method, the mean of the seeds."""
    yield "| class | " + " | ".join(f"{title}: UA, distance" for title in METHODS.values()) + " |"
    yield "|---|" + "---|" * len(METHODS)
    for concept in LABELS:
        cells = []
        for method in METHODS:
            own = [one for one in trials if (one.concept, one.method) == (concept, method)]
            text = f"{100 * mean(one.ua for one in own):.1f}, {mean(one.frechet for one in own):.3f}" if own else ""
            cells.append(text)
        if any(cells):
            yield f"| {concept} | " + " | ".join(cells) + " |"


def published(trials: Sequence[Trial]) -> Iterator[str]:
    """Yield the lines of the table that sets ours beside what was published for CIFAR-10."""
    yield "| method | UA, CIFAR-10 | UA, ours | FID, of Retrain's | distance, of Retrain's |"
    yield "|---|---|---|---|---|"
    retrained = {(one.concept, one.seed): one.frechet for one in trials if one.method == RETRAIN}
    for method, (ua, fid) in PUBLISHED.items():
        own = [one for one in trials if one.method == method and (one.concept, one.seed) in retrained]
        if own:
            ratio = math.exp(mean(math.log(one.frechet / retrained[one.concept, one.seed]) for one in own))
            ours = f"{100 * mean(one.ua for one in own):.2f}"
            yield f"| {METHODS[method]} | {ua} | {ours} | {fid / PUBLISHED[RETRAIN][1]:.2f} | {ratio:.2f} |"


def publish(trials: Sequence[Trial]) -> None:
    """Put the tables in their places on the page, between the marks of their names."""
    if not trials:
        return
    tables = {"methods": summary(trials), "classes": by_class(trials), "published": published(trials)}
    for name, lines in tables.items():
        fill(PAGE, name, "\n".join(lines))


def main() -> None:
    """Measure what is missing, and write the page's tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", help="the data set: fashion-mnist, or fashion-mnist:DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/ddpm"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to stop, between two trials")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--concepts", nargs="+", choices=LABELS, default=LABELS, help="the classes to forget")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    args: Any = parser.parse_args()
    plan = Plan(args.data, args.work)
    every = [(method, concept, seed) for seed in SEEDS for concept in LABELS for method in METHODS]
    every.sort(key=lambda one: one[0] not in (RETRAIN, "salun"))  # first what is compared with the published figures
    if not args.tables_only:
        args.work.mkdir(parents=True, exist_ok=True)
        asked = [one for one in every if one[1] in args.concepts]
        measure_missing(plan, asked, args.processes, args.minutes)
    current = {plan.key(*one) for one in every}
    publish([trial for trial in read_trials(RESULTS, Trial) if trial.key in current])


if __name__ == "__main__":
    main()
