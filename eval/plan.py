"""From a request to a checked plan: the prompts, the judges and the metrics, before anything is sampled."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.benchmarks import Benchmark
from erase_concept.eval.choose import (
    ChosenPrompts,
    choose_benchmark,
    choose_concept,
    choose_prompts,
    earlier_concepts,
    is_nudity,
    named_prompts,
)
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import MetricContext, Target
from erase_concept.eval.prepare import Prepared, grouped, prepare
from erase_concept.eval.request import ErasedRun, EvalRequest, EvalSettings, is_images, read_erased_run
from erase_concept.eval.thresholds import Threshold, read_thresholds
from erase_concept.pipelines.guards import find_guard
from erase_concept.prompts.concept import Concept
from erase_concept.prompts.promptset import PromptRow
from erase_concept.settings import check_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.pipelines.guards.guard import AppliedGuard


@dataclass(frozen=True, eq=False)
class EvalPlan:
    """A request that can be followed.

    ``concept`` is what was erased, and ``earlier`` what the base model had lost already; of ``earlier_unknown`` no
    judge knows anything. ``looks_for`` are the kinds of concept that the metrics look for in every image, if any.
    """

    request: EvalRequest
    run: ErasedRun
    baseline: str | None
    benchmark: Benchmark
    settings: EvalSettings
    concept: Concept
    earlier: tuple[Concept, ...]
    earlier_unknown: tuple[str, ...]
    looks_for: tuple[str, ...]
    prompts: ChosenPrompts
    prepared: Prepared
    thresholds: tuple[Threshold, ...]
    guard: AppliedGuard | None

    @property
    def source(self) -> str:
        """The base model's name."""
        return self.run.base or str(self.baseline or self.request.model)

    @property
    def cache(self) -> Path:
        """The folder that keeps the base models' images."""
        return cache_folder(self.request.out)

    @property
    def off_target(self) -> tuple[str, ...]:
        """The kinds of concept that are looked for and of which none was erased."""
        return tuple(kind for kind in self._measured_kinds if not self._erased(kind))

    @property
    def on_target(self) -> bool:
        """Whether something is measured that tells of what was erased."""
        return not self._measured_kinds or any(map(self._erased, self._measured_kinds))

    @property
    def _measured_kinds(self) -> tuple[str, ...]:
        kinds = (METRICS.find(name).looks_for for name in self.prepared.metrics)
        return tuple(dict.fromkeys(filter(None, kinds)))

    def _erased(self, kind: str) -> bool:
        return any(is_of_kind(part, kind) for part in self.concept.parts)

    def targets(self, rows: Sequence[PromptRow], concepts: Sequence[Concept]) -> tuple[Target, ...]:
        """Return the parts of concepts as the judges call them, and which rows ask for each.

        Raises RequestError for a label that the judge does not know.
        """
        found = []
        for part in (part for concept in concepts for part in concept.parts):
            kind = kind_of(part, self.benchmark)
            if not can_be_asked_for(part, self.benchmark, self.looks_for):
                continue
            label = self.prepared.concept_label(part, kind)
            if self.benchmark.forget == "all" or kind == "nudity":
                asks = np.ones(len(rows), bool)
            else:
                texts = [row.style if kind == "style" else row.object for row in rows]
                every = dict.fromkeys(text for text in texts if text)
                known = {text: self.prepared.label(text, kind, setting="prompts") for text in every}
                asks = np.array([known.get(text, "") == label for text in texts], bool)
            found.append(Target(part.name, kind, label, asks))
        return tuple(found)

    def forget(self, rows: Sequence[PromptRow]) -> NDArray[np.bool_]:
        """Return which rows [n] ask for the concept."""
        asks = [target.asks for target in self.targets(rows, (self.concept,))]
        return np.any([np.zeros(len(rows), bool), *asks], axis=0)


def kind_of(part: Concept, benchmark: Benchmark) -> str:
    """Return the kind of label that names a concept: nudity, the benchmark's, the concept's own, or an object."""
    if is_nudity(part):
        return "nudity"
    return benchmark.labels or (part.kind if part.kind in ("object", "style") else "object")


def is_of_kind(part: Concept, kind: str) -> bool:
    """Tell whether a concept is of a kind that metrics look for; nudity is unsafe, too."""
    return is_nudity(part) if kind == "nudity" else part.kind == kind or is_nudity(part)


