"""SPM, concept semi-permeable membranes (Lyu et al., CVPR 2024, arXiv 2312.16145)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from erase_concept.data import ForgetRetain, draw
from erase_concept.masks.mask import Mask
from erase_concept.method import method
from erase_concept.methods.esd import PartwayTraining, partway
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator
from erase_concept.training.adapters import Adapters
from erase_concept.training.loop import Record, TargetProgress, Tensors, train


@dataclass(frozen=True)
class SPMSettings(PartwayTraining):
    """SPM's settings."""

    steps: int = 3000
    lr: float = 1e-4
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 0.01
    warmup: int = 500
    decay: bool = True
    sampling_steps: int = 30
    anchoring: float = 1000.0  # lambda, weight of the latent anchoring
    anchors: int = 4  # retained prompts for each row

    def __post_init__(self) -> None:
        """Raise ValueError that names the first setting out of its range."""
        super().__post_init__()
        if not 0 <= self.anchoring < math.inf:
            raise ValueError(f"anchoring must be at least 0, not {self.anchoring}")
        if self.anchors < 1:
            raise ValueError(f"anchors must be at least 1, not {self.anchors}")


@method(
    "spm",
    SPMSettings,
    summary="Trains rank-one adapters that remove the concept alone, and adds them to the weights.",
    title="SPM",
    paper="arXiv 2312.16145",
    trains="rank-one adapters of the attention blocks",
    latents=(),
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
    """Train one-dimensional adapters that erase the concept and leave all else alone, and fuse them into the UNet.

    Minimises  E |e(x_t, c) - (e*(x_t, c') - eta (e*(x_t, c) - e*(x_t, c')))|^2
             + lambda E |e(x_t, c_r) - e*(x_t, c_r)|^2  over the adapters, with the base model e*, the concept's prompt
    c, the same prompt said of the anchor c', x_t sampled by the current model from c, and c_r drawn with a probability
    that falls with its likeness to c, 1 - |cos(c, c_r)|: latent anchoring. The paper draws c_r from all embeddings,
    where its authors' code takes noise; here they are the prompts to be retained. Their adapters' strength can depend
    on the prompt; fused into the weights it cannot. The rate falls along one cosine, where their code takes three.
    """
    adapters = Adapters(model.unet, mask, stage_generator(seed, "adapters"))

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
            kept = model.predict(again, times, retained)
        predicted = model.predict(
            torch.cat([noisy, again]), torch.cat([timesteps, times]), torch.cat([concept, retained])
        )
        forget, retain = mse_loss(predicted[: len(noisy)], target), mse_loss(predicted[len(noisy) :], kept)
        return forget + settings.anchoring * retain, {"forget": forget, "retain": retain}

    with adapters.attached():
        yield from train(replace(model, unet=adapters), loss, None, settings, seed=seed, checkpoint=checkpoint)
    adapters.fuse()
