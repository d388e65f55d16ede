"""The mask of a recipe: its kind, its scope, its sparsity."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.errors import RequestError
from erase_concept.files import file_sha256
from erase_concept.image_folders import hashes_of_images
from erase_concept.make_data import check_data, data_key, make_data_for
from erase_concept.masks.choose import MASK_KINDS, choose
from erase_concept.masks.mask import Mask
from erase_concept.masks.saliency import accumulate, forgetting_loss
from erase_concept.methods import METHODS
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.pipelines.processes import from_main, processes, same_for_all
from erase_concept.pipelines.progress import progress
from erase_concept.prompts.find import ConceptSource
from erase_concept.recipe import Recipe, in_low_precision, recipe_for
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.tokens import own_tokens
from erase_concept.training.bf16 import in_bf16


def check_mask(recipe: Recipe) -> Mask | None:
    """Refuse a mask that cannot be made; return the one of a file, where the recipe names a file.

    Raises RequestError for a scope that the method does not have and for a file that holds no usable mask.
    """
    check_scope(recipe)
    if recipe.mask.kind in MASK_KINDS:
        return None
    given = Mask.load(Path(recipe.mask.kind))
    if given.count == 0:
        raise RequestError("mask.kind", recipe.mask.kind, "allows no weight to change")
    return given


def check_scope(recipe: Recipe) -> None:
    """Raise RequestError when the recipe's method cannot be confined to its scope."""
    scope, scopes = recipe.mask.scope, ", ".join(masks.SCOPES)
    if scope == masks.TEXT_ENCODER:
        able = [name for name, one in METHODS.all().items() if one.text_encoder]
        if recipe.method not in able:
            raise RequestError("mask.scope", scope, f"goes with {' and '.join(able)}; allowed: {scopes}")
        if recipe.mask.kind != "none":
            allowed = "the scope text-encoder is the concept's own words; allowed: none"
            raise RequestError("mask.kind", recipe.mask.kind, allowed)
    elif scope not in masks.SCOPES:
        raise RequestError("mask.scope", scope, f"allowed: {scopes}, {masks.TEXT_ENCODER}")


def mask(
    model: Any,
    concept: ConceptSource,
    *,
    preset: str = "default",
    memory: str = "fast",
    seed: int = 0,
    **values: Any,
) -> Mask:
    """Return the mask that erasing these concepts from a model would use, without erasing them.

    ``model`` is a name, a path, a hub id or a loaded model or diffusers pipeline. ``concept`` and ``values`` are as in
    ``recipe_for``.
    """
    source, loaded = source_and_model(model)
    return compute_mask(recipe_for(source, concept, preset_name=preset, memory=memory, seed=seed, **values), loaded)


def source_and_model(model: Any) -> tuple[str, Diffusion | None]:
    """Return where a model comes from, and the model itself where it is a loaded one or a diffusers pipeline."""
    if isinstance(model, str | Path):
        return str(model), None
    loaded = model if isinstance(model, Diffusion) else load(model)
    return loaded.source, loaded


def compute_mask(recipe: Recipe, model: Diffusion | None = None) -> Mask:
    """Return the mask that a run of the recipe would use, without the run; ``model`` may give the loaded model.

    Raises RequestError when the recipe has no mask or it cannot be made.
    """
    check_data(recipe)
    given = check_mask(recipe)
    if not needs_mask(recipe):
        raise RequestError("mask.kind", recipe.mask.kind, "nothing to compute; allowed: salient, random, least-salient")
    model = model or load(recipe.model, ema=recipe.ema, keep_unet=in_low_precision(recipe))
    if given is not None:
        given.check(model.unet)
    base_hash, device = weights_hash(model.unet, torch.float32), next(model.vae.parameters()).device
    same_for_all("model", recipe.model, data_key(recipe, base_hash))
    with ExitStack() as held:
        if in_low_precision(recipe):  # as in the run
            base = Path(held.enter_context(TemporaryDirectory())) / "base.safetensors"
            save_file(model.unet.state_dict(), base)
            held.enter_context(in_bf16(model.unet, base, device))
        return make_mask(recipe, model, make_data_for(recipe, model, base_hash), base_hash)


def needs_mask(recipe: Recipe) -> bool:
    """Tell whether the recipe keeps any weight from changing."""
    return (recipe.mask.kind, recipe.mask.scope) != ("none", "full")


