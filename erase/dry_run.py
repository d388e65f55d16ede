"""What a run will take before it is begun: the memory and the time of its stages, and how to need less."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erase_concept.cards import Card, Precision, find_card, on_cpu
from erase_concept.make_data import BATCH
from erase_concept.methods import METHODS
from erase_concept.pipelines.load import ModelConfigs, configs
from erase_concept.pipelines.pictures import pictures_in
from erase_concept.pipelines.sample import DEFAULT
from erase_concept.predict import (
    HELD_BY_MALLOC,
    Prediction,
    predict_edit,
    predict_saliency,
    predict_sampling,
    predict_step,
    predict_vae,
)
from erase_concept.recipe import Recipe, in_low_precision, with_settings
from erase_concept.training.loop import Training

GIB = 2**30
_EVALUATED = 1000  # images, of the erased and the base model


@dataclass(frozen=True)
class Stage:
    """A stage of a run: what it does how often, bytes at its peak by what they are for, and operations of all of it."""

    name: str
    times: int
    what: str
    bytes: Mapping[str, int]
    operations: int
    precision: Precision

    @property
    def peak(self) -> int:
        """All bytes together."""
        return sum(self.bytes.values())

    @property
    def largest(self) -> str:
        """What most of the bytes are for, beside the process itself."""
        return max((part for part in self.bytes if part != "process"), key=lambda part: self.bytes[part])


def _data_stage(make: ModelConfigs, recipe: Recipe, card: Card) -> Stage | None:
    """Plan the sampling of rows, and the encoding of images from folders."""
    data, many, bf16 = recipe.data, len(recipe.concept.parts), in_low_precision(recipe)
    if not recipe.data_parts:
        return None
    own = [Path(one.images) for one in recipe.concept.parts if one.images]
    folders = {"forget": [data.forget_images] if data.forget_images else own}
    folders["retain"] = [data.retain_images] if data.retain_images else []
    rows = {"forget": data.forget * many, "anchor": data.anchor * many, "retain": data.retain}
    sampled = sum(rows[part] for part in recipe.data_parts if not folders.get(part))
    encoded = sum(len(pictures_in(one, deep=True)) for part in recipe.data_parts for one in folders.get(part, ()))
    one = predict_sampling(make, size=data.size, bf16=bf16)
    operations, most = sampled * data.steps * one.operations, one.bytes["activations"] if sampled else 0
    if encoded:
        vae = predict_vae(make, encode=True, size=data.size)
        operations, most = operations + encoded * vae.operations, max(most, vae.bytes["activations"])
    one = replace(one, bytes={**one.bytes, "activations": most})
    at_once = _largest_batch(one, card, max(1, min(BATCH, sampled + encoded)))
    what = f"images, {at_once} at once" + (f", {data.steps} steps" if sampled else "")
    return Stage("data", sampled + encoded, what, _many(one, at_once), operations, "bf16" if bf16 else "fp32")


def _mask_stage(make: ModelConfigs, recipe: Recipe, card: Card) -> Stage | None:
    """Plan the saliency of a mask that is ranked."""
    mask, bf16 = recipe.mask, in_low_precision(recipe)
    if mask.kind not in ("salient", "least-salient"):
        return None
    rows = recipe.data.forget * len(recipe.concept.parts) * mask.passes
    batches = math.ceil(rows / mask.batch_size)
    on_device = not mask.offload or on_cpu(card)
    found = predict_saliency(make, mask, size=recipe.data.size, bf16=bf16, on_device=on_device)
    operations = found.operations * rows // mask.batch_size
    return Stage("mask", batches, f"batches of {mask.batch_size}", found.bytes, operations, "bf16" if bf16 else "fp32")


def _training_stage(make: ModelConfigs, recipe: Recipe, card: Card) -> Stage:
    """Plan the steps of a method, or the edit of a closed form."""
    settings, method = recipe.settings, METHODS.find(recipe.method)
    if not isinstance(settings, Training):
        return Stage("training", 1, "edit in closed form", predict_edit(make).bytes, 0, "fp32")
    density = 1.0 if recipe.mask.kind == "none" else 1 - recipe.mask.sparsity
    if recipe.mask.combine == "union":
        density = min(1.0, density * len(recipe.concept.parts))  # at most: their masks overlap
    found = predict_step(
        make, settings, density, phases=method.memory(settings), scope=recipe.mask.scope, size=recipe.data.size
    )
    many = len(recipe.concept.parts)
    learnt = [part for part in method.latents if part != "retain"] or ["retain"]
    epoch = sum(getattr(recipe.data, part) * (1 if part == "retain" else many) for part in learnt)
    steps = settings.resolved(epoch).steps
    lower: Precision = "bf16" if "bf16" in (settings.weights, settings.precision) else "fp32"
    return Stage("training", steps, "steps", found.bytes, steps * found.operations, lower)


def _evaluation_stage(make: ModelConfigs, recipe: Recipe, card: Card) -> Stage:
    """Plan the sampling of images in fp32, half of them from the base model."""
    one, decoded = predict_sampling(make), predict_vae(make, encode=False)
    most = max(one.bytes["activations"], decoded.bytes["activations"])
    widest = replace(one, bytes={**one.bytes, "activations": most})
    at_once = _largest_batch(widest, card, DEFAULT.batch_size)
    operations = _EVALUATED * (DEFAULT.steps * one.operations + decoded.operations)
    what = f"images, {at_once} at once, {DEFAULT.steps} steps"
    return Stage("evaluation", _EVALUATED, what, _many(widest, at_once), operations, "fp32")


def _many(one: Prediction, rows: int) -> dict[str, int]:
    """Return the bytes for so many rows in the place of one."""
    return one.bytes | {"activations": rows * one.bytes["activations"]}


def _largest_batch(one: Prediction, card: Card, most: int) -> int:
    """Return the largest power of two, up to ``most``, of rows that fit on a card; 1 where none does."""
    sizes = [1 << i for i in range(most.bit_length())]
    return max([n for n in sizes if sum(_many(one, n).values()) + card.process <= card.memory], default=1)


STAGES: Mapping[str, Callable[[ModelConfigs, Recipe, Card], Stage | None]] = {
    "data": _data_stage,
    "mask": _mask_stage,
    "training": _training_stage,
    "evaluation": _evaluation_stage,
}


def plan_stages(recipe: Recipe, card: Card, names: Collection[str] = tuple(STAGES)) -> list[Stage]:
    """Return the named stages of a recipe's run on a card, the last of which is an evaluation's sampling."""
    make = configs(recipe.model, ema=recipe.ema)
    planned = [STAGES[name](make, recipe, card) for name in STAGES if name in names]
    return [replace(stage, bytes=_on(card, recipe, stage)) for stage in planned if stage is not None]


def _on(card: Card, recipe: Recipe, stage: Stage) -> dict[str, int]:
    """Return a stage's bytes with what process and allocator take on a card."""
    found = dict(stage.bytes)
    anew = recipe.mask.recompute if stage.name == "mask" else getattr(recipe.settings, "recompute", False)
    if on_cpu(card) and anew and stage.name in ("mask", "training"):
        found["malloc"] = round(HELD_BY_MALLOC * found["activations"])
    return found | {"process": card.process}


