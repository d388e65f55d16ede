"""Numbers, intervals and names as people read them: metrics' titles, shares as per cent, prompts cut to a length."""

from __future__ import annotations

import math

from erase_concept.eval.metrics import metric_record
from erase_concept.eval.report.report import Bar
from erase_concept.eval.score import Interval, Score

NOTHING = "\N{EN DASH}"  # in tables, where there is no value
READABLE = 200  # characters of a prompt that are shown


def title(metric: str) -> str:
    """Return a metric's name for people, or the metric itself where no record is known."""
    record = metric_record(metric)
    return record.title if record else metric


def percent(share: float) -> str:
    """Return a share as per cent with one decimal place at most."""
    return f"{'∞' if math.isinf(share) else f'{100 * share:.1f}'.removesuffix('.0')}\u00a0%"


def value_text(value: float | None, unit: str) -> str:
    """Return a value as it stands in a table: shares as per cent, all else with three significant digits."""
    if value is None:
        return NOTHING
    if unit in ("fraction", "ratio"):
        return percent(value)
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval_text(interval: Interval | None, unit: str) -> str:
    """Return an interval as it stands in a table."""
    if interval is None:
        return NOTHING
    low, high = (value_text(end, unit) for end in interval)
    return f"{low} to {high}".replace("\u00a0% to", " to")


def certainty(score: Score) -> str:
    """Return a score's interval and number of images in words."""
    return f"95\u00a0% interval {interval_text(score.ci95, score.unit)}, {score.n:,} images"


def retention_text(score: Score | Bar) -> str:
    """Return the share of the base model's value, with its interval, or a dash where there is none to be retained."""
    record = metric_record(score.metric) if isinstance(score, Score) else None
    if score.retention is None or (record is not None and record.about != "retain"):
        return NOTHING
    share, interval = score.retention
    return percent(share) if interval is None else f"{percent(share)} ({interval_text(interval, 'fraction')})"


def short(text: str, most: int = READABLE) -> str:
    """Return a prompt as a page shows it: not endless, and never nothing."""
    return f"{text[:most]} …" if len(text) > most else text or "(empty prompt)"
