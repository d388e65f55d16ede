"""SPM, concept semi-permeable membranes (Lyu et al., CVPR 2024, arXiv 2312.16145)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from erase_concept.data import ForgetRetain, draw
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.methods.esd import PartwayTraining, partway
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator
from erase_concept.settings import described, settings
from erase_concept.training.adapters import Adapters
from erase_concept.training.loop import Record, TargetProgress, Tensors, train

_CODE = "the authors' code"


@settings
class SPMSettings(PartwayTraining):
    """SPM's settings."""

    steps: Annotated[int, described(source=_CODE)] = 3000
    lr: Annotated[float, described(source=_CODE)] = 1e-4
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adamw"
    weight_decay: Annotated[float, described(source=_CODE)] = 0.01
    warmup: Annotated[int, described(source=_CODE)] = 500
    decay: Annotated[bool, described(source="the authors' code, with one cosine for their three")] = True
    sampling_steps: Annotated[int, described(source=_CODE)] = 30
    anchoring: Annotated[float, described("Weight of the loss on retained prompts, lambda.", ge=0, source=_CODE)] = (
        1000.0
    )
    anchors: Annotated[int, described("Retained prompts for each row.", ge=1, source=_CODE)] = 4


def _memory(settings: SPMSettings) -> tuple[Phase, ...]:
    """Hold no copy: the adapters are small, and without them the UNet is the base model's."""
    rows, again = settings.batch_size, settings.batch_size * settings.anchors
    return (Phase(frozen=max(2 * rows, again), trained=rows + again, adapters=True),)


@method(
    "spm",
    SPMSettings,
    summary="Trains rank-one adapters that remove the concept alone, and adds them to the weights.",
    title="SPM",
    paper="arXiv 2312.16145",
    trains="rank-one adapters of the attention blocks",
    latents=(),
    memory=_memory,
)
def spm(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: SPMSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record | TargetProgress]:
    """Train rank-one adapters that erase the concept and leave everything else alone, and add them to the weights.

    Minimises  E |e(x_t, c) - (e*(x_t, c') - eta (e*(x_t, c) - e*(x_t, c')))|^2
             + lambda E |e(x_t, c_r) - e*(x_t, c_r)|^2  over the adapters, with the base model e*, the concept's prompt
    c, the same prompt for the anchor c', and x_t sampled by the current model from c. Latent anchoring: c_r is drawn
    with a probability that falls with its similarity to c, 1 - |cos(c, c_r)|. The paper draws c_r from all embeddings,
    and the authors' code from noise; here they are the retained prompts. The authors' adapters can depend on the
    prompt; added to the weights they cannot. The learning rate falls along one cosine, where their code has three.
    """
    adapters = Adapters(model.unet, mask, stage_generator(seed, "adapters"), model.family.layers)

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        which = draw(len(data.forget), settings.batch_size, generator)
        concept, anchor = data.forget[which].to(model.device), data.remap[0, which].to(model.device)
        noisy, timesteps = partway(model, data, concept, settings, generator)
        unlike = 1 - cosine_similarity(data.forget[which].flatten(1)[:, None], data.retain.flatten(1), dim=-1).abs()
        drawn = torch.multinomial(unlike.clamp(min=1e-6), settings.anchors, replacement=True, generator=generator)
        retained = data.retain[drawn.flatten()].to(model.device)
        again, times = (each.repeat_interleave(settings.anchors, 0) for each in (noisy, timesteps))
        with torch.no_grad(), adapters.off():
            target = model.cfg(noisy, timesteps, concept, anchor, -settings.eta)
            retain_target = model.predict(again, times, retained)
        predicted = model.predict(
            torch.cat([noisy, again]), torch.cat([timesteps, times]), torch.cat([concept, retained])
        )
        forget, retain = mse_loss(predicted[: len(noisy)], target), mse_loss(predicted[len(noisy) :], retain_target)
        return forget + settings.anchoring * retain, {"forget": forget, "retain": retain}

    with adapters.attached():
        yield from train(model.with_components(unet=adapters), loss, None, settings, seed=seed, checkpoint=checkpoint)
    adapters.fuse()
