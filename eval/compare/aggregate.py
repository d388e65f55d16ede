"""Aggregate the results of several trials: what was forgotten, what was retained, what it took, what collapsed.

Which metric tells forgetting, and which tell retention, is in the metrics' records: those that a report's verdict cites
as shares of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

from erase_concept.eval.compare.trials import TrialResult
from erase_concept.eval.metrics import metric_record
from erase_concept.eval.metrics.metric import Metric
from erase_concept.eval.score import Interval, Score, wilson

COLLAPSED = 0.5  # of the base model's accuracy: below that, a method has destroyed the model


@dataclass(frozen=True)
class Share:
    """A share of the images of several trials, with its 95 % interval (Wilson) and the share for each concept.

    ``of_base`` is the share of the base model's value from the same prompts and seeds; None of what is forgotten.
    """

    value: float
    n: int
    ci95: Interval
    by_concept: dict[str, float]
    of_base: float | None = None


@dataclass(frozen=True)
class Aggregate:
    """The results of one method taken together.

    ``forgotten`` is the share of images without the concept, by the metric ``forget_metric``; with ``flipped`` that
    metric counts the images that still show it. ``retained`` are the shares of everything else, by metric.
    ``distance`` is the mean of the metric ``distance_metric``, which tells how far the retained images are from others;
    None where there is no such metric. Costs are medians. ``collapsed`` are the concepts of which less than
    ``COLLAPSED`` was retained or whose erasing failed.
    """

    trials: int
    forget_metric: str
    flipped: bool
    forgotten: Share
    retained: dict[str, Share]
    distance_metric: str
    distance: float | None
    seconds: float
    trial_seconds: float
    peak_gib: float
    changed: float
    collapsed: tuple[str, ...]

    @property
    def least_forgotten(self) -> tuple[str, float]:
        """The concept that is forgotten least, and its share."""
        return min(self.forgotten.by_concept.items(), key=lambda found: found[1])

    @property
    def retention(self) -> float:
        """The smallest of the retained shares, each as a share of the base model's."""
        return min(share.of_base for share in self.retained.values() if share.of_base is not None)


def forgetting(result: TrialResult) -> float:
    """Return the share of a trial's images that do not show the concept."""
    name, flipped = _forget_metric(result.scores)
    value = next(score.value for score in result.scores if score.metric == name)
    return 1 - value if flipped else value


def retention(result: TrialResult) -> float:
    """Return the smallest of a trial's retained shares, each as a share of the base model's; 0 where it failed."""
    if result.failed:
        return 0.0
    # A base model of which nothing is recognised has nothing to lose.
    return min(score.value / score.baseline if score.baseline else 1.0 for score in _retained(result.scores))


def collapsed(result: TrialResult) -> bool:
    """Tell whether the erasing ended without a model, or with one that can hardly draw anything any more."""
    return bool(result.failed) or retention(result) < COLLAPSED


def aggregate(results: Sequence[TrialResult]) -> Aggregate | None:
    """Take results together; None where all failed. One that failed counts as collapsed, and for nothing else."""
    done = [result for result in results if not result.failed]
    if not done:
        return None
    scores = {score.metric: score for result in done for score in result.scores}.values()
    forget, flipped = _forget_metric(scores)
    distance = _distance(scores)
    far = [score.value for result in done for score in result.scores if score.metric == distance]
    return Aggregate(
        trials=len(done),
        forget_metric=forget,
        flipped=flipped,
        forgotten=_share(done, forget, flipped=flipped),
        retained={score.metric: _share(done, score.metric, of_base=True) for score in _retained(scores)},
        distance_metric=distance,
        distance=sum(far) / len(far) if far else None,
        seconds=median(result.seconds for result in done),
        trial_seconds=median(result.trial_seconds for result in done),
        peak_gib=median(result.peak_gib for result in done),
        changed=median(result.changed for result in done),
        collapsed=tuple(dict.fromkeys(result.trial.concept for result in results if collapsed(result))),
    )


def dominated(aggregates: dict[str, Aggregate]) -> set[str]:
    """Return the names of those that another one beats.

    It forgets and retains as much by every metric, is better in one, and takes no more time.
    """

    def beats(a: Aggregate, b: Aggregate) -> bool:
        ours, theirs = ((one.forgotten.value, *(s.of_base or 0.0 for s in one.retained.values())) for one in (a, b))
        return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True)) and a.seconds <= b.seconds

    return {name for name, one in aggregates.items() if any(beats(other, one) for other in aggregates.values())}


@cache
def _cited(metric: str) -> Metric | None:
    """Return the record of a metric that verdicts cite as a share of images, None for any other metric."""
    record = metric_record(metric)
    return record if record is not None and record.in_verdict else None


def _forget_metric(scores: Iterable[Score]) -> tuple[str, bool]:
    """Return the metric that tells what is forgotten, and whether it counts what is still there."""
    for score in scores:
        record = _cited(score.metric)
        if record is not None and record.about == "forget":
            return score.metric, record.direction == "lower"
    raise ValueError("no score tells what is forgotten")


def _retained(scores: Iterable[Score]) -> list[Score]:
    """Return the scores that tell what is retained, each a share of images."""
    return [score for score in scores if (record := _cited(score.metric)) and record.about == "retain"]


def _distance(scores: Iterable[Score]) -> str:
    """Return the first metric of the retained images that is no share, or "" where there is none."""
    for score in scores:
        record = None if score.unit == "fraction" else metric_record(score.metric)
        if record is not None and record.about == "retain":
            return score.metric
    return ""


def _share(results: Sequence[TrialResult], metric: str, *, flipped: bool = False, of_base: bool = False) -> Share:
    images, hits = Counter[str](), Counter[str]()
    base = 0.0
    for result in results:
        for score in result.scores:
            if score.metric == metric:
                count = round(score.value * score.n)
                images[result.trial.concept] += score.n
                hits[result.trial.concept] += score.n - count if flipped else count
                base += (score.baseline or 0.0) * score.n
    n, found = sum(images.values()), sum(hits.values())
    by_concept = {concept: hits[concept] / images[concept] for concept in images}
    ratio = (found / base if base else 1.0) if of_base else None
    return Share(found / n, n, wilson(found, n), by_concept, ratio)
