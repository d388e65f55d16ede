"""What is compared, and what came of it: the types CompareRequest and Comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from erase_concept.eval.compare.aggregate import Aggregate, aggregate
from erase_concept.eval.compare.curves import CurveDifference, StrengthCurve, curve_difference, strength_curve
from erase_concept.eval.compare.trials import TrialResult
from erase_concept.eval.compare.tuning import TuningStep

Variant = tuple[str, str | None]  # a method and a mask


@dataclass(frozen=True)
class CompareRequest:
    """What to compare.

    ``methods`` are methods, the presets "default" and "paper", or guards, each with settings in brackets where they are
    wanted. With ``tune_on`` each method's tuned setting is searched first, with ``tuning_steps`` multipliers each, on
    those concepts and with a seed of its own. Presets and guards are taken as they are.

    ``multipliers`` multiply what was found. A mask may have a factor of its own, such as "least-salient@4": weights of
    little saliency forget as much only at greater multipliers. Mask None is each method's own. Without ``concepts`` or
    ``benchmark`` a built-in model's own are taken; any other model needs both.
    """

    model: str
    methods: tuple[str, ...]
    out: Path
    concepts: tuple[str, ...] = ()
    benchmark: str = ""
    seeds: tuple[int, ...] = (0, 1)
    masks: tuple[str | None, ...] = (None,)
    multipliers: tuple[float, ...] = (1.0,)
    tune_on: tuple[str, ...] = ()
    tuning_steps: int = 6
    ema: bool | None = None  # which weights of the base model's file, as ``load`` takes it


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison, in the order in which they were asked for, and what follows from them."""

    model: str
    benchmark: str
    concepts: tuple[str, ...]
    results: tuple[TrialResult, ...]
    tuning: dict[str, tuple[TuningStep, ...]] = field(default_factory=dict)

    @cached_property
    def by_variant(self) -> dict[Variant, list[TrialResult]]:
        """The results of each method and mask."""
        groups = defaultdict(list)
        for result in self.results:
            groups[result.trial.method, result.trial.mask].append(result)
        return dict(groups)

    def results_of(self, name: str) -> list[TrialResult]:
        """Return the results of the method and mask of that name in the tables."""
        return next(results for variant, results in self.by_variant.items() if variant_name(*variant) == name)

    @cached_property
    def has_curves(self) -> bool:
        """Whether any method was run at several multipliers."""
        return any(len({one.trial.multiplier for one in results}) > 1 for results in self.by_variant.values())

    @cached_property
    def aggregates(self) -> dict[str, Aggregate]:
        """Each method's results taken together, by name. Empty where there are curves instead."""
        if self.has_curves:
            return {}
        found = {variant_name(*variant): aggregate(results) for variant, results in self.by_variant.items()}
        return {name: one for name, one in found.items() if one is not None}

    @cached_property
    def failed(self) -> tuple[str, ...]:
        """The names of the methods that failed on every concept."""
        return tuple(
            variant_name(*variant)
            for variant, results in self.by_variant.items()
            if all(result.failed for result in results)
        )

    @cached_property
    def curves(self) -> tuple[StrengthCurve, ...]:
        """The curve of each method and mask along its multipliers."""
        if not self.has_curves:
            return ()
        return tuple(strength_curve(method, mask or "own", some) for (method, mask), some in self.by_variant.items())

    @cached_property
    def differences(self) -> dict[str, list[CurveDifference]]:
        """How the salient mask's curve differs from each other mask's: for all concepts, and for each kind."""
        if not self.has_curves:
            return {}
        kinds = dict.fromkeys(result.kind for result in self.results)
        chosen = {"all": self.results}
        if len(kinds) > 1:
            chosen |= {f"{kind}s": tuple(one for one in self.results if one.kind == kind) for kind in kinds}
        return {name: mask_differences(results) for name, results in chosen.items()}


def variant_name(method: str, mask: str | None) -> str:
    """Return a method and mask as the tables name them."""
    return method if mask is None else f"{method}, mask {mask}"


def mask_differences(results: Sequence[TrialResult]) -> list[CurveDifference]:
    """Return how the salient mask's curve differs from each other mask's, for each method that has both."""
    groups = defaultdict(list)
    for result in results:
        groups[result.trial.method, result.trial.mask].append(result)
    return [
        curve_difference(method, "salient", groups[method, "salient"], mask, found)
        for (method, mask), found in list(groups.items())
        if mask not in (None, "salient") and (method, "salient") in groups
    ]