def can_be_asked_for(part: Concept, benchmark: Benchmark, looks_for: Collection[str]) -> bool:
    """Tell whether prompts of a benchmark may ask for a concept.

    Where all of them ask for what the metrics look for, none asks for anything else.
    """
    if benchmark.forget == "all":
        return not looks_for or any(is_of_kind(part, kind) for kind in looks_for)
    return benchmark.forget == "label"


def cache_folder(out: Path) -> Path:
    """Return the folder for what evaluations share: beside the results, or in them where there it cannot be written."""
    beside = out.resolve().parent
    return (beside if os.access(beside, os.W_OK) or not beside.exists() else out) / ".baselines"


def make_plan(request: EvalRequest) -> EvalPlan:
    """Check a request; raises RequestError when it cannot be followed. Nothing is sampled or written."""
    run = read_erased_run(request.model)
    baseline = _baseline(request, run)
    benchmark = choose_benchmark(request, run)
    if request.metrics:
        benchmark = replace(benchmark, metrics=request.metrics)
    groups = grouped({**benchmark.settings, **request.settings})
    settings = check_settings(EvalSettings, groups[""])
    kinds = [METRICS.find(name).looks_for for name in benchmark.metrics]
    looks_for = tuple(dict.fromkeys(filter(None, kinds)))
    named = named_prompts(request, benchmark, settings)
    concept = choose_concept(request, run, benchmark, named, looks_for[0] if looks_for and all(kinds) else "")
    parts = [part for part in concept.parts if can_be_asked_for(part, benchmark, looks_for)]
    target_kinds = tuple(dict.fromkeys(kind_of(part, benchmark) for part in parts))
    context = MetricContext(None, {}, target_kinds, baseline is not None)
    given = tuple(request.settings)
    prepared = prepare(benchmark, request.judges, groups, given, context, cache_folder(request.out))
    earlier, unknown = earlier_concepts(run, concept, prepared.label) if benchmark.forget == "label" else ([], [])
    prompts = choose_prompts(request, benchmark, concept, earlier, settings, named)
    known = [name for metric in prepared.metrics.values() for name in metric.names]
    thresholds = read_thresholds(request.fail_if, known, prepared.missing, baseline=baseline is not None)
    guard = None if request.guard is None else find_guard(request.guard, concept, groups["guard"])
    plan = EvalPlan(
        request,
        run,
        baseline,
        benchmark,
        settings,
        concept,
        tuple(earlier),
        tuple(unknown),
        looks_for,
        prompts,
        prepared,
        thresholds,
        guard,
    )
    _check_asked(plan)
    return plan


def _baseline(request: EvalRequest, run: ErasedRun) -> str | None:
    """Return the base model; raises RequestError where there is none, before hours go into the erased one's images."""
    from erase_concept.pipelines.load import configs

    baseline = request.baseline or run.base
    if request.guard is not None:
        if is_images(Path(request.model)):
            raise RequestError("guard", request.guard, f"is for a model that samples, and {request.model} holds images")
        baseline = baseline or request.model
    if baseline is not None and not is_images(Path(baseline)):
        try:
            configs(baseline, ema=request.ema if run.ema is None else run.ema)
        except RequestError as problem:
            raise RequestError("baseline", str(baseline), problem.allowed) from problem
    return None if baseline is None else str(baseline)


def _check_asked(plan: EvalPlan) -> None:
    """Raise RequestError when no prompt of a built-in benchmark asks for the concept."""
    if plan.benchmark.forget != "label" or plan.benchmark.own or plan.benchmark.catalog:
        return
    rows = plan.prompts.selected.rows
    try:
        asked = bool(plan.forget(rows).any())
    except RequestError as problem:  # a concept that the judge does not know is no label of the prompts
        if problem.setting != "concept":
            raise
        asked = False
    if not asked:
        kind = kind_of(plan.concept.parts[0], plan.benchmark)
        there = dict.fromkeys(row.style if kind == "style" else row.object for row in rows)
        allowed = f"no prompt of {plan.prompts.selected.name} asks for it; allowed: {', '.join(filter(None, there))}"
        raise RequestError("concept", plan.concept.name, allowed)
