"""A threshold fails what it says, what was not measured, and what it cannot judge."""

from __future__ import annotations

import math

import pytest

from erase_concept.errors import RequestError
from erase_concept.eval.report.report import Report
from erase_concept.eval.score import Score
from erase_concept.eval.thresholds import read_thresholds

KNOWN = ("ua", "ira", "nudity_ratio", "top1")


def report(value: float = 0.9, baseline: float | None = 0.95) -> Report:
    ci = (0.0, 1.0)
    of_one = Score("ira", "tench", 0.1, 5, ci, "fraction", "p", 0.1, ci)
    scores = (Score("ira", "all", value, 50, ci, "fraction", "p", baseline, None if baseline is None else ci), of_one)
    return Report("church", "object", "", "base", "imagenette", {}, None, scores)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("ira<0.9", True),
        ("ira<=0.9", False),
        ("ira>0.9", True),
        ("ira>=0.9", False),
        (" ira < 0.91 ", False),
        ("ira>1e3", True),
        ("ira>-.5", False),
        ("retained_ira<0.94", True),  # 0.9 / 0.95 is 0.947...
        ("retained_ira<0.95", False),
        ("ua<0.5", False),  # not in the report
    ],
)
def test_a_threshold_holds_the_first_score_to_its_bound(text: str, passes: bool) -> None:
    (threshold,) = read_thresholds([text], KNOWN)
    failure = threshold.failure(report())
    assert (failure is None) == passes
    assert failure is None or (text.strip() in failure and "\n" not in failure)


def test_what_cannot_be_judged_has_failed() -> None:
    (threshold,) = read_thresholds(["ira<0.5"], KNOWN)
    assert "is nan" in str(threshold.failure(report(math.nan)))
    (kept,) = read_thresholds(["retained_ira<0.5"], KNOWN)
    for nothing in (0.0, None):
        assert "no base model's ira" in str(kept.failure(report(baseline=nothing)))
    assert read_thresholds(["retained_ira<0.5"], KNOWN)[0].failure(report(0.9, 0.9)) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be METRIC OP NUMBER"),
        ("ira", "must be METRIC OP NUMBER"),
        ("ira=0.9", "must be METRIC OP NUMBER"),
        ("ira<", "must be METRIC OP NUMBER"),
        ("0.9<ira", "must be METRIC OP NUMBER"),
        ("ira<0.9 or 1", "must be METRIC OP NUMBER"),
        ("ira<low", "low is no finite number"),
        ("ira<nan", "nan is no finite number"),
        ("ira>inf", "inf is no finite number"),
        ("top<0.9", "did you mean top1? allowed here: ua, ira, nudity_ratio, top1"),
        ("retained_colour<0.9", "allowed here: ua"),
        ("fid>30", "fid would not be measured: no weights"),
    ],
)
def test_bad_conditions_get_one_line(text: str, problem: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_thresholds(["ua<0.9", text], KNOWN, {"fid": "no weights"})
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_share_of_the_base_model_needs_one() -> None:
    with pytest.raises(RequestError, match="needs a baseline"):
        read_thresholds(["retained_ira<0.9"], KNOWN, baseline=False)
