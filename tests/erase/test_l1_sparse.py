"""l1-sparse's loss and update against a plain transcription of its formula."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.methods.l1_sparse import L1SparseSettings, l1_sparse
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator


def test_two_steps_equal_the_formula(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any
) -> None:
    config = L1SparseSettings(steps=2, batch_size=3, lr=1e-2, gamma=1e-3)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet = copy.deepcopy(tiny.unet).requires_grad_(True)
    records = list(l1_sparse(tiny, data, mask, config, seed=7))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    for step, near in enumerate((1e-5, 1e-3)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(6, 3, generator)
        x, t, noise = noised(data.retain_latents[rows], generator)
        c = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        retain = (unet(x, t, c).sample - noise).square().mean()
        norm = torch.cat([p.reshape(-1) for p in unet.parameters()]).abs().sum()
        loss = retain + (1e-3, 0.5e-3)[step] * norm
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        assert records[step].terms == pytest.approx({"retain": retain.item(), "l1": norm.item()}, rel=near)
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 0.01, mask)
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def test_the_penalty_makes_the_weights_smaller(tiny: Diffusion, data: ForgetRetain) -> None:
    records = list(l1_sparse(tiny, data, None, L1SparseSettings(steps=10, batch_size=2, lr=1e-3, gamma=0.1), seed=7))
    norms = [record.terms["l1"] for record in records]
    assert norms == sorted(norms, reverse=True)


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(l1_sparse, data, L1SparseSettings(gamma=1e-2))


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_setting_out_of_range_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"gamma\n  Input should be"):
        L1SparseSettings(gamma=value)


def test_the_defaults_leave_the_weights_near_what_they_were(tiny: Diffusion, data: ForgetRetain) -> None:
    """A weight moves by about lr in a step. In a layer of 10,000 inputs torch draws weights of 0.005 on the mean."""
    config = L1SparseSettings()
    layer = torch.nn.Linear(10_000, 50)
    assert config.lr * config.steps <= 0.051 * layer.weight.abs().mean()
    before = [p.detach().clone() for p in tiny.unet.parameters()]
    list(l1_sparse(tiny, data, None, replace(config, steps=50, batch_size=2), seed=7))
    for p, q in zip(before, tiny.unet.parameters(), strict=True):
        assert (p - q).abs().max() <= 1.2 * 50 * config.lr
