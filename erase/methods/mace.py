"""MACE, mass concept erasure (Lu et al., CVPR 2024, arXiv 2403.06135): a closed form, adapters, and their fusion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from erase_concept.closed_form import (
    ClosedFormSettings,
    Demand,
    check_weights,
    concept_tokens,
    edit,
    matrices,
    minimise,
    retained_tokens,
)
from erase_concept.data import ForgetRetain, draw
from erase_concept.masks.mask import Mask
from erase_concept.method import Phase, method
from erase_concept.pipelines.families.stable_diffusion import UNET_LAYERS
from erase_concept.pipelines.model import Diffusion
from erase_concept.seed import stage_generator, stage_seed
from erase_concept.settings import described, settings
from erase_concept.training.adapters import Adapters
from erase_concept.training.attention import attention_maps, cross_attentions
from erase_concept.training.loop import Record, TargetProgress, Tensors, Training, train

_CODE = "the authors' code for single objects"


@settings
class MACESettings(ClosedFormSettings, Training):
    """MACE's settings: of both closed forms, and of the adapters' training between them."""

    preserve_scale: Annotated[
        float, described("Weight of all tokens of the retained prompts in the first part.", ge=0, source=_CODE)
    ] = 0.0
    fuse_preserve_scale: Annotated[
        float, described("Weight of all tokens of the retained prompts in the fusion.", ge=0, source=_CODE)
    ] = 0.0
    ridge: Annotated[float, described(source=_CODE)] = 1000.0
    tokens: Annotated[
        Literal["around-name", "behind-name"],
        described("Tokens of the first part: all but the name's own, or those behind the name.", source=_CODE),
    ] = "around-name"
    lora: Annotated[
        bool, described("Train adapters against the name's own tokens and fuse them, or leave it at the first part.")
    ] = True
    importance: Annotated[
        bool,
        described("Draw time steps from 200 to 400 above all, where an image gets its content.", source=_CODE),
    ] = True
    steps: Annotated[int, described("Training steps of each concept's adapters.", ge=1, source=_CODE)] = 50
    batch_size: Annotated[int, described("Forget rows in a step.", ge=1, source=_CODE)] = 1
    lr: Annotated[float, described(source=_CODE)] = 1e-5
    optimizer: Annotated[Literal["adam", "adamw"], described(source=_CODE)] = "adamw"
    weight_decay: Annotated[float, described(source=_CODE)] = 0.01
    max_grad_norm: Annotated[float | None, described(source=_CODE)] = 1.0

    def logged_steps(self, concepts: int) -> int:
        """Return the steps of all concepts' adapters, or one where there are none."""
        return concepts * self.steps if self.lora else 1


def _memory(settings: MACESettings) -> tuple[Phase, ...]:
    """Hold no copy of the UNet: the adapters are small, and so are the matrices that they change."""
    return (Phase(trained=settings.batch_size if settings.lora else 0, adapted=UNET_LAYERS.is_key_or_value),)


