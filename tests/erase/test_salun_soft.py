"""SalUn-soft's proximal step against a plain transcription of its formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from erase_concept import masks
from erase_concept.data import ForgetRetain, draw
from erase_concept.methods.salun import SalUnSettings, salun
from erase_concept.methods.salun_soft import SalUnSoftSettings, salun_soft, shrink
from erase_concept.pipelines.model import Diffusion
from erase_concept.prompts.concept import Concept
from erase_concept.seed import stage_generator


def test_two_steps_equal_the_formula(
    tiny: Diffusion, square: Concept, data: ForgetRetain, noised: Any, adam: Any
) -> None:
    config = SalUnSoftSettings(steps=2, batch_size=3, lr=1e-2, beta=0.5)
    mask = masks.random(tiny.unet, 0.5, seed=4)
    unet, base = copy.deepcopy(tiny.unet).requires_grad_(True), copy.deepcopy(tiny.unet)
    records = list(salun_soft(tiny, data, mask, config, seed=7))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in unet.parameters()]
    for step, near in enumerate((1e-5, 1e-3)):
        generator = stage_generator(7, "step", step, 0, 0)
        rows = draw(4, 3, generator)
        x_f, t_f, _ = noised(data.forget_latents[rows], generator)
        c_f = tiny.encode_prompts([("a square", "one square")[i] for i in data.forget_which[rows]])
        c_new = tiny.encode_prompts([("a circle", "one circle")[i] for i in data.forget_which[rows]])
        rows = draw(6, 3, generator)
        x_r, t_r, noise_r = noised(data.retain_latents[rows], generator)
        c_r = tiny.encode_prompts([square.retain_prompts[i] for i in data.retain_which[rows]])
        forget = (unet(x_f, t_f, c_f).sample - unet(x_f, t_f, c_new).sample.detach()).square().mean()
        loss = forget + 0.5 * (unet(x_r, t_r, c_r).sample - noise_r).square().mean()
        assert records[step].loss == pytest.approx(loss.item(), rel=near)
        adam(unet, torch.autograd.grad(loss, list(unet.parameters())), moments, step, 0.01, mask)
        threshold = 0.01 * 0.5 * (1 - step / 2)
        with torch.no_grad():
            for p, start in zip(unet.parameters(), base.parameters(), strict=True):
                change = p - start
                p.copy_(start + change.sign() * (change.abs() - threshold).clamp(min=0))
    for (name, p), q in zip(tiny.unet.named_parameters(), unet.parameters(), strict=True):
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def test_shrinking_solves_the_proximal_problem(tiny: Diffusion) -> None:
    """No other point has a smaller  1/2 |x - theta|^2 + threshold |x - theta_o|_1."""
    base = {name: p.detach().clone() for name, p in tiny.unet.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tiny.unet.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)
    moved = {name: p.detach().clone() for name, p in tiny.unet.named_parameters()}
    shrink(tiny.unet, base, 0.008)
    for name, p in tiny.unet.named_parameters():

        def cost(x: torch.Tensor, name: str = name) -> torch.Tensor:
            return 0.5 * (x - moved[name]).square() + 0.008 * (x - base[name]).abs()

        for other in (base[name], moved[name], p + 1e-3, p - 1e-3):
            assert (cost(p) <= cost(other) + 1e-9).all()


def test_weights_within_the_threshold_are_the_bases_bits(tiny: Diffusion) -> None:
    first = next(tiny.unet.parameters())
    first.view(-1)[0] = -0.0
    base = {name: p.detach().clone() for name, p in tiny.unet.named_parameters()}
    with torch.no_grad():
        for p in tiny.unet.parameters():
            p += 1e-3
    shrink(tiny.unet, base, 0.01)
    for name, p in tiny.unet.named_parameters():
        assert torch.equal(p.view(torch.int32), base[name].view(torch.int32)), name


def test_a_larger_beta_changes_the_weights_less_and_none_is_salun(tiny: Diffusion, data: ForgetRetain) -> None:
    base = [p.detach().clone() for p in tiny.unet.parameters()]
    moved = []
    for beta in (0.0, 0.5, 2.0):
        model = tiny.with_components(unet=copy.deepcopy(tiny.unet))
        list(salun_soft(model, data, None, SalUnSoftSettings(steps=4, batch_size=2, lr=1e-3, beta=beta), seed=7))
        moved.append(sum(float((p - q).abs().sum()) for p, q in zip(base, model.unet.parameters(), strict=True)))
        if beta == 0:
            hard = tiny.with_components(unet=copy.deepcopy(tiny.unet))
            list(salun(hard, data, None, SalUnSettings(steps=4, batch_size=2, lr=1e-3), seed=7))
            for p, q in zip(model.unet.parameters(), hard.unet.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert moved[0] > moved[1] > moved[2]


def test_frozen_weights_stay_and_a_killed_run_goes_on(data: ForgetRetain, check_method: Any) -> None:
    check_method(salun_soft, data, SalUnSoftSettings())


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_setting_out_of_range_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"beta\n  Input should be"):
        SalUnSoftSettings(beta=value)
