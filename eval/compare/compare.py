"""Compare methods and masks on one base model: tune each with equally many trials, run all trials, write the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from erase_concept.errors import RequestError
from erase_concept.eval.compare.comparison import CompareRequest, Comparison, Variant, variant_name
from erase_concept.eval.compare.keys import base_weights, code_version
from erase_concept.eval.compare.pages import write_pages
from erase_concept.eval.compare.sweep import processes_for_trials, run_trials
from erase_concept.eval.compare.trials import (
    PRESETS,
    Trial,
    TrialContext,
    is_guard,
    plan_of,
    recipe_of,
    split_mask,
    split_settings,
)
from erase_concept.eval.compare.tuning import Run, TuningStep, tune


@dataclass(frozen=True)
class CompareProgress:
    """How far a comparison is: what was done last, and how many of how many trials (or tuned methods) are done."""

    what: str
    done: int
    total: int


def compare(request: CompareRequest) -> Comparison:
    """Compare methods as ``iter_compare`` does, with a progress bar, and return the comparison."""
    from erase_concept.pipelines.progress import bar

    with bar() as shown:
        task = shown.add_task("compare", total=None)
        for event in iter_compare(request):
            if isinstance(event, Comparison):
                return event
            shown.update(task, description=event.what, completed=event.done, total=event.total)
    raise AssertionError("a comparison ends with its results")


def iter_compare(request: CompareRequest) -> Iterator[CompareProgress | Comparison]:
    """Run all trials, write ``comparison.md``, ``comparison.json`` and pictures, and yield progress, last the result.

    With one multiplier the pictures are a page, ``report.html``, and sheets of images; with several, ``curves.svg``.
    Killed at any time, it goes on with the first trial that is not in
    ``trials.jsonl``. Raises RequestError, before anything is measured, when a method, a concept or a mask is unknown or
    the benchmark does not measure both what is forgotten and what is retained.
    """
    request = check_request(request)
    with processes_for_trials() as processes:  # this process never holds the model
        weights = processes.submit(base_weights, request.model, request.ema).result()
    context = TrialContext(request.model, weights, code_version(), request.benchmark, request.out, request.ema)
    for event in run_comparison(request, partial(run_trials, context)):
        if isinstance(event, Comparison):
            write_pages(event, request.out)
        yield event


def run_comparison(request: CompareRequest, run: Run) -> Iterator[CompareProgress | Comparison]:
    """Tune the methods, take the result of every trial from ``run``, and yield progress, last the comparison."""
    factors = dict(split_mask(mask) for mask in request.masks)
    variants: list[Variant] = list(
        dict.fromkeys((method, None if is_guard(method) else mask) for method in request.methods for mask in factors)
    )
    tuned = [variant for variant in variants if request.tune_on and _can_be_tuned(variant[0])]
    check = partial(recipe_of, request.model)
    best: dict[Variant, float] = {}
    tuning: dict[str, tuple[TuningStep, ...]] = {}
    for place, (method, mask) in enumerate(tuned):
        search = tune(method, mask, request.tune_on, request.tuning_steps, run=run, check=check)
        while True:
            try:
                next(search)
            except StopIteration as end:
                tuning[variant_name(method, mask)] = end.value
                break
            yield CompareProgress(f"tuning {variant_name(method, mask)}", place, len(tuned))
        best[method, mask] = tuning[variant_name(method, mask)][0].multiplier
    trials = [
        Trial(method, concept, seed, mask, best.get((method, mask), 1.0) * factors.get(mask, 1.0) * multiplier)
        for seed in request.seeds
        for concept in request.concepts
        for method, mask in variants
        for multiplier in ((1.0,) if is_guard(method) else request.multipliers)
    ]
    results = []
    for result in run(trials):
        results.append(result)
        yield CompareProgress(result.trial.label, len(results), len(trials))
    yield Comparison(request.model, request.benchmark, request.concepts, tuple(results), tuning)


def _can_be_tuned(method: str) -> bool:
    return not is_guard(method) and split_settings(method)[0] not in PRESETS


def check_request(request: CompareRequest) -> CompareRequest:
    """Return the request with what it leaves to the built-in model; raises RequestError for what cannot be followed."""
    from erase_concept.pipelines.builtin import builtin_models
    from erase_concept.pipelines.load import configs

    configs(request.model, ema=request.ema)  # refuses what is no model
    if builtin := builtin_models().get(request.model):
        concepts, benchmark = request.concepts or builtin.compare, request.benchmark or builtin.benchmark
        request = replace(request, concepts=concepts, benchmark=benchmark)
    for setting in ("methods", "concepts", "seeds", "masks", "multipliers", "benchmark"):
        if not getattr(request, setting):
            raise RequestError(setting, "(not given)", f"needed to compare methods on {request.model}")
    if overlap := sorted({*request.concepts} & {*request.tune_on}):
        raise RequestError("tune", overlap[0], "is compared on too; tune on other concepts")
    for method in request.methods:
        recipe_of(request.model, Trial(method, request.concepts[0], 0))
    for concept in {*request.concepts, *request.tune_on}:
        trial = Trial(request.methods[0], concept, 0)
        plan_of(request.benchmark, recipe_of(request.model, trial), trial, request.out)
    for mask in request.masks:
        _check_mask(split_mask(mask)[0])
    return request


def _check_mask(mask: str | None) -> None:
    from erase_concept.masks.choose import MASK_KINDS
    from erase_concept.masks.mask import Mask

    if mask not in (None, *MASK_KINDS):
        Mask.load(Path(str(mask)), setting="masks")
