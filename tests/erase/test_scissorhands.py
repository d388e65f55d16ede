"""Scissorhands' trimming and repair against plain transcriptions of its formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.methods.scissorhands import ScissorhandsSettings, chosen, scissorhands, trim
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator


@pytest.mark.parametrize("ascent", [0.0, 0.5])
def test_trimming_and_two_steps_equal_the_formulas(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any, ascent: float
) -> None:
    config = ScissorhandsSettings(steps=2, batch_size=3, lr=1e-2, ascent=ascent, trimmed=0.2, trim_batches=2)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(scissorhands(tiny, data, mask, config, seed=7))
    dense = torch.cat([mask.dense(name).view(-1) for name, _ in unet.named_parameters()]).float()
    sizes = [p.numel() for p in unet.parameters()]

    def forget_loss(generator: torch.Generator) -> torch.Tensor:
        rows = draw(4, 3, generator)
        x, t, noise = noised(data.forget_latents[rows], generator)
        c = tiny.encode_prompts([("a square", "one square")[i] for i in data.forget_which[rows]])
        return (unet(x, t, c).sample - noise).square().mean()

    def flat_gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(unet.parameters()))])

    losses = [forget_loss(stage_generator(7, "sensitivity", batch)) for batch in range(2)]
    sums = flat_gradient(losses[0]).abs() + flat_gradient(losses[1]).abs()
    sensitivity = sums * nn.utils.parameters_to_vector(unet.parameters()).detach().abs() * dense
    top = torch.zeros(len(sums), dtype=torch.bool)
    top[sensitivity.argsort(descending=True)[: round(0.2 * int(dense.sum()))]] = True
    generator = stage_generator(7, "trim")
    with torch.no_grad():
        for (name, p), chosen_here in zip(unet.named_parameters(), top.split(sizes), strict=True):
            if p.dim() > 1:
                bound = 1 / math.sqrt(p[0].numel())
                new = (2 * torch.rand(p.shape, generator=generator) - 1) * bound
            else:
                new = torch.full(p.shape, 1.0 if name.endswith("weight") else 0.0)
            p.copy_(torch.where(chosen_here.view_as(p), new, p))
    memory = -flat_gradient(forget_loss(stage_generator(7, "memory"))) * dense

    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    for step, near in enumerate((1e-4, 1e-2)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(6, 3, generator)
        x, t, noise = noised(data.retain_latents[rows], generator)
        c = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        retain = (unet(x, t, c).sample - noise).square().mean()
        forget = forget_loss(generator)
        loss = retain - ascent * forget
        assert records[step].terms == pytest.approx({"forget": forget.item(), "retain": retain.item()}, rel=near)
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        g = flat_gradient(loss) * dense
        if g @ memory < 0:
            g = g - (g @ memory) / (memory @ memory) * memory
        gradients = [part.view_as(p) for part, p in zip(g.split(sizes), unet.parameters(), strict=True)]
        adam(unet, gradients, moments, step, 0.01, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-3).float().mean() > 0.98, name


def test_trims_exactly_the_share_of_the_mask_and_nothing_outside(tiny: Diffusion) -> None:
    mask = masks.random(tiny.unet, 0.5, seed=4)
    scores = {name: torch.rand(p.shape) for name, p in tiny.unet.named_parameters()}
    trimmed = chosen(scores, 0.25, mask)
    assert trimmed.count == round(0.25 * mask.count)
    assert (trimmed - mask).count == 0
    before = {name: p.detach().clone() for name, p in tiny.unet.named_parameters()}
    trim(tiny.unet, trimmed, torch.Generator().manual_seed(0))
    for name, p in tiny.unet.named_parameters():
        assert not ((p != before[name]) & ~trimmed.dense(name)).any()
    assert chosen(scores, 1.0, mask).count == mask.count
    assert chosen(scores, 0.0, None).count == 0


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(scissorhands, data, ScissorhandsSettings())


def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, data: ForgetRetain) -> None:
    config = ScissorhandsSettings(steps=2, batch_size=2, lr=1e-3)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(scissorhands(tiny, data, None, config, seed=7))
    list(scissorhands(other, data, None, replace(config, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())
    assert not other.unet.is_gradient_checkpointing


@pytest.mark.parametrize(("name", "value"), [("trimmed", 1.5), ("trim_batches", 0), ("ascent", float("inf"))])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        ScissorhandsSettings(**{name: value})
