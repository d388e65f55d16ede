"""Metrics of what images show by any judge: UA, IRA, CRA, top-k accuracy, and the accuracy of each label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from erase_concept.errors import RequestError
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.accuracy import Shown, accuracy, confusion, cra, ira, per_class, ua
from erase_concept.eval.metrics.metric import (
    JudgedImages,
    Metric,
    MetricContext,
    MetricInput,
    MetricResult,
    PreparedMetric,
    Target,
    missing,
    single,
)
from erase_concept.eval.report.report import Bar, Chart
from erase_concept.eval.score import Score, wilson
from erase_concept.prompts.concept import in_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OTHER = {"object": "style", "style": "object"}


def _shown(data: MetricInput, side: JudgedImages, kind: str, k: int = 1) -> list[tuple[str, ...] | None]:
    return side.judgements[data.judge_of(kind)].shown(kind, k)


def _by(data: MetricInput, kind: str) -> str:
    """Return the name of the judge for protocols."""
    judge = data.judges[data.judge_of(kind)]
    labels = len(judge.labels_of(kind))
    return f"{judge.name}, {labels:,} classes" if labels > 1 else judge.name


def _pooled(scores: Sequence[Score], target: str, protocol: str) -> Score:
    """Return the share over the images behind several scores of one metric taken together."""
    n = sum(score.n for score in scores)
    hits = sum(round(score.value * score.n) for score in scores)
    return replace(scores[0], target=target, value=hits / n, n=n, ci95=wilson(hits, n), protocol=f"{protocol}; Wilson")


def _kinds(data: MetricInput) -> list[str]:
    """Return the kinds of what was erased, each once."""
    return list(dict.fromkeys(target.kind for target in data.targets))


def _ua_of(data: MetricInput, side: JudgedImages, target: Target) -> Score:
    asked = [target.label if asks else "" for asks in target.asks]
    shown = _shown(data, side, target.kind)
    return replace(ua(asked, shown, target.label, by=_by(data, target.kind), what=target.kind), target=target.name)


def _ua(data: MetricInput) -> list[Score] | MetricResult:
    """UA of everything together, then of each of several concepts, then of what was erased earlier.

    Of several concepts the shares are pooled: an image that asks for two of them counts for either.
    """
    targets = [target for target in data.targets if target.asks.any()]
    if not targets:
        return missing("ua", "no image asks for what was erased")

    def together(side: JudgedImages) -> Score:
        scores = [_ua_of(data, side, target) for target in targets]
        if len(data.targets) == 1:
            return scores[0]
        how = f"{_by(data, targets[0].kind)} does not see which of {data.concept} was asked for; forget prompts of all"
        return _pooled(scores, data.concept, how)

    def alone(target: Target) -> Score:
        return data.with_baseline(lambda side: _ua_of(data, side, target))

    parts = targets if len(data.targets) > 1 else []
    before = [alone(target) for target in data.earlier if target.asks.any()]
    return [
        data.with_baseline(together),
        *map(alone, parts),
        *(replace(score, protocol=f"erased earlier; {score.protocol}") for score in before),
    ]


def _retained(data: MetricInput, kind: str, chosen: NDArray[np.bool_]) -> list[str]:
    """Return the label of a kind that each chosen image asks for, "" for the others."""
    return [label if keep else "" for label, keep in zip(data.asked(kind), chosen, strict=True)]


def _ira(data: MetricInput) -> Score | MetricResult:
    """IRA, pooled over the kinds of which something was erased."""
    kinds = _kinds(data)
    asked = {kind: _retained(data, kind, data.retain) for kind in kinds}
    kinds = [kind for kind in kinds if any(asked[kind])]
    if not kinds:
        return missing("ira", "no image asks for anything else")

    def together(side: JudgedImages) -> Score:
        scores = [
            ira(asked[kind], _shown(data, side, kind), data.concept, by=_by(data, kind), what=kind) for kind in kinds
        ]
        if len(data.targets) == 1:
            return scores[0]
        return _pooled(
            scores, data.concept, f"{_by(data, kinds[0])} sees the prompted {in_words(kinds)}; retain prompts"
        )

    return data.with_baseline(together)


def _cra(data: MetricInput) -> Score | MetricResult:
    """CRA: accuracy of the other kind (styles when an object was erased; objects, on all prompts, for a style).

    Of several concepts only images that ask for none of them count.
    """
    kinds = _kinds(data)
    kind = _OTHER.get(kinds[0], "")
    if len(kinds) > 1 or not kind:
        return missing("cra", "there is no other kind, of which nothing was erased")
    # An erased style must leave its objects recognisable, so its own prompts count as well.
    every = kind == "object" and len(data.targets) == 1
    chosen = ~data.asked_earlier if every else data.retain
    try:
        asked = _retained(data, kind, chosen)
    except RequestError as problem:  # a label that the judge does not know
        return missing("cra", str(problem))
    if not any(asked):
        return missing("cra", f"none of what was to stay names its {kind}")
    return data.with_baseline(
        lambda side: cra(
            asked,
            _shown(data, side, kind),
            data.concept,
            by=_by(data, kind),
            what=kind,
            chosen=None if every else chosen,
        )
    )


def _top(k: int) -> Callable[[MetricInput], Score | MetricResult]:
    def compute(data: MetricInput) -> Score | MetricResult:
        kind = _kinds(data)[0]
        asked = _retained(data, kind, ~data.asked_earlier)
        if not any(asked):
            return missing(f"top{k}", f"no prompt names its {kind}")
        return data.with_baseline(
            lambda side: accuracy(asked, _shown(data, side, kind, k), by=_by(data, kind), what=kind, k=k)
        )

    return compute


def _per_label(data: MetricInput) -> MetricResult:
    """Charts of each label's accuracy, for each kind that a judge tells, and what images show in the place of it."""
    charts, unknown, confusions = [], {}, {}
    for kind in ("object", "style"):
        if not any(judge.knows(kind) for judge in data.judges.values()):
            continue
        try:
            asked = data.asked(kind)
        except RequestError as problem:
            unknown[f"accuracy by {kind}"] = str(problem)
            continue
        if not any(asked):
            continue
        tables = [_shown(data, side, kind) for side in data.sides]
        charts.append(_chart(data, kind, asked, tables))
        confusions[kind] = dict(zip(("erased", "base"), (confusion(asked, table) for table in tables), strict=False))
    return MetricResult(
        charts=tuple(charts), missing=unknown, provenance={"confusion": confusions} if confusions else {}
    )