@dataclass(frozen=True)
class Expected:
    """What a run is expected to take: its stages on a card, and a sentence or two on what to change."""

    card: Card
    stages: tuple[Stage, ...]
    advice: str

    def seconds(self, stage: Stage) -> float:
        """Return the seconds of a stage: its operations over what the card does in a second."""
        return stage.operations / self.card.speed(stage.precision) if stage.operations else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: GiB and seconds."""
        card = {"name": self.card.name, "gib": round(self.card.memory / GIB, 2), "speed": self.card.speed_from}
        stages = {
            stage.name: {
                "times": stage.times,
                "what": stage.what,
                "peak_gib": round(stage.peak / GIB, 2),
                "seconds": round(self.seconds(stage), 1),
                "of_which_gib": {part: round(size / GIB, 2) for part, size in stage.bytes.items()},
            }
            for stage in self.stages
        }
        return {"card": card, "stages": stages, "advice": self.advice}


def expect(recipe: Recipe, card: str | None = None) -> Expected:
    """Return what a recipe's run is expected to take on a card of that name, or on the device at hand.

    Memory is that of the process on a CPU, and of the device on another. Times are good for a plan, not for a bar: they
    are operations over a speed, without loading, writing and judging. Raises RequestError for an unknown card.
    """
    found = Expected(find_card(card), (), "")
    found = replace(found, stages=tuple(plan_stages(recipe, found.card)))
    return replace(found, advice=f"{of_memory(recipe, found)} {of_time(recipe, found)}")


def of_memory(recipe: Recipe, found: Expected) -> str:
    """Say which stage needs the most memory, which part of it is most, and what to change."""
    # Sampled images come in as large batches as fit: they are no reason to change anything.
    fixed = [stage for stage in found.stages if stage.name in ("mask", "training")]
    most = max(fixed, key=lambda stage: stage.peak)
    part, size = most.largest, most.bytes[most.largest]
    fits = "" if most.peak <= found.card.memory else f", more than the {found.card.memory / GIB:.0f} GiB there are"
    text = f"The {most.name} needs most memory, {most.peak / GIB:.1f} GiB{fits}; {size / GIB:.1f} GiB are {part}."
    changed = _less(recipe, most, part)
    if changed is None:
        return text
    what, lean = changed
    (again,) = plan_stages(lean, found.card, [most.name])
    return f"{text} With {what} it needs {again.peak / GIB:.1f} GiB." if again.peak < most.peak else text


def _less(recipe: Recipe, stage: Stage, part: str) -> tuple[str, Recipe] | None:
    """Return a setting that makes a part of a stage's memory about half as much, and the recipe with it."""
    settings = recipe.settings
    changes: dict[str, Any] = {}
    if stage.name == "mask":
        if part == "sums" and not recipe.mask.offload:
            changes = {"offload": True}
        elif part == "activations":
            half = {"batch_size": recipe.mask.batch_size // 2} if recipe.mask.batch_size > 1 else {}
            changes = half if recipe.mask.recompute else {"recompute": True}
        if changes:
            (name, value), *_ = changes.items()
            return f"mask.{name}={_plain(value)}", replace(recipe, mask=replace(recipe.mask, **changes))
    if not isinstance(settings, Training):
        return None
    able = METHODS.find(recipe.method).bf16_weights
    if part in ("weights", "copies") and settings.weights == "fp32" and able:
        changes = {"weights": "bf16"}
    elif part == "optimizer" and settings.state != "8bit":
        changes = {"state": "bf16" if settings.state == "fp32" else "8bit"}
    elif part == "activations":
        half = {"batch_size": settings.batch_size // 2} if settings.batch_size > 1 else {}
        changes = half if settings.recompute else {"recompute": True}
    elif part == "gradients" and settings.accumulation > 1:
        changes = {"accumulation": 1}
    if not changes:
        return None
    (name, value), *_ = changes.items()
    return f"{name}={_plain(value)}", with_settings(recipe, **changes)


def of_time(recipe: Recipe, found: Expected) -> str:
    """Say which stage of the run takes the most time, and what halves it."""
    run = [stage for stage in found.stages if stage.name != "evaluation" and stage.operations]
    if not run:
        return "It takes seconds."
    longest = max(run, key=found.seconds)
    share = found.seconds(longest) / sum(map(found.seconds, run))
    steps = getattr(recipe.settings, "steps", 1)
    half = {
        "data": f"data.steps={max(1, recipe.data.steps // 2)}",
        "mask": f"data.forget={max(1, recipe.data.forget // 2)}",
        "training": f"steps={max(1, steps // 2)}",
    }[longest.name]
    return f"The {longest.name} takes {share:.0%} of the run's time; {half} halves it."


def _plain(value: object) -> str:
    return str(value).lower()
