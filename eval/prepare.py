"""The judges and the metrics of an evaluation, loaded and prepared with their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from erase_concept.errors import RequestError
from erase_concept.eval.benchmarks import Benchmark
from erase_concept.eval.judges import find_judge
from erase_concept.eval.judges.judge import LoadedJudge, plain
from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import Metric, MetricContext, PreparedMetric
from erase_concept.prompts.concept import Concept
from erase_concept.settings import check_settings

GROUPS = ("judge", "metric", "guard")


@dataclass
class Prepared:
    """The judges and the metrics that are there, and why others are not.

    ``explicit`` are metrics that were asked for by name: where they cannot be measured, the evaluation fails.
    """

    judges: dict[str, LoadedJudge] = field(default_factory=dict)
    metrics: dict[str, PreparedMetric] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    explicit: set[str] = field(default_factory=set)

    def label(self, name: str, kind: str, *, setting: str = "concept") -> str:
        """Return the label of the first judge that has labels of a kind; without one, the name in small letters."""
        judge = next((judge for judge in self.judges.values() if judge.knows(kind)), None)
        return plain(name) if judge is None else judge.label(name, kind, setting=setting)

    def concept_label(self, part: Concept, kind: str) -> str:
        """Return the label of a concept; raises RequestError when the judge has none.

        Nudity has many names, of which a judge has one.
        """
        return self.label("nudity" if kind == "nudity" else part.name, kind)


def grouped(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings by what they are of: ``judge.KEY``, ``metric.KEY`` and ``guard.KEY``, and "" for the others."""
    found: dict[str, dict[str, Any]] = {"": {}, **{group: {} for group in GROUPS}}
    for key, value in settings.items():
        group, dot, rest = key.partition(".")
        if dot and group not in GROUPS:
            allowed = f"no such setting; there are those of the sampling and {', '.join(f'{g}.KEY' for g in GROUPS)}"
            raise RequestError(key, value, allowed)
        found[group if dot else ""][rest if dot else key] = value
    return found


def own_settings(records: Mapping[str, type], values: Mapping[str, Any], group: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each record by its name: those under NAME.KEY, and under KEY where it has such a one.

    Raises RequestError for a setting that none of them has, and for a judge's KEY that several have.
    """
    keys = {name: {one.name for one in dataclasses.fields(cls)} for name, cls in records.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in records}
    for key, value in values.items():
        name, dot, own = key.rpartition(".")
        takers = [name] if dot else [one for one in records if key in keys[one]]
        setting = f"{group}.{key}"
        if not takers or (dot and (name not in records or own not in keys[name])):
            there = sorted({f"{group}.{one}.{other}" for one in records for other in keys[one]})
            near = get_close_matches(setting, there, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RequestError(setting, value, f"{hint}nothing here takes it; there are: {', '.join(there) or 'none'}")
        if group == "judge" and len(takers) > 1:
            raise RequestError(setting, value, f"name the judge: {' or '.join(f'judge.{one}.{key}' for one in takers)}")
        for taker in takers:
            found[taker] |= {own if dot else key: value}
    return found


def prepare(
    benchmark: Benchmark,
    judges: Sequence[str],
    groups: Mapping[str, Mapping[str, Any]],
    given: Sequence[str],
    context: MetricContext,
    cache: Path,
) -> Prepared:
    """Load the judges and prepare the metrics of a benchmark.

    ``judges`` are those that the request names, in the place of the benchmark's, and ``given`` the settings that it
    names. ``context`` holds the kinds of the erased concepts, and whether there is a base model. Raises RequestError
    when something that was asked for by name is missing, or nothing can be measured.
    """
    records = {name: METRICS.find(name) for name in benchmark.metrics}
    needed = [record.judge for record in records.values() if record.judge]
    names = list(dict.fromkeys([*(judges or benchmark.judges), *needed]))
    strict = set(names if benchmark.own else judges)
    found = Prepared()
    problems = _load_judges(found, names, strict, groups["judge"], given, context, cache)
    values = own_settings({name: record.settings for name, record in records.items()}, groups["metric"], "metric")
    first: RequestError | None = None
    for name, record in records.items():
        if benchmark.own or any(_is_of(key, "metric", name, values[name]) for key in given):
            found.explicit.add(name)
        try:
            found.metrics[name] = _prepared(record, values[name], found.judges, context)
        except RequestError as problem:
            if name in found.explicit:
                raise
            # Where a judge could not be loaded, that is why there is none.
            why = problems.get(record.judge) or (next(iter(problems.values()), None) if not record.judge else None)
            found.missing[name] = str(why if why is not None and problem.setting == "judge" else problem)
            first = first or problem
    if not found.metrics and first is not None:
        raise first
    return found


def _load_judges(
    found: Prepared,
    names: Sequence[str],
    strict: set[str],
    values: Mapping[str, Any],
    given: Sequence[str],
    context: MetricContext,
    cache: Path,
) -> dict[str, RequestError]:
    """Load judges into ``found``, and return why others could not be; raises RequestError for one in ``strict``."""
    records = {name: find_judge(name) for name in names}
    own = own_settings({name: record.settings for name, (record, _) in records.items()}, values, "judge")
    problems = {}
    for name, (record, value) in records.items():
        try:
            chosen: Any = check_settings(record.settings, {**value, **own[name]}, "judge.")
            loaded = replace(record.load(chosen, cache), settings=chosen)
        except RequestError as problem:
            if name in strict or any(_is_of(key, "judge", name, own[name]) for key in given):
                raise
            problems[name] = problem
        else:
            found.judges[name] = loaded.as_kind(context.kinds[0] if context.kinds else "object")
    return problems


def _is_of(setting: str, group: str, name: str, values: Mapping[str, Any]) -> bool:
    """Tell whether a setting such as judge.threshold is one of these values of a judge or a metric."""
    kind, _, key = setting.partition(".")
    owner, _, own = key.rpartition(".")
    return kind == group and owner in ("", name) and own in values


def _prepared(
    record: Metric, values: Mapping[str, Any], judges: Mapping[str, LoadedJudge], context: MetricContext
) -> PreparedMetric:
    """Prepare one metric; raises RequestError where it cannot be measured."""
    if record.prepare is None:
        raise RequestError("metric", record.name, "is measured by the erasing, and by no evaluation")
    if record.judge and record.judge not in judges:
        raise RequestError("judge", record.judge, f"is needed for {record.name}")
    chosen: Any = check_settings(record.settings, values, "metric.")
    return record.prepare(replace(context, settings=chosen, judges=judges))
