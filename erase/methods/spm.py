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
from erase_concept.training.adapters import Adapters, in_transformers
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
    decay: Annotated[bool, described(source=_CODE)] = True
    cycles: Annotated[int, described(source=_CODE)] = 3
    sampling_steps: Annotated[int, described(source=_CODE)] = 30
    anchoring: Annotated[float, described("Weight of the loss on anchors, lambda.", ge=0, source=_CODE)] = 1000.0
    anchors: Annotated[int, described("Anchors for each row: what is to be left alone.", ge=1, source=_CODE)] = 4
    anchors_from: Annotated[
        Literal["noise", "retain"],
        described("What anchors are: noise in the place of a prompt, or retained prompts.", source=_CODE),
    ] = "noise"
    vary_size: Annotated[
        bool,
        described(
            "Sample each step at a height and a width of its own, from half to seven eighths of the images' side.",
            source=_CODE,
        ),
    ] = True
    strength: Annotated[
        float,
        described("How many times the trained change is added to the weights.", gt=0, source="the authors' code, 1"),
    ] = 1.0


def _memory(settings: SPMSettings) -> tuple[Phase, ...]:
    """Hold no copy: the adapters are small, and without them the UNet is the base model's. Sample as ESD does.

    Sizes that vary take less.
    """
    rows, again = settings.batch_size, settings.batch_size * settings.anchors
    sampled = settings.sampling_steps * rows
    return (Phase(frozen=max(2 * rows, again), trained=rows + again, sampled=sampled, adapted=in_transformers()),)


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
    c, the same prompt for the anchor c' (in the authors' presets the empty prompt), and x_t sampled by the current
    model from c. Latent anchoring: c_r stands for what is to be left alone. In the authors' code it is noise, see
    ``noise_like``; it can be a retained prompt too, drawn with a probability that falls with its similarity to c,
    1 - |cos(c, c_r)|. The authors' adapters can depend on the prompt; added to the weights they cannot.
    """
    layers = in_transformers(model.family.layers)
    adapters = Adapters(model.unet, mask, stage_generator(seed, "adapters"), layers)

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        which = draw(len(data.forget), settings.batch_size, generator)
        concept, anchor = data.forget[which].to(model.device), data.remap[0, which].to(model.device)
        size = varied_size(model, data, generator) if settings.vary_size else None
        noisy, timesteps = partway(model, data, concept, settings, generator, size=size)
        if settings.anchors_from == "noise":
            repeated = data.forget[which].repeat_interleave(settings.anchors, 0)
            anchors = noise_like(repeated, model.tokenizer.model_max_length, generator)
        else:
            unlike = 1 - cosine_similarity(data.forget[which].flatten(1)[:, None], data.retain.flatten(1), dim=-1).abs()
            drawn = torch.multinomial(unlike.clamp(min=1e-6), settings.anchors, replacement=True, generator=generator)
            anchors = data.retain[drawn.flatten()]
        retained = anchors.to(model.device)
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
    adapters.fuse(settings.strength)


def noise_like(embeddings: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Draw noise in the place of embedded prompts [n, tokens, width]: anchors that are no prompt, of the same shape.

    It has a random direction, which is drawn anew with a probability of its similarity to the prompt, and 0.8 to 1.2
    times the prompt's norm. Behind the first ``length`` tokens comes XL's embedding of the whole prompt, which has
    noise of its own; where that is filled up with zeros it stays zero.
    """
    parts = [one for one in (embeddings[:, :length], embeddings[:, length:]) if one.shape[1]]
    return torch.cat([torch.stack([_noise_like(row, generator) for row in part]) for part in parts], dim=1)


def _noise_like(embedding: Tensor, generator: torch.Generator) -> Tensor:
    while True:
        noise = torch.randn(embedding.shape, generator=generator) * (embedding != 0)
        alike = float(cosine_similarity(noise.flatten(), embedding.flatten(), dim=0))
        if float(torch.rand((), generator=generator)) < 1 - alike:
            break
    length = 0.8 + 0.4 * float(torch.rand((), generator=generator))
    return length * embedding.norm() * noise / noise.norm()


def varied_size(model: Diffusion, data: ForgetRetain, generator: torch.Generator) -> tuple[int, int]:
    """Draw a height and a width in pixels: 4 to 7 eighths of the data's, rounded down to what the UNet can halve.

    For 512 pixels these are 256, 320, 384 and 448, as in the authors' code.
    """
    unit = model.factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    eighths = torch.randint(4, 8, (2,), generator=generator).tolist()
    height, width = (
        max(unit, side * model.factor * n // 8 // unit * unit)
        for side, n in zip(data.forget_latents.shape[-2:], eighths, strict=True)
    )
    return height, width
