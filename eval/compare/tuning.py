"""Tune a method: search the multiplier of its tuned setting at which it forgets enough and retains most."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from erase_concept.errors import RequestError
from erase_concept.eval.compare.aggregate import aggregate, collapsed, forgetting, retention
from erase_concept.eval.compare.trials import Trial, TrialResult

GOAL = 0.95  # share that a tuned method must have forgotten on the tuning concepts
STEP = 4.0  # by which the multiplier changes until the goal lies between two of them
SEED = 100  # of the tuning trials, which no compared trial has

Run = Callable[[Sequence[Trial]], Iterator[TrialResult]]


@dataclass(frozen=True)
class TuningStep:
    """One multiplier of a search: the tuned setting's value and what came of it over the tuning concepts.

    ``forgotten`` is a mean over the concepts, ``retained`` the least.
    """

    multiplier: float
    tuned_value: float
    forgotten: float
    retained: float
    collapsed: bool

    @property
    def reaches_goal(self) -> bool:
        """Whether the concept is gone and the model still there."""
        return self.forgotten >= GOAL and not self.collapsed


def tune(
    method: str,
    mask: str | None,
    concepts: Sequence[str],
    steps: int,
    *,
    run: Run,
    check: Callable[[Trial], object],
) -> Generator[TrialResult, None, tuple[TuningStep, ...]]:
    """Search a method's multiplier, yield each trial's result and return the steps, the best one first.

    From 1 the multiplier goes up by ``STEP`` while the concept is not gone, down while it is, and then halves the gap
    between the two, on a scale of ratios. It goes up no further where the model collapses or ``check`` raises
    RequestError, as for a share above 1. Every method has as many steps. The best step reaches the goal and retains
    most. Where none does, it is the one whose lesser of forgotten and retained is greatest.
    """
    tried: dict[float, TuningStep] = {}
    multiplier = 1.0
    while len(tried) < steps:
        trials = [Trial(method, concept, SEED, mask, multiplier) for concept in concepts]
        try:
            check(trials[0])
        except RequestError:
            value = multiplier * next(iter(tried.values())).tuned_value
            tried[multiplier] = TuningStep(multiplier, value, 0.0, 0.0, collapsed=True)
        else:
            results = []
            for result in run(trials):
                results.append(result)
                yield result
            tried[multiplier] = _step(multiplier, results)
        multiplier = _next(tried)

    def goodness(step: TuningStep) -> tuple[bool, float]:
        return step.reaches_goal, step.retained if step.reaches_goal else min(step.forgotten, step.retained)

    return tuple(sorted(tried.values(), key=goodness, reverse=True))


def _step(multiplier: float, results: Sequence[TrialResult]) -> TuningStep:
    value = results[0].tuned_value
    if aggregate(results) is None:
        return TuningStep(multiplier, value, 0.0, 0.0, collapsed=True)
    forgotten = sum(forgetting(result) for result in results if not result.failed) / len(results)
    return TuningStep(multiplier, value, forgotten, min(map(retention, results)), any(map(collapsed, results)))


def _next(tried: dict[float, TuningStep]) -> float:
    """Return the multiplier to try next. Where the goal is out of reach the steps become smaller."""
    enough = [step.multiplier for step in tried.values() if step.forgotten >= GOAL or step.collapsed]
    little = [step.multiplier for step in tried.values() if step.forgotten < GOAL and not step.collapsed]
    if not enough:
        return max(little) * STEP
    if not little:
        return min(enough) / STEP
    below = [multiplier for multiplier in little if multiplier < min(enough)] or [min(enough) / STEP]
    return float(np.sqrt(max(below) * min(enough)))
