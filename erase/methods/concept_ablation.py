"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain
from erase_concept.errors import RequestError
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.families.family import Layers
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS
from erase_concept.pipelines.model import Diffusion
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

if TYPE_CHECKING:
    from erase_concept.recipe import Recipe

_CODE = "the authors' code"


@settings
class ConceptAblationSettings(Training):
    """Concept Ablation's settings, those of its styles and objects."""

    steps: Annotated[int, described(source=_CODE)] = 100
    lr: Annotated[float, described(source="the authors' code: 2e-6 times 4 rows on 2 GPUs")] = 1.6e-5
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adamw"
    weight_decay: Annotated[float, described(source=_CODE)] = 0.01
    alpha: Annotated[
        float,
        described(
            "Weight of the loss on pictures of the anchor, the paper's lambda; 0 for a style.", ge=0, source=_CODE
        ),
    ] = 0.0
    detach_start_token: Annotated[
        bool, described("Let no gradient through the start token's keys and values.", source=_CODE)
    ] = True


def _check(recipe: Recipe) -> None:
    """Refuse a recipe without pictures of the anchor."""
    if not recipe.data.anchor:
        raise RequestError("data.anchor", 0, f"must be at least 1: {recipe.method} learns from pictures of the anchor")


def _memory(settings: ConceptAblationSettings) -> tuple[Phase, ...]:
    """Make the target without gradient, then one pass with it."""
    return (Phase(frozen=settings.batch_size, trained=settings.batch_size * (2 if settings.alpha else 1)),)


def _memory_noise(settings: ConceptAblationSettings) -> tuple[Phase, ...]:
    return (Phase(trained=settings.batch_size * (2 if settings.alpha else 1)),)


@method(
    "concept-ablation",
    ConceptAblationSettings,
    summary="Gives the concept's prompts the anchor's own prediction, on pictures of the anchor.",
    title="Concept Ablation",
    paper="arXiv 2303.13516",
    trains="the keys and values of cross-attention",
    latents=("anchor",),
    scope="keys-and-values",
    text_encoder=True,
    memory=_memory,
    check=_check,
    bf16_weights=True,
    sharded=True,
)
def concept_ablation(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ConceptAblationSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Fit the prediction for the concept's prompts to that for the anchor's, on pictures of the anchor.

    Minimises  E |e(x_t, c) - sg e(x_t, c')|^2 + lambda E |e(x'_t, c') - noise|^2,  with the concept's prompt c, the
    same prompt for the anchor c', noisy latents x_t and x'_t of the anchor, and no gradient through sg. This is the
    paper's model-based variant. The target is the current model's; where only keys and values are trained, it stays
    near the base model's. The start token is in every prompt, so no gradient goes through its keys and values. With
    the scope "text-encoder" it is the paper's embedding variant: only the token embeddings of the name's own tokens
    are trained, at a learning rate of their own.
    """
    yield from _ablate(model, data, mask, settings, seed, checkpoint, noise_based=False)


@method(
    "concept-ablation-noise",
    ConceptAblationSettings,
    summary="Trains the concept's prompts on pictures of the anchor, as if they showed the concept.",
    title="Concept Ablation, noise-based",
    paper="arXiv 2303.13516",
    trains="the keys and values of cross-attention",
    latents=("anchor",),
    scope="keys-and-values",
    text_encoder=True,
    memory=_memory_noise,
    check=_check,
    bf16_weights=True,
    sharded=True,
)
def concept_ablation_noise(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ConceptAblationSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Train the concept's prompt on pictures of the anchor, as if they showed the concept.

    Minimises  E |e(x_t, c) - noise|^2 + lambda E |e(x'_t, c') - noise'|^2,  with the symbols of ``concept_ablation``.
    This is the paper's noise-based variant.
    """
    yield from _ablate(model, data, mask, settings, seed, checkpoint, noise_based=True)


def _ablate(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ConceptAblationSettings,
    seed: int,
    checkpoint: Path | None,
    *,
    noise_based: bool,
) -> Iterator[Record | TargetProgress]:
    if not len(data.anchor_latents):
        raise RequestError("data.anchor", 0, "must be at least 1: the method learns from pictures of the anchor")

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        rows = data.draw_forget(settings.batch_size, generator, "anchor")
        ids, first = data.forget_ids[data.prompts_of_rows[rows]], data.forget_batch(model, rows, generator)
        embedded = mask is not None and model.part_of(mask.shapes) == "text_encoder"
        concept = model.encode_ids([ids.to(model.device)]) if embedded else first.embeddings
        with torch.no_grad():
            if noise_based:
                target = model.target(first.latents, first.noise, first.timesteps)
            else:
                target = model.predict(first.noisy, first.timesteps, first.remapped)
        if not settings.alpha:
            forget = mse_loss(model.predict(first.noisy, first.timesteps, concept), target)
            return forget, {"forget": forget}
        second = data.forget_batch(model, data.draw_forget(settings.batch_size, generator, "anchor"), generator)
        predicted = model.predict(
            torch.cat([first.noisy, second.noisy]),
            torch.cat([first.timesteps, second.timesteps]),
            torch.cat([concept, second.remapped]),
        )
        forget = mse_loss(predicted[: len(target)], target)
        anchor = mse_loss(predicted[len(target) :], model.target(second.latents, second.noise, second.timesteps))
        return forget + settings.alpha * anchor, {"forget": forget, "anchor": anchor}

    # Around the whole training, for activations that are computed anew in the backward pass.
    detached = start_token_detached(model.unet, model.family.layers) if settings.detach_start_token else nullcontext()
    with detached:
        yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)


@contextmanager
def start_token_detached(unet: nn.Module, layers: Layers = UNET_LAYERS) -> Iterator[None]:
    """Let no gradient through the keys and values of the first token, in every cross-attention of a UNet."""

    def detach(layer: nn.Module, given: object, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1].detach(), out[:, 1:]], 1)

    found = [layer for name, layer in unet.named_modules() if layers.is_key_or_value(f"{name}.weight")]
    hooks = [layer.register_forward_hook(detach) for layer in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