def cached_mask(recipe: Recipe, model: Diffusion, data: ForgetRetain, base_hash: str, file: Path) -> Mask | None:
    """Return the recipe's mask from a file; if there is none yet, make it and keep it there.

    ``base_hash`` is that of the model's UNet. Returns None where every weight may change.
    """
    if not needs_mask(recipe):
        return None
    if not from_main(file.exists):
        made = make_mask(recipe, model, data, base_hash)
        if processes().is_main_process:
            made.save(file)
    return from_main(lambda: Mask.load(file))


def mask_key(recipe: Recipe, base_hash: str) -> str:
    """Return the SHA-256 over all that the recipe's mask depends on."""
    kind, data = recipe.mask.kind, asdict(recipe.data)
    rows = {name: data[name] for name in data if name not in ("anchor", "retain", "retain_images")}
    rows |= hashes_of_images(recipe)
    file = "" if kind in MASK_KINDS else file_sha256(Path(kind))
    parts = [base_hash, recipe.concept.to_dict(), asdict(recipe.mask), file, rows, recipe.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def make_mask(recipe: Recipe, model: Diffusion, data: ForgetRetain, base_hash: str) -> Mask:
    """Compute a mask of the recipe's kind, scope and sparsity, with its provenance; of a file, the part in the scope.

    When several concepts are erased together, the sum of gradients over the rows of all ranks the weights. When
    ``combine`` is "union", each concept has a mask of that sparsity, and the result is their union.
    """
    settings = recipe.mask
    if settings.kind not in MASK_KINDS:
        return _in_scope(Mask.load(Path(settings.kind)), model, settings.scope)
    if settings.scope == masks.TEXT_ENCODER:
        made = masks.token_rows(model.text_encoder, own_tokens(model, recipe.concept))
    else:
        made = masks.expand_to(_unet_mask(recipe, model, data), model.unet)
    about = {
        "concept": recipe.concept.name,
        "kind": settings.kind,
        "scope": settings.scope,
        "sparsity": settings.sparsity,
        **({"combine": settings.combine} if recipe.concept.combined else {}),
        "accumulate": settings.accumulate,
        "guidance": settings.guidance,
        "seed": recipe.seed,
        "family": model.family.name,
        "base": base_hash,
        "recipe": recipe.fingerprint(),
    }
    return Mask(made.bits, made.shapes, {key: str(value) for key, value in about.items()})


def _in_scope(given: Mask, model: Diffusion, scope: str) -> Mask:
    if scope == "full":
        return given
    part = masks.expand_to(masks.all_ones(masks.in_scope(model.unet, scope, model.family.layers)), model.unet)
    return Mask((given & part).bits, given.shapes, given.provenance)


def _unet_mask(recipe: Recipe, model: Diffusion, data: ForgetRetain) -> Mask:
    """Return the mask of the recipe's kind and sparsity over the UNet's weights in its scope."""
    settings = recipe.mask
    shapes = masks.in_scope(model.unet, settings.scope, model.family.layers)
    if not shapes:
        raise RequestError("mask.scope", settings.scope, f"a {model.family.title} has no such layers")

    def found() -> Iterator[dict[str, Tensor]]:
        rows = torch.arange(len(data.forget_latents))
        groups = [rows]
        if settings.combine == "union":
            groups = [rows[data.parts_of_rows[rows] == part] for part in range(len(recipe.concept.parts))]
        return (saliency(recipe, model, data, group) for group in groups)

    return choose(settings.kind, settings.sparsity, shapes, found, stage_seed(recipe.seed, "mask"))


def saliency(recipe: Recipe, model: Diffusion, data: ForgetRetain, among: Tensor) -> dict[str, Tensor]:
    """Return the saliency of every UNet weight over the forget rows of these numbers, each seen ``passes`` times.

    Several processes share the batches, and each returns its share of every weight; see ``accumulate``.
    """
    settings = recipe.mask
    generator = stage_generator(recipe.seed, "saliency")
    uncond = data.uncond.to(model.device)

    def losses() -> Iterator[Any]:
        for _ in range(settings.passes):
            order = among[draw(len(among), len(among), generator)]
            for rows in order.split(settings.batch_size):
                batch = data.forget_batch(model, rows, generator)
                # Weighted by its rows, so that a smaller last batch counts for no more than it holds.
                share = len(rows) / len(order)
                yield lambda b=batch, share=share: share * forgetting_loss(model, b, uncond, settings.guidance)

    if settings.recompute:
        model.unet.enable_gradient_checkpointing()
    try:
        batches = settings.passes * math.ceil(len(among) / settings.batch_size)
        seen = progress(losses(), "mask", batches)
        return accumulate(model.unet, seen, settings.accumulate, offload=settings.offload, shared=True)
    finally:
        model.unet.disable_gradient_checkpointing()
