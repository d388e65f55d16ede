"""Metrics, one file per family: pure functions of arrays, and a record of each."""

from __future__ import annotations

from dataclasses import replace

from erase_concept.eval.metrics.metric import Metric
from erase_concept.registry import Registry

METRICS = Registry[Metric]("metrics", "metric")


def metric_record(name: str) -> Metric | None:
    """Return the record of a metric or of one of its varieties, or None where there is none.

    A variety has words behind the metric's name: ``frechet_inception`` is ``frechet`` in the features of Inception,
    and ``ua_top5`` is ``ua`` among the five most probable labels. The variety's words end its title.
    """
    known, _, variety = name, "", ""
    records = METRICS.all()
    while known not in records:
        known, _, last = known.rpartition("_")
        if not known:
            return None
        variety = f"{last} {variety}".strip()
    found = records[known]
    if not variety:
        return found
    return replace(
        found, name=name, title=f"{found.title}, {variety}", finding=""
    )  # the verdict cites the metric alone
