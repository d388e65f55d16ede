"""What erasing takes: time, memory, and how many weights it changes. The erasing measures these, not an evaluation."""

from __future__ import annotations

from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import Metric

METRICS.add(Metric("seconds", "Seconds of erasing", "Time that the erasing took.", "cost", "lower", "seconds"))
METRICS.add(
    Metric("peak_gib", "Peak memory, GiB", "Most memory that the erasing held at any time.", "cost", "lower", "GiB")
)
METRICS.add(
    Metric(
        "changed", "Weights changed", "Share of the trained part's weights that the erasing changed.", "cost", "lower"
    )
)