@method(
    "mace",
    MACESettings,
    summary="Takes the concept out of the tokens around its name, trains adapters against the name, and fuses them.",
    title="MACE",
    paper="arXiv 2403.06135",
    trains="keys and values of cross-attention",
    latents=("forget",),
    scope="cross-attention",
    tuned_setting="erase_scale",
    memory=_memory,
    check=check_weights,
)
def mace(
    model: Diffusion,
    data: ForgetRetain,
    mask: Mask | None,
    settings: MACESettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Record]:
    """Take the concept out of the tokens around its name, train adapters against the name itself, and fuse them.

    1. A closed form over every key and value matrix of cross-attention, for all concepts together. It minimises
       sum |W e_f - W0 e_g|^2 + l sum |W e_p - W0 e_p|^2 + ridge |W - W0|^2  with the tokens e_f around the name in the
       concept's prompts, end tokens and padding included, the same words' tokens e_g in the anchor's prompts, and all
       tokens e_p of the retained prompts.
    2. For each concept, on top of that, changes D_i of rank one of the same matrices. They minimise
       E sum |A|  over all cross-attentions, A being the attention of x_t, which shows the concept, to the name's own
       tokens and to the end tokens. Time steps have the density  s(0.05 (t - 200)) - s(0.05 (t - 400)),  s the sigmoid.
    3. A closed form again. With W1 of the first part it minimises
       sum_i sum |W e - (W1 + D_i) e|^2 + l' sum |W e_p - W0 e_p|^2 + ridge |W - W1|^2  over all tokens e of concept i's
       prompts.

    The authors mask A to where a detector finds the concept; here the whole image counts. With a mask of weights each
    part is over its weights alone. The adapters of several concepts are trained one after the other, each with a
    checkpoint of its own.
    """
    began = time.perf_counter()
    layers = model.family.layers
    base = {name: weight.detach().clone() for name, weight in matrices(model.unet, layers).items()}
    kept = retained_tokens(model, data)
    loss, terms = edit(model, data, mask, settings, *concept_tokens(model, data, settings.tokens), kept)
    if not settings.lora:
        yield Record(1, 1, loss, terms, 0.0, time.perf_counter() - began)
        return
    demands = {"preserve": Demand(kept, kept, settings.fuse_preserve_scale, base)}
    count = int(data.forget_parts.max()) + 1
    for part in range(count):
        own = seed if part == 0 else stage_seed(seed, "concept", part)
        adapters = Adapters(model.unet, mask, stage_generator(own, "adapters"), layers.is_key_or_value, down="normal")
        file = checkpoint and checkpoint.with_stem(checkpoint.stem + (f"-{part}" if part else ""))
        for event in _train(model, data, adapters, part, settings, seed=own, checkpoint=file):
            if isinstance(event, Record):
                done, seconds = part * settings.steps + event.step, time.perf_counter() - began
                yield replace(event, step=done, steps=count * settings.steps, seconds=seconds)
        prompts = data.forget[data.forget_parts == part, : model.tokenizer.model_max_length].flatten(0, 1)
        demands[f"fuse {part}"] = Demand(prompts, prompts, settings.erase_scale, adapters.weights())
    minimise(model.unet, demands, settings.ridge, mask, layers)


def _train(
    model: Diffusion,
    data: ForgetRetain,
    adapters: Adapters,
    part: int,
    settings: MACESettings,
    *,
    seed: int,
    checkpoint: Path | None,
) -> Iterator[Record | TargetProgress]:
    """Train the adapters of one concept, the others' being left out."""
    rows = (data.forget_parts[data.forget_which] == part).nonzero().squeeze(1)
    prompts = (data.forget_parts == part).nonzero().squeeze(1)
    density = timestep_density(model.scheduler.config.num_train_timesteps, importance=settings.importance)
    named = concept_places(model, data)

    def loss(model: Diffusion, generator: torch.Generator, targets: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        latents = data.forget_latents[rows[draw(len(rows), settings.batch_size, generator)]].to(model.device)
        which = prompts[torch.randint(0, len(prompts), (settings.batch_size,), generator=generator)]
        timesteps = torch.multinomial(density, settings.batch_size, replacement=True, generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(model.device)
        timesteps = timesteps.to(model.device)
        noisy = model.add_noise(latents, noise, timesteps)
        with cross_attentions(adapters.unet, model.family.layers) as seen:
            model.predict(noisy, timesteps, data.forget[which].to(model.device))
        places = named[which, None, None].to(model.device)  # [n, 1, 1, tokens]
        attention = noisy.new_zeros(())
        for layer, pixels, tokens in seen:
            attention = attention + (attention_maps(layer, pixels, tokens) * places).norm()
        return attention, {"forget": attention}

    with adapters.attached():
        yield from train(model.with_components(unet=adapters), loss, None, settings, seed=seed, checkpoint=checkpoint)


def concept_places(model: Diffusion, data: ForgetRetain) -> Tensor:
    """Return which tokens of the forget prompts are the name's own or end tokens, bool [prompts, tokens].

    Stable Diffusion 1.x pads with the end token, so that all of the padding counts there, as in the authors' code.
    """
    place = torch.arange(data.forget_ids.shape[1])
    first, behind = data.forget_spans.T[..., None]
    return (first <= place) & (place < behind) | (data.forget_ids == model.tokenizer.eos_token_id)


def timestep_density(count: int, *, importance: bool) -> Tensor:
    """Return the weights by which time steps are drawn, float64 [count], not normalised."""
    t = torch.arange(count, dtype=torch.float64)
    if not importance:
        return torch.ones_like(t)
    return (0.05 * (t - 200)).sigmoid() - (0.05 * (t - 400)).sigmoid()
