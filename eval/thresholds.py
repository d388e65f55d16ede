"""Thresholds: conditions such as "ua<0.95" under which an evaluation counts as failed."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from erase_concept.errors import RequestError, did_you_mean
from erase_concept.eval.report.report import Report

_FORM = re.compile(r"\s*([A-Za-z]\w*)\s*(<=|>=|<|>)\s*(\S+)\s*", re.ASCII)
_COMPARED: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_RETAINED = "retained_"  # before a metric: its value as a share of the base model's


@dataclass(frozen=True)
class Threshold:
    """A condition that fails an evaluation: a bound of a metric or, with ``retained``, of its share of the baseline."""

    text: str
    metric: str
    retained: bool
    sign: str
    bound: float

    def failure(self, report: Report) -> str | None:
        """Say in one line why the report fails, or return None where it passes.

        The metric's first score counts, that of everything together. A threshold that cannot be applied has failed:
        nobody should release what was not measured.
        """
        score = report.score(self.metric)
        if score is None:
            why = report.provenance.get("not measured", {}).get(self.metric, "the report has no such score")
            return f"{self.text}: {self.metric} was not measured: {why}"
        value = score.value
        if self.retained:
            if not score.baseline:
                return f"{self.text}: there is no base model's {self.metric} above 0 to hold it against"
            value = score.value / score.baseline
        if not math.isnan(value) and not _COMPARED[self.sign](value, self.bound):
            return None
        return f"{self.text}: {_RETAINED if self.retained else ''}{self.metric} is {value:.4g} (n = {score.n:,})"


def read_thresholds(
    texts: Sequence[str],
    known: Collection[str],
    absent: Mapping[str, str] | None = None,
    *,
    baseline: bool = True,
) -> tuple[Threshold, ...]:
    """Read conditions METRIC OP NUMBER, such as "ua<0.95" or "retained_ira<0.98"; OP is one of < <= > >=.

    ``known`` are the metrics that will be measured and ``absent`` says of others why they will not be. Raises
    RequestError for anything else, and for ``retained_`` without a ``baseline``.
    """
    found = []
    for text in texts:
        match = _FORM.fullmatch(text)
        if match is None:
            raise RequestError("fail_if", repr(text), "must be METRIC OP NUMBER, such as ua<0.95; OP: < <= > >=")
        name, sign, number = match.groups()
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise RequestError("fail_if", repr(text), f"{number} is no finite number")
        retained = name not in known and name.startswith(_RETAINED)
        name = name.removeprefix(_RETAINED) if retained else name
        if name not in known:
            if absent and name in absent:
                raise RequestError("fail_if", repr(text), f"{name} would not be measured: {absent[name]}")
            hint = did_you_mean(name, known)
            raise RequestError("fail_if", repr(text), f"{hint}allowed here: {', '.join(known)}, or retained_ and one")
        if retained and not baseline:
            raise RequestError("fail_if", repr(text), "needs a baseline")
        found.append(Threshold(text.strip(), name, retained, sign, bound))
    return tuple(found)


def apply_thresholds(report: Report, checked: Sequence[Threshold]) -> Report:
    """Return the report with what became of each threshold in its provenance: "passed", or why it was missed."""
    if not checked:
        return report
    outcomes = {one.text: one.failure(report) or "passed" for one in checked}
    return replace(report, provenance={**report.provenance, "thresholds": outcomes})
