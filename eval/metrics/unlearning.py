"""What is measured of a classifier that unlearned images; the evaluations of images do not measure these.

Retrain's own values are the aim, so neither direction is better without end.
"""

from __future__ import annotations

from erase_concept.eval.metrics import METRICS
from erase_concept.eval.metrics.metric import Metric

METRICS.add(
    Metric("ra", "Retain accuracy (RA)", "Share of a classifier's retained images that it tells.", "retain", "higher")
)
METRICS.add(Metric("ta", "Test accuracy (TA)", "Share of the test images that a classifier tells.", "retain", "higher"))
METRICS.add(
    Metric(
        "mia",
        "Membership inference (MIA), confidence",
        "Share of the forgotten images that a support vector machine calls no training images of a classifier.",
        "forget",
        "higher",
    )
)
METRICS.add(
    Metric(
        "mia_loss",
        "Membership inference (MIA), loss",
        "Share of the forgotten images whose loss is above the threshold that best tells training images.",
        "forget",
        "higher",
    )
)
METRICS.add(
    Metric(
        "mia_lira",
        "Membership inference (MIA), LiRA",
        "Share of the forgotten images that a likelihood ratio over shadow models calls no training images.",
        "forget",
        "higher",
    )
)
METRICS.add(
    Metric(
        "average_gap",
        "Average gap to Retrain",
        "Mean difference of UA, RA, TA and MIA from a classifier that never saw the forgotten images.",
        "forget",
        "lower",
    )
)
