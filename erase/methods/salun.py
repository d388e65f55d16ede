"""SalUn, saliency unlearning (Fan, Liu et al., ICLR 2024, arXiv 2310.12508)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.closed_form import concept_tokens, edit, matrices
from erase_concept.data import Batch, ForgetRetain, Remap, draw
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.methods.mace import MACEConfig
from erase_concept.pipelines.model import Diffusion
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train


@dataclass(frozen=True)
class SalUnConfig(Training):
    """SalUn's settings beside those of the training."""

    alpha: float = 0.5  # weight of the retain term
    remap: Remap = "anchor"  # c' is the anchor, a random retained name for each row, or the empty prompt
    target: Literal["current", "base"] = "current"  # which model predicts the forget target
    retain_target: Literal["data", "base"] = "data"  # the noise itself, or what the base model predicts of it
    guidance: float = 0.0  # how far the target goes on beyond c', away from the concept
    start: Literal["base", "closed-form"] = "base"  # the base model's weights, or MACE's solution over the mask
    erase_scale: float = 8.0  # of that solution, shared by all concepts; its other settings are MACE's own

    def __post_init__(self) -> None:
        """Raise ValueError that names the first setting out of its range."""
        super().__post_init__()
        for name in ("alpha", "guidance", "erase_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.guidance and self.target != "base":
            # The current model's own prediction, pushed on and on, would have no end.
            raise ValueError("guidance needs target=base")


@method("salun", SalUnConfig, latents=("forget", "anchor", "retain"), mask="salient")
def salun(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    config: SalUnConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Remap the concept's noise prediction to another prompt's, on the salient weights alone.

    Minimises  E |e(x_t, c_f) - e'(x_t, c')|^2 + alpha * E |e(x_r,t, c_r) - noise|^2  over the weights of the mask, with
    the same noisy latents x_t in both predictions of the first term, and no gradient through the second one, e'.
    e' is the current model, as in the reference, or the frozen base model. With ``retain_target`` "base" the noise in
    the second term is replaced by the base model's prediction of it, whose gradient vanishes while nothing has moved.
    With ``guidance`` w > 0 the first term's target is e'(x_t, c') + w (e'(x_t, c') - e'(x_t, c_f)), ESD's negative
    guidance (arXiv 2303.07345) from c' instead of the empty prompt: a fit always stops short of its target, and what
    is left of the concept would be multiplied by the guidance scale of the sampling.
    With ``start`` "closed-form" the training begins where MACE's closed form (arXiv 2403.06135), over the same mask,
    leaves cross-attention's keys and values: it takes the concept out of the words behind its name at once, and steps
    are needed only for what it leaves. Where the mask has none of them, the training begins at the base model.
    Without a mask this is random labelling.
    """

    def rows(model: Diffusion, generator: torch.Generator) -> tuple[Batch, Batch]:
        drawn = data.draw_forget(config.batch_size, generator)
        forget = data.forget_batch(model, drawn, generator, remap=config.remap)
        return forget, data.retain_batch(model, draw(len(data.retain_latents), config.batch_size, generator), generator)

    def remapped(model: Diffusion, forget: Batch) -> Tensor:
        target = model.predict(forget.noisy, forget.timesteps, forget.remapped)
        if config.guidance:
            concept = model.predict(forget.noisy, forget.timesteps, forget.embeddings)
            target = target + config.guidance * (target - concept)
        return target

    def precompute(model: Diffusion, generator: torch.Generator) -> Tensors:
        forget, retain = rows(model, generator)
        known: Tensors = (remapped(model, forget),) if config.target == "base" else ()
        if config.retain_target == "base":
            known += (model.predict(retain.noisy, retain.timesteps, retain.embeddings),)
        return known

    def loss(model: Diffusion, generator: torch.Generator, known: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        forget, retain = rows(model, generator)
        if config.target == "base":
            target = known[0]
        else:
            with torch.no_grad():
                target = remapped(model, forget)
        if config.retain_target == "base":
            retained = known[-1]
        else:
            retained = model.target(retain.latents, retain.noise, retain.timesteps)
        predicted = model.predict(
            torch.cat([forget.noisy, retain.noisy]),
            torch.cat([forget.timesteps, retain.timesteps]),
            torch.cat([forget.embeddings, retain.embeddings]),
        )
        forget_loss = mse_loss(predicted[: len(target)], target)
        retain_loss = mse_loss(predicted[len(target) :], retained)
        return forget_loss + config.alpha * retain_loss, {"forget": forget_loss, "retain": retain_loss}

    def closed_form(model: Diffusion) -> None:
        if mask is None or any(mask.dense(name).any() for name in matrices(model.unet)):
            becomes: Literal["anchor", "empty"] = "empty" if config.remap == "empty" else "anchor"
            # A mean over concepts, as the steps' loss is: a sum of many would drown what is to be preserved.
            scale = config.erase_scale / (int(data.forget_parts.max()) + 1)
            edit(model, data, mask, MACEConfig(scale), *concept_tokens(model, data, becomes, name=False))

    fixed = precompute if "base" in (config.target, config.retain_target) else None
    start = closed_form if config.start == "closed-form" else None
    yield from train(model, loss, mask, config, seed=seed, checkpoint=checkpoint, precompute=fixed, start=start)
