"""Checks a run's mask: that it is the noted one, and that it is one of the kind that the recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase_concept import masks
from erase_concept.errors import RequestError
from erase_concept.eval.verify.check import Check, failed
from erase_concept.eval.verify.weights import empty
from erase_concept.masks.choose import MASK_KINDS
from erase_concept.masks.make import needs_mask
from erase_concept.masks.mask import Mask
from erase_concept.masks.top_k import keep_count
from erase_concept.pipelines.load import ModelConfigs
from erase_concept.recipe import Recipe

MASK = "mask.safetensors"


def check_mask(run: Path, info: Mapping[str, Any]) -> tuple[Mask | None, list[Check]]:
    """Return a run's mask and the checks of it; None where every weight may change, or no mask can be read."""
    if info["mask"] is None:
        return None, []
    try:
        mask = Mask.load(run / MASK)
    except RequestError as problem:
        return None, [failed(MASK, MASK, problem.allowed)]
    if mask.sha256() != info["mask"]["sha256"]:
        return mask, [failed(MASK, MASK, "is not the mask of which the run's record has the hash")]
    if abs(mask.density - info["mask"]["density"]) > 1e-9:
        found = f"lets {mask.density:.4%} of the weights change, and the record says {info['mask']['density']:.4%}"
        return mask, [failed(MASK, MASK, found)]
    return mask, [
        Check(MASK, True, f"has the hash that was noted; {mask.count:,} of {mask.total:,} weights may change")
    ]


def check_asked(mask: Mask | None, recipe: Recipe, info: Mapping[str, Any], model: ModelConfigs) -> list[Check]:
    """Return a check that fails where a mask is not of the kind, scope and sparsity that the recipe asks for.

    Which weights of the scope a saliency would choose is not computed again.
    """
    what = "mask and recipe"
    if (info["mask"] is not None) != needs_mask(recipe):
        have = "no mask" if info["mask"] is None else "a mask"
        wanted = f"{recipe.mask.kind} in the scope {recipe.mask.scope}"
        return [failed(what, "run.json", f"has {have}, and the recipe asks for one of the kind {wanted}")]
    if mask is None:
        return []
    if info["mask"]["kind"] != recipe.mask.kind:
        kinds = f"{info['mask']['kind']}, the recipe says {recipe.mask.kind}"
        return [failed(what, "run.json", f"says that the mask is {kinds}")]
    if fault := _fault(mask, recipe, model):
        return [failed(what, MASK, fault)]
    return [Check(what, True, "has the recipe's scope and number of weights")]


def _fault(mask: Mask, recipe: Recipe, model: ModelConfigs) -> str:
    """Say what of a mask is not as its recipe asks; "" where all is."""
    scope, sparsity = recipe.mask.scope, recipe.mask.sparsity
    embedded = scope == masks.TEXT_ENCODER
    part = empty(model, "text_encoder" if embedded else "unet")
    ones = {_name(name): ones for name, (ones, _) in mask.layers().items() if ones}
    wanted = {_name(name): tuple(value.shape) for name, value in part.named_parameters()}
    if {_name(name): shape for name, shape in mask.shapes.items()} != wanted:
        return "is for other weights, or weights of other shapes, than the model has"
    if embedded:  # which rows are the concept's words depends on the tokenizer
        other = next((name for name in ones if not name.endswith("token_embedding.weight")), "")
        return f"lets {other} change, and the recipe's scope is the concept's words" if other else ""
    inside = masks.in_scope(part, scope, model.family.layers)
    total = sum(math.prod(shape) for shape in inside.values())
    if outside := sorted(ones.keys() - inside.keys()):
        return f"lets {outside[0]} change, which is not in the recipe's scope {scope}"
    if recipe.mask.kind not in MASK_KINDS:  # a file's, which may let any number change
        return ""
    least = total if recipe.mask.kind == "none" else keep_count(1 - sparsity, total)
    most = least * len(recipe.concept.combined) if recipe.mask.combine == "union" and recipe.concept.combined else least
    if not least <= mask.count <= max(most, least):
        return f"lets {mask.count:,} weights change; by the recipe's sparsity {sparsity:g} they are {least:,}"
    return ""


def _name(name: str) -> str:
    """Return a parameter's name without the prefix that transformers' versions give to CLIP's, or not."""
    return name.removeprefix("text_model.")
