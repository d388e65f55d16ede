"""EraseDiff's direction against a plain transcription of its formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.methods.erasediff import EraseDiffSettings, erasediff
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator


@pytest.mark.parametrize("eta", [0.0, 0.5, 5.0])
def test_two_steps_equal_the_formulas(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any, eta: float
) -> None:
    config = EraseDiffSettings(steps=2, batch_size=3, lr=1e-2, eta=eta, inner_steps=3, inner_lr=1e-3)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(erasediff(tiny, data, mask, config, seed=7))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    dense = torch.cat([mask.dense(name).view(-1) for name, _ in unet.named_parameters()]).float()
    for step, near in enumerate((1e-4, 1e-2)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        x_f, t_f, _ = noised(data.forget_latents[rows], generator)
        c_f = tiny.encode_prompts([("a square", "one square")[i] for i in data.forget_which[rows]])
        rows = draw(6, 3, generator)
        x_r, t_r, noise_r = noised(data.retain_latents[rows], generator)
        c_r = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        uniform = torch.rand(3, 4, 8, 8, generator=generator)

        def flat_gradient(loss: torch.Tensor, module: Any) -> torch.Tensor:
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))]) * dense

        inner = copy.deepcopy(unet)
        for _ in range(3):
            loss = (inner(x_f, t_f, c_f).sample - uniform).square().mean()
            change = 1e-3 * flat_gradient(loss, inner)
            with torch.no_grad():
                for p, d in zip(inner.parameters(), change.split([p.numel() for p in inner.parameters()]), strict=True):
                    p -= d.view_as(p)
        forget = (unet(x_f, t_f, c_f).sample - uniform).square().mean()
        retain = (unet(x_r, t_r, c_r).sample - noise_r).square().mean()
        gap = forget - (inner(x_f, t_f, c_f).sample - uniform).square().mean()
        assert gap > 0
        g, d = flat_gradient(retain, unet), flat_gradient(forget, unet)
        multiplier = max(0.0, float((eta * (d @ d) - g @ d) / (d @ d)))
        terms = {"forget": forget.item(), "retain": retain.item(), "gap": gap.item(), "multiplier": multiplier}
        assert records[step].terms == pytest.approx(terms, rel=near, abs=1e-3 if step else 1e-5)
        assert records[step].loss == pytest.approx((retain + multiplier * forget).item(), rel=near)
        sizes = [p.numel() for p in unet.parameters()]
        parts = (g + multiplier * d).split(sizes)
        adam(
            unet, [part.view_as(p) for part, p in zip(parts, unet.parameters(), strict=True)], moments, step, 0.01, mask
        )
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-3).float().mean() > 0.99, name


def test_the_inner_steps_leave_no_trace_when_nothing_is_learnt(tiny: Diffusion, data: ForgetRetain) -> None:
    before = copy.deepcopy(tiny.unet.state_dict())
    list(erasediff(tiny, data, None, EraseDiffSettings(steps=2, batch_size=2, lr=0.0, inner_lr=1e-2), seed=7))
    assert all(torch.equal(before[name], value) for name, value in tiny.unet.state_dict().items())


def test_draws_the_concept_to_uniform_noise(tiny: Diffusion, data: ForgetRetain) -> None:
    records = list(erasediff(tiny, data, None, EraseDiffSettings(steps=30, batch_size=4, lr=1e-3, eta=1.0), seed=7))
    assert records[-1].terms["forget"] < 0.8 * records[0].terms["forget"]


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(erasediff, data, EraseDiffSettings())


def test_recomputed_activations_give_the_same_bits(tiny: Diffusion, data: ForgetRetain) -> None:
    config = EraseDiffSettings(steps=2, batch_size=2, lr=1e-3)
    other = tiny.with_components(unet=copy.deepcopy(tiny.unet))
    list(erasediff(tiny, data, None, config, seed=7))
    list(erasediff(other, data, None, replace(config, recompute=True), seed=7))
    state = other.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.unet.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("eta", -1.0), ("inner_steps", 0), ("inner_lr", 0.0)])
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be"):
        EraseDiffSettings(**{name: value})
