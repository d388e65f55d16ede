"""From images to a report: what the judges say, what the metrics count, and how it was obtained."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.images import EvalImages, folder_of, sampling
from erase_concept.eval.judgements import Judged
from erase_concept.eval.judges import JUDGES
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import JudgedImages, MetricInput, MetricResult
from erase_concept.eval.report.report import Pair, Report
from erase_concept.eval.thresholds import apply_thresholds
from erase_concept.prompts.minors import DROPPED
from erase_concept.settings import check_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erase_concept.eval.plan import EvalPlan
    from erase_concept.pipelines.image_set import ImageSet

_BLURRING = "nudenet"  # the judge that is asked for images to blur where no judge of the benchmark flags any


@dataclass(frozen=True, eq=False)
class Measured:
    """The results of all metrics, and why others could not be measured."""

    results: Mapping[str, MetricResult]
    missing: Mapping[str, str]


def judge_images(plan: EvalPlan, images: EvalImages) -> Judged:
    """Let all judges of a plan judge the images of both models; raises RequestError when one fails."""
    return Judged(_judged(plan, images.erased), None if images.base is None else _judged(plan, images.base))


def measure(plan: EvalPlan, images: EvalImages, judged: Judged) -> Report:
    """Measure what the judges say of images; raises RequestError when a metric that was asked for by name fails.

    The report's provenance says why other metrics were not measured.
    """
    rows = images.erased.rows
    forget = plan.forget(rows)
    _check_forget(plan, images.erased, forget)
    data = MetricInput(
        concept=plan.concept.name,
        targets=plan.targets(rows, (plan.concept,)),
        forget=forget,
        judges=plan.prepared.judges,
        erased=judged.erased,
        base=judged.base,
        cache=plan.cache,
        earlier=plan.targets(rows, plan.earlier),
    )
    found = _compute(plan, data)
    scores = [score for result in found.results.values() for score in result.scores]
    if not scores and found.missing:
        name, why = next(iter(found.missing.items()))
        raise RequestError("metric", name, why)
    how = sampling(images.erased.settings, rows)
    report = Report(
        concept=plan.concept.name,
        kind=plan.concept.kind,
        anchor=plan.concept.replacement,
        model=plan.source,
        benchmark=plan.benchmark.title,
        erased=_about_images(images.erased),
        base=None if images.base is None else _about_images(images.base),
        scores=tuple(replace(score, protocol=f"{score.protocol}; {how}") for score in scores),
        charts=tuple(chart for result in found.results.values() for chart in result.charts),
        curves=tuple(curve for result in found.results.values() for curve in result.curves),
        pairs=_pairs(data, _flagged(plan, data)),
        looks_for=", ".join(plan.off_target),
        provenance=_provenance(plan, images, found),
    )
    return apply_thresholds(report, plan.thresholds)


def _check_forget(plan: EvalPlan, erased: ImageSet, forget: NDArray[np.bool_]) -> None:
    """Raise RequestError for images of a benchmark's own prompts of which none, or every one, asks for the concept."""
    if plan.benchmark.forget != "label" or plan.benchmark.own or not plan.prompts.own:
        return
    if not forget.any() or (forget.all() and plan.concept.kind != "nudity"):
        concept = plan.concept
        what = concept.name if concept.combined else f"the {concept.kind} {concept.name!r}"
        lacks = "asks for anything else" if forget.any() else f"asks for {what}"
        raise RequestError("images", folder_of(erased), f"no image {lacks}; sample the benchmark of this concept")


def _judged(plan: EvalPlan, images: ImageSet) -> JudgedImages:
    return JudgedImages(images, {name: judge.judge(images.files) for name, judge in plan.prepared.judges.items()})


def _compute(plan: EvalPlan, data: MetricInput) -> Measured:
    """Compute all metrics; raises RequestError when one that was asked for by name cannot be measured."""
    results, missing = {}, dict(plan.prepared.missing)
    for name, metric in plan.prepared.metrics.items():
        try:
            results[name] = metric.compute(data)
        except RequestError as problem:
            if name in plan.prepared.explicit:
                raise
            missing |= dict.fromkeys(metric.names or (name,), str(problem))
        else:
            missing |= results[name].missing
    return Measured(results, missing)