def _chart(data: MetricInput, kind: str, asked: Sequence[str], tables: Sequence[Shown]) -> Chart:
    each = [per_class(asked, table, by=_by(data, kind), what=kind) for table in tables]
    erased = {target.label for target in (*data.targets, *data.earlier) if target.kind == kind}
    every = data.judges[data.judge_of(kind)].labels_of(kind)
    labels = [label for label in every if all(label in one for one in each)]
    bars = tuple(
        Bar(
            label,
            each[0][label].value,
            each[0][label].ci95,
            each[1][label].value if len(each) > 1 else None,
            each[1][label].ci95 if len(each) > 1 else None,
            each[0][label].n,
            forget=label in erased,
        )
        for label in labels
    )
    return Chart(f"{kind.capitalize()}s recognised", "fraction", bars)


def _prepare_ua(context: MetricContext) -> PreparedMetric:
    for kind in _needed(context):
        context.judge_of(kind)
    return single("ua", _ua)


def _prepare_ira(context: MetricContext) -> PreparedMetric:
    for kind in _needed(context):
        context.judge_of(kind)
    return single("ira", _ira)


def _prepare_cra(context: MetricContext) -> PreparedMetric:
    kinds = _needed(context)
    if len(kinds) == 1 and kinds[0] in _OTHER:
        context.judge_of(_OTHER[kinds[0]])
    return single("cra", _cra)


def _needed(context: MetricContext) -> tuple[str, ...]:
    if not context.kinds:
        raise RequestError("benchmark", "(its prompts)", "none of its prompts asks for what was erased")
    return context.kinds


def _prepare_top(k: int) -> Callable[[MetricContext], PreparedMetric]:
    def prepare(context: MetricContext) -> PreparedMetric:
        kind = _needed(context)[0]
        count = len(context.judge_of(kind).labels_of(kind))
        if count < k:
            raise RequestError("metric", f"top{k}", f"needs a judge of {k} classes or more, not of {count}")
        return single(f"top{k}", _top(k))

    return prepare


METRICS.add(
    Metric(
        "ua",
        "Unlearning accuracy (UA)",
        "Share of the images that ask for the erased concept and do not show it.",
        "forget",
        "higher",
        finding="of the images that asked for {it} show it, says the judge",
        prepare=_prepare_ua,
    )
)
METRICS.add(
    Metric(
        "ira",
        "In-domain retain accuracy (IRA)",
        "Share of the images that ask for another concept of the erased one's kind and show it.",
        "retain",
        "higher",
        finding="of the images that asked for another {kind} show it",
        prepare=_prepare_ira,
    )
)
METRICS.add(
    Metric(
        "cra",
        "Cross-domain retain accuracy (CRA)",
        "Share of the images that ask for a concept of the other kind (style or object) and show it.",
        "retain",
        "higher",
        finding="of the images that asked for a concept of another kind show it",
        prepare=_prepare_cra,
    )
)
METRICS.add(
    Metric(
        "top1",
        "Top-1 accuracy",
        "Share of all images that show what they ask for.",
        "retain",
        "higher",
        prepare=_prepare_top(1),
    )
)
METRICS.add(
    Metric(
        "top5",
        "Top-5 accuracy",
        "Share of all images of which one of the five most probable labels was asked for.",
        "retain",
        "higher",
        prepare=_prepare_top(5),
    )
)
METRICS.add(
    Metric(
        "accuracy",
        "Accuracy",
        "Share of the images that ask for one label and show it: a chart of all labels, and the confusion table.",
        "retain",
        "higher",
        prepare=lambda context: PreparedMetric((), _per_label),
    )
)
