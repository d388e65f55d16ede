"""Gradient ascent's loss and update against a plain transcription of its formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.methods.gradient_ascent import GradientAscentSettings, gradient_ascent
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator


def test_two_steps_equal_the_formula(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any
) -> None:
    config = GradientAscentSettings(steps=2, batch_size=3, lr=1e-2, alpha=0.25)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(gradient_ascent(tiny, data, mask, config, seed=7))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    for step, near in enumerate((1e-5, 1e-3)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        x_f, t_f, noise_f = noised(data.forget_latents[rows], generator)
        c_f = tiny.encode_prompts([("a square", "one square")[i] for i in data.forget_which[rows]])
        rows = draw(6, 3, generator)
        x_r, t_r, noise_r = noised(data.retain_latents[rows], generator)
        c_r = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        forget = (unet(x_f, t_f, c_f).sample - noise_f).square().mean()
        retain = (unet(x_r, t_r, c_r).sample - noise_r).square().mean()
        loss = 0.25 * retain - forget
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        assert records[step].terms == pytest.approx({"forget": forget.item(), "retain": retain.item()}, rel=near)
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 0.01, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def test_raises_the_loss_on_the_concept(tiny: Diffusion, data: ForgetRetain) -> None:
    records = list(gradient_ascent(tiny, data, None, GradientAscentSettings(steps=30, batch_size=4, lr=1e-3), seed=7))
    first, last = records[0].terms, records[-1].terms
    assert last["forget"] > first["forget"]
    assert last["forget"] - first["forget"] > last["retain"] - first["retain"]


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(gradient_ascent, data, GradientAscentSettings())


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_setting_out_of_range_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"alpha\n  Input should be"):
        GradientAscentSettings(alpha=value)