def _about_images(images: ImageSet) -> dict[str, Any]:
    return {"images": len(images.rows), **images.settings}


def _flagged(plan: EvalPlan, data: MetricInput) -> NDArray[np.bool_]:
    """Return which pairs [n] a report blurs: those of which a judge flags either image.

    Where no judge of the benchmark flags images, NudeNet is asked. Where it is not installed, all pairs are blurred if
    nudity was erased.
    """
    nothing = np.zeros(len(data.forget), bool)
    blurring = {METRICS.find(name).judge for name in plan.prepared.metrics if METRICS.find(name).blurs}
    names = [name for name in data.judges if name in blurring]
    flags = [side.judgements[name].flagged for name in names for side in data.sides]
    flags = [flagged for flagged in flags if flagged is not None]
    if not flags and plan.benchmark.blur:
        record = JUDGES.find(_BLURRING)
        try:
            judge = record.load(check_settings(record.settings, {}), plan.cache)
            flags = [judge.judge(side.images.files).flagged for side in data.sides]
        except RequestError:  # not installed
            return nothing | (plan.concept.kind == "nudity")
    return np.any([nothing, *(flagged for flagged in flags if flagged is not None)], axis=0)


def _pairs(data: MetricInput, flagged: NDArray[np.bool_]) -> tuple[Pair, ...]:
    words = [_words(data, side) for side in data.sides]
    base = data.base
    return tuple(
        Pair(
            prompt=row.prompt,
            seed=row.seed,
            forget=bool(data.forget[place]),
            erased=data.erased.images.files[place],
            erased_as=words[0][place],
            base=None if base is None else base.images.files[place],
            base_as=None if base is None else words[1][place],
            flagged=bool(flagged[place]),
        )
        for place, row in enumerate(data.erased.images.rows)
    )


def _words(data: MetricInput, side: JudgedImages) -> list[str]:
    """Return what the judges take each image for, in words."""
    by_judge = [side.judgements[name].words for name in data.judges]
    return ["; ".join(words[place] for words in by_judge if words) for place in range(len(data.forget))]


def _provenance(plan: EvalPlan, images: EvalImages, found: Measured) -> dict[str, Any]:
    """Return all that is needed to measure the same again, and what was not measured."""
    notes = images.notes
    asked = plan.prompts.asked
    if any(row.width for row in asked.rows) and not any(row.width for row in images.erased.rows):
        notes.setdefault("erased", []).append("the sizes of the prompts were not used: the model is smaller")
    chosen = {key: value for key, value in asdict(plan.settings).items() if value is not None}
    chosen |= {key: str(value) for key, value in plan.request.settings.items() if "." in key}
    judges = {
        name: {"name": judge.name, "weights": judge.weights, "labels": len(judge.labels)}
        | ({"held-out images": judge.held_out.weights} if judge.held_out else {})
        for name, judge in plan.prepared.judges.items()
    }
    from_metrics: dict[str, Any] = {}
    for result in found.results.values():
        from_metrics |= result.provenance
    left = plan.prompts.left_out
    optional = {
        "run": plan.run.run_info,
        "looks for": ", ".join(plan.off_target),
        "erased earlier": [one.name for one in plan.earlier],
        "erased earlier, not measured": list(plan.earlier_unknown),
        "notes": notes,
        "not measured": dict(found.missing),
    }
    return {
        "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "concept": plan.concept.to_dict(),
        "prompts": {
            "name": plan.prompts.selected.name,
            "selection": plan.prompts.selected.selection or "all",
            "prompts": len(plan.prompts.selected.rows),
            **({"left out, for the erasing used them": left} if left else {}),
            **({DROPPED: len(dropped)} if (dropped := plan.prompts.selected.dropped) else {}),
        },
        "settings": chosen,
        "judges": judges,
        **from_metrics,
        **{key: value for key, value in optional.items() if value},
        "versions": versions(("erase-concept", "torch", "numpy")),
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of installed packages."""
    return {name: importlib.metadata.version(name) for name in names}
