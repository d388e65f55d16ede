"""ESD, erased stable diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers import PNDMScheduler
from torch import Tensor
from torch.nn.functional import mse_loss

from erase_concept.data import ForgetRetain, draw_evenly
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.model import Diffusion
from erase_concept.pipelines.sample import Sampling, make_scheduler, sample_latents
from erase_concept.settings import described, settings
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_CODE = "the authors' first code"


@settings
class PartwayTraining(Training):
    """Settings of methods that learn on latents which the current model has sampled part of the way."""

    batch_size: Annotated[int, described("Rows in a step.", source=_CODE)] = 1
    eta: Annotated[
        float, described("How far the target lies beyond the anchor, away from the concept.", ge=0, source=_CODE)
    ] = 1.0
    start_guidance: Annotated[
        float, described("Guidance scale of the sampling that makes the noisy latents.", ge=0, source=_CODE)
    ] = 3.0
    sampling_steps: Annotated[
        int, described("Steps of that sampling, of which a random number is taken.", ge=1, source=_CODE)
    ] = 50


@settings
class ESDSettings(PartwayTraining):
    """ESD's settings."""

    steps: Annotated[int, described(source=_CODE)] = 1000
    lr: Annotated[float, described(source=_CODE)] = 1e-5
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adam"
    sampled_by: Annotated[
        Literal["current", "base"],
        described(
            "The model that samples the noisy latents: as it is by now, or the base model.",
            source=f"{_CODE}; their later code samples with the base model",
        ),
    ] = "current"
    scheduler: Annotated[
        Literal["DDIMScheduler", "PNDMScheduler"],
        described(
            "The scheduler of that sampling.", source=f"{_CODE}; their later code takes the model's own, SD 1.x's PNDM"
        ),
    ] = "DDIMScheduler"


def _memory(settings: ESDSettings) -> tuple[Phase, ...]:
    """Hold a copy of the base model's UNet, and sample with guidance up to a random step: half of them on average."""
    rows = settings.batch_size
    return (Phase(frozen=2 * rows, trained=rows, sampled=settings.sampling_steps * rows, copies=1),)


@method(
    "esd-full",
    ESDSettings,
    summary="Guides the concept's prediction away from the concept, in all weights.",
    title="ESD-full",
    paper="arXiv 2303.07345",
    latents=(),
    bf16_weights=True,
    memory=_memory,
)
@method(
    "esd-u",
    ESDSettings,
    summary="Guides the concept's prediction away from the concept, in all but cross-attention.",
    title="ESD-u",
    paper="arXiv 2303.07345",
    trains="all but cross-attention, the time embedding and the last layers",
    latents=(),
    scope="noxattn",
    bf16_weights=True,
    memory=_memory,
)
@method(
    "esd-x",
    ESDSettings,
    summary="Guides the concept's prediction away from the concept, in cross-attention.",
    title="ESD-x",
    paper="arXiv 2303.07345",
    trains="cross-attention",
    latents=(),
    scope="cross-attention",
    bf16_weights=True,
    memory=_memory,
)
def esd(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: ESDSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Guide the concept's prediction away from it: esd-x in cross-attention, esd-u in all else, esd-full everywhere.

    Minimises  E |e(x_t, c) - (e*(x_t, 0) - eta (e*(x_t, c) - e*(x_t, 0)))|^2  with the frozen base model e* and the
    empty prompt 0. The current model samples x_t from the concept's prompt c, in the authors' later code the base
    model. That code writes the target as e*(x_t, c) - 2 (e*(x_t, c) - e*(x_t, 0)), which is the one above for eta = 1.
    The formula holds for velocities too, since the target's weights sum to one. esd-u trains everything but
    cross-attention, and as the authors' first code not the time embedding and the last layers: the scope noxattn. Of
    several concepts a step takes one at random, as theirs does with several names.
    """
    # A second UNet in memory: x_t is not known before the current model makes it, so no target can be precomputed.
    base = model.with_components(unet=copy.deepcopy(model.unet))
    uncond = data.uncond.to(model.device)

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        concept = data.forget[draw_evenly(data.forget_parts, settings.batch_size, generator)].to(model.device)
        sampler = model if settings.sampled_by == "current" else base
        noisy, timesteps = partway(sampler, data, concept, settings, generator, scheduler=settings.scheduler)
        with torch.no_grad():
            target = base.cfg(noisy, timesteps, concept, uncond, -settings.eta)
        forget = mse_loss(model.predict(noisy, timesteps, concept), target)
        return forget, {"forget": forget}

    yield from train(model, loss, mask, settings, seed=seed, checkpoint=checkpoint)


def partway(
    model: Diffusion,
    data: ForgetRetain,
    embeddings: Tensor,
    settings: PartwayTraining,
    generator: torch.Generator,
    *,
    scheduler: str = "DDIMScheduler",
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample with guidance (DDIM, arXiv 2010.02502) up to a random step, the same for all rows of the batch.

    Returns the noisy latents [n, 4, h, w], of the size of the data's or of a height and width in pixels, and their time
    steps [n].
    """
    if scheduler == "PNDMScheduler":  # as Stable Diffusion's own configuration has it
        own = PNDMScheduler.from_config(model.scheduler.config, skip_prk_steps=True)
        model = model.with_components(scheduler=own)
    stop = int(torch.randint(0, settings.sampling_steps, (1,), generator=generator))
    seeds = torch.randint(0, 2**62, (len(embeddings),), generator=generator).tolist()
    height, width = (side * model.factor for side in data.forget_latents.shape[-2:])
    noisy = sample_latents(
        model,
        embeddings,
        data.uncond.to(model.device),
        seeds,
        [settings.start_guidance] * len(seeds),
        Sampling(steps=settings.sampling_steps, scheduler=scheduler),
        size=size or (height, width),
        stop=stop,
    )
    timestep = make_scheduler(model, scheduler, settings.sampling_steps).timesteps[stop]
    return noisy, timestep.to(model.device).expand(len(noisy))
